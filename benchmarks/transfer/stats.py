"""Paired differences between arms, and how far seeds and subjects leave them open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Result:
    """One run. pair: equal where runs may be compared. dice: subject -> class -> 0 to 1."""

    seed: int
    pair: str
    dice: Mapping[str, Mapping[str, float]]

    @property
    def subjects(self) -> dict[str, float]:
        """Mean over the classes that a subject has."""
        return {name: float(np.mean(list(row.values()))) for name, row in self.dice.items()}


@dataclass(frozen=True)
class Interval:
    """A mean with its interval of 95 %; low and high are NaN with less than two seeds or subjects.

    won: seeds with a mean above 0. p: of no difference, two-sided, by the same bootstrap.
    corrected_p: by a t test of the seeds' means whose variance is corrected for overlapping splits.
    """

    mean: float
    low: float
    high: float
    seeds: int
    subjects: int
    won: int
    p: float = 1.0
    corrected_p: float = 1.0

    @property
    def told(self) -> str:
        """ahead, behind, or not told apart."""
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "not told apart"


def differences(runs: Sequence[Result], others: Sequence[Result]) -> dict[int, dict[str, float]]:
    """seed -> subject -> first minus second, each the mean over the subject's classes.

    Raises: ValueError for runs that are no pairs: a seed that one side lacks or has twice, another
    source or other cases, other subjects or classes.
    """
    one, other = (_by_seed(each) for each in (runs, others))
    if alone := sorted(set(one) ^ set(other)):
        raise ValueError(f"seeds {alone}: expected runs of both arms, got one")
    found = {}
    for seed, run in one.items():
        partner = other[seed]
        if run.pair != partner.pair:
            raise ValueError(
                f"seed {seed}: the runs differ in more than the arm (source, cases, crops or "
                f"steps: {run.pair} and {partner.pair})"
            )
        if _layout(run) != _layout(partner):
            raise ValueError(f"seed {seed}: expected the same subjects and classes in both runs")
        theirs = partner.subjects
        found[seed] = {name: value - theirs[name] for name, value in run.subjects.items()}
    return found


def values(runs: Sequence[Result]) -> dict[int, dict[str, float]]:
    """seed -> subject -> mean over its classes."""
    return {seed: run.subjects for seed, run in _by_seed(runs).items()}


def interval(
    found: Mapping[int, Mapping[str, float]], resamples: int = RESAMPLES, overlap: float = 0.0
) -> Interval:
    """The mean over seeds of the mean over subjects, by a bootstrap over both.

    Subjects that are each of one seed alone (simulated) are drawn anew within each drawn seed.
    Subjects that come back under several seeds (real) are drawn once for all seeds, as seeds are:
    a value counts as often as its seed times its subject. The standard error of the resampled
    means, sqrt(n / (n - 1)) wider and with the t quantile of n - 1 degrees, gives the interval,
    n the number of seeds, or of subjects that come back where those are fewer: the percentiles of
    few draws are too narrow. Where subjects do not matter it is the t interval of the seeds' means.

    overlap: of real splits, subjects tested on per subject learnt from. The variance of the mean of
    J seeds is then (1 / J + overlap) s² (Nadeau and Bengio, Machine Learning 52, 2003), not s² / J.
    """
    seeds = [list(rows.items()) for rows in found.values()]
    if not seeds:
        raise ValueError("expected at least one seed, got none")
    means = [float(np.mean([value for _, value in rows])) for rows in seeds]
    mean, count = float(np.mean(means)), len(seeds)
    names = [name for rows in seeds for name, _ in rows]
    won = sum(value > 0 for value in means)
    subjects = len(set(names))
    rng = np.random.default_rng(0)
    nested = len(set(names)) == len(names)
    draw, drawn = (_nested, count) if nested else (_crossed, min(count, subjects))
    if drawn < 2:
        return Interval(mean, math.nan, math.nan, count, subjects, won)
    error = float(draw(seeds, resamples, rng).std()) * math.sqrt(drawn / (drawn - 1))
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, drawn - 1)) * error
    corrected = float(np.std(means, ddof=1)) * math.sqrt(1 / count + overlap) if count > 1 else 0.0
    return Interval(
        *(mean, mean - reach, mean + reach, count, subjects, won),
        *(_p(mean, error, drawn - 1), _p(mean, corrected, count - 1)),
    )


def _p(mean: float, error: float, freedom: int) -> float:
    """Two-sided, of a t statistic."""
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def survivors(p: Sequence[float], rate: float = 1 - LEVEL) -> list[bool]:
    """Which of the comparisons a false discovery rate leaves (Benjamini and Hochberg 1995)."""
    if not p:
        return []
    return [bool(each <= rate) for each in stats.false_discovery_control(p)]


def _nested(
    seeds: Sequence[Sequence[tuple[str, float]]], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Means [resamples] over drawn seeds, with subjects drawn within each."""
    sizes = np.array([len(rows) for rows in seeds])
    table = np.zeros((len(seeds), sizes.max()))
    for row, rows in zip(table, seeds, strict=True):
        row[: len(rows)] = [value for _, value in rows]
    drawn = rng.integers(len(seeds), size=(resamples, len(seeds)))
    size = sizes[drawn][..., None]
    place = (rng.random((*drawn.shape, sizes.max())) * size).astype(int)
    taken = np.arange(sizes.max()) < size
    picked = table[drawn[..., None], place] * taken
    return (picked.sum(axis=2) / size[..., 0]).mean(axis=1)


def _crossed(
    seeds: Sequence[Sequence[tuple[str, float]]], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Means [resamples] over drawn seeds and, for all of them, drawn subjects."""
    names = sorted({name for rows in seeds for name, _ in rows})
    table, there = np.zeros((2, len(seeds), len(names)))
    for index, rows in enumerate(seeds):
        for name, value in rows:
            table[index, names.index(name)] = value
            there[index, names.index(name)] = 1
    by_seed, by_subject = (
        rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
        for count in (len(seeds), len(names))
    )
    weight = by_subject @ there.T
    with np.errstate(invalid="ignore", divide="ignore"):
        # A seed none of whose subjects was drawn has no mean.
        means = np.where(weight > 0, by_subject @ table.T / weight, 0.0)
    counted = by_seed * (weight > 0)
    total = counted.sum(axis=1)
    kept = total > 0
    return (counted * means).sum(axis=1)[kept] / total[kept]


def _by_seed(runs: Sequence[Result]) -> dict[int, Result]:
    found: dict[int, Result] = {}
    for run in runs:
        if run.seed in found:
            raise ValueError(f"seed {run.seed}: expected one run of an arm, got two")
        found[run.seed] = run
    return found


def _layout(run: Result) -> dict[str, list[str]]:
    return {name: sorted(row) for name, row in run.dice.items()}


@dataclass(frozen=True)
class Signs:
    """In how many seeds a number is lower and higher; in the rest it is the same."""

    lower: int
    higher: int
    seeds: int

    @property
    def p(self) -> float:
        """Of a sign test, two-sided; ties do not count."""
        count, least = self.lower + self.higher, min(self.lower, self.higher)
        tail = sum(math.comb(count, k) for k in range(least + 1)) / 2**count
        return min(1.0, 2 * tail)

    @property
    def told(self) -> str:
        if self.p >= 0.05:
            return "not told apart"
        return "lower" if self.lower > self.higher else "higher"
