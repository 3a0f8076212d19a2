"""What the loss of a run is made of: class weights, the risk map, and the caller's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import configuration

from riskmap_ext.finetune import finetune, prepare_cases
from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.train.step import class_weights, loss_in_words

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_class_weights_and_the_map(root, source, tmp_path):
    losses = {}
    for use in (True, False):
        for weights in ("sqrt_inverse_frequency", None):
            config = configuration(
                root,
                tmp_path / f"{use} {weights}",
                source={"checkpoint": str(source)},
                risk={"use": use},
                loss={"class_weights": weights},
            )
            losses[use, weights] = finetune(config, progress=False).history[0]["train_loss"]
    default = configuration(root, tmp_path / "default", source={"checkpoint": str(source)})
    assert finetune(default, progress=False).history[0]["train_loss"] == losses[False, None]
    assert len(set(losses.values())) == 4


def test_class_weights_keep_the_mean_at_one(root, tmp_path):
    loss = {"class_weights": "sqrt_inverse_frequency"}
    config = configuration(root, tmp_path, loss=loss)
    cases = prepare_cases(config)
    weights = class_weights(config, cases, Log(quiet=True))
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
    config = configuration(root, tmp_path / "unused", risk={"use": False}, **sections)
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
    again = configuration(root, tmp_path / "out", overwrite=True, **sections)
    nothing: Any = lambda maps, cases: None  # noqa: E731
    with pytest.raises(TypeError, match="weights: expected case names with tensors, got NoneType"):
        finetune(again, progress=False, weights=nothing)


@pytest.mark.parametrize(
    ("sections", "hooks", "told"),
    [
        ({}, {}, "cross-entropy, each voxel weighted by the linear risk map; soft Dice"),
        ({"risk": {"use": False}}, {}, "cross-entropy, unweighted; soft Dice"),
        ({"source": None, "risk": {}}, {}, "cross-entropy, unweighted; soft Dice"),
        ({"loss": {"ce_weight": 0}}, {}, "soft Dice"),
        (
            {"risk": {"use": False}, "loss": {"class_weights": "sqrt_inverse_frequency"}},
            {},
            "cross-entropy, each voxel weighted by √(1/f) of its class; soft Dice",
        ),
        (
            {"loss": {"class_weights": [1, 2.5], "dice_weight": 0, "label_smoothing": 0.1}},
            {},
            "cross-entropy, each voxel weighted by the linear risk map and the factor of its class "
            "(1, 2.5), label smoothing 0.1",
        ),
        (
            {},
            {"weights": True},
            "cross-entropy, each voxel weighted by the caller's weights; soft Dice",
        ),
        ({}, {"loss": True}, "the caller's own with the linear risk map"),
        ({}, {"loss": True, "weights": True}, "the caller's own with the caller's weights"),
        ({"risk": {"use": False}}, {"loss": True}, "the caller's own"),
    ],
    ids=str,
)
def test_the_loss_in_words(tmp_path, sections, hooks, told):
    given = {"source": {"checkpoint": "a.pt"}, "risk": {"use": True}, **sections}
    config = configuration(tmp_path, tmp_path, **given)
    assert loss_in_words(config, **hooks) == told


def test_a_loss_of_the_callers_own(root, tmp_path):
    seen = []

    def loss(logits, label, risk, foreground):
        seen.append((logits.shape, label.shape, risk, foreground.dtype))
        return torch.nn.functional.cross_entropy(logits, label.long(), ignore_index=-100)

    result = finetune(configuration(root, tmp_path / "out"), progress=False, loss=loss)
    assert seen == [((2, 3, 16, 16), (2, 16, 16), None, torch.bool)] * 2
    assert 0.5 < result.history[0]["train_loss"] < 2
    assert result.step_seconds > 0
