"""The demo: a tiny run end to end, and a page that says what the numbers say."""

from __future__ import annotations

import base64
import csv
import os
import re
from dataclasses import replace

import pytest

for _package in ("monai", "nibabel", "nilearn", "matplotlib", "pydantic", "rich"):
    pytest.importorskip(_package, reason="needs the extra demo")

from html_page import Page  # noqa: E402
from rich.console import Console  # noqa: E402

from riskmap_ext.demo import page as demo_page  # noqa: E402
from riskmap_ext.demo import run as demo  # noqa: E402
from riskmap_ext.finetune.base.errors import ConfigError  # noqa: E402

CLASSES = ["caudate", "putamen", "thalamus", "hippocampus", "ventricles"]
TINY = demo.Settings(
    source_subjects=2,
    source_test_subjects=1,
    source_steps=8,
    labelled_subjects=2,
    test_subjects=2,
    steps=6,
    resolution=5.0,
    channels=(4, 8),
    patch_size=32,
    batch_size=2,
)


def results(**scores):
    """ArmResults of one Dice value per seed and arm, in points."""
    return [
        demo.ArmResult(seed, arm, dict.fromkeys(CLASSES, value / 100), {"case_0001": 0.5}, 1.0)
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    ]


def sources(seeds, remark=None):
    return [demo.SourceResult(seed, {"csf": 0.8}, -0.1, 0.15, remark) for seed in range(seeds)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    (output / "mine.txt").write_text("kept")
    (output / "seed_7" / "target_data").mkdir(parents=True)
    (output / "seed_7" / "target_data" / "dataset.json").write_text("{}")
    return demo.run(output, seeds=1, workers=1, settings=TINY)


@pytest.mark.slow
def test_tiny_run_writes_table_picture_and_page(tiny):
    assert [(a.seed, a.arm) for a in tiny.arms] == [(0, arm.key) for arm in demo.ARMS]
    assert all(list(a.dice) == CLASSES and len(a.subjects) == 2 for a in tiny.arms)
    assert all(0 <= value <= 1 for a in tiny.arms for value in a.dice.values())
    (source,) = tiny.sources
    assert source.leep <= 0
    assert source.label_entropy > 0

    with tiny.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == [arm.key for arm in demo.ARMS]
    for row, arm in zip(rows, tiny.arms, strict=True):
        assert float(row["mean_dice"]) == pytest.approx(100 * arm.mean_dice, abs=1e-3)
        assert float(row["source_leep"]) == pytest.approx(source.leep, abs=1e-5)

    html = tiny.page.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert [link.split(",")[0] for link in page.links] == ["data:image/png;base64"]
    embedded = base64.b64decode(page.links[0].partition(",")[2])
    assert embedded == tiny.picture.read_bytes()
    header, *body = page.rows
    assert header == ["structure", *(arm.name for arm in demo.ARMS)]
    assert [row[0] for row in body[:6]] == [*CLASSES, "mean"]
    assert body[5][1:] == [f"{100 * arm.mean_dice:.1f}" for arm in tiny.arms]
    assert "one seed alone shows no spread" in page.text
    assert not re.search(r"https?://|@import|<script", html)

    assert (tiny.output / "mine.txt").read_text() == "kept"
    assert not (tiny.output / "seed_7").exists()
    assert not (tiny.output / "seed_0" / "cache").exists()


@pytest.mark.slow
def test_arms_of_a_seed_differ_in_head_and_loss_alone(tiny):
    import yaml

    configs = {
        arm.key: yaml.safe_load((tiny.output / "seed_0" / arm.key / "config.yaml").read_text())
        for arm in demo.ARMS
    }
    for config in configs.values():
        del config["output"]
    reference = configs["ce_dice"]

    def different(arm):
        return {
            f"{section}.{key}"
            for section, values in configs[arm].items()
            for key in (values if isinstance(values, dict) else ())
            if values[key] != reference[section][key]
        } | {
            section
            for section, values in configs[arm].items()
            if not isinstance(values, dict) and values != reference[section]
        }

    assert different("random_ce_dice") == {"train.head_init"}
    assert different("risk_dice") == {"risk.use"}
    assert different("class_dice") == {"loss.class_weights"}
    # The network of the demo has an output layer that can start there.
    prior = {
        arm.key
        for arm in demo.ARMS
        if "starts at the class prior"
        in (tiny.output / "seed_0" / arm.key / "log.txt").read_text(encoding="utf-8")
    }
    assert prior == {"ce_dice", "risk_dice", "class_dice"}


def test_findings_follow_the_numbers():
    def told(risk, weights=(60, 60), random=(20, 20)):
        kinds = {"random_ce_dice": random, "ce_dice": [50, 52], "class_dice": weights}
        return demo_page.findings(sources(2), results(risk_dice=risk, **kinds))

    better = told([70, 70])
    assert "+31.0 ± 1.4 Dice points, ahead in 2 of 2 seeds (higher in every seed)" in better[0]
    assert "+19.0 ± 1.4 Dice points, ahead in 2 of 2 seeds (higher in every seed)" in better[1]
    assert "+9.0 ± 1.4 Dice points, ahead in 2 of 2 seeds (higher in every seed)" in better[2]
    assert "the map and class weights each add" in better[2]
    assert "+10.0 ± 0.0 Dice points" in better[3]
    assert "the map gave more than class weights do." in better[3]
    worse = told([40, 40], random=[60, 40])
    assert "+1.0 ± 15.6 Dice points, ahead in 1 of 2 seeds (neither is ahead in every" in worse[0]
    assert "-11.0 ± 1.4 Dice points, ahead in 0 of 2 seeds (lower in every seed)" in worse[1]
    assert "only class weights added" in worse[2]
    assert "plain class weights gave more" in worse[3]
    assert "so the gain" not in worse[3]
    mixed = told([49, 61])
    assert "ahead in 1 of 2 seeds (neither is ahead in every seed, so" in mixed[1]
    assert "not told apart from plain class weights" in mixed[3]
    assert "only the map added" in told([55, 55], weights=[49, 61])[2]
    assert "neither weighting is shown to add" in told([49, 61], weights=[50, 52])[2]
    ahead_of_weights = told([49, 61], weights=[40, 40])
    assert "than class weights do, but it is not shown to add to the prior" in ahead_of_weights[3]
    # A seed without a difference agrees with no direction.
    tied = told([50, 40])
    assert "-6.0 ± 8.5 Dice points, ahead in 0 of 2 seeds (neither is ahead in every" in tied[1]
    between = told([55, 55])
    assert "so the gain needs no map here" in between[3]
    assert "LEEP score on the structures is -0.100" in between[4]
    assert "would score -0.150" in between[4]


def test_one_seed_gives_no_findings_but_its_numbers():
    arms = results(random_ce_dice=[20], ce_dice=[50], risk_dice=[70], class_dice=[60])
    told = demo_page.findings(sources(1, "it tells nothing"), arms)
    for line in told[:4]:
        assert line.endswith("(one seed alone shows no spread, so nothing follows from it).")
    assert told[-1] == "seed 0: it tells nothing"


def test_terminal_table_shows_spread_and_pairs():
    arms = results(
        random_ce_dice=[10, 20], ce_dice=[50, 60], risk_dice=[55, 70], class_dice=[50, 40]
    )
    console = Console(width=110)
    with console.capture() as captured:
        console.print(demo_page.terminal_table(sources(2), arms, demo.ARMS))
    text = captured.get()
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "15.0 ± 7.1" in lines["mean"]
    assert "62.5 ± 10.6" in lines["mean"]
    assert "+7.5 ± 3.5" in lines["minus CE + Dice"]
    assert "2 of 2" in lines["ahead in seeds"]
    assert "LEEP score of the source network: -0.100 ± 0.000" in text


@pytest.mark.parametrize("name", ["seeds", "steps", "workers"])
def test_counts_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        demo.run(tmp_path / "out", **{name: 0})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        demo.run(tmp_path / "out")


def die(*_):
    os._exit(9)


def fail(*_):
    raise ConfigError("output: the disk is full")


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [(die, RuntimeError, "worker process of the demo ended"), (fail, ConfigError, "disk is full")],
)
def test_worker_failures_are_told(tmp_path, monkeypatch, job, error, message):
    monkeypatch.setattr(demo, "train_source", job)
    with pytest.raises(error, match=message):
        demo.run(tmp_path, seeds=1, workers=1, settings=replace(TINY, steps=1))
    assert not (tmp_path / "index.html").exists()
