"""nnU-Net's networks by name, from the package dynamic_network_architectures.

Their arguments are plain values; layers are named by text, out of a closed list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from riskmap_ext.finetune.base.errors import ConfigError

NAMES = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
_LAYERS: dict[str, tuple[str, ...]] = {
    "conv_op": ("Conv2d", "Conv3d"),
    "norm_op": ("InstanceNorm2d", "InstanceNorm3d", "BatchNorm2d", "BatchNorm3d"),
    "dropout_op": ("Dropout2d", "Dropout3d"),
    "nonlin": ("LeakyReLU", "ReLU", "PReLU", "ELU", "GELU", "SiLU", "Mish"),
    "block": ("BasicBlockD", "BottleneckD"),
}
_PACKAGES = ("torch.nn.", "dynamic_network_architectures.building_blocks.residual.")


def nnunet_class(name: str) -> type[nn.Module]:
    """Raises: ConfigError where the package is missing."""
    try:
        from dynamic_network_architectures.architectures import unet
    except ImportError as error:
        raise ConfigError(
            f"network.name: {name} is a network of nnU-Net and needs the package "
            f"dynamic_network_architectures ({error}); install it with: "
            "pip install dynamic-network-architectures"
        ) from None
    return getattr(unet, name)


def nnunet_dims(args: Mapping[str, Any], key: str) -> int:
    """2 or 3, by the convolution."""
    return 2 if _layer_name("conv_op", args.get("conv_op"), key) == "Conv2d" else 3


def nnunet_args(args: Mapping[str, Any], key: str = "network.args") -> dict[str, Any]:
    """The arguments with classes in the place of their names.

    Raises: ConfigError for a name that is not in the list: nothing else is imported.
    """
    from dynamic_network_architectures.building_blocks import residual

    made = dict(args)
    for argument in _LAYERS:
        if argument == "conv_op" or made.get(argument) is not None:
            name = _layer_name(argument, made.get(argument), key)
            made[argument] = getattr(residual if argument == "block" else nn, name)
    return made


def _layer_name(argument: str, value: Any, key: str) -> str:
    """Conv3d of torch.nn.modules.conv.Conv3d, torch.nn.Conv3d or Conv3d."""
    known = _LAYERS[argument]
    text = value if isinstance(value, str) else ""
    package, name = text.rpartition(".")[::2]
    if name not in known or (package and not f"{package}.".startswith(_PACKAGES)):
        prefix = "" if argument == "block" else "torch.nn."
        raise ConfigError(
            f"{key}.{argument}: expected one of {', '.join(prefix + each for each in known)}, got "
            + ("nothing" if value is None else repr(value))
        )
    return name
