"""The evidence from stored rows: statistics and the page."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")
pytest.importorskip("benchmarks", reason="needs the repository's root on the path")

from scipy.stats import t as student

from benchmarks.transfer import evidence
from benchmarks.transfer.__main__ import main
from benchmarks.transfer.report import write_page
from benchmarks.transfer.scenario import load_scenarios
from benchmarks.transfer.second import write_pages
from benchmarks.transfer.stats import Result, Signs, differences, interval
from benchmarks.transfer.store import Store


def result(seed: int, dice: dict[str, float], pair: str = "") -> Result:
    return Result(seed, pair or str(seed), {name: {"box": value} for name, value in dice.items()})


def test_interval_without_subjects_is_the_t_interval():
    means = [0.1, 0.4, 0.2, 0.6, 0.3, 0.25]
    found = interval({seed: {f"s{seed}": mean} for seed, mean in enumerate(means)}, 40000)
    reach = student.ppf(0.975, 5) * np.std(means, ddof=1) / np.sqrt(6)
    assert found.mean == pytest.approx(np.mean(means))
    assert found.high - found.mean == pytest.approx(reach, rel=0.02)
    assert (found.seeds, found.subjects, found.won, found.told) == (6, 6, 6, "ahead")


def test_subjects_that_come_back_do_not_get_better_known_with_seeds():
    """Differences that belong to the subject alone leave its error, however many the seeds."""
    effects = dict(zip("abcdef", [-0.3, 0.2, 0.5, 0.1, -0.1, 0.4], strict=True))
    crossed = interval(dict.fromkeys(range(50), effects))
    deviation = np.std(list(effects.values()), ddof=1)
    expected = student.ppf(0.975, 5) * deviation / np.sqrt(6)  # the t interval of the subjects
    assert crossed.high - crossed.mean == pytest.approx(expected, rel=0.05)
    nested = interval({seed: {f"{seed}{k}": v for k, v in effects.items()} for seed in range(50)})
    assert nested.high - nested.mean < expected / 5


def test_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        seeds = rng.normal(0, 1, 5)
        rows = {
            s: {f"{s}-{k}": each + rng.normal(0, 1) for k in range(4)}
            for s, each in enumerate(seeds)
        }
        found = interval(rows, 400)
        covered += found.low <= 0 <= found.high
    assert covered >= 186


def test_one_seed_has_no_interval():
    found = interval({0: {"a": 0.2, "b": 0.4}})
    assert found.mean == pytest.approx(0.3)
    assert np.isnan(found.low)
    assert np.isnan(found.high)
    assert found.told == "not told apart"


def test_pairing_refuses_what_is_no_pair():
    one = [result(0, {"a": 0.5, "b": 0.7}), result(1, {"a": 0.2})]
    other = [result(1, {"a": 0.1}), result(0, {"a": 0.4, "b": 0.4})]
    found = differences(one, other)
    assert found == {0: pytest.approx({"a": 0.1, "b": 0.3}), 1: pytest.approx({"a": 0.1})}
    for wrong, message in (
        (other[:1], r"seeds \[0\]: expected runs of both arms"),
        ([other[0], result(0, {"a": 0.4, "b": 0.4}, "x")], "seed 0: the runs differ in more than"),
        ([other[0], result(0, {"a": 0.4})], "seed 0: expected the same subjects and classes"),
        ([*other, other[0]], "seed 1: expected one run of an arm, got two"),
    ):
        with pytest.raises(ValueError, match=message):
            differences(one, wrong)


def made_up(folder: Path, gains: dict[str, float], seeds: int = 6, **changed: str) -> None:
    """Rows of a scenario whose arms gain so much over 0.5, with noise that the arms share."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, (seeds, 3, 2))
    store = Store(folder)
    for (arm, gain), seed in itertools.product(gains.items(), range(seeds)):
        run = f"{arm}{seed}{sorted(changed.values())}"
        hd95 = {"ce_dice": "", "class_dice": "3.5"}.get(arm, "2.5")
        own = rng.normal(0, 0.003, (3, 2)) + noise[seed] + 0.5 + gain
        scores = [
            {"run": run, "subject": f"s{s}", "class": c, "dice": f"{own[s, i]:.4f}", "hd95": hd95}
            for s in range(3)
            for i, c in enumerate(("box", "crate"))
        ]
        row = {
            **{"run": run, "kind": "final", "scenario": "toy", "length": "short", "steps": "100"},
            **{"arm": arm, "lr": "0.01", "seed": seed, "setup": "a", "pair": f"p{seed}"},
            **{"train_cases": 2, "test_cases": 3, "scores": len(scores), "mean_dice": own.mean()},
            **{"leep": "-0.2", "entropy": "0.8", "step_ms": "12.5", "seconds": "3", "cpu": "chip"},
            **{"device": "cpu", "torch": "2", "monai": "1", "riskmap_ext": "0", "date": "2020"},
            **changed,
        }
        curve = [{"run": run, "step": s, "train_loss": 1, "mean_dice": s / 200} for s in (50, 100)]
        store.append(row, scores, curve)


def first_round(rows: Path, page: Path) -> str:
    """The page of the toy and of the scenarios of the first round."""
    known = {name: each for name, each in load_scenarios().items() if each.round == 1}
    toy = known["deep_structures_1"].model_copy(update={"name": "toy", "seeds": 6})
    write_page(Store(rows).read(), page, {**known, "toy": toy})
    return page.read_text()


def test_page_from_made_up_rows(tmp_path):
    gains = {"scratch": -0.1, "ce": 0.0, "ce_dice": 0.1, "linear_dice": 0.2, "class_dice": 0.25}
    made_up(tmp_path / "rows", gains)
    text = first_round(tmp_path / "rows", tmp_path / "page" / "first.md")
    (group,) = evidence.groups(Store(tmp_path / "rows").read())
    against = group.against("linear_dice", "ce_dice")
    assert against is not None
    assert against.mean == pytest.approx(0.1, abs=0.01)
    assert against.told == "ahead"
    assert (
        f"{100 * against.mean:+.1f} ({100 * against.low:+.1f} to {100 * against.high:+.1f})" in text
    )
    assert "Against CE + Dice, of 1 comparisons: ahead in 1 (toy short)" in text
    assert "toy, short: linear risk + Dice is behind class weights + Dice (\u2212" in text
    assert "toy, short: ahead of linear risk + Dice: class weights + Dice (+" in text
    assert "| [toy](#toy) | short, 100 | 2.5 | half missed, 6 of 6 | 3.5, 6 of 6 |" in text
    told = "lower in 1, higher in 0, not told apart in 0"
    assert f"* linear risk + Dice against class weights + Dice, by seeds: {told}." in text
    assert "tells 75 % of the label entropy 0.800" in text
    assert "30 runs that are compared and 0 for learning rates; on chip, cpu" in text
    for name in ("overview", "toy-differences", "toy-curves"):
        assert f"]({name}.png)" in text
        assert (tmp_path / "page" / f"{name}.png").stat().st_size > 5000
    assert first_round(tmp_path / "rows", tmp_path / "again" / "first.md") == text


def test_page_says_how_few_and_what_is_left_out(tmp_path):
    made_up(tmp_path, {"ce_dice": 0.1, "linear_dice": 0.2}, seeds=3, scenario="lesions")
    made_up(tmp_path, {"linear_dice": 0.3}, seeds=2, scenario="lesions", setup="b", date="2021")
    made_up(tmp_path, {"class_dice": 0.3}, seeds=2, scenario="lesions", pair="other")
    text = first_round(tmp_path, tmp_path / "page" / "first.md")
    assert "3 of 5: too few to decide" in text
    assert "2 runs of linear risk + Dice with another definition or rate" in text
    assert "2 runs of class weights + Dice from another source or on other cases" in text
    assert "tissues_t2 | " in text


def test_page_holds_factors_against_class_weights_alone(tmp_path):
    gains = {"ce_dice": 0.1, "linear_dice": 0.15, "class_dice": 0.2}
    made_up(
        tmp_path,
        {
            **gains,
            "place_output": 0.1,
            "doubt_output": 0.4,
            "risk_dice": 0.3,
            "class_mean_dice": 0.3,
        },
    )
    text = first_round(tmp_path, tmp_path / "page" / "first.md")
    section = text[text.index("## Does the location count?") :].split("\n## ")[0]
    (group,) = evidence.groups(Store(tmp_path).read())
    for arm, name in (("place_output", "output"), ("doubt_output", "doubt")):
        against = group.against(arm, "class_dice")
        assert against is not None
        mean = f"{100 * against.mean:+.1f} (".replace("-", "\u2212")
        assert f"| {name} | {mean}" in section
    assert "refreshed" not in section
    assert "Of 3 comparisons: ahead in 1, behind in 1, not told apart in 1." in section
    assert "Of 1 comparisons: ahead in 1, behind in 0, not told apart in 0." in text
    (rivals,) = (line for line in text.splitlines() if "ahead of linear risk + Dice:" in line)
    assert "class weights + Dice" in rivals
    assert "class and" not in rivals
    made_up(tmp_path / "none", gains)
    text = first_round(tmp_path / "none", tmp_path / "page" / "first.md")
    assert "Does the location count?" not in text


def test_rows_that_are_none_are_told(tmp_path, capsys):
    made_up(tmp_path / "rows", {"ce_dice": 0.1})
    path, page = tmp_path / "rows" / "scores.csv", str(tmp_path / "page.md")
    lines = path.read_text().splitlines()
    for dice, said in (("7.5", "'7.5' is no such number"), ("much", "'much' is no such number")):
        cells = lines[3].split(",")
        cells[3] = dice
        path.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:], ""]))
        assert main(["report", "--out", str(path.parent), "--page", page]) == 2
        assert f"error: {path}: line 4: dice: {said}" in capsys.readouterr().err
    path.write_bytes(b"\xff\xfe\n")
    assert main(["report", "--out", str(path.parent), "--page", page]) == 2
    assert f"error: {path}: not a file of rows" in capsys.readouterr().err
    assert main(["report", "--out", str(path), "--page", page]) == 2
    assert f"error: --out: no folder of rows at {path}" in capsys.readouterr().err
    assert not Path(page).exists()


def test_page_without_rows(tmp_path):
    write_pages(tmp_path / "none", tmp_path / "evidence.md")
    for page in ("evidence.md", "evidence/first_round.md"):
        assert "No runs are stored yet" in (tmp_path / page).read_text()


def test_figures_in_prose_are_those_of_the_page():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "evidence.md").read_text(encoding="utf-8")
    for file, title in (("README.md", "## Does it help?"), ("docs/method.md", "## When it helps")):
        text = (root / file).read_text(encoding="utf-8")
        section = " ".join(text[text.index(title) :].split("\n## ")[0].split())
        figures = set(re.findall(r"[+\u2212]\d+\.\d (?:\([^)]*\))?", section))
        assert figures
        assert [figure for figure in figures if figure not in page] == []


@pytest.mark.parametrize(
    ("lower", "higher", "p", "told"),
    [
        (10, 0, 2 / 1024, "lower"),
        (1, 9, 22 / 1024, "higher"),
        (8, 2, 112 / 1024, "not told apart"),
        (5, 0, 2 / 32, "not told apart"),
        (0, 0, 1, "not told apart"),
    ],
)
def test_signs(lower, higher, p, told):
    found = Signs(lower, higher, 10)
    assert found.p == pytest.approx(p)
    assert found.told == told
