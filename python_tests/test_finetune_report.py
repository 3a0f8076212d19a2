"""The report of a run: its numbers are those of the files, and it says what it lacks."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import configuration, rows_of, save, stop_at, train_source, write_cases
from html_page import Page

import riskmap_ext
from riskmap_ext.finetune import finetune, make_maps
from riskmap_ext.finetune.base.errors import InputError
from riskmap_ext.finetune.base.log import MISSING
from riskmap_ext.finetune.evaluate import score_files
from riskmap_ext.finetune.report.cases import CaseResults, read_results
from riskmap_ext.finetune.report.read import Leep, read_run
from riskmap_ext.finetune.report.write import run_page, write_report

pytestmark = pytest.mark.usefixtures("one_thread")

# Names that would be markup, were they not escaped.
CLASSES = ["background", "box", "<script>alert(1)</script>"]
MERGED = {"classes": ["background", "a & b"], "label_map": {1: 1, 2: 1}}
TRAIN = {"steps": 6, "validate_every": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last case has no voxel of class 2."""
    folder = tmp_path_factory.mktemp("data")
    affine = np.array([[0, 0, -1.5, 4], [-1, 0, 0, 3], [0, 2, 0, -7], [0, 0, 0, 1]], dtype=float)
    names = write_cases(folder, 6, affine=affine, shape=(20, 10, 24))
    path = folder / "labels" / f"{names[-1]}.nii.gz"
    label = np.asarray(nib.load(path).dataobj)
    save(path, np.where(label == 2, 0, label), affine)
    return folder


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_source(root, tmp_path_factory.mktemp("source") / "run", 30, MERGED, lr=0.02)


@pytest.fixture(scope="module")
def run(root: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("target") / "run"
    finetune(config(root, output, source), progress=False)
    return output


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def config(root: Path, output: Path, source: Path | None, **sections: Any) -> Any:
    given: dict[str, Any] = {
        "train": TRAIN,
        "data": {"train": 3, "validation": 3, "classes": CLASSES},
    }
    if source is not None:
        given |= {"source": {"checkpoint": str(source)}, "risk": {"use": True}}
    return configuration(root, output, **(given | sections))


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def table(page: Page, first: str) -> list[list[str]]:
    """Rows of the table whose header starts so, as far as they have its columns."""
    start = next(i for i, row in enumerate(page.rows) if row[0] == first)
    width = len(page.rows[start])
    rows = [page.rows[start]]
    for row in page.rows[start + 1 :]:
        if len(row) != width:
            break
        rows.append(row)
    return rows


class TestFinished:
    def test_written_at_the_end_and_well_formed(self, run: Path) -> None:
        html = (run / "report.html").read_text(encoding="utf-8")
        page = Page(html)
        assert page.open == []
        assert "Unfinished" not in page.text
        assert len(html) < 3e6
        assert html == write_report(run).read_text(encoding="utf-8")

    def test_loads_nothing(self, run: Path) -> None:
        html = (run / "report.html").read_text(encoding="utf-8")
        page = Page(html)
        assert {link.partition(",")[0] for link in page.links} == {"data:image/png;base64"}
        assert not re.search(r"https?://|@import|url\(", html)
        assert not {"script", "link", "iframe", "object"} & page.tags

    def test_names_are_escaped(self, run: Path) -> None:
        html = (run / "report.html").read_text(encoding="utf-8")
        assert "<script" not in html
        assert "&lt;script&gt;alert(1)" in html
        assert "a &amp; b" in html
        assert CLASSES[2] in Page(html).text

    def test_validations(self, run: Path) -> None:
        rows = rows_of(run / "metrics.csv")
        header, *shown = table(page_of(run), "step")
        assert header == ["step", "loss", *CLASSES[1:], "mean Dice", "learning rate", "seconds"]
        assert [row[0] for row in shown] == [row["step"] for row in rows] == ["2", "4", "6"]
        for row, expected in zip(shown, rows, strict=True):
            for cell, value in zip(row[1:], list(expected.values())[1:], strict=True):
                assert float(cell) == pytest.approx(float(value), rel=1e-3)

    def test_classes(self, run: Path) -> None:
        rows = rows_of(run / "dice.csv")
        header, *shown = table(page_of(run), "class")
        assert [row[0] for row in shown] == [*CLASSES[1:], "mean"]
        assert shown[-1][1] == f"{float(rows[-2]['mean']):.3f}"
        for row in shown[:-1]:
            values = [float(case[row[0]]) for case in rows[:-2] if case[row[0]] != "nan"]
            assert row[1] == f"{float(rows[-2][row[0]]):.3f}"
            assert row[2] == f"{np.std(values, ddof=1):.3f}"
            assert row[3:5] == [f"{min(values):.3f}", f"{max(values):.3f}"]
            assert row[5] == f"{rows[-1][row[0]]} of 3"
        assert [row[5] for row in shown[:-1]] == ["3 of 3", "2 of 3"]
        surfaces = ["mean NSD", "mean HD95, mm", "median HD95, mm"]
        assert header[6:] == ["missed", "extra", *surfaces]

    def test_scores_are_those_of_evaluate(self, run: Path, root: Path, tmp_path: Path) -> None:
        for path in (run / "predictions").iterdir():
            save_to = tmp_path / "labels" / path.name
            save_to.parent.mkdir(exist_ok=True)
            shutil.copy(root / "labels" / path.name, save_to)
        names = {name: [value] for value, name in enumerate(CLASSES) if value}
        expected = score_files(
            run / "predictions", tmp_path / "labels", structures=names, progress=False
        )
        found = read_results(read_run(run)).scores
        assert {(s.case, s.structure): s.outcome for s in found} == {
            (s.case, s.structure): s.outcome for s in expected
        }
        wanted = {(s.case, s.structure): s for s in expected}
        for score in found:
            other = wanted[score.case, score.structure]
            for name in ("dice", "surface_dice", "hd95"):
                one, two = getattr(score, name), getattr(other, name)
                assert one == pytest.approx(two, nan_ok=True)

    def test_cases_by_rank(self, run: Path) -> None:
        means = {row["case"]: float(row["mean"]) for row in rows_of(run / "dice.csv")[:-2]}
        order = sorted(means, key=lambda name: means[name])
        drawn = read_results(read_run(run)).drawn
        assert [case.rank for case in drawn] == ["best", "median", "worst"]
        assert [case.name for case in drawn] == order[::-1]
        for case in drawn:
            assert case.panels is not None
            panels = ["image", "label", "risk map", "prediction", "errors"]
            assert list(case.panels.pictures) == panels
            assert case.panels.weights is not None
            low, high = case.panels.weights
            assert 1 <= low < high <= 10.001
        page = page_of(run)
        assert len(page.links) == 15
        assert all(base64.b64decode(x.partition(",")[2])[:4] == b"\x89PNG" for x in page.links)

    def test_leep(self, run: Path, source: Path) -> None:
        leep = json.loads((run / "leep.json").read_text())
        conditional = np.array(leep["conditional"])
        assert conditional.shape == (3, 2)
        np.testing.assert_allclose(conditional.sum(axis=0), 1)
        assert (leep["classes"], leep["source_classes"]) == (CLASSES, MERGED["classes"])
        mass = np.array(leep["source_frequencies"])
        np.testing.assert_allclose(conditional @ mass, leep["class_frequencies"], atol=1e-6)
        entropy = -sum(f * math.log(f) for f in leep["class_frequencies"])
        assert leep["label_entropy"] == pytest.approx(entropy)
        log = (run / "log.txt").read_text()
        assert f"LEEP score {leep['score']:.4f}" in log

        page = page_of(run)
        header, *shown = table(page, "target class")
        assert header == ["target class", *MERGED["classes"], "of all voxels"]
        for row, expected in zip(shown[:-1], conditional, strict=True):
            assert [float(c) for c in row[1:3]] == pytest.approx(expected, abs=1e-3)
        told = leep["score"] + entropy
        assert f"{told:.4f} nats, {told / entropy:.1%} of H(Y)" in page.text
        assert f"{leep['score']:.4f} nats a voxel" in page.text

    def test_settings(self, run: Path) -> None:
        (start,) = json.loads((run / "environment.json").read_text())["starts"]
        assert start["torch"] == torch.__version__
        assert start["riskmap_ext"] == riskmap_ext.__version__
        assert start["cases"] == {"train": 3, "validation": 3}
        assert start["peak_memory_bytes"] > 2**20
        assert start["ended"] is not None
        text = page_of(run).text
        assert f"torch{start['torch']}" in text
        assert (run / "config.yaml").read_text() in text
        keys = json.loads((run / "keys.json").read_text())
        assert f"{len(keys['loaded'])} loaded" in text
        assert "No weights were taken" not in text

    def test_warnings_of_the_log(self, copied: Path) -> None:
        with (copied / "log.txt").open("a") as file:
            file.write("2026-01-01 00:00:00 Warning: a <b>bold</b> one\n")
        assert "a <b>bold</b> one" in page_of(copied).text

    def test_a_source_that_tells_nothing(self, copied: Path) -> None:
        leep = json.loads((copied / "leep.json").read_text())
        leep |= {"tells_nothing": True, "remark": "it tells nothing"}
        (copied / "leep.json").write_text(json.dumps(leep))
        assert "Warning: it tells nothing" in page_of(copied).text

    def test_a_missed_structure_is_named(self, copied: Path) -> None:
        name = "case03"
        path = copied / "predictions" / f"{name}.nii.gz"
        volume = nib.load(path)
        save(path, np.zeros(volume.shape, np.uint8), volume.affine)
        page = page_of(copied)
        assert f"Missed: box in {name}, {CLASSES[2]} in {name}" in page.text
        row = next(row for row in table(page, "class") if row[0] == "box")
        assert row[6] == "1"

    def test_not_written_where_not_wanted(self, root: Path, tmp_path: Path) -> None:
        wanted = config(root, tmp_path / "run", None, write={"report": False}, train={"steps": 1})
        finetune(wanted, progress=False)
        assert not (tmp_path / "run" / "report.html").exists()
        page = page_of(tmp_path / "run")
        assert "No source model" in page.text
        assert "No weights were taken from a source" in page.text

    def test_belongs_to_its_run(self, root: Path, copied: Path) -> None:
        write = {"report": False}
        anew = config(root, copied, None, write=write, overwrite=True, train={"steps": 1})
        finetune(anew, progress=False)
        assert not {path.name for path in copied.iterdir()} & {"report.html", "leep.json"}
        assert len(rows_of(copied / "losses.csv")) == 1

    def test_a_large_run_is_a_file_of_moderate_size(self, run: Path) -> None:
        files = read_run(run)
        classes = [f"structure-{i}" for i in range(120)]
        dice = dict.fromkeys((f"dice_{name}" for name in classes), 0.512345)
        metrics = [
            {"step": step, "train_loss": 1.0, **dice, "mean_dice": 0.5, "lr": 0.1, "seconds": 1.0}
            for step in range(1, 2001)
        ]
        cases = {f"case{i:04d}": [i / 2000] * len(classes) for i in range(2000)}
        large = replace(files, classes=classes, metrics=metrics, dice=cases)
        html = run_page(large, CaseResults())
        assert len(html) < 2e6
        page = Page(html)
        shown = table(page, "step")
        assert f"Validations ({len(shown) - 1} of 2000; metrics.csv has all)" in page.text
        assert shown[-1][0] == "2000"
        shown = table(page, "case")
        assert "cases with the lowest mean of 2000 (dice.csv has all)" in page.text
        assert [row[0] for row in shown[1:]] == [f"case{i:04d}" for i in range(len(shown) - 1)]

    def test_without_validation_cases(self, root: Path, tmp_path: Path) -> None:
        data = {"train": 3, "validation": 0, "classes": CLASSES}
        finetune(config(root, tmp_path / "run", None, data=data), progress=False)
        page = page_of(tmp_path / "run")
        assert "Unfinished" not in page.text
        assert "no validation case has any of the classes" in page.text
        assert table(page, "step")[0] == ["step", "loss", "learning rate", "seconds"]

    def test_resampled_cases(self, root: Path, source: Path, tmp_path: Path) -> None:
        data = {"train": 3, "validation": 1, "classes": CLASSES, "spacing": [2, 2, 2]}
        finetune(config(root, tmp_path / "run", source, data=data), progress=False)
        results = read_results(read_run(tmp_path / "run"))
        (case,) = results.drawn
        assert case.panels is not None
        dice = [s.dice for s in results.scores]
        rows = rows_of(tmp_path / "run" / "dice.csv")
        assert dice == pytest.approx([float(rows[0][name]) for name in CLASSES[1:]], abs=1e-5)

    def test_a_report_that_fails_leaves_the_run_whole(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("no such luck")

        monkeypatch.setattr("riskmap_ext.finetune.report.write.run_page", fail)
        assert finetune(config(root, tmp_path / "run", None), progress=False).history
        log = (tmp_path / "run" / "log.txt").read_text()
        assert "report.html was not written (RuntimeError: no such luck)" in log


class TestUnfinished:
    def test_says_so_and_goes_on(
        self, root: Path, source: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "run"
        wanted = config(root, output, source)
        with monkeypatch.context() as patch:
            stop_at(6, patch)
            with pytest.raises(KeyboardInterrupt):
                finetune(wanted, progress=False)
        assert len(rows_of(output / "losses.csv")) == 5
        page = page_of(output)
        assert "Unfinished run (stopped, or still at work): 5 of 6 steps are recorded" in page.text
        assert "last validation. It was stopped at step 6." in page.text
        assert "--resume" in page.text
        row = rows_of(output / "metrics.csv")[-1]
        shown = table(page, "class")
        assert shown[-1] == ["mean", f"{float(row['mean_dice']):.3f}"]
        assert "no dice.csv" in page.text

        finetune(wanted, progress=False, resume=True)
        assert (output / "losses.csv").read_bytes() == (run / "losses.csv").read_bytes()
        assert len(json.loads((output / "environment.json").read_text())["starts"]) == 2
        text = Page((output / "report.html").read_text()).text
        assert "Unfinished" not in text
        assert "2 (resumed)" in text

    def test_before_anything_was_trained(
        self, root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            finetune(config(root, tmp_path / "run", source), progress=False)
        text = page_of(tmp_path / "run").text
        assert "Unfinished run (stopped, or still at work): 0 of 6 steps" in text
        assert "No validation is recorded" in text


class TestLacking:
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("losses.csv", "There is no losses.csv"),
            ("leep.json", "There is no leep.json"),
            ("environment.json", "There is no environment.json"),
            ("keys.json", "There is no keys.json"),
            ("log.txt", "There is no log.txt"),
            ("metrics.csv", "No validation is recorded"),
            ("predictions", "predictions/case03.nii.gz: no such file (write.predictions)"),
        ],
    )
    def test_is_said(self, copied: Path, name: str, said: str) -> None:
        path = copied / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        page = page_of(copied)
        assert said in page.text
        assert page.open == []

    def test_an_environment_of_few_words(self, copied: Path) -> None:
        starts = [{"begun": "then", "torch": "1"}, {"begun": "now", "gpu": "G", "cuda": "12"}]
        (copied / "environment.json").write_text(json.dumps({"starts": starts}))
        header, *rows = table(page_of(copied), "start")
        assert header == ["start", "1", "2 (resumed)"]
        assert rows[:3] == [
            ["begun", "then", "now"],
            ["torch", "1", MISSING],
            ["gpu", MISSING, "G"],
        ]

    def test_an_older_run(self, copied: Path) -> None:
        for name in ("losses.csv", "leep.json", "environment.json"):
            (copied / name).unlink()
        page = page_of(copied)
        assert "Unfinished" not in page.text
        assert len(page.links) == 15

    def test_images_have_moved(self, copied: Path) -> None:
        text = (copied / "config.yaml").read_text()
        (copied / "config.yaml").write_text(re.sub(r"root: .*", "root: /nowhere/at/all", text))
        page = page_of(copied)
        assert "No picture: " in page.text
        assert "/nowhere/at/all" in page.text
        assert not page.links
        assert table(page, "class")[0][-1] == "Dice 0"

    def test_one_prediction_is_gone(self, copied: Path) -> None:
        (copied / "predictions" / "case03.nii.gz").unlink()
        page = page_of(copied)
        assert "case03.nii.gz: no such file" in page.text
        assert len(page.links) == 10
        assert table(page, "class")[0][-1] == "Dice 0"

    def test_a_damaged_prediction_and_map(self, copied: Path) -> None:
        (copied / "predictions" / "case03.nii.gz").write_bytes(b"rubbish")
        (copied / "maps" / "case04_risk.nii.gz").write_bytes(b"rubbish")
        page = page_of(copied)
        assert len(page.links) == 5
        assert "cannot be read" in page.text

    def test_maps_alone(self, root: Path, source: Path, tmp_path: Path) -> None:
        make_maps(config(root, tmp_path / "run", source), progress=False)
        page = page_of(tmp_path / "run")
        assert "without any training" in page.text
        assert "Unfinished" not in page.text
        assert table(page, "target class")

    def test_no_maps(self, copied: Path) -> None:
        shutil.rmtree(copied / "maps")
        assert len(page_of(copied).links) == 12

    def test_a_configuration_of_another_version(self, copied: Path) -> None:
        with (copied / "config.yaml").open("a") as file:
            file.write("novelty: 3\n")
        page = page_of(copied)
        assert "novelty: unknown key" in page.text
        assert table(page, "class")[1][0] == "box"


class TestErrors:
    def test_output_elsewhere(self, run: Path, tmp_path: Path, riskmap: Any) -> None:
        path = tmp_path / "new" / "mine.html"
        assert riskmap("report", run, "--output", path) == (0, f"Written: {path}\n", "")
        assert path.read_bytes() == (run / "report.html").read_bytes()
        assert riskmap("report", run, "--output", path, "--quiet")[1] == ""

    def test_no_run(self, tmp_path: Path, riskmap: Any) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "settings").mkdir()
        (tmp_path / "settings" / "config.yaml").write_text("output: a\n")
        signs = "log.txt, metrics.csv, dice.csv, leep.json"
        for path, why in (
            (tmp_path / "absent", "no such folder"),
            (tmp_path / "settings", f"holds no run (there is none of {signs})"),
            (tmp_path / "file", "is a file; expected the folder of a run"),
            (tmp_path, "holds no run (there is no config.yaml)"),
        ):
            code, out, err = riskmap("report", path)
            assert (code, out, err) == (2, "", f"riskmap: error: {path}: {why}\n")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("metrics.csv", "step,train_loss\n1,2\n"),
            ("metrics.csv", "step,train_loss,mean_dice,lr,seconds\n1,2\n"),
            ("metrics.csv", "step,train_loss,mean_dice,lr,seconds\n1,2,x,3,4\n"),
            ("metrics.csv", ""),
            ("losses.csv", "step,loss\n1,2\n"),
            ("losses.csv", "step,loss,lr\n1,2,\n"),
            ("dice.csv", "case,box,mean\n"),
            ("leep.json", "{"),
            ("leep.json", "[]"),
            ("leep.json", '{"score": 1}'),
            ("keys.json", '{"loaded": 3}'),
            ("environment.json", '{"starts": 3}'),
            ("config.yaml", "a: ["),
            ("config.yaml", "nothing"),
        ],
    )
    def test_damaged_files(self, copied: Path, riskmap: Any, name: str, content: str) -> None:
        before = (copied / "report.html").read_bytes()
        (copied / name).write_text(content)
        code, out, err = riskmap("report", copied)
        assert (code, out) == (2, "")
        assert err.startswith(f"riskmap: error: {copied / name}: is damaged (")
        assert err.count("\n") == 1
        assert (copied / "report.html").read_bytes() == before

    @pytest.mark.parametrize(
        ("name", "content", "why"),
        [
            ("metrics.csv", "step,lr\n", "expected the columns step, .* seconds; no train_loss"),
            ("losses.csv", "step,loss,lr\n1,2\n", "row 2: expected 3 columns, got 2"),
            (
                "dice.csv",
                "case,foo,mean\na,1,1\nmean,1,1\nn,1,1\n",
                "other classes than metrics",
            ),
            ("leep.json", '{"score": "x"}', "score: Input should be a valid number"),
            ("keys.json", '{"loaded": 3}', "loaded: Input should be a valid (array|list)"),
        ],
    )
    def test_what_was_expected(self, copied: Path, name: str, content: str, why: str) -> None:
        (copied / name).write_text(content)
        with pytest.raises(InputError, match=rf"{name}: is damaged \({why}"):
            read_run(copied)

    def test_bytes_that_are_no_text(self, copied: Path, riskmap: Any) -> None:
        (copied / "metrics.csv").write_bytes(b"\xff\xfe\x00")
        code, _, err = riskmap("report", copied)
        assert code == 2
        assert "metrics.csv: is damaged (no text in UTF-8)" in err

    def test_a_leep_table_of_another_size(self, copied: Path, riskmap: Any) -> None:
        leep = json.loads((copied / "leep.json").read_text())
        leep["classes"] = leep["classes"][:-1]
        (copied / "leep.json").write_text(json.dumps(leep))
        code, _, err = riskmap("report", copied)
        assert code == 2
        assert "leep.json: is damaged (expected a table of 2 x 2)" in err

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable(self, copied: Path, riskmap: Any) -> None:
        (copied / "metrics.csv").chmod(0)
        code, _, err = riskmap("report", copied)
        assert code == 2
        assert "metrics.csv: cannot be read (Permission denied)" in err
        (copied / "metrics.csv").chmod(0o600)
        copied.chmod(0o500)
        code, _, err = riskmap("report", copied)
        assert (code, err.count("\n")) == (2, 1)
        assert "cannot be written; choose another folder" in err
        copied.chmod(0o700)

    def test_outputs_that_cannot_be(self, run: Path, tmp_path: Path, riskmap: Any) -> None:
        (tmp_path / "folder.html").mkdir()
        (tmp_path / "file").write_text("x")
        for path, why in (
            (tmp_path / "folder.html", "is a folder; expected a file"),
            (tmp_path / "file" / "a.html", "is a file; expected a folder"),
            (run / "last.pt", "expected a file name that ends in .html"),
        ):
            code, _, err = riskmap("report", run, "--output", path)
            assert code == 2
            assert why in err
            assert err.count("\n") == 1

    def test_a_full_disk(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            with pytest.raises(InputError, match=r"a\.html: cannot be written .*disk full"):
                write_report(run, tmp_path / "a.html")
        assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {**TRAIN, "lr": 1e30, "grad_clip": None, "optimizer": "SGD", "validate_every": 6}
    with pytest.raises(InputError, match="not finite"):
        finetune(config(root, tmp_path / "run", None, train=train), progress=False)
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "run" / "losses.csv")]
    assert math.isfinite(losses[0])
    assert not math.isfinite(losses[-1])
    with (tmp_path / "run" / "losses.csv").open("a") as file:
        file.writelines(f"{step},{'inf' if step % 2 else '-inf'},0\n" for step in range(7, 200))
    assert page_of(tmp_path / "run").open == []


def test_many_source_classes(run: Path) -> None:
    rng = np.random.default_rng(0)
    classes, sources = 4, 105
    joint = rng.random((classes, sources)) * np.arange(1, sources + 1)
    frequencies = {"class": joint.sum(1) / joint.sum(), "source": joint.sum(0) / joint.sum()}
    leep = Leep(
        score=-0.5,
        label_entropy=1.0,
        tells_nothing=False,
        remark=None,
        hardness_range=(0.0, 2.0),
        voxels=10,
        classes=[f"y{i}" for i in range(classes)],
        source_classes=[f"z{i}" for i in range(sources)],
        class_frequencies=frequencies["class"].tolist(),
        source_frequencies=frequencies["source"].tolist(),
        conditional=(joint / joint.sum(0)).tolist(),
    )
    page = Page(run_page(replace(read_run(run), leep=leep), CaseResults()))
    header, *rows = table(page, "target class")
    used = sorted(np.argsort(-frequencies["source"])[:30])
    assert header[1:-1] == [f"z{i}" for i in used]
    assert len(rows) == classes + 1
    rest = 1 - frequencies["source"][used].sum()
    assert (
        f"30 source classes with most mass are shown; 75 with {100 * rest:.3g}% of it" in page.text
    )
