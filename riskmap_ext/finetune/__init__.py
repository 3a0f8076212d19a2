"""Fine-tuning driver: `finetune(load_config("run.yaml"))`, or `riskmap finetune run.yaml`.

Needs the extra `finetune`: pip install "riskmap_ext[finetune]".
"""

# ruff: noqa: F401  (names for type checkers; they come from _HOME)
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from riskmap_ext.finetune.base.errors import CheckpointError, ConfigError, DataError, InputError
    from riskmap_ext.finetune.config.load import load_config, parse_config
    from riskmap_ext.finetune.config.schema import Config
    from riskmap_ext.finetune.data.prepare import Case, Cases, prepare_cases
    from riskmap_ext.finetune.dry_run import DryRun, check_run
    from riskmap_ext.finetune.evaluate import score_files
    from riskmap_ext.finetune.init import write_first_config
    from riskmap_ext.finetune.metrics.surfaces import Score
    from riskmap_ext.finetune.predict import predict_images
    from riskmap_ext.finetune.rank import RankedSource, rank_sources
    from riskmap_ext.finetune.report.write import write_report
    from riskmap_ext.finetune.train.cross_validation import CrossValidation, cross_validate
    from riskmap_ext.finetune.train.finetune import FinetuneResult, finetune, make_maps

# Imported on first use, so that the command line can name a missing package of the extra.
_HOME = {
    "base.errors": ["CheckpointError", "ConfigError", "DataError", "InputError"],
    "config.load": ["load_config", "parse_config"],
    "config.schema": ["Config"],
    "data.prepare": ["Case", "Cases", "prepare_cases"],
    "dry_run": ["DryRun", "check_run"],
    "evaluate": ["score_files"],
    "init": ["write_first_config"],
    "metrics.surfaces": ["Score"],
    "predict": ["predict_images"],
    "rank": ["RankedSource", "rank_sources"],
    "report.write": ["write_report"],
    "train.cross_validation": ["CrossValidation", "cross_validate"],
    "train.finetune": ["FinetuneResult", "finetune", "make_maps"],
}
__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
