"""Nothing that is not the driver's own is replaced or deleted, and a finished run is left alone."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")

import torch
from finetune_data import configuration, settings, write_config
from torch import nn

from riskmap_ext.finetune import ConfigError, InputError, finetune, make_maps
from riskmap_ext.finetune.base.files import write_text
from riskmap_ext.finetune.source.network import _largest_convolution, check_forward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", [["--resume"], ["overwrite=true"], []])
@pytest.mark.parametrize("name", ["maps/notes.txt", "fold_0/predictions/a.nii.gz", "config.yaml"])
def test_a_folder_without_a_run(
    riskmap: Callable, config: Path, tmp_path: Path, name: str, options: list[str]
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, _, err = riskmap("finetune", config, *options)
    assert code == 2
    assert f"output: {tmp_path / 'out'} holds {name.rpartition('/')[0] or name}, " in err
    assert "but no run; choose another folder" in err
    assert mine.read_text() == "mine"


def test_an_input_that_links_to_itself(
    riskmap: Callable, root: Path, config: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "data")
    label = tmp_path / "data" / "labels" / "case01.nii.gz"
    label.unlink()
    label.symlink_to(label.name)
    code, _, err = riskmap("finetune", config, f"data.root={tmp_path / 'data'}")
    assert code == 2
    assert f"{label}: " in err


@pytest.mark.parametrize("folder", ["predictions", "fold_1/predictions"])
def test_labels_that_the_run_would_replace(root: Path, tmp_path: Path, folder: str) -> None:
    labels = tmp_path / "out" / folder
    shutil.copytree(root / "labels", labels)
    (tmp_path / "out" / "log.txt").write_text("")
    data = {"root": None, "images": str(root / "images"), "labels": str(labels)}
    for overwrite in (True, False):
        config = configuration(root, tmp_path / "out", data=data, overwrite=overwrite)
        with pytest.raises(ConfigError, match=r"out/.*case0.*\.nii\.gz is an input and would be"):
            finetune(config, progress=False)
    assert len(list(labels.iterdir())) == 5


def test_labels_that_maps_would_replace(root: Path, source: Path, tmp_path: Path) -> None:
    labels = tmp_path / "out" / "maps"
    shutil.copytree(root / "labels", labels)
    (tmp_path / "out" / "log.txt").write_text("")
    data = {"root": None, "images": str(root / "images"), "labels": str(labels)}
    more = {"source": {"checkpoint": str(source)}, "overwrite": True}
    with pytest.raises(ConfigError, match="is an input and would be replaced"):
        make_maps(configuration(root, tmp_path / "out", data=data, **more), progress=False)
    assert len(list(labels.iterdir())) == 5


def test_a_finished_run_may_be_queued_again(
    riskmap: Callable, root: Path, config: Path, tmp_path: Path
) -> None:
    assert riskmap("finetune", config)[0] == 0
    before = (tmp_path / "out" / "last.pt").stat()
    code, out, err = riskmap("finetune", config, "--resume")
    assert (code, err) == (0, "")
    assert "holds a finished run: there is nothing to resume" in out
    assert riskmap("finetune", config, "--resume", "--quiet") == (0, "", "")
    code, _, err = riskmap("finetune", config, "--resume", "train.lr=0.5", "seed=9")
    assert code == 2
    assert "--resume: seed, train.lr: not as in" in err
    assert (tmp_path / "out" / "last.pt").stat() == before


# Files that are named on the command line.


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.yaml")
    return tmp_path / "pipe.yaml"


def test_a_pipe_is_not_replaced(riskmap: Callable, root: Path, pipe: Path) -> None:
    for arguments in (
        ["init", root, "--overwrite"],
        ["evaluate", "--prediction", root / "labels", "--reference", root / "labels"],
    ):
        code, _, err = riskmap(*arguments, "--output", pipe)
        assert code == 2
        assert f"--output: {pipe}: is a pipe or a device; expected a file" in err
    with pytest.raises(InputError, match="is a pipe or a device"):
        write_text(pipe, "")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_is_followed(riskmap: Callable, root: Path, tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    arguments = ["--prediction", root / "labels", "--reference", root / "labels"]
    code, _, _ = riskmap("evaluate", *arguments, "--output", tmp_path / "link.csv")
    assert code == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().startswith("case,")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    code, _, err = riskmap("init", tmp_path / "loop.csv", "--output", tmp_path / "a.yaml")
    assert code == 2
    assert "loop.csv" in err


def test_links_in_a_run_do_not_lead_out_of_it(
    riskmap: Callable, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for name in ("last.pt", "config.yaml", "metrics.csv", "resume.pt"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere" / name)
    code, _, err = riskmap("finetune", config)
    assert (code, err) == (0, "")
    assert not (tmp_path / "elsewhere").exists()


def test_an_image_is_not_replaced(riskmap: Callable, root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "data"
    shutil.copytree(root, mine)
    image = mine / "images" / "case00.nii.gz"
    for arguments, expected in (
        (["init", mine, "--overwrite"], "expected a name that ends in .yaml"),
        (
            ["evaluate", "--prediction", mine / "labels", "--reference", mine / "labels"],
            "expected the name of a CSV file",
        ),
    ):
        code, _, err = riskmap(*arguments, "--output", image)
        assert code == 2
        assert f"--output: {expected}, got {image}" in err
    assert image.read_bytes() == (root / "images" / image.name).read_bytes()


def test_segmentations_that_are_none(
    riskmap: Callable, root: Path, source: Path, tmp_path: Path
) -> None:
    image, output = root / "images" / "case00.nii.gz", tmp_path / "masks"
    arguments = ["predict", source, "--image", image, "--output", output, "--skip-existing"]
    output.mkdir()
    (output / image.name).touch()
    assert riskmap(*arguments)[0] == 0
    assert (output / image.name).stat().st_size > 0
    (output / image.name).unlink()
    (output / image.name).mkdir()
    code, _, err = riskmap(*arguments)
    assert code == 2
    assert f"--output: {output / image.name}: is a folder; expected a file" in err


# What a patch takes is known before it is computed.


def test_memory_of_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert _largest_convolution(network, [10, 12], 1) == 4 * 10 * 12 * (8 + 2)
    monkeypatch.setattr("riskmap_ext.finetune.source.network.available_memory", lambda: 4700)
    with pytest.raises(ConfigError, match=r"patch_size: a patch of \[10, 12\] takes .* or more"):
        check_forward(network, [10, 12], 2, 1, "train.patch_size")
    check_forward(network, [10, 11], 2, 1, "train.patch_size")
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_patch_beyond_memory(riskmap: Callable, root: Path, source: Path, tmp_path: Path) -> None:
    arguments = ["--image", root / "images", "--output", tmp_path / "masks"]
    code, _, err = riskmap("predict", source, *arguments, "--patch-size", "1000000,1000000")
    assert code == 2
    assert "--patch-size: a patch of [1000000, 1000000] takes" in err
    config = write_config(tmp_path / "run.yaml", settings(root, tmp_path / "out"))
    code, _, err = riskmap("finetune", config, "--dry-run", "train.patch_size=[200000,200000]")
    assert code == 2
    assert "train.patch_size: a patch of [200000, 200000] takes" in err
