"""Cross-validation: its folds, their runs, what they reach together, and their ensemble."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import configuration, image_of, rows_of, settings, stop_at, write_config
from html_page import Page

from riskmap_ext.finetune import (
    CheckpointError,
    Config,
    ConfigError,
    CrossValidation,
    DataError,
    check_run,
    cross_validate,
    finetune,
    load_config,
    predict_images,
    prepare_cases,
    write_report,
)
from riskmap_ext.finetune.config.schema import InferenceConfig, SourceConfig
from riskmap_ext.finetune.data import prepare
from riskmap_ext.finetune.data.datalist import CaseFiles
from riskmap_ext.finetune.data.prepare import read_image
from riskmap_ext.finetune.data.splits import make_splits
from riskmap_ext.finetune.source.checkpoint import load_source
from riskmap_ext.finetune.source.predictor import Predictor

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [f"case{index:02d}" for index in range(5)]
DATA = {"train": None, "validation": None, "folds": 3}


def config(root: Path, output: Path, source: Path | None = None, **sections: Any) -> Config:
    sections["data"] = {**DATA, **sections.get("data", {})}
    if source is not None:
        sections["source"] = {"checkpoint": str(source)}
    return configuration(root, output, **sections)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.pt", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(root: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> CrossValidation:
    output = tmp_path_factory.mktemp("whole") / "cv"
    return cross_validate(config(root, output, source), progress=False)


class TestSplits:
    def test_each_case_is_validated_once(self, root: Path, tmp_path: Path) -> None:
        splits = make_splits(config(root, tmp_path), NAMES)
        assert sorted(name for split in splits for name in split.val) == NAMES
        assert [len(split.val) for split in splits] == [2, 2, 1]
        for split in splits:
            assert sorted([*split.train, *split.val]) == NAMES

    def test_the_seed_alone_draws_them(self, root: Path, tmp_path: Path) -> None:
        one, again, other = (
            make_splits(config(root, tmp_path, seed=seed), names)
            for seed, names in ((0, NAMES), (0, NAMES[::-1]), (1, NAMES))
        )
        assert [split.val for split in one] == [split.val for split in again]
        assert [split.val for split in one] != [split.val for split in other]
        # The same on every machine and with every version.
        assert [split.val for split in one] == [
            ["case02", "case03"],
            ["case00", "case04"],
            ["case01"],
        ]

    def test_numbers_say_how_many_cases_are_divided(self, root: Path, tmp_path: Path) -> None:
        chosen = config(root, tmp_path, data={"train": 3, "validation": 1})
        assert [case.name for case in prepare_cases(chosen).train] == NAMES[:4]

    def test_a_file_is_taken_as_it_is(self, root: Path, tmp_path: Path) -> None:
        path = tmp_path / "splits.json"
        content = [
            {"train": ["case04", "case01"], "val": ["case00"]},
            {"train": ["case00"], "val": ["case04"]},
        ]
        path.write_text(json.dumps(content))
        result = cross_validate(
            config(root, tmp_path / "cv", data={"folds": str(path)}), progress=False
        )
        assert [split.model_dump() for split in result.splits] == content
        assert json.loads((tmp_path / "cv" / "splits_final.json").read_text()) == content
        assert list(result.cases) == ["case00", "case04"]
        log = (tmp_path / "cv" / "log.txt").read_text()
        assert "3 cases are validated by no fold: case01, case02, case03" in log
        trained = load_config(tmp_path / "cv" / "fold_0" / "config.yaml").data
        assert (trained.train, trained.validation) == (["case04", "case01"], ["case00"])

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (
                [{"train": ["case00", "caseXX"], "val": ["case01"]}],
                "fold 0: no labelled case is na",
            ),
            (
                [{"train": ["case00"], "val": ["case00"]}],
                "fold 0: case00 twice, in train, in val or in both",
            ),
            ([{"train": ["case00"], "val": []}], r"0\.val: List should have at least 1 item"),
            (
                [
                    {"train": ["case00"], "val": ["case01"]},
                    {"train": ["case00"], "val": ["case01"]},
                ],
                "more than one fold validates on case01",
            ),
            ([], r"expected \[\{\"train\""),
            ([{"train": ["case00"]}], r"0\.val: Field required.*expected \[\{\"train\""),
            ({"train": 1}, "expected"),
        ],
    )
    def test_errors_of_a_file(self, root: Path, tmp_path: Path, content: object, told: str) -> None:
        path = tmp_path / "splits.json"
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=rf"splits\.json: .*{told}"):
            cross_validate(config(root, tmp_path / "cv", data={"folds": str(path)}), progress=False)
        assert not (tmp_path / "cv").exists()

    def test_all_problems_of_a_file_at_once(self, root: Path, tmp_path: Path) -> None:
        path = tmp_path / "splits.json"
        path.write_text(
            json.dumps([{"train": ["x"], "val": ["case01"]}, {"train": ["y"], "val": ["y"]}])
        )
        with pytest.raises(DataError) as told:
            check_run(config(root, tmp_path / "cv", data={"folds": str(path)}), progress=False)
        assert len(told.value.problems) == 3

    def test_other_errors(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"data\.folds: expected 2 to 5 .* got 6"):
            cross_validate(config(root, tmp_path / "cv", data={"folds": 6}), progress=False)
        for wrong in (1, True, 2.5):
            with pytest.raises(ConfigError, match=r"data\.folds: .*expected a number"):
                config(root, tmp_path / "cv", data={"folds": wrong})
        with pytest.raises(ConfigError, match=r"expected no list beside them, got \['train'\]"):
            config(root, tmp_path / "cv", data={"train": ["case00"]})
        with pytest.raises(ConfigError, match=r"data\.folds: are for cross_validate"):
            finetune(config(root, tmp_path / "cv"), progress=False)
        with pytest.raises(
            ConfigError, match=r"data\.folds: expected 2 to 5 \(all cases\), got Non"
        ):
            cross_validate(config(root, tmp_path / "cv", data={"folds": None}), progress=False)
        assert not (tmp_path / "cv").exists()


class TestRuns:
    def test_folds_are_ordinary_runs(
        self, whole: CrossValidation, root: Path, tmp_path: Path
    ) -> None:
        fold = whole.output / "fold_1"
        again = load_config(fold / "config.yaml", [f"output={tmp_path / 'again'}"])
        result = finetune(again, progress=False)
        assert_same_weights(result.output, fold)
        assert (result.output / "dice.csv").read_bytes() == (fold / "dice.csv").read_bytes()
        assert not list(whole.output.rglob("resume.pt"))

    def test_dice_of_all_cases(self, whole: CrossValidation) -> None:
        rows = rows_of(whole.output / "dice.csv")
        assert list(rows[0]) == ["case", "box", "crate", "mean", "fold"]
        assert sorted(row["case"] for row in rows[:-2]) == NAMES == sorted(whole.cases)
        for row in rows[:-2]:
            own = rows_of(whole.output / row["fold"] / "dice.csv")
            assert row["case"] in whole.splits[int(row["fold"][-1])].val
            assert (row["case"], row["crate"]) in [(each["case"], each["crate"]) for each in own]
        crates = [float(row["crate"]) for row in rows[:-2]]
        assert whole.dice["crate"] == pytest.approx(sum(crates) / 5)
        assert whole.mean_dice == pytest.approx(sum(whole.dice.values()) / 2)
        assert rows[-2]["case"] == "mean"
        assert rows[-1] == {
            "case": "cases_with_class", "fold": "", "box": "5", "crate": "5", "mean": "2",
        }  # fmt: skip

    def test_cases_are_read_once(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []
        actual = prepare.read_case

        def noted(files: CaseFiles, *rest: Any) -> Any:
            read.append(files.name)
            return actual(files, *rest)

        monkeypatch.setattr(prepare, "read_case", noted)
        write = {"report": False, "overlays": False, "tensorboard": False}
        cross_validate(config(root, tmp_path / "cv", write=write), progress=False)
        assert read == NAMES

    def test_volumes_on_disk_give_the_same_bits(
        self, whole: CrossValidation, root: Path, source: Path, tmp_path: Path
    ) -> None:
        stored = config(root, tmp_path / "cv", source, data={"storage": "disk"})
        cross_validate(stored, progress=False)
        assert_same_weights(tmp_path / "cv" / "fold_2", whole.output / "fold_2")
        assert len(list((tmp_path / "cv" / "cache" / "volumes").glob("case-*"))) == 5

    def test_dry_run(self, root: Path, tmp_path: Path) -> None:
        result = check_run(config(root, tmp_path / "cv"), progress=False)
        assert result.train == NAMES
        assert sorted(result.validation) == NAMES
        assert [len(fold.val) for fold in result.folds] == [2, 2, 1]
        assert not (tmp_path / "cv").exists()

    def test_command(
        self, root: Path, tmp_path: Path, riskmap: Callable[..., tuple[int, str, str]]
    ) -> None:
        content = settings(root, tmp_path / "cv", data={"train": 3, "validation": 1})
        file = write_config(tmp_path / "run.yaml", content)
        code, out, err = riskmap("finetune", file, "--folds", 2, "--dry-run")
        assert code == 0, err
        assert "Folds: 2 of 2 + 2 cases" in out
        code, out, err = riskmap("finetune", file, "--folds", 2)
        assert code == 0, err
        assert "Dice of 4 cases, each validated once" in out
        code, out, err = riskmap("finetune", file, "data.folds=9", "overwrite=true")
        assert code == 2
        assert "command line: data.folds: expected 2 to 4 (all cases), got 9" in err


class TestResume:
    @pytest.mark.parametrize("batch", [1, 4, 6])
    def test_ends_in_the_same_bits(
        self,
        batch: int,
        whole: CrossValidation,
        root: Path,
        source: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Two steps a fold: stopped before anything is kept, within fold 1, and within fold 2."""
        mine = config(root, tmp_path / "cv", source)
        with monkeypatch.context() as patch:
            stop_at(batch, patch)
            with pytest.raises(KeyboardInterrupt) as stopped:
                cross_validate(mine, progress=False)
        fold = (batch - 1) // 2
        assert stopped.value.args[0].startswith(f"stopped in fold_{fold}; {tmp_path / 'cv'} holds")
        assert stopped.value.args[0].endswith("(--resume goes on with it)")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cv").glob("*/last.pt")}
        check_run(mine, progress=False, resume=True)
        result = cross_validate(mine, progress=False, resume=True)
        assert result.cases == whole.cases
        for index in range(3):
            assert_same_weights(tmp_path / "cv" / f"fold_{index}", whole.output / f"fold_{index}")
        name = "dice.csv"
        assert (result.output / name).read_bytes() == (whole.output / name).read_bytes()
        for index in range(fold):  # those that were done are left alone
            path = tmp_path / "cv" / f"fold_{index}" / "last.pt"
            assert path.stat().st_mtime_ns == before[path]

    def test_stopped_in_its_report(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = config(root, tmp_path / "cv")
        for place, told in (
            ("make_report", "--resume goes on with it)"),
            ("tell_end", "finished run"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(f"riskmap_ext.finetune.train.cross_validation.{place}", _interrupt)
                with pytest.raises(KeyboardInterrupt) as stopped:
                    cross_validate(mine, progress=False, resume=True)
            assert stopped.value.args[0].endswith(told)
            if place == "make_report":  # as after a full disk
                (mine.output / "fold_1" / "report.html").unlink()
        assert (mine.output / "fold_1" / "report.html").exists()
        assert "Unfinished run" not in (mine.output / "report.html").read_text()
        with pytest.raises(ConfigError, match="holds a finished run"):
            cross_validate(mine, progress=False, resume=True)

    @pytest.fixture
    def stopped(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        with monkeypatch.context() as patch:
            stop_at(4, patch)
            with pytest.raises(KeyboardInterrupt):
                cross_validate(config(root, tmp_path / "cv"), progress=False)
        return tmp_path / "cv"

    def test_refuses_what_it_was_not_begun_with(self, root: Path, stopped: Path) -> None:
        for run in (cross_validate, check_run):
            with pytest.raises(ConfigError, match=r"--resume: train\.lr: not as in"):
                run(config(root, stopped, train={"lr": 0.5}), progress=False, resume=True)
            with pytest.raises(ConfigError, match=r"--resume: data\.folds: not as in"):
                run(config(root, stopped, data={"folds": 2}), progress=False, resume=True)
            with pytest.raises(ConfigError, match="holds an unfinished run"):
                run(config(root, stopped), progress=False)
        plain = configuration(root, stopped)
        with pytest.raises(ConfigError, match=r"data\.folds: .* holds a cross-validation"):
            finetune(plain, progress=False, resume=True)
        assert (stopped / "fold_0" / "last.pt").exists()

    def test_refuses_other_cases(self, root: Path, stopped: Path) -> None:
        path = stopped / "splits_final.json"
        path.write_text(path.read_text().replace("case02", "caseXX"))
        with pytest.raises(ConfigError, match="other folds than data"):
            cross_validate(config(root, stopped), progress=False, resume=True)

    def test_overwrite_leaves_no_fold_of_before(self, root: Path, stopped: Path) -> None:
        finetune(configuration(root, stopped, overwrite=True), progress=False)
        assert not (stopped / "splits_final.json").exists()
        assert not list((stopped / "fold_0").iterdir())

    def test_refuses_a_finished_one(self, whole: CrossValidation, root: Path, source: Path) -> None:
        with pytest.raises(ConfigError, match="holds a finished run"):
            cross_validate(config(root, whole.output, source), progress=False, resume=True)


class TestEnsemble:
    def test_two_equal_models_are_one(
        self, whole: CrossValidation, root: Path, tmp_path: Path
    ) -> None:
        model = whole.output / "fold_0" / "last.pt"
        for name, given in (("one", model), ("two", [model, model])):
            predict_images(given, [root / "images"], tmp_path / name, progress=False)
        for case in NAMES:
            one, two = (tmp_path / name / f"{case}.nii.gz" for name in ("one", "two"))
            assert one.read_bytes() == two.read_bytes()

    def test_the_mean_of_the_folds(
        self,
        whole: CrossValidation,
        root: Path,
        tmp_path: Path,
        riskmap: Callable[..., tuple[int, str, str]],
    ) -> None:
        image = image_of(root)
        code, out, err = riskmap(
            "predict", whole.output, "--image", image, "--output", tmp_path / "all"
        )
        assert code == 0, err
        assert "the mean of 3 models" in out
        models = [str(whole.output / f"fold_{index}" / "last.pt") for index in range(3)]
        riskmap("predict", *models, "--image", image, "--output", tmp_path / "named")
        found = tmp_path / "all" / image.name
        assert found.read_bytes() == (tmp_path / "named" / image.name).read_bytes()
        data = load_config(whole.output / "fold_0" / "config.yaml").data
        case = read_image([image], "case00", data)
        mean = torch.zeros(())
        for model in models:
            source = load_source(SourceConfig(checkpoint=Path(model)))
            patch = source.preprocessing["patch_size"]
            predictor = Predictor(source.network, 2, patch, InferenceConfig())
            mean = mean + predictor(case.image).softmax(dim=1) / 3
        labels = case.grid.from_file(np.asarray(nib.load(found).dataobj))
        expected = mean[0].argmax(dim=0).numpy()
        assert (labels == expected).mean() > 0.9999  # ties may fall to either side

    @pytest.mark.parametrize("sections", [{}, {"data": {"spacing": [1.5, 1.5, 1.5]}}])
    def test_regions_and_other_voxels(
        self, sections: dict[str, Any], root: Path, tmp_path: Path
    ) -> None:
        data = {"regions": {"both": [1, 2], "crate": 2}, **sections.get("data", {})}
        train = {"steps": 10, "lr": 0.02}
        result = finetune(
            configuration(root, tmp_path / "run", data=data, train=train), progress=False
        )
        for name, count in (("one", 1), ("two", 2)):
            given = [result.checkpoint] * count
            predict_images(given, [image_of(root)], tmp_path / name, progress=False)
        one, two = (
            np.asarray(nib.load(tmp_path / name / "case00.nii.gz").dataobj)
            for name in ("one", "two")
        )
        assert one.max() == 2
        assert np.array_equal(one, two)

    def test_models_that_do_not_agree(
        self, whole: CrossValidation, root: Path, source: Path, tmp_path: Path
    ) -> None:
        model = whole.output / "fold_0" / "last.pt"
        content = torch.load(model, weights_only=True)
        content["preprocessing"]["normalize"] = "none"
        torch.save(content, tmp_path / "other.pt")
        given = [model, source, tmp_path / "other.pt"]
        with pytest.raises(CheckpointError) as told:
            predict_images(given, [root / "images"], tmp_path / "out", progress=False)
        first, second = str(told.value).splitlines()
        assert first == (
            f"{source}: expected classes as of {model}, ['background', 'box', 'crate']; got "
            "['background', 'thing']"
        )
        assert (
            second == f"{tmp_path / 'other.pt'}: expected normalize as of {model}, zscore; got none"
        )
        with pytest.raises(ConfigError, match="expected at least one, got none"):
            predict_images([], [root / "images"], tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    def test_unfinished_folds(self, whole: CrossValidation, root: Path, tmp_path: Path) -> None:
        copied = Path(shutil.copytree(whole.output, tmp_path / "cv"))
        shutil.rmtree(copied / "fold_1")
        with pytest.raises(ConfigError, match=r"splits_final.json: fold_1 of its 3 folds are"):
            predict_images(copied, [root / "images"], tmp_path / "out", progress=False)
        with pytest.raises(CheckpointError, match=r"is a folder of folds; .*fold_2/last\.pt"):
            finetune(configuration(root, tmp_path / "a", source={"checkpoint": str(copied)}))


class TestReport:
    def test_page(self, whole: CrossValidation) -> None:
        page = Page((whole.output / "report.html").read_text())
        tables = {row[0]: row for row in page.rows if row}
        assert "Unfinished" not in page.text
        assert tables["crate"][1] == f"{whole.dice['crate']:.3f}"
        assert tables["crate"][5] == "5 of 5"
        assert tables["box"][6] == "5"  # missed
        assert tables["all cases"][1:3] == ["5", f"{whole.mean_dice:.3f}"]
        for index, split in enumerate(whole.splits):
            name = f"fold_{index}"
            assert tables[name][1] == f"{len(split.val)}"
            assert f"{name}/report.html" in page.links
            for case in split.val:
                crate = f"{whole.cases[case]['crate']:.3f}"
                assert [crate, name] == [
                    tables_of(page, case)[0][i] for i in (2, 4)
                ]  # of the first table
        assert [len(tables_of(page, case)) for case in NAMES] == [3] * 5  # Dice, surfaces, HD95

    def test_elsewhere(self, whole: CrossValidation, tmp_path: Path) -> None:
        links = Page(write_report(whole.output, tmp_path / "a.html").read_text()).links
        (link,) = [each for each in links if each.endswith("fold_0/report.html")]
        assert (tmp_path / link).resolve() == (whole.output / "fold_0" / "report.html").resolve()

    def test_unfinished(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            stop_at(4, patch)
            with pytest.raises(KeyboardInterrupt):
                cross_validate(config(root, tmp_path / "cv"), progress=False)
        page = Page(write_report(tmp_path / "cv").read_text())
        assert "2 folds have begun" in page.text
        states = {row[0]: row[1] for row in page.rows if row and row[0].startswith("fold_")}
        assert states == {"fold_0": "2", "fold_1": "0"}
        shutil.rmtree(tmp_path / "cv" / "fold_0")
        shutil.rmtree(tmp_path / "cv" / "fold_1")
        assert "Unfinished" in Page(write_report(tmp_path / "cv").read_text()).text


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def tables_of(page: Page, case: str) -> list[list[str]]:
    return [row for row in page.rows if row and row[0] == case]
