"""Tiny source models in the file formats of other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from riskmap_ext.finetune import CheckpointError, ConfigError
from riskmap_ext.finetune.config.schema import SourceConfig
from riskmap_ext.finetune.source.checkpoint import load_source

LABELS = {"background": 0, "box": 1, "crate": 2}


class Runs:
    """Pickled, it makes the file `ran` when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("ran", "w")


def nnunet_plans(dims: int = 3, **changes: Any) -> dict[str, Any]:
    """As nnU-Net's planner writes them, for one small configuration."""
    name = {2: "2d", 3: "3d_fullres"}[dims]
    configuration = {
        "patch_size": [8, 12, 16][-dims:],
        "spacing": [3.0, 2.0, 1.0][-dims:],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 2,
                "strides": [[1] * dims, [2] * dims],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **changes,
    }
    return {
        "dataset_name": "Dataset001_Boxes",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {name: configuration},
    }


def nnunet_dataset(labels: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "channel_names": {"0": "MRI"},
        "labels": labels or LABELS,
        "numTraining": 4,
        "file_ending": ".nii.gz",
        **changes,
    }


def nnunet_network(plans: dict[str, Any], channels: int, outputs: int) -> torch.nn.Module:
    """As nnU-Net builds it, by the package that it takes its networks from."""
    from dynamic_network_architectures.architectures import unet

    architecture = next(iter(plans["configurations"].values()))["architecture"]
    args = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        args[key] = args[key] and getattr(torch.nn, args[key].rpartition(".")[2])
    make = getattr(unet, architecture["network_class_name"].rpartition(".")[2])
    torch.manual_seed(0)
    network = make(input_channels=channels, num_classes=outputs, deep_supervision=True, **args)
    network.decoder.deep_supervision = False
    return network.eval()


def save_nnunet(
    path: Path,
    network: torch.nn.Module,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    **changes: Any,
) -> Path:
    """With the keys of nnU-Net's own checkpoints."""
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [torch.zeros(1).double().numpy()[0]]},
        "_best_ema": torch.ones(1).double().numpy()[0],
        "current_epoch": 1,
        "init_args": {
            "plans": plans,
            "configuration": next(iter(plans["configurations"])),
            "fold": 0,
            "dataset_json": dataset,
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


BUNDLE_NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
    "num_res_units": 1,
    "norm": "batch",
}


def bundle_metadata(**changes: Any) -> dict[str, Any]:
    image = {"num_channels": 1, "spatial_shape": [16, 16, 8], "channel_def": {"0": "T1"}}
    names = {"0": "background", "1": "box", "2": "crate"}
    return {
        "version": "0.1.0",
        "network_data_format": {
            "inputs": {"image": {"type": "image", **image, **changes.get("image", {})}},
            "outputs": {"pred": {"channel_def": names, **changes.get("pred", {})}},
        },
    }


def bundle_config(**changes: Any) -> dict[str, Any]:
    """As bundles have it: the network in plain values, all else a program."""
    return {
        "imports": ["$import glob", "$open('ran', 'w')"],
        "bundle_root": ".",
        "device": "$open('ran', 'w')",
        "network_def": BUNDLE_NETWORK,
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                {"_target_": "Spacingd", "keys": "image", "pixdim": [1.0, 1.0, 1.0]},
                {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True},
                {"_target_": "EnsureTyped", "keys": "image", "device": "@device"},
            ],
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "Activationsd", "keys": "pred", "softmax": True}],
        },
        "evaluating": ["$@evaluator.run()"],
        **changes,
    }


def save_bundle(
    root: Path,
    network: torch.nn.Module,
    config: dict[str, Any],
    metadata: dict[str, Any] | None = None,
) -> Path:
    """In the layout of MONAI's bundle specification."""
    (root / "configs").mkdir(parents=True, exist_ok=True)
    (root / "models").mkdir(exist_ok=True)
    (root / "configs" / "inference.json").write_text(json.dumps(config))
    if metadata is not None:
        (root / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.save(network.state_dict(), root / "models" / "model.pt")
    return root


def load(path: Path, **options: Any) -> Any:
    return load_source(SourceConfig(checkpoint=path, **options))


def refusal(path: Path, **options: Any) -> str:
    """What is said of a source that is not taken."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)
