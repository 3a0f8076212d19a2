"""The output folder of a run: claimed, cleared, resumed, rejected."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from riskmap_ext._files import half_written, read_torch
from riskmap_ext.finetune.base.errors import ConfigError, InputError, one_line, shortened
from riskmap_ext.finetune.base.files import read_text, write_text
from riskmap_ext.finetune.base.lock import LOCK_FILE, locked
from riskmap_ext.finetune.base.log import Log, some
from riskmap_ext.finetune.config.schema import Config, Count
from riskmap_ext.finetune.config.yaml_text import read_mapping
from riskmap_ext.finetune.data.datalist import Listing
from riskmap_ext.finetune.data.splits import SPLITS_FILE, read_splits
from riskmap_ext.finetune.folder.records import ENVIRONMENT_FILE, LEEP_FILE, ended

RESUME_FILE, RESUME_FORMAT = "resume.pt", "riskmap_ext.resume.1"
NONFINITE_FILE = "nonfinite.json"
# Keys that may differ when an unfinished run is resumed: none changes what is computed.
_FREE_KEYS = ("output", "overwrite", "threads", "device", "cache", "write")
_OUTPUT_FILES = (
    *("config.yaml", "keys.json", RESUME_FILE, "last.pt", "best.pt", "metrics.csv", "losses.csv"),
    *("dice.csv", LEEP_FILE, ENVIRONMENT_FILE, "report.html", NONFINITE_FILE, "log.txt"),
    SPLITS_FILE,
)
_OUTPUT_FOLDERS = ("maps", "overlays", "predictions", "tb")
# One of these is in the folder of every run, and in no other.
_MARKS = (LOCK_FILE, "log.txt", ENVIRONMENT_FILE, RESUME_FILE)


class _State(BaseModel):
    """The plain values of resume.pt, and what holds the others."""

    inputs: str
    step: Count
    best: float
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    metrics: list[dict[str, float]]
    losses: dict[str, Any] | None = None
    network: dict[str, Any]
    stepper: dict[str, Any]
    sampler: dict[str, Any]
    rng: Any


@contextmanager
def told_when_stopped(config: Config, log: Log) -> Iterator[None]:
    """Gives a KeyboardInterrupt a message that says what was stopped and what is left."""
    try:
        yield
    except KeyboardInterrupt as stop:
        message = "stopped before anything was written"
        if log.is_open:
            done = finished(config.output)
            held = "a finished run" if done else "an unfinished run"
            message = f"stopped {log.stage}; {config.output} holds {held}"
            if not done and any((config.output / n).exists() for n in (RESUME_FILE, SPLITS_FILE)):
                message += " (--resume goes on with it)"
            with suppress(InputError):
                log.note(message)
        stop.args = (message,)
        raise


def unfinished_run(config: Config) -> dict[str, Any] | None:
    """The content of resume.pt in the output folder; None if no run has got that far.

    For an unfinished cross-validation, an empty one: its folds have their own.

    Raises: ConfigError if the run is finished, or has a different configuration.
    """
    output = config.output
    path = output / RESUME_FILE
    if finished(output):
        raise ConfigError(f"output: {output} holds a finished run: there is nothing to resume")
    if os.path.lexists(output / SPLITS_FILE):
        if config.data.folds is None:
            raise ConfigError(
                f"data.folds: {output} holds a cross-validation; expected its folds, got none"
            )
        return {}
    if not os.path.lexists(path):
        held = [name for name in ("last.pt", "best.pt") if (output / name).exists()]
        if held:
            raise ConfigError(
                f"output: {output} holds {' and '.join(held)}, but no {RESUME_FILE} to resume; set "
                "overwrite=true without --resume to start anew"
            )
        return None
    state = read_torch(path)
    if not isinstance(state, dict) or state.get("format") != RESUME_FORMAT:
        raise damaged_state(path)
    try:
        _State.model_validate(state)
    except ValidationError as error:
        raise damaged_state(path, error.errors()[0]["loc"][0]) from None
    return state


def damaged_state(path: Path, why: object = None) -> ConfigError:
    """Of a resume.pt that cannot be used."""
    told = f" ({shortened(one_line(why))[1:-1]})" if why is not None else ""
    then = "overwrite=true without --resume starts anew"
    return ConfigError(f"output: {path} is damaged{told}; {then}")


def is_done(config: Config) -> bool:
    """Whether the output folder holds the finished run of this configuration.

    Raises: ConfigError naming the keys in which it differs from the finished run.
    """
    if not finished(config.output):
        return False
    check_same_run(config, as_given=True)
    return True


def check_same_run(config: Config, *, as_given: bool = False) -> None:
    """Raises: ConfigError naming the keys in which `config` differs from the run in its output.

    as_given: what `config` leaves unset may have been filled in from the data and the source.
    """
    path = config.output / "config.yaml"
    before, _ = read_mapping(path)
    content = config.model_dump(mode="json", exclude_unset=as_given)
    changed = _differences(before, _laid_over(before, content) if as_given else content)
    changed = [key for key in changed if key.split(".")[0] not in _FREE_KEYS]
    if changed:
        raise ConfigError(
            f"--resume: {', '.join(changed)}: not as in {path}; restore what the run started with, "
            "or start anew with overwrite=true and without --resume"
        )


def _laid_over(base: Any, top: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return {**base, **{key: _laid_over(base.get(key), value) for key, value in top.items()}}


def _differences(one: Any, other: Any, key: str = "") -> list[str]:
    """The dotted keys below `key` whose values differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [key]
    return [
        each
        for name in sorted({*one, *other}, key=str)
        for each in _differences(one.get(name), other.get(name), f"{key}.{name}".strip("."))
    ]


@contextmanager
def claimed_output(
    config: Config, log: Log, *, resume: bool = False, resumed: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Makes the output folder, or clears the earlier run in it if that is allowed.

    resume: whether to go on with what it holds. resumed: what `unfinished_run` found in it.

    Raises: InputError if it cannot be written, if another run is using it, or has used it since
    `unfinished_run`.
    """
    output = config.output
    made = not output.exists()
    with ExitStack() as held:
        try:
            output.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(output))
        except OSError as error:
            if made and output.exists():
                with suppress(OSError):
                    output.rmdir()
            raise ConfigError(f"output: {output} cannot be written ({error})") from None
        if resume and _step(unfinished_run(config)) != _step(resumed):
            raise ConfigError(f"output: {output} was used by another run meanwhile; start again")
        try:
            for folder in (output, *(output / name for name in _OUTPUT_FOLDERS)):
                for left in half_written(folder):
                    left.unlink(missing_ok=True)
            if resumed is None:
                for name in check_output(config, replace=resume):
                    path = output / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            raise ConfigError(f"output: {output} cannot be cleared ({error})") from None
        log.open(output / "log.txt", append=resumed is not None)  # first, as a mark of a run
        if resumed is None:
            write_text(output / "config.yaml", config.to_yaml())
        yield


def _step(state: Mapping[str, Any] | None) -> Any:
    return None if state is None else state.get("step", 0)


def check_output(config: Config, *, replace: bool = False) -> list[str]:
    """What an earlier run left in the folder; rejected unless `overwrite` or `replace` is set.

    Raises: ConfigError naming output or cache if no folder can be made there, or if something
    else has the names of a run's files.
    """
    output = config.output
    check_folder("output", output)
    check_folder("cache", config.cache or output / "cache")
    held = _held(output)
    if held and not any((output / name).exists() for name in _MARKS):
        raise ConfigError(
            f"output: {output} holds {some(held)}, but no run; choose another folder, or move them"
        )
    if held and not (config.overwrite or replace):
        done = finished(output)
        state = "already holds a run" if done else "holds an unfinished run"
        go_on = "" if done else "--resume continues it; "
        raise ConfigError(
            f"output: {output} {state} ({some(held)}); {go_on}choose another folder, or set "
            "overwrite=true to replace it"
        )
    if config.source is not None and output in config.source.checkpoint.parents and held:
        raise ConfigError(
            f"output: the source checkpoint {config.source.checkpoint} lies in it and would be "
            "replaced; choose another folder"
        )
    return held


def check_inputs_stay(config: Config, listing: Listing) -> None:
    """Raises: ConfigError if the run would replace one of its own images or labels."""
    output = Path(os.path.realpath(config.output))
    for case in (*listing.train, *listing.validation):
        # realpath: Path.resolve raises for a link to itself, which is reported elsewhere.
        for path in map(Path, map(os.path.realpath, (*case.images, case.label))):
            below = path.relative_to(output).parts if path.is_relative_to(output) else ()
            below = below[1:] if below and below[0].startswith("fold_") else below
            if below and below[0] in (*_OUTPUT_FILES, *_OUTPUT_FOLDERS):
                raise ConfigError(
                    f"output: {path} is an input and would be replaced; choose another folder"
                )


def _held(output: Path) -> list[str]:
    """What a run left in the folder, and the runs of its folds."""
    own = [name for name in (*_OUTPUT_FILES, *_OUTPUT_FOLDERS) if (output / name).exists()]
    folds = sorted(output.glob("fold_*"))
    return own + [f"{fold.name}/{name}" for fold in folds for name in _held(fold)]


def fold_folders(output: Path) -> list[Path]:
    """The folds of the cross-validation in `output`, in order; none if it holds none."""
    path = output / SPLITS_FILE
    count = len(read_splits(path)) if os.path.lexists(path) else 0
    return [output / f"fold_{index}" for index in range(count)]


def finished(output: Path) -> bool:
    """Whether the run in `output` finished, by its scores, its last start, or its log."""
    if (output / RESUME_FILE).exists():
        return False
    if (output / "dice.csv").exists() or ended(output):
        return True
    lines: list[str] = []
    with suppress(InputError):
        lines = read_text(output / "log.txt").splitlines()
    return bool(lines) and " Done" in lines[-1]


def check_folder(key: str, path: Path) -> None:
    """Rejects a path where there is no folder and none can be made."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir():
        where = "" if existing == path else f"{path}: "
        raise ConfigError(f"{key}: {where}{existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {existing} cannot be written; choose another folder")
