"""MONAI bundles as sources: what configs/ and models/model.pt say, with nothing of it evaluated.

A bundle's configuration is a program: its `$` texts are Python, and `_target_` names what to
import. Here plain values alone are read, and the one class comes from monai.networks.nets.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from riskmap_ext.finetune.base.errors import CheckpointError, ConfigError
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, check_orientation
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.config.yaml_text import read_mapping
from riskmap_ext.finetune.source.file import (
    SourceModel,
    given_structures,
    numbered,
    placed,
    stored_orientation,
)
from riskmap_ext.finetune.source.network import (
    IN_ARGUMENTS,
    OUT_ARGUMENTS,
    channel_parameter,
    monai_class,
    spatial_dims,
)

_CONFIGS = ("inference", "train", "evaluate")
_ENDINGS = (".json", ".yaml", ".yml")
_NETWORKS = ("network_def", "network", "net")
_NETS = re.compile(r"(monai\.networks\.nets\.(\w+\.)?)?(?P<name>\w+)")
# Of the layouts of the specification: _target_, and name or path with args before it.
_CLASS_KEYS = ("_target_", "name", "<name>", "path", "<path>")
_ARGS_KEYS = ("args", "<args>")
# Arguments that older versions of MONAI's networks took and that change no weight.
_RETIRED = ("img_size",)
_NO_CHANGE = (
    "LoadImage",
    "EnsureChannelFirst",
    "AddChannel",
    "EnsureType",
    "CastToType",
    "ToTensor",
)
_SET_BOTH = "set source.network and source.classes"


def bundle_root(path: Path) -> Path | None:
    """The folder of the bundle that `path` is, or whose weights it is; None where it is of none."""
    root = path if path.is_dir() else path.parent.parent
    of_bundle = path.is_dir() or path.parent.name == "models"
    return root if of_bundle and (root / "configs").is_dir() else None


def bundle_source(source: SourceConfig, root: Path) -> SourceModel:
    """Raises: CheckpointError naming the file and what is missing or would have to be evaluated."""
    file, key, config = _definition(root)
    place = f"{file}: {key}"
    network = _network(config, config[key], place)
    metadata_file = root / "configs" / "metadata.json"
    metadata = _read(metadata_file) if metadata_file.is_file() else {}
    with placed(f"{place}: "):
        outputs, channels = _count(network, OUT_ARGUMENTS), _count(network, IN_ARGUMENTS)
        dims = spatial_dims(network)
    preprocessing, seen = _preprocessing(config)
    size = _looked_up(metadata, "network_data_format::inputs::image::spatial_shape")
    if isinstance(size, list) and len(size) == dims and all(type(n) is int and n > 0 for n in size):
        preprocessing["patch_size"] = size
    notes: list[str] = []
    if dims == 3:
        if seen is None:
            why = "the bundle does not say in which order of axes it was trained"
            seen, notes = stored_orientation(source, why)
        network.orientation = seen
        for name in ("patch_size", "spacing"):
            if preprocessing.get(name) is not None:
                preprocessing[name] = arranged(preprocessing[name], seen, PREPARED["axial"])
    else:
        # Nor does it say which slices it sees.
        preprocessing.pop("spacing", None)
    names = _channel_names(metadata, "inputs::image", channels)
    return SourceModel(
        path=source.checkpoint,
        config=network,
        structures=given_structures(source)
        or _structures(metadata_file, metadata, config, outputs),
        channels=names or numbered("channel", channels),
        preprocessing=preprocessing,
        told=f"{file} describes {network.name}",
        notes=notes,
    )


def _definition(root: Path) -> tuple[Path, str, dict[str, Any]]:
    """The file with the first description of a network, its key, and the content of the file."""
    files = [root / "configs" / f"{name}{ending}" for name in _CONFIGS for ending in _ENDINGS]
    configs = {file: _read(file) for file in files if file.is_file()}
    found = [(file, key) for file, each in configs.items() for key in _NETWORKS if key in each]
    for file, key in found:
        if isinstance(configs[file][key], dict):
            return file, key, configs[file]
    got = ", ".join(f"{key}: {configs[file][key]!r} in {file.name}" for file, key in found)
    raise CheckpointError(
        f"{root / 'configs'}: expected inference or train as .json or .yaml with network_def, a "
        f"class of monai.networks.nets with plain arguments; got {got or 'none'}, and nothing is "
        f"evaluated; {_SET_BOTH}"
    )


def _read(file: Path) -> dict[str, Any]:
    return read_mapping(file, CheckpointError)[0]


def _network(config: dict[str, Any], definition: dict[str, Any], place: str) -> NetworkConfig:
    class_key = next((key for key in _CLASS_KEYS if key in definition), "_target_")
    target = definition.get(class_key)
    match = _NETS.fullmatch(target) if isinstance(target, str) else None
    network = monai_class(match["name"]) if match else None
    if match is None or network is None:
        raise CheckpointError(
            f"{place}.{class_key}: expected a class of monai.networks.nets, got {target!r}, which "
            f"is not imported; {_SET_BOTH}"
        )
    # MONAI takes _desc_, _requires_, _disabled_ and _mode_ for itself; the weights are the proof.
    args = {k: v for k, v in definition.items() if k not in _CLASS_KEYS and not k.startswith("_")}
    inner = next((args.pop(name) for name in _ARGS_KEYS if name in args), None)
    if isinstance(inner, dict):
        args = {**inner, **args}
    for name in _RETIRED:
        if name not in inspect.signature(network).parameters:
            args.pop(name, None)
    return NetworkConfig(name=match["name"], args=_plain(args, place, config))


def _plain(value: Any, place: str, config: dict[str, Any], seen: tuple[str, ...] = ()) -> Any:
    """The value with `@` references to plain values of the same file put in.

    Raises: CheckpointError for expressions, macros and components, which are never evaluated.
    """
    if isinstance(value, dict):
        if any(name in value for name in ("_target_", "<name>", "<path>")):
            raise CheckpointError(f"{place}: expected a plain value, got a component: {value!r}")
        return {k: _plain(v, f"{place}.{k}", config, seen) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(each, f"{place}.{n}", config, seen) for n, each in enumerate(value)]
    if not isinstance(value, str) or value[:1] not in ("$", "%", "@"):
        return value
    found = _referenced(value, config)
    if found in (None, value) or value in seen:
        raise CheckpointError(
            f"{place}: expected a plain value, got {value!r}, which is not evaluated; {_SET_BOTH}"
        )
    return _plain(found, place, config, (*seen, value))


def _referenced(value: Any, config: dict[str, Any]) -> Any:
    """What `@a::b` stands for; other values as they are."""
    is_reference = isinstance(value, str) and value.startswith("@")
    return _looked_up(config, value[1:]) if is_reference else value


def _looked_up(config: Any, identifier: str) -> Any:
    """Of `a::b::0`, or `a#b#0` as older bundles write it; None where there is nothing."""
    for part in re.split(r"::|#", identifier):
        try:
            config = config[int(part) if isinstance(config, list) else part]
        except (LookupError, TypeError, ValueError):
            return None
    return config


def _count(network: NetworkConfig, names: tuple[str, ...]) -> int:
    parameter = channel_parameter(network, names)
    value = network.args.get(parameter.name, parameter.default)
    if type(value) is not int or value < 1:
        got = "nothing" if value is parameter.empty else repr(value)
        raise ConfigError(
            f"network.args.{parameter.name}: expected a number of channels, got {got}"
        )
    return value


def _channel_names(metadata: Mapping[str, Any], side: str, count: int) -> list[str] | None:
    """Of {"0": name, ...}, where it names each of `count` channels and no two alike."""
    given = _looked_up(metadata, f"network_data_format::{side}::channel_def")
    if not isinstance(given, dict):
        return None
    by_number = {str(number): str(name).strip() for number, name in given.items()}
    names = [by_number.get(str(number), "") for number in range(count)]
    complete = len(by_number) == count and all(names) and len(set(names)) == count
    return names if complete else None


def _structures(
    file: Path, metadata: Mapping[str, Any], config: dict[str, Any], outputs: int
) -> Structures:
    """Classes of a softmax, or the one region of a single sigmoid.

    Raises: CheckpointError for several sigmoids: which labels make up each of them is nowhere told.
    """
    names = _channel_names(metadata, "outputs::pred", outputs)
    if outputs == 1:
        name = names[0] if names else "class 1"
        return structures_of(["background", name], {name: [1]}, [1])
    sigmoid = any(
        name == "Activations" and transform.get("sigmoid") is True
        for name, transform in _transforms(config, "postprocessing")
    )
    first = names[0] if names else "background"
    if sigmoid or not re.search(r"\b(background|bg|else)\b", first, re.IGNORECASE):
        what = "sigmoids" if sigmoid else f"channels of which the first is {first!r}"
        raise CheckpointError(
            f"{file}: its {outputs} outputs are {what}, so they may overlap, and the bundle does "
            "not say of which labels each is made; set source.classes to their number or names to "
            "take them as classes that exclude each other, background first"
        )
    return Structures(names or numbered("class", outputs))


def _transforms(config: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """Names (without the endings d, D, Dict) and arguments of a Compose's transforms."""
    section = config.get(key)
    listed = section.get("transforms") if isinstance(section, dict) else section
    found = []
    for each in listed if isinstance(listed, list) else []:
        transform = _referenced(each, config)
        if isinstance(transform, dict) and transform.get("_disabled_") is not True:
            name = str(transform.get("_target_", "")).rpartition(".")[2]
            found.append((re.sub(r"(d|D|Dict)$", "", name), transform))
    return found


def _window(transform: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """`window` and `mean_std` of a range of intensities that becomes another range."""
    names = ("a_min", "a_max", "b_min", "b_max")
    numbers = [_referenced(transform.get(name), config) for name in names]
    if not all(type(each) in (int, float) for each in numbers) or numbers[0] >= numbers[1]:
        return None
    low, high, start, end = map(float, numbers)
    if start >= end:
        return None
    unit = (high - low) / (end - start)
    clips = _referenced(transform.get("clip"), config) is True
    return {"mean_std": [low - start * unit, unit], "window": [low, high] if clips else None}


def _preprocessing(config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """What the bundle's transforms make of an image, as far as the driver has words for it.

    Also the letters of the axes of the volumes that the network sees.
    """
    transforms = _transforms(config, "preprocessing")
    made: dict[str, Any] = {"spacing": None} if transforms else {}
    scales: list[str] = []
    seen = None
    for name, transform in transforms:
        whole = transform.get("subtrahend") is None and transform.get("divisor") is None
        if name == "Spacing":
            made.pop("spacing", None)
            sizes = _referenced(transform.get("pixdim"), config)
            numbers = sizes if isinstance(sizes, list) else []
            # -1 is the file's own.
            good = all(isinstance(each, (int, float)) and each > 0 for each in numbers)
            if len(numbers) == 3 and good:
                made["spacing"] = [float(each) for each in numbers]
        elif name == "NormalizeIntensity" and whole:
            nonzero = transform.get("nonzero") is True
            scales.append("zscore_foreground" if nonzero else "zscore")
            made["image_foreground"] = "nonzero" if nonzero else "all"
        elif name == "ScaleIntensityRange" and (given := _window(transform, config)):
            scales.append("zscore")
            made |= given
        elif name == "Orientation":
            canonical = transform.get("as_closest_canonical") is True
            with suppress(ValueError):
                seen = check_orientation("RAS" if canonical else transform.get("axcodes"))
        elif name not in _NO_CHANGE:
            scales.append(str(transform.get("_target_")))
    if transforms:
        made["normalize"] = ", ".join(scales) or "none"
    return made, seen if seen is None or len(seen) == 3 else None
