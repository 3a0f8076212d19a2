"""The `riskmap` command: input errors are one message and exit code 2, not a traceback."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import warnings
from contextlib import suppress
from typing import Any

from riskmap_ext.finetune.base.errors import (
    InputError,
    Terminated,
    ToldElsewhere,
    one_line,
    visible,
)

# Failed allocations as torch, CUDA, C++ and oneDNN (which gives no reason) report them.
_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|bad_alloc|could not create a primitive$"
)


def main() -> None:
    """Entry point of `riskmap`."""
    # Names may have what the terminal's encoding lacks; a closed pipe is told of later.
    with suppress(OSError):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from riskmap_ext.finetune.commands import app

        threading.excepthook = _thread_failed
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            app(prog_name="riskmap")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "riskmap_ext":
            raise
        extra = 'pip install "riskmap_ext[finetune]"'
        _fail(f"the package {error.name} is missing; install it with: {extra}")
    except KeyboardInterrupt as stop:  # before a command starts, or a second one
        print("riskmap: stopped", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None
    except ToldElsewhere:  # another process of the run reports it
        raise SystemExit(2) from None
    except InputError as error:
        _fail(str(error))
    except OSError as error:  # of the system, not of what was asked for
        place = os.fsdecode(error.filename) if error.filename else "system"
        try:
            sys.stdout.flush()
        except OSError:
            place = "standard output"
            with suppress(OSError):  # at the end, nothing is left to be flushed
                sys.stdout.close()
        _fail(f"{place}: {error.strerror or one_line(error)}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        _fail(f"not enough memory ({one_line(error)[:200] or 'of Python'})")


def _fail(message: str) -> None:
    print(f"riskmap: error: {visible(message)}", file=sys.stderr)
    raise SystemExit(2)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread cannot write: the next use of its writer raises that again."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A library's warning in the style of this command, without lines of source code."""
    print(f"riskmap: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
