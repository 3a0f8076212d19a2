"""A run whose loss carries out the network's head: loss.fused_head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

import torch.distributed as dist
from finetune_data import DYNUNET_2D, NETWORK_2D, configuration, settings, stop_at, write_config
from test_finetune_processes import numbers, torchrun

from riskmap_ext.finetune import ConfigError, finetune
from riskmap_ext.finetune.base.orientation import orient
from riskmap_ext.finetune.source import network as networks
from riskmap_ext.nn import DeferredLogits, FusedHead, RiskWeightedLoss, fuse_head

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {
    "name": "PlainConvUNet",
    "args": {
        "conv_op": "torch.nn.Conv2d",
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        "n_conv_per_stage": 1,
        "n_conv_per_stage_decoder": 1,
        "norm_op": "torch.nn.InstanceNorm2d",
        "nonlin": "torch.nn.LeakyReLU",
        "deep_supervision": True,
    },
}
STACKED = {**DYNUNET_2D, "args": {**DYNUNET_2D["args"], "deep_supervision": True}}
TRAIN = {"steps": 4, "validate_every": 2, "optimizer": "SGD"}


def weights_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "last.pt", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path, **tolerance: Any) -> None:
    found, expected = weights_of(one), weights_of(other)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize(
    ("network", "train"),
    [
        (DYNUNET_2D, {}),
        (DYNUNET_2D, {"channels_last": True, "accumulate": 2}),
        (DYNUNET_2D, {"compile": True}),
        (PLAIN, {}),
        ({**DYNUNET_2D, "orientation": "AR"}, {}),
    ],
    ids=["DynUNet", "channels last", "compiled", "nnU-Net's", "turned"],
)
def test_the_same_run(root: Path, tmp_path: Path, network: dict, train: dict) -> None:
    for wanted in (True, False):
        sections = {"network": network, "train": {**TRAIN, **train}}
        config = configuration(
            root, tmp_path / str(wanted), loss={"fused_head": wanted}, **sections
        )
        finetune(config, progress=False)
        log = (config.output / "log.txt").read_text()
        assert ("No logits are kept in training" in log) == wanted
    tolerance = {"rtol": 1e-3, "atol": 1e-5}
    assert_same_weights(tmp_path / "True", tmp_path / "False", **tolerance)
    found, expected = (
        numbers(tmp_path / run / "metrics.csv", "seconds") for run in ("True", "False")
    )
    assert found == pytest.approx(expected, rel=1e-3, nan_ok=True)


def test_mixed_precision(root: Path, tmp_path: Path) -> None:
    losses = []
    for wanted in (True, False):
        sections = {"network": DYNUNET_2D, "train": {**TRAIN, "amp": "bf16"}}
        config = configuration(
            root, tmp_path / str(wanted), loss={"fused_head": wanted}, **sections
        )
        losses.append([row["train_loss"] for row in finetune(config, progress=False).history])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def assert_goes_on_in_the_same_bits(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any
) -> None:
    """A run that is stopped at step 4 ends, in `stopped`, as the whole one."""
    finetune(configuration(root, tmp_path / "whole", **sections), progress=False)
    config = configuration(root, tmp_path / "stopped", **sections)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, progress=False)
    finetune(config, progress=False, resume=True)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_goes_on_where_it_was_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {
        "network": DYNUNET_2D,
        "train": TRAIN,
        "loss": {"fused_head": True},
    }
    assert_goes_on_in_the_same_bits(root, tmp_path, monkeypatch, **sections)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("network", [DYNUNET_2D, PLAIN], ids=["DynUNet", "unused heads"])
def test_two_processes(root: Path, tmp_path: Path, network: dict) -> None:
    sections: dict[str, Any] = {
        "network": network,
        "train": {**TRAIN, "batch_size": 4},
        "loss": {"fused_head": True, "batch_dice": True},
    }
    finetune(configuration(root, tmp_path / "one", **sections), progress=False)
    config = write_config(tmp_path / "two.yaml", settings(root, tmp_path / "two", **sections))
    done = torchrun(config)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "two", tmp_path / "one", rtol=2e-3, atol=1e-5)


def test_auto_is_for_many_outputs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_of(name: str, network: dict) -> str:
        finetune(configuration(root, tmp_path / name, network=network), progress=False)
        return (tmp_path / name / "log.txt").read_text()

    few = log_of("few", DYNUNET_2D)
    assert "No logits" not in few
    assert "fused_head" not in few
    monkeypatch.setattr(networks, "WORTH_FUSING", 3)
    assert "output_block.conv.conv is fused with the loss" in log_of("enough", DYNUNET_2D)
    for name, network in (("UNet", NETWORK_2D), ("stacked", STACKED)):
        log = log_of(name, network)
        assert "No logits" not in log
        assert "loss.fused_head does not apply: network: " in log


@pytest.mark.parametrize("network", [NETWORK_2D, STACKED], ids=["UNet", "stacked"])
def test_true_needs_a_head(root: Path, tmp_path: Path, network: dict) -> None:
    config = configuration(root, tmp_path / "out", network=network, loss={"fused_head": True})
    told = r"^loss\.fused_head: true needs a network that ends .*(last layer|resizes and stacks)"
    with pytest.raises(ConfigError, match=told):
        finetune(config, progress=False)
    assert not config.output.exists()


def test_a_loss_of_the_callers_own_gets_logits(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(logits: Any, label: Any, *_: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, label.long(), ignore_index=-100)

    monkeypatch.setattr(networks, "WORTH_FUSING", 3)
    finetune(configuration(root, tmp_path / "a", network=DYNUNET_2D), progress=False, loss=loss)
    sections = {"network": DYNUNET_2D, "loss": {"fused_head": True}}
    config = configuration(root, tmp_path / "b", **sections)
    with pytest.raises(ConfigError, match=r"^loss\.fused_head: true is for the configuration's"):
        finetune(config, progress=False, loss=loss)


def test_deferred_logits_are_turned() -> None:
    """Where the network sees another order of axes."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 1))
    image, label = torch.randn(2, 1, 6, 8), torch.randint(0, 3, (2, 6, 8))
    mine = copy.deepcopy(network)
    orient(network, "PL", "axial", 2)
    orient(mine, "PL", "axial", 2)
    assert fuse_head(mine, example_input=image.mT) == ["1"]
    assert isinstance(mine[1], FusedHead)
    given = mine(image)
    assert isinstance(given, DeferredLogits)
    torch.testing.assert_close(given.logits(), network(image))
    loss = RiskWeightedLoss(dice_weight=1.0)
    torch.testing.assert_close(loss(given, label), loss(network(image), label))
