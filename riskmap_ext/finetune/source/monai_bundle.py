"""MONAI bundles as sources: reads configs/ and models/model.pt, and evaluates nothing.

A bundle's configuration is a program: its `$` texts are Python, and `_target_` names what to
import. Only plain values are read here, and the one class comes from monai.networks.nets.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from riskmap_ext.finetune.base.errors import CheckpointError, ConfigError, shortened
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, check_orientation
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.config.yaml_text import read_mapping
from riskmap_ext.finetune.source.model import (
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

_MOST_VALUES, _DEEPEST = 10_000, 150
_CONFIGS = ("inference", "train", "evaluate")
_ENDINGS = (".json", ".yaml", ".yml")
_NETWORKS = ("network_def", "network", "net")
_NETS = re.compile(r"(monai\.networks\.nets\.(\w+\.)?)?(?P<name>\w+)")
_NO_CHANGE = (
    *("LoadImage", "EnsureChannelFirst", "AddChannel", "EnsureType", "CastToType", "ToTensor"),
)
_SET_BOTH = "set source.network and source.classes"


def bundle_root(path: Path) -> Path | None:
    """The folder of the bundle that `path` is, or whose weights it is; None if of no bundle."""
    root = path if path.is_dir() else path.parent.parent
    of_bundle = path.is_dir() or path.parent.name == "models"
    return root if of_bundle and (root / "configs").is_dir() else None


def bundle_source(source: SourceConfig, root: Path) -> SourceModel:
    """Raises: CheckpointError naming the file and what is missing or would need evaluation."""
    file, key, config = _definition(root)
    place = f"{file}: {key}"
    with placed(f"{place}: "):
        definition = _resolved(config[key], config)
    network = _network(definition, place)
    metadata_file = root / "configs" / "metadata.json"
    metadata = _read(metadata_file) if os.path.lexists(metadata_file) else ConfigParser({})
    with placed(f"{place}: "):
        outputs, channels = _count(network, OUT_ARGUMENTS), _count(network, IN_ARGUMENTS)
        dims = spatial_dims(network)
    with placed(f"{file}: "):
        preprocessing, seen = _preprocessing(config)
    patch = metadata.get("network_data_format::inputs::image::spatial_shape")
    if isinstance(patch, list) and all(type(size) is int and size > 0 for size in patch):
        preprocessing |= {"patch_size": patch} if len(patch) == dims else {}
    notes: list[str] = []
    if dims == 3:
        if seen is None:
            why = "the bundle does not say in which order of axes it was trained"
            seen, notes = stored_orientation(source, why)
        network.orientation = seen
        for name, sizes in preprocessing.items():
            if name in ("patch_size", "spacing") and isinstance(sizes, list) and len(sizes) == 3:
                preprocessing[name] = arranged(sizes, seen, PREPARED["axial"])
    else:
        # Nor does it say which slices it sees.
        preprocessing.pop("spacing", None)
    names = _channel_names(metadata, "inputs::image", channels)
    structures = given_structures(source)
    if structures is None:
        with placed(f"{file}: "):
            structures = _structures(metadata_file, metadata, config, outputs)
    return SourceModel(
        path=source.checkpoint,
        config=network,
        structures=structures,
        channels=names or numbered("channel", channels),
        preprocessing=preprocessing,
        told=f"{file} describes {network.name}",
        notes=notes,
    )


def _definition(root: Path) -> tuple[Path, str, ConfigParser]:
    """The file with the first description of a network, its key, and the file's content."""
    files = [root / "configs" / f"{name}{ending}" for name in _CONFIGS for ending in _ENDINGS]
    configs = {file: _read(file) for file in files if os.path.lexists(file)}
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


def _read(file: Path) -> ConfigParser:
    """Only its methods that look up texts are used; parse() would import and evaluate."""
    return ConfigParser(read_mapping(file, CheckpointError)[0])


def _resolved(value: Any, config: ConfigParser) -> Any:
    """The value with each `@a::b` replaced by what it refers to, if that is in the same file.

    Raises: ConfigError for references to references that stand for more than memory holds.
    """
    count = 0

    def resolved(value: Any, seen: tuple[str, ...], depth: int) -> Any:
        nonlocal count
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise ConfigError(f"references (@) stand for more than {_MOST_VALUES:,} values")
        if isinstance(value, dict):
            return {key: resolved(each, seen, depth + 1) for key, each in value.items()}
        if isinstance(value, list):
            return [resolved(each, seen, depth + 1) for each in value]
        found = None
        if isinstance(value, str) and value.startswith("@") and value not in seen:
            found = config.get(value[1:])
        return value if found is None else resolved(found, (*seen, value), depth + 1)

    return resolved(value, (), 0)


def _network(definition: dict[str, Any], place: str) -> NetworkConfig:
    target = definition.get("_target_")
    match = _NETS.fullmatch(str(target))
    if match is None or monai_class(match["name"]) is None:
        raise CheckpointError(
            f"{place}._target_: expected a class of monai.networks.nets, got {shortened(target)}, "
            "which "
            f"is not imported; {_SET_BOTH}"
        )
    # MONAI uses _desc_, _requires_, _disabled_ and _mode_ itself; the weights are the proof.
    args = {name: value for name, value in definition.items() if not name.startswith("_")}
    _check_plain(args, place)
    return NetworkConfig(name=match["name"], args=args)


def _check_plain(value: Any, place: str) -> None:
    """Raises: CheckpointError for expressions, macros and components, which are never evaluated."""
    component = isinstance(value, dict) and "_target_" in value
    if component or (isinstance(value, str) and value[:1] in ("$", "%", "@")):
        raise CheckpointError(
            f"{place}: expected a plain value, got {'the component ' * component}"
            f"{shortened(value)}, which is not evaluated; {_SET_BOTH}"
        )
    listed = dict(enumerate(value)) if isinstance(value, list) else value
    for key, each in listed.items() if isinstance(listed, dict) else ():
        _check_plain(each, f"{place}.{key}")


def _count(network: NetworkConfig, names: tuple[str, ...]) -> int:
    parameter = channel_parameter(network, names)
    value = network.args.get(parameter.name, parameter.default)
    if type(value) is not int or value < 1:
        got = "nothing" if value is parameter.empty else repr(value)
        raise ConfigError(
            f"network.args.{parameter.name}: expected a number of channels, got {got}"
        )
    return value


def _channel_names(metadata: ConfigParser, side: str, count: int) -> list[str] | None:
    """From {"0": name, ...}, if it names each of `count` channels and no two alike."""
    given = metadata.get(f"network_data_format::{side}::channel_def")
    if not isinstance(given, dict):
        return None
    names = [str(given.get(str(number), "")).strip() for number in range(count)]
    complete = len(given) == len(set(names) - {""}) == count
    return names if complete else None


def _structures(
    file: Path, metadata: ConfigParser, config: ConfigParser, outputs: int
) -> Structures:
    """Classes of a softmax, or the one region of a single sigmoid.

    Raises: CheckpointError for several sigmoids: nothing says which labels make up each of them.
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
            "treat them as mutually exclusive classes, background first"
        )
    return Structures(names or numbered("class", outputs))


def _transforms(config: ConfigParser, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Names (without the endings d, D, Dict) and arguments of a Compose's transforms."""
    section = _resolved(config.get(key), config)
    listed = section.get("transforms") if isinstance(section, dict) else section
    return [
        (re.sub(r"(d|D|Dict)$", "", str(each.get("_target_")).rpartition(".")[2]), each)
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, dict) and each.get("_disabled_") is not True
    ]


def _window(transform: dict[str, Any]) -> dict[str, Any] | None:
    """`window` and `mean_std` of a transform from one range of intensities to another."""
    numbers: list[Any] = [transform.get(name) for name in ("a_min", "a_max", "b_min", "b_max")]
    if not all(type(each) in (int, float) for each in numbers):
        return None
    low, high, start, end = map(float, numbers)
    if low >= high or start >= end:
        return None
    unit = (high - low) / (end - start)
    clips = transform.get("clip") is True
    return {"mean_std": [low - start * unit, unit], "window": [low, high] if clips else None}


def _preprocessing(config: ConfigParser) -> tuple[dict[str, Any], str | None]:
    """What the bundle's transforms do to an image, as far as the driver can express it.

    Also the axis letters of the volumes that the network sees.
    """
    transforms = _transforms(config, "preprocessing")
    made: dict[str, Any] = {"spacing": None} if transforms else {}
    scales: list[str] = []
    seen = None
    for name, transform in transforms:
        whole = transform.get("subtrahend") is None and transform.get("divisor") is None
        if name == "Spacing":
            made["spacing"] = transform.get("pixdim")
        elif name == "NormalizeIntensity" and whole:
            nonzero = transform.get("nonzero") is True
            scales.append("zscore_foreground" if nonzero else "zscore")
            made["image_foreground"] = "nonzero" if nonzero else "all"
        elif name == "ScaleIntensityRange" and (given := _window(transform)):
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
