"""A run that was cut off goes on from its last validation and ends in the same bits."""

from __future__ import annotations

import csv
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import configuration, stop_at

from riskmap_ext.finetune import finetune
from riskmap_ext.finetune.base.errors import ConfigError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = {
    "steps": 8,
    "validate_every": 2,
    "optimizer": "AdamW",
    "schedule": "cosine",
    "augment": {"rotation": 15, "noise": 0.1},
}
NETWORK = {
    "name": "UNet",
    "args": {
        "spatial_dims": 2,
        "channels": [4, 8],
        "strides": [2],
        "num_res_units": 1,
        "dropout": 0.2,
    },
}
SECONDS = "seconds"  # the only column that may differ


@pytest.fixture(scope="module")
def unbroken(root: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    finetune(config(root, output, source), progress=False)
    return output


def config(root: Path, output: Path, source: Path, **sections: Any) -> Any:
    sections = {
        "train": TRAIN,
        "network": NETWORK,
        "source": {"checkpoint": str(source)},
        "risk": {"use": True},
    } | sections
    return configuration(root, output, **sections)


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("last.pt", "best.pt"):
        one, other = (torch.load(run / name, weights_only=True) for run in (found, expected))
        assert one["progress"] == other["progress"]
        assert one["state_dict"].keys() == other["state_dict"].keys()
        for key, value in other["state_dict"].items():
            assert torch.equal(one["state_dict"][key], value), key
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (found, expected)]
    for row in (*rows[0], *rows[1]):
        del row[SECONDS]
    assert rows[0] == rows[1]
    for name in ("dice.csv", "losses.csv"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 8])
def test_ends_in_the_same_bits(
    batch: int,
    root: Path,
    source: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = config(root, tmp_path / "run", source)
    with monkeypatch.context() as patch:
        stop_at(batch, patch)
        with pytest.raises(KeyboardInterrupt) as stopped:
            finetune(run, progress=False)
    kept = (tmp_path / "run" / "resume.pt").exists()
    assert kept == (batch > 2)
    assert ("--resume" in stopped.value.args[0]) == kept
    torch.rand(3)  # what the process has drawn before is of no matter
    result = finetune(run, progress=False, resume=True)
    assert_same_run(tmp_path / "run", unbroken)
    assert [row["step"] for row in result.history] == [2, 4, 6, 8]
    assert not (tmp_path / "run" / "resume.pt").exists()


def test_resumes_twice(
    root: Path, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(root, tmp_path / "run", source)
    for batch, resume in ((4, False), (3, True)):
        with monkeypatch.context() as patch:
            stop_at(batch, patch)
            with pytest.raises(KeyboardInterrupt):
                finetune(run, progress=False, resume=resume)
    finetune(run, progress=False, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_cut_off_after_the_last_step(
    root: Path, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(root, tmp_path / "run", source)
    with monkeypatch.context() as patch:
        patch.setattr("riskmap_ext.finetune.train.finetune.write_dice", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(run, progress=False)
    finetune(run, progress=False, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_cut_off_while_overlays_are_drawn_and_moved(
    root: Path, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {"overlays": True, "tensorboard": False}
    with monkeypatch.context() as patch:
        patch.setattr("riskmap_ext.finetune.train.finetune.comparison", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(config(root, tmp_path / "run", source, write=write), progress=False)
    assert (tmp_path / "run" / "dice.csv").exists()
    (tmp_path / "run").rename(tmp_path / "moved")
    finetune(config(root, tmp_path / "moved", source, write=write), progress=False, resume=True)
    assert_same_run(tmp_path / "moved", unbroken)
    assert list((tmp_path / "moved" / "overlays").iterdir())


def test_cut_off_while_the_report_of_a_run_without_validation_is_written(
    root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(root, tmp_path / "run", source, data={"validation": 0})
    with monkeypatch.context() as patch:
        patch.setattr("riskmap_ext.finetune.train.finetune.report_at_end", _interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"an unfinished run \(--resume goes on"):
            finetune(run, progress=False)
    finetune(run, progress=False, resume=True)
    assert "unfinished" not in (run.output / "report.html").read_text()
    with pytest.raises(ConfigError, match="holds a finished run"):
        finetune(run, progress=False, resume=True)


def test_a_cache_that_has_rotted_is_made_again(root: Path, source: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    finetune(config(root, tmp_path / "one", source, cache=cache), progress=False)
    for path in (tmp_path / "cache").iterdir():
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda each: each.file_size)
        # Beyond the entry's own header, within its bytes.
        place = largest.header_offset + 300
        content[place] ^= 1
        path.write_bytes(content)
    finetune(config(root, tmp_path / "two", source, cache=cache), progress=False)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert "from the cache" not in (tmp_path / "two" / "log.txt").read_text()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class TestRefuses:
    def stopped(self, root: Path, source: Path, tmp_path: Path, patch: Any) -> Path:
        with patch.context() as inner:
            stop_at(4, inner)
            with pytest.raises(KeyboardInterrupt):
                finetune(config(root, tmp_path / "run", source), progress=False)
        return tmp_path / "run"

    def test_another_configuration(
        self, root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = self.stopped(root, source, tmp_path, monkeypatch)
        other = config(root, output, source, train={**TRAIN, "lr": 0.5}, seed=3)
        with pytest.raises(ConfigError, match=r"--resume: seed, train\.lr: not as in"):
            finetune(other, progress=False, resume=True)
        without = config(root, output, source)
        with pytest.raises(ConfigError, match="holds an unfinished run"):
            finetune(without, progress=False)

    def test_another_source_in_its_place(
        self, root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = tmp_path / "source.pt"
        shutil.copy(source, mine)
        output = self.stopped(root, mine, tmp_path, monkeypatch)
        content = torch.load(source, weights_only=True)
        next(iter(content["state_dict"].values())).add_(0.1)
        torch.save(content, mine)
        with pytest.raises(ConfigError, match="source checkpoint or the cases have"):
            finetune(config(root, output, mine), progress=False, resume=True)

    def test_checkpoints_that_nothing_goes_on_from(
        self, root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = self.stopped(root, source, tmp_path, monkeypatch)
        (output / "resume.pt").unlink()
        before = (output / "best.pt").read_bytes()
        with pytest.raises(ConfigError, match=r"holds last\.pt and best\.pt, but no resume\.pt"):
            finetune(config(root, output, source), progress=False, resume=True)
        assert (output / "best.pt").read_bytes() == before

    def test_a_damaged_file(
        self, root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = self.stopped(root, source, tmp_path, monkeypatch)
        path = output / "resume.pt"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ConfigError, match=r"resume\.pt is damaged"):
            finetune(config(root, output, source), progress=False, resume=True)

    def test_a_finished_run(self, root: Path, source: Path, unbroken: Path) -> None:
        with pytest.raises(ConfigError, match="nothing to resume"):
            finetune(config(root, unbroken, source), progress=False, resume=True)

    def test_a_full_disk(
        self, root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

        output = self.stopped(root, source, tmp_path, monkeypatch)
        before = (output / "resume.pt").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("torch.save", full)
            with pytest.raises(InputError, match=r"last\.pt: cannot be written"):
                finetune(config(root, output, source), progress=False, resume=True)
        assert (output / "resume.pt").read_bytes() == before
