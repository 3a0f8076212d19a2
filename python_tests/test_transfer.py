"""The harness of the evidence: scenarios, and runs that can be cut."""

from __future__ import annotations

import csv
import itertools
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("monai", reason="needs the extra 'finetune'")
pytest.importorskip("benchmarks", reason="needs the repository's root on the path")

from finetune_data import stop_at, write_cases
from monai.losses import FocalLoss
from transfer_data import TOY

from benchmarks.transfer import losses, runner, work
from benchmarks.transfer.__main__ import main
from benchmarks.transfer.arms import ARMS, DEFAULT, PRIOR, RANDOM
from benchmarks.transfer.scenario import load_scenarios, split
from benchmarks.transfer.store import Store
from riskmap_ext import weighted_loss
from riskmap_ext._files import digest
from riskmap_ext.finetune.data.sampling import CropSampler
from riskmap_ext.finetune.train.step import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A folder of scenario files with a tiny one, toy.yaml, and its data."""
    write_cases(tmp_path / "data" / "toy", 7)
    monkeypatch.setenv("RISKMAP_DATA", str(tmp_path / "data"))
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios" / "toy.yaml").write_text(yaml.safe_dump(TOY))
    return tmp_path


def run_toy(folder: Path, *options: str, arms: str = "ce_dice,risk_dice") -> int:
    places = {"scenario-files": "scenarios", "work": "work", "out": "rows"}
    named = itertools.chain.from_iterable(
        (f"--{key}", str(folder / name)) for key, name in places.items()
    )
    return main(["run", *named, "--workers", "0", "--arms", arms, *options])


def rows(folder: Path) -> list[dict[str, str]]:
    return Store(folder / "rows").read().runs


def unpacked(folder: Path, kind: str) -> Path:
    """As a command that was killed leaves its file."""
    packed = folder / "rows" / f"{kind}.csv.xz"
    packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()
    return packed.with_suffix("")


def without_time(runs: list[dict[str, str]]) -> list[dict[str, str]]:
    timed = ("run", "step_ms", "seconds", "date")
    return sorted(
        ({key: value for key, value in row.items() if key not in timed} for row in runs),
        key=lambda row: [row[key] for key in ("kind", "arm", "lr", "seed")],
    )


def test_runs_are_tuned_stored_and_not_run_again(toy, monkeypatch, capsys):
    assert run_toy(toy) == 0
    found = rows(toy)
    kinds = [(row["kind"], row["arm"]) for row in found]
    assert kinds.count(("tuning", "ce_dice")) == 2
    assert kinds.count(("final", "ce_dice")) == kinds.count(("final", "risk_dice")) == 2
    for arm in ("ce_dice", "risk_dice"):
        tuned = {
            r["lr"]: float(r["mean_dice"])
            for r in found
            if (r["kind"], r["arm"]) == ("tuning", arm)
        }
        best = max(sorted(tuned), key=tuned.__getitem__)
        assert {r["lr"] for r in found if (r["kind"], r["arm"]) == ("final", arm)} == {best}
        assert {r["seed"] for r in found if r["kind"] == "tuning"} == {"1000"}
    stored = Store(toy / "rows").read()
    for row in stored.runs:
        scores = stored.scores[row["run"]]
        assert len(scores) == int(row["scores"]) == 4  # two subjects, two classes
        mean = np.mean([float(score["dice"]) for score in scores])
        assert float(row["mean_dice"]) == pytest.approx(mean, abs=1e-5)
        steps = [int(point["step"]) for point in stored.curves[row["run"]]]
        assert steps == ([1, 2] if row["kind"] == "final" else [2])
    # Runs of a seed differ in the arm alone.
    for seed in ("0", "1"):
        assert len({r["pair"] for r in found if r["seed"] == seed}) == 1
    assert len({r["pair"] for r in found}) == 3
    assert not any((toy / "work" / "runs").iterdir())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(work, "finetune", never)
    assert run_toy(toy) == 0
    assert "4 tuning runs are there" in capsys.readouterr().out
    assert rows(toy) == found


def test_a_cut_line_and_a_killed_run_are_done_again(toy, monkeypatch):
    assert run_toy(toy, "--seeds", "0") == 0
    whole = rows(toy)
    path = unpacked(toy, "runs")
    path.write_bytes(path.read_bytes()[:-20])
    assert len(rows(toy)) == len(whole) - 1
    assert Store(toy / "rows").read().cut == 4  # its scores
    stop_at(2, monkeypatch)
    assert run_toy(toy, "--seeds", "0") == 130
    monkeypatch.undo()
    monkeypatch.setenv("RISKMAP_DATA", str(toy / "data"))
    assert len(rows(toy)) == len(whole) - 1
    assert run_toy(toy, "--seeds", "0") == 0
    assert without_time(rows(toy)) == without_time(whole)
    with lzma.open(f"{path}.xz", "rt", newline="") as file:
        assert {len(line) for line in csv.reader(file)} == {len(whole[0])}


def test_a_run_without_all_its_scores_does_not_count(toy):
    assert run_toy(toy, "--seeds", "0") == 0
    path = unpacked(toy, "scores")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert len(rows(toy)) == 5
    assert run_toy(toy, "--seeds", "0") == 0
    assert len(rows(toy)) == 6


def test_worker_processes_do_the_same(toy):
    assert run_toy(toy, "--seeds", "0", arms="risk_dice") == 0
    alone = rows(toy)
    (toy / "rows" / "runs.csv.xz").unlink()
    assert run_toy(toy, "--seeds", "0", "--workers", "2", arms="risk_dice") == 0
    assert without_time(rows(toy)) == without_time(alone)


def test_arms_share_weights_crops_and_order(toy, monkeypatch):
    """And each arm trains on its own loss and weights."""
    batches: list[list[str]] = []
    weights: list[list[str]] = []
    next_batch, begin = CropSampler.next_batch, Stepper.__init__

    def noted_batch(self):
        batch = next_batch(self)
        batches[-1].append(digest(batch.image, batch.label, batch.foreground, batch.cases))
        return batch

    def noted_begin(self, plan, *rest):
        batches.append([])
        weights.append([digest(value) for value in plan.models.network.state_dict().values()])
        begin(self, plan, *rest)

    place = work.Place(toy / "scenarios", toy / "work", toy / "rows")
    scenario = load_scenarios(place.scenarios)["toy"]
    for other in range(max(arm.sources for arm in ARMS.values())):
        work.source_of(scenario, 0, place, other)
    monkeypatch.setattr(CropSampler, "next_batch", noted_batch)
    monkeypatch.setattr(Stepper, "__init__", noted_begin)
    for arm in ARMS:
        work.do(work.Task("toy", 0, arm, "short", 0.01), place)
    assert len(batches) == len(ARMS)
    assert len(batches[0]) == 2
    assert all(own == batches[0] for own in batches)
    firsts: dict[tuple[bool, str], list[str]] = {}
    for each, own in zip(ARMS.values(), weights, strict=True):
        assert firsts.setdefault((each.from_source, each.head), own) == own
    fresh, source, prior = (firsts[k] for k in ((False, RANDOM), (True, RANDOM), (True, PRIOR)))
    assert fresh != source
    assert sum(one != other for one, other in zip(source, prior, strict=True)) == 1  # the bias
    stored = Store(toy / "rows").read()
    curves = {r["arm"]: [c["train_loss"] for c in stored.curves[r["run"]]] for r in stored.runs}
    assert curves.pop("prior_shift") == curves["prior_ce_dice"]  # it differs in prediction alone
    assert len({tuple(curve) for curve in curves.values()}) == len(curves)


def test_a_rate_that_diverges_counts_as_nothing_found(toy):
    place = work.Place(toy / "scenarios", toy / "work", toy / "rows")
    done = work.do(work.Task("toy", 0, "ce", "short", 1e30), place)
    assert done.note == "Dice 0.0"
    (row,) = rows(toy)
    assert (row["mean_dice"], row["scores"]) == ("0.000000", "4")


def test_splits(toy):
    scenario = load_scenarios(toy / "scenarios")["toy"]
    drawn = [split(scenario, seed) for seed in range(6)]
    for parts in drawn:
        assert (len(parts.source), len(parts.train), len(parts.test)) == (2, 2, 2)
        assert len({*parts.source, *parts.train, *parts.test}) == 6
    assert len({tuple(parts.test) for parts in drawn}) > 1
    assert split(scenario, 3) == drawn[3]
    target = scenario.target.model_copy(update={"train": 1, "test": None})
    source = scenario.source.model_copy(update={"subjects": "train"})
    both = scenario.model_copy(update={"target": target, "source": source, "split": "rotated"})
    ways = [split(both, seed) for seed in range(7)]
    assert {parts.train[0] for parts in ways} == {f"case{index:02d}" for index in range(7)}
    assert all(parts.source == parts.train for parts in ways)
    assert all(not set(parts.train) & set(parts.test) for parts in ways)


def test_scenario_files():
    scenarios = load_scenarios()
    assert {"deep_structures_1", "deep_structures_4", "hippocampus_2", "lesions"} <= set(scenarios)
    real = [each for each in scenarios.values() if each.folder]
    assert {each.folder for each in real} == {"hippocampus", "brain_ixi", "ms_lesions"}
    for scenario in scenarios.values():
        assert len(scenario.lengths) >= 2
        assert scenario.seeds >= (10 if scenario.folder else 5)
        setups = {
            work.setup_of(scenario, length, ARMS[arm])
            for length in scenario.lengths
            for arm in ARMS
        }
        assert len(setups) == len(scenario.lengths) * len(ARMS)
        if scenario.simulated:
            own = split(scenario, 0)
            assert not {*own.source, *own.train} & set(own.test)
    few = [split(scenarios[f"deep_structures_{count}"], 2) for count in (1, 2, 4)]
    assert few[0].test == few[1].test == few[2].test
    assert few[2].train[:2] == few[1].train
    assert set(DEFAULT) <= set(ARMS)


def test_what_is_missing_or_unknown_is_told(toy, monkeypatch, capsys):
    monkeypatch.setenv("RISKMAP_DATA", str(toy / "elsewhere"))
    assert run_toy(toy) == 0
    assert "toy: left out: no toy in" in capsys.readouterr().out
    assert run_toy(toy, "--seeds", "0,1000") == 2
    assert "--seeds: 1000 and above are for the learning rates" in capsys.readouterr().err
    assert run_toy(toy, arms="placed,everything") == 2
    assert "--arms: everything unknown; there are default, extra" in capsys.readouterr().err
    assert main(["run", "--scenarios", "nothing"]) == 2
    assert "--scenarios: nothing unknown; there are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "nope"], "error: --lengths: nope unknown; there are short"),
        (["--seeds", "5-2"], "--seeds: expected numbers such as 0-4,7, got 5-2"),
        (["--seeds", "x"], "--seeds: expected numbers such as 0-4,7, got x"),
        (["--scenarios", ""], "--scenarios: expected names, got none"),
        (["--tuning-seeds", "0"], "--tuning-seeds: expected a number from 1, got 0"),
        (["--workers", "-3"], "--workers: expected a number from 0, got -3"),
        (["--shard", "one"], "--shard: expected I/N with I from 1 to N, got one"),
        (["--device", "banana"], "error: --device: banana cannot be used: "),
        (["--out", "FILE"], "error: --out: FILE is no folder"),
        (["--work", "FILE"], "error: --work: FILE is no folder"),
        (["--scenario-files", "nowhere"], "error: nowhere: no scenario files (*.yaml)"),
    ],
    ids=" ".join,
)
def test_bad_options_are_told(toy, capsys, monkeypatch, options, message):
    monkeypatch.chdir(toy)
    Path("FILE").touch()
    code: object
    try:
        code = run_toy(toy, *options)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a: {b", "cannot be read: while parsing"),
        ("", "expected keys of a scenario, got None"),
        ("title: x", "not the sections of a scenario: 'source'"),
        ({"target": 3}, "not the sections of a scenario: "),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"noise": {"moved": 2, "voxels": 1, "omitted": 0}}, "noise.moved: Input should be less"),
        ({"target": {**TOY["target"], "train": []}}, "target.train: expected a number or several"),
    ],
    ids=str,
)
def test_bad_scenario_files_are_told(toy, capsys, change, message):
    path = toy / "scenarios" / "toy.yaml"
    path.write_text(change if isinstance(change, str) else yaml.safe_dump({**TOY, **change}))
    assert run_toy(toy) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {message}")
    assert error.count("\n") == 1


def test_best_rate_is_by_the_mean_and_the_smaller_of_equals(toy):
    scenario = load_scenarios(toy / "scenarios")["toy"]
    setup = work.setup_of(scenario, "short", ARMS["ce"])
    shared = {"kind": "tuning", "scenario": "toy", "length": "short", "arm": "ce", "setup": setup}

    def best(dice: dict[tuple[str, str], str], seeds=(1000, 1001)):
        runs = [{**shared, "lr": k[0], "seed": k[1], "mean_dice": v} for k, v in dice.items()]
        return runner.best_rate(runs, scenario, "ce", "short", seeds)

    dice = {("0.01", "1000"): "0.2", ("0.01", "1001"): "0.6", ("0.02", "1000"): "0.4"}
    assert best(dice) is None
    assert best({**dice, ("0.02", "1001"): "0.4"}) == 0.01
    assert best({**dice, ("0.02", "1001"): "0.5"}) == 0.02
    assert best(dice, seeds=(1000,)) == 0.02


def test_losses():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8), dtype=torch.int16)
    foreground = torch.ones(2, 8, 8, dtype=torch.bool)
    peer = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0)
    expected = 3 * peer(logits, label[:, None].long())  # MONAI's mean is over the classes, too
    torch.testing.assert_close(losses.focal(logits, label, None, foreground), expected)
    ce = torch.nn.functional.cross_entropy(logits, label.long(), reduction="none")
    hardest = ce.flatten().sort(descending=True).values[: 128 // 10].mean()
    torch.testing.assert_close(losses.top_k(logits, label, None, foreground), hardest)
    half = label.clone()
    half[1] = -100
    torch.testing.assert_close(
        losses.focal(logits, half, None, foreground),
        losses.focal(logits[:1], label[:1], None, foreground[:1]),
    )
    for loss in (losses.focal_dice, losses.top_k_dice):
        assert 0 < loss(logits, half, None, foreground) < 10


def test_weights_that_fade():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    foreground, risk = torch.ones(2, 8, 8, dtype=torch.bool), 1 + torch.rand(2, 8, 8)
    loss = losses.Fading([], 3, 4)
    for power in (1, 0.75, 0.5, 0.25, 0, 0):
        expected = weighted_loss(logits, label, risk**power, foreground=foreground, dice_weight=1.0)
        torch.testing.assert_close(loss(logits, label, risk, foreground), expected)
