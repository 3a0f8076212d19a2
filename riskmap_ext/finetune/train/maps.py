"""LEEP statistics and risk maps of all cases from the frozen source model, cached on disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from riskmap_ext.finetune.data.prepare import Case, Cases, fits
from riskmap_ext.finetune.folder.records import LEEP_FILE
from riskmap_ext.finetune.source.checkpoint import SourceModel
from riskmap_ext.finetune.source.predictor import Predictor
from riskmap_ext.finetune.train.session import Session

# Up to this total size, logits of the statistics pass are kept for the maps, else recomputed.
_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class SourceMaps:
    """What the source model says about the target data.

    score: LEEP. hardness_range: (lo, hi) over the training set. transferability, risk: case name ->
    [X, Y, Z] float32 on the prepared grid. remark: the statistics' warning, if any. statistics:
    what all of these were computed from.
    """

    score: float
    hardness_range: tuple[float, float]
    transferability: dict[str, Tensor]
    risk: dict[str, Tensor]
    remark: str | None
    statistics: riskmap_ext.TransferStatistics


class SourceMapper:
    """Streams the statistics over the training set and makes each case's maps; caches both.

    Cache keys are digests of what the maps depend on: prepared image and label, the source's
    weights, the sliding window, the statistics of the training set, and the risk options.

    made: the number of cases whose maps were not in the cache.
    """

    def __init__(
        self,
        session: Session,
        source: SourceModel,
        predictor: Predictor,
        cases: Cases,
        progress: Callable[[str], Any],
    ) -> None:
        """cases: those of the statistics; if their volumes are on disk, the maps stay there."""
        config = session.config
        window = {
            "patch_size": predictor.patch,
            "overlap": config.inference.overlap,
            "channels": predictor.channels,
        }
        settings = [riskmap_ext.__version__, source.digest, window, len(cases.classes)]
        self._study = digest(settings, [case.digest for case in cases.train])
        self._cases = cases
        self._predictor = predictor
        self._risk = config.risk
        self._cache = config.cache or config.output / "cache"
        self._progress = progress
        self._regions = source.structures.table
        self._group = session.processes
        self._logits: dict[str, Tensor] = {}
        self.made = 0

    def statistics(self) -> riskmap_ext.TransferStatistics:
        """LEEP statistics of the training cases, both passes; from the cache if possible."""
        path = self._cache / f"statistics-{self._study[:24]}.pt"
        group, stored = self._group, self._stored(path)
        if all(group.gather(stored is not None)) and stored is not None:
            return stored
        statistics = self._no_statistics()

        def add(step: Callable[[Tensor, Tensor], None], name: str) -> None:
            for case in group.share(self._cases.train):
                logits = self._source_logits(case)
                step(logits, case.label[None].to(logits.device))
                self._progress(f"{name} of {case.name}")

        for step, name in ((statistics.update, "statistics"), (statistics.update_range, "range")):
            group.together(lambda step=step, name=name: add(step, name))  # type: ignore[misc]
            if group.size > 1:
                statistics.all_reduce()
        group.on_main(lambda: write_checkpoint(path, statistics.state_dict()))
        return statistics

    def _no_statistics(self) -> riskmap_ext.TransferStatistics:
        return riskmap_ext.TransferStatistics(
            len(self._cases.classes), ignore_index=IGNORE_INDEX, regions=self._regions
        )

    def _stored(self, path: Path) -> riskmap_ext.TransferStatistics | None:
        """Those in the cache; None if the file is missing, damaged or of something else."""
        statistics = self._no_statistics()
        with suppress(TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
            statistics.load_state_dict(read_torch(path))
            joint, scope = statistics.joint, statistics.hardness_range
            if joint.dim() == 2 and len(joint) == statistics.num_classes:
                numbers = (*scope, float(joint.sum()), statistics.num_voxels)
                return statistics if all(map(math.isfinite, numbers)) else None
        return None

    def maps(self, case: Case, statistics: Any) -> dict[str, Tensor]:
        """transferability and risk of a case; from the cache if possible."""
        options = self._risk.model_dump(mode="json", exclude={"use"})
        path = self._cache / f"maps-{digest(self._study, case.digest, options)[:24]}.pt"
        on_disk = self._cases.store is not None
        maps = read_torch(path, mapped=on_disk)
        shape = case.label.shape
        if not fits(maps, dict.fromkeys(("transferability", "risk"), (shape, torch.float32))):
            maps = self._maps(case, statistics)
            write_checkpoint(path, maps)
            self.made += 1
            if on_disk:
                maps = read_torch(path, mapped=True) or maps
        self._logits.pop(case.name, None)
        return maps

    def _maps(self, case: Case, statistics: Any) -> dict[str, Tensor]:
        logits = self._source_logits(case)
        label = case.label[None].to(logits.device)
        conditional = statistics.conditional.to(logits.device)
        scope: dict[str, Any] = {"dataset": statistics.hardness_range, "image": None}
        wanted = self._risk.range
        given = (logits, label, conditional)
        transferability = riskmap_ext.transferability_map(
            *given, ignore_index=IGNORE_INDEX, regions=self._regions
        )
        risk = riskmap_ext.risk_map(
            *given,
            **self._risk.model_dump(exclude={"use", "range"}),
            range=scope[wanted] if isinstance(wanted, str) else (wanted[0], wanted[1]),
            ignore_index=IGNORE_INDEX,
            regions=self._regions,
        )
        return {"transferability": transferability[0].cpu(), "risk": risk[0].cpu()}

    def _source_logits(self, case: Case) -> Tensor:
        if case.name in self._logits:
            return self._logits[case.name]
        logits = self._predictor(case.image)
        # In float64, a sum is finite if and only if all of its float32 terms are.
        if not math.isfinite(float(logits.sum(dtype=torch.float64))):
            raise InputError(
                f"{case.files.image}: the source model's logits of case {case.name} are NaN or "
                "infinite; check its intensities and data.normalize against the source's training"
            )
        kept = sum(t.numel() * t.element_size() for t in self._logits.values())
        if kept + logits.numel() * logits.element_size() <= _KEPT_BYTES:
            self._logits[case.name] = logits
        return logits


def map_cases(
    session: Session,
    source: SourceModel,
    predictor: Predictor,
    cases: Cases,
    others: Sequence[Case],
) -> SourceMaps:
    """Maps of the training cases and `others`; writes leep.json and maps/.

    The statistics and the dataset's range come from the training cases alone.
    """
    config, log, group, train = session.config, session.log, session.processes, cases.train
    every, transferability, risk = [*train, *others], {}, {}
    with log.counting("Source model", 2 * len(group.share(train)) + len(every)) as advance:
        mapper = SourceMapper(session, source, predictor, cases, advance)
        statistics = mapper.statistics()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            score = statistics.score
        if group.size > 1:  # each process makes its share; all find it in the cache
            group.together(lambda: [mapper.maps(case, statistics) for case in group.share(every)])
        for case in every:
            maps = mapper.maps(case, statistics)
            transferability[case.name], risk[case.name] = maps["transferability"], maps["risk"]
            advance(f"map of {case.name}")
    remark = "; ".join(one_line(w.message) for w in caught) or None
    lo, hi = statistics.hardness_range
    cached = len(every) - sum(group.gather(mapper.made))
    told = f" ({cached} maps from the cache)" if cached > 0 else ""
    log(f"LEEP score {score:.4f}, hardness from {lo:.3f} to {hi:.3f}{told}")
    if remark:
        log.warn(remark)
    found = SourceMaps(score, (lo, hi), transferability, risk, remark, statistics)
    if group.is_main:
        _write_leep(config.output, found, cases.classes, source.classes)
    if config.write.maps:
        for case in group.share(every):
            _write_maps(config.output / "maps", case, found)
    return found


def _write_maps(folder: Path, case: Case, maps: SourceMaps) -> None:
    """<case>_transferability.nii.gz and <case>_risk.nii.gz on the image file's own grid."""
    for kind, volumes in (("transferability", maps.transferability), ("risk", maps.risk)):
        # Nearest voxel, since both belong to its label.
        values = case.grid.to_file(case.grid.to_full(volumes[case.name], mode="nearest"))
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
            "conditional": statistics.conditional.tolist(),
        },
    )
