"""Segments unlabelled images with a trained checkpoint, on the images' own grids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from riskmap_ext.finetune.base.device import device_of
from riskmap_ext.finetune.base.errors import CheckpointError, ConfigError, DataError, Problems
from riskmap_ext.finetune.base.files import check_replaceable, check_there, stem
from riskmap_ext.finetune.base.log import Log, some
from riskmap_ext.finetune.config.schema import Config, DataConfig, InferenceConfig, SourceConfig
from riskmap_ext.finetune.data.datalist import volumes_in
from riskmap_ext.finetune.data.prepare import read_image, warn_of_blank
from riskmap_ext.finetune.data.splits import SPLITS_FILE
from riskmap_ext.finetune.data.volumes import read_header
from riskmap_ext.finetune.folder.workspace import check_folder, finished, fold_folders
from riskmap_ext.finetune.source.checkpoint import load_source
from riskmap_ext.finetune.source.model import PREPARATION, SourceModel, own_preparation
from riskmap_ext.finetune.source.predictor import predict, write_segmentation
from riskmap_ext.finetune.train.models import predictor_of_source


def predict_images(
    checkpoint: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    suffix: Sequence[str] | None = None,
    orientation: str | None = None,
    device: str = "auto",
    inference: InferenceConfig | None = None,
    overwrite: bool = False,
    skip_existing: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Segments each image by sliding window and writes OUTPUT/NAME.nii.gz.

    Args:
        checkpoint: last.pt or best.pt of a run, which store network, classes and preprocessing; or
            a checkpoint of another tool whose preprocessing `data` can express. If several, or the
            folder of a cross-validation, their probabilities are averaged.
        images: files, or folders of them. A case of several channels has a file for each,
            identified by its suffix, or one 4-D file.
        suffix: what follows the case's name in the file names, one for each channel; None: as in
            training if that had several channels.
        output: folder of the segmentations: class numbers in uint8 (int16 beyond 256 classes), with
            the image's shape, affine, qform and sform codes.
        orientation: of the training files, as `source.orientation`; for other tools' checkpoints.
        device: as in a configuration.
        inference: sliding window; None: with the training's patch size.
        overwrite: replace existing segmentations.
        skip_existing: keep existing segmentations, and segment the other images.
        progress: print the log and a progress bar.

    Returns: the files written. Raises: InputError naming the file: before the first prediction if
    its header is bad, else after all other images are done.
    """
    output = Path(output)
    log = Log(quiet=not progress)
    check_folder("--output", output)
    where = device_of(device)
    given = [checkpoint] if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    models = [load_source(_source(path, orientation)) for path in _checkpoints(map(Path, given))]
    model = models[0]
    channels = len(model.channels)
    if suffix is None and channels > 1:
        suffix = model.preprocessing.get("image_suffix")
    files = _files([Path(each) for each in images], list(suffix or [""]), model.channels)
    targets = {name: output / f"{name}.nii.gz" for name in files}
    _check_targets(files, targets, overwrite or skip_existing)
    if skip_existing:
        files = {name: paths for name, paths in files.items() if not _is_done(targets[name])}
    inference = inference or InferenceConfig()
    for each in models:
        if not (inference.patch_size or each.preprocessing.get("patch_size")):
            raise ConfigError(
                f"{each.path}: does not say which patch size it was trained with; set --patch-size"
            )
    source = SourceConfig(checkpoint=model.path)
    config = Config(output=output, data=_agreed(models), source=source, inference=inference)
    try:
        predictors = [predictor_of_source(config, each, model.channels, where) for each in models]
    except ConfigError as error:
        raise ConfigError(str(error).replace("inference.patch_size", "--patch-size")) from None
    for note in dict.fromkeys(note for each in models for note in each.notes):
        log.warn(note)
    many = f", the mean of {len(models)} models" if len(models) > 1 else ""
    log(
        f"{len(files)} images, {len(model.classes)} classes ({', '.join(model.classes)}){many}, "
        f"windows of {predictors[0].patch}, on {where}"
    )
    written: list[Path] = []
    problems = Problems()
    with log.counting("Predicting", len(files)) as advance:
        for name, paths in files.items():
            with problems.collected():
                case = read_image(paths, name, config.data, channels)
                warn_of_blank(case, log)
                segmentation = predict(predictors, case, model.structures, full=True)
                write_segmentation(targets[name], case, segmentation, model.structures)
                written.append(targets[name])
            advance(name)
    if problems:
        log(f"{len(written)} of {len(files)} images done: {output}")
    problems.tell()
    log(f"Done: {output}")
    return written


def _checkpoints(given: Iterable[Path]) -> list[Path]:
    """The last.pt of a run, or those of a cross-validation's folds.

    Raises: ConfigError for unfinished folds.
    """
    found = []
    for path in given:
        folds = fold_folders(path)
        if missing := [fold.name for fold in folds if not finished(fold)]:
            raise ConfigError(
                f"{path / SPLITS_FILE}: {', '.join(missing)} of its {len(folds)} folds are not "
                "finished; resume with riskmap finetune --resume, or name the checkpoints"
            )
        last = path / "last.pt"
        found += [fold / "last.pt" for fold in folds] or [last if os.path.lexists(last) else path]
    if not found:
        raise ConfigError("checkpoint: expected at least one, got none")
    return found


def _source(checkpoint: Path, orientation: str | None) -> SourceConfig:
    try:
        return SourceConfig(checkpoint=checkpoint, orientation=orientation)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--orientation: {why}") from None


def _files(
    images: Sequence[Path], suffixes: list[str], channels: list[str]
) -> dict[str, tuple[Path, ...]]:
    """Case -> its files. Raises: DataError with a line for each unusable file."""
    if len(suffixes) not in (1, len(channels)):
        raise ConfigError(
            f"--suffix: expected one for each of the {len(channels)} channels "
            f"({', '.join(channels)}), got {len(suffixes)}"
        )
    problems = Problems()
    by_name: dict[str, dict[str, Path]] = {}
    check_there(("--image", images))
    for given in images:
        paths: list[Path] = []
        with problems.collected():
            paths = volumes_in(given) if given.is_dir() else [given]
        for path in paths:
            # If both _T1w and _ce_T1w match, the longer one.
            fitting = [suffix for suffix in suffixes if stem(path).endswith(suffix)]
            suffix = max(fitting, key=len, default=None)
            if suffix is None:
                # In a folder, it is another contrast.
                if path == given:
                    problems.append(f"{path}: its name ends in none of {', '.join(suffixes)}")
                continue
            case = by_name.setdefault(stem(path).removesuffix(suffix), {})
            if suffix in case:
                problems.append(f"{path}: has the same name as {case[suffix]}")
            case[suffix] = path
    cases: dict[str, tuple[Path, ...]] = {}
    for name, case in by_name.items():
        if missing := [name + suffix for suffix in suffixes if suffix not in case]:
            problems.append(f"{name}: no image {', '.join(missing)}")
        cases[name] = tuple(case[suffix] for suffix in suffixes if suffix in case)
        for path in cases[name]:
            with problems.collected():
                read_header(path, len(channels) if len(suffixes) == 1 else 1)
    problems.tell()
    if not cases:
        raise DataError("--image: expected at least one image, got none")
    return cases


def _is_done(target: Path) -> bool:
    """Segmentations appear whole: an empty file is none."""
    return target.exists() and target.stat().st_size > 0


def _check_targets(
    files: dict[str, tuple[Path, ...]], targets: dict[str, Path], overwrite: bool
) -> None:
    for name, target in targets.items():
        if os.path.realpath(target) in map(os.path.realpath, files[name]):
            raise ConfigError(f"--output: {target} is the image itself; choose another folder")
    for target in targets.values():
        check_replaceable(target, "--output")
    held = [str(target) for target in targets.values() if target.exists()]
    if held and not overwrite:
        raise ConfigError(
            f"--output: {some(held, 3)} exists already; --overwrite replaces it, --skip-existing "
            "leaves it"
        )


def _agreed(models: Sequence[SourceModel]) -> DataConfig:
    """The preprocessing that all models share. Raises: CheckpointError naming what differs."""
    prepared = [_preparation(model) for model in models]
    facts = [
        vars(model.structures)
        | {"channels": model.channels}
        | data.model_dump(include=set(PREPARATION))
        for model, data in zip(models, prepared, strict=True)
    ]
    problems = [
        f"{model.path}: expected {key} as of {models[0].path}, {facts[0][key]}; got {value}"
        for model, mine in zip(models, facts, strict=True)
        for key, value in mine.items()
        if value != facts[0][key]
    ]
    if problems:
        raise CheckpointError("\n".join(problems))
    return prepared[0]


def _preparation(model: SourceModel) -> DataConfig:
    """Raises: ConfigError if the training images were prepared in a way that is unknown here."""
    known, unknown = own_preparation(model)
    if not {"normalize", "spacing"} <= known.keys() and not unknown:
        unknown = ["in a way that its file does not say"]
    if unknown:
        raise ConfigError(
            f"{model.path}: its images were prepared {', '.join(unknown)}, which riskmap predict "
            "cannot do; segment with the tool that trained the model, or fine-tune it first"
        )
    return DataConfig(root=Path(), **known)
