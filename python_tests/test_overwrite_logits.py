"""overwrite_logits: the gradient in the memory of the logits, and whoever needs these later."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from cases import (
    BASE,
    LOSS_CASES,
    REGION_CASES,
    Case,
    loss_and_gradients,
    loss_leaves,
    network_output,
    overwritten,
)
from compare import grad_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import riskmap_ext
from riskmap_ext import gradient_in_forward, reference
from riskmap_ext.nn import RiskWeightedLoss

CPU = torch.device("cpu")
DICE = {"dice_weight": 1.0}
PATHS = [{}, DICE]  # the gradient is made in the forward pass, in the backward pass
paths = pytest.mark.parametrize("options", PATHS, ids=["forward", "backward"])
GONE = "overwrite_logits"


def overwriting_loss(logits: Tensor, target: Tensor, risk: Tensor | None, **options: Any) -> Tensor:
    return riskmap_ext.weighted_loss(logits, target, risk, **options, overwrite_logits=True)


def assert_same_bits(found: Sequence[Any], expected: Sequence[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def _is_dense(logits: Tensor) -> bool:
    """As torch sees it: a copy keeps the strides of what is dense alone."""
    return torch.empty_like(logits).stride() == logits.stride()


CASES = [each for each in (*LOSS_CASES, *REGION_CASES) if _is_dense(each.logits(CPU))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits(case: Case, device: torch.device) -> None:
    for factor in (1.0, -1.75, 65536.0):
        call = case.loss_call(device)
        expected = loss_and_gradients(call, None, factor)
        assert_same_bits(overwritten(call, factor), expected)


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_same_bits_in_the_backward_pass(case: Case, device: torch.device) -> None:
    call = case.loss_call(device)
    with gradient_in_forward(False):
        expected = loss_and_gradients(call)
        assert_same_bits(overwritten(call), expected)


@paths
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("classes", [3, 20])
def test_large_volumes(
    classes: int, threads: int, options: dict[str, Any], restored_threads: None
) -> None:
    """Of many chunks, and as large as what is otherwise written past the caches."""
    case = Case("large", classes=classes, spatial=(130, 125 * 40 // classes, 17))
    call = case.loss_call(CPU)[0], options
    expected = loss_and_gradients(call)
    torch.set_num_threads(threads)
    assert_same_bits(overwritten(call), expected)


@paths
def test_nothing_is_overwritten_without_a_gradient(options: dict[str, Any]) -> None:
    (values, target, risk), _ = BASE.loss_call(CPU)
    before = values.clone()
    with torch.no_grad():
        overwriting_loss(network_output(values), target, risk, **options)
    overwriting_loss(values, target, risk, **options)  # a leaf that wants none
    overwriting_loss(values, target, risk.nan_to_num(1.0).requires_grad_(), **options).backward()
    assert torch.equal(values, before)


@paths
def test_empty_batch(options: dict[str, Any]) -> None:
    loss, gradient, _ = overwritten((Case("empty", batch=0).loss_call(CPU)[0], options))
    assert loss == 0
    assert gradient.shape[0] == 0


# ---- where it cannot be --------------------------------------------------------------------------


def _part(values: Tensor) -> Tensor:
    return network_output(torch.cat([values, values]))[: len(values)]


def _with_gaps(values: Tensor) -> Tensor:
    return network_output(torch.stack([values, values], dim=-1)[..., 0])


REFUSED = {
    "leaf": (lambda v: v.requires_grad_(), "leaf of the graph"),
    "view of a leaf": (lambda v: v.requires_grad_().flatten().view(v.shape), "leaf of the graph"),
    "part": (_part, r"part \[.*\] of a tensor \[.*\]; .*clone"),
    "expanded": (lambda v: network_output(v[:1]).expand_as(v), "part .* of a tensor"),
    "gaps": (_with_gaps, "without gaps or overlaps .* strides"),
    "overlaps": (
        lambda v: network_output(v[:1].expand_as(v)),
        "without gaps or overlaps .* strides",
    ),
}


@paths
@pytest.mark.parametrize("how", REFUSED)
def test_refused(how: str, options: dict[str, Any]) -> None:
    make, message = REFUSED[how]
    (values, target, risk), _ = BASE.loss_call(CPU)
    values = values.clone()
    logits = make(values)
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=f"{GONE}: .*{message}"):
        overwriting_loss(logits, target, risk, **options)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", ["_weighted_loss_with_gradient_", "_weighted_loss_backward_"])
def test_operators_refuse_gaps(name: str) -> None:
    (values, target, _), _ = BASE.loss_call(CPU)
    wide = torch.stack([values, values], dim=-1)[..., 0]
    nothing = (None, None, None, None)
    scale, slopes = values.new_ones(len(values), dtype=torch.float64), values.new_empty(0).double()
    arguments = {
        "_weighted_loss_with_gradient_": (wide, target, *nothing, -100, 0, 0.05, 2, 0, 0, 0.0, 1.0),
        "_weighted_loss_backward_": (
            *(torch.ones(()), wide, target, *nothing, scale, slopes),
            *(-100, 0, 0, 0.0, False),
        ),
    }[name]
    with pytest.raises(ValueError, match="logits must be dense in memory"):
        getattr(torch.ops.riskmap_ext, name)(*arguments, False)


def test_takes_true_or_false() -> None:
    (values, target, _), _ = BASE.loss_call(CPU)
    for call in (riskmap_ext.weighted_loss, reference.weighted_loss):
        with pytest.raises(TypeError, match=f"{GONE}: expected True or False"):
            call(values, target, overwrite_logits=1)  # type: ignore[arg-type]


def test_reference_ignores_it() -> None:
    logits, target, _ = loss_leaves(BASE, CPU)
    before = logits.detach().clone()
    reference.weighted_loss(logits, target, overwrite_logits=True).backward()
    assert torch.equal(logits, before)
    assert logits.grad is not None


# ---- who needs the logits besides ----------------------------------------------------------------


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A leaf, logits made of it, target and risk; nothing saves the logits so far."""
    leaf, target, risk = loss_leaves(BASE, CPU)
    return leaf, leaf * 2, target, risk.detach()


@paths
@pytest.mark.parametrize("view", [False, True])
def test_saved_before(options: dict[str, Any], view: bool) -> None:
    _, logits, target, risk = _inputs()
    other = logits.square().sum()
    if view:
        logits = logits.flatten(2).view(logits.shape)
    loss = overwriting_loss(logits, target, risk, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@paths
@pytest.mark.parametrize("last", [torch.exp, torch.relu, torch.sigmoid])
def test_saved_by_the_layer_that_made_them(
    options: dict[str, Any], last: Callable[[Tensor], Tensor]
) -> None:
    _, logits, target, risk = _inputs()
    loss = overwriting_loss(last(logits), target, risk, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@paths
def test_used_before_but_not_saved(options: dict[str, Any]) -> None:
    leaf, logits, target, risk = _inputs()
    (logits.sum() + riskmap_ext.weighted_loss(logits, target, risk, **options)).backward()
    expected, leaf.grad = grad_of(leaf), None
    logits = leaf * 2
    (logits.sum() + overwriting_loss(logits, target, risk, **options)).backward()
    assert torch.equal(grad_of(leaf), expected)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("saves", [False, True])
def test_used_after_the_forward_pass(saves: bool, view: bool) -> None:
    _, logits, target, risk = _inputs()
    given = logits.flatten(2).view(logits.shape) if view else logits
    loss = overwriting_loss(given, target, risk)
    other = logits.square().sum() if saves else logits.sum()
    with pytest.raises(RuntimeError, match=f"used again .*{GONE}"):
        (loss + other).backward()


def test_two_losses_of_the_same_logits() -> None:
    _, logits, target, risk = _inputs()
    loss = overwriting_loss(logits, target, risk) + overwriting_loss(logits, target, risk)
    with pytest.raises(RuntimeError, match=f"used again .*{GONE}"):
        loss.backward()


def test_used_between_forward_and_backward_pass() -> None:
    """With Dice the forward pass leaves the logits as they are."""
    leaf, logits, target, risk = _inputs()
    loss, other = overwriting_loss(logits, target, risk, **DICE), logits.square().sum()
    torch.autograd.grad(other, leaf, retain_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@paths
def test_modified_after_the_forward_pass(options: dict[str, Any]) -> None:
    _, logits, target, risk = _inputs()
    loss = overwriting_loss(logits, target, risk, **options)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@paths
def test_one_backward_pass(options: dict[str, Any]) -> None:
    leaf, logits, target, risk = _inputs()
    loss = overwriting_loss(logits, target, risk, **options)
    loss.backward(retain_graph=True)
    expected = grad_of(leaf).clone()
    with pytest.raises(RuntimeError, match=f"second backward pass .*{GONE}"):
        loss.backward()
    assert torch.equal(grad_of(leaf), expected)


@paths
def test_another_loss_after_the_backward_pass(options: dict[str, Any]) -> None:
    _, logits, target, risk = _inputs()
    overwriting_loss(logits, target, risk, **options).backward(retain_graph=True)
    other = torch.nn.functional.cross_entropy(logits, target.clamp(min=0))
    with pytest.raises(RuntimeError, match=f"used again .*{GONE}"):
        other.backward()


@paths
def test_no_second_derivative(options: dict[str, Any]) -> None:
    leaf, logits, target, risk = _inputs()
    loss = overwriting_loss(logits, target, risk, **options)
    with pytest.raises(RuntimeError, match=f"create_graph=True .*{GONE}"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@paths
def test_no_batch_of_gradients(options: dict[str, Any]) -> None:
    leaf, logits, target, risk = _inputs()
    loss = overwriting_loss(logits, target, risk, **options)
    with pytest.raises(RuntimeError, match=f"more than one incoming gradient .*{GONE}"):
        torch.autograd.grad(loss, leaf, torch.ones(3), is_grads_batched=True)


@paths
def test_only_the_gradient_of_the_risk(options: dict[str, Any]) -> None:
    leaf, logits, target, risk = _inputs()
    risk.requires_grad_()
    expected = loss_and_gradients(((logits, target, risk), options))[2]
    loss = overwriting_loss(logits, target, risk, **options)
    (found,) = torch.autograd.grad(loss, risk, retain_graph=True)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match=f"second backward pass .*{GONE}"):
        torch.autograd.grad(loss, leaf)


def test_after_an_error_the_logits_are_lost(cpu_kernels: None) -> None:
    """A bad risk is found once the gradient is written."""
    _, logits, target, risk = _inputs()
    risk[0, 0, 0], target[0, 0, 0] = -1.0, 0
    with pytest.raises((ValueError, RuntimeError), match="risk"):
        overwriting_loss(logits, target, risk)
    with pytest.raises(RuntimeError, match=f"used again .*{GONE}"):
        logits.sum().backward()


def test_nothing_keeps_the_logits_alive() -> None:
    _, logits, target, risk = _inputs()
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(logits)
        loss = overwriting_loss(logits, target, risk)
        node = weakref.ref(loss.grad_fn)
        del logits, loss
        assert alive() is None
        assert node() is None
    finally:
        gc.enable()


# ---- torch's other machinery ---------------------------------------------------------------------


def _network(classes: int = BASE.classes) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, classes, 1))


def _gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    (logits, target, risk), _ = BASE.loss_call(CPU)
    image = torch.randn((len(logits), 2, *logits.shape[2:]))
    return image, target, risk.nan_to_num(1.0)


@paths
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("amp", [False, True])
def test_network(options: dict[str, Any], memory: torch.memory_format, amp: bool) -> None:
    network = _network().to(memory_format=memory)  # type: ignore[call-overload]
    image, target, risk = _batch()
    image = image.contiguous(memory_format=memory)

    def gradients(loss: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = network(image)
            value = loss(logits, target, risk, **options)
        return [value, *_gradients(network, value)]

    assert_same_bits(gradients(overwriting_loss), gradients(riskmap_ext.weighted_loss))


@paths
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_network(options: dict[str, Any], reentrant: bool) -> None:
    network, (image, target, risk) = _network(), _batch()
    image.requires_grad_()

    def gradients(loss: Callable[..., Tensor]) -> list[Tensor]:
        logits = checkpoint(network, image, use_reentrant=reentrant)
        network.zero_grad()
        loss(logits, target, risk, **options).backward()
        return [grad_of(p).clone() for p in network.parameters()]

    assert_same_bits(gradients(overwriting_loss), gradients(riskmap_ext.weighted_loss))


@paths
@pytest.mark.parametrize("reentrant", [False, True])
def test_loss_within_a_checkpoint(options: dict[str, Any], reentrant: bool) -> None:
    network, (image, target, risk) = _network(), _batch()
    image.requires_grad_()

    def gradients(loss: Callable[..., Tensor]) -> list[Tensor]:
        def step(image: Tensor) -> Tensor:
            return loss(network(image), target, risk, **options)

        network.zero_grad()
        checkpoint(step, image, use_reentrant=reentrant).backward()
        return [grad_of(p).clone() for p in network.parameters()]

    assert_same_bits(gradients(overwriting_loss), gradients(riskmap_ext.weighted_loss))


@paths
def test_compiled_code_overwrites_nothing(options: dict[str, Any]) -> None:
    (values, target, risk), _ = BASE.loss_call(CPU)
    torch._dynamo.reset()
    compiled = torch.compile(overwriting_loss, fullgraph=True, backend="aot_eager")
    before = values.clone()
    found = loss_and_gradients(((values, target, risk), options), compiled)
    assert torch.equal(values, before)
    for one, other in zip(
        found, loss_and_gradients(((values, target, risk), options)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@paths
@pytest.mark.parametrize("last", [nn.Identity(), nn.Sigmoid()])
def test_compiled_network(options: dict[str, Any], last: nn.Module) -> None:
    """The compiled code saves its output where its last layer needs it."""
    network, (image, target, risk) = nn.Sequential(_network(), last), _batch()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager")
    expected = _gradients(
        network, riskmap_ext.weighted_loss(network(image), target, risk, **options)
    )
    loss = overwriting_loss(compiled(image), target, risk, **options)
    if isinstance(last, nn.Sigmoid):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return
    for one, other in zip(_gradients(network, loss), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_incoming_zero_hides_even_an_infinite_gradient() -> None:
    (values, target, _), _ = BASE.loss_call(CPU)
    values, target = values.clone(), target.clone()
    target[0, 3, 4], values[0, 0, 3, 4] = 1, math.nan
    _, gradient, _ = overwritten(((values, target, None), {}), 0.0)
    assert torch.count_nonzero(gradient) == 0


# ---- modules -------------------------------------------------------------------------------------


def test_deep_supervision() -> None:
    network, (image, target, risk) = _network(), _batch()

    def gradients(**options: Any) -> list[Tensor]:
        scales = [network(image), network(image[:, :, ::2, ::2])]
        return _gradients(network, RiskWeightedLoss(**options)(scales, target, risk))

    assert_same_bits(gradients(overwrite_logits=True), gradients())


def test_monai() -> None:
    monai = pytest.importorskip("monai", reason="needs MONAI")
    from riskmap_ext.integrations.monai import RiskMapDiceCELoss

    network, (image, target, _) = _network(), _batch()
    target = target.clamp(0).unsqueeze(1)
    image = monai.data.MetaTensor(image)

    def gradients(**more: Any) -> list[Tensor]:
        loss = RiskMapDiceCELoss(softmax=True, to_onehot_y=True, **more)(network(image), target)
        return [each.as_subclass(Tensor) for each in _gradients(network, loss)]

    for options in ({}, {"lambda_dice": 0.0}):
        assert_same_bits(gradients(**options, overwrite_logits=True), gradients(**options))


def test_monai_with_many_sigmoids() -> None:
    """More channels than one label can stand for are given to the loss in parts."""
    pytest.importorskip("monai", reason="needs MONAI")
    from riskmap_ext.integrations.monai import RiskMapDiceCELoss

    network, (image, *_) = _network(9), _batch()
    target = torch.rand(len(image), 9, *image.shape[2:]).round()
    loss = RiskMapDiceCELoss(sigmoid=True, overwrite_logits=True)
    with pytest.raises(ValueError, match=f"{GONE}: .*9 channels"):
        loss(network(image), target)
    eight = RiskMapDiceCELoss(sigmoid=True, overwrite_logits=True)
    eight(_network(8)(image), target[:, :8]).backward()


def test_nnunet() -> None:
    pytest.importorskip("nnunetv2", reason="needs nnU-Net")
    from test_nnunet_losses import batch, loss_of, nnUNetTrainerVoxelWeights

    class Overwriting(nnUNetTrainerVoxelWeights):
        loss_options: ClassVar[dict[str, Any]] = {
            **nnUNetTrainerVoxelWeights.loss_options,
            "overwrite_logits": True,
        }

    found = []
    for trainer in (Overwriting, nnUNetTrainerVoxelWeights):
        leaves, targets = batch("classes")
        loss = loss_of("classes", True, trainer)
        got: list[Tensor] = []
        with loss.weighted_by(torch.ones_like(targets[0], dtype=torch.float32)):
            loss(
                [network_output(each.detach().clone(), got) for each in leaves], targets
            ).backward()
        found.append(sorted(got, key=Tensor.numel))
    assert len(found[0]) == 2  # the coarsest scale has no weight
    assert_same_bits(tuple(found[0]), tuple(found[1]))


def test_driver(root: Any, tmp_path: Any, one_thread: None) -> None:
    pytest.importorskip("monai", reason="needs the extra 'finetune'")
    from finetune_data import configuration

    from riskmap_ext.finetune import finetune

    losses = []
    for overwrites in (False, True):
        options = {"overwrite_logits": overwrites}
        output_folder = tmp_path / str(overwrites)
        result = finetune(configuration(root, output_folder, loss=options), progress=False)
        losses.append([row["train_loss"] for row in result.history])
    assert losses[0] == losses[1]
