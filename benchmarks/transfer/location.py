"""Voxel weights that differ within a class: where, not which class.

A factor is divided by its mean over each class's training voxels and multiplies the class weights
√(1/f): such an arm differs from "class weights + Dice" in the place of the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import riskmap_ext
from benchmarks.transfer.sources import Sources
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.data.prepare import Case, class_voxels
from riskmap_ext.finetune.train.maps import SourceMaps
from riskmap_ext.nn import RiskWeightedLoss
from riskmap_ext.statistics import sqrt_inverse_frequency

Volumes = Mapping[str, Tensor]

EXPONENT = 0.5
# A likelihood over its mean in the class stays within 1 / REACH to REACH; absolute bounds would
# cut off rare classes, whose likelihoods are all small.
REACH = 100.0
_TINY = 1e-6  # of a likelihood, as in the transferability map
_NEIGHBOURS = 15
_REFERENCES = 256  # of each class and case
_CHUNK = 1 << 14


def class_means(maps: SourceMaps, cases: Sequence[Case], sources: Sources) -> Volumes:
    """The risk maps with each weight replaced by the mean of its class over the training voxels."""
    return _of_labels(_means(maps.risk, cases, sources.num_classes), cases)


def output(maps: SourceMaps, cases: Sequence[Case], sources: Sources) -> Volumes:
    """More weight where LEEP's likelihood of the label is low."""
    return _factor(source_likelihood(maps, cases, sources), cases, sources, -EXPONENT)


def several(maps: SourceMaps, cases: Sequence[Case], sources: Sources) -> Volumes:
    """As output, with the mean likelihood of several sources."""
    found = sources.likelihoods(cases)
    mean = {case.name: torch.stack([each[case.name] for each in found]).mean(0) for case in cases}
    return _factor(mean, cases, sources, -EXPONENT)


def gaussian(maps: SourceMaps, cases: Sequence[Case], sources: Sources) -> Volumes:
    """As output, with a Gaussian head of one covariance on the source's features."""
    return _factor(_kept(gaussian_likelihood, cases, sources), cases, sources, -EXPONENT)


def neighbours(maps: SourceMaps, cases: Sequence[Case], sources: Sources) -> Volumes:
    """As output, with the nearest neighbours among the source's features in the other cases."""
    return _factor(_kept(neighbour_likelihood, cases, sources), cases, sources, -EXPONENT)


def doubt_output(maps: SourceMaps, cases: Sequence[Case], sources: Sources) -> Volumes:
    """Less weight where LEEP's likelihood of the label is low: the label is doubted."""
    return _factor(source_likelihood(maps, cases, sources), cases, sources, EXPONENT)


def doubt_neighbours(maps: SourceMaps, cases: Sequence[Case], sources: Sources) -> Volumes:
    """As doubt_output, with the nearest neighbours' likelihood."""
    return _factor(_kept(neighbour_likelihood, cases, sources), cases, sources, EXPONENT)


def source_likelihood(maps: SourceMaps, cases: Sequence[Case], sources: Sources) -> Volumes:
    """Not a weight: what Disagreement compares the model with."""
    return {case.name: maps.transferability[case.name].exp() for case in cases}


class _Refreshed:
    """Class weights times a factor of the model that is being trained; one instance a run.

    The factor has a mean of 1 over the voxels of each class in a batch.
    """

    exponent = -EXPONENT

    def __init__(self, cases: Sequence[Case], num_classes: int, steps: int) -> None:
        self._loss = RiskWeightedLoss(
            weight=sqrt_inverse_frequency(class_voxels(cases, num_classes)),
            ignore_index=IGNORE_INDEX,
            dice_weight=1.0,
        )
        self._num_classes = num_classes

    def __call__(
        self, logits: Tensor, label: Tensor, risk: Tensor | None, foreground: Tensor
    ) -> Tensor:
        with torch.no_grad():
            likelihood = self.likelihood(logits.detach(), label, risk)
            raised = self._over_mean(likelihood, label).clamp(1 / REACH, REACH) ** self.exponent
            weight = self._over_mean(raised, label)
        return self._loss(logits, label, weight, foreground=foreground)

    def likelihood(self, logits: Tensor, label: Tensor, risk: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _over_mean(self, values: Tensor, label: Tensor) -> Tensor:
        """Of the class in the batch."""
        total, count = class_sums(values, label, self._num_classes)
        return _relative(values, label, total / count.clamp(min=1))


class Refreshed(_Refreshed):
    """LEEP of the model that is being trained: statistics of the last batches, then p^-1/2."""

    _memory = 0.95

    def __init__(self, cases: Sequence[Case], num_classes: int, steps: int) -> None:
        super().__init__(cases, num_classes, steps)
        self._joint: Tensor | float = 0.0

    def likelihood(self, logits: Tensor, label: Tensor, risk: Tensor | None) -> Tensor:
        given: dict[str, Any] = {"ignore_index": IGNORE_INDEX}
        joint = riskmap_ext.leep_statistics(logits, label, self._num_classes, **given)
        self._joint = joint = self._memory * self._joint + joint
        conditional = riskmap_ext.conditional(joint)
        return riskmap_ext.transferability_map(logits, label, conditional, **given).exp()


class DoubtRefreshed(Refreshed):
    """As Refreshed, with less weight where the likelihood is low."""

    exponent = EXPONENT


class Hardness(_Refreshed):
    """More weight where the model that is being trained gives the label a low probability."""

    def likelihood(self, logits: Tensor, label: Tensor, risk: Tensor | None) -> Tensor:
        index = label.long().clamp(min=0)[:, None]
        return logits.float().softmax(dim=1).gather(1, index)[:, 0]


class Disagreement(Hardness):
    """More weight where the source tells the label better than the model that is being trained.

    (q / p)^1/2 of the likelihoods of the source (LEEP) and of the model.
    """

    def likelihood(self, logits: Tensor, label: Tensor, risk: Tensor | None) -> Tensor:
        assert risk is not None
        return super().likelihood(logits, label, risk) / risk.clamp(min=_TINY)


def gaussian_likelihood(cases: Sequence[Case], sources: Sources) -> Volumes:
    """p(y|f) of class means, frequencies and one covariance of all training voxels' features."""
    features = {name: each.flatten(1).double() for name, each in sources.features(cases).items()}
    labels = {case.name: case.label.flatten().long() for case in cases}
    size, count = len(next(iter(features.values()))), sources.num_classes
    total = torch.zeros(count, dtype=torch.float64)
    mean = torch.zeros(count, size, dtype=torch.float64)
    square = torch.zeros(size, size, dtype=torch.float64)
    for name, label in labels.items():
        valid = label != IGNORE_INDEX
        own = features[name][:, valid]
        total += torch.bincount(label[valid], minlength=count)
        mean.index_add_(0, label[valid], own.T)
        square += own @ own.T
    mean /= total.clamp(min=1)[:, None]
    covariance = (square - (mean.T * total) @ mean) / total.sum()
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    direction = torch.linalg.solve(covariance, mean.T).T
    offset = (total / total.sum()).log() - 0.5 * (direction * mean).sum(dim=1)
    found = {}
    for case in cases:
        chance = (direction @ features[case.name] + offset[:, None]).softmax(dim=0)
        own = chance.gather(0, labels[case.name].clamp(min=0)[None])[0]
        found[case.name] = own.float().view(case.label.shape)
    return found


def neighbour_likelihood(cases: Sequence[Case], sources: Sources) -> Volumes:
    """p(y|f) from the k nearest voxels of the other cases, as many drawn of each class.

    f_y (k_y + 1 / C) over its sum over the classes, f their frequencies. With one case alone, of
    the case itself.
    """
    features = {name: each.flatten(1).T for name, each in sources.features(cases).items()}
    labels = {case.name: case.label.flatten().long() for case in cases}
    count = sources.num_classes
    every = torch.cat(list(labels.values()))
    frequency = torch.bincount(every[every != IGNORE_INDEX], minlength=count)
    frequency = frequency / frequency.sum()
    drawn = {}
    for place, case in enumerate(cases):
        generator = torch.Generator().manual_seed(place)
        chosen = []
        for index in range(count):
            where = (labels[case.name] == index).nonzero()[:, 0]
            order = torch.randperm(len(where), generator=generator)
            chosen.append(where[order[:_REFERENCES]])
        rows = torch.cat(chosen)
        drawn[case.name] = (features[case.name][rows], labels[case.name][rows])
    found = {}
    for case in cases:
        others = [each for name, each in drawn.items() if name != case.name]
        others = others or [drawn[case.name]]
        references = torch.cat([each for each, _ in others])
        classes = torch.cat([each for _, each in others])
        known = min(_NEIGHBOURS, len(references))
        chances = []
        label = labels[case.name]
        for start in range(0, len(label), _CHUNK):
            part = slice(start, start + _CHUNK)
            # Squared distances up to a term of the voxel alone.
            apart = (references**2).sum(dim=1) - 2 * features[case.name][part] @ references.T
            near = classes[apart.topk(known, dim=1, largest=False, sorted=False).indices]
            votes = F.one_hot(near, count).sum(dim=1) + 1 / count
            chance = votes * frequency / (votes * frequency).sum(dim=1, keepdim=True)
            chances.append(chance.gather(1, label[part, None].clamp(min=0))[:, 0])
        found[case.name] = torch.cat(chances).view(case.label.shape)
    return found


# What a stored run of these arms depends on, beside the functions' names.
CONSTANTS = [EXPONENT, REACH, _TINY, _NEIGHBOURS, _REFERENCES]

_RECENT: dict[tuple[object, ...], Volumes] = {}


def _kept(
    likelihood: Callable[[Sequence[Case], Sources], Volumes],
    cases: Sequence[Case],
    sources: Sources,
) -> Volumes:
    """Made once for the runs of a process that differ in their learning rates alone."""
    key = (likelihood.__name__, *sources.digests, *(case.digest for case in cases))
    if key not in _RECENT:
        if len(_RECENT) >= 4:
            del _RECENT[next(iter(_RECENT))]
        _RECENT[key] = likelihood(cases, sources)
    return _RECENT[key]


def _factor(
    likelihood: Volumes, cases: Sequence[Case], sources: Sources, exponent: float
) -> Volumes:
    """Likelihood to the power, over its mean in each class."""

    def over_mean(values: Volumes) -> Volumes:
        mean = _means(values, cases, sources.num_classes)
        return {case.name: _relative(values[case.name], case.label, mean) for case in cases}

    relative = over_mean(likelihood)
    return over_mean(
        {name: each.clamp(1 / REACH, REACH) ** exponent for name, each in relative.items()}
    )


def _relative(values: Tensor, label: Tensor, mean: Tensor) -> Tensor:
    """Over the mean of the class; 0 where the label is ignored."""
    factor = values / mean.to(values.dtype)[label.long().clamp(min=0)].clamp(min=1e-12)
    return torch.where(label == IGNORE_INDEX, 0.0, factor).float()


def _of_labels(values: Tensor, cases: Sequence[Case]) -> Volumes:
    return {
        case.name: torch.where(
            case.label == IGNORE_INDEX, 0.0, values.float()[case.label.long().clamp(min=0)]
        )
        for case in cases
    }


def _means(values: Volumes, cases: Sequence[Case], num_classes: int) -> Tensor:
    """Of each class over the voxels of all cases; [C] float64."""
    total = torch.zeros(num_classes, dtype=torch.float64)
    count = torch.zeros_like(total)
    for case in cases:
        sums = class_sums(values[case.name], case.label, num_classes)
        total, count = total + sums[0], count + sums[1]
    return total / count.clamp(min=1)


def class_sums(values: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Of each class: sum and number of voxels."""
    valid = label != IGNORE_INDEX
    index = label[valid].long()
    total = torch.bincount(index, weights=values[valid].double(), minlength=num_classes)
    return total, torch.bincount(index, minlength=num_classes)
