"""Scores several source models by LEEP on one target training set, to choose which to fine-tune."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from riskmap_ext import TransferStatistics
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.config.schema import Config, SourceConfig
from riskmap_ext.finetune.data.datalist import list_cases
from riskmap_ext.finetune.data.prepare import Cases, prepare_cases
from riskmap_ext.finetune.folder.workspace import check_folder
from riskmap_ext.finetune.source.checkpoint import load_source
from riskmap_ext.finetune.source.model import (
    SourceModel,
    preparation_warnings,
    prepared_as_source,
)
from riskmap_ext.finetune.train.maps import SourceMapper
from riskmap_ext.finetune.train.models import predictor_of_source
from riskmap_ext.finetune.train.session import session


@dataclass(frozen=True)
class RankedSource:
    """A source model and what it tells about the target labels.

    leep: mean log-likelihood of a voxel's label, in nats, <= 0. entropy: H(Y), the uncertainty that
    the class frequencies leave. gain: leep + entropy, the nats that the source tells. told: gain
    over entropy, 0 to 1. tells_nothing: told is at most 1 %.
    """

    checkpoint: Path
    classes: int
    leep: float
    entropy: float
    gain: float
    told: float
    tells_nothing: bool


def rank_sources(
    config: Config,
    checkpoints: Sequence[str | os.PathLike[str]],
    *,
    progress: bool = True,
) -> list[RankedSource]:
    """LEEP of each source on the training cases of `config`, best first.

    Checkpoints are read as `source.checkpoint` is; `source.network` and `source.classes` of the
    configuration apply to all of them. Keys that `data` omits are set for each source as in its
    own training. Statistics are cached for later runs.

    Raises: InputError naming the file and what does not fit, before any model is run.
    """
    paths = [Path(each) for each in checkpoints]
    if not paths:
        raise ConfigError("--source: expected at least one checkpoint, got none")
    check_folder("cache", config.cache or config.output / "cache")
    shared = config.source or SourceConfig(checkpoint=paths[0])
    config = config.model_copy(update={"source": shared})
    with session(config, progress=progress) as run:
        listing = list_cases(config.data)
        studies = []
        for path in paths:
            source = load_source(shared.model_copy(update={"checkpoint": path}))
            own = replace(run, config=prepared_as_source(config, source))
            predictor = predictor_of_source(own.config, source, listing.channels, run.device)
            studies.append((own, source, predictor))
        for note in listing.notes:
            run.log.warn(note)
        cases: Cases | None = None
        ranked = []
        with run.log.counting("Source models", 2 * len(listing.train) * len(paths)) as advance:
            for own, source, predictor in studies:
                if cases is None or cases.data != own.config.data:
                    cases = prepare_cases(own.config, listing=listing)
                for warning in preparation_warnings(own.config, source):
                    run.log.warn(warning)
                mapper = SourceMapper(own, source, predictor, cases, advance)
                ranked.append(_ranked(source, mapper.statistics()))
    ranked.sort(key=lambda each: each.leep, reverse=True)
    run.log.table(_table(ranked, len(listing.train)))
    for each in ranked:
        if each.tells_nothing:
            run.log.warn(
                f"{each.checkpoint} tells nothing about the target labels beyond how often "
                "each occurs; its risk map is noise"
            )
    return ranked


def _ranked(source: SourceModel, statistics: TransferStatistics) -> RankedSource:
    with warnings.catch_warnings():  # the table reports it
        warnings.simplefilter("ignore", UserWarning)
        leep = statistics.score
    entropy = statistics.label_entropy
    gain = leep + entropy
    return RankedSource(
        checkpoint=source.path,
        classes=len(source.classes),
        leep=leep,
        entropy=entropy,
        gain=gain,
        told=gain / entropy if entropy > 0 else 0.0,
        tells_nothing=statistics.tells_nothing(leep),
    )


def _table(ranked: Sequence[RankedSource], cases: int) -> Table:
    table = Table(title=f"LEEP of {len(ranked)} sources on {cases} training cases")
    for name in ("source", "classes", "LEEP (nats)", "told (nats)", "told of H(Y)"):
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for each in ranked:
        told = "nothing" if each.tells_nothing else f"{each.told:.0%}"
        numbers = (f"{each.leep:.4f}", f"{each.gain:.4f}", told)
        table.add_row(Text(str(each.checkpoint)), str(each.classes), *numbers)
    return table
