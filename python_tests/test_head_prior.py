"""riskmap_ext.nn.set_head_prior: every output of a network moves by the log prior, nothing else."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from head_net import CLASSES, LOSS, Net, data, fused, net
from test_head_networks import _DYNUNET, NETWORKS, _monai
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from riskmap_ext.nn import DeferredLogits, fuse_head, set_head_prior, unfuse_head

FREQUENCIES = [0.9, 0.06, 0.03, 0.01, 0.0]
PRIOR = [math.log(f + 1e-4) for f in FREQUENCIES]
LOGITS = [math.log((f + 1e-4) / (1 - f + 1e-4)) for f in FREQUENCIES]


def outputs(network: nn.Module, image: Tensor, training: bool) -> list[Tensor]:
    """Logits [B, C, *S] of a copy, as a training step or a validation sees them."""
    tried = copy.deepcopy(network).train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        given = tried(image)
    found: list[Tensor] = []
    leaves = pytree.tree_leaves(given, is_leaf=lambda each: isinstance(each, DeferredLogits))
    for leaf in leaves:
        logits = leaf.logits() if isinstance(leaf, DeferredLogits) else leaf
        # DynUNet stacks its scales.
        found += logits.unbind(1) if logits.dim() > image.dim() else [logits]
    return found


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """By one name each: DynUNet has two for its heads."""
    return dict([*network.named_parameters(), *network.named_buffers()])


def _drawn(image: Tensor) -> list[Any]:
    """The random states."""
    cuda = torch.cuda.get_rng_state(image.device).tolist() if image.is_cuda else []
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return [torch.get_rng_state().tolist(), cuda, random.getstate(), repr(numpy)]


@contextmanager
def moves_by(
    prior: Sequence[float],
    network: nn.Module,
    image: Tensor,
    count: int = 1,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-4,
) -> Iterator[list[str]]:
    """All `count` outputs move by it in every voxel; all but the names put in the list stays."""
    before = {mode: outputs(network, image, mode) for mode in (True, False)}
    state = {key: value.detach().clone() for key, value in _tensors(network).items()}
    modes = [module.training for module in network.modules()]
    torch.manual_seed(7)
    drawn = _drawn(image)
    names: list[str] = []
    yield names
    assert _drawn(image) == drawn
    assert [module.training for module in network.modules()] == modes
    assert all(each.grad is None for each in network.parameters())
    for key, value in _tensors(network).items():
        assert torch.equal(value, state[key]) == (key not in names), key
    assert len(before[True]) == count
    for mode, earlier in before.items():
        for one, other in zip(earlier, outputs(network, image, mode), strict=True):
            by = torch.tensor(prior, dtype=torch.float64, device=image.device)
            expected = by.view(1, -1, *[1] * (one.dim() - 2)).expand(one.shape)
            change = other.double() - one.double()
            torch.testing.assert_close(change, expected, rtol=rtol, atol=atol)


# ---- networks ------------------------------------------------------------------------------------

_UNET = (3, 1, CLASSES, (4, 8), (2,))
_PLUS = {"features": (4, 4, 4, 4, 4, 4), "deep_supervision": True}
# By name: how it is built, its biases, and the size of an image.
MORE: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "UNet": (_monai("UNet", *_UNET), ["model.2.conv.bias"], 16),
    "UNet, residual": (
        _monai("UNet", *_UNET, num_res_units=2),
        ["model.2.1.conv.unit0.conv.bias"],
        16,
    ),
    "DynUNet, deep": (
        _monai("DynUNet", 3, 1, CLASSES, **_DYNUNET, deep_supervision=True),
        ["output_block.conv.conv.bias", "deep_supervision_heads.0.conv.conv.bias"],
        16,
    ),
    "BasicUNetPlusPlus": (
        _monai("BasicUNetPlusPlus", 3, 1, CLASSES, **_PLUS),
        [f"final_conv_0_{scale}.bias" for scale in (1, 2, 3, 4)],
        32,
    ),
}
KNOWN: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    name: (build, [f"{head}.bias" for head in heads][-1 if "shallow" in name else 0 :], size)
    for name, (build, heads, size) in NETWORKS.items()
}


@pytest.mark.parametrize("name", [*KNOWN, *MORE])
def test_networks(name: str, device: torch.device) -> None:
    build, biases, size = (KNOWN | MORE)[name]
    torch.manual_seed(0)
    network = build().to(device)
    image = data(2 if "2-D" in name else 3, size, 1)[0].to(device)
    with moves_by(PRIOR, network, image, len(biases)) as names:
        names += set_head_prior(network, FREQUENCIES, image)
    assert names == biases


@pytest.mark.parametrize("features", [1, 2, 3], ids="{}-D".format)
def test_dimensions(features: int, device: torch.device) -> None:
    network, image = net(features).to(device), data(features)[0].to(device)
    with moves_by(PRIOR, network, image) as names:
        names += set_head_prior(network, FREQUENCIES, image)


# ---- what is added -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor(FREQUENCIES),
        torch.tensor(FREQUENCIES, dtype=torch.float64, requires_grad=True),
        np.array(FREQUENCIES),
        torch.tensor([9000, 600, 300, 100, 0]),
        [900, 60, 30, 10, 0],
    ],
    ids=["tensor", "float64", "numpy", "torch.bincount", "counts"],
)
def test_frequencies(given: Any) -> None:
    network, image = net(), data()[0]
    with moves_by(PRIOR, network, image) as names:
        names += set_head_prior(network, given, image)


def test_regions(device: torch.device) -> None:
    network, image = net().to(device), data()[0].to(device)
    with moves_by(LOGITS, network, image) as names:
        frequencies = torch.tensor(FREQUENCIES, device=device)
        names += set_head_prior(network, frequencies, image, sigmoid=True)


@pytest.mark.parametrize(("share", "logit"), [(0.25, math.log(0.2501 / 0.7501)), (1.0, 9.2104)])
def test_one_region(share: float, logit: float) -> None:
    network, image = net(head=nn.Conv2d(6, 1, 1)), data()[0]
    with moves_by([logit], network, image) as names:
        names += set_head_prior(network, [share], image, sigmoid=True)


def test_probabilities_are_the_frequencies() -> None:
    """Of a head that tells nothing: up to the 1e-4 that a class without voxels gets."""
    network, image = net(), data()[0]
    for name in ("weight", "bias"):
        nn.init.zeros_(network.head.get_parameter(name))
    set_head_prior(network, FREQUENCIES, image)
    found = network(image).softmax(1)[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor(FREQUENCIES), rtol=0, atol=5e-4)


# ---- heads and their networks --------------------------------------------------------------------


@pytest.mark.parametrize("when", ["training", "always"])
def test_before_and_after_fuse_head(when: str, device: torch.device) -> None:
    plain, image = net().to(device), data()[0].to(device)
    label = data()[1].to(device)
    first = copy.deepcopy(plain)
    later = fused(plain, image, when)
    for network in (first, later):
        with moves_by(PRIOR, network, image) as names:
            names += set_head_prior(network, FREQUENCIES, image)
        assert names == ["head.bias"]
    fuse_head(first, when, example_input=image)
    assert torch.equal(first.train()(image).logits(), later.train()(image).logits())
    set_head_prior(plain, FREQUENCIES, image)
    torch.testing.assert_close(LOSS(later(image), label), LOSS(plain(image), label))
    unfuse_head(later)
    assert torch.equal(later(image), plain(image))


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay(training: bool) -> None:
    network, image = net().train(training), data()[0]
    network.body.append(nn.BatchNorm2d(6))
    network.body.append(nn.Dropout(0.5))
    network.body[0].train(not training)
    with moves_by(PRIOR, network, image) as names:
        names += set_head_prior(network, FREQUENCIES, image)


class _Draws(Net):
    """Test-time dropout, a counter as a buffer that is replaced, and one that is written to."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, image: Tensor) -> Any:
        features = nn.functional.dropout(self.body(image), 0.5)
        self.count = self.count + 1
        self.mean.add_(features.detach().mean((0, 2, 3)))
        return self.head(features)


def test_random_states_and_buffers_stay(device: torch.device) -> None:
    network, image = _Draws().to(device), data()[0].to(device)
    buffers = dict(network.named_buffers())
    with moves_by(PRIOR, network, image) as names:
        names += set_head_prior(network, FREQUENCIES, image)
    assert all(each is buffers[name] for name, each in network.named_buffers())


class _Same(nn.Module):
    """As many features as classes, everywhere; the head comes first in the list."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(CLASSES, CLASSES, 1)
        self.inner = nn.Conv2d(1, CLASSES, 3, padding=1)
        self.norm = nn.BatchNorm2d(CLASSES)
        self.outer = nn.Conv2d(CLASSES, CLASSES, 3, padding=1)

    def forward(self, image: Tensor) -> Any:
        return self.out(self.outer(self.norm(self.inner(image)).relu()))


class _Checkpointed(_Same):
    """Reentrant: torch.autograd.grad refuses it."""

    def forward(self, image: Tensor) -> Any:
        features = self.norm(self.inner(image))
        return self.out(checkpoint(self.outer, features, use_reentrant=True))


class _Residual(_Same):
    """Both of its last convolutions have a bias of the output: one of them is moved."""

    def forward(self, image: Tensor) -> Any:
        return self.outer(self.norm(self.inner(image)).relu()) + self.out(self.inner(image))


@pytest.mark.parametrize(
    ("make", "bias"),
    [(_Same, "out.bias"), (_Checkpointed, "out.bias"), (_Residual, "outer.bias")],
    ids=["same", "checkpointed", "residual"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_as_many_features_as_classes(make: type, bias: str) -> None:
    torch.manual_seed(0)
    network, image = make(), data()[0]
    with moves_by(PRIOR, network, image) as names:
        names += set_head_prior(network, FREQUENCIES, image)
    assert names == [bias]


class _Dict(Net):
    def forward(self, image: Tensor) -> Any:
        logits = super().forward(image)
        return {"out": logits, "scales": (logits[:, :, ::2, ::2],), "features": self.body(image)}


class _Twice(Net):
    """The same head at two scales, and an output of another task."""

    def forward(self, image: Tensor) -> Any:
        features = self.body(image)
        return [self.head(features), self.head(features[:, :, ::2, ::2])]


class _TrainsWithTwo(Net):
    """The further output is there in training alone, deep in the network."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(6, CLASSES, 1)

    def forward(self, image: Tensor) -> Any:
        features = self.body(image)
        logits = self.head(features)
        return [logits, self.side(features)] if self.training else logits


def test_dictionaries() -> None:
    network, image = _Dict(), data()[0]
    before = network(image)
    assert set_head_prior(network, FREQUENCIES, image) == ["head.bias"]
    after = network(image)
    prior = torch.tensor(PRIOR)[None, :, None, None]
    torch.testing.assert_close(after["out"], before["out"] + prior)
    assert torch.equal(after["features"], before["features"])


def test_several_outputs_of_a_head() -> None:
    network, image = _Twice(), data()[0]
    with moves_by(PRIOR, network, image, 2) as names:
        names += set_head_prior(network, FREQUENCIES, image)
    assert names == ["head.bias"]


def test_outputs_of_training_within_a_network() -> None:
    network, image = nn.Sequential(nn.Identity(), _TrainsWithTwo()).eval(), data()[0]
    with moves_by(PRIOR, network, image, 2) as names:
        names += set_head_prior(network, FREQUENCIES, image)
    assert names == ["1.head.bias", "1.side.bias"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_convolution_and_a_scripted_network() -> None:
    image = data()[0]
    for network in (nn.Conv2d(1, CLASSES, 3), torch.jit.script(nn.Sequential(nn.Conv2d(1, 5, 1)))):
        before = network(image)
        set_head_prior(network, FREQUENCIES, image)
        expected = before + torch.tensor(PRIOR)[None, :, None, None]
        torch.testing.assert_close(network(image), expected)


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda head: prune.l1_unstructured(head, "weight", 0.5),
    ],
    ids=["weight norm", "spectral norm", "pruned"],
)
def test_a_changed_head(change: Callable[..., Any]) -> None:
    network, image = net(), data()[0]
    change(network.head)
    before = network.eval()(image)
    state = {key: value.clone() for key, value in network.train().state_dict().items()}
    assert set_head_prior(network, FREQUENCIES, image) == ["head.bias"]
    expected = before + torch.tensor(PRIOR)[None, :, None, None]
    torch.testing.assert_close(network.eval()(image), expected)
    changed = [k for k, value in network.state_dict().items() if not torch.equal(value, state[k])]
    assert changed == ["head.bias"]


def test_shared_weights_stay_shared() -> None:
    network: Any = net()
    network.again = nn.ModuleList([network.head])
    image = data()[0]
    assert set_head_prior(network, FREQUENCIES, image) == ["head.bias"]
    assert network.again[0].bias is network.head.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    """Sums over this many voxels are beyond float16."""
    network = net().to(device, dtype)
    image = torch.randn(1, 1, 512, 512, device=device, dtype=dtype)
    room = 0.0 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    with moves_by(PRIOR, network, image, rtol=1e-6, atol=1e-6 + 2 * room) as names:
        names += set_head_prior(network, FREQUENCIES, image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_head_in_half_precision(dtype: torch.dtype) -> None:
    class Mixed(Net):
        def forward(self, image: Tensor) -> Any:
            return self.head(self.body(image).to(dtype)).float()

    network, image = Mixed(), data()[0]
    network.head.to(dtype)
    with moves_by(PRIOR, network, image, rtol=0, atol=16 * torch.finfo(dtype).eps) as names:
        names += set_head_prior(network, FREQUENCIES, image)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_what_the_caller_is_in(context: Callable[[], Any]) -> None:
    network, (image, label) = net(), data()
    with moves_by(PRIOR, network, image) as names, context():
        names += set_head_prior(network, FREQUENCIES, image)
    LOSS(network(image), label).backward()
    assert network.head.get_parameter("bias").grad is not None


def test_an_optimizer_goes_on_with_it() -> None:
    network, (image, label) = net(), data()
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    set_head_prior(network, FREQUENCIES, image)
    before = network.head.get_parameter("bias").detach().clone()
    LOSS(network(image), label).backward()
    optimizer.step()
    assert not torch.equal(network.head.get_parameter("bias"), before)


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "error", "told"),
    [
        ([0.5, math.nan, 0, 0, 0], {}, ValueError, "a finite number >= 0, got nan"),
        ([0.5, math.inf, 0, 0, 0], {}, ValueError, "a finite number >= 0, got inf"),
        ([0.5, -0.5, 0, 0, 1], {}, ValueError, "a finite number >= 0, got -0.5"),
        ([0] * 5, {}, ValueError, "at least two classes and one of them above 0"),
        ([1.0], {}, ValueError, "at least two classes"),
        ([], {"sigmoid": True}, ValueError, "the share of each region, 0 to 1"),
        ([5, 4, 3, 2, 1], {"sigmoid": True}, ValueError, "the share of each region, 0 to 1"),
        ([0.5, 0.5], {}, ValueError, r"as many as .* output channels, got 2; .* \[2, 5, 8, 8\]"),
        (torch.ones(2, 5), {}, TypeError, "a number, got list"),
        (torch.tensor(1.0), {}, TypeError, "a sequence of numbers, got float"),
        (torch.ones(5).bool(), {}, TypeError, "a number, got bool"),
        ("abcde", {}, TypeError, "a sequence of numbers, got str"),
    ],
    ids=range(12),
)
def test_bad_frequencies(given: Any, options: dict, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"^frequencies: expected {told}"):
        set_head_prior(net(), given, data()[0], **options)


@pytest.mark.parametrize(
    ("image", "error", "told"),
    [
        (torch.zeros(1, 3, 8, 8), ValueError, r": \[1, 3, 8, 8\] does not go through Net: Given"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), ValueError, " does not go through Net: "),
        (torch.zeros(1, 1, 8, 8, device="meta"), ValueError, " does not go through Net: "),
        (torch.full((1, 1, 8, 8), math.nan), ValueError, ": Net gives nothing, NaN or infinity"),
        (torch.zeros(0, 1, 8, 8), ValueError, ": Net gives nothing, NaN or infinity"),
        ((1, 1, 8, 8), TypeError, ": expected a torch.Tensor, got tuple"),
    ],
    ids=["channels", "dtype", "device", "NaN", "empty", "shape"],
)
def test_bad_images(image: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"^example_input.*{told}"):
        set_head_prior(net(), FREQUENCIES, image)


class _Ends(Net):
    """With something behind its head."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.end = end

    def forward(self, image: Tensor) -> Any:
        return self.end(super().forward(image))


class _Refines(Net):
    """Its outputs depend on each other: no two biases move each of them once."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Conv2d(CLASSES, CLASSES, 3, padding=1)

    def forward(self, image: Tensor) -> Any:
        coarse = super().forward(image)
        return [coarse + self.more(coarse.detach()), coarse]


class _Labels(Net):
    def forward(self, image: Tensor) -> Any:
        return super().forward(image).argmax(1)


def _positive(network: Any) -> nn.Module:
    """Here a ReLU does nothing, for now."""
    nn.init.constant_(network.head.bias, 5.0)
    return network


def _frozen() -> nn.Module:
    network = net()
    network.head.requires_grad_(False)
    return network


_NOTHING = r"nothing in \w+ is a bias of its output of shape \[2, 5, 8, 8\]: its last layer has"


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: net(bias=False), f"^network: {_NOTHING}"),
        (lambda: _Ends(nn.Softmax(1)), f"^network: {_NOTHING}"),
        (lambda: _Ends(nn.LogSoftmax(1)), f"^network: {_NOTHING}"),
        (lambda: _Ends(nn.InstanceNorm2d(CLASSES)), f"^network: {_NOTHING}"),
        (lambda: _positive(_Ends(nn.ReLU())), f"^network: {_NOTHING}"),
        (lambda: _positive(_Ends(nn.LeakyReLU())), f"^network: {_NOTHING}"),
        (_Refines, f"^network: {_NOTHING}"),
        (_frozen, "^network: .*that is trained, got head.bias with requires_grad=False"),
        (lambda: net(head=nn.LazyConv2d(CLASSES, 1)), "^network: .*lazy layers made: run an image"),
        (_Labels, r"^frequencies: expected .* its output has the shape \[2, 8, 8\]"),
    ],
    ids=[
        *("no bias", "softmax", "log softmax", "norm", "ReLU", "leaky ReLU", "refined"),
        *("frozen", "lazy", "labels"),
    ],
)
def test_a_refused_network_stays(build: Callable[[], nn.Module], told: str) -> None:
    torch.manual_seed(0)
    network, image = build(), data()[0]
    lazy = any(nn.parameter.is_lazy(each) for each in network.parameters())
    before = {} if lazy else {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    with pytest.raises(ValueError, match=told):
        set_head_prior(network, FREQUENCIES, image)
    assert [module.training for module in network.modules()] == modes
    for key, value in before.items():
        assert torch.equal(network.state_dict()[key], value), key


def test_a_network_that_fails_in_the_middle_stays() -> None:
    class Breaks(Net):
        runs = 0

        def forward(self, image: Tensor) -> Any:
            self.runs += 1
            if self.runs > 1:
                raise RuntimeError("no\nmore")
            return super().forward(image)

    network = Breaks()
    before = network.head.get_parameter("bias").detach().clone()
    with pytest.raises(ValueError, match="does not go through Breaks: no more") as caught:
        set_head_prior(network, FREQUENCIES, data()[0])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert torch.equal(network.head.get_parameter("bias"), before)
    assert network.training
    assert network.head.training


def test_no_networks() -> None:
    image = data()[0]
    wrapped: Any
    with pytest.raises(TypeError, match=r"^network: expected a torch.nn.Module, got str"):
        set_head_prior("network", FREQUENCIES, image)  # type: ignore[arg-type]
    for wrapped in (torch.compile(net()), nn.DataParallel(net())):
        with pytest.raises(ValueError, match=r"^network: .* before torch.compile and Distr"):
            set_head_prior(wrapped, FREQUENCIES, image)
    with pytest.raises(TypeError, match=r"^sigmoid: expected True or False, got str"):
        set_head_prior(net(), FREQUENCIES, image, sigmoid="yes")  # type: ignore[arg-type]
