"""What the stored rows say: per scenario and length the arms, their means and differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.transfer import stats
from benchmarks.transfer.arms import ARMS
from benchmarks.transfer.scenario import Scenario
from benchmarks.transfer.stats import Interval, Result, Signs
from benchmarks.transfer.store import Row, Rows
from benchmarks.transfer.work import FINAL, TUNING

POINTS = 100  # Dice points


@dataclass(frozen=True)
class Runs:
    """The runs of one arm that belong together: one definition, one learning rate."""

    arm: str
    lr: float
    rows: list[Row] = field(repr=False)
    results: list[Result] = field(repr=False)
    at_edge: bool  # the rate is the smallest or largest that was tried
    near_tie: bool  # another rate came within a point of it
    scores: dict[tuple[int, str, str], Row] = field(repr=False)  # by seed, subject and class

    def mean(self) -> Interval:
        return stats.interval(stats.values(self.results))

    def classes(self) -> dict[str, float]:
        """Mean Dice of each class over seeds and subjects."""
        found: dict[str, list[float]] = {}
        for result in self.results:
            for row in result.dice.values():
                for name, dice in row.items():
                    found.setdefault(name, []).append(dice)
        return {name: statistics.fmean(dice) for name, dice in found.items()}

    def share(self, column: str) -> float:
        """Mean of a column of the scores over seeds, subjects and classes that have it."""
        known = [float(row[column]) for row in self.scores.values() if row[column]]
        return statistics.fmean(known) if known else math.nan

    def missed(self) -> float:
        """Share of the structures of which nothing was found."""
        return statistics.fmean(not row["hd95"] for row in self.scores.values())

    def step_ms(self) -> float:
        known = [float(row["step_ms"]) for row in self.rows if row["step_ms"]]
        return statistics.median(known) if known else math.nan


@dataclass(frozen=True)
class Group:
    """A scenario at one length. runs: by arm, in the order of ARMS. left_out: notes."""

    scenario: str
    length: str
    steps: int
    runs: dict[str, Runs]
    hd95: dict[str, float] = field(repr=False)
    hd95_of_seeds: dict[str, dict[int, float]] = field(repr=False)
    curves: dict[str, list[tuple[float, float]]] = field(repr=False)
    left_out: list[str]
    overlap: float  # subjects tested on per subject learnt from, where splits share them
    _against: dict[tuple[str, str], Interval] = field(default_factory=dict, init=False, repr=False)

    @property
    def seeds(self) -> int:
        return max(len(runs.results) for runs in self.runs.values())

    def against(self, arm: str, other: str) -> Interval | None:
        """The paired difference over the seeds that both have; None where there is none."""
        if arm not in self.runs or other not in self.runs:
            return None
        if (arm, other) not in self._against:
            one, two = self.runs[arm].results, self.runs[other].results
            shared = {r.seed for r in one} & {r.seed for r in two}
            if not shared:
                return None
            pairs = [[r for r in side if r.seed in shared] for side in (one, two)]
            self._against[arm, other] = stats.interval(
                stats.differences(*pairs), overlap=self.overlap
            )
        return self._against[arm, other]

    def column_against(self, arm: str, other: str, column: str) -> Interval | None:
        """The paired difference of a column of the scores; None where there is none."""
        if arm not in self.runs or other not in self.runs:
            return None
        one, two = self.runs[arm].scores, self.runs[other].scores
        found: dict[int, dict[str, list[float]]] = {}
        for seed, subject, name in sorted(one.keys() & two.keys()):
            pair = [rows[seed, subject, name][column] for rows in (one, two)]
            if all(pair):
                each = float(pair[0]) - float(pair[1])
                found.setdefault(seed, {}).setdefault(subject, []).append(each)
        means = {
            seed: {subject: statistics.fmean(each) for subject, each in own.items()}
            for seed, own in found.items()
        }
        return stats.interval(means, overlap=self.overlap) if means else None

    def nearer(self, arm: str, other: str) -> Signs | None:
        """In how many of the seeds that both have the median HD95 of `arm` is lower and higher."""
        if arm not in self.runs or other not in self.runs:
            return None
        one, two = self.hd95_of_seeds[arm], self.hd95_of_seeds[other]
        shared = one.keys() & two.keys()
        lower = sum(one[seed] < two[seed] for seed in shared)
        return Signs(lower, sum(one[seed] > two[seed] for seed in shared), len(shared))

    def distances(self, arm: str, other: str, column: str = "hd95") -> tuple[float, float]:
        """Median HD95 of both over the structures that both found; NaN where there are none."""
        one, two = self.runs[arm].scores, self.runs[other].scores
        both = [key for key in one if key in two and one[key][column] and two[key][column]]
        if not both:
            return math.nan, math.nan
        of_one, of_two = (
            statistics.median(float(rows[key][column]) for key in both) for rows in (one, two)
        )
        return of_one, of_two

    def leep(self) -> tuple[float, float]:
        """Mean LEEP score and label entropy over seeds."""
        rows = next(iter(self.runs.values())).rows
        leep, entropy = ([float(row[key]) for row in rows] for key in ("leep", "entropy"))
        return statistics.fmean(leep), statistics.fmean(entropy)


def groups(rows: Rows, known: Mapping[str, Scenario] | None = None) -> list[Group]:
    """One for each scenario and length that has final runs; of the known ones where given."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows.runs:
        if row["kind"] == FINAL and (known is None or row["scenario"] in known):
            found.setdefault((row["scenario"], row["length"]), []).append(row)
    return [
        _group(*where, final, rows, (known or {}).get(where[0]))
        for where, final in sorted(found.items(), key=lambda item: _order(item[1]))
    ]


def _order(rows: Sequence[Row]) -> tuple[str, int]:
    return rows[0]["scenario"], int(rows[0]["steps"])


def _group(
    name: str, length: str, final: list[Row], rows: Rows, scenario: Scenario | None
) -> Group:
    left_out: list[str] = []
    chosen: dict[str, list[Row]] = {}
    for arm in (key for key in ARMS if any(row["arm"] == key for row in final)):
        chosen[arm] = _of_one_kind(arm, [r for r in final if r["arm"] == arm], left_out)
    _drop_unpaired(chosen, left_out)
    runs = {}
    for arm, own in chosen.items():
        if not own:
            continue
        lr = float(own[0]["lr"])
        rates = _tried(rows.runs, own[0])
        runs[arm] = Runs(
            arm,
            lr,
            own,
            [_result(row, rows.scores[row["run"]]) for row in own],
            len(rates) > 1 and lr in (min(rates), max(rates)),
            lr in rates
            and any(POINTS * (rates[lr] - dice) < 1 for rate, dice in rates.items() if rate != lr),
            {
                (int(row["seed"]), score["subject"], score["class"]): score
                for row in own
                for score in rows.scores[row["run"]]
            },
        )
    return Group(
        name,
        length,
        max(int(row["steps"]) for row in final),
        runs,
        {arm: _hd95(each.rows, rows.scores) for arm, each in runs.items()},
        {
            arm: {int(row["seed"]): _hd95([row], rows.scores) for row in each.rows}
            for arm, each in runs.items()
        },
        {arm: _curve(each.rows, rows.curves) for arm, each in runs.items()},
        left_out,
        _overlap(final, scenario),
    )


def _overlap(final: Sequence[Row], scenario: Scenario | None) -> float:
    """Real subjects come back in other splits; simulated ones do not."""
    if scenario is None or scenario.simulated is not None:
        return 0.0
    row, own = final[0], scenario.source.subjects
    learnt = int(row["train_cases"]) + (0 if own == "train" else own)
    return int(row["test_cases"]) / learnt


def _of_one_kind(arm: str, rows: list[Row], left_out: list[str]) -> list[Row]:
    """Of the definition and rate with the most seeds, the newest of equals; one run a seed."""
    kinds: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        kinds.setdefault((row["setup"], row["lr"]), {})[int(row["seed"])] = row
    best = max(kinds.values(), key=lambda own: (len(own), max(r["date"] for r in own.values())))
    if others := sum(len(own) for own in kinds.values() if own is not best):
        left_out.append(f"{others} runs of {ARMS[arm].name} with another definition or rate")
    return [best[seed] for seed in sorted(best)]


def _drop_unpaired(chosen: dict[str, list[Row]], left_out: list[str]) -> None:
    """Runs whose seed has other cases or another source than most arms have."""
    pairs: dict[str, list[str]] = {}
    for rows in chosen.values():
        for row in rows:
            pairs.setdefault(row["seed"], []).append(row["pair"])
    usual = {seed: statistics.mode(own) for seed, own in pairs.items()}
    for arm, rows in chosen.items():
        kept = [row for row in rows if row["pair"] == usual[row["seed"]]]
        if len(kept) < len(rows):
            left_out.append(
                f"{len(rows) - len(kept)} runs of {ARMS[arm].name} from another source or on other "
                "cases than the other arms of the seed"
            )
        chosen[arm] = kept


def _tried(runs: Sequence[Row], like: Row) -> dict[float, float]:
    """Rate -> mean Dice of its own tuning, or of the length that was tuned in its place."""
    tuned = [row for row in runs if row["kind"] == TUNING]
    for same in (("scenario", "setup"), ("scenario", "arm")):
        found: dict[float, list[float]] = {}
        for row in tuned:
            if all(row[k] == like[k] for k in same):
                found.setdefault(float(row["lr"]), []).append(float(row["mean_dice"]))
        if found:
            return {lr: statistics.fmean(dice) for lr, dice in found.items()}
    return {}


def _result(row: Row, scores: Sequence[Row]) -> Result:
    dice: dict[str, dict[str, float]] = {}
    for score in scores:
        dice.setdefault(score["subject"], {})[score["class"]] = float(score["dice"])
    return Result(int(row["seed"]), row["pair"], dice)


def _hd95(runs: Sequence[Row], scores: Mapping[str, Sequence[Row]]) -> float:
    """Median over seeds, subjects and classes; a structure that was missed counts as infinite."""
    found = [
        float(score["hd95"]) if score["hd95"] else math.inf
        for run in runs
        for score in scores[run["run"]]
    ]
    return statistics.median_low(found) if found else math.nan


def _curve(runs: Sequence[Row], curves: Mapping[str, Sequence[Row]]) -> list[tuple[float, float]]:
    """(step, mean Dice over seeds) at the steps that all runs have."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for row in curves[run["run"]]:
            found.setdefault(int(row["step"]), []).append(float(row["mean_dice"]))
    return [
        (step, float(np.mean(dice)))
        for step, dice in sorted(found.items())
        if len(dice) == len(runs)
    ]
