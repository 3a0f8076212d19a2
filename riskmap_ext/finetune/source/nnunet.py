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
from typing_extensions import TypedDict

from riskmap_ext.finetune.base.errors import CheckpointError
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, slice_axis_of
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import (
    NetworkConfig,
    Positive,
    PositiveInt,
    SourceConfig,
    expected,
)
from riskmap_ext.finetune.data.datalist import dataset_channels
from riskmap_ext.finetune.data.labels import dataset_labels
from riskmap_ext.finetune.source.model import (
    SourceModel,
    checked,
    given_structures,
    stored_orientation,
)
from riskmap_ext.finetune.source.network import NNUNET_NETWORKS

_PACKAGE = "dynamic_network_architectures."
_REORIENTS = "NibabelIOWithReorient"
_RESAMPLING = "resample_data_or_seg_to_shape"


class _Plans(BaseModel):
    configurations: dict[str, dict[str, Any]]
    image_reader_writer: Any = None
    foreground_intensity_properties_per_channel: dict[str, dict[str, float]] = {}
    transpose_forward: Annotated[
        list[int],
        Predicate(lambda order: sorted(order) == [0, 1, 2]),
        expected("the axes 0, 1, 2"),
    ] = [0, 1, 2]


class _MadeWith(BaseModel):
    """init_args of a checkpoint."""

    plans: _Plans
    dataset_json: dict[str, Any]
    configuration: str


class _Architecture(TypedDict):
    """The arguments have no tuples, which YAML cannot express."""

    network_class_name: Annotated[
        str,
        Field(pattern=rf"^{_PACKAGE}([\w.]+\.)?({'|'.join(NNUNET_NETWORKS)})$"),
        expected(f"one of {', '.join(NNUNET_NETWORKS)} of {_PACKAGE[:-1]}"),
    ]
    arch_kwargs: Annotated[
        dict[str, Any], AfterValidator(lambda args: to_jsonable_python(args, fallback=repr))
    ]


class _Configuration(BaseModel):
    patch_size: Annotated[list[PositiveInt], Len(2, 3), expected("2 or 3 numbers")]
    spacing: Annotated[list[Positive], Len(2, 3), expected("2 or 3 numbers")]
    architecture: _Architecture
    previous_stage: Any = None
    normalization_schemes: Annotated[list[str], Len(1)]
    use_mask_for_norm: list[bool]
    resampling_fn_data: str = _RESAMPLING


def nnunet_source(source: SourceConfig, content: Mapping[str, Any]) -> SourceModel:
    """Raises: CheckpointError naming the file and what is missing or cannot work."""
    path = source.checkpoint
    made_with = checked(_MadeWith, content.get("init_args") or {}, path, "init_args")
    plans, dataset, name = made_with.plans, made_with.dataset_json, made_with.configuration
    section = f"init_args.plans.configurations.{name}"
    merged = _with_inherited(plans.configurations, name, path)
    configuration = checked(_Configuration, merged, path, section)
    if configuration.previous_stage:
        raise CheckpointError(
            f"{path}: is the second stage of a cascade ({name}), which needs the segmentations of "
            "the first; take a model of 2d, 3d_lowres or 3d_fullres"
        )
    dims, spacing = len(configuration.patch_size), configuration.spacing
    if len(spacing) != dims:
        raise CheckpointError(
            f"{path}: its {section}.spacing: expected {dims} numbers, as patch_size has, got "
            f"{spacing}"
        )
    architecture = configuration.architecture
    network = architecture["network_class_name"].rpartition(".")[2]
    args = {k: v for k, v in architecture["arch_kwargs"].items() if k != "deep_supervision"}
    structures = given_structures(source) or _structures(path, dataset)
    channels = dataset_channels(path, dataset) or ["channel 0"]
    seen, notes = _seen_orientation(source, plans)
    # Slices are along the first axis of the transposed array.
    slice_axis = slice_axis_of(seen[0]) if dims == 2 else "axial"
    seen, prepared = seen[-dims:], PREPARED[slice_axis][:dims]
    resampling = configuration.resampling_fn_data
    return SourceModel(
        path=path,
        config=NetworkConfig(name=network, args=args, orientation=seen),
        structures=structures,
        channels=channels,
        preprocessing={
            "image_suffix": [f"_{index:04d}" for index in range(len(channels))],
            "patch_size": arranged(configuration.patch_size, seen, prepared),
            # The distance between slices does not change.
            "spacing": [*arranged(spacing, seen, prepared), None][:3],
            "geometry": "nnunet" if resampling == _RESAMPLING else resampling,
            "crop": "nonzero",
            **({"slice_axis": slice_axis} if dims == 2 else {}),
            **_normalization(configuration, plans),
        },
        told=f"it holds {network} with the {structures.num_outputs} outputs of its dataset.json "
        f"(configuration {name}); its trainer may have built another",
        notes=notes,
    )


def _with_inherited(
    given: dict[str, dict[str, Any]], name: str | None, path: Path
) -> dict[str, Any]:
    left, merged = dict(given), dict[str, Any]()
    while name is not None:
        if name not in list(left):
            raise CheckpointError(
                f"{path}: its plans.configurations: expected a configuration {name!r}, got "
                f"{', '.join(given) or 'none'}"
            )
        # Removed, so that none inherits from itself.
        each = left.pop(name)
        merged = each | merged
        name = each.get("inherits_from")
    return merged


def _structures(path: Path, dataset: dict[str, Any]) -> Structures:
    labels = dataset.get("labels")
    if isinstance(labels, dict):
        lists = [value for value in labels.values() if isinstance(value, list)]
        if all(len(value) == 1 for value in lists):
            # As in nnU-Net, lists of one label each are not regions.
            labels = {k: v[0] if isinstance(v, list) else v for k, v in labels.items()}
    found = dataset_labels(path, {**dataset, "labels": labels})
    if "classes" not in found:
        raise CheckpointError(
            f"{path}: its dataset.json: labels: expected a name for each of the numbers from 0 on, "
            f"got {labels}"
        )
    regions = found.get("regions"), found.get("region_classes")
    return structures_of(found["classes"], *regions, f"{path}: its labels")


def _seen_orientation(source: SourceConfig, plans: _Plans) -> tuple[str, list[str]]:
    """Letters of the array's axes that nnU-Net's network sees, slice axis first; warnings."""
    why = "nnU-Net takes files in the order they are stored in, and does not say which that was"
    stored, notes = stored_orientation(source, why)
    if plans.image_reader_writer == _REORIENTS:
        stored, notes = "RAS", []
    # It reads a file's axes from last to first.
    return "".join(stored[::-1][axis] for axis in plans.transpose_forward), notes


def _normalization(configuration: _Configuration, plans: _Plans) -> dict[str, Any]:
    """`normalize`, `window`, `mean_std` and `image_foreground`.

    A scheme that the driver lacks keeps its name.
    """
    schemes = configuration.normalization_schemes
    pairs = zip(schemes, configuration.use_mask_for_norm, strict=False)
    masks = {mask for scheme, mask in pairs if scheme == "ZScoreNormalization"}
    if len(masks) > 1:
        return {"normalize": "ZScoreNormalization of some channels in the mask"}
    masked = True in masks
    channels = [_of_scheme(name, masked, plans, index) for index, name in enumerate(schemes)]
    told: dict[str, Any] = {"image_foreground": "nonzero" if masked else "all"}
    keys = ("normalize", "window", "mean_std")
    for key, values in zip(keys, zip(*channels, strict=True), strict=True):
        # One for all channels if they are alike.
        told[key] = values[0] if values.count(values[0]) == len(values) else list(values)
    return told


def _of_scheme(name: str, masked: bool, plans: _Plans, channel: int) -> tuple[Any, Any, Any]:
    """normalize, window and mean_std of a channel."""
    if name == "ZScoreNormalization":
        return "zscore_foreground" if masked else "zscore", None, None
    # Over the foreground's intensities in the training set.
    told = plans.foreground_intensity_properties_per_channel.get(str(channel), {})
    names = ("percentile_00_5", "percentile_99_5", "mean", "std")
    if name == "CTNormalization" and told.keys() >= {*names}:
        low, high, mean, std = (told[each] for each in names)
        return "zscore", [low, high], [mean, max(std, 1e-8)]
    if name == "RGBTo01Normalization":
        return "zscore", None, [0.0, 255.0]
    kinds = {"NoNormalization": "none", "RescaleTo01Normalization": "rescale"}
    return kinds.get(name, name), None, None
