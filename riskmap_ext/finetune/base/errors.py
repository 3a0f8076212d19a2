"""Errors in user input. The command line prints only their message and exits with code 2."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Control characters except the line break, what turns the direction of text, and bytes of file
# names that are not UTF-8.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """The user's input cannot be used; the message names it and says how to fix it."""


class ConfigError(InputError):
    """A bad key or value of the configuration."""


class CheckpointError(InputError):
    """A checkpoint file that cannot be read or does not fit the network."""


class DataError(InputError):
    """Bad image or label files; `problems` has one line for each, naming the file.

    The message has one line for each kind of problem, with the names of the first files.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems in the data:\n"
        super().__init__(head + "\n".join(_kinds(self.problems)))


class Problems(list[Any]):
    """Lines about files, and errors of several checks, to raise together."""

    @contextmanager
    def collected(self, kind: type[InputError] = DataError) -> Iterator[None]:
        """Collects an error of this kind; of a DataError, its problems."""
        try:
            yield
        except kind as error:
            self.extend(error.problems if isinstance(error, DataError) else [error])

    def tell(self) -> None:
        """Raises: the only error, a DataError if all are lines, else a ConfigError of all."""
        errors = [each for each in self if isinstance(each, InputError)]
        if self and not errors:
            raise DataError(self)
        if len(self) == 1:
            raise errors[0]
        if self:
            lines = [*map(str, errors), *_kinds([each for each in self if isinstance(each, str)])]
            raise ConfigError("\n".join([f"{len(lines)} problems:", *lines]))


class ToldElsewhere(InputError):
    """Another process of the run has failed and reports the error itself."""


class Terminated(KeyboardInterrupt):
    """A request to end (SIGTERM), treated like Ctrl-C."""


def _kinds(problems: Sequence[str]) -> list[str]:
    """One line for problems that differ only in their file: how many more there are, and where."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for problem in problems:
        place, _, why = problem.partition(": ")
        path = Path(place)
        # Words with digits or paths depend on the file.
        folder, kind = (re.sub(r"\S*[\d/\\]\S*", "", text) for text in (path.parent.name, why))
        key = (problem,) if path.name == place else (path.anchor, folder, kind)
        alike.setdefault(key, []).append(problem)
    lines = []
    for line, *others in alike.values():
        path, *paths = (Path(each.partition(": ")[0]) for each in (line, *others))
        if others:
            top = os.path.commonpath([each.parent for each in (path, *paths)])
            names = dict.fromkeys(str(each.relative_to(top)) for each in paths if each != path)
            shown = ", ".join([*names][:4]) + (", ..." if len(names) > 4 else "")
            line += f" (and {len(others)} more{f' in {top}: {shown}' if names else ''})"
        lines.append(line)
    return lines


def unwritten(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return InputError(f"{path}: cannot be written ({reason}); is the disk full?")


def shortened(value: object, most: int = 300) -> str:
    """Its repr; the start of a long one."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def visible(text: str) -> str:
    """Without what a terminal would act upon: names of files and classes may have anything."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: object) -> str:
    """The message of another library's error, without line breaks."""
    return " ".join(str(error).split())
