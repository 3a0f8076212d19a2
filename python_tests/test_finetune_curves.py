"""losses.csv, and curves drawn as SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import rows_of

from riskmap_ext.finetune.folder.loss_curve import LossCurve
from riskmap_ext.finetune.report import curves


class TestLosses:
    def write(self, path: Path, steps: int) -> list[dict[str, str]]:
        curve = LossCurve(path, steps, torch.device("cpu"))
        for step in range(1, steps + 1):
            curve.add(step, torch.tensor(float(step)), 0.1)
        curve.write()
        return rows_of(path)

    def test_every_step_of_a_short_run(self, tmp_path: Path) -> None:
        rows = self.write(tmp_path / "losses.csv", 7)
        assert [row["step"] for row in rows] == list("1234567")
        assert [float(row["loss"]) for row in rows] == list(range(1, 8))

    @pytest.mark.parametrize("steps", [999, 1000, 2501, 12345])
    def test_means_of_a_long_one(self, tmp_path: Path, steps: int) -> None:
        rows = self.write(tmp_path / "losses.csv", steps)
        assert 500 <= len(rows) <= 1000
        assert int(rows[-1]["step"]) == steps
        every = int(rows[0]["step"])
        assert float(rows[0]["loss"]) == (1 + every) / 2
        means = {int(row["step"]): float(row["loss"]) for row in rows}
        assert means[every * 100] == pytest.approx(every * 100 - (every - 1) / 2)


class TestChart:
    def chart(self, points: Sequence[tuple[float, float]], **options: Any) -> str:
        drawn = curves.chart([curves.Line("a", points)], "t", **options)
        return drawn.title + drawn.svg if drawn else ""

    def test_gaps_at_what_is_not_finite(self) -> None:
        points = [(0, 1.0), (1, math.nan), (2, 2.0), (3, math.inf), (4, 3.0), (5, 1.0)]
        text = self.chart(points)
        (path,) = re.findall(r' d="([^"]*)" style="fill: none; stroke: #b87700', text)[:1]
        assert path.count("M") == 3
        assert "nan" not in text
        assert "inf" not in text

    @pytest.mark.parametrize("points", [[], [(1, math.nan)]])
    def test_nothing_to_draw(self, points: list[tuple[float, float]]) -> None:
        assert self.chart(points) == ""

    @pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -5.0])
    def test_one_value(self, value: float) -> None:
        assert "<use" in self.chart([(1, value)])
        assert "nan" not in self.chart([(1, value), (2, value)])

    def test_few_ticks_whatever_the_span(self) -> None:
        for high in (1.0, 50.0, 1e4, 1e30, 1e300):
            ticks = re.findall("text-anchor: end[^>]*>([^<]*)", self.chart([(0, 1e-3), (1, high)]))
            assert 2 <= len(ticks) <= 14

    def test_logarithmic_where_values_span_much(self) -> None:
        far: list[tuple[float, float]] = [(0, 1000.0), (1, 0.1)]
        assert "t (log)" in self.chart(far, log=True)
        assert "(log)" not in self.chart(far)
        assert "(log)" not in self.chart([(0, 1.0), (1, 2.0)], log=True)
        assert "(log)" not in self.chart([(0, 1.0), (1, 0.0)], log=True)

    def test_the_same_again_in_the_page_s_colours_alone(self) -> None:
        text = self.chart([(0, 1.0), (1, 2.0)])
        assert text == self.chart([(0, 1.0), (1, 2.0)])
        assert not re.search(r"#c010|https?:|url\(", text)
        assert "var(--soft)" in text
