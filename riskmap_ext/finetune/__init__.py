"""Fine-tuning driver: `finetune(load_config("run.yaml"))`, or `riskmap finetune run.yaml`.

Needs the extra `finetune`: pip install "riskmap_ext[finetune]".
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from riskmap_ext.finetune.config import Config
    from riskmap_ext.finetune.config_file import load_config, parse_config
    from riskmap_ext.finetune.data import Case, Cases, prepare_cases
    from riskmap_ext.finetune.dry_run import DryRun, check_run
    from riskmap_ext.finetune.errors import CheckpointError, ConfigError, DataError, InputError
    from riskmap_ext.finetune.predict import predict_images
    from riskmap_ext.finetune.rank import RankedSource, rank_sources
    from riskmap_ext.finetune.run import FinetuneResult, finetune, make_maps
    from riskmap_ext.finetune.run_report import write_report
    from riskmap_ext.finetune.scores import Score, score_files

__all__ = [
    "Case",
    "Cases",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "DryRun",
    "FinetuneResult",
    "InputError",
    "RankedSource",
    "Score",
    "check_run",
    "finetune",
    "load_config",
    "make_maps",
    "parse_config",
    "predict_images",
    "prepare_cases",
    "rank_sources",
    "score_files",
    "write_report",
]

_HOME = {
    "config": ("Config",),
    "config_file": ("load_config", "parse_config"),
    "data": ("Case", "Cases", "prepare_cases"),
    "dry_run": ("DryRun", "check_run"),
    "errors": ("CheckpointError", "ConfigError", "DataError", "InputError"),
    "predict": ("predict_images",),
    "rank": ("RankedSource", "rank_sources"),
    "run_report": ("write_report",),
    "run": ("FinetuneResult", "finetune", "make_maps"),
    "scores": ("Score", "score_files"),
}


def __getattr__(name: str) -> Any:
    """Imported on first use, so that the command line can name a missing package of the extra."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
