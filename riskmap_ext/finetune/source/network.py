"""Networks of MONAI and nnU-Net by name, their output layer, and a trial on a blank patch."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from monai.networks import nets
from monai.networks.utils import eval_mode
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_module_registration_hook

from riskmap_ext._arguments import near_names
from riskmap_ext._head import WORTH_FUSING, known_network
from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.errors import ConfigError, one_line, shortened
from riskmap_ext.finetune.config.schema import Config, NetworkConfig
from riskmap_ext.nn import DeferredLogits, fuse_head

_MOST_LAYERS = 20_000
# Classifiers whose arguments name what they load, or that load it by default.
_DOWNLOADS = ("MILModel", "TorchVisionFCModel", "Transchex")
IN_ARGUMENTS = ("in_channels", "input_channels")
OUT_ARGUMENTS = ("out_channels", "num_classes", "n_classes")
_DEFAULT_PATCH = {2: [128, 128], 3: [64, 64, 64]}
# From nnU-Net's package dynamic_network_architectures; their layers are named by strings.
NNUNET_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
_LAYERS = {
    "conv_op": ("Conv2d", "Conv3d"),
    "norm_op": ("InstanceNorm2d", "InstanceNorm3d", "BatchNorm2d", "BatchNorm3d"),
    "dropout_op": ("Dropout2d", "Dropout3d"),
    "nonlin": ("LeakyReLU", "ReLU", "PReLU", "ELU", "GELU", "SiLU", "Mish"),
    "block": ("BasicBlockD", "BottleneckD"),
}
_BLOCKS = "dynamic_network_architectures.building_blocks.residual."


def monai_class(name: str) -> type[nn.Module] | None:
    found = getattr(nets, name, None)
    return found if inspect.isclass(found) and issubclass(found, nn.Module) else None


def network_class(name: str) -> type[nn.Module]:
    """Raises: ConfigError with near names, or naming the package that is missing."""
    if name in NNUNET_NETWORKS:
        try:
            from dynamic_network_architectures.architectures import unet
        except ImportError as error:
            raise ConfigError(
                f"network.name: {name} needs the package dynamic_network_architectures ({error}); "
                "install it with: pip install dynamic-network-architectures"
            ) from None
        return getattr(unet, name)
    found = monai_class(name)
    if found is None:
        hint = near_names(name, [*NNUNET_NETWORKS, *filter(monai_class, dir(nets))], 3)
        raise ConfigError(f"network.name: {name!r} is no class of monai.networks.nets{hint}")
    return found


def _nnunet_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with classes instead of their names.

    Raises: ConfigError for a name that is not in the list: nothing else is imported.
    """
    from dynamic_network_architectures.building_blocks import residual

    made = dict(args)
    for argument, known in _LAYERS.items():
        value = made.get(argument)
        if value is None and argument != "conv_op":
            continue
        # torch.nn.modules.conv.Conv3d, torch.nn.Conv3d or Conv3d.
        package, _, name = str(value).rpartition(".")
        if name not in known or not f"{package}.".startswith(("torch.nn.", _BLOCKS, ".")):
            got = "nothing" if value is None else repr(value)
            raise ConfigError(
                f"network.args.{argument}: expected one of {', '.join(known)}, got {got}"
            )
        made[argument] = getattr(residual if argument == "block" else nn, name)
    return made


def _parameters(network: NetworkConfig) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(network_class(network.name)).parameters


def spatial_dims(network: NetworkConfig) -> int:
    """2 or 3: whether the network sees slices or volumes. Raises: ConfigError."""
    parameter = _parameters(network).get("spatial_dims")
    if network.name in NNUNET_NETWORKS:
        return 2 if _nnunet_args(network.args)["conv_op"] is nn.Conv2d else 3
    dims = network.args.get("spatial_dims", parameter.default if parameter else 3)
    if type(dims) is not int or dims not in (2, 3):
        got = "nothing" if dims is inspect.Parameter.empty else repr(dims)
        raise ConfigError(
            f"network.args.spatial_dims: expected 2 (slices) or 3 (volumes), got {got}"
        )
    return dims


def channel_parameter(network: NetworkConfig, names: Sequence[str]) -> inspect.Parameter:
    """The one of `names` that the network takes. Raises: ConfigError."""
    parameters = _parameters(network)
    for name in names:
        if name in parameters:
            return parameters[name]
    raise ConfigError(
        f"network.name: {network.name} takes no {' or '.join(names)}; expected a segmentation "
        "network such as UNet, DynUNet, SegResNet or SwinUNETR"
    )


def without_channels(network: NetworkConfig, num_outputs: int, channels: int) -> NetworkConfig:
    """`network` without the arguments that follow from the data and the classes.

    Raises: ConfigError if they are given with other values.
    """
    fixed = dict.fromkeys(IN_ARGUMENTS, (channels, "the number of image channels"))
    fixed |= dict.fromkeys(OUT_ARGUMENTS, (num_outputs, "the number of classes or regions"))
    args = dict(network.args)
    for name, (expected, why) in fixed.items():
        if (given := args.pop(name, expected)) != expected:
            raise ConfigError(
                f"network.args.{name}: expected {expected} ({why}), got {given!r}; it can be "
                "omitted"
            )
    return network.model_copy(update={"args": args})


def without_downloads(network: NetworkConfig) -> NetworkConfig:
    """A network that a file describes: its weights are in the file, and not from the internet.

    Raises: ConfigError for a class that downloads in any case.
    """
    if network.name in _DOWNLOADS:
        raise ConfigError(
            f"network.name: {network.name} downloads weights, which a file may not ask for; set "
            "source.network"
        )
    if "pretrained" not in {*network.args, *_parameters(network)}:
        return network
    return network.model_copy(update={"args": {**network.args, "pretrained": False}})


def build_network(network: NetworkConfig, num_outputs: int, channels: int = 1) -> nn.Module:
    """The network for images of `channels` channels and `num_outputs` output channels.

    Raises: ConfigError naming the argument that the class does not take or rejects.
    """
    cls, parameters = network_class(network.name), _parameters(network)
    # The channels follow from the data and the classes, whatever the arguments say.
    args = {**network.args, channel_parameter(network, OUT_ARGUMENTS).name: num_outputs}
    args |= {name: channels for name in IN_ARGUMENTS if name in parameters}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [] if open_ended else sorted(set(args) - set(parameters))
    if unknown:
        hint = near_names(unknown[0], parameters)
        raise ConfigError(f"network.args: {network.name} takes no {', '.join(unknown)}{hint}")
    of_nnunet = network.name in NNUNET_NETWORKS
    made = _nnunet_args(args) if of_nnunet else args
    try:
        with _bounded(cls, made):
            built = cls(**made)
        if of_nnunet:
            built.apply(getattr(cls, "initialize"))  # noqa: B009  (a static method there)
    except Exception as error:  # each network checks its own arguments in its own way
        why = shortened(one_line(error))[1:-1]
        told = f"network.args: {network.name} refuses {shortened(args)}: {why}"
        raise ConfigError(told) from None
    return built


@contextmanager
def _bounded(cls: type[nn.Module], args: Mapping[str, Any]) -> Iterator[None]:
    """Arguments can ask for any number of layers and weights: these raise before they fill memory.

    Raises: ValueError.
    """
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > _MOST_LAYERS:
            raise ValueError(f"it has more than {_MOST_LAYERS:,} layers")

    with register_module_module_registration_hook(counted):
        shape = None
        # Not every class can be built without memory.
        with suppress(Exception), torch.device("meta"):
            shape = cls(**args)
        counted()
        weights = 0 if shape is None else sum(each.numel() for each in shape.parameters())
        if 4 * weights > available_memory():
            raise ValueError(f"its {weights:,} weights do not fit into memory")
        count = 0
        yield


def head_keys(network: NetworkConfig, num_outputs: int) -> set[str]:
    """State-dict keys whose shape depends on the number of outputs: the output layer."""
    with torch.random.fork_rng(devices=[]):
        shapes = [
            {key: value.shape for key, value in build_network(network, count).state_dict().items()}
            for count in (num_outputs, num_outputs + 1)
        ]
    return {key for key, shape in shapes[0].items() if shapes[1].get(key) != shape}


def patch_size(config: Config, dims: int) -> list[int]:
    """The training crop, one size per spatial dimension of the network."""
    return sizes_of("train.patch_size", config.train.patch_size or _DEFAULT_PATCH[dims], dims)


def sizes_of(key: str, sizes: Sequence[int], dims: int) -> list[int]:
    if len(sizes) not in (1, dims):
        raise ConfigError(f"{key}: expected 1 or {dims} sizes for this network, got {list(sizes)}")
    return list(sizes) * (dims // len(sizes))


def check_forward(
    network: nn.Module,
    size: Sequence[int],
    num_outputs: int,
    channels: int,
    key: str,
    told: str = "",
) -> None:
    """Runs one blank patch through the network, to report a misfit before any work.

    told: about the network, for the message.
    """
    takes = "sizes divisible by the product of the network's strides usually fit"
    check_fits(key, size, 4 * math.prod(size) * (channels + num_outputs))
    if next(network.parameters()).device.type == "cpu":
        check_fits(key, size, _largest_convolution(network, size, channels))
    try:
        with eval_mode(network):
            blank = blank_image(network, size, channels)
            shape = list(first_output(network(blank), blank).shape)
    except Exception as error:  # whatever the network's layers raise
        if "alloc" in str(error) or "out of memory" in str(error):
            takes = "it needs more memory than is available"
        raise ConfigError(
            f"{key}: a patch of {list(size)} does not go through {type(network).__name__}{told} "
            f"({one_line(error)[:300]}); {takes}"
        ) from None
    if shape != [1, num_outputs, *size]:
        raise ConfigError(
            f"{key}: {type(network).__name__}{told} turns a patch of {list(size)} into logits of "
            f"shape {shape}, expected {[1, num_outputs, *size]}; {takes}"
        )


def check_fits(key: str, size: Sequence[int], needed: int) -> None:
    """needed: bytes that a patch takes at least. Raises: ConfigError if there are fewer."""
    if needed > available_memory():
        raise ConfigError(
            f"{key}: a patch of {shortened(list(size))} takes {needed / 2**30:.3g} GiB or more; it "
            "needs more memory than is available"
        )


def _largest_convolution(network: nn.Module, size: Sequence[int], channels: int) -> int:
    """Bytes of the largest input and output of a convolution; on meta tensors, without memory."""
    most = 0

    def count(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal most
        most = max(most, given[0].nbytes + result.nbytes)

    tensors = (*network.parameters(), *network.buffers())
    # A network whose layers look at values cannot be run without them.
    with suppress(Exception), torch.no_grad():
        empty = copy.deepcopy(network, {id(each): each.detach().to("meta") for each in tensors})
        for module in empty.modules():
            if isinstance(module, _ConvNd):
                module.register_forward_hook(count)
        empty.eval()(torch.zeros(1, channels, *size, device="meta"))
    return most


def blank_image(network: nn.Module, size: Sequence[int], channels: int) -> Tensor:
    """[1, channels, *size] on the network's device."""
    return torch.zeros(1, channels, *size, device=next(network.parameters()).device)


def fused_heads(
    network: nn.Module, wanted: bool | str, num_outputs: int, image_shape: Sequence[int]
) -> tuple[list[str], str | None]:
    """Fuses the heads of `network` with the loss as loss.fused_head says.

    Returns: their names, and why there are none if "auto" would have fused them.

    image_shape: [B, M, *S] as the network's own forward() sees it. Raises: ConfigError.
    """
    if not wanted or (wanted == "auto" and num_outputs < WORTH_FUSING):
        return [], None
    blank = None if known_network(network) else torch.zeros(tuple(image_shape), device="meta")
    try:
        return fuse_head(network, example_input=blank), None
    except ValueError as error:
        if wanted == "auto":
            return [], str(error)
        raise ConfigError(
            f"loss.fused_head: true needs a network that ends in a 1x1 convolution: {error}"
        ) from None


def first_output(out: Any, image: Tensor) -> Tensor | DeferredLogits:
    """The full-resolution logits of networks that return several outputs of an image."""
    if isinstance(out, DeferredLogits):
        return out
    if isinstance(out, (list, tuple)):
        return first_output(out[0], image)
    # DynUNet stacks its deep supervision heads along an extra axis.
    return out[:, 0] if out.dim() == image.dim() + 1 else out
