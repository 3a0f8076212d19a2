"""MONAI bundles as sources: what configs/ and models/model.pt say, with nothing of it evaluated.

A bundle's configuration is a program: its `$` texts are Python, and `_target_` names what to
import. Here plain values alone are read, and the one class comes from monai.networks.nets.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from riskmap_ext.finetune.base.errors import CheckpointError
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, check_orientation
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.config.yaml_text import read_yaml
from riskmap_ext.finetune.source.file import SourceFile, named_classes, state_dict_in
from riskmap_ext.finetune.source.network import network_class, spatial_dims

_CONFIGS = ("inference", "train", "evaluate")
_ENDINGS = (".json", ".yaml", ".yml")
_NETWORKS = ("network_def", "network", "net")
_NETS = re.compile(r"(monai\.networks\.nets\.(\w+\.)?)?(?P<name>\w+)")
# Of the layouts of the specification: _target_, and name or path with args before it.
_CLASS_KEYS = ("_target_", "name", "<name>", "path", "<path>")
_ARGS_KEYS = ("args", "<args>")
# What MONAI takes for itself, with the value that it has to have here; None: any.
_SETTINGS = {"_desc_": None, "_requires_": None, "_disabled_": False, "_mode_": "default"}
# Arguments that older versions of MONAI's networks took and that change no weight.
_RETIRED = ("img_size",)
_NO_CHANGE = (
    "LoadImage",
    "EnsureChannelFirst",
    "AddChannel",
    "EnsureType",
    "CastToType",
    "ToTensor",
    "Orientation",
)


def bundle_root(path: Path) -> Path | None:
    """The folder of the bundle that `path` is, or whose weights it is; None where it is of none."""
    if path.is_dir():
        inside = (path / "models").is_dir() or (path / "configs").is_dir()
        return path if inside else None
    root = path.parent.parent
    return root if path.parent.name == "models" and _config_files(root) else None


def bundle_weights(path: Path, root: Path) -> Path:
    """models/model.pt of a bundle's folder. Raises: CheckpointError where there is none."""
    if path.is_file():
        return path
    weights = root / "models" / "model.pt"
    if weights.is_file():
        return weights
    there = ", ".join(sorted(each.name for each in (root / "models").glob("*"))) or "nothing"
    hint = "; model.ts is TorchScript, which is not loaded" if "model.ts" in there else ""
    raise CheckpointError(f"{weights}: missing in this MONAI bundle; models holds {there}{hint}")


def bundle_source(source: SourceConfig, root: Path, content: dict[str, Any]) -> SourceFile:
    """content: of its models/model.pt.

    Raises: CheckpointError naming the file and what is missing or would have to be evaluated.
    """
    state = state_dict_in(bundle_weights(source.checkpoint, root), content)
    files = _config_files(root)
    if not files:
        raise CheckpointError(
            f"{root / 'configs'}: expected inference or train as .json or .yaml in this MONAI "
            "bundle, got neither; set source.network and source.classes to use models/model.pt"
        )
    configs = {file: _mapping(file) for file in files}
    file, config, key, definition = _definition(root, configs)
    network = _network(file, config, key, definition)
    metadata_file = root / "configs" / "metadata.json"
    metadata = _mapping(metadata_file) if metadata_file.is_file() else {}
    outputs = _count(network, ("out_channels", "num_classes", "n_classes"), file, key)
    structures = _structures(source, metadata_file, metadata, config, outputs)
    image = _format_of(metadata, "inputs", "image")
    channels = _count(network, ("in_channels",), file, key)
    dims = spatial_dims(network, f"{file}: {key}")
    preprocessing = _preprocessing(config)
    size = image.get("spatial_shape")
    if isinstance(size, list) and len(size) == dims and all(type(n) is int and n > 0 for n in size):
        preprocessing["patch_size"] = size
    notes: list[str] = []
    if dims == 3:
        seen, notes = _seen_orientation(source, config, root)
        network = network.model_copy(update={"orientation": seen})
        for name in ("patch_size", "spacing"):
            if preprocessing.get(name) is not None:
                preprocessing[name] = arranged(preprocessing[name], seen, PREPARED["axial"])
    else:
        # Nor does it say which slices it sees.
        preprocessing.pop("spacing", None)
    return SourceFile(
        source.checkpoint,
        state,
        network,
        structures,
        _named(image.get("channel_def"), channels) or [f"channel {n}" for n in range(channels)],
        preprocessing,
        f"{file}: {key}",
        f"{file} describes {network.name}",
        "set source.network and source.classes to the model's own",
        notes,
    )


def _config_files(root: Path) -> list[Path]:
    files = [root / "configs" / f"{name}{ending}" for name in _CONFIGS for ending in _ENDINGS]
    return [file for file in files if file.is_file()]


def _mapping(file: Path) -> dict[str, Any]:
    kind = "JSON" if file.suffix == ".json" else "YAML"
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if kind == "JSON" else read_yaml(text)[0]
    except (OSError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{file}: cannot be read as {kind} ({text})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a mapping, got {type(content).__name__}")
    return content


def _definition(
    root: Path, configs: Mapping[Path, dict[str, Any]]
) -> tuple[Path, dict[str, Any], str, dict[str, Any]]:
    """The first description of a network: its file, that file's content, its key, itself."""
    for file, config in configs.items():
        for key in _NETWORKS:
            if isinstance(config.get(key), dict):
                return file, config, key, config[key]
    for file, config in configs.items():
        for key in _NETWORKS:
            if key in config:
                raise CheckpointError(
                    f"{file}: {key}: expected a class of monai.networks.nets with plain arguments, "
                    f"got {config[key]!r}, which is not evaluated; set source.network and "
                    "source.classes"
                )
    raise CheckpointError(
        f"{root / 'configs'}: expected {' or '.join(_NETWORKS)} in one of "
        f"{', '.join(file.name for file in configs)}; got none; set source.network and "
        "source.classes"
    )


def _network(
    file: Path, config: dict[str, Any], key: str, definition: dict[str, Any]
) -> NetworkConfig:
    class_key = next((each for each in _CLASS_KEYS if each in definition), None)
    target = None if class_key is None else definition[class_key]
    place = f"{file}: {key}.{class_key or '_target_'}"
    match = _NETS.fullmatch(target) if isinstance(target, str) else None
    if match is None or not _is_monai(match["name"]):
        raise CheckpointError(
            f"{place}: expected a class of monai.networks.nets, got {target!r}, which is not "
            "imported; set source.network and source.classes"
        )
    args = {name: value for name, value in definition.items() if name not in _CLASS_KEYS}
    inner = next((args.pop(name) for name in _ARGS_KEYS if name in args), None)
    if isinstance(inner, dict):
        args = {**inner, **args}
    for name, default in _SETTINGS.items():
        value = args.pop(name, default)
        if default is not None and value != default:
            raise CheckpointError(f"{file}: {key}.{name}: expected {default!r}, got {value!r}")
    taken = inspect.signature(network_class(match["name"])).parameters
    plain = {
        name: _plain(value, f"{file}: {key}.{name}", config)
        for name, value in args.items()
        if not (name in _RETIRED and name not in taken)
    }
    return NetworkConfig(name=match["name"], args=plain)


def _is_monai(name: str) -> bool:
    from monai.networks import nets

    found = getattr(nets, name, None)
    return (
        inspect.isclass(found)
        and issubclass(found, nn.Module)
        and found.__module__.startswith("monai.networks.nets.")
    )


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
    if value.startswith("@") and value not in seen:
        found = _looked_up(config, value[1:])
        if found is not None:
            return _plain(found, place, config, (*seen, value))
    raise CheckpointError(
        f"{place}: expected a plain value, got {value!r}, which is not evaluated; set "
        "source.network and source.classes"
    )


def _looked_up(config: Any, identifier: str) -> Any:
    """Of `a::b::0`, or `a#b#0` as older bundles write it; None where there is nothing."""
    for part in re.split(r"::|#", identifier):
        if isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict) and part in config:
            config = config[part]
        else:
            return None
    return config


def _count(network: NetworkConfig, names: tuple[str, ...], file: Path, key: str) -> int:
    parameters = inspect.signature(network_class(network.name)).parameters
    for name in names:
        if name in parameters:
            value = network.args.get(name, parameters[name].default)
            if type(value) is int and value > 0:
                return value
            got = "nothing" if value is inspect.Parameter.empty else repr(value)
            raise CheckpointError(f"{file}: {key}.{name}: expected a number of channels, got {got}")
    raise CheckpointError(
        f"{file}: {key}: {network.name} takes no {' or '.join(names)}; expected a segmentation "
        "network"
    )


def _format_of(metadata: Mapping[str, Any], side: str, name: str) -> dict[str, Any]:
    found: Any = metadata
    for part in ("network_data_format", side, name):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _named(channel_def: Any, count: int) -> list[str] | None:
    """{"0": name, ...}, where it names each of `count` channels and no two alike."""
    if not isinstance(channel_def, dict):
        return None
    by_number = {str(number): str(name).strip() for number, name in channel_def.items()}
    names = [by_number.get(str(number), "") for number in range(count)]
    complete = len(by_number) == count and all(names) and len(set(names)) == count
    return names if complete else None


def _structures(
    source: SourceConfig,
    file: Path,
    metadata: Mapping[str, Any],
    config: dict[str, Any],
    outputs: int,
) -> Structures:
    """Classes of a softmax, or the one region of a single sigmoid.

    Raises: CheckpointError for several sigmoids: which labels make up each of them is nowhere told.
    """
    if source.classes is not None:
        return Structures(named_classes(source.classes))
    names = _named(_format_of(metadata, "outputs", "pred").get("channel_def"), outputs)
    if outputs == 1:
        name = names[0] if names else "class 1"
        return structures_of(["background", name], {name: [1]}, [1])
    sigmoid = any(
        each.get("sigmoid") is True for each in _transforms(config, "postprocessing", "Activations")
    )
    first = names[0] if names else "background"
    if sigmoid or not re.search(r"\b(background|bg|else)\b", first, re.IGNORECASE):
        what = "sigmoids" if sigmoid else f"channels of which the first is {first!r}"
        raise CheckpointError(
            f"{file}: its {outputs} outputs are {what}, so they may overlap, and the bundle does "
            "not say of which labels each is made; set source.classes to their number or names to "
            "take them as classes that exclude each other, background first"
        )
    return Structures(names or named_classes(outputs))


def _transforms(config: dict[str, Any], key: str, *names: str) -> list[dict[str, Any]]:
    """The transforms of a Compose by their classes, whatever ending (d, D, Dict) they have."""
    section = config.get(key)
    listed = section.get("transforms") if isinstance(section, dict) else section
    found = []
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, str) and each.startswith("@"):
            each = _looked_up(config, each[1:])
        if not isinstance(each, dict) or each.get("_disabled_") is True:
            continue
        if not names or _transform_name(each) in names:
            found.append(each)
    return found


def _transform_name(transform: Mapping[str, Any]) -> str:
    name = str(transform.get("_target_", "")).rpartition(".")[2]
    return re.sub(r"(d|D|Dict)$", "", name)


def _preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    """What the bundle's transforms make of an image, as far as the driver has words for it."""
    transforms = _transforms(config, "preprocessing")
    if not transforms:
        return {}
    made: dict[str, Any] = {"spacing": None}
    scales: list[str] = []
    for transform in transforms:
        name = _transform_name(transform)
        if name == "Spacing":
            made["spacing"] = _spacing(config, transform.get("pixdim"))
        elif name == "NormalizeIntensity" and _is_zscore(transform):
            scales.append("zscore")
            made["image_foreground"] = "nonzero" if transform.get("nonzero") is True else "all"
        elif name not in _NO_CHANGE:
            scales.append(str(transform.get("_target_")))
    if made["spacing"] == []:
        del made["spacing"]
    return {**made, "normalize": ", ".join(scales) or "none"}


def _seen_orientation(
    source: SourceConfig, config: dict[str, Any], root: Path
) -> tuple[str, list[str]]:
    """Letters of the axes of the volumes that the network sees; warnings."""
    for transform in _transforms(config, "preprocessing", "Orientation"):
        canonical = transform.get("as_closest_canonical") is True
        try:
            seen = check_orientation("RAS" if canonical else transform.get("axcodes"))
        except ValueError:
            continue
        if seen is not None and len(seen) == 3:
            return seen, []
    if source.orientation is not None:
        return source.orientation, []
    return "RAS", [
        f"{root}: the bundle does not say in which order of axes it was trained; RAS is assumed "
        "(source.orientation=LPS, for example, says otherwise)"
    ]


def _spacing(config: dict[str, Any], pixdim: Any) -> list[float]:
    """Three numbers; [] for others, such as -1, the file's own."""
    if isinstance(pixdim, str) and pixdim.startswith("@"):
        pixdim = _looked_up(config, pixdim[1:])
    values = pixdim if isinstance(pixdim, list) else []
    plain = len(values) == 3 and all(isinstance(n, (int, float)) and n > 0 for n in values)
    return [float(n) for n in values] if plain else []


def _is_zscore(transform: Mapping[str, Any]) -> bool:
    return transform.get("subtrahend") is None and transform.get("divisor") is None
