"""riskmap predict and riskmap evaluate."""

from __future__ import annotations

import csv
import errno
import math
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import configuration, phantom, save
from typer.testing import CliRunner

from riskmap_ext.finetune import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    finetune,
    predict_images,
    score_files,
)
from riskmap_ext.finetune.commands import app
from riskmap_ext.finetune.evaluate import summary

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(turned_root: Path) -> Path:
    return turned_root


@pytest.fixture(scope="module", params=[None, [1.5, 1.5, 1.5]], ids=["as_is", "resampled"])
def run(
    request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("run") / "run"
    data = {"validation": 2, "spacing": request.param}
    train = {"steps": 20, "validate_every": 0, "lr": 0.02}
    write = {"predictions": True}
    finetune(configuration(root, output, data=data, train=train, write=write), progress=False)
    return output


class TestPredict:
    def test_the_folder_of_a_run_is_its_last_checkpoint(
        self, run: Path, root: Path, tmp_path: Path
    ) -> None:
        image = next((root / "images").iterdir())
        named, folder = (
            predict_images(given, [image], tmp_path / name, progress=False)[0]
            for name, given in (("file", run / "last.pt"), ("folder", run))
        )
        assert np.array_equal(nib.load(named).dataobj, nib.load(folder).dataobj)

    def test_a_blank_image_is_told(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        blank = tmp_path / "blank.nii.gz"
        save(blank, np.full((16, 16, 16), 3.0, np.float32))
        predict_images(run / "last.pt", [blank], tmp_path / "out")
        told = " ".join("".join(capsys.readouterr()).split())
        assert "blank: every voxel has the same intensity" in told

    def test_gives_what_the_run_gave(self, run: Path, root: Path, tmp_path: Path) -> None:
        expected = sorted((run / "predictions").iterdir())
        images = [root / "images" / path.name for path in expected]
        found = predict_images(run / "last.pt", images, tmp_path / "out", progress=False)
        assert [path.name for path in found] == [path.name for path in expected]
        for one, other, image in zip(found, expected, images, strict=True):
            volume, wanted, source = (nib.load(path) for path in (one, other, image))
            assert np.array_equal(np.asarray(volume.dataobj), np.asarray(wanted.dataobj))
            assert volume.shape == source.shape
            assert volume.get_data_dtype() == np.uint8
            np.testing.assert_allclose(volume.affine, source.affine, atol=1e-6)
            assert len(np.unique(np.asarray(volume.dataobj))) > 1

    def test_command(self, run: Path, root: Path, tmp_path: Path) -> None:
        arguments = ["predict", str(run / "last.pt"), "--image", str(root / "images")]
        arguments += ["--output", str(tmp_path / "out"), "--quiet"]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert len(list((tmp_path / "out").iterdir())) == 4
        again = CliRunner().invoke(app, arguments)
        assert isinstance(again.exception, ConfigError)
        assert "exists already; --overwrite" in str(again.exception)
        assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0

    def test_errors_come_before_any_prediction(self, run: Path, root: Path, tmp_path: Path) -> None:
        bad = tmp_path / "bad.nii.gz"
        bad.write_bytes(b"no image")
        good = root / "images" / "case00.nii.gz"
        series = save(tmp_path / "series.nii.gz", np.zeros((4, 4, 4, 3), np.float32))
        with pytest.raises(DataError, match=r"bad\.nii\.gz: cannot be read") as told:
            predict_images(run / "last.pt", [good, bad, series], tmp_path / "out", progress=False)
        assert "series.nii.gz: expected a 3-D volume, got 4-D" in str(told.value)
        twin = tmp_path / "twin" / good.name
        twin.parent.mkdir()
        shutil.copy(good, twin)
        with pytest.raises(DataError, match="has the same name as"):
            predict_images(run / "last.pt", [good, twin], tmp_path / "out", progress=False)
        with pytest.raises(ConfigError, match="is the image itself"):
            predict_images(run / "last.pt", [twin], twin.parent, overwrite=True, progress=False)
        with pytest.raises(ConfigError, match=r"device: expected auto, .* got 'gpu'"):
            predict_images(run / "last.pt", [good], tmp_path / "out", device="gpu", progress=False)
        assert not (tmp_path / "out").exists()

    def test_a_bad_image_does_not_end_the_others(
        self, run: Path, root: Path, tmp_path: Path
    ) -> None:
        images = tmp_path / "images"
        shutil.copytree(root / "images", images)
        bad = images / "case01.nii.gz"
        volume = nib.load(bad)
        values = volume.get_fdata().astype(np.float32)
        values[3, 3, 3] = np.nan
        save(bad, values, volume.affine)
        with pytest.raises(DataError, match=r"case01\.nii\.gz: 1 of .* voxels are NaN"):
            predict_images(run / "last.pt", [images], tmp_path / "out", progress=False)
        names = [path.name for path in sorted((tmp_path / "out").iterdir())]
        assert names == ["case00.nii.gz", "case02.nii.gz", "case03.nii.gz"]
        shutil.copy(root / "images" / bad.name, bad)
        found = predict_images(
            run / "last.pt", [images], tmp_path / "out", skip_existing=True, progress=False
        )
        assert [path.name for path in found] == [bad.name]

    def test_a_full_disk(
        self, run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(nib, "save", full)
        with pytest.raises(InputError, match=r"case00\.nii\.gz: cannot be written \(No space left"):
            predict_images(run / "last.pt", [root / "images"], tmp_path / "out", progress=False)
        assert not list((tmp_path / "out").iterdir())

    def test_resume_file_as_checkpoint(self, root: Path, tmp_path: Path) -> None:
        torch.save({"format": "riskmap_ext.resume.1"}, tmp_path / "resume.pt")
        with pytest.raises(CheckpointError, match=r"resume\.pt: is what --resume goes on from"):
            predict_images(tmp_path / "resume.pt", [root / "images"], tmp_path, progress=False)


def ball(radius: float, centre: float = 10.0, size: int = 24) -> np.ndarray:
    axes = np.indices((size, size, size)) - np.array([centre, 12, 12]).reshape(3, 1, 1, 1)
    return (np.sqrt((axes**2).sum(0)) <= radius).astype(np.uint8)


class TestScores:
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        """Case a: found, 3 mm apart. Case b: 1 missed, 2 extra. Case c: neither has 2."""
        affine = np.diag([1.5, 1.5, 1.5, 1.0])
        predictions, references = tmp_path / "predictions", tmp_path / "references"
        two = np.zeros((24, 24, 24), np.uint8)
        two[2:5, 2:5, 2:5] = 2
        cases = {
            "a": (ball(6, 12) + two, ball(6, 10) + two),
            "b": (two, ball(4)),
            "c": (ball(5), ball(5)),
        }
        for name, (predicted, reference) in cases.items():
            save(predictions / f"{name}.nii.gz", predicted, affine)
            save(references / f"{name}.nii.gz", reference, affine)
        return predictions, references

    def test_outcomes_and_values(self, tmp_path: Path) -> None:
        scores = score_files(*map(str, self.folders(tmp_path)), progress=False)
        by = {(score.case, score.structure): score for score in scores}
        assert {key: score.outcome for key, score in by.items()} == {
            ("a", "1"): "found",
            ("a", "2"): "found",
            ("b", "1"): "missed",
            ("b", "2"): "extra",
            ("c", "1"): "found",
            ("c", "2"): "absent",
        }
        shifted = by["a", "1"]
        overlap = (ball(6, 12) & ball(6, 10)).sum()
        assert shifted.dice == pytest.approx(2 * overlap / (2 * ball(6, 10).sum()))
        assert shifted.hd95 == pytest.approx(3.0, abs=0.05)  # two voxels of 1.5 mm
        assert 0.1 < shifted.surface_dice < 0.8
        same = by["c", "1"]
        assert (same.dice, same.surface_dice, same.hd95) == (1.0, 1.0, 0.0)
        assert (by["b", "1"].dice, by["b", "1"].surface_dice) == (0.0, 0.0)
        assert math.isnan(by["b", "1"].hd95)
        assert math.isnan(by["c", "2"].dice)
        assert by["b", "1"].reference_voxels == ball(4).sum()

    def test_nothing_is_averaged_away(self, tmp_path: Path) -> None:
        scores = score_files(*self.folders(tmp_path), progress=False)
        table = summary(scores, 1.0)
        rows = list(zip(*(column._cells for column in table.columns), strict=True))
        first, second = rows
        dice = [score.dice for score in scores if score.structure == "1"]
        assert first[:4] == ("1", "3 of 3", "1", "-")
        assert first[4] == f"{sum(dice) / 3:.3f}"
        assert first[5] == "0.000"
        assert second[:4] == ("2", "1 of 3", "-", "1")

    def test_tolerance(self, tmp_path: Path) -> None:
        folders = self.folders(tmp_path)
        values = [
            score_files(*folders, tolerance=tolerance, progress=False)[0].surface_dice
            for tolerance in (0.0, 1.6, 3.1)
        ]
        assert values[0] < values[1] < values[2] == 1.0

    def test_regions_and_csv(self, tmp_path: Path) -> None:
        predictions, references = self.folders(tmp_path)
        table = tmp_path / "scores.csv"
        arguments = ["evaluate", "--prediction", str(predictions), "--reference", str(references)]
        arguments += ["--structure", "both=1,2", "--structure", "two=2", "--output", str(table)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "both" in result.output
        rows = list(csv.DictReader(table.open()))
        assert [(row["case"], row["structure"]) for row in rows[:2]] == [
            ("a", "both"),
            ("a", "two"),
        ]
        assert rows[2]["outcome"] == "found"  # b: 2 for 1 is still in the region

    def test_every_file_counts(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        predictions, references = self.folders(tmp_path)
        save(predictions / "a.nii.gz", 3 * ball(2), np.diag([1.5, 1.5, 1.5, 1.0]))
        extra = [s for s in score_files(predictions, references) if s.structure == "3"]
        assert [score.outcome for score in extra] == ["extra", "absent", "absent"]
        score_files(predictions, references, structures={"typo": [7]})
        assert "structure typo occurs in no file" in capsys.readouterr().out
        (predictions / "b.nii.gz").unlink()
        with pytest.raises(DataError, match=r"no prediction for b of .*--partial"):
            score_files(predictions, references, progress=False)
        scores = score_files(predictions, references, partial=True, progress=False)
        assert {score.case for score in scores} == {"a", "c"}
        shutil.copy(predictions / "c.nii.gz", predictions / "c.nii.gz.nii.gz")
        save(predictions / "a.nii", ball(2))
        with pytest.raises(DataError, match="has the same name as"):
            score_files(predictions, references, partial=True, progress=False)

    def test_output_is_looked_at_first(self, tmp_path: Path) -> None:
        predictions, references = self.folders(tmp_path)
        arguments = ["evaluate", "--prediction", str(predictions), "--reference", str(references)]
        result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path)])
        assert "is a folder; expected a file" in str(result.exception)

    def test_errors(self, tmp_path: Path) -> None:
        predictions, references = self.folders(tmp_path)
        image, _ = phantom(0, shape=(24, 24, 24))
        soft = save(tmp_path / "soft.nii.gz", image, np.diag([1.5, 1.5, 1.5, 1.0]))
        with pytest.raises(DataError, match=r"soft\.nii\.gz: .* are not whole numbers"):
            score_files(soft, references / "a.nii.gz", progress=False)
        other = save(tmp_path / "other.nii.gz", ball(4))
        with pytest.raises(DataError, match="expected the grid of its image"):
            score_files(other, references / "a.nii.gz", progress=False)
        (references / "c.nii.gz").unlink()
        with pytest.raises(DataError, match="no reference for c"):
            score_files(predictions, references, progress=False)
        with pytest.raises(ConfigError, match="two files or two folders"):
            score_files(predictions, references / "a.nii.gz", progress=False)
        with pytest.raises(ConfigError, match="--tolerance: expected a number >= 0"):
            score_files(predictions, references, tolerance=-1, progress=False)
        for given in ("lesion", "=1", "lesion=x"):
            arguments = ["evaluate", "--prediction", str(predictions)]
            arguments += ["--reference", str(references), "--structure", given]
            result = CliRunner().invoke(app, arguments)
            assert "--structure: expected" in str(result.exception)
