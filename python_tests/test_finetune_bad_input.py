"""Bad files, folders and disks for every command: one message, exit code 2, nothing half-made."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")

import yaml
from finetune_data import configuration, phantom, save, settings, write_cases

from riskmap_ext.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = ("finetune", "dry-run", "map", "rank", "predict", "evaluate")
READS_LABELS = tuple(c for c in COMMANDS if c != "predict")


class Place:
    """A data set, a run that has ended, and each command on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "made"
        self.image = folder / "data" / "images" / "case01.nii.gz"
        self.label = folder / "data" / "labels" / "case01.nii.gz"
        self.checkpoint = folder / "run" / "last.pt"
        self.config = folder / "run.yaml"

    def command(self, name: str) -> list[object]:
        data = self.folder / "data"
        images, labels = data / "images", data / "labels"
        run = ["finetune", self.config]
        return {
            "finetune": run,
            "dry-run": [*run, "--dry-run"],
            "map": [
                *("map", "--source", self.checkpoint, "--image", images, "--label", labels),
                *("--output", self.output, "--classes", "background,box,crate"),
            ],
            "rank": [
                *("rank", self.config, "--source", self.checkpoint),
                *("--output", self.output / "ranking.csv", f"cache={self.folder / 'cache'}"),
            ],
            "predict": ["predict", self.checkpoint, "--image", images, "--output", self.output],
            "evaluate": [
                *("evaluate", "--prediction", self.folder / "predictions", "--reference", labels),
                *("--output", self.output / "scores.csv"),
            ],
        }[name]

    def left_behind(self) -> list[Path]:
        """Files of what was to be made: none may be there, or half there."""
        return [path for path in self.output.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("place"))
    write_cases(place.folder / "data", 3)
    finetune(configuration(place.folder / "data", place.folder / "run"), progress=False)
    shutil.copytree(place.folder / "data" / "labels", place.folder / "predictions")
    return place


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    """A copy that may be spoilt."""
    shutil.copytree(made.folder, tmp_path / "place")
    place = Place(tmp_path / "place")
    content = settings(place.folder / "data", place.output)
    content["source"] = {"checkpoint": str(place.checkpoint)}
    place.config.write_text(yaml.safe_dump(content))
    return place


def refused(answer: tuple[int, str, str], *told: object) -> str:
    code, _, err = answer
    assert code == 2, err
    assert err.startswith("riskmap: error: ")
    assert "Traceback" not in err
    for part in told:
        assert str(part) in err
    return err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_work(riskmap: Callable, place: Place, name: str) -> None:
    code, _, err = riskmap(*place.command(name))
    assert (code, err) == (0, "")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_within_the_voxels(path: Path) -> None:
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: len(content) // 2]))


def text(path: Path) -> None:
    path.write_text("no image")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [truncated, cut_within_the_voxels, text, empty])
@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_files(
    riskmap: Callable, place: Place, name: str, spoil: Callable[[Path], None]
) -> None:
    path = place.image if name in ("predict", "map") else place.label
    spoil(path)
    answer = riskmap(*place.command(name))
    refused(answer, path)
    if name != "predict":
        assert place.left_behind() == []
    # What predict has segmented before is whole and stays.
    assert not any(path.name.startswith(".") for path in place.left_behind())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_header_of_more_than_memory(riskmap: Callable, place: Place, name: str) -> None:
    for path in (place.image, place.label):
        content = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<3h", content, 42, 30000, 30000, 30000)
        path.write_bytes(gzip.compress(bytes(content)))
    refused(riskmap(*place.command(name)), "of memory is available")


@pytest.mark.parametrize("name", READS_LABELS)
def test_a_label_of_another_grid(riskmap: Callable, place: Place, name: str) -> None:
    save(place.label, phantom(1)[1][:-2])
    refused(riskmap(*place.command(name)), place.label.name, "expected the grid of")
    assert place.left_behind() == []


@pytest.mark.parametrize("name", ["finetune", "dry-run", "map", "rank"])
def test_a_label_of_another_class(riskmap: Callable, place: Place, name: str) -> None:
    label = phantom(1)[1]
    label[0, 0, 0] = 7
    save(place.label, label)
    refused(riskmap(*place.command(name)), place.label, "label values 7 are not in")
    assert place.left_behind() == []


@pytest.mark.parametrize("name", ["finetune", "dry-run", "map", "rank", "predict"])
def test_an_image_with_values_that_are_no_numbers(
    riskmap: Callable, place: Place, name: str
) -> None:
    image = phantom(1)[0]
    image[3, 3, 3] = np.nan
    save(place.image, image)
    refused(riskmap(*place.command(name)), place.image, "NaN or infinite")


@pytest.mark.parametrize("name", ["finetune", "dry-run", "map", "rank", "predict"])
@pytest.mark.parametrize("spoil", [truncated, text, empty])
def test_a_damaged_checkpoint(
    riskmap: Callable, place: Place, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(place.checkpoint)
    refused(riskmap(*place.command(name)), place.checkpoint)
    assert place.left_behind() == []


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_is_a_file(riskmap: Callable, place: Place, name: str) -> None:
    place.output.write_text("mine")
    refused(riskmap(*place.command(name)), place.output, "is a file; expected a folder")
    assert place.output.read_text() == "mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written(riskmap: Callable, place: Place, name: str) -> None:
    place.output.mkdir()
    place.output.chmod(0o500)
    if os.access(place.output, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        refused(riskmap(*place.command(name)), place.output, "cannot be written")
    finally:
        place.output.chmod(0o700)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_read(riskmap: Callable, place: Place, name: str) -> None:
    folder = (place.image if name == "predict" else place.label).parent
    folder.chmod(0)
    if os.access(folder, os.R_OK):
        pytest.skip("this user may read everything")
    try:
        code, _, err = riskmap(*place.command(name))
        assert code == 2
        assert "Traceback" not in err
        # An option's path is refused by the parser, in a box that breaks long lines.
        assert str(folder) in err or "is not readable" in " ".join(err.split())
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("name", ["finetune", "map", "rank", "predict", "evaluate"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk(
    riskmap: Callable, place: Place, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    """After so many files."""
    replace = os.replace
    written: list[Path] = []

    def full(source: Path, target: Path) -> None:
        if len(written) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    answer = riskmap(*place.command(name))
    if answer[0] != 0:  # few files are written by some commands
        refused(answer, "cannot be written (No space left on device); is the disk full?")
    else:
        assert len(written) <= after
    assert not [p for p in place.left_behind() if p.name.startswith(".") and p.name != ".lock"]
    monkeypatch.setattr(os, "replace", replace)
    again = place.command(name)
    if name in ("finetune", "map"):
        again.append("overwrite=true")
    if name == "predict":
        again.append("--overwrite")
    code, _, err = riskmap(*again)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_folders_that_are_not_there(riskmap: Callable, place: Place, name: str) -> None:
    folder = (place.image if name == "predict" else place.label).parent
    shutil.rmtree(folder)
    refused(riskmap(*place.command(name)), folder.name)
    assert place.left_behind() == []
