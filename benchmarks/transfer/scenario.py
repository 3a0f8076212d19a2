"""Scenario files: which source, which target, how many cases, how long, how they are split."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from riskmap_ext.finetune.base.files import stem
from riskmap_ext.finetune.data.datalist import volumes_in

FOLDER = Path(__file__).parent / "scenarios"
ROOT = Path(__file__).resolve().parents[2]
TUNING_SEED = 1000  # from here on, seeds are for the learning rate alone
_MAX_TRAIN = 100

Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Section):
    """data: labels and contrast of the simulation, or keys of the driver's `data`.

    subjects: how many of its own, or "train": those the target is trained on, with other labels or
    another contrast.
    """

    data: dict[str, Any]
    subjects: Count | Literal["train"]
    steps: Count
    lr: float


class Target(_Section):
    """train: how many cases are trained on. test: how many are tested on; None: all others."""

    data: dict[str, Any]
    train: Count
    test: Count | None = None


class Noise(_Section):
    """Wrong training labels. moved: share of slices whose labels lie `voxels` off; omitted: chance
    of each structure in a slice to be labelled background.
    """

    moved: Annotated[float, Field(ge=0, le=1)]
    voxels: Count
    omitted: Annotated[float, Field(ge=0, le=1)]


class Tuning(_Section):
    """Seeds 1000, 1001, ... and the learning rates tried; `at` the length of a name or at each.

    first: rates that are `behind` Dice points below the best over so many seeds are given up; None:
    all rates are tried with all seeds.
    """

    rates: tuple[float, ...]
    seeds: Count
    at: str = "each"
    first: Count | None = None
    behind: float = 2.0


class Scenario(_Section):
    """One problem. simulated: resolution and extent of the simulation; folder: of real images.

    round: of the evidence, 1 or 2. noise: in the labels that are trained on; the source's are as
    they are. held_out: real subjects that learning rates are tested on, and no result.
    """

    name: str
    title: str
    about: str = ""
    round: Count = 1
    simulated: dict[str, Any] | None = None
    folder: str | None = None
    split: Literal["shuffled", "rotated"] = "shuffled"
    held_out: Annotated[int, Field(ge=0)] = 0
    source: Source
    target: Target
    noise: Noise | None = None
    network: dict[str, Any]
    train: dict[str, Any]
    lengths: dict[str, Count]
    curve: Count = 1
    seeds: Count
    first_seed: Annotated[int, Field(ge=0, lt=TUNING_SEED)] = 0
    tuning: Tuning

    @model_validator(mode="after")
    def _one_kind(self) -> Scenario:
        if (self.simulated is None) == (self.folder is None):
            raise ValueError("expected one of simulated and folder")
        if self.simulated is not None and self.target.test is None:
            raise ValueError("target.test: expected a number of simulated subjects")
        own = 0 if self.source.subjects == "train" else self.source.subjects
        if self.held_out > own:
            raise ValueError("held_out: expected no more than source.subjects, which take them in")
        if self.tuning.at not in ("each", *self.lengths):
            raise ValueError(f"tuning.at: expected 'each' or one of {sorted(self.lengths)}")
        return self

    @property
    def definition(self) -> dict[str, Any]:
        """What the result of a run depends on, whatever the seed, arm, length and rate."""
        apart = {"name", "title", "about", "round", "lengths", "curve", "seeds", "first_seed"}
        apart.add("tuning")
        apart |= {key for key in ("noise", "held_out") if not getattr(self, key)}
        return self.model_dump(mode="json", exclude=apart)

    @property
    def final_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def tuning_seeds(self) -> range:
        return range(TUNING_SEED, TUNING_SEED + self.tuning.seeds)

    def tuned_at(self, length: str) -> str:
        """The length whose tuning gives this length its learning rate."""
        return length if self.tuning.at == "each" else self.tuning.at

    def missing(self) -> str | None:
        """Why the scenario cannot run here, if so."""
        if self.folder is None or (data_root() / self.folder).is_dir():
            return None
        return f"no {self.folder} in {data_root()}; set RISKMAP_DATA to the folder above it"


class Split(BaseModel):
    """Case names of one seed."""

    source: list[str]
    train: list[str]
    test: list[str]


def split(scenario: Scenario, seed: int) -> Split:
    """Who is learnt from and who is tested on; no name is in `test` and in another list.

    shuffled: the cases in an order drawn from the seed, first the source's own, then `train`. Those
    held out are the tests of the tuning, else among the source's own.
    rotated: in the order of the names, begun one later with each seed.
    """
    source, target = scenario.source, scenario.target
    if scenario.simulated is not None:
        first = 1000 * seed
        if source.subjects == "train":
            raise ValueError("source.subjects: simulated subjects of its own are expected")

        def named(begin: int, count: int) -> list[str]:
            return [f"case_{begin + index:04d}" for index in range(count)]

        return Split(
            source=named(first, source.subjects),
            train=named(first + 500, target.train),
            test=named(first + 500 + _MAX_TRAIN, target.test or 0),
        )
    names = case_names(scenario)
    if scenario.split == "rotated":
        start = seed % len(names)
        order = names[start:] + names[:start]
    else:
        # Scenarios of one data set, such as with 2, 4 and 8 cases, share the order.
        rng = np.random.default_rng([seed, zlib.crc32(str(scenario.folder).encode())])
        order = [names[index] for index in rng.permutation(len(names))]
    count = 0 if source.subjects == "train" else source.subjects
    tuning, reserved = seed >= TUNING_SEED, names[: scenario.held_out]
    if reserved:
        others = [name for name in order if name not in reserved]
        order = others if tuning else reserved + others
    own, rest = order[:count], order[count:]
    train, test = rest[: target.train], rest[target.train :][: target.test]
    if reserved and tuning:
        test = reserved
    if not test:
        raise ValueError(f"{scenario.name}: {len(names)} cases leave none to test on")
    return Split(source=own or train, train=train, test=test)


def case_names(scenario: Scenario) -> list[str]:
    """Of the real images that have the target's contrast."""
    folder = data_root() / str(scenario.folder) / "images"
    suffix = str(scenario.target.data.get("image_suffix", ""))
    found = [stem(path) for path in volumes_in(folder)]
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))


def data_root() -> Path:
    given = os.environ.get("RISKMAP_DATA")
    return Path(given) if given else ROOT.parent / "shared" / "data"


def load_scenarios(folder: Path = FOLDER) -> dict[str, Scenario]:
    """All scenarios of the files; a list of training cases makes one each: `name_2`, `name_4`.

    `like: other`: what the file does not say is as in other.yaml; sections are joined key by key,
    but a network is the file's own with all of its arguments.
    """
    found: dict[str, Scenario] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            found |= _scenarios_of(path)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: {key}: {first['msg']}") from None
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: cannot be read: {reason}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the sections of a scenario: {error}") from None
    if not found:
        raise ValueError(f"{folder}: no scenario files (*.yaml)")
    return found


def _scenarios_of(path: Path) -> dict[str, Scenario]:
    found = {}
    content = _read(path)
    for side in ("source", "target"):
        data = content[side]["data"]
        if "label_map" in data:
            data["label_map"] = _expanded(data["label_map"])
    counts = content["target"]["train"]
    if counts == []:
        raise ValueError(f"{path}: target.train: expected a number or several, got none")
    for count in counts if isinstance(counts, list) else [counts]:
        name = f"{path.stem}_{count}" if isinstance(counts, list) else path.stem
        target = {**content["target"], "train": count}
        title = content["title"].replace("{train}", str(count))
        found[name] = Scenario(**{**content, "name": name, "title": title, "target": target})
    return found


def chosen(every: dict[str, Scenario], names: Sequence[str] | None) -> dict[str, Scenario]:
    """Those of the names, in their order. Raises: ValueError naming the unknown."""
    if names is None:
        return every
    if unknown := [name for name in names if name not in every]:
        raise ValueError(f"--scenarios: {', '.join(unknown)} unknown; there are {', '.join(every)}")
    return {name: every[name] for name in names}


def _read(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """readers: the files that came here by their `like`. Raises: ValueError naming the file."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys of a scenario, got {content!r}")
    like = content.pop("like", None)
    if like is None:
        return content
    base = path.with_name(f"{like}.yaml")
    if base in (*readers, path):
        raise ValueError(f"{path}: like: {like} is like this file itself")
    if not base.is_file():
        raise ValueError(f"{path}: like: no {base.name} beside it")
    joined = _joined(_read(base, (*readers, path)), content)
    return {**joined, "network": content["network"]} if "network" in content else joined


def _joined(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = {**base, **own}
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            both[key] = _joined(base[key], value)
    return both


def _expanded(label_map: dict[Any, Any]) -> dict[int, Any]:
    """`100-207: cortex` as a value each."""
    values: dict[int, Any] = {}
    for key, name in label_map.items():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(key))
        if match is None:
            raise TypeError(f"label_map: expected values such as 3 or 3-7, got {key!r}")
        low, high = match.groups()
        values |= dict.fromkeys(range(int(low), int(high or low) + 1), name)
    return values
