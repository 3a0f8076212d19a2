"""riskmap_ext.nn.FusedHead, fuse_head and DeferredLogits: what they take, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from head_net import CLASSES, CONVOLUTIONS, Net, data, fused, net
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

import riskmap_ext
from riskmap_ext.nn import DeferredLogits, FusedHead, fuse_head, unfuse_head


def test_an_unknown_network_needs_an_example() -> None:
    network = net()
    with pytest.raises(ValueError, match=r"head of Net is not known .* head, Conv2d\(6, 5"):
        fuse_head(network)
    assert fuse_head(network, example_input=data()[0]) == ["head"]


# ---- the module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_module(dims: int, bias: bool) -> None:
    convolution = CONVOLUTIONS[dims - 1](6, CLASSES, 1, bias=bias)
    head = FusedHead(convolution)
    assert head.weight is convolution.weight
    assert head.bias is convolution.bias
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups"):
        assert getattr(head, name) == getattr(convolution, name)
    assert f"6, {CLASSES}, kernel_size={(1,) * dims}" in repr(head)
    features = torch.randn(2, 6, *(4, 5, 3)[:dims])
    given = head(features)
    assert isinstance(given, DeferredLogits)
    assert given.shape == convolution(features).shape
    assert (given.dtype, given.device) == (features.dtype, features.device)
    assert torch.equal(given.logits(), convolution(features))
    assert torch.equal(given.channels(slice(1, 3)).logits(), convolution(features)[:, 1:3])
    assert torch.equal(head.eval()(features), convolution(features))
    head.when = "always"
    assert isinstance(head(features), DeferredLogits)
    for copied in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(copied(features).logits(), convolution(features))
    detached: list[Any] = [_detached(each) for each in given.parts]
    alike = pickle.loads(pickle.dumps(DeferredLogits(*detached)))
    assert torch.equal(alike.logits(), convolution(features))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_features_without_a_batch(dims: int) -> None:
    convolution = CONVOLUTIONS[dims - 1](6, CLASSES, 1)
    head, features = FusedHead(convolution), torch.randn(6, *(4, 5, 3)[:dims])
    told = (
        rf"^FusedHead: expected features \[B, 6{', D, H, W'[9 - 3 * dims :]}\], .*got shape \[6, 4"
    )
    with pytest.raises(ValueError, match=told):
        head(features)
    assert torch.equal(head.eval()(features), convolution(features))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kernel_size": 3}, "kernel_size="),
        ({"kernel_size": 1, "stride": 2}, "stride="),
        ({"kernel_size": 1, "padding": 1}, "padding="),
        ({"kernel_size": 1, "groups": 2}, "groups=2"),
    ],
    ids=["kernel", "stride", "padding", "groups"],
)
def test_other_convolutions_are_refused(kind: type, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"^convolution: expected .*got {kind.__name__}.*{told}"):
        FusedHead(kind(4, 4, **options))


def _parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(6, CLASSES, 1))


def _hooked() -> nn.Module:
    convolution = nn.Conv2d(6, CLASSES, 1)
    convolution.register_forward_hook(lambda *_: None)
    return convolution


class _Adapted(nn.Conv2d):
    """As LoRA and quantization are."""


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (_parametrized, "a parametrization of its weights"),
        (_hooked, "Conv2d with hooks"),
        (lambda: _Adapted(6, CLASSES, 1), "_Adapted"),
        (lambda: nn.LazyConv2d(CLASSES, 1), "LazyConv2d"),
        (lambda: nn.Linear(6, CLASSES), "Linear"),
    ],
    ids=["parametrized", "hooked", "subclass", "lazy", "linear"],
)
def test_what_would_not_be_carried_out_is_refused(build: Callable, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FusedHead(build())


def test_a_network_whose_head_is_refused_stays() -> None:
    for build, told in ((_parametrized, "a parametrization"), (_hooked, "with hooks")):
        network = net(head=build())
        with pytest.raises(ValueError, match=f"^network: expected a head .*got head: .*{told}"):
            fuse_head(network, example_input=data()[0])
        assert not any(isinstance(each, FusedHead) for each in network.modules())


def test_bad_arguments() -> None:
    network, (image, _) = net(), data()
    with pytest.raises(ValueError, match=r"^when: expected one of 'training', 'always'"):
        fuse_head(network, "eval")
    with pytest.raises(TypeError, match=r"^network: expected a torch.nn.Module, got str"):
        fuse_head("network")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^convolution: expected a torch.nn.Module, got int"):
        FusedHead(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^example_input: expected a torch.Tensor, got tuple"):
        fuse_head(network, example_input=(2, 1, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^example_input: \[2, 8, 8, 8\] does not go through Net"):
        fuse_head(network, example_input=torch.zeros(2, 8, 8, 8))
    compiled: Any = torch.compile(network)
    with pytest.raises(ValueError, match=r"before torch.compile and Dist.*got OptimizedModule"):
        fuse_head(compiled, example_input=image)
    with pytest.raises(ValueError, match=r"Conv2d itself; FusedHead\(convolution\) converts"):
        fuse_head(nn.Conv2d(6, 5, 1))


class _Reuses(Net):
    def forward(self, image: Tensor) -> Any:
        logits = super().forward(image)
        return logits, logits.mean()


class _ChangesFeatures(Net):
    def forward(self, image: Tensor) -> Any:
        features = self.body(image)
        logits = self.head(features)
        return logits, features.mul_(2)


def test_a_head_that_is_not_the_end() -> None:
    image, _ = data()
    with pytest.raises(ValueError, match="also uses it elsewhere"):
        fuse_head(_Reuses(), example_input=image)
    with pytest.raises(ValueError, match="changes the input of head in place"):
        fuse_head(_ChangesFeatures(), example_input=image)


class _Parts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [self.body, self.head]

    def forward(self, image: Tensor) -> Any:
        for part in self.parts:
            image = part(image)
        return image


def test_a_head_that_a_plain_list_keeps() -> None:
    with pytest.raises(ValueError, match="does not run head by that name"):
        fuse_head(_Parts(), example_input=data()[0])


def test_scripted_networks_are_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1)))
    for image in (None, data()[0]):
        with pytest.raises(ValueError, match="not scripted or traced"):
            fuse_head(scripted, example_input=image)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda head: head.register_forward_hook(lambda *_: None), "hooks"),
        (nn.utils.parametrizations.weight_norm, "a parametrization"),
        (lambda head: prune.l1_unstructured(head, "weight", 0.5), "hooks"),
    ],
    ids=["hook", "parametrized", "pruned"],
)
def test_a_head_changed_afterwards_stays(change: Callable[..., Any], told: str) -> None:
    network = fused(net(), data()[0])
    change(network.head)
    with pytest.raises(ValueError, match=f"got head with {told}"):
        unfuse_head(network)
    assert isinstance(network.head, FusedHead)


def test_a_trial_leaves_the_network_as_it_was() -> None:
    network, (image, _) = net(), data()
    network.norm = nn.BatchNorm2d(6)
    network.body.append(network.norm)
    network.body.append(nn.Dropout(0.5))
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    fuse_head(network.eval(), example_input=image)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(each.training for each in network.modules())


def test_a_network_that_cannot_be_copied() -> None:
    network, (image, _) = net(), data()
    network.kept = network(image)
    with pytest.raises(ValueError, match=r"^network: Net cannot be copied: Only Tensors"):
        fuse_head(network, example_input=image)


def test_a_module_with_several_names() -> None:
    network = net()
    network.again = nn.ModuleList([network.head])
    assert fuse_head(network, example_input=data()[0]) == ["head"]
    assert network.again[0] is network.head
    assert isinstance(network.head, FusedHead)
    unfuse_head(network)
    assert network.again[0] is network.head


def test_tied_weights_stay_tied() -> None:
    network: Any = net()
    network.other = nn.Conv2d(6, CLASSES, 1)
    network.other.weight = network.head.weight
    fuse_head(network, example_input=data()[0])
    assert network.other.weight is network.head.weight


# ---- what others do with it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda given, label: F.cross_entropy(given, label),
        lambda given, label: torch.softmax(given, 1),
        lambda given, label: torch.cat([given, given]),
        lambda given, label: nn.Conv2d(CLASSES, 1, 1)(given),
        lambda given, label: given.softmax(1),
        lambda given, label: given.argmax(1),
        lambda given, label: given[0],
        lambda given, label: given[:, 1:],
        lambda given, label: given + 1,
        lambda given, label: 2 * given,
        lambda given, label: given * 2,
        lambda given, label: label + given,
        lambda given, label: sum([given, given]),
        lambda given, label: given - 1,
        lambda given, label: 1 / given,
        lambda given, label: -given,
        lambda given, label: given < given,
        lambda given, label: given == label,
        lambda given, label: given != 0,
        lambda given, label: list(given),
        lambda given, label: next(iter(given)),
        lambda given, label: next(given),
        lambda given, label: [*given],
        lambda given, label: [F.cross_entropy(*each) for each in zip(given, [label], strict=True)],
        lambda given, label: len(given),
        lambda given, label: label in given,
        lambda given, label: np.asarray(given),
        lambda given, label: np.argmax(given, 1),
        lambda given, label: np.ones(3) * given,
        lambda given, label: float(given),
    ],
    ids=range(30),
)
def test_what_takes_them_for_a_tensor_is_told(use: Callable[..., Any]) -> None:
    image, label = data()
    given = fused(net(), image).train()(image)
    told = r"^\w*:? ?.*DeferredLogits.*RiskWeightedLoss.*\.logits\(\).*unfuse_head\(network\)"
    with pytest.raises((TypeError, AttributeError), match=told):
        use(given, label)


@pytest.mark.parametrize(
    "use",
    [
        lambda given, label: riskmap_ext.weighted_loss(given, label),
        lambda given, label: riskmap_ext.linear_weighted_loss(
            given, given.weight, given.bias, label
        ),
        lambda given, label: riskmap_ext.reference.weighted_loss(given, label),
    ],
    ids=["weighted_loss", "linear_weighted_loss", "reference"],
)
def test_functions_of_tensors_say_who_takes_them(use: Callable[..., Any]) -> None:
    image, label = data()
    with pytest.raises(TypeError, match=r"DeferredLogits .*RiskWeightedLoss takes.*\.logits\(\)"):
        use(fused(net(), image).train()(image), label)


def test_they_are_no_tuple() -> None:
    """Their three tensors would pass for three scales of deep supervision."""
    given = fused(net(), data()[0]).train()(data()[0])
    assert not isinstance(given, (tuple, list))
    leaves, tree = pytree.tree_flatten([given])
    assert [leaf is part for leaf, part in zip(leaves, given.parts, strict=True)] == [True] * 3
    (again,) = pytree.tree_unflatten(leaves, tree)
    assert isinstance(again, DeferredLogits)
    assert dataclasses.replace(given, bias=None).parts == (given.features, given.weight, None)
    with pytest.raises(AttributeError, match="cannot assign"):
        given.features = given.weight


def test_traced_by_make_fx() -> None:
    image, _ = data()
    network = fused(net(), image).train()
    traced = make_fx(network)(image)(image)
    torch.testing.assert_close(traced.logits(), network(image).logits())


def test_monais_loss_is_told() -> None:
    losses = pytest.importorskip("monai.losses", reason="needs MONAI")
    image, label = data()
    given = fused(net(), image).train()(image)
    with pytest.raises((TypeError, AttributeError), match=r"\.logits\(\) computes them"):
        losses.DiceCELoss(softmax=True, to_onehot_y=True)(given, label[:, None])
