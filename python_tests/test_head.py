"""riskmap_ext.nn.FusedHead and fuse_head: the loss of the network as it was, and eval as it was."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import riskmap_ext
from riskmap_ext.nn import DeferredLogits, FusedHead, RiskWeightedLoss, fuse_head, unfuse_head

CLASSES = 5
LOSS = RiskWeightedLoss(dice_weight=1.0)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Net(nn.Module):
    """Of a body and a head, which nobody knows by name."""

    def __init__(self, dims: int = 2, head: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        kind = CONVOLUTIONS[dims - 1]
        self.body = nn.Sequential(kind(1, 6, 3, padding=1), nn.ReLU())
        self.head = head or kind(6, CLASSES, 1, bias=bias)

    def forward(self, image: Tensor) -> Any:
        return self.head(self.body(image))


def data(dims: int = 2, size: int = 8, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *(size,) * dims)
    image = torch.randn(batch, 1, *shape[1:], generator=generator)
    return image, torch.randint(0, CLASSES, shape, generator=generator)


def net(*options: Any, **more: Any) -> Net:
    torch.manual_seed(0)
    return Net(*options, **more)


def fused(network: nn.Module, image: Tensor, when: str = "training") -> nn.Module:
    """A copy with a fused head."""
    network = copy.deepcopy(network)
    assert fuse_head(network, when, example_input=image)
    return network


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    return {name: each.grad for name, each in network.named_parameters()}


def assert_same_step(one: nn.Module, other: nn.Module, image: Tensor, label: Tensor) -> None:
    """The loss and the gradients in training."""
    values = []
    for network in (one, other):
        network.train().zero_grad()
        torch.manual_seed(1)
        value = LOSS(network(image), label)
        value.backward()
        values.append(value.detach())
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    found, expected = gradients(one), gradients(other)
    assert found.keys() == expected.keys()
    scale = max(float(each.abs().max()) for each in expected.values() if each is not None)
    for name, each in expected.items():
        torch.testing.assert_close(
            found[name], each, rtol=1e-4, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


# ---- networks ------------------------------------------------------------------------------------


def _monai(name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        nets = pytest.importorskip("monai.networks.nets", reason="needs MONAI")
        return getattr(nets, name)(*args, **options)

    return build


def _nnunet(name: str, dims: int = 3, deep: bool = True) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        unet = pytest.importorskip(
            "dynamic_network_architectures.architectures.unet", reason="needs nnU-Net's networks"
        )
        norm = (nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 2]
        options = {"norm_op": norm, "nonlin": nn.LeakyReLU, "deep_supervision": deep}
        kind = CONVOLUTIONS[dims - 1]
        return getattr(unet, name)(
            1, 3, (4, 8, 8), kind, 3, (1, 2, 2), 1, CLASSES, 1, conv_bias=True, **options
        )

    return build


_FILTERS = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
_DYNUNET = {**_FILTERS, "filters": [4, 8, 8]}
_SEGRESNET = {"out_channels": CLASSES, "blocks_down": (1, 1, 1)}
_SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
_UNETR = {"feature_size": 4, "hidden_size": 16, "mlp_dim": 16, "num_heads": 2}
_SEGS = ["decoder.seg_layers.0", "decoder.seg_layers.1"]
# By name: how it is built, its heads, and the size of an image.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "AttentionUnet": (
        _monai("AttentionUnet", 3, 1, CLASSES, [4, 8, 8], [2, 2]),
        ["model.2.conv"],
        16,
    ),
    "BasicUNet": (
        _monai("BasicUNet", 3, 1, CLASSES, features=(4, 4, 8, 8, 8, 4)),
        ["final_conv"],
        32,
    ),
    "DynUNet": (_monai("DynUNet", 3, 1, CLASSES, **_DYNUNET), ["output_block.conv.conv"], 16),
    "SegResNet": (
        _monai("SegResNet", 3, 8, blocks_up=(1, 1), **_SEGRESNET),
        ["conv_final.2.conv"],
        16,
    ),
    "SegResNetDS": (_monai("SegResNetDS", 3, 8, **_SEGRESNET), ["up_layers.1.head"], 16),
    "SegResNetDS, deep": (
        _monai("SegResNetDS", 3, 8, dsdepth=2, **_SEGRESNET),
        ["up_layers.0.head", "up_layers.1.head"],
        16,
    ),
    "SwinUNETR": (_monai("SwinUNETR", 1, CLASSES, **_SWIN), ["out.conv.conv"], 64),
    "UNETR": (_monai("UNETR", 1, CLASSES, (32, 32, 32), **_UNETR), ["out.conv.conv"], 32),
    "PlainConvUNet": (_nnunet("PlainConvUNet"), _SEGS, 16),
    "PlainConvUNet, shallow": (_nnunet("PlainConvUNet", deep=False), _SEGS, 16),
    "PlainConvUNet, 2-D": (_nnunet("PlainConvUNet", 2), _SEGS, 16),
    "ResidualEncoderUNet": (_nnunet("ResidualEncoderUNet"), _SEGS, 16),
    "ResidualUNet": (_nnunet("ResidualUNet"), _SEGS, 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_known_networks(name: str) -> None:
    build, heads, size = NETWORKS[name]
    torch.manual_seed(0)
    network = build()
    image, label = data(2 if "2-D" in name else 3, size, 1)
    mine = copy.deepcopy(network)
    before = {key: id(each) for key, each in mine.named_parameters()}
    assert fuse_head(mine) == heads
    assert {key: id(each) for key, each in mine.named_parameters()} == before
    assert list(mine.state_dict()) == list(network.state_dict())
    assert fuse_head(mine) == heads  # again
    tried = copy.deepcopy(network)
    seen = heads[-1:] if "shallow" in name else heads  # the others do not run
    assert fuse_head(tried, example_input=image) == seen

    mine.eval(), network.eval()
    with torch.no_grad():
        found, expected = mine(image), network(image)
    several = isinstance(expected, (list, tuple))
    for one, other in zip(*((found, expected) if several else ([found], [expected])), strict=True):
        assert type(one) is Tensor
        assert torch.equal(one, other)

    given = mine.train()(image)
    for each in given if isinstance(given, list) else [given]:
        assert isinstance(each, DeferredLogits)
        assert each.shape[:2] == (1, CLASSES)
    assert_same_step(mine, network, image, label)
    assert unfuse_head(mine) == heads
    assert unfuse_head(mine) == []
    assert {key: id(each) for key, each in mine.named_parameters()} == before
    assert repr(mine) == repr(network)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_monai("UNet", 3, 1, CLASSES, (4, 8), (2,)), r"model\.2\.conv: ConvTranspose3d\("),
        (
            _monai("UNet", 3, 1, CLASSES, (4, 8), (2,), num_res_units=1),
            r"the last layer that ran is model\.2\.1\.conv\.unit0\.conv, Conv3d\(.*kernel_size=\(3",
        ),
        (
            _monai("DynUNet", 3, 1, CLASSES, **_DYNUNET, deep_supervision=True),
            "what DynUNet gives is not the untouched output of a 1x1 convolution",
        ),
        (
            _monai("DynUNet", 3, 1, CLASSES, **_DYNUNET, dropout=0.1),
            "what DynUNet gives is not the untouched output of a 1x1 convolution",
        ),
    ],
    ids=["UNet", "UNet, residual", "DynUNet, deep", "DynUNet, dropout"],
)
def test_networks_without_a_head(build: Callable[[], nn.Module], message: str) -> None:
    network = build()
    image, _ = data(3, 16)
    with pytest.raises(ValueError, match=message):
        fuse_head(network, example_input=image)
    with pytest.raises(ValueError, match=f"^network: .*{type(network).__name__}|ADN comes after"):
        fuse_head(network)
    assert not any(isinstance(each, FusedHead) for each in network.modules())


def test_a_source_model_of_deep_supervision() -> None:
    """DynUNet stacks its heads in training alone."""
    image, label = data(3, 16, 1)
    network = _monai("DynUNet", 3, 1, CLASSES, **_DYNUNET, deep_supervision=True)().eval()
    for example in (None, image):
        source = copy.deepcopy(network)
        assert fuse_head(source, "always", example_input=example) == ["output_block.conv.conv"]
        with torch.no_grad():
            torch.testing.assert_close(LOSS(source(image), label), LOSS(network(image), label))


def test_an_unknown_network_needs_an_example() -> None:
    network = net()
    with pytest.raises(ValueError, match=r"head of Net is, is not known .* head, Conv2d\(6, 5"):
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
    alike = pickle.loads(pickle.dumps(DeferredLogits(*map(_detached, given.parts))))
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
def test_other_convolutions_are_refused(kind: type, options: dict, told: str) -> None:
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
        fuse_head("network")
    with pytest.raises(TypeError, match=r"^convolution: expected a torch.nn.Module, got int"):
        FusedHead(1)
    with pytest.raises(TypeError, match=r"^example_input: expected a torch.Tensor, got tuple"):
        fuse_head(network, example_input=(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^example_input: \[2, 8, 8, 8\] does not go through Net"):
        fuse_head(network, example_input=torch.zeros(2, 8, 8, 8))
    with pytest.raises(ValueError, match=r"before torch.compile and Dist.*got OptimizedModule"):
        fuse_head(torch.compile(network), example_input=image)
    with pytest.raises(ValueError, match=r"Conv2d itself; FusedHead\(convolution\) makes one"):
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
    with pytest.raises(ValueError, match="does something else with it, too"):
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
    for options in ({}, {"example_input": data()[0]}):
        with pytest.raises(ValueError, match="not scripted or traced"):
            fuse_head(scripted, **options)


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
    network = net()
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
        lambda given, label: riskmap_ext.linear_weighted_loss(given, *given.parts[1:], label),
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
    with pytest.raises((TypeError, AttributeError), match=r"\.logits\(\) makes them"):
        losses.DiceCELoss(softmax=True, to_onehot_y=True)(given, label[:, None])


def test_an_optimizer_of_before_still_trains() -> None:
    image, label = data()
    networks = [net(), net()]
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in networks]
    assert fuse_head(networks[0], example_input=image) == ["head"]
    for _ in range(3):
        assert_same_step(*networks, image, label)
        for optimizer in optimizers:
            optimizer.step()
    weights = [each.state_dict()["head.weight"] for each in networks]
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], net().state_dict()["head.weight"])
    networks[0].load_state_dict(networks[1].state_dict())


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    """Whether the loss is within autocast, too, or not."""
    image, label = data(3)
    network = net(3)
    mine = fused(network, image).train()
    for each in (mine, network):
        with torch.autocast("cpu", torch.bfloat16):
            given = each(image)
            loss = LOSS(given, label) if inside else None
        if each is mine:
            assert {part.dtype for part in given.parts} == {torch.bfloat16}
        loss = LOSS(given, label) if loss is None else loss
        loss.backward()
        assert each.head.weight.grad.dtype == torch.float32
    for name, expected in gradients(network).items():
        found = gradients(mine)[name]
        assert float((found - expected).norm()) <= 0.02 * float(expected.norm()), name


def test_float64_stays_under_autocast() -> None:
    head = FusedHead(nn.Conv2d(6, CLASSES, 1).double())
    with torch.autocast("cpu", torch.bfloat16):
        given = head(torch.randn(1, 6, 4, 4, dtype=torch.float64))
    assert {part.dtype for part in given.parts} == {torch.float64}


def test_fused_between_compile_and_the_first_call() -> None:
    """nnU-Net wraps first."""
    image, _ = data()
    network = net().train()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    fuse_head(compiled._orig_mod, example_input=image)
    assert isinstance(compiled(image), DeferredLogits)


@pytest.mark.parametrize("together", [True, False], ids=["one graph", "two graphs"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, together: bool) -> None:
    image, label = data()
    network = net()
    mine = fused(network, image).train()
    options: dict[str, Any] = {"fullgraph": True, "backend": backend}
    torch._dynamo.reset()
    if together:
        loss = torch.compile(lambda x, y: LOSS(mine(x), y), **options)(image, label)
    else:
        given = torch.compile(mine, **options)(image)
        assert isinstance(given, DeferredLogits)
        loss = torch.compile(LOSS, **options)(given, label)
    loss.backward()
    LOSS(network(image), label).backward()
    for name, expected in gradients(network).items():
        torch.testing.assert_close(gradients(mine)[name], expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        compiled = torch.compile(mine.eval(), **options)(image)
    torch.testing.assert_close(compiled, network(image))


def test_checkpointing() -> None:
    image, label = data()
    network = net()
    mine = fused(network, image).train()
    given = checkpoint(mine, image, use_reentrant=False)
    LOSS(given, label).backward()
    LOSS(network(image), label).backward()
    for name, expected in gradients(network).items():
        torch.testing.assert_close(gradients(mine)[name], expected)


def test_reentrant_checkpointing_is_no_silent_stop() -> None:
    """It runs the network without gradients and finds no tensor to hang its own on."""
    image, label = data()
    network = fused(net(), image).train()
    given = checkpoint(network, image.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        LOSS(given, label).backward()


def test_traced_in_training() -> None:
    image, _ = data()
    with pytest.raises(RuntimeError, match=r"DeferredLogits.*not made"):
        torch.jit.trace(fused(net(), image).train(), image)


def test_hooks_of_the_network() -> None:
    """Forward hooks see what it gives; backward hooks need a tensor, as torch itself says."""
    image, label = data()
    network = fused(net(), image).train()
    seen: list[Any] = []
    network.register_forward_hook(lambda _, __, output: seen.append(output))
    assert network(image) is seen[0]
    network.register_full_backward_hook(lambda *given: seen.append(given))
    with pytest.warns(UserWarning, match=r"backward hooks .* received .*DeferredLogits"):
        LOSS(network(image), label).backward()
    assert len(seen) == 2


def test_replicas_of_data_parallel_give_logits() -> None:
    """It would join their weights along the first dimension."""
    head = FusedHead(nn.Conv2d(6, CLASSES, 1))
    replica = head._replicate_for_data_parallel()
    replica.weight, replica.bias = head.weight, head.bias
    assert type(replica(torch.randn(1, 6, 4, 4))) is Tensor


class _Two(Net):
    """With a head of which the loss sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(6, 2, 1)

    def forward(self, image: Tensor) -> Any:
        features = self.body(image)
        return [self.head(features), self.unused(features)]


def _steps(network: nn.Module, model: nn.Module, image: Tensor, label: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        given = model(image)
        LOSS(given[0] if isinstance(given, list) else given, label).backward()
        optimizer.step()
    return network.state_dict()


def _process(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.set_num_threads(1)
    image, label = data(batch=4)
    mine = slice(2 * rank, 2 * rank + 2)
    found = {}
    for name, build, options in _DISTRIBUTED:
        torch.manual_seed(0)
        network = build()
        if name != "fused afterwards":
            fuse_head(network, example_input=image)
        model = DistributedDataParallel(network, **options)
        fuse_head(model.module, example_input=image)
        found[name] = _steps(network, model, image[mine], label[mine])
        del model
    torch.save(found, f"{folder}/{rank}.pt")
    gc.collect()  # DistributedDataParallel is part of a cycle and keeps gloo's threads
    dist.destroy_process_group()


_DISTRIBUTED: list[tuple[str, Callable[[], nn.Module], dict[str, Any]]] = [
    ("plain", Net, {}),
    ("fused afterwards", Net, {}),  # nnU-Net wraps first
    ("unused", _Two, {"find_unused_parameters": True}),
    ("static", Net, {"static_graph": True}),
]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_end_in_the_weights_of_one(tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)
    image, label = data(batch=4)
    for name, build, _ in _DISTRIBUTED:
        torch.manual_seed(0)
        network = build()
        expected = _steps(network, network, image, label)
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name]
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
