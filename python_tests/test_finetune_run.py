"""Whole runs on small synthetic cases: every file that is written, and what the errors leave."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import (
    DYNUNET_2D,
    MERGED,
    NETWORK_3D,
    configuration,
    phantom,
    rows_of,
    save,
    write_cases,
)

import riskmap_ext
from riskmap_ext.finetune import (
    ConfigError,
    finetune,
    load_config,
    make_maps,
    prepare_cases,
)
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.metrics.dice import dice_per_structure
from riskmap_ext.finetune.source.checkpoint import load_source
from riskmap_ext.finetune.source.predictor import Predictor

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["background", "box", "crate"]


@pytest.fixture(scope="module")
def root(turned_root: Path) -> Path:
    return turned_root


@pytest.fixture(scope="module")
def source(root, tmp_path_factory) -> Path:
    """A source model for the merged classes, trained by the same command."""
    output = tmp_path_factory.mktemp("source") / "run"
    train = {"steps": 30, "validate_every": 0, "lr": 0.02}
    result = finetune(configuration(root, output, data=MERGED, train=train), progress=False)
    assert result.leep is None
    assert result.keys is None
    assert not (output / "keys.json").exists()
    assert not (output / "maps").exists()
    return result.checkpoint


@pytest.fixture(scope="module")
def run(root, source, tmp_path_factory):
    output = tmp_path_factory.mktemp("target") / "run"
    config = configuration(
        root,
        output,
        network=None,
        source={"checkpoint": str(source)},
        risk={"use": True},
        train={"steps": 6, "validate_every": 2},
        write={"overlays": True, "tensorboard": True},
        data={"validation": 2},
    )
    return config, finetune(config, progress=False)


def test_every_output_is_there(run):
    config, _ = run
    names = {path.name for path in config.output.iterdir()}
    assert names == {
        "best.pt",
        "cache",
        "config.yaml",
        "dice.csv",
        "environment.json",
        "keys.json",
        "last.pt",
        "leep.json",
        "log.txt",
        "losses.csv",
        "maps",
        "metrics.csv",
        "overlays",
        "predictions",
        "report.html",
        "tb",
    }
    assert not list(config.output.rglob(".*")), "a half-written file was left"
    assert any((config.output / "tb").iterdir())


def test_resolved_configuration_gives_the_same_run(run):
    config, result = run
    again = load_config(config.output / "config.yaml")
    assert again.data.classes == CLASSES
    assert again.train == config.train
    assert again.source == config.source
    assert result.classes == CLASSES


def test_metrics(run):
    config, result = run
    rows = rows_of(config.output / "metrics.csv")
    assert list(rows[0]) == [
        "step",
        "train_loss",
        "dice_box",
        "dice_crate",
        "mean_dice",
        "lr",
        "seconds",
    ]
    assert [int(r["step"]) for r in rows] == [2, 4, 6]
    assert all(math.isfinite(float(r["train_loss"])) for r in rows)
    rates = [float(r["lr"]) for r in rows]
    assert rates == pytest.approx([0.01 * (1 - s / 6) ** 0.9 for s in (1, 3, 5)], rel=1e-4)
    assert [row["step"] for row in result.history] == [2, 4, 6]


def test_dice_table_agrees_with_the_predictions(run, root):
    config, result = run
    rows = rows_of(config.output / "dice.csv")
    assert [row["case"] for row in rows] == ["case02", "case03", "mean", "cases_with_class"]
    for row in rows[:2]:
        prediction = nib.load(config.output / "predictions" / f"{row['case']}.nii.gz").get_fdata()
        label = nib.load(root / "labels" / f"{row['case']}.nii.gz").get_fdata()
        for index, name in enumerate(CLASSES[1:], start=1):
            a, b = prediction == index, label == index
            expected = 2 * (a & b).sum() / (a.sum() + b.sum())
            assert float(row[name]) == pytest.approx(expected, abs=1e-5)
            assert result.cases[row["case"]][name] == pytest.approx(expected, abs=1e-5)
    assert rows[3]["box"] == "2"
    assert float(rows[2]["mean"]) == pytest.approx(result.mean_dice, abs=1e-5)


def test_predictions_have_the_grid_of_the_image(run, root):
    config, _ = run
    for name in ("case02", "case03"):
        image = nib.load(root / "images" / f"{name}.nii.gz")
        written = nib.load(config.output / "predictions" / f"{name}.nii.gz")
        assert written.shape == image.shape
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_allclose(written.affine, image.affine)


def test_cases_of_another_data_section_are_refused(run, tmp_path):
    config, _ = run
    cases = prepare_cases(config)
    data = config.data.model_copy(update={"normalize": "none"})
    other = config.model_copy(update={"data": data, "output": tmp_path / "out"})
    with pytest.raises(ConfigError, match=r"cases: prepared with data\.normalize='zscore'.*'none'"):
        finetune(other, cases=cases, progress=False)
    assert not (tmp_path / "out").exists()


def test_maps_are_those_of_the_library(run, root, source):
    """Maps on disk against the ops applied by hand, on the image's own grid."""
    config, result = run
    cases = prepare_cases(config)
    model = load_source(config.source)
    predictor = Predictor(model.network, 2, [16, 16], config.inference)
    statistics = riskmap_ext.TransferStatistics(3)
    logits = {c.name: predictor(c.image) for c in (*cases.train, *cases.validation)}
    for step in (statistics.update, statistics.update_range):
        for case in cases.train:
            step(logits[case.name], case.label[None])
    assert result.leep == pytest.approx(statistics.score)
    assert result.leep < 0
    for case in (*cases.train, *cases.validation):
        given = (logits[case.name], case.label[None], statistics.conditional)
        expected = {
            "transferability": riskmap_ext.transferability_map(*given),
            "risk": riskmap_ext.risk_map(*given, scheme="linear", range=statistics.hardness_range),
        }
        image = nib.load(root / "images" / f"{case.name}.nii.gz")
        for kind, volume in expected.items():
            written = nib.load(config.output / "maps" / f"{case.name}_{kind}.nii.gz")
            np.testing.assert_allclose(written.affine, image.affine)
            assert written.get_data_dtype() == np.float32
            assert written.shape == image.shape
            assert nib.aff2axcodes(written.affine) == ("P", "S", "L")
            np.testing.assert_allclose(
                written.get_fdata(), case.grid.to_file(volume[0]), rtol=1e-5, atol=1e-5
            )
    risks = list((config.output / "maps").glob("*_risk.nii.gz"))
    assert len(risks) == 4
    values = np.concatenate([nib.load(p).get_fdata().ravel() for p in risks])
    assert values.min() >= 1
    assert values.max() <= 10 + 1e-4
    assert values.std() > 0.1


def test_checkpoints_are_sources_again(run):
    config, _ = run
    for name, step in (("last.pt", 6), ("best.pt", None)):
        content = torch.load(config.output / name, weights_only=True)
        assert content["classes"] == CLASSES
        assert content["network"]["name"] == "UNet"
        assert step is None or content["progress"]["step"] == step
        chosen = config.source.model_copy(update={"checkpoint": config.output / name})
        assert load_source(chosen).classes == CLASSES


def test_best_is_the_best_validation(run):
    config, result = run
    best = torch.load(config.output / "best.pt", weights_only=True)["progress"]
    assert best["mean_dice"] == max(row["mean_dice"] for row in result.history)


def test_keys_are_reported(run):
    config, result = run
    written = json.loads((config.output / "keys.json").read_text())
    assert written == vars(result.keys)
    assert written["reinitialized"]
    assert written["loaded"]
    log = (config.output / "log.txt").read_text()
    assert f"{len(written['loaded'])} keys loaded" in log
    assert f"LEEP score {result.leep:.4f}" in log


def test_pictures_show_something(run):
    from matplotlib.image import imread

    config, _ = run
    pictures = sorted((config.output / "overlays").iterdir())
    assert [p.name for p in pictures] == ["case02.png", "case03.png"]
    for path in pictures:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 100
        assert pixels[..., :3].std() > 0.05


def test_second_run_takes_the_maps_from_the_cache(run, monkeypatch):
    config, first = run

    def refuse(*_):
        raise AssertionError("the source model ran although its maps were cached")

    monkeypatch.setattr("riskmap_ext.finetune.train.maps.SourceMapper._source_logits", refuse)
    again = finetune(config.model_copy(update={"overwrite": True}), progress=False)
    assert again.leep == first.leep
    assert again.dice == pytest.approx(first.dice)
    assert "4 maps from the cache" in (config.output / "log.txt").read_text()
    changed = config.model_copy(
        update={
            "overwrite": True,
            "risk": config.risk.model_copy(update={"scheme": "power"}),
        }
    )
    with pytest.raises(AssertionError, match="although"):
        finetune(changed, progress=False)


def test_damaged_cache_entries_are_made_again(root, source, tmp_path):
    config = configuration(root, tmp_path / "out", source={"checkpoint": str(source)})
    first = finetune(config, progress=False)
    for path in (tmp_path / "out" / "cache").iterdir():
        path.write_bytes(b"rubbish")
    again = finetune(config.model_copy(update={"overwrite": True}), progress=False)
    assert again.leep == first.leep


def test_same_seed_same_result(root, source, tmp_path):
    results = []
    for index, seed in enumerate((5, 5, 6)):
        config = configuration(
            root,
            tmp_path / str(index),
            seed=seed,
            cache=str(tmp_path / "cache"),
            source={"checkpoint": str(source)},
            risk={"use": True},
            write={"maps": False, "predictions": False},
        )
        results.append(finetune(config, progress=False))
        assert not (config.output / "cache").exists()
    losses = [r.history[-1]["train_loss"] for r in results]
    assert losses[0] == losses[1] != losses[2]


def test_prepared_cases_are_shared(root, source, tmp_path, monkeypatch):
    config = configuration(root, tmp_path / "out", source={"checkpoint": str(source)})
    cases = prepare_cases(config)
    monkeypatch.setattr("riskmap_ext.finetune.train.plan.prepare_cases", None)
    assert finetune(config, cases=cases, progress=False).history


@pytest.mark.parametrize(
    "sections",
    [
        {"network": NETWORK_3D, "train": {"patch_size": [8, 8, 8]}},
        {"train": {"amp": "bf16"}},
        {"train": {"optimizer": "SGD", "schedule": "cosine", "grad_clip": None}},
        {"train": {"optimizer": "Adam", "schedule": "constant", "validate_every": 0}},
        {"loss": {"class_weights": "sqrt_inverse_frequency"}},
        {"loss": {"class_weights": [1, 2, 3], "label_smoothing": 0.1, "ce_voxels": "foreground"}},
        {"loss": {"dice_weight": 0, "normalization": "batch_foreground"}},
        {"loss": {"ce_weight": 0, "batch_dice": True, "include_background": True}},
        {"data": {"spacing": [2, 2, 2], "image_foreground": "otsu"}},
        {"data": {"slice_axis": "sagittal", "label_map": {1: 1, 2: "ignore"}}},
        {"inference": {"patch_size": [24, 24], "overlap": 0.5, "batch_size": 4}},
        {"network": DYNUNET_2D},
    ],
    ids=lambda s: "-".join(f"{k}.{n}" for k, v in s.items() for n in v),
)
def test_settings_run_through(root, tmp_path, sections):
    result = finetune(configuration(root, tmp_path / "out", **sections), progress=False)
    assert all(math.isfinite(row["train_loss"]) for row in result.history)
    assert len(result.history) == (1 if sections.get("train", {}).get("validate_every") == 0 else 2)


@pytest.mark.parametrize(
    "risk",
    [
        {"scheme": "power", "alpha": 0.3},
        {"scheme": "linear", "scale": 4},
        {"range": "image"},
        {"scheme": "exponential", "range": [0, 3], "base": 4},
    ],
    ids=str,
)
def test_risk_settings_reach_the_maps(root, source, tmp_path, risk):
    config = configuration(root, tmp_path, source={"checkpoint": str(source)}, risk=risk)
    maps = make_maps(config, progress=False)
    volumes = list(maps.risk.values())
    hardness = {name: -t for name, t in maps.transferability.items()}
    for name, weight in maps.risk.items():
        h = hardness[name]
        lo, hi = maps.hardness_range
        if risk.get("range") == "image":
            lo, hi = float(h.min()), float(h.max())
        elif "range" in risk:
            lo, hi = risk["range"]
        place = ((h - lo) / (hi - lo)).clamp(0, 1)
        expected = {
            "power": torch.exp(risk.get("alpha", 0) * h),
            "linear": 1 + risk.get("scale", 9.0) * place,
            "exponential": risk.get("base", 10.0) ** place,
        }[risk.get("scheme", "linear")]
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-3)
    assert max(float(v.max()) for v in volumes) > 1.2


def test_resampled_outputs_are_on_the_files_grid(root, source, tmp_path):
    config = configuration(
        root,
        tmp_path / "out",
        data={"spacing": [2, 2, 2]},
        source={"checkpoint": str(source)},
    )
    result = finetune(config, progress=False)
    image = nib.load(root / "images" / "case02.nii.gz")
    paths = ("predictions/case02.nii.gz", "maps/case02_risk.nii.gz")
    for path in paths:
        written = nib.load(config.output / path)
        assert written.shape == image.shape
        np.testing.assert_allclose(written.affine, image.affine)
    prediction = nib.load(config.output / paths[0]).get_fdata()
    label = nib.load(root / "labels" / "case02.nii.gz").get_fdata()
    both = (prediction == 1) & (label == 1)
    expected = 2 * both.sum() / ((prediction == 1).sum() + (label == 1).sum())
    assert result.cases["case02"]["box"] == pytest.approx(expected, abs=1e-5)


def test_a_class_that_no_label_has_is_counted_not_averaged(root, tmp_path):
    data = {"classes": [*CLASSES, "never"], "validation": 1}
    config = configuration(root, tmp_path / "out", data=data)
    result = finetune(config, progress=False)
    assert math.isnan(result.dice["never"])
    assert math.isfinite(result.mean_dice)
    rows = rows_of(config.output / "dice.csv")
    assert rows[0]["never"] == "nan"
    assert rows[-1]["never"] == "0"
    log = (config.output / "log.txt").read_text()
    assert "0 of 1" in log
    assert "2 of 3 classes" in log
    assert "\N{EN DASH}" in log


def test_cases_without_foreground(tmp_path):
    write_cases(tmp_path / "data", 3)
    for name in ("case00", "case02"):
        _, label = phantom(0)
        save(tmp_path / "data" / "labels" / f"{name}.nii.gz", np.zeros_like(label))
    result = finetune(configuration(tmp_path / "data", tmp_path / "out"), progress=False)
    assert math.isnan(result.mean_dice)
    assert all(math.isfinite(row["train_loss"]) for row in result.history)
    assert (tmp_path / "out" / "best.pt").is_file()


def test_without_validation_cases(root, tmp_path):
    config = configuration(root, tmp_path / "out", data={"validation": 0})
    result = finetune(config, progress=False)
    assert result.cases == {}
    assert not (config.output / "dice.csv").exists()
    assert (config.output / "best.pt").is_file()


def test_ignored_voxels_do_not_count_in_dice():
    label = torch.tensor([[0, 1, 2, -100, -100]], dtype=torch.int16)
    prediction = torch.tensor([[0, 1, 1, 1, 2]], dtype=torch.int16)
    dice = dice_per_structure(prediction, label, Structures(["background", "a", "b", "c"]))
    assert dice[0] == pytest.approx(2 / 3)
    assert dice[1] == 0
    assert math.isnan(dice[2])


def test_random_state_and_threads_are_left_alone(root, tmp_path):
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    expected = torch.random.get_rng_state()
    finetune(configuration(root, tmp_path / "out"), progress=False)
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert torch.get_num_threads() == threads


class Tracker:
    """Takes numbers as mlflow.log_metrics does."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.append((step, metrics))


def test_numbers_go_to_a_callback(root, tmp_path):
    tracker = Tracker()
    config = configuration(
        root,
        tmp_path / "run",
        data={"classes": [*CLASSES, "barrel"]},  # which no label has
        train={"steps": 30, "validate_every": 20},
    )
    finetune(
        config,
        progress=False,
        callback=lambda step, numbers: tracker.log_metrics(numbers, step=step),
    )
    assert [step for step, _ in tracker.logged] == [20, 25, 30]
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    for (step, numbers), row in zip(tracker.logged[::2], rows, strict=True):
        known = {name: float(value) for name, value in row.items() if value != "nan"}
        assert numbers == pytest.approx(known, rel=1e-5)
        assert numbers["step"] == step
        assert "dice_barrel" not in numbers
    assert set(tracker.logged[1][1]) == {"train_loss", "lr"}


def test_the_next_command_is_told(root, tmp_path, capsys):
    output = tmp_path / "a run"
    finetune(configuration(root, output, write={"report": False}))
    told = capsys.readouterr().out
    assert f"  riskmap predict '{output / 'last.pt'}' --image IMAGES" in told
    assert f"  riskmap report '{output}'" in told
