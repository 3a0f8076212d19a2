"""Which files are spoilt in which way, and the commands that read them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_pickles
import mutations
import torch
import yaml
from finetune_data import write_config
from malformed_place import SMALLER
from mutations import Mutation

FORMATS = ("same", "same", "same", ".nii", ".hdr", ".img", ".mgz", ".mgh", "nifti2", "swapped")
# These keep what is whole of their results, and a later start goes on.
WRITE_AS_THEY_GO = (
    "predict",
    "predict PATH",
    "predict RUN",
    "predict FOLDS",
    "resume",
    "map",
    "cached",
)
ANEW = {
    "predict": ("--overwrite",),
    "predict PATH": ("--overwrite",),
    "predict RUN": ("--overwrite",),
    "predict FOLDS": ("--overwrite",),
    "finetune": ("overwrite=true",),
    "cached": ("overwrite=true",),
    "map": ("overwrite=true",),
    "map PATH": ("overwrite=true",),
}
Command = Callable[[Path, Path], list[object]]


@dataclass(frozen=True)
class Target:
    """Files of one kind, how they may be spoilt, and the commands that read them."""

    kind: str
    paths: Sequence[str]
    mutations: Sequence[Mutation]
    commands: Sequence[str]
    formats: Sequence[str] = ()


def targets_of(whole: Path, marker: Path) -> list[Target]:
    """whole: the files as they were made. marker: what code in them would make."""
    images, yamls, texts = mutations.IMAGES, mutations.YAML, mutations.STRUCTURED
    tables = mutations.TABLES
    content, hostile, expression = _content(marker), _hostile(marker), _expression(marker)
    models: tuple[Mutation, ...] = (*(content,) * 8, *(hostile,) * 8, *(mutations.archive,) * 3)
    models += (*mutations.BYTES, *mutations.PLACES)
    read = ("predict PATH", "dry-run PATH", "rank PATH", "init PATH", "map PATH")
    packed = (*images, mutations.bomb)
    targets = [
        Target(
            *("image", ["data/images/case01.nii.gz"], packed),
            *(("dry-run", "dry-run", "predict", "map", "rank", "init", "finetune"), FORMATS),
        ),
        Target(
            *("label", ["data/labels/case01.nii.gz"], packed),
            *(("dry-run", "dry-run", "evaluate", "map", "rank", "init", "finetune"), FORMATS),
        ),
        Target("prediction", ["predictions/case01.nii.gz"], packed, ("evaluate",), FORMATS),
        Target("configuration", ["run.yaml"], yamls, ("dry-run", "dry-run", "finetune")),
        Target("dataset.json", ["dec/dataset.json"], texts, ("dry-run DATA", "init DATA")),
        Target("dataset.json", ["nnu/dataset.json"], texts, ("dry-run DATA", "init DATA")),
        Target("dataset.json", ["listed/dataset.json"], texts, ("dry-run DATA", "init DATA")),
        Target("splits", ["splits_final.json"], texts, ("dry-run FOLDS",)),
        Target("label table", ["labels.csv", "labels.tsv"], tables, ("dry-run TABLE",)),
        Target("own checkpoint", ["run/last.pt"], models, (*read, "predict RUN")),
        Target("own checkpoint", ["folds/fold_1/last.pt"], models, ("predict FOLDS",)),
        Target("state dict", ["state.pt"], models, ("dry-run STATE",)),
        Target(
            *("bundle", ["bundle/configs/inference.json", "bundle/configs/metadata.json"]),
            *((*texts, *(expression,) * 12), ("predict BUNDLE", "dry-run BUNDLE")),
        ),
        Target(
            *("bundle weights", ["bundle/models/model.pt"], models),
            ("predict BUNDLE", "dry-run BUNDLE", "init BUNDLE"),
        ),
        Target("resume.pt", ["stopped/resume.pt"], models, ("resume", "report STOPPED")),
        Target(
            *("files of a stopped run", ["config.yaml", "environment.json", "keys.json"]),
            *(yamls, ("resume", "report STOPPED")),
        ),
        Target(
            *("files of a stopped run", ["metrics.csv", "losses.csv", "log.txt", "leep.json"]),
            *(tables, ("resume", "report STOPPED")),
        ),
        Target("cache", sorted(_cached(whole)), models, ("cached",)),
        Target(
            *("files of a run", ["run/config.yaml", "run/leep.json", "run/environment.json"]),
            *(texts, ("report RUN", "predict RUN")),
        ),
        Target("files of a run", ["run/keys.json"], texts, ("report RUN",)),
        Target(
            *("files of a run", ["run/metrics.csv", "run/dice.csv", "run/losses.csv"]),
            *(tables, ("report RUN",)),
        ),
        Target("files of a run", ["run/log.txt"], mutations.TEXT, ("report RUN",)),
        Target(
            *("volumes of a run", ["run/predictions/case02.nii.gz"]),
            *(images, ("report RUN",)),
        ),
        Target("volumes of a run", ["run/maps/case02_risk.nii.gz"], images, ("report RUN",)),
        Target(
            *("files of folds", ["folds/splits_final.json", "folds/config.yaml"], texts),
            ("report FOLDS", "predict FOLDS"),
        ),
        Target(
            *("names", ["data/images/case01.nii.gz"], (_case_renamed,)),
            ("finetune", "predict", "map", "dry-run", "evaluate", "init"),
        ),
        Target("names", ["run.yaml"], (_classes_renamed, _folders_renamed), ("finetune",)),
        Target("names", ["run/last.pt"], (_file_renamed,), read),
        Target("names", ["run.yaml"], (_file_renamed,), ("dry-run CONFIG",)),
        Target("names", ["labels.csv", "labels.tsv"], (_file_renamed,), ("dry-run TABLE",)),
    ]
    # From a file of a stopped run, named in its folder.
    targets = [
        each
        if each.kind != "files of a stopped run"
        else Target(each.kind, [f"stopped/{p}" for p in each.paths], each.mutations, each.commands)
        for each in targets
    ]
    if (whole / "nnunet").exists():
        targets.append(Target("nnU-Net checkpoint", ["nnunet/final.pth"], models, read))
    if (whole / "real").exists():
        scan = sorted((whole / "real" / "images").iterdir())[0].name
        for name in ("images", "labels"):
            targets.append(
                Target(f"real {name}", [f"real/{name}/{scan}"], packed, ("dry-run REAL",))
            )
        targets += [
            Target("real headers", [f"headers/{path.name}"], images, ("predict PATH IMAGE",))
            for path in sorted((whole / "headers").iterdir())
        ]
    return targets


def _cached(whole: Path) -> list[str]:
    return [str(path.relative_to(whole)) for path in (whole / "cache").rglob("*.pt")]


def _hostile(marker: Path) -> Mutation:
    def hostile(pick: random.Random, path: Path) -> None:
        """A payload alone, or somewhere in the content."""
        objects, streams = (
            sorted(each(marker).items())
            for each in (hostile_pickles.objects, hostile_pickles.streams)
        )
        if pick.random() < 0.4:
            stream = pick.choice(streams)[1]
            if pick.random() < 0.5:
                path.write_bytes(stream)
            else:
                hostile_pickles.put_in_archive(path, stream)
            return
        payload = pick.choice(objects)[1]
        content: Any = payload
        if pick.random() < 0.7:
            content = torch.load(path, weights_only=False)
            content = mutations.changed(pick, content, (payload,))
        hostile_pickles.CONTAINERS[pick.choice(sorted(hostile_pickles.CONTAINERS))](path, content)

    return hostile


def _content(marker: Path) -> Mutation:
    def content(pick: random.Random, path: Path) -> None:
        """Other values of the right file, written by torch."""
        odd = (*mutations.VALUES, *expressions(marker), *hostile_pickles.tensors().values())
        made = mutations.changed(pick, torch.load(path, weights_only=False), odd)
        torch.save(made, path, _use_new_zipfile_serialization=pick.random() < 0.9)

    return content


def _expression(marker: Path) -> Mutation:
    def expression(pick: random.Random, path: Path) -> None:
        """What would be evaluated, somewhere in a JSON file."""
        odd = (*expressions(marker),)
        path.write_text(json.dumps(mutations.changed(pick, json.loads(path.read_text()), odd)))

    return expression


def expressions(marker: Path) -> list[Any]:
    """What MONAI's bundles and nnU-Net would evaluate or import."""
    code, command = f"open({str(marker)!r}, 'w')", f"touch {marker}"
    return [
        *(f"${code}", "$@network_def", "@", "@::", "@network_def", "@network", "%inference"),
        *({"_target_": "os.system", "command": command}, {"_target_": "builtins.exec"}),
        *("os.system", "builtins.eval", "torch.hub.load", "monai.networks.nets.os"),
        *({"_target_": f"${code}"}, [f"${code}"], "__import__('os').system", code),
        *({"@a": "@b"}, "monai.bundle.run", "torch.nn.modules.conv.os", "UNet.__init__"),
    ]


# Names.


def _odd(pick: random.Random) -> str:
    """A file's name."""
    return pick.choice(mutations.ODD_NAMES).replace("/", "|").lstrip(".")


def _file_renamed(pick: random.Random, path: Path) -> Path:
    return path.rename(path.with_name(_odd(pick) + path.suffix))


def _case_renamed(pick: random.Random, path: Path) -> Path:
    name = f"{_odd(pick)}.nii.gz"
    for folder in ("data/labels", "predictions"):
        other = path.parents[2] / folder / path.name
        other.rename(other.with_name(name))
    return path.rename(path.with_name(name))


def _classes_renamed(pick: random.Random, path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    content["data"]["classes"][1:] = pick.sample(mutations.ODD_NAMES, 2)
    content["write"]["tensorboard"] = pick.random() < 0.3
    write_config(path, content)


def _folders_renamed(pick: random.Random, path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    content["data"]["root"], content["output"] = _odd(pick), f"out/{_odd(pick)}"
    (path.parent / "data").rename(path.parent / content["data"]["root"])
    write_config(path, content)


# The commands: of the folder and the spoilt file.


def commands() -> dict[str, Command]:
    def data(place: Path) -> tuple[object, ...]:
        return ("--image", place / "data/images", "--label", place / "data/labels")

    def dry_run(place: Path, *more: object) -> list[object]:
        return ["finetune", place / "run.yaml", "--dry-run", *more]

    def predict(place: Path, model: Path, *more: object) -> list[object]:
        scans = more or ("--image", place / "data/images/case00.nii.gz")
        return ["predict", model, *scans, "--output", place / "out"]

    def maps(place: Path, model: Path) -> list[object]:
        rest = ("--classes", "background,box,crate", "write.overlays=false")
        return ["map", "--source", model, *data(place), "--output", place / "out", *rest]

    def rank(place: Path, model: Path) -> list[object]:
        rest = ("--output", place / "out/ranking.csv", f"cache={place}/out/cache")
        return ["rank", place / "run.yaml", "--source", model, *rest]

    def init(place: Path, folder: Path, *more: object) -> list[object]:
        return ["init", folder, "--output", place / "out/first.yaml", *more]

    def report(name: str) -> Command:
        return lambda place, _: ["report", place / name, "--output", place / "out/report.html"]

    real = ("data.root=real", "data.classes=[background, front, back]", "data.train=1")
    classes, net = "source.classes=3", yaml.safe_dump(SMALLER, default_flow_style=True).strip()
    return {
        "dry-run": lambda place, _: dry_run(place),
        "finetune": lambda place, _: ["finetune", place / "run.yaml"],
        "resume": lambda place, _: ["finetune", place / "stopped.yaml", "--resume"],
        "cached": lambda place, _: ["finetune", place / "cached.yaml"],
        "map": lambda place, _: maps(place, place / "source.pt"),
        "rank": lambda place, _: rank(place, place / "source.pt"),
        "init": lambda place, _: init(place, place / "data"),
        "predict": lambda place, _: predict(
            *(place, place / "source.pt", "--image", place / "data/images")
        ),
        "evaluate": lambda place, _: [
            *("evaluate", "--prediction", place / "predictions", "--reference"),
            *(place / "data/labels", "--output", place / "out/scores.csv"),
        ],
        "dry-run DATA": lambda place, path: dry_run(
            place, f"data.root={path.parent}", "data.train=null", "data.classes=null"
        ),
        "init DATA": lambda place, path: init(place, path.parent),
        "dry-run FOLDS": lambda place, path: dry_run(
            place, "--folds", path, "data.train=3", "data.validation=0"
        ),
        "dry-run TABLE": lambda place, path: dry_run(
            place, f"data.label_map={_quoted(path)}", "data.classes=null"
        ),
        "anew STOPPED": lambda place, _: ["finetune", place / "stopped.yaml", "overwrite=true"],
        "dry-run CONFIG": lambda place, path: ["finetune", path, "--dry-run"],
        "dry-run REAL": lambda place, _: dry_run(
            place, f"data.root={place}/real", *real[1:], "data.validation=1"
        ),
        "predict PATH": lambda place, path: predict(place, path),
        "predict PATH IMAGE": lambda place, path: predict(
            place, place / "source.pt", "--image", path
        ),
        "dry-run PATH": lambda place, path: dry_run(
            place, f"source.checkpoint={_quoted(path)}", "network=null"
        ),
        "rank PATH": rank,
        "map PATH": maps,
        "init PATH": lambda place, path: init(place, place / "data", "--source", path),
        "dry-run STATE": lambda place, path: dry_run(
            place, f"source.checkpoint={_quoted(path)}", classes, f"source.network={net}"
        ),
        "predict BUNDLE": lambda place, _: predict(place, place / "bundle"),
        "dry-run BUNDLE": lambda place, _: dry_run(
            place, f"source.checkpoint={place}/bundle", "network=null"
        ),
        "init BUNDLE": lambda place, _: init(
            place, place / "data", "--source", place / "bundle/models/model.pt"
        ),
        "predict RUN": lambda place, _: predict(place, place / "run"),
        "predict FOLDS": lambda place, _: predict(place, place / "folds"),
        "report RUN": report("run"),
        "report STOPPED": report("stopped"),
        "report FOLDS": report("folds"),
    }


def _quoted(path: Path) -> str:
    """As a YAML text."""
    return json.dumps(str(path), ensure_ascii=False)
