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
_BLOCKS = "dynamic_network_architectures.building_blocks.residual."


def nnunet_class(name: str) -> type[nn.Module]:
    """Raises: ConfigError where the package is missing."""
    try:
        from dynamic_network_architectures.architectures import unet
    except ImportError as error:
        raise ConfigError(
            f"network.name: {name} needs the package of nnU-Net's networks ({error}); install it "
            "with: pip install dynamic-network-architectures"
        ) from None
    return getattr(unet, name)


def nnunet_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with classes in the place of their names.

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
            prefix = "" if argument == "block" else "torch.nn."
            raise ConfigError(
                f"network.args.{argument}: expected one of "
                f"{', '.join(prefix + each for each in known)}, got "
                + ("nothing" if value is None else repr(value))
            )
        made[argument] = getattr(residual if argument == "block" else nn, name)
    return made
