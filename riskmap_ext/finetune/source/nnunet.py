"""Sources of nnU-Net v2: the network, labels and preprocessing that a checkpoint's plans describe.

nnU-Net itself is not needed, only the package of its networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len, Predicate
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import to_jsonable_python

from riskmap_ext.finetune.base.errors import CheckpointError
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, slice_axis_of
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.config.types import Positive, PositiveInt, expected
from riskmap_ext.finetune.config.yaml_text import read_mapping
from riskmap_ext.finetune.data.dataset_json import dataset_channels, dataset_labels
from riskmap_ext.finetune.source.file import (
    SourceModel,
    checked,
    given_structures,
    stored_orientation,
)
from riskmap_ext.finetune.source.nnunet_networks import NAMES

_PACKAGE = "dynamic_network_architectures."
_REORIENTS = "NibabelIOWithReorient"
_RESAMPLING = "resample_data_or_seg_to_shape"


class _MadeWith(BaseModel):
    """init_args of a checkpoint; what they lack is in files beside it, or in a folder's name."""

    plans: dict[str, Any] | None = None
    dataset_json: dict[str, Any] | None = None
    configuration: str | None = None


class _Plans(BaseModel):
    configurations: dict[str, dict[str, Any]]
    image_reader_writer: Any = None
    foreground_intensity_properties_per_channel: dict[str, dict[str, float]] = {}
    transpose_forward: Annotated[
        list[int],
        Predicate(lambda order: sorted(order) == [0, 1, 2]),
        expected("the axes 0, 1, 2"),
    ] = [0, 1, 2]


class _Configuration(BaseModel):
    patch_size: Annotated[list[PositiveInt], Len(2, 3), expected("2 or 3 numbers")]
    spacing: Annotated[list[Positive], Len(2, 3), expected("2 or 3 numbers")]
    architecture: dict[str, Any] | None = None
    previous_stage: Any = None
    normalization_schemes: list[str] = []
    use_mask_for_norm: list[bool] = []
    resampling_fn_data: str = _RESAMPLING


class _Architecture(BaseModel):
    """The arguments are without tuples, which YAML has no word for."""

    network_class_name: Annotated[
        str,
        Field(pattern=rf"^{_PACKAGE}([\w.]+\.)?({'|'.join(NAMES)})$"),
        expected(f"one of {', '.join(NAMES)} of {_PACKAGE[:-1]}"),
    ]
    arch_kwargs: Annotated[
        dict[str, Any], AfterValidator(lambda args: to_jsonable_python(args, fallback=repr))
    ]


def nnunet_source(source: SourceConfig, content: Mapping[str, Any]) -> SourceModel:
    """Raises: CheckpointError naming the file and what is missing or cannot work."""
    path = source.checkpoint
    made_with = checked(_MadeWith, content.get("init_args") or {}, path, "init_args")
    plans = checked(_Plans, made_with.plans or _beside(path, "plans"), path, "plans")
    dataset = made_with.dataset_json or _beside(path, "dataset")
    name = made_with.configuration or path.resolve().parent.parent.name.rpartition("__")[2]
    content = _with_inherited(plans.configurations, name, f"{path}: its plans.configurations")
    section = f"plans.configurations.{name}"
    configuration = checked(_Configuration, content, path, section)
    if configuration.previous_stage:
        raise CheckpointError(
            f"{path}: is the second stage of a cascade ({name}), which needs the segmentations of "
            "the first; take a model of 2d, 3d_lowres or 3d_fullres"
        )
    dims = len(configuration.patch_size)
    if len(configuration.spacing) < dims:
        got = configuration.spacing
        raise CheckpointError(
            f"{path}: its {section}.spacing: expected {dims} numbers, as patch_size has, got {got}"
        )
    made_of = configuration.architecture or _old_architecture(
        content, dims, f"{path}: its {section}"
    )
    architecture = checked(_Architecture, made_of, path, f"{section}.architecture")
    network = architecture.network_class_name.rpartition(".")[2]
    args = {k: v for k, v in architecture.arch_kwargs.items() if k != "deep_supervision"}
    structures = given_structures(source) or _structures(path, dataset)
    channels = dataset_channels(path, dataset) or ["channel 0"]
    seen, notes = _seen_orientation(source, plans)
    # Slices are along the first axis of the transposed array.
    slice_axis = slice_axis_of(seen[0]) if dims == 2 else "axial"
    seen, prepared = seen[-dims:], PREPARED[slice_axis][:dims]
    return SourceModel(
        path=path,
        config=NetworkConfig(name=network, args=args, orientation=seen),
        structures=structures,
        channels=channels,
        preprocessing={
            "image_suffix": [f"_{index:04d}" for index in range(len(channels))],
            "patch_size": arranged(configuration.patch_size, seen, prepared),
            # Slices stay as far apart as they are.
            "spacing": [*arranged(configuration.spacing[-dims:], seen, prepared), None][:3],
            "geometry": "nnunet"
            if configuration.resampling_fn_data == _RESAMPLING
            else configuration.resampling_fn_data,
            "crop": "nonzero",
            **({"slice_axis": slice_axis} if dims == 2 else {}),
            **_normalization(configuration, plans),
        },
        told=f"it holds {network} with the {structures.num_outputs} outputs of its dataset.json "
        f"(configuration {name}); its trainer may have built another",
        notes=notes,
    )


def _beside(path: Path, name: str) -> dict[str, Any]:
    """In the model folder: the one that has fold_0 in it, or the checkpoint's own."""
    model = path.resolve().parent.parent
    for folder in (model, path.resolve().parent):
        if (folder / f"{name}.json").is_file():
            return read_mapping(folder / f"{name}.json", CheckpointError)[0]
    raise CheckpointError(
        f"{path}: expected {name} in the init_args of this nnU-Net checkpoint, or {name}.json in "
        f"{model}; got neither"
    )


def _with_inherited(given: dict[str, dict[str, Any]], name: Any, place: str) -> dict[str, Any]:
    left, wanted = dict(given), name
    merged: dict[str, Any] = {}
    while wanted is not None:
        if wanted not in list(left):
            raise CheckpointError(
                f"{place}: expected a configuration {wanted!r} (by its init_args, or by a folder "
                f"TRAINER__PLANS__CONFIGURATION), got {', '.join(given) or 'none'}"
            )
        # Taken out, so that none inherits from itself.
        each = left.pop(wanted)
        merged = {**each, **merged}
        wanted = each.get("inherits_from")
    return merged


def _old_architecture(old: Mapping[str, Any], dims: int, place: str) -> dict[str, Any]:
    """Plans of nnU-Net before 2.4 have the network's numbers and not its arguments."""
    try:
        name = old["UNet_class_name"]
        encoder = list(old["n_conv_per_stage_encoder"])
        base, most = int(old["UNet_base_num_features"]), int(old["unet_max_num_features"])
        blocks = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
        args = {
            "n_stages": len(encoder),
            "features_per_stage": [min(base * 2**stage, most) for stage in range(len(encoder))],
            "conv_op": f"torch.nn.Conv{dims}d",
            "kernel_sizes": old["conv_kernel_sizes"],
            "strides": old["pool_op_kernel_sizes"],
            blocks: encoder,
            "n_conv_per_stage_decoder": old["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{place}.architecture: expected it, or UNet_class_name with the numbers of old plans; "
            f"{error} is missing or cannot be used"
        ) from None
    return {"network_class_name": f"{_PACKAGE}{name}", "arch_kwargs": args}


def _structures(path: Path, dataset: dict[str, Any]) -> Structures:
    labels = dataset.get("labels")
    if isinstance(labels, dict) and not any(len(_listed(v)) > 1 for v in labels.values()):
        # As nnU-Net does, lists of one label each are no regions.
        labels = {name: (_listed(value) or [value])[0] for name, value in labels.items()}
    found = dataset_labels(path, {**dataset, "labels": labels})
    if "classes" not in found:
        raise CheckpointError(
            f"{path}: its dataset.json: labels: expected a name for each of the numbers from 0 on, "
            f"got {labels}"
        )
    regions = found.get("regions"), found.get("region_classes")
    return structures_of(found["classes"], *regions, f"{path}: its labels")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _seen_orientation(source: SourceConfig, plans: _Plans) -> tuple[str, list[str]]:
    """Letters of the array's axes that nnU-Net's network sees, slice axis first; warnings."""
    why = "nnU-Net takes files in the order they are stored in, and does not say which that was"
    stored, notes = stored_orientation(source, why)
    if plans.image_reader_writer == _REORIENTS:
        stored, notes = "RAS", []
    # It reads a file's axes from the last to the first.
    return "".join(stored[::-1][axis] for axis in plans.transpose_forward), notes


def _normalization(configuration: _Configuration, plans: _Plans) -> dict[str, Any]:
    """`normalize`, `window`, `mean_std` and `image_foreground`.

    A scheme that the driver lacks is there by its name.
    """
    schemes = configuration.normalization_schemes
    pairs = zip(schemes, configuration.use_mask_for_norm, strict=False)
    masks = {mask for scheme, mask in pairs if scheme == "ZScoreNormalization"}
    if len(masks) > 1:
        return {"normalize": "ZScoreNormalization of some channels in the mask"}
    masked = True in masks
    channels = [_of_scheme(name, masked, plans, index) for index, name in enumerate(schemes)]
    told: dict[str, Any] = {"image_foreground": "nonzero" if masked else "all"}
    for key, values in zip(
        ("normalize", "window", "mean_std"), zip(*channels, strict=True), strict=False
    ):
        # One for all channels, where they are alike.
        told[key] = values[0] if values.count(values[0]) == len(values) else list(values)
    return told if schemes else {}


def _of_scheme(name: str, masked: bool, plans: _Plans, channel: int) -> tuple[Any, Any, Any]:
    """normalize, window and mean_std of a channel."""
    if name == "ZScoreNormalization":
        return "zscore_foreground" if masked else "zscore", None, None
    # Of the foreground's intensities in the training set.
    told = plans.foreground_intensity_properties_per_channel.get(str(channel), {})
    names = ("percentile_00_5", "percentile_99_5", "mean", "std")
    if name == "CTNormalization" and told.keys() >= {*names}:
        low, high, mean, std = (told[each] for each in names)
        return "zscore", [low, high], [mean, max(std, 1e-8)]
    if name == "RGBTo01Normalization":
        return "zscore", None, [0.0, 255.0]
    kinds = {"NoNormalization": "none", "RescaleTo01Normalization": "rescale"}
    return kinds.get(name, name), None, None
