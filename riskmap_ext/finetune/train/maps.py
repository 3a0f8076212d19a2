"""LEEP statistics and risk maps of all cases with the frozen source model, kept on disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import riskmap_ext
from riskmap_ext._files import digest, read_torch
from riskmap_ext.finetune.base.errors import InputError, one_line
from riskmap_ext.finetune.base.files import write_checkpoint, write_json, write_nifti
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.data.prepare import Case, Cases
from riskmap_ext.finetune.folder.records import LEEP_FILE
from riskmap_ext.finetune.source.checkpoint import SourceModel
from riskmap_ext.finetune.source.predictor import Predictor
from riskmap_ext.finetune.train.session import Session

# Logits of the statistics pass are kept for the maps up to this size in all, else made again.
_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class SourceMaps:
    """What the source model says about the target data.

    score: LEEP. hardness_range: (lo, hi) over the training set. conditional: P(y|z) [C, Z]
    float64. transferability, risk: case name -> [X, Y, Z] float32 on the prepared grid.
    remark: the statistics' warning, if any. num_cached: cases whose maps came from the cache.
    statistics: what all of this was computed from.
    """

    score: float
    hardness_range: tuple[float, float]
    conditional: Tensor
    transferability: dict[str, Tensor]
    risk: dict[str, Tensor]
    remark: str | None
    num_cached: int
    statistics: riskmap_ext.TransferStatistics


class SourceMapper:
    """Streams the statistics over the training set and makes each case's maps, both cached.

    The cache's keys are digests of what the maps depend on: prepared image and label, the source's
    weights, the sliding window, the statistics of the training set, and the risk options.
    """

    def __init__(
        self,
        session: Session,
        source: SourceModel,
        predictor: Predictor,
        num_classes: int,
        progress: Callable[[str], Any],
        store: Path | None = None,
    ) -> None:
        """store: whether the maps are held in memory, or stay in the cache's files."""
        config = session.config
        window = {
            "patch_size": predictor.patch,
            "overlap": config.inference.overlap,
            "channels": predictor.channels,
        }
        self._predictor = predictor
        self._num_classes = num_classes
        self._risk = config.risk
        self._cache = config.cache or config.output / "cache"
        self._progress = progress
        self._settings = [riskmap_ext.__version__, source.digest, window, num_classes]
        self._regions = source.structures.table
        self._group = session.processes
        self._on_disk = store is not None
        self._logits: dict[str, Tensor] = {}

    def run(self, train: Sequence[Case], others: Sequence[Case] = ()) -> SourceMaps:
        """Maps of all cases; the statistics and the dataset's range come from `train` alone."""
        study = self._study(train)
        statistics = self.statistics(train)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            score = statistics.score
        transferability, risk, made = {}, {}, 0
        cases = [*train, *others]
        if self._group.size > 1:
            # Each process makes its share; all of them find it in the cache.
            shared = self._group.share(cases)

            def make_share() -> int:
                return sum(self._cached_maps(study, case, statistics)[1] for case in shared)

            made = sum(self._group.gather(self._group.together(make_share)))
        for case in cases:
            maps, new = self._cached_maps(study, case, statistics)
            made += new
            transferability[case.name], risk[case.name] = maps["transferability"], maps["risk"]
            self._logits.pop(case.name, None)
            self._progress(f"map of {case.name}")
        return SourceMaps(
            score=score,
            hardness_range=statistics.hardness_range,
            conditional=statistics.conditional.cpu(),
            transferability=transferability,
            risk=risk,
            remark="; ".join(one_line(w.message) for w in caught) or None,
            num_cached=max(0, len(cases) - made),
            statistics=statistics,
        )

    def statistics(self, train: Sequence[Case]) -> riskmap_ext.TransferStatistics:
        """LEEP statistics of the training cases, both passes; from the cache where it has them."""
        path = self._cache / f"statistics-{self._study(train)[:24]}.pt"
        statistics = riskmap_ext.TransferStatistics(
            self._num_classes, ignore_index=IGNORE_INDEX, regions=self._regions
        )
        group = self._group
        stored = read_torch(path)
        if all(group.gather(stored is not None)):
            statistics.load_state_dict(stored)
            return statistics
        mine = group.share(train)

        def add(step: Callable[[Tensor, Tensor], None], name: str) -> None:
            for case in mine:
                logits = self._source_logits(case)
                step(logits, case.label[None].to(logits.device))
                self._progress(f"{name} of {case.name}")

        for step, name in (
            (statistics.update, "statistics"),
            (statistics.update_range, "range"),
        ):
            group.together(lambda step=step, name=name: add(step, name))  # type: ignore[misc]
            if group.size > 1:
                statistics.all_reduce()
        group.on_main(lambda: write_checkpoint(path, statistics.state_dict()))
        return statistics

    def _study(self, train: Sequence[Case]) -> str:
        return digest(self._settings, [case.digest for case in train])

    def _cached_maps(
        self, study: str, case: Case, statistics: Any
    ) -> tuple[dict[str, Tensor], int]:
        """The maps, and how many cases had to be made for that: 0 or 1."""
        options = self._risk.model_dump(mode="json", exclude={"use"})
        name = f"maps-{digest(study, case.digest, options)[:24]}"
        path = self._cache / f"{name}.pt"
        maps = read_torch(path, mapped=self._on_disk)
        if maps is not None:
            return maps, 0
        maps = self._maps(case, statistics)
        write_checkpoint(path, maps)
        return (read_torch(path, mapped=True) or maps if self._on_disk else maps), 1

    def _maps(self, case: Case, statistics: Any) -> dict[str, Tensor]:
        logits = self._source_logits(case)
        label = case.label[None].to(logits.device)
        conditional = statistics.conditional.to(logits.device)
        wanted = self._risk.range
        if wanted == "dataset":
            scope = statistics.hardness_range
        else:
            scope = None if wanted == "image" else tuple(wanted)
        given = (logits, label, conditional)
        transferability = riskmap_ext.transferability_map(
            *given, ignore_index=IGNORE_INDEX, regions=self._regions
        )
        risk = riskmap_ext.risk_map(
            *given,
            scheme=self._risk.scheme,
            base=self._risk.base,
            alpha=self._risk.alpha,
            scale=self._risk.scale,
            range=scope,
            ignore_index=IGNORE_INDEX,
            regions=self._regions,
        )
        return {"transferability": transferability[0].cpu(), "risk": risk[0].cpu()}

    def _source_logits(self, case: Case) -> Tensor:
        if case.name in self._logits:
            return self._logits[case.name]
        logits = self._predictor(case.image)
        # A sum is finite in float64 where, and only where, all of its float32 terms are.
        if not math.isfinite(float(logits.sum(dtype=torch.float64))):
            raise InputError(
                f"{case.files.image}: the source model's logits of case {case.name} are NaN or "
                "infinite; check its intensities and data.normalize against the source's training"
            )
        kept = sum(t.numel() * t.element_size() for t in self._logits.values())
        if kept + logits.numel() * logits.element_size() <= _KEPT_BYTES:
            self._logits[case.name] = logits
        return logits


def _write_maps(folder: Path, case: Case, maps: SourceMaps) -> None:
    """<case>_transferability.nii.gz and <case>_risk.nii.gz on the image file's own grid."""
    for kind, volume in (
        ("transferability", maps.transferability[case.name]),
        ("risk", maps.risk[case.name]),
    ):
        # Nearest, since both belong to the label of their voxel.
        values = case.grid.to_file(case.grid.to_full(volume, mode="nearest"))
        path = folder / f"{case.name}_{kind}.nii.gz"
        write_nifti(path, values.astype("float32"), case.grid.affine, case.grid.codes)


def _write_leep(
    folder: Path, maps: SourceMaps, classes: list[str], source_classes: list[str]
) -> None:
    """leep.json: the source's statistics on the training cases.

    conditional: P(y|z), a row for each target class. class_frequencies, source_frequencies: shares
    of the target labels and of the source's probability mass. Entropy, score and hardness in nats.
    """
    statistics = maps.statistics
    mass = statistics.joint.sum(dim=0)
    write_json(
        folder / LEEP_FILE,
        {
            "score": maps.score,
            "label_entropy": statistics.label_entropy,
            "tells_nothing": statistics.tells_nothing(maps.score),
            "remark": maps.remark,
            "hardness_range": list(maps.hardness_range),
            "voxels": statistics.num_voxels,
            "classes": classes,
            "source_classes": source_classes,
            "class_frequencies": statistics.class_frequencies.tolist(),
            "source_frequencies": (mass / mass.sum().clamp(min=1e-300)).tolist(),
            "conditional": maps.conditional.tolist(),
        },
    )


def map_cases(
    session: Session,
    source: SourceModel,
    predictor: Predictor,
    cases: Cases,
    others: Sequence[Case],
) -> SourceMaps:
    """Maps of the training cases and `others`; writes leep.json and maps/."""
    config, log, group, train = session.config, session.log, session.processes, cases.train
    total = 2 * len(group.share(train)) + len(train) + len(others)
    with log.counting("Source model", total) as advance:
        mapper = SourceMapper(session, source, predictor, len(cases.classes), advance, cases.store)
        maps = mapper.run(train, others)
    if group.is_main:
        _write_leep(config.output, maps, cases.classes, source.classes)
    lo, hi = maps.hardness_range
    cached = f" ({maps.num_cached} maps from the cache)" if maps.num_cached else ""
    log(f"LEEP score {maps.score:.4f}, hardness from {lo:.3f} to {hi:.3f}{cached}")
    if maps.remark:
        log.warn(maps.remark)
    if config.write.maps:
        for case in group.share([*train, *others]):
            _write_maps(config.output / "maps", case, maps)
    return maps
