"""The last 1x1 convolution of a network, computed by the loss instead of the network."""

from __future__ import annotations

import copy
import fnmatch
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from riskmap_ext._arguments import validate_choice
from riskmap_ext._deferred import DeferredLogits, cast_by_autocast, convolved

WHEN = ("training", "always")
WORTH_FUSING = 16  # from this many output channels on, heads are fused by default

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)  # layers that messages may name as the last one
_SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "padding_mode",
)


class _Known(NamedTuple):
    """heads: names of the 1x1 convolutions. unless: (attribute, value, why) that excludes them."""

    heads: str
    unless: tuple[str, bool, str] | None = None


# By package and class that define the network's forward(): its outputs are those of its heads.
_STACKS = ("deep_supervision", True, "in training it resizes and stacks what its heads give")
_KNOWN = {
    ("monai", "AttentionUnet"): _Known("model.2.conv"),
    ("monai", "BasicUNet"): _Known("final_conv"),
    ("monai", "DynUNet"): _Known("output_block.conv.conv", _STACKS),
    ("monai", "SegResNet"): _Known(
        "conv_final.2.conv", ("use_conv_final", False, "it was built with use_conv_final=False")
    ),
    ("monai", "SegResNetDS"): _Known("up_layers.*.head"),
    ("monai", "SwinUNETR"): _Known("out.conv.conv"),
    ("monai", "UNETR"): _Known("out.conv.conv"),
    ("dynamic_network_architectures", "PlainConvUNet"): _Known("decoder.seg_layers.*"),
    ("dynamic_network_architectures", "ResidualEncoderUNet"): _Known("decoder.seg_layers.*"),
    ("dynamic_network_architectures", "ResidualUNet"): _Known("decoder.seg_layers.*"),
}


class FusedHead(nn.Module):
    r"""A 1x1 convolution whose logits the loss computes, voxel by voxel, and never keeps.

    In training mode it returns :class:`DeferredLogits`, in eval mode real logits, bitwise equal to
    the convolution's. :func:`fuse_head` puts it into a network.

    Parameters, their names, and the attributes (``in_channels``, ``kernel_size``, ...) are the
    convolution's own: state_dicts and optimizers do not change. Under autocast features and
    parameters are cast as the convolution would cast them. Replicas of ``torch.nn.DataParallel``
    return logits, since it would concatenate the parameters of several; FSDP is not tested.

    Args:
        convolution: Conv1d, Conv2d or Conv3d with kernel 1, stride 1, padding 0 and groups 1.
        when: "training", or "always": also in eval mode, for a frozen source model.

    Raises:
        TypeError, ValueError: another module; hooks or a parametrization on it, which would not
            run.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]

    def __init__(self, convolution: nn.Module, *, when: str = "training") -> None:
        super().__init__()
        if not isinstance(convolution, nn.Module):
            raise TypeError(
                f"convolution: expected a torch.nn.Module, got {type(convolution).__name__}"
            )
        found = _hindrance(convolution)
        if found is not None:
            raise ValueError(
                "convolution: expected torch.nn.Conv1d, Conv2d or Conv3d with kernel 1, stride 1, "
                f"padding 0 and groups 1, got {found}"
            )
        self.when = validate_choice("when", when, WHEN)
        for name in _SETTINGS:
            setattr(self, name, getattr(convolution, name))
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(convolution, name))
        self.train(convolution.training)

    def forward(self, features: Tensor) -> Tensor | DeferredLogits:
        replica = getattr(self, "_is_replica", False)  # of DataParallel
        if replica or not (self.training or self.when == "always"):
            return convolved(features, self.weight, self.bias)
        if features.dim() != self.weight.dim():
            expected = ", ".join(("B", str(self.in_channels), *"DHW"[5 - self.weight.dim() :]))
            raise ValueError(
                f"FusedHead: expected features [{expected}], with a batch, for a loss to take; "
                f"got shape {list(features.shape)}"
            )
        # Views: DistributedDataParallel finds the parameters behind a network's outputs through
        # their autograd graph, which a parameter itself does not have.
        weight = self.weight.flatten(1)
        bias = None if self.bias is None else self.bias.view(-1)
        if not torch.is_grad_enabled():
            # Without a graph they would be leaves, and a loss of them would seem to train them: a
            # reentrant checkpoint runs the network this way.
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return DeferredLogits(*cast_by_autocast(features, weight, bias))

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{bias}, "
            f"when={self.when!r}"
        )


def fuse_head(
    network: nn.Module, when: str = "training", *, example_input: Tensor | None = None
) -> list[str]:
    """Replaces the last 1x1 convolutions of a network by :class:`FusedHead`, in place.

    In training mode the network then returns :class:`DeferredLogits` (deep supervision: a list of
    them) for :class:`RiskWeightedLoss` and the losses of ``riskmap_ext.integrations``; in eval mode
    it returns real logits as before. Call it before torch.compile and DistributedDataParallel; it
    is independent of optimizers, state dicts and the network's mode.

    Known by name are AttentionUnet, BasicUNet, DynUNet, SegResNet, SegResNetDS, SwinUNETR and UNETR
    of MONAI, and PlainConvUNet, ResidualEncoderUNet and ResidualUNet of nnU-Net, with all heads of
    their deep supervision. For any other network, a trial run with ``example_input`` checks whether
    its outputs are those of 1x1 convolutions. Networks without such a head: MONAI's UNet (its last
    layer is a residual unit or a transposed convolution), FlexibleUNet (kernel 3), and DynUNet with
    deep_supervision=True, which resizes and stacks its heads in training.

    Args:
        network: changed in place; it may be in training or eval mode.
        when: "training", or "always" for a frozen source model, see :class:`FusedHead`.
        example_input: an image [B, channels, *S] that the network's forward() takes, for the trial:
            a copy of the network runs on the meta device, where nothing is computed. Only its shape
            and dtype matter; batch normalization needs B >= 2.

    Returns:
        The names of the replaced modules, including those of an earlier call.

    Raises:
        TypeError: not a network.
        ValueError: no such head; the message names what was found instead. The network is then
            unchanged.
    """
    _require_bare(network)
    when = validate_choice("when", when, WHEN)
    if example_input is None:
        names = _known_heads(network, when)
    else:
        names = _tried_heads(network, when, example_input)
    _put(network, names, when)
    return names


def unfuse_head(network: nn.Module) -> list[str]:
    """Restores the convolutions that :func:`fuse_head` has replaced, with their parameters.

    Returns: the names of the modules; an empty list if there is no fused head.

    Raises:
        ValueError: a head with hooks or a parametrization, which would be lost; the message names
            the head. The network is then unchanged.
    """
    _require_bare(network)
    heads = {name: m for name, m in network.named_modules() if isinstance(m, FusedHead)}
    for name, head in heads.items():
        _check_unchanged(name, head)
    for head in heads.values():
        _replace(network, head, _as_convolution(head))
    return list(heads)


def require_unwrapped(network: Any) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: expected a torch.nn.Module, got {type(network).__name__}")
    wrapped = isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    if wrapped or hasattr(network, "_orig_mod"):
        raise ValueError(
            "network: expected the network itself, before torch.compile and "
            f"DistributedDataParallel, got {type(network).__name__}"
        )


def _require_bare(network: Any) -> None:
    require_unwrapped(network)
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(
            "network: expected one that is not scripted or traced, so that its layers can be "
            f"replaced, got {type(network).__name__}; fuse the original network instead"
        )
    if isinstance(network, (*_KINDS, FusedHead)):
        raise ValueError(
            f"network: expected a network with a head in it, got {type(network).__name__} itself; "
            "FusedHead(convolution) converts it"
        )


def known_network(network: nn.Module) -> _Known | None:
    """Its heads, if fuse_head knows the network by name."""
    forward = type(network).forward
    package, owner = forward.__module__.partition(".")[0], forward.__qualname__.partition(".")[0]
    return _KNOWN.get((package, owner))


def _known_heads(network: nn.Module, when: str) -> list[str]:
    known = known_network(network)
    kind = type(network).__name__
    if known is None:
        raise ValueError(
            f"network: the head of {kind} is not known ({_last_layer(network)}); "
            "example_input=torch.zeros(2, channels, *patch) finds it by a trial run"
        )
    if known.unless is not None:
        name, value, why = known.unless
        # A frozen source model runs in eval mode, where what matters in training does not apply.
        matters = known.unless is not _STACKS or when == "training"
        if matters and getattr(network, name, None) == value:
            raise ValueError(f"network: {kind} gives no output of a 1x1 convolution: {why}")
    modules = {n: m for n, m in network.named_modules() if isinstance(m, (*_KINDS, FusedHead))}
    names = fnmatch.filter(modules, known.heads)
    if not names:
        raise ValueError(
            f"network: expected the head of {kind} as {known.heads}, found none; "
            f"{_last_layer(network)}"
        )
    return names


class _Ran(NamedTuple):
    name: str
    features: Tensor
    version: int
    output: Any


def _tried_heads(network: nn.Module, when: str, example_input: Tensor) -> list[str]:
    """The modules whose outputs the network returns, found by a run on the meta device."""
    if not isinstance(example_input, Tensor):
        raise TypeError(
            f"example_input: expected a torch.Tensor, got {type(example_input).__name__}"
        )
    kind, shape = type(network).__name__, list(example_input.shape)
    try:
        tried = _on_meta(network).train(when == "training")
    except Exception as error:  # a tensor of a graph that a module keeps, for one
        raise ValueError(f"network: {kind} cannot be copied: {one_line(error)}") from None
    unfuse_head(tried)
    # The network's own hooks on image and output are not part of it.
    tried._forward_pre_hooks.clear()
    tried._forward_hooks.clear()
    ran: list[_Ran] = []
    modules = dict(tried.named_modules())

    def note(name: str) -> Any:
        return lambda _, inputs, output: ran.append(
            _Ran(name, inputs[0], inputs[0]._version, output)
        )

    layers = {name: module for name, module in modules.items() if isinstance(module, _LAYERS)}
    hooks = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    blank = example_input.detach().to("meta")
    try:
        with torch.no_grad():
            given = tried(blank)
    except Exception as error:  # whatever the network's layers raise
        raise ValueError(
            f"example_input: {shape} does not go through {kind} on the meta device: "
            f"{one_line(error)}"
        ) from None
    for hook in hooks:
        hook.remove()
    outputs = {id(leaf) for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)}
    heads = [each for each in ran if id(each.output) in outputs]
    if not heads:
        last = f"{ran[-1].name}, {_described(modules[ran[-1].name])}" if ran else "none"
        raise ValueError(
            f"network: what {kind} gives is not the untouched output of a 1x1 convolution; the "
            f"last layer that ran is {last}"
        )
    for each in heads:
        if each.features._version != each.version:
            raise ValueError(
                f"network: {kind} changes the input of {each.name} in place after it ran, before "
                "the loss would see it"
            )
    names = list(dict.fromkeys(each.name for each in heads))
    _put(tried, names, when)
    try:
        with torch.no_grad():
            given = tried(blank)
    except Exception as error:  # DeferredLogits raise several types
        raise ValueError(
            f"network: {kind} returns the output of {', '.join(names)}, but also uses it "
            f"elsewhere: {one_line(error)}"
        ) from None
    nodes = pytree.tree_leaves(given, is_leaf=lambda each: isinstance(each, DeferredLogits))
    if sum(isinstance(each, DeferredLogits) for each in nodes) < len(names):
        raise ValueError(
            f"network: {kind} does not run {', '.join(names)} by that name: it also keeps the "
            "convolution elsewhere (a plain list, a function), where it cannot be replaced"
        )
    return names


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers take no memory, not even while copying."""
    memo: dict[int, Any] = {}
    for each in network.parameters():
        empty = torch.empty_like(each, device="meta")
        memo[id(each)] = nn.Parameter(empty, requires_grad=each.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, memo)


def _put(network: nn.Module, names: list[str], when: str) -> None:
    modules = dict(network.named_modules())
    _check(names, modules)
    for name in names:
        head = modules[name]
        if isinstance(head, FusedHead):
            head.when = when
        else:
            _replace(network, head, FusedHead(head, when=when))


def _check(names: list[str], modules: dict[str, nn.Module]) -> None:
    for name in names:
        module, parent = modules[name], modules[name.rpartition(".")[0]]
        found = None if isinstance(module, FusedHead) else _hindrance(module)
        if found is None and isinstance(parent, nn.Sequential):
            last = list(parent)[-1]
            if last is not module:
                found = f"a convolution that {type(last).__name__} comes after"
        if found is not None:
            raise ValueError(
                "network: expected a head with kernel 1, stride 1, padding 0 and groups 1 as its "
                f"last layer, got {name}: {found}"
            )


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Everywhere: a module may have several names."""
    for module in list(network.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _hindrance(module: nn.Module) -> str | None:
    """Describes why a module cannot be a head; None if it can."""
    if type(module) not in _KINDS:  # a subclass may do something else: LoRA, quantization
        parametrized = nn.utils.parametrize.is_parametrized(module)
        return "a parametrization of its weights" if parametrized else _described(module)
    plain: dict[str, set[Any]] = {
        "kernel_size": {1},
        "stride": {1},
        "groups": {1},
        "padding": {0, "valid", "same"},
    }
    for name, allowed in plain.items():
        value = getattr(module, name)
        if not set(value if isinstance(value, tuple) else (value,)) <= allowed:
            return _described(module)
    if _has_hooks(module):
        return f"{type(module).__name__} with hooks (weight normalization and pruning have them)"
    return None


def _check_unchanged(name: str, head: FusedHead) -> None:
    parametrized = nn.utils.parametrize.is_parametrized(head)
    if parametrized or _has_hooks(head) or "weight" not in head._parameters:
        found = "a parametrization of its weights" if parametrized else "hooks (pruning has them)"
        raise ValueError(
            f"network: expected a fused head as fuse_head made it, got {name} with {found}, which "
            "the convolution would lose; remove it first"
        )


def _has_hooks(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _described(module: nn.Module) -> str:
    """Such as `Conv3d(32, 3, kernel_size=(3, 3, 3), stride=(1, 1, 1))`."""
    return f"{type(module).__name__}({module.extra_repr()})"


def _last_layer(network: nn.Module) -> str:
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, _LAYERS)]
    if not layers:
        return "it has no convolution"
    name, module = layers[-1]
    return f"the last layer it lists is {name}, {_described(module)}"


def _as_convolution(head: FusedHead) -> nn.Module:
    kind = _KINDS[head.weight.dim() - 3]
    settings: dict[str, Any] = {name: getattr(head, name) for name in _SETTINGS}
    made = kind(**settings, bias=head.bias is not None, device="meta")
    made.weight, made.bias = head.weight, head.bias
    return made.train(head.training)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
