"""MONAI's adapters with logits that have not been made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("monai", reason="needs MONAI")

from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNet

import riskmap_ext
from riskmap_ext.integrations.monai import (
    PrepareBatchRiskMap,
    RiskMapd,
    RiskMapDiceCELoss,
    transfer_statistics,
)
from riskmap_ext.nn import DeferredLogits, fuse_head

SHAPE, FEATURES = (6, 7, 5), 4


def deferred(channels: int, shape: tuple[int, ...] = SHAPE) -> DeferredLogits:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, FEATURES, *shape, generator=generator)
    weight = torch.randn(channels, FEATURES, generator=generator)
    bias = torch.randn(channels, generator=generator)
    return DeferredLogits(*(each.double().requires_grad_() for each in (features, weight, bias)))


def labels(classes: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, classes, (2, 1, *shape), generator=generator)


def one_hot(classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels(classes)[:, 0], classes).movedim(-1, 1)


def compare(loss: Any, given: list[DeferredLogits], *call: Any) -> None:
    """Value and gradients beside those of the logits; one scale, or several as a list."""
    parts = [part for each in given for part in each.parts if part is not None]
    found = []
    for inputs in (given, [each.logits() for each in given]):
        value = loss(inputs if len(inputs) > 1 else inputs[0], *call)
        gradients = torch.autograd.grad(value, parts, allow_unused=True, materialize_grads=True)
        found.append([value.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


TABLE = [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
_SOFTMAX = {"softmax": True, "to_onehot_y": True}
# Arguments, channels, target.
LOSSES: dict[str, tuple[dict[str, Any], int, Tensor]] = {
    "softmax": (_SOFTMAX, 5, labels(5)),
    "weight": ({**_SOFTMAX, "weight": [0.5, 1, 2, 0.1, 1]}, 5, labels(5)),
    "class_weight": ({**_SOFTMAX, "class_weight": [0.5, 1, 2, 0.1, 1]}, 5, labels(5)),
    "one-hot": ({"softmax": True, "include_background": False}, 5, one_hot(5)),
    "squared": ({**_SOFTMAX, "squared_pred": True, "batch": True, "jaccard": True}, 5, labels(5)),
    "sum": ({**_SOFTMAX, "reduction": "sum", "label_smoothing": 0.1}, 5, labels(5)),
    "cross-entropy": ({**_SOFTMAX, "lambda_dice": 0.0}, 5, labels(5)),
    "sigmoid": ({"sigmoid": True}, 1, labels(2)),
    "sigmoid, weight": ({"sigmoid": True, "weight": [2.5]}, 1, labels(2)),
    "regions": ({"sigmoid": True, "regions": TABLE}, 3, labels(4)),
    "multi-hot": ({"sigmoid": True}, 4, one_hot(4)),
    "multi-hot, groups": ({"sigmoid": True, "include_background": False}, 19, one_hot(19)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_of_the_loss(name: str) -> None:
    options, channels, target = LOSSES[name]
    compare(RiskMapDiceCELoss(**options), [deferred(channels)], target)
    risk = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(4))
    mask = target.sum(1, keepdim=True) > 1
    compare(RiskMapDiceCELoss(**options), [deferred(channels)], target, risk, mask)


def test_deep_supervision() -> None:
    scales = [deferred(5), deferred(5, (3, 3, 2))]
    loss = RiskMapDiceCELoss(softmax=True, to_onehot_y=True)
    compare(loss, scales, labels(5))
    compare(loss, scales, [labels(5), labels(5, (3, 3, 2))])
    given = {"label": MetaTensor(labels(5)), "risk": torch.rand(2, 1, *SHAPE)}
    compare(loss, scales, given)


def test_messages_of_the_channels() -> None:
    loss = RiskMapDiceCELoss(softmax=True, to_onehot_y=True, weight=[1, 1, 1])
    with pytest.raises(ValueError, match=r"^weight: expected \[5\], one value per channel of inp"):
        loss(deferred(5), labels(5))


def _source() -> torch.nn.Module:
    torch.manual_seed(0)
    return SegResNet(3, 8, 1, 19, blocks_down=(1, 1), blocks_up=(1,)).eval()


@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer((8, 8, 8), overlap=0.5)])
@pytest.mark.filterwarnings("ignore:LEEP score")
def test_a_source_of_many_classes(inferer: Any) -> None:
    """The statistics and the map of a case; windows are added up as logits."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(1, 16, 8, 8, generator=generator)
    case = {"image": image, "label": torch.randint(0, 3, (1, 16, 8, 8), generator=generator)}
    maps = []
    for when in (None, "always"):
        source = _source()
        if when is not None:
            fuse_head(source, when)
        statistics = transfer_statistics([case], source, 3, inferer=inferer)
        mapped = RiskMapd(source=source, statistics=statistics, inferer=inferer)(case)
        maps.append((statistics.joint, mapped["risk"]))
    for found, expected in zip(maps[1], maps[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_step_of_the_trainer() -> None:
    """MONAI's engine passes them on, mixed precision or not."""
    engines = pytest.importorskip("monai.engines", reason="needs ignite")
    pytest.importorskip("ignite", reason="needs ignite")
    torch.manual_seed(0)
    network = SegResNet(3, 8, 1, 5, blocks_down=(1, 1), blocks_up=(1,))
    batch = {"image": torch.randn(2, 1, 8, 8, 8), "label": labels(5, (8, 8, 8))}
    batch["risk"] = torch.rand(2, 1, 8, 8, 8)
    weights = []
    for fuse in (False, True):
        mine = copy.deepcopy(network)
        if fuse:
            assert fuse_head(mine) == ["conv_final.2.conv"]
        trainer = engines.SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=[batch],
            network=mine,
            optimizer=torch.optim.SGD(mine.parameters(), 0.1),
            loss_function=RiskMapDiceCELoss(softmax=True, to_onehot_y=True),
            prepare_batch=PrepareBatchRiskMap(),
            decollate=False,
        )
        trainer.run()
        weights.append(mine.state_dict())
    for key, expected in weights[0].items():
        torch.testing.assert_close(weights[1][key], expected, rtol=1e-4, atol=1e-6)


def test_decollating_is_told() -> None:
    """It would hand features on as the images of a batch."""
    data = pytest.importorskip("monai.data")
    with pytest.raises(TypeError, match=r"\.logits\(\) computes them"):
        data.decollate_batch({"pred": deferred(5), "image": torch.zeros(2, 1, *SHAPE)})


def test_meta_tensors_go_through_a_network() -> None:
    network = SegResNet(3, 8, 1, 5, blocks_down=(1, 1), blocks_up=(1,))
    fuse_head(network)
    given = network(MetaTensor(torch.randn(2, 1, 8, 8, 8)))
    loss = riskmap_ext.nn.RiskWeightedLoss(dice_weight=1.0)
    value = loss(given, MetaTensor(labels(5, (8, 8, 8))))
    assert type(value) is Tensor
    value.backward()
    assert network.conv_final[2].conv.weight.grad is not None
