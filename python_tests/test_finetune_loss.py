"""What the loss of a run is made of: class weights, the risk map, and the caller's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import configuration, train_source, write_cases

from riskmap_ext.finetune import finetune, prepare_cases
from riskmap_ext.finetune.report import Log
from riskmap_ext.finetune.stepper import class_weights, loss_in_words

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_cases(folder, 4)
    return folder


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_source(root, tmp_path_factory.mktemp("source") / "run", 30, lr=0.02)


def test_risk_changes_the_training_and_can_be_left_out(root, source, tmp_path):
    losses = {}
    for use in (True, False):
        config = configuration(
            root,
            tmp_path / str(use),
            source={"checkpoint": str(source)},
            risk={"use": use},
            loss={"class_weights": None},
        )
        losses[use] = finetune(config, progress=False).history[0]["train_loss"]
    assert losses[True] > losses[False]


def test_class_weights_take_the_place_of_the_map(root, source, tmp_path):
    losses = {}
    for name, sections in {
        "default": {},
        "named": {"loss": {"class_weights": "sqrt_inverse_frequency"}},
        "plain": {"loss": {"class_weights": None}},
        "map": {"risk": {"use": True}},
        "map alone": {"risk": {"use": True}, "loss": {"class_weights": None}},
        "both": {"risk": {"use": True}, "loss": {"class_weights": "sqrt_inverse_frequency"}},
    }.items():
        config = configuration(
            root, tmp_path / name, source={"checkpoint": str(source)}, **sections
        )
        losses[name] = finetune(config, progress=False).history[0]["train_loss"]
    assert losses["default"] == losses["named"] != losses["plain"]
    assert losses["map"] == losses["map alone"] != losses["both"]


def test_class_weights_keep_the_mean_at_one(root, tmp_path):
    config = configuration(root, tmp_path)
    cases = prepare_cases(config)
    weights = class_weights(config, cases, torch.device("cpu"), Log(quiet=True))
    assert weights is not None
    labels = torch.cat([case.label.flatten() for case in cases.train]).long()
    share = torch.bincount(labels).double() / labels.numel()
    torch.testing.assert_close(weights / weights[0], (share[0] / share).sqrt().float())
    assert float((weights.double() * share).sum()) == pytest.approx(1)


def test_weights_of_ones_are_no_weights(root, source, tmp_path):
    sections = {"source": {"checkpoint": str(source)}, "network": None}
    runs = []
    for name, risk, weights in (
        ("plain", False, None),
        ("ones", True, lambda maps, cases: {c.name: torch.ones(c.label.shape) for c in cases}),
        ("maps", True, lambda maps, cases: maps.risk),
    ):
        config = configuration(
            root, tmp_path / name, risk={"use": risk}, loss={"class_weights": None}, **sections
        )
        runs.append(finetune(config, progress=False, weights=weights))
    plain, ones, maps = (run.history for run in runs)
    assert [row["train_loss"] for row in ones] == [row["train_loss"] for row in plain]
    assert [row["train_loss"] for row in maps] != [row["train_loss"] for row in plain]
    config = configuration(root, tmp_path / "unused", **sections)
    with pytest.raises(ValueError, match=r"weights: .*risk\.use=true"):
        finetune(config, progress=False, weights=lambda maps, cases: maps.risk)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda maps, cases: {}, "weights: .* none of case00"),
        (lambda maps, cases: {c.name: torch.ones(2) for c in cases}, r"case00: .*, got \[2\]"),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_do_not_fit(root, source, tmp_path, weights, message):
    sections = {"source": {"checkpoint": str(source)}, "risk": {"use": True}}
    with pytest.raises(ValueError, match=message):
        finetune(configuration(root, tmp_path / "out", **sections), progress=False, weights=weights)


@pytest.mark.parametrize(
    ("sections", "hooks", "told"),
    [
        ({}, {}, "cross-entropy, each voxel weighted by √(1/f) of its class; soft Dice"),
        ({"loss": {"class_weights": None}}, {}, "plain cross-entropy; soft Dice"),
        ({"loss": {"ce_weight": 0}}, {}, "soft Dice"),
        (
            {"risk": {"use": True}, "loss": {"class_weights": [1, 2, 3], "dice_weight": 0}},
            {},
            "cross-entropy, each voxel weighted by the linear risk map and [1.0, 2.0, 3.0]",
        ),
        (
            {"risk": {"use": True}},
            {"weights": True},
            "cross-entropy, each voxel weighted by the caller's weights; soft Dice",
        ),
        ({"risk": {"use": True}}, {"loss": True}, "the caller's own, with the risk map"),
    ],
    ids=str,
)
def test_the_loss_in_words(tmp_path, sections, hooks, told):
    config = configuration(tmp_path, tmp_path, source={"checkpoint": "a.pt"}, **sections)
    assert loss_in_words(config, False, **({"loss": False, "weights": False} | hooks)) == told


def test_a_loss_of_the_callers_own(root, tmp_path):
    seen = []

    def loss(logits, label, risk, foreground):
        seen.append((logits.shape, label.shape, risk, foreground.dtype))
        return torch.nn.functional.cross_entropy(logits, label.long(), ignore_index=-100)

    result = finetune(configuration(root, tmp_path / "out"), progress=False, loss=loss)
    assert seen == [((2, 3, 16, 16), (2, 16, 16), None, torch.bool)] * 2
    assert 0.5 < result.history[0]["train_loss"] < 2
    assert result.step_seconds > 0
