"""Where a fresh output layer starts: at the class prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from riskmap_ext._arguments import number_sequence, plain_tensor
from riskmap_ext._deferred import DeferredLogits
from riskmap_ext._head import require_bare

FLOOR = 1e-4  # of a frequency: a class without voxels starts at log 1e-4 = -9.2


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

    A fresh output layer takes all classes for equally likely. With rare classes a short training
    spends its steps on moving the bias; from the prior it starts with the network's features. Call
    it once, after loading pretrained weights and before the first step, where the output layer is
    fresh: it adds to the bias that is there.

    A bias belongs to the output layer where each logit moves one to one with it, which a trial with
    ``example_input`` tells. All outputs that the network gives in eval mode are set (nnU-Net's
    scales of deep supervision).

    Args:
        frequencies: f, share of each class [C], or with ``sigmoid`` of each region [R], among the
            valid voxels of the training labels, 0 to 1; without ``sigmoid`` counts of voxels do as
            well, as they are divided by their sum. See ``TransferStatistics.class_frequencies``,
            or ``torch.bincount`` of the labels.
        example_input: an image [B, channels, \*S] that the network's forward() takes.
        sigmoid: whether the outputs are regions of their own, not a softmax.

    Returns: the names of the parameters that were changed.

    Raises:
        TypeError: not a network, a tensor or numbers.
        ValueError: frequencies out of range or as many as no output has channels; an output without
            such a bias. The network is then as it was before.
    """
    require_bare(network)
    prior = prior_logits(frequencies, sigmoid=sigmoid)
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
    """One bias for each output of the network, by name. Raises: ValueError where one has none."""
    candidates = {
        name: parameter
        for name, parameter in network.named_parameters()
        if name.rpartition(".")[2] == "bias"
        and list(parameter.shape) == [num_outputs]
        and parameter.requires_grad
    }
    outputs = _outputs(network, example_input)
    fitting = [each for each in outputs if each.dim() > 1 and each.shape[1] == num_outputs]
    if not fitting:
        got = ", ".join(str(list(each.shape)) for each in outputs) or "no tensor"
        raise ValueError(
            f"frequencies: expected as many as the network has output channels, got {num_outputs}; "
            f"its output has the shape {got}"
        )
    found: dict[str, nn.Parameter] = {}
    for output in fitting:
        name = _bias_of(output, candidates)
        if name is None:
            raise ValueError(
                f"network: nothing in {type(network).__name__} is a bias of its output of shape "
                f"{list(output.shape)}: its last layer has none, or something follows that layer"
            )
        found[name] = candidates[name]
    return found


def add_prior(biases: Mapping[str, nn.Parameter], prior: Tensor) -> None:
    with torch.no_grad():
        for bias in biases.values():
            bias.add_(prior.to(bias))


def _outputs(network: nn.Module, example_input: Tensor) -> list[Tensor]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.enable_grad():
            output: Any = network(example_input)
    finally:
        for module, training in modes.items():
            module.training = training
    return [
        leaf.logits() if isinstance(leaf, DeferredLogits) else leaf
        for leaf in pytree.tree_leaves(output)
        if isinstance(leaf, (Tensor, DeferredLogits))
    ]


def _bias_of(output: Tensor, candidates: Mapping[str, nn.Parameter]) -> str | None:
    """The last of the candidates whose change by d changes each voxel's logit by d."""
    if not candidates or not output.requires_grad:
        return None
    # Sums of zeros and ones are exact.
    chance = torch.Generator().manual_seed(0)
    factor = torch.randint(2, output.shape, generator=chance).to(output)
    gradients = torch.autograd.grad(
        output, list(candidates.values()), factor, retain_graph=True, allow_unused=True
    )
    wanted = factor.double().transpose(0, 1).flatten(1).sum(dim=1)
    rtol = 1e-5 if output.dtype in (torch.float32, torch.float64) else 1e-2
    for name, gradient in reversed(list(zip(candidates, gradients, strict=True))):
        if gradient is not None and torch.allclose(gradient.double(), wanted, rtol=rtol):
            return name
    return None
