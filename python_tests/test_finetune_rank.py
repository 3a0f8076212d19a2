"""riskmap rank: sources in the order of what they tell about the target."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import MERGED, NETWORK_2D, configuration, train_source

from riskmap_ext.finetune import CheckpointError, ConfigError, finetune, rank_sources
from riskmap_ext.finetune.base.files import write_rows
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import NetworkConfig
from riskmap_ext.finetune.source.checkpoint import save_checkpoint
from riskmap_ext.finetune.source.network import build_network

pytestmark = pytest.mark.usefixtures("one_thread")

SAME: dict[str, Any] = {}


@pytest.fixture(scope="module")
def sources(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained on the target itself, one briefly on its merged classes, one not at all."""
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for name, steps, data in (("same", 60, SAME), ("merged", 20, MERGED)):
        found[name] = train_source(root, folder / name, steps, data, lr=0.02)
    found["untrained"] = folder / "untrained.pt"
    network = NetworkConfig.model_validate(NETWORK_2D)
    blank = build_network(network, 2)
    for parameter in blank.parameters():
        torch.nn.init.zeros_(parameter)
    named = Structures(["background", "thing"])
    save_checkpoint(found["untrained"], blank, network, named, ["image"], {}, {})
    return found


def test_orders_sources_of_known_quality(
    root: Path, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ("merged", "untrained", "same")
    config = configuration(root, tmp_path / "run")
    ranked = rank_sources(config, [sources[name] for name in order])
    assert [each.checkpoint for each in ranked] == [
        sources[name] for name in ("same", "merged", "untrained")
    ]
    assert [each.tells_nothing for each in ranked] == [False, False, True]
    assert ranked[0].told > ranked[1].told > 0.05
    assert abs(ranked[2].gain) < 1e-4
    for each in ranked:
        assert each.gain == pytest.approx(each.leep + each.entropy)
    shown = capsys.readouterr().out
    assert "untrained.pt tells nothing" in shown
    assert not (tmp_path / "run" / "last.pt").exists()
    write_rows(tmp_path / "rank.csv", ranked)
    rows = list(csv.DictReader((tmp_path / "rank.csv").open()))
    assert [Path(row["checkpoint"]).name for row in rows] == ["last.pt", "last.pt", "untrained.pt"]
    assert float(rows[0]["leep"]) == ranked[0].leep


def test_the_score_is_that_of_a_run(root: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    (ranked,) = rank_sources(
        configuration(root, tmp_path / "run"), [sources["merged"]], progress=False
    )
    source = {"checkpoint": str(sources["merged"])}
    result = finetune(configuration(root, tmp_path / "run", source=source), progress=False)
    assert ranked.leep == pytest.approx(result.leep, rel=1e-12)


def test_errors(root: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    config = configuration(root, tmp_path / "run")
    with pytest.raises(ConfigError, match="--source: expected at least one"):
        rank_sources(config, [], progress=False)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(sources["same"].read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"damaged\.pt: is damaged"):
        rank_sources(config, [sources["same"], damaged], progress=False)
    assert not (tmp_path / "run").exists()
