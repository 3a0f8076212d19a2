"""Sources of nnU-Net v2: the network, labels and preprocessing that a checkpoint's plans describe.

nnU-Net itself is not needed, only the package of its networks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from riskmap_ext.finetune.base.errors import CheckpointError, one_line
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, slice_axis_of
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.data.dataset_json import dataset_channels, dataset_labels
from riskmap_ext.finetune.source.file import (
    SourceFile,
    given_structures,
    read_mapping,
    stored_orientation,
)
from riskmap_ext.finetune.source.nnunet_networks import NAMES

_REORIENTS = "NibabelIOWithReorient"
_ORDERS = [kind(order) for order in itertools.permutations(range(3)) for kind in (list, tuple)]


def is_nnunet(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether it is a checkpoint of nnU-Net with its plans in it or beside it."""
    if not isinstance(content.get("network_weights"), dict):
        return False
    return isinstance(content.get("init_args"), dict) or _beside(path, "plans.json") is not None


def nnunet_source(source: SourceConfig, content: Mapping[str, Any]) -> SourceFile:
    """Raises: CheckpointError naming the file and what is missing or cannot work."""
    path = source.checkpoint
    given = content.get("init_args")
    made_with = given if isinstance(given, dict) else {}
    plans = _part(path, made_with, "plans", "plans.json")
    dataset = _part(path, made_with, "dataset_json", "dataset.json")
    name = _configuration_name(path, made_with)
    configuration = _configuration(path, plans, name)
    if configuration.get("previous_stage"):
        raise CheckpointError(
            f"{path}: is the second stage of a cascade ({name}), which also needs the first "
            "stage's segmentation of each image; take a model of 2d, 3d_lowres or 3d_fullres"
        )
    network = _network(path, configuration)
    structures = given_structures(source) or _structures(path, dataset)
    channels = dataset_channels(path, dataset) or ["channel 0"]
    place = f"{path}: its plans: configurations.{name}"
    patch, spacing = (_numbers(place, configuration, key) for key in ("patch_size", "spacing"))
    dims = len(patch)
    if len(spacing) < dims:
        raise CheckpointError(
            f"{place}.spacing: expected {dims} numbers, as patch_size has, got {spacing}"
        )
    seen, notes = _seen_orientation(source, path, plans)
    # Slices are along the first axis of the transposed array.
    slice_axis = slice_axis_of(seen[0]) if dims == 2 else "axial"
    seen, prepared = seen[-dims:], PREPARED[slice_axis][:dims]
    sizes = arranged([float(each) for each in spacing[-dims:]], seen, prepared)
    voxel = {"slice_axis": slice_axis, "pixel_size": sizes} if dims == 2 else {"spacing": sizes}
    return SourceFile(
        path=path,
        config=network.model_copy(update={"orientation": seen}),
        structures=structures,
        channels=channels,
        preprocessing={
            "image_suffix": [f"_{index:04d}" for index in range(len(channels))],
            "patch_size": arranged([int(each) for each in patch], seen, prepared),
            **voxel,
            **_normalization(configuration),
        },
        network_key=f"{path}: its plans: arch_kwargs",
        told=f"it holds {network.name} with the {structures.num_outputs} outputs of its "
        f"dataset.json (configuration {name})",
        remedy="its trainer may have built another network; set source.network to that, or choose "
        "another checkpoint",
        notes=notes,
    )


def _beside(path: Path, name: str) -> Path | None:
    """In the model folder: the one that has fold_0 in it, or the checkpoint's own."""
    folders = (path.resolve().parent.parent, path.resolve().parent)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _part(path: Path, made_with: Mapping[str, Any], key: str, file_name: str) -> dict[str, Any]:
    part = made_with.get(key)
    if isinstance(part, dict):
        return part
    if part is not None:
        raise CheckpointError(f"{path}: {key}: expected a mapping, got {type(part).__name__}")
    found = _beside(path, file_name)
    if found is None:
        raise CheckpointError(
            f"{path}: expected {key} in the init_args of this nnU-Net checkpoint, or {file_name} "
            f"in {path.resolve().parent.parent}; got neither"
        )
    return read_mapping(found)


def _configuration_name(path: Path, made_with: Mapping[str, Any]) -> str:
    name = made_with.get("configuration")
    # nnU-Net's model folders are named TRAINER__PLANS__CONFIGURATION.
    parts = path.resolve().parent.parent.name.split("__")
    if name is None and len(parts) == 3:
        name = parts[2]
    if not isinstance(name, str):
        raise CheckpointError(
            f"{path}: expected configuration (such as 3d_fullres) in the init_args of this nnU-Net "
            "checkpoint, or a model folder named TRAINER__PLANS__CONFIGURATION; got neither"
        )
    return name


def _configuration(path: Path, plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """With what it inherits."""
    given = plans.get("configurations")
    known = dict(given) if isinstance(given, dict) else {}
    merged: dict[str, Any] = {}
    wanted: Any = name
    while wanted is not None:
        # Taken out, so that none inherits from itself.
        each = known.pop(wanted, None) if isinstance(wanted, str) else None
        if not isinstance(each, dict):
            there = ", ".join(map(str, given)) if isinstance(given, dict) else "none"
            raise CheckpointError(
                f"{path}: its plans: expected a configuration {wanted!r}, got {there}"
            )
        merged = {**each, **merged}
        wanted = each.get("inherits_from")
    return merged


def _numbers(place: str, configuration: Mapping[str, Any], key: str) -> list[Any]:
    numbers = _listed(configuration.get(key))
    good = all(isinstance(each, (int, float)) and 0 < each < math.inf for each in numbers)
    if len(numbers) not in (2, 3) or not good:
        got = repr(configuration.get(key))
        raise CheckpointError(f"{place}.{key}: expected 2 or 3 numbers, got {got}")
    return numbers


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _network(path: Path, configuration: Mapping[str, Any]) -> NetworkConfig:
    architecture = configuration.get("architecture")
    if architecture is None:
        return _network_of_old_plans(path, configuration)
    parts = architecture if isinstance(architecture, dict) else {}
    full, given = str(parts.get("network_class_name")), parts.get("arch_kwargs")
    name = full.rpartition(".")[2]
    if name not in NAMES or not full.startswith("dynamic_network_architectures."):
        raise CheckpointError(
            f"{path}: its plans: network_class_name: expected one of {', '.join(NAMES)} of "
            f"dynamic_network_architectures, got {full!r}"
        )
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise CheckpointError(
            f"{path}: its plans: arch_kwargs: expected arguments by name, got {given!r}"
        )
    args = {key: value for key, value in given.items() if key != "deep_supervision"}
    return _network_config(path, name, args)


def _network_of_old_plans(path: Path, configuration: Mapping[str, Any]) -> NetworkConfig:
    """Plans of nnU-Net before 2.4 have the network's numbers and not its arguments."""
    name = configuration.get("UNet_class_name")
    try:
        if name not in NAMES:
            raise KeyError("UNet_class_name")
        encoder = list(configuration["n_conv_per_stage_encoder"])
        base = int(configuration["UNet_base_num_features"])
        most = int(configuration["unet_max_num_features"])
        dims = len(configuration["patch_size"])
        blocks = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
        args = {
            "n_stages": len(encoder),
            "features_per_stage": [min(base * 2**stage, most) for stage in range(len(encoder))],
            "conv_op": f"torch.nn.Conv{dims}d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            blocks: encoder,
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its plans: expected architecture, or UNet_class_name with the numbers of old "
            f"plans; {error} is missing or cannot be used"
        ) from None
    return _network_config(path, str(name), args)


def _network_config(path: Path, name: str, args: dict[str, Any]) -> NetworkConfig:
    """Without tuples, which YAML has no word for."""
    try:
        plain = to_jsonable_python(args, fallback=repr)
    except ValueError as error:  # values within themselves, bytes
        raise CheckpointError(f"{path}: its plans: arch_kwargs: {one_line(error)}") from None
    return NetworkConfig(name=name, args=plain)


def _structures(path: Path, dataset: Mapping[str, Any]) -> Structures:
    labels = dataset.get("labels")
    if not isinstance(labels, dict):
        raise CheckpointError(f"{path}: its dataset.json: labels: expected a mapping, got {labels}")
    if not any(len(_listed(value)) > 1 for value in labels.values()):
        # As nnU-Net does, lists of one label each are no regions.
        labels = {name: (_listed(value) or [value])[0] for name, value in labels.items()}
    found = dataset_labels(path, {**dataset, "labels": labels})
    if found.classes is None:
        raise CheckpointError(
            f"{path}: its dataset.json: labels: expected a name for each of the numbers from 0 on, "
            f"got {labels}"
        )
    return structures_of(found.classes, found.regions, found.region_classes, f"{path}: its labels")


def _seen_orientation(
    source: SourceConfig, path: Path, plans: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Letters of the array's axes that nnU-Net's network sees, slice axis first; warnings."""
    why = f"{path}: nnU-Net takes files in the order they are stored in, and does not say which"
    stored, notes = stored_orientation(source, f"{why} that was")
    if str(plans.get("image_reader_writer")) == _REORIENTS:
        stored, notes = "RAS", []
    order = plans.get("transpose_forward", [0, 1, 2])
    if order not in _ORDERS:
        raise CheckpointError(
            f"{path}: its plans: transpose_forward: expected the axes 0, 1, 2, got {order!r}"
        )
    # It reads a file's axes from the last to the first.
    array = stored[::-1]
    return "".join(array[axis] for axis in order), notes


def _normalization(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """`normalize` and `image_foreground`, or the name of a scheme that the driver lacks."""
    schemes = sorted({str(each) for each in _listed(configuration.get("normalization_schemes"))})
    masked = {bool(each) for each in _listed(configuration.get("use_mask_for_norm"))}
    if schemes == ["ZScoreNormalization"]:
        if len(masked) > 1:
            return {"normalize": "ZScoreNormalization of some channels in the mask"}
        return {"normalize": "zscore", "image_foreground": "nonzero" if True in masked else "all"}
    if schemes == ["NoNormalization"]:
        return {"normalize": "none"}
    return {"normalize": ", ".join(schemes)} if schemes else {}
