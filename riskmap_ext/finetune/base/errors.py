"""Errors of user input. The command line prints their message alone and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used; the message names it and how to put it right."""


class ConfigError(InputError):
    """A key or value of the configuration."""


class CheckpointError(InputError):
    """A checkpoint file that is not readable or does not fit the network."""


class DataError(InputError):
    """Image or label files; `problems` has one line for each, naming the file."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems in the data:\n"
        super().__init__(head + "\n".join(self.problems))


class Problems(list[str]):
    """Of several files, to be told at once."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Takes over the problems of a DataError."""
        try:
            yield
        except DataError as error:
            self.extend(error.problems)

    def tell(self) -> None:
        """Raises: DataError where there are any."""
        if self:
            raise DataError(self)


class ToldElsewhere(InputError):
    """Another process of the run has failed, and says so itself."""


class Terminated(KeyboardInterrupt):
    """A request to end (SIGTERM): treated as Ctrl-C is."""


def one_line(error: object) -> str:
    """What an error of another library says, without its line breaks."""
    return " ".join(str(error).split())
