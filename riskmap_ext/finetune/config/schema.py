"""The keys of a fine-tuning run: their types, defaults, meaning and checks.

The text below a key is its description; docs/generate.py builds the reference from it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Len, Predicate
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from riskmap_ext.finetune.base.device import DEVICE
from riskmap_ext.finetune.base.errors import shortened
from riskmap_ext.finetune.base.orientation import check_orientation
from riskmap_ext.finetune.base.structures import check_names


def _absolute(value: Any, info: ValidationInfo) -> Any:
    """Relative paths start from data.root, the file's folder or, if typed, the current folder."""
    if not isinstance(value, (str, Path)):
        return value
    if not str(value).strip():
        raise ValueError("expected a path, got an empty text")
    try:
        is_path = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise ValueError(f"expected a path, got {value!r}")
    context, key = info.context or {}, info.field_name
    base = None if key in context.get("typed", ()) else context.get("base")
    root = info.data.get("root") if key in ("datalist", "images", "labels") else None
    return Path(os.path.normpath((root or base or Path.cwd()) / Path(value).expanduser()))


def _no_bool(value: Any) -> Any:
    """pydantic would accept yes as 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


def expected(text: str) -> WrapValidator:
    """Says in one line what a key that allows several kinds of values accepts."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            ours = [e["ctx"]["error"] for e in error.errors() if e["type"] == "value_error"]
            raise ValueError(
                ours[0] if ours else f"expected {text}, got {shortened(value)}"
            ) from None

    return WrapValidator(check)


NUMBER = BeforeValidator(_no_bool)
LIST = BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else [value])
PositiveInt = Annotated[int, Field(ge=1), NUMBER]
Count = Annotated[int, Field(ge=0), NUMBER]
Fraction = Annotated[float, Field(ge=0, le=1), NUMBER]
BelowOne = Annotated[float, Field(ge=0, lt=1), NUMBER]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER]
Sizes = Annotated[list[PositiveInt], LIST]
Spacing = Annotated[
    list[Positive | None], Len(3, 3), expected("[x, y, z] in mm, each above 0 or null")
]
Interval = Annotated[
    list[Annotated[float, NUMBER]], Len(2, 2), Predicate(lambda pair: pair[0] <= pair[1])
]
Pair = Annotated[list[Annotated[float, Field(allow_inf_nan=False), NUMBER]], Len(2, 2)]
Window = Annotated[Pair, Predicate(lambda pair: pair[0] < pair[1])]
MeanStd = Annotated[Pair, Predicate(lambda pair: pair[1] > 0)]
Normalization = Literal["zscore", "zscore_foreground", "rescale", "none"]
FilePath = Annotated[Path, BeforeValidator(_absolute)]
FilePaths = Annotated[list[FilePath], Len(1)]
Folder = Annotated[FilePath, expected("a folder")]
Names = Annotated[list[str], Len(1), AfterValidator(check_names)]
ClassNames = Annotated[list[str], Len(2), AfterValidator(check_names)]
Member = Annotated[int | str, expected("the number or name of a class")]
Channel = Annotated[Count | str, expected("the number or name of a channel")]
Orientation = Annotated[str, AfterValidator(check_orientation)]
Axis = Literal["sagittal", "coronal", "axial"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class CaseConfig(_Section):
    """One image (one file, or one per channel) with its label."""

    image: Annotated[FilePath | FilePaths, expected("a file, or a list with one for each channel")]
    """Image file, 4-D for several channels; or a list of one file per channel, all on one grid."""
    label: FilePath
    """Its label file, on the same grid."""
    name: Annotated[str, Field(pattern=r"^[^/\\]+$")] | None = None
    """If omitted, the image's file name; if several share it, with the folders above: `s1_mri_T1`
    for `s1/mri/T1.mgz`."""

    @property
    def images(self) -> tuple[Path, ...]:
        return tuple(self.image) if isinstance(self.image, list) else (self.image,)


class DataConfig(_Section):
    """Which files are read, and how labels and intensities are prepared."""

    root: FilePath | None = None
    """Folder with `dataset.json`, with `images/` and `labels/` (or `imagesTr/`, `labelsTr/`), or a
    BIDS tree: images of `sub-*/[ses-*/]anat/`, labels beside them or below `derivatives/`. Relative
    `datalist`, `images` and `labels` start from it."""
    datalist: FilePath | None = None
    """`dataset.json` of the Decathlon, of MONAI, or of nnU-Net."""
    images: FilePath | None = None
    """Folder of images, paired with `labels` by file name."""
    labels: FilePath | None = None
    """Folder of labels, paired with `images` by file name."""
    cases: list[CaseConfig] | None = None
    """A list of images with their labels."""
    channels: Annotated[
        PositiveInt | Names | None, expected("a number >= 1 or a list of channel names")
    ] = None
    """Number of channels of an image, or their names. If omitted, from the data set
    (`channel_names`, `modality`), or the number of files of a case."""
    image_suffix: Annotated[
        str | Names, expected("a text, or a list with one for each channel")
    ] = ""
    """What follows the case's name in the image's file name: `_T1w`, `_0000`; or a list with one
    for each channel. Files without it are skipped."""
    label_suffix: str = ""
    """What follows the case's name in the label's file name, such as `_seg`."""
    train: Annotated[
        PositiveInt | list[str] | None, expected("a number >= 1 or a list of case names")
    ] = None
    """Number of training cases, in the order of the list (by name for folders), or their names. If
    omitted, all that are not for validation."""
    validation: Annotated[
        Count | list[str] | None, expected("a number >= 0 or a list of case names")
    ] = None
    """Validation cases: how many of those that `train` leaves (the last ones if `train` is
    omitted), or their names. If omitted, those of the datalist, or none."""
    folds: Annotated[
        Annotated[int, Field(ge=2), NUMBER] | FilePath | None,
        expected("a number >= 2, or a file of splits"),
    ] = None
    """Cross-validation: number of parts to divide the cases into (by `seed`), each validated by a
    run that trains on the others; or a file of splits, such as nnU-Net's `splits_final.json`.
    Numbers in `train` and `validation` say how many cases to divide. If omitted, one run."""
    classes: Annotated[
        ClassNames | None, expected("two or more distinct names, background first")
    ] = None
    """Distinct class names, background first. If omitted, from the datalist or `label_map`."""
    label_map: Annotated[
        dict[int, int | str] | FilePath | None,
        expected("label value: class, or a file with such a table"),
    ] = None
    """`{value in the file: class number, class name or ignore}`, or a file with such a table: CSV
    or TSV with columns `value` and `name`. 0 is background unless mapped. If omitted, values are
    class numbers."""
    regions: dict[str, Annotated[list[Member], LIST]] | None = None
    """Overlapping regions and their classes: `{whole: [edema, core], core: core}`. The network has
    a sigmoid for each instead of a softmax over the classes, and regions are scored. If omitted,
    those of an nnU-Net data set, or none."""
    region_classes: list[Member] | None = None
    """The class written for each region, in this order (nnU-Net's `regions_class_order`). If
    omitted, from largest to smallest, each with the one class that no smaller region has."""
    other_labels: Literal["error", "background", "ignore"] = "error"
    """How to treat labels that are not in the map (or ≥ the number of classes)."""
    spacing: Spacing | None = None
    """Voxel size `[x, y, z]` in mm to resample to, null for the file's own. If omitted, as the
    source was trained, or as in the file."""
    geometry: Literal["monai", "nnunet"] = "monai"
    """Resampling, padding and windows. `monai`: linear, centre to centre; the border is repeated
    if a patch is larger; windows at a constant step. `nnunet`: cubic splines, edge to edge; 0
    beyond the volume; windows spread evenly. If omitted, as in the source's tool."""
    crop: Literal["nonzero", "none"] = "none"
    """`nonzero` first crops volumes to the box of voxels other than 0, as nnU-Net does. Outside
    it, segmentations are background. If omitted, as for the source."""
    normalize: Annotated[
        Normalization | Annotated[list[Normalization], Len(1)],
        expected("zscore, zscore_foreground, rescale or none, or a list with one for each channel"),
    ] = "zscore"
    """`zscore`: mean 0 and standard deviation 1 over the image foreground; `zscore_foreground`: the
    same, and 0 outside it; `rescale`: from 0 to 1 over the window, or from lowest to highest
    intensity; `none`. A list has one per channel. If omitted, as for the source, or `zscore`."""
    window: Annotated[
        Window | Annotated[list[Window | None], Len(1)] | None,
        expected("[lo, hi] with lo < hi, or a list with such a pair or null for each channel"),
    ] = None
    """Intensities `[lo, hi]` to clip to first, such as `[-175, 250]` HU in CT. A list has one, or
    null, for each channel. If omitted, as for the source."""
    mean_std: Annotated[
        MeanStd | Annotated[list[MeanStd | None], Len(1)] | None,
        expected("[mean, std] with std > 0, or a list with such a pair or null for each channel"),
    ] = None
    """Mean and standard deviation for `zscore` instead of the image's own, such as those of a whole
    CT data set. If omitted, as for the source."""
    image_foreground: Literal["nonzero", "otsu", "all"] = "nonzero"
    """How brain or body is separated from air: `nonzero`, `otsu` (a threshold, if air is not 0), or
    `all` voxels. If omitted, as in the source's normalization, or `nonzero`."""
    slice_axis: Axis = "axial"
    """Which slices a 2-D network sees."""
    storage: Literal["auto", "memory", "disk"] = "auto"
    """Where prepared volumes are kept: in memory, or as memory-mapped files in the cache, for
    cohorts larger than memory. `auto` uses the disk above half of the available memory."""

    @property
    def image_suffixes(self) -> list[str]:
        """One for each channel."""
        return [self.image_suffix] if isinstance(self.image_suffix, str) else self.image_suffix

    @model_validator(mode="after")
    def _one_way_to_list_files(self) -> DataConfig:
        given = [k for k in ("datalist", "images", "cases") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one of datalist, images + labels, cases; got {given}")
        if (self.images is None) != (self.labels is None):
            raise ValueError("expected images and labels together, got one of them")
        lists = [key for key in ("train", "validation") if isinstance(getattr(self, key), list)]
        if self.folds is not None and lists:
            raise ValueError(f"folds divide the cases: expected no list beside them, got {lists}")
        if not given and self.root is None:
            raise ValueError(
                "no data given: set root (a folder with dataset.json or with images/ and labels/), "
                "datalist, images and labels, or cases"
            )
        return self


class NetworkConfig(_Section):
    """A network of MONAI or nnU-Net and its arguments (channels follow from the classes)."""

    name: str
    """A class of `monai.networks.nets`, such as `UNet`, `DynUNet`, `SegResNet`, `SwinUNETR`; or
    nnU-Net's `PlainConvUNet`, `ResidualEncoderUNet`, `ResidualUNet` (package
    `dynamic-network-architectures`)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its arguments. `spatial_dims: 2` works slice by slice, 3 on volumes (nnU-Net's networks:
    `conv_op: torch.nn.Conv2d` or `Conv3d`). Channels follow from the data and the classes."""
    orientation: Orientation | None = None
    """Order and directions of the axes that the network sees, in nibabel's letters: `SAR` for a
    volume, `AR` for a slice. If omitted, as the data are prepared, or as the source sees them."""


class SourceConfig(_Section):
    """The frozen source model, which provides the weights and the transfer risk."""

    checkpoint: Annotated[FilePath, expected("a file, or the folder of a MONAI bundle")]
    """A checkpoint of this package or of nnU-Net v2 (`checkpoint_final.pth`), a MONAI bundle (its
    folder or `models/model.pt`), or a state dict in a file of tensors and plain types: loading
    other objects would run their code."""
    network: NetworkConfig | None = None
    """Needed for a bare state dict. If omitted, from the checkpoint or bundle."""
    classes: Annotated[
        PositiveInt | Names | None, expected("a number >= 1 or a list of class names")
    ] = None
    """Class names, background first, or their number; needed for a bare state dict, as above."""
    orientation: Annotated[Orientation, Field(min_length=3)] | None = None
    """Order of the axes in the source's training images, such as `LPS`: for nnU-Net models, and
    for MONAI bundles that do not specify it. If omitted, `RAS`."""
    channels: list[Channel] | None = None
    """Channels of the target images that the source sees, in its own order. If omitted, all."""
    initialize: bool = True
    """Start from the source's weights; false uses only its risk map."""
    head: Literal["auto", "keep", "reinitialize"] = "auto"
    """The output layer: `auto` is fresh if the class counts differ or only one of the two has
    regions; `keep` takes the source's; `reinitialize` is fresh for equal class counts, too."""


class RiskConfig(_Section):
    """The transfer risk map (options of riskmap_ext.risk_map)."""

    use: bool = False
    """Weight the loss by the map; the report has it whenever there is a source. Off by default: on
    top of an output layer that starts at the class prior, it finds more of a structure, less
    precisely, and its Dice is not ahead (docs/evidence.md)."""
    scheme: Literal["exponential", "power", "linear"] = "linear"
    """How a weight follows from the hardness (docs/method.md). The paper uses `exponential`;
    `linear` was never worse in the first round (docs/evidence.md)."""
    base: Positive = 10.0
    """Weight of the hardest voxel, scheme `exponential`."""
    alpha: Annotated[float, Field(gt=0, le=1), NUMBER] = 0.5
    """Exponent of the scheme `power`."""
    scale: NonNegative = 9.0
    """Weight of the hardest voxel minus 1, scheme `linear`."""
    range: Annotated[
        Literal["dataset", "image"] | Interval,
        expected("dataset, image or [lo, hi] with lo <= hi"),
    ] = "dataset"
    """Hardness range that maps to the full range of weights: that of the training set, of each
    image, or `[lo, hi]` in nats."""


class LossConfig(_Section):
    """The loss (options of riskmap_ext.weighted_loss)."""

    ce_weight: NonNegative = 1.0
    """Factor of the cross-entropy part."""
    dice_weight: NonNegative = 1.0
    """Factor of the soft Dice part."""
    normalization: Literal[
        "foreground", "batch_foreground", "valid", "batch_valid", "weighted", "none"
    ] = "foreground"
    """What divides the weighted cross-entropy: foreground voxels (brain or body, not air) or valid
    ones, of each image or of the batch; the batch's class weights at valid ones; nothing."""
    foreground_floor: Fraction = 0.05
    """Lower bound for the foreground's share of the valid voxels: the cross-entropy is scaled up by
    at most 1 / `foreground_floor`."""
    ce_voxels: Literal["valid", "foreground"] = "valid"
    """Voxels over which the cross-entropy is summed."""
    class_weights: Annotated[
        Literal["sqrt_inverse_frequency"] | list[NonNegative] | None,
        expected("sqrt_inverse_frequency, a list of numbers >= 0 or null"),
    ] = None
    """Of the cross-entropy, background first, besides the risk map; or `sqrt_inverse_frequency`:
    √(1/f) with mean 1 over the training voxels, 0 for a class that they lack. Null: all 1."""
    label_smoothing: Fraction = 0.0
    """As in `torch.nn.functional.cross_entropy`: class weights also apply to what it spreads."""
    include_background: bool = False
    """Whether the background class counts in the Dice."""
    batch_dice: bool = False
    """One Dice over the voxels of the batch, of all processes, instead of one per image."""
    squared_pred: bool = False
    """Squared probabilities in the denominator of the Dice, as in MONAI's `DiceLoss`."""
    alpha: NonNegative = 0.5
    """Weight of false positives in the Dice. 1 with `beta` 1: Jaccard; other values: Tversky."""
    beta: NonNegative = 0.5
    """Weight of false negatives in the Dice."""
    smooth_nr: NonNegative = 1e-5
    """Added to the numerator of the Dice."""
    smooth_dr: NonNegative = 1e-5
    """Added to the denominator of the Dice."""
    overwrite_logits: bool = False
    """Let the gradient overwrite the logits. Not for networks with stacked outputs (DynUNet with
    deep supervision), nor if the last layer is an activation."""
    fused_head: Annotated[Literal["auto"] | bool, expected("auto, true or false")] = "auto"
    """Let the loss compute the network's last 1x1 convolution, so that training keeps no logits.
    `auto` does so from 16 outputs on if the network ends in one; `true` rejects other networks."""

    @model_validator(mode="after")
    def _something_to_minimize(self) -> LossConfig:
        if self.ce_weight == 0 and self.dice_weight == 0:
            raise ValueError("expected ce_weight or dice_weight above 0, got 0 for both")
        return self


class AugmentConfig(_Section):
    """Random changes of each crop."""

    flip: list[Axis] = Field(default_factory=list)
    """Axes to mirror, each with probability 1/2; `sagittal` swaps left and right."""
    affine_probability: Fraction = 0.5
    """Share of crops that are rotated and scaled."""
    rotation: Annotated[float, Field(ge=0, le=180), NUMBER] = 15.0
    """Largest angle, degrees; crops rotate in millimetres, so anisotropic voxels are fine."""
    scale: BelowOne = 0.15
    """Largest relative change of size."""
    intensity_probability: Fraction = 0.5
    """Share of crops whose brightness, contrast and gamma change."""
    brightness: NonNegative = 0.1
    """Standard deviation of the shift, in standard deviations of the image foreground."""
    contrast: BelowOne = 0.2
    """Largest relative change of the contrast."""
    gamma: BelowOne = 0.2
    """Exponents from `1 - gamma` to `1 / (1 - gamma)`."""
    noise_probability: Fraction = 0.2
    """Share of crops that get Gaussian noise."""
    noise: NonNegative = 0.1
    """Its largest standard deviation, in standard deviations of the image foreground."""


class TrainConfig(_Section):
    """The optimisation."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 2
    """Crops per step, divided among the processes of torchrun."""
    accumulate: PositiveInt = 1
    """Batches whose gradients are averaged in one step."""
    patch_size: Sizes | None = None
    """The crop in voxels, one number or one per axis. Null: 128² in 2-D, 64³ in 3-D."""
    lr: Positive = 1e-3
    """Learning rate at the first step."""
    weight_decay: NonNegative = 1e-5
    """Of the optimizer."""
    optimizer: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    """A class of `torch.optim`; SGD uses Nesterov momentum."""
    momentum: Fraction = 0.99
    """For SGD."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """Learning rate over the steps: `poly` is `(1 - step/steps)^0.9`, `cosine` half a wave."""
    validate_every: Count = 100
    """Steps between validations; 0 validates only at the end."""
    foreground_crops: Fraction = 1 / 3
    """Share of crops centred on a foreground voxel."""
    crop_balance: Literal["class", "voxel"] = "class"
    """How that voxel is drawn: each class, or each voxel, with equal probability."""
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    head_init: Literal["prior", "random"] = "prior"
    """Where a fresh output layer starts: `prior` adds the log frequency of each class in the
    training cases (for a region: its logit) to the bias, `random` leaves it unchanged."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision; `fp16` needs CUDA."""
    channels_last: bool = False
    """Keep network and crops in channels-last memory, which speeds up some convolutions."""
    compile: bool = False
    """Run the network through `torch.compile`: minutes at the start, then faster steps."""
    grad_clip: Positive | None = 12.0
    """Largest norm of the gradient; null does not clip."""


class InferenceConfig(_Section):
    """Sliding windows of validation, of the final prediction and of the source model."""

    patch_size: Sizes | None = None
    """Window in voxels, one number or one per axis. Null: the training patch."""
    overlap: BelowOne = 0.25
    """Overlap of neighbouring windows, as a share."""
    batch_size: PositiveInt | None = None
    """Windows per forward pass. Null: 16 slices, or 2 volumes."""


class WriteConfig(_Section):
    """Which of the larger outputs to write."""

    maps: bool = True
    """Transferability and risk maps."""
    predictions: bool = True
    """Segmentations of the validation cases."""
    overlays: Annotated[bool | Count, expected("true, false or a number >= 0")] = True
    """Pictures of the validation cases, or the number of them."""
    tensorboard: bool = True
    """The columns of `metrics.csv` and pictures of a validation case, as TensorBoard events."""
    report: bool = True
    """`report.html`, the run on one page."""


class Config(_Section):
    """A whole run. Field by field: docs/reference/config.md."""

    output: Folder
    """Folder for the results."""
    overwrite: bool = False
    """Replace the run in `output`."""
    cache: Folder | None = None
    """Folder for statistics and maps, which runs may share. Null: `OUTPUT/cache`."""
    seed: Annotated[int, Field(ge=0, lt=2**32), NUMBER] = 0
    """For weights, crops, augmentation and folds."""
    device: Annotated[
        str,
        Field(pattern=DEVICE.pattern),
        expected("auto, cpu, cuda or cuda:N (the driver runs on the CPU and on CUDA devices)"),
    ] = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`; `auto` uses CUDA if torch and this package have it."""
    threads: PositiveInt | None = None
    """CPU threads, at most 4 for each CPU of the machine. Null: torch's number."""
    data: DataConfig
    """The cases."""
    network: NetworkConfig | None = None
    """If omitted, the source's network."""
    source: SourceConfig | None = None
    """If omitted, the network is trained from scratch: use this to make a source model."""
    risk: RiskConfig = Field(default_factory=RiskConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    write: WriteConfig = Field(default_factory=WriteConfig)

    @model_validator(mode="after")
    def _network_known(self) -> Config:
        if self.network is None and self.source is None:
            raise ValueError(
                "network: expected a name and args, or a source to take them from; got neither"
            )
        if self.source is None and self.risk.use:
            raise ValueError("risk.use: true needs a source model; set source.checkpoint")
        weights = self.loss.class_weights
        if isinstance(weights, list) and not any(weights) and not self.loss.dice_weight:
            raise ValueError(
                "loss.class_weights: all are 0, and there is no Dice: nothing is learnt"
            )
        given = {} if self.network is None else self.network.args
        if self.loss.overwrite_logits and given.get("deep_supervision"):
            raise ValueError(
                "loss.overwrite_logits: expected false with network.args.deep_supervision, which "
                "stacks the logits with other outputs; got true"
            )
        return self

    @property
    def notes(self) -> list[str]:
        """Warnings about settings that have no effect, or a bad one."""
        found, given = [], self.risk.model_fields_set
        if given and "use" not in given:
            keys = ", ".join(f"risk.{key}" for key in sorted(given))
            why = "there is no source, so that no map is made"
            if self.source is not None:
                why = "the map is for the report only; risk.use=true gives it to the loss"
            found.append(f"{keys}: {why}")
        if self.loss.label_smoothing > 0 and self.loss.class_weights is not None:
            found.append(
                "loss.class_weights weigh what loss.label_smoothing spreads, too: strong ones can "
                "draw all voxels to rare classes"
            )
        return found

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives the same run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
