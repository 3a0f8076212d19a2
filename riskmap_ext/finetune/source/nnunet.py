"""Sources of nnU-Net v2: the network, labels and preprocessing that a checkpoint's plans describe.

nnU-Net itself is not needed, only the package of its networks.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from riskmap_ext.finetune.base.errors import CheckpointError
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, slice_axis_of
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.data.dataset_json import dataset_channels, dataset_labels
from riskmap_ext.finetune.source.file import SourceFile, named_classes, state_dict_in
from riskmap_ext.finetune.source.nnunet_networks import NAMES

_REORIENTS = "NibabelIOWithReorient"
_ORDERS = [list(order) for order in itertools.permutations(range(3))]


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
    structures = _structures(source, path, dataset)
    channels = dataset_channels(path, dataset) or ["channel 0"]
    patch = _numbers(path, name, configuration, "patch_size")
    dims = len(patch)
    seen, notes = _seen_orientation(source, path, plans)
    preprocessing: dict[str, Any] = {
        "image_suffix": [f"_{index:04d}" for index in range(len(channels))],
        **_normalization(configuration),
    }
    spacing = [float(each) for each in _numbers(path, name, configuration, "spacing")]
    if len(spacing) < dims:
        raise CheckpointError(
            f"{path}: its plans: configurations.{name}.spacing: expected {dims} numbers, as "
            f"patch_size has, got {spacing}"
        )
    if dims == 2:
        # Slices along the first axis of the transposed array.
        preprocessing["slice_axis"] = slice_axis_of(seen[0])
        seen = seen[1:]
        preprocessing["pixel_size"] = arranged(
            spacing[-2:], seen, PREPARED[preprocessing["slice_axis"]][:2]
        )
    else:
        preprocessing["spacing"] = arranged(spacing, seen, PREPARED["axial"])
    prepared = PREPARED[preprocessing.get("slice_axis", "axial")][:dims]
    preprocessing["patch_size"] = arranged([int(each) for each in patch], seen, prepared)
    return SourceFile(
        path,
        state_dict_in(path, {"network_weights": content["network_weights"]}),
        network.model_copy(update={"orientation": seen}),
        structures,
        channels,
        preprocessing,
        f"{path}: its plans: arch_kwargs",
        f"it holds {network.name} with the {structures.num_outputs} outputs of its dataset.json "
        f"(configuration {name})",
        "its trainer may have built another network; set source.network to that, or choose "
        "another checkpoint",
        notes,
    )


def _beside(path: Path, name: str) -> Path | None:
    """In the model folder: the one that has fold_0 in it, or the checkpoint's own."""
    folders = (path.resolve().parent.parent, path.resolve().parent)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _part(path: Path, made_with: Mapping[str, Any], key: str, file_name: str) -> dict[str, Any]:
    part = made_with.get(key)
    if part is None:
        found = _beside(path, file_name)
        if found is None:
            raise CheckpointError(
                f"{path}: expected {key} in the init_args of this nnU-Net checkpoint, or "
                f"{file_name} in {path.resolve().parent.parent}; got neither"
            )
        try:
            part = json.loads(found.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{found}: cannot be read as JSON ({error})") from None
        path = found
    if not isinstance(part, dict):
        raise CheckpointError(f"{path}: {key}: expected a mapping, got {type(part).__name__}")
    return part


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
    known = plans.get("configurations")
    merged: dict[str, Any] = {}
    wanted: Any = name
    seen: list[str] = []
    while wanted is not None:
        each = known.get(wanted) if isinstance(known, dict) else None
        if not isinstance(each, dict) or wanted in seen:
            there = ", ".join(map(str, known)) if isinstance(known, dict) else "none"
            raise CheckpointError(
                f"{path}: its plans: expected a configuration {wanted!r}, got {there}"
            )
        seen.append(wanted)
        merged = {**each, **merged}
        wanted = each.get("inherits_from")
    return merged


def _numbers(path: Path, name: str, configuration: Mapping[str, Any], key: str) -> list[Any]:
    value = configuration.get(key)
    if not (
        isinstance(value, (list, tuple))
        and len(value) in (2, 3)
        and all(isinstance(each, (int, float)) and each > 0 for each in value)
    ):
        raise CheckpointError(
            f"{path}: its plans: configurations.{name}.{key}: expected 2 or 3 numbers, got "
            f"{value!r}"
        )
    return list(value)


def _network(path: Path, configuration: Mapping[str, Any]) -> NetworkConfig:
    architecture = configuration.get("architecture")
    if architecture is None:
        return _network_of_old_plans(path, configuration)
    full, given = None, None
    if isinstance(architecture, dict):
        full, given = architecture.get("network_class_name"), architecture.get("arch_kwargs")
    full = str(full)
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
    return NetworkConfig(name=name, args=_plain(args))


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
    return NetworkConfig(name=str(name), args=_plain(args))


def _plain(value: Any) -> Any:
    """Without tuples, which YAML has no word for."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _structures(source: SourceConfig, path: Path, dataset: Mapping[str, Any]) -> Structures:
    if source.classes is not None:
        return Structures(named_classes(source.classes))
    labels = dataset.get("labels")
    if not isinstance(labels, dict):
        raise CheckpointError(f"{path}: its dataset.json: labels: expected a mapping, got {labels}")
    lists = [value for value in labels.values() if isinstance(value, (list, tuple))]
    if not any(len(value) > 1 for value in lists):
        # As nnU-Net does, lists of one label each are no regions.
        labels = {n: v[0] if isinstance(v, (list, tuple)) and v else v for n, v in labels.items()}
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
    stored, notes = source.orientation, []
    if str(plans.get("image_reader_writer")) == _REORIENTS:
        stored = "RAS"
    elif stored is None:
        stored = "RAS"
        notes.append(
            f"{path}: nnU-Net takes files in the order they are stored in, and does not say which "
            "that was; RAS is assumed (source.orientation=LPS, for example, says otherwise)"
        )
    order = plans.get("transpose_forward", [0, 1, 2])
    if list(order if isinstance(order, (list, tuple)) else ()) not in _ORDERS:
        raise CheckpointError(
            f"{path}: its plans: transpose_forward: expected the axes 0, 1, 2, got {order!r}"
        )
    # It reads a file's axes from the last to the first.
    array = stored[::-1]
    return "".join(array[axis] for axis in order), notes


def _normalization(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """`normalize` and `image_foreground`, or the name of a scheme that the driver lacks."""
    given, masks = (configuration.get(k) for k in ("normalization_schemes", "use_mask_for_norm"))
    schemes = {str(each) for each in given} if isinstance(given, (list, tuple)) else set()
    masked = {bool(each) for each in masks} if isinstance(masks, (list, tuple)) else {False}
    if schemes == {"ZScoreNormalization"} and len(masked) == 1:
        return {"normalize": "zscore", "image_foreground": "nonzero" if True in masked else "all"}
    if schemes == {"NoNormalization"}:
        return {"normalize": "none"}
    if schemes == {"ZScoreNormalization"}:
        return {"normalize": "ZScoreNormalization of some channels in the mask"}
    return {"normalize": ", ".join(sorted(schemes))} if schemes else {}
