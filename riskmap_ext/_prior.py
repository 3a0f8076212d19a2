"""Where a fresh output layer starts: at the class prior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from riskmap_ext._arguments import number_sequence, plain_tensor, validate_flag
from riskmap_ext._deferred import DeferredLogits
from riskmap_ext._head import one_line, require_unwrapped

FLOOR = 1e-4  # of a frequency: a class without voxels starts at log 1e-4 = -9.2

# The trial moves a bias down, as the prior does, so it detects layers that clip logits. Different
# steps distinguish the channels; all are far above the rounding of half precision.
_STEPS = (-4.0, -5.0, -6.0, -7.0, -8.0)
_ROOM = 0.01  # for convolutions whose sums are not exactly reproducible
_STILL, _MOVED, _OTHERWISE = "still", "moved", "otherwise"


def set_head_prior(
    network: nn.Module,
    frequencies: Tensor | Sequence[float],
    example_input: Tensor,
    *,
    sigmoid: bool = False,
) -> list[str]:
    r"""Starts the output layer at the class prior, in place.

    .. math::
        b_c \mathrel{+}= \log(f_c + 10^{-4}), \qquad
        \text{sigmoid: } b_c \mathrel{+}= \log\frac{f_c + 10^{-4}}{1 - f_c + 10^{-4}}

    A fresh output layer treats all classes as equally likely. With rare classes a short training
    spends its steps on moving the bias; from the prior it can start with the network's features
    (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017). Call it once, after loading
    pretrained weights and before the first step, and only for a fresh output layer: it adds to the
    existing bias. Call it before torch.compile and DistributedDataParallel, before or after
    :func:`fuse_head` and the optimizer.

    A bias belongs to the output layer if each logit moves one to one with it; a trial run with
    ``example_input`` checks this. All outputs [B, C, \*S] that the network returns in training are
    set (deep supervision, in a list, a dict or a stack [B, scales, C, \*S]). Layers are in eval
    mode for the trial; modes, buffers and random states are restored afterwards.

    Args:
        frequencies: f, share of each class [C], or with ``sigmoid`` of each region [R], among the
            valid voxels of the training labels, 0 to 1. Without ``sigmoid``, voxel counts also
            work, since they are divided by their sum. See ``TransferStatistics.class_frequencies``,
            or ``torch.bincount`` of the labels.
        example_input: an image [B, channels, \*S] that the network's forward() takes, on its
            device; a small one will do.
        sigmoid: whether each output is a region with a sigmoid, instead of a softmax over classes.

    Returns: the names of the parameters that were changed, in the network's order.

    Raises:
        TypeError: not a network, a tensor or numbers.
        ValueError: frequencies out of range, or a number of them that is no output's number of
            channels; an image that does not go through the network; an output without such a bias,
            or with a frozen one. The network is then unchanged.
    """
    require_unwrapped(network)
    prior = prior_logits(frequencies, sigmoid=validate_flag("sigmoid", sigmoid))
    biases = head_biases(network, len(prior), plain_tensor("example_input", example_input))
    add_prior(biases, prior)
    return list(biases)


def prior_logits(frequencies: Tensor | Sequence[float], *, sigmoid: bool = False) -> Tensor:
    """What :func:`set_head_prior` adds; [C] float64."""
    given = frequencies.tolist() if isinstance(frequencies, Tensor) else frequencies
    values = torch.tensor(number_sequence("frequencies", given, 0.0), dtype=torch.float64)
    if sigmoid:
        if not len(values) or values.max() > 1:
            raise ValueError(
                "frequencies: expected the share of each region, 0 to 1, with sigmoid=True, got "
                f"{values.tolist()}"
            )
        return ((values + FLOOR) / (1 - values + FLOOR)).log()
    if len(values) < 2 or not values.sum() > 0:
        raise ValueError(
            "frequencies: expected at least two classes and one of them above 0, got "
            f"{values.tolist()}"
        )
    return (values / values.sum() + FLOOR).log()


def head_biases(
    network: nn.Module, num_outputs: int, example_input: Tensor
) -> dict[str, nn.Parameter]:
    """By name; together they move each output once. Raises: ValueError if an output has none."""
    kind = type(network).__name__
    if any(nn.parameter.is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError(f"network: expected {kind} with its lazy layers made: run an image first")
    candidates = {
        name: parameter
        for name, parameter in network.named_parameters()
        if list(parameter.shape) == [num_outputs] and parameter.is_floating_point()
    }
    found: set[str] = set()
    with _trial(network):
        before = _outputs(network, num_outputs, example_input)
        if not all(each.numel() and each.isfinite().all() for each in before):
            raise ValueError(f"example_input: {kind} gives nothing, NaN or infinity for this image")
        without = set(range(len(before)))
        for name, bias in reversed(candidates.items()):
            if not without:
                break
            effects = _effects(network, bias, before, example_input)
            moved = {index for index, effect in enumerate(effects) if effect == _MOVED}
            if moved and moved <= without and _OTHERWISE not in effects:
                found.add(name)
                without -= moved
    if without:
        raise ValueError(
            f"network: nothing in {kind} is a bias of its output of shape "
            f"{list(before[min(without)].shape)}: its last layer has none, something follows that "
            "layer, or another output depends on it"
        )
    biases = {name: bias for name, bias in candidates.items() if name in found}
    frozen = [name for name, bias in biases.items() if not bias.requires_grad]
    if frozen:
        raise ValueError(
            f"network: expected an output layer that is trained, got {', '.join(frozen)} with "
            "requires_grad=False"
        )
    return biases


def add_prior(biases: Mapping[str, nn.Parameter], prior: Tensor) -> None:
    with torch.no_grad():
        for bias in biases.values():
            bias.add_(prior.to(bias))


@contextmanager
def _trial(network: nn.Module) -> Iterator[None]:
    """Containers are in training mode, to get all outputs; the layers themselves are in eval mode,
    for statistics and dropout. Modes and buffers are restored afterwards."""
    modes = {module: module.training for module in network.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        for module in modes:
            module.training = any(True for _ in module.children())
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, name, buffer, kept in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, kept):
                with torch.no_grad():
                    buffer.copy_(kept)


def _outputs(network: nn.Module, num_outputs: int, example_input: Tensor) -> list[Tensor]:
    """[B, C, *S] each. Raises: ValueError if there is none."""
    kind, shape = type(network).__name__, list(example_input.shape)
    device = example_input.device
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
        ):
            given: Any = network(example_input)
    except Exception as error:  # whatever the network's layers raise
        raise ValueError(
            f"example_input: {shape} does not go through {kind}: {one_line(error)}"
        ) from error
    nodes = pytree.tree_leaves(given, is_leaf=lambda each: isinstance(each, DeferredLogits))
    leaves = [each.logits() if isinstance(each, DeferredLogits) else each for each in nodes]
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    outputs: list[Tensor] = []
    for each in tensors:
        stack = each.dim() == example_input.dim() + 1 and each.shape[2] == num_outputs
        outputs += each.unbind(1) if stack else [each]
    fitting = [each for each in outputs if each.dim() > 2 and each.shape[1] == num_outputs]
    if not fitting:
        got = ", ".join(str(list(each.shape)) for each in tensors) or "no tensor"
        raise ValueError(
            f"frequencies: expected as many as the network has output channels, got {num_outputs}; "
            f"its output has the shape {got}"
        )
    return fitting


def _effects(
    network: nn.Module, bias: nn.Parameter, before: list[Tensor], example_input: Tensor
) -> list[str]:
    """What a change of the bias does to each output."""
    kept = bias.detach().clone()
    steps = torch.tensor([_STEPS[i % len(_STEPS)] for i in range(len(kept))])
    try:
        bias.add_(steps.to(bias))
        change = (bias.double() - kept.double()).tolist()  # after rounding
        after = _outputs(network, len(kept), example_input)
    finally:
        bias.copy_(kept)
    if [each.shape for each in after] != [each.shape for each in before]:
        return [_OTHERWISE]
    return [_effect(*pair, change, bias.dtype) for pair in zip(before, after, strict=True)]


def _effect(before: Tensor, after: Tensor, steps: list[float], dtype: torch.dtype) -> str:
    """Channel by channel, as there may be a hundred of them."""
    precision = max(torch.finfo(each).eps for each in (before.dtype, dtype))
    effects = set()
    for one, other, step in zip(before.unbind(1), after.unbind(1), steps, strict=True):
        low, high = (float(each) for each in (other.double() - one.double()).aminmax())
        room = _ROOM + 2 * precision * float(torch.maximum(one.abs().max(), other.abs().max()))
        moved, still = (by - room <= low and high <= by + room for by in (step, 0.0))
        effects.add(_MOVED if moved else _STILL if still else _OTHERWISE)
    return effects.pop() if len(effects) == 1 else _OTHERWISE
