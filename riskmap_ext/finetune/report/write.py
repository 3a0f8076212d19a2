"""`riskmap report`: one HTML file of a run, made from the files in its folder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from riskmap_ext.finetune.base.errors import ConfigError, one_line
from riskmap_ext.finetune.base.files import write_text
from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.folder.workspace import check_folder
from riskmap_ext.finetune.report.build import run_page
from riskmap_ext.finetune.report.cases import read_results
from riskmap_ext.finetune.report.read import read_run

REPORT_FILE = "report.html"
_ENDINGS = (".html", ".htm")


def write_report(
    folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the report of the run or cross-validation in `folder`, finished or not.

    Returns: its path.

    output: OUTPUT/report.html where None. What the folder lacks (older runs, `write` keys that were
    false, images that have moved) is told in the report.

    Raises: InputError naming the folder that holds no run, or the file that is damaged or cannot be
        written.
    """
    folder = Path(folder)
    path = folder / REPORT_FILE if output is None else Path(output)
    if path.suffix.lower() not in _ENDINGS:
        raise ConfigError(f"--output: expected a file name that ends in .html, got {path}")
    run = read_run(folder)
    start = path.absolute().parent
    check_folder("--output", start)
    reports = {name: fold.folder / REPORT_FILE for name, fold in run.folds.items()}
    links = {
        name: Path(os.path.relpath(report, start)).as_posix()
        for name, report in reports.items()
        if report.exists()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries; what matters is in the report
        content = run_page(run, read_results(run), links)
    write_text(path, content)
    return path


def report_at_end(folder: Path, log: Log) -> None:
    """The report of a run that has just ended; its results are complete without it."""
    try:
        log(f"Report: {write_report(folder)}")
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        log.warn(f"{folder / REPORT_FILE} was not written ({reason})")
