"""Training labels with an annotator's errors: slices that lie off, structures that are left out."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from benchmarks.transfer.scenario import Noise
from riskmap_ext._files import digest
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.data.prepare import Case, Cases

_WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def mislabelled(cases: Cases, noise: Noise, seed: int) -> Cases:
    """The same cases; the labels of those to train on are wrong as `noise` says."""
    return replace(cases, train=[_mislabelled(case, noise, seed) for case in cases.train])


def _mislabelled(case: Case, noise: Noise, seed: int) -> Case:
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    label = case.label.clone()
    for index in range(label.shape[-1]):
        part = label[..., index]
        for structure in part.unique().tolist():
            if structure not in (0, IGNORE_INDEX) and rng.random() < noise.omitted:
                part[part == structure] = 0
        if rng.random() < noise.moved:
            across, along = (noise.voxels * step for step in _WAYS[rng.integers(len(_WAYS))])
            label[..., index] = _moved(part, across, along)
    name = digest(case.digest, noise.model_dump(mode="json"), seed)
    return replace(case, label=label, digest=name)


def _moved(part: Tensor, across: int, along: int) -> Tensor:
    """Background comes in at the border."""
    wide = F.pad(part, (max(along, 0), max(-along, 0), max(across, 0), max(-across, 0)))
    size, length = part.shape
    return wide[max(-across, 0) :, max(-along, 0) :][:size, :length]
