"""riskmap_ext.nn: modules over the functional API."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Case, loss_and_gradients

import riskmap_ext
from riskmap_ext.nn import RiskWeightedLoss

CASE = Case("module", with_weight=True, with_foreground=True, batch=3)


def test_equals_the_function(device: torch.device) -> None:
    (logits, target, risk), kwargs = CASE.loss_call(device)
    foreground = kwargs["foreground"]
    options = {"dice_weight": 0.5, "label_smoothing": 0.1, "reduction": "sum"}
    module = RiskWeightedLoss(weight=kwargs["weight"], **options).to(device)
    found = loss_and_gradients(
        ((logits, target, risk), {}), lambda x, y, r: module(x, y, r, foreground)
    )
    expected = loss_and_gradients(((logits, target, risk), {**kwargs, **options}))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_risk_may_be_left_out() -> None:
    (logits, target, _), _ = CASE.loss_call(torch.device("cpu"))
    assert torch.equal(
        RiskWeightedLoss()(logits, target), riskmap_ext.weighted_loss(logits, target)
    )


def test_weight_moves_along_but_is_not_saved() -> None:
    module = RiskWeightedLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    assert module.to("meta").weight.is_meta


def test_copies_and_prints() -> None:
    module = RiskWeightedLoss(dice_weight=0.25, region="foreground")
    (logits, target, risk), _ = CASE.loss_call(torch.device("cpu"))
    assert torch.equal(copy.deepcopy(module)(logits, target, risk), module(logits, target, risk))
    assert "dice_weight=0.25" in repr(module)
    assert "foreground" in repr(module)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"reduction": "average"}, ValueError, "reduction"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"dice_weigth": 1.0}, TypeError, "dice_weigth"),
    ],
)
def test_bad_options_are_said_at_once(options: dict, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        RiskWeightedLoss(**options)
