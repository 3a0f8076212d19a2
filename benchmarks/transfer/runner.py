"""The work list: sources, then the learning rates, then the runs; stored as they end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from benchmarks.transfer.arms import ARMS
from benchmarks.transfer.scenario import Scenario
from benchmarks.transfer.store import Row, keys
from benchmarks.transfer.work import BUSY, FINAL, TUNING, Done, Place, Task, do, key_of, setup_of
from riskmap_ext.demo.workers import start_worker

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What to run. seeds, tuning_seeds: None is each scenario's own."""

    scenarios: dict[str, Scenario]
    arms: Sequence[str]
    lengths: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    tuning_seeds: Sequence[int] | None = None

    def seeds_of(self, scenario: Scenario) -> Sequence[int]:
        return scenario.final_seeds if self.seeds is None else self.seeds

    def tuning_of(self, scenario: Scenario) -> Sequence[int]:
        return scenario.tuning_seeds if self.tuning_seeds is None else self.tuning_seeds

    def lengths_of(self, scenario: Scenario) -> list[str]:
        return [each for each in scenario.lengths if self.lengths is None or each in self.lengths]


def best_rate(
    runs: Iterable[Row], scenario: Scenario, arm: str, length: str, seeds: Sequence[int]
) -> float | None:
    """The rate with the highest mean Dice over the tuning seeds; the smaller of equals.

    None where a run of the tuning is missing.
    """
    at = scenario.tuned_at(length)
    dice = _tuned(runs, scenario, arm, at)
    left = rates_left(dice, scenario, seeds)
    if left is None or any((rate, seed) not in dice for rate in left for seed in seeds):
        return None
    return max(left, key=lambda rate: sum(dice[rate, seed] for seed in seeds))


def rates_left(
    dice: Mapping[tuple[float, int], float], scenario: Scenario, seeds: Sequence[int]
) -> list[float] | None:
    """Rates to go on with after the first seeds, ascending; None where runs of those lack."""
    rates, tuning = sorted(scenario.tuning.rates), scenario.tuning
    if tuning.first is None:
        return rates
    first = seeds[: tuning.first]
    if any((rate, seed) not in dice for rate in rates for seed in first):
        return None
    means = {rate: sum(dice[rate, seed] for seed in first) / len(first) for rate in rates}
    best = max(means.values())
    return [rate for rate in rates if 100 * (best - means[rate]) <= tuning.behind]


def _tuned(
    runs: Iterable[Row], scenario: Scenario, arm: str, at: str
) -> dict[tuple[float, int], float]:
    """(rate, seed) -> mean Dice."""
    wanted = (TUNING, scenario.name, at, arm, setup_of(scenario, at, ARMS[arm]))
    return {
        (float(row["lr"]), int(row["seed"])): float(row["mean_dice"])
        for row in runs
        if (row["kind"], row["scenario"], row["length"], row["arm"], row["setup"]) == wanted
    }


def tuning_tasks(wanted: Wanted, scenario: Scenario, runs: Sequence[Row]) -> list[Task]:
    """Those of the first seeds, and of the others for the rates that are left then."""
    found = []
    seeds = wanted.tuning_of(scenario)
    for length in dict.fromkeys(scenario.tuned_at(each) for each in wanted.lengths_of(scenario)):
        for arm in wanted.arms:
            left = rates_left(_tuned(runs, scenario, arm, length), scenario, seeds)
            for rate in scenario.tuning.rates:
                count = len(seeds) if left and rate in left else scenario.tuning.first
                found += [
                    Task(scenario.name, seed, arm, length, rate, TUNING) for seed in seeds[:count]
                ]
    return found


def final_tasks(wanted: Wanted, scenario: Scenario, runs: Sequence[Row]) -> list[Task]:
    """Seed by seed, so that what is there when a run is cut can be compared."""
    rates = {
        (arm, length): best_rate(runs, scenario, arm, length, wanted.tuning_of(scenario))
        for arm in wanted.arms
        for length in wanted.lengths_of(scenario)
    }
    return [
        Task(scenario.name, seed, arm, length, rate, FINAL)
        for length in wanted.lengths_of(scenario)
        for seed in wanted.seeds_of(scenario)
        for arm in wanted.arms
        if (rate := rates[arm, length]) is not None
    ]


def count_runs(wanted: Wanted) -> int:
    return sum(
        len(tuning_tasks(wanted, each, ()))
        + len(wanted.seeds_of(each)) * len(wanted.arms) * len(wanted.lengths_of(each))
        for each in wanted.scenarios.values()
    )


@dataclass
class _Progress:
    """Lines with the number of runs that are left and about how long they take."""

    left: int
    workers: int
    say: Say
    seconds: list[float] = field(default_factory=list)

    def tell(self, done: Done) -> None:
        if done.task.arm is None:
            return
        self.left -= 1
        if done.seconds is not None:
            self.seconds.append(done.seconds)
        took = "" if done.seconds is None else f", {done.seconds:.1f} s"
        self.say(f"{done.task}: {done.note}{took}; {self.left} runs left{self._rest()}")

    def _rest(self) -> str:
        if not self.seconds or not self.left:
            return ""
        recent = self.seconds[-50:]
        minutes = self.left * sum(recent) / len(recent) / max(1, self.workers) / 60
        return f", about {minutes:.0f} min" if minutes >= 1 else ", less than a minute"


def run(wanted: Wanted, place: Place, workers: int, say: Say = print) -> int:
    """Does what is not there yet; returns how many tasks failed.

    Raises: RuntimeError where a worker process died.
    """
    store = place.store()
    progress = _Progress(count_runs(wanted), workers, say)
    failed = 0
    seen: set[Task] = set()
    pool = None
    if workers > 0:
        # Spawned, since a forked child inherits torch's thread pool in an unusable state.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        for scenario in wanted.scenarios.values():
            again = scenario.tuning.first is not None
            for phase in (TUNING, *[TUNING] * again, FINAL):
                runs = store.read().runs
                tasks = (
                    tuning_tasks(wanted, scenario, runs)
                    if phase == TUNING
                    else final_tasks(wanted, scenario, runs)
                )
                there = keys(runs)
                new = [t for t in tasks if key_of(t, _setup(scenario, t)) not in there]
                done = {*tasks} - {*new} - seen
                seen.update(tasks)
                progress.left -= len(done)
                if done:
                    say(f"{scenario.name}: {len(done)} {phase} runs are there")
                sources = [Task(scenario.name, seed) for seed in dict.fromkeys(t.seed for t in new)]
                for batch in (sources, new):
                    failed += _do_all(pool, batch, place, progress)
                if phase == FINAL:
                    lost = len(wanted.seeds_of(scenario)) * len(wanted.arms) * len(
                        wanted.lengths_of(scenario)
                    ) - len(tasks)
                    progress.left -= lost
                    if lost:
                        say(f"{scenario.name}: {lost} runs wait for learning rates that failed")
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process ended without an error of its own (killed, often for lack of "
            "memory); what is stored stays: run it again, with fewer workers"
        ) from None
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
    return failed


def _setup(scenario: Scenario, task: Task) -> str:
    return setup_of(scenario, task.length, ARMS[str(task.arm)])


def _do_all(
    pool: ProcessPoolExecutor | None, tasks: Sequence[Task], place: Place, progress: _Progress
) -> int:
    if pool is None:
        for task in tasks:
            progress.tell(do(task, place, wait=True))
        return 0
    failed = 0
    of: dict[Future[Done], Task] = {pool.submit(do, task, place): task for task in tasks}
    waiting = set(of)
    while waiting:
        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            try:
                done = future.result()
                if done.note == BUSY:  # once more, when nothing else is left
                    later = pool.submit(do, of[future], place, True)
                    of[later] = of[future]
                    waiting.add(later)
                else:
                    progress.tell(done)
            except BrokenProcessPool:
                raise
            except Exception as error:  # the other runs go on
                failed += 1
                text = " ".join(f"{type(error).__name__}: {error}".split())
                progress.say(f"{of[future]}: failed: {text}")
                progress.left -= of[future].arm is not None
    return failed
