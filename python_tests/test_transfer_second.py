"""The second round of the evidence: offsets, rates given up, splits held out, its statistics."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")
pytest.importorskip("benchmarks", reason="needs the repository's root on the path")

from finetune_data import write_cases
from scipy.stats import t as student
from test_transfer_page import made_up
from transfer_data import TOY

from benchmarks.transfer import offsets, runner
from benchmarks.transfer.arms import SECOND
from benchmarks.transfer.scenario import Scenario, load_scenarios, split
from benchmarks.transfer.second import BASELINE, write_pages
from benchmarks.transfer.stats import interval, survivors
from benchmarks.transfer.store import SCORE_FIELDS, Store
from benchmarks.transfer.work import setup_of, without_islands


def toy(**changed: Any) -> Scenario:
    return Scenario(**{**TOY, "name": "toy", **changed})


def test_subjects_held_out_are_tests_of_the_tuning_alone(tmp_path, monkeypatch):
    write_cases(tmp_path / "toy", 8)
    monkeypatch.setenv("RISKMAP_DATA", str(tmp_path))
    target = {**TOY["target"], "test": None}
    scenario = toy(source={**TOY["source"], "subjects": 3}, target=target, held_out=2)
    tuned = [split(scenario, seed) for seed in range(1000, 1010)]
    final = [split(scenario, seed) for seed in range(10)]
    reserved = set(tuned[0].test)
    assert len(reserved) == 2
    for each in tuned:
        assert set(each.test) == reserved
        assert len({*each.source, *each.train, *each.test}) == 3 + 2 + 2
    for each in final:
        assert reserved <= set(each.source)
        assert not reserved & {*each.train, *each.test}
        assert (len(each.train), len(each.test)) == (2, 3)
    assert len({tuple(each.train) for each in final}) > 3
    with pytest.raises(ValueError, match=r"held_out: expected no more than source\.subjects"):
        toy(held_out=3)


def test_rates_far_behind_are_given_up():
    tuning = {"rates": [0.01, 0.02, 0.04], "seeds": 3, "first": 2, "behind": 2.0}
    scenario = toy(tuning=tuning)
    wanted = runner.Wanted({"toy": scenario}, ["ce_dice"])
    rows: list[dict[str, str]] = []

    def store(rate: float, seed: int, dice: float) -> None:
        setup = setup_of(scenario, "short", runner.ARMS["ce_dice"])
        row = {"kind": "tuning", "scenario": "toy", "length": "short", "arm": "ce_dice"}
        done = {"lr": repr(rate), "seed": str(seed), "mean_dice": str(dice), "setup": setup}
        rows.append({**row, **done})

    def asked() -> list[tuple[float, int]]:
        return [(task.lr, task.seed) for task in runner.tuning_tasks(wanted, scenario, rows)]

    def best() -> float | None:
        return runner.best_rate(rows, scenario, "ce_dice", "short", scenario.tuning_seeds)

    assert len(asked()) == 6
    for rate, dice in ((0.01, 0.50), (0.02, 0.511), (0.04, 0.48)):
        for seed in (1000, 1001):
            store(rate, seed, dice)
    assert {pair for pair in asked() if pair[1] == 1002} == {(0.01, 1002), (0.02, 1002)}
    assert best() is None
    store(0.01, 1002, 0.60)
    assert best() is None
    store(0.02, 1002, 0.50)
    assert best() == 0.01


def test_the_correction_for_overlapping_splits_is_that_of_nadeau_and_bengio():
    means = [0.1, 0.4, 0.2, 0.6, 0.3, 0.25]
    found = {seed: {"a": each, "b": each} for seed, each in enumerate(means)}
    each = interval(found, overlap=0.5)
    error = np.std(means, ddof=1) * math.sqrt(1 / 6 + 0.5)
    expected = 2 * student.sf(np.mean(means) / error, 5)
    assert each.corrected_p == pytest.approx(expected)
    assert each.corrected_p > 5 * interval(found).corrected_p
    nothing = interval({seed: {"a": 0.0, "b": 0.0} for seed in range(3)})
    assert (nothing.p, nothing.corrected_p) == (1.0, 1.0)


def test_p_and_interval_say_the_same():
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = {s: {f"{s}{k}": rng.normal(0.3, 1) for k in range(4)} for s in range(6)}
        each = interval(found, 500)
        assert (each.p < 0.05) == (each.told != "not told apart")


def test_survivors_of_benjamini_and_hochberg():
    assert survivors([0.001, 0.02, 0.03, 0.5]) == [True, True, True, False]
    assert survivors([0.04, 0.5, 0.6, 0.7]) == [False] * 4
    assert survivors([]) == []


def test_islands():
    mask = np.zeros((12, 12, 3), bool)
    mask[:5, :4] = True  # 60 voxels
    mask[5, 4, 0] = True  # touches it at a corner
    mask[8:10, 8:10] = True  # 12 of 61: an island
    kept = without_islands(mask)
    assert kept.sum() == 61
    assert not kept[8:].any()
    mask[8:10, 10] = True  # 18: none
    assert (without_islands(mask) == mask).all()
    assert not without_islands(np.zeros((2, 2, 2), bool)).any()


class Linear(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(channels)
        self.layer = torch.nn.Conv2d(1, channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image)


def plan_and_maps(steps: int = 10) -> tuple[Any, Any, torch.Tensor]:
    """A plan of 3 classes with a source of 4, their statistics, and an image."""
    generator = torch.Generator().manual_seed(1)
    conditional = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    conditional /= conditional.sum(dim=0)
    frequencies = torch.tensor([0.9, 0.08, 0.02], dtype=torch.float64)
    statistics = SimpleNamespace(conditional=conditional, class_frequencies=frequencies)
    models = SimpleNamespace(network=Linear(3), source=SimpleNamespace(network=Linear(4)))
    config = SimpleNamespace(train=SimpleNamespace(steps=steps))
    plan = SimpleNamespace(models=models, config=config)
    return plan, SimpleNamespace(statistics=statistics), torch.randn(2, 1, 5, 6)


@pytest.mark.parametrize("fades", [False, True])
def test_the_offset_is_the_bounded_ratio_of_source_and_frequency(fades):
    plan, maps, image = plan_and_maps()
    network, source = plan.models.network, plan.models.source.network
    plain = network(image).detach()
    theta = source(image).softmax(dim=1)
    chance = torch.einsum("cz,bzxy->bcxy", maps.statistics.conditional.float(), theta)
    frequency = maps.statistics.class_frequencies.float().view(1, 3, 1, 1)
    ratio = ((chance + 0.01) / (frequency + 0.01)).log()
    offsets.TransferPrior(0.5, fades)(plan, maps)
    network.train()
    for step in range(10):
        left = max(0.0, 1 - step / 8) if fades else 1.0
        torch.testing.assert_close(network(image), plain + 0.5 * left * ratio)
    network.eval()
    torch.testing.assert_close(network(image), plain + (0.0 if fades else 0.5) * ratio)


def test_the_shift_is_of_prediction_alone():
    plan, maps, image = plan_and_maps()
    label = torch.zeros(4, 4, 1, dtype=torch.int16)
    label[0] = 1
    label[1] = -100
    transferability = torch.full(label.shape, -1.0)
    transferability[0] = -3.0  # the hardest: weight 10
    plan.cases = SimpleNamespace(
        classes=["background", "box", "none"], train=[SimpleNamespace(name="a", label=label)]
    )
    maps.transferability, maps.hardness_range = {"a": transferability}, (1.0, 3.0)
    network = plan.models.network
    plain = network(image).detach()
    offsets.shifted(plan, maps)
    torch.testing.assert_close(network(image), plain)
    network.eval()
    shift = torch.tensor([0.0, math.log(10), 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(network(image), plain + shift)


def test_pages_from_made_up_rows(tmp_path):
    gains = dict(zip(SECOND, np.linspace(0.0, 0.1, len(SECOND)), strict=True))
    made_up(tmp_path / "rows", gains, scenario="brains")
    made_up(tmp_path / "rows", {"ce_dice": 0.0, "offset5_ce_dice": 0.1}, scenario="shifted_1")
    page = tmp_path / "evidence.md"
    write_pages(tmp_path / "rows", page)
    text = page.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| [brains]"))
    assert row.count("●") == 5  # the made-up gains are far beyond the noise
    assert "* class prior: ahead in 1 of 1 (1 ●), behind in 0 (0 ●)." in text
    assert "## Where the output layer is the source's" in text
    assert "## Without islands" in text
    # Of brains 7 arms against the prior, of shifted_1 one.
    assert "8 comparisons are in the family: 8 intervals exclude 0, of which 8 are marked." in text
    tables = (tmp_path / "evidence" / "second_round.md").read_text()
    assert f"against {runner.ARMS[BASELINE].name}" in tables
    assert "## shifted_1" in tables
    for link in ("brains-differences.png", "shifted_1-differences.png"):
        assert f"]({link})" in tables
        assert (tmp_path / "evidence" / link).stat().st_size > 5000
    again = tmp_path / "again" / "evidence.md"
    write_pages(tmp_path / "rows", again)
    assert again.read_text() == text


def test_rows_of_the_first_round_have_no_precision(tmp_path):
    made_up(tmp_path, {"ce_dice": 0.1}, seeds=2)
    path = tmp_path / "scores.csv"
    lines = [",".join(line.split(",")[:5]) for line in path.read_text().splitlines()]
    path.write_text("\n".join([*lines, ""]))
    store = Store(tmp_path)
    before = store.read()
    assert all(row["precision"] == "" for rows in before.scores.values() for row in rows)
    store.pack()
    assert store.read() == before
    assert set(next(iter(before.scores.values()))[0]) == set(SCORE_FIELDS)


def test_scenarios_of_the_second_round():
    second = {name: each for name, each in load_scenarios().items() if each.round == 2}
    assert len(second) == 11
    for each in second.values():
        assert each.tuning.seeds >= 4
        assert each.final_seeds[0] == 10
        if each.folder and each.source.subjects != "train":
            assert each.held_out
