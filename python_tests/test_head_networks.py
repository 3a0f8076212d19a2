"""fuse_head on the networks of MONAI and nnU-Net."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from head_net import CLASSES, CONVOLUTIONS, LOSS, assert_same_step, data
from torch import Tensor, nn

from riskmap_ext.nn import DeferredLogits, FusedHead, fuse_head, unfuse_head


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
