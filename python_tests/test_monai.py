"""riskmap_ext.integrations.monai beside MONAI itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("monai", reason="needs MONAI")

from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.transforms import Compose, RandFlipd, SpatialCropd

import riskmap_ext
from riskmap_ext.integrations.monai import (
    PrepareBatchRiskMap,
    RiskMapd,
    RiskMapDiceCELoss,
    transfer_statistics,
)

SHAPE = (12, 10, 9)


def labels(classes: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, classes, (batch, 1, *SHAPE), generator=generator)


def logits(classes: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, classes, *SHAPE, generator=generator, requires_grad=True)


def one_hot(target: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(target[:, 0], classes).movedim(-1, 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_background": {"include_background": False},
    "batch": {"batch": True},
    "lambdas": {"lambda_dice": 0.3, "lambda_ce": 1.7},
    "smoothing": {"label_smoothing": 0.2},
    "only_ce": {"lambda_dice": 0.0},
    "only_dice": {"lambda_ce": 0.0},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class TestEqualsDiceCELoss:
    def compare(self, ours: Tensor, theirs: Tensor, inputs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        found, expected = (torch.autograd.grad(each, inputs)[0] for each in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)

    @each_option
    @pytest.mark.parametrize("classes", [2, 5])
    def test_softmax(self, classes: int, options: dict[str, Any]) -> None:
        inputs, target = logits(classes), labels(classes)
        keywords = {"to_onehot_y": True, "softmax": True, **options}
        ours = RiskMapDiceCELoss(**keywords)(inputs, target)
        self.compare(ours, DiceCELoss(**keywords)(inputs, target), inputs)

    @each_option
    def test_one_hot_targets(self, options: dict[str, Any]) -> None:
        inputs, target = logits(4), one_hot(labels(4), 4)
        keywords = {"softmax": True, **options}
        ours = RiskMapDiceCELoss(**keywords)(inputs, target)
        self.compare(ours, DiceCELoss(**keywords)(inputs, target.float()), inputs)

    @pytest.mark.parametrize("batch", [False, True])
    def test_one_channel_with_sigmoid(self, batch: bool) -> None:
        inputs, target = logits(1), labels(2).float()
        keywords = {"sigmoid": True, "batch": batch}
        ours = RiskMapDiceCELoss(**keywords)(inputs, target)
        self.compare(ours, DiceCELoss(**keywords)(inputs, target), inputs)

    def test_positional_arguments_in_the_same_order(self) -> None:
        inputs, target = logits(3), labels(3)
        arguments = (False, True, False, True, None, False, False, "mean", 1e-5, 1e-5, True)
        ours, theirs = RiskMapDiceCELoss(*arguments), DiceCELoss(*arguments)
        self.compare(ours(inputs, target), theirs(inputs, target), inputs)


class TestWithARiskMap:
    def test_is_the_weighted_loss(self) -> None:
        inputs, target = logits(3), labels(3)
        risk = torch.rand(2, *SHAPE) + 0.5
        loss = RiskMapDiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        expected = riskmap_ext.weighted_loss(inputs, target, risk, dice_weight=1.0)
        assert torch.equal(loss(inputs, target, risk), expected)
        assert torch.equal(loss(inputs, {"label": target, "risk": risk[:, None]}), expected)

    def test_regions(self) -> None:
        inputs, target, risk = logits(2), labels(4), torch.rand(2, *SHAPE)
        table = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
        loss = RiskMapDiceCELoss(sigmoid=True, regions=table)
        expected = riskmap_ext.weighted_loss(inputs, target, risk, dice_weight=1.0, regions=table)
        assert torch.equal(loss(inputs, target, risk), expected)

    def test_deep_supervision(self) -> None:
        fine, coarse = logits(3), torch.randn(2, 3, 6, 5, 5)
        target, risk = labels(3), torch.rand(2, *SHAPE)
        loss = RiskMapDiceCELoss(to_onehot_y=True, softmax=True, scale_weights=(0.8, 0.2))
        found = loss([fine, coarse], target, risk)
        expected = riskmap_ext.nn.RiskWeightedLoss(
            dice_weight=1.0, include_background=True, scale_weights=(0.8, 0.2)
        )([fine, coarse], target, risk)
        assert torch.equal(found, expected)

    @pytest.mark.filterwarnings("ignore")  # MONAI's, about what torch.compile traces of it
    @pytest.mark.parametrize("wrap", [torch.as_tensor, MetaTensor], ids=["plain", "MetaTensor"])
    def test_compiled(self, wrap: Callable[[Tensor], Tensor]) -> None:
        """A MetaTensor breaks the graph of anything compiled, torch's own functions too."""
        loss = RiskMapDiceCELoss(to_onehot_y=True, softmax=True)
        inputs, target, risk = logits(3), labels(3), torch.rand(2, *SHAPE)
        expected = loss(inputs, target, risk).detach()
        torch.compiler.reset()
        plain = wrap is torch.as_tensor
        compiled = torch.compile(loss, fullgraph=plain, backend="aot_eager")
        found = compiled(*(wrap(each) for each in (inputs.detach(), target, risk)))
        torch.testing.assert_close(torch.as_tensor(found), expected)


class TestRefuses:
    @pytest.mark.parametrize(
        "keywords",
        [
            {"other_act": torch.tanh},
            {"squared_pred": True},
            {"jaccard": True},
            {"reduction": "sum"},
            {"smooth_nr": 0.0},
            {"smooth_dr": 1.0},
            {"weight": torch.ones(3)},
        ],
        ids=lambda keywords: next(iter(keywords)),
    )
    def test_what_it_does_not_compute(self, keywords: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"^{next(iter(keywords))}: expected "):
            RiskMapDiceCELoss(softmax=True, **keywords)

    @pytest.mark.parametrize("both", [True, False])
    def test_no_or_two_activations(self, both: bool) -> None:
        with pytest.raises(ValueError, match="softmax, sigmoid: expected one"):
            RiskMapDiceCELoss(softmax=both, sigmoid=both)

    def test_soft_targets(self) -> None:
        loss, soft = RiskMapDiceCELoss(softmax=True), one_hot(labels(3), 3).float()
        soft[0, :, 1, 2, 3] = torch.tensor([0.5, 0.5, 0.0])
        with pytest.raises(ValueError, match=r"target: expected one-hot .* at 1 voxels"):
            loss(logits(3), soft)

    def test_targets_of_another_form(self) -> None:
        with pytest.raises(ValueError, match=r"target: expected one-hot \[B, 3, \*S\]"):
            RiskMapDiceCELoss(softmax=True)(logits(3), labels(3))
        with pytest.raises(ValueError, match=r"target: expected labels \[B, 1, \*S\]"):
            RiskMapDiceCELoss(softmax=True, to_onehot_y=True)(logits(3), one_hot(labels(3), 3))
        with pytest.raises(ValueError, match="target: expected the key 'label'"):
            RiskMapDiceCELoss(softmax=True)(logits(3), {"mask": labels(3)})

    def test_several_channels_with_sigmoid(self) -> None:
        with pytest.raises(ValueError, match="input: expected one channel"):
            RiskMapDiceCELoss(sigmoid=True)(logits(2), one_hot(labels(2), 2))


def source() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv3d(1, 4, 3, padding=1)


def cases(number: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(number):
        label = torch.randint(0, 3, (1, *SHAPE), generator=generator)
        affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
        image = label + torch.randn(label.shape, generator=generator)
        meta = {"filename_or_obj": f"case{index}"}
        found.append({"image": MetaTensor(image, affine), "label": MetaTensor(label, affine, meta)})
    return found


class TestRiskMapd:
    def test_is_the_map_of_the_case(self) -> None:
        network, data = source(), cases()
        statistics = transfer_statistics(data, network, 3)
        added = RiskMapd(source=network, statistics=statistics, base=5.0)(data[0])
        with torch.no_grad():
            expected = riskmap_ext.risk_map(
                network(data[0]["image"].as_tensor()[None]),
                data[0]["label"].as_tensor()[None],
                statistics.conditional,
                range=statistics.hardness_range,
                base=5.0,
            )
        assert isinstance(added["risk"], MetaTensor)
        assert added["risk"].dtype == torch.float32
        assert torch.equal(added["risk"].as_tensor(), expected)
        assert torch.equal(added["risk"].affine, data[0]["label"].affine)
        assert added["risk"].meta["filename_or_obj"] == "case0"
        assert "risk" not in data[0]

    def test_statistics_are_those_of_the_set(self) -> None:
        network, data = source(), cases()
        found = transfer_statistics(data, network, 3)
        expected = riskmap_ext.TransferStatistics(3)
        image, label = (
            torch.stack([case[key].as_tensor() for case in data]) for key in ("image", "label")
        )
        with torch.no_grad():
            expected.update(network(image), label)
            expected.update_range(network(image), label)
        torch.testing.assert_close(found.joint, expected.joint, rtol=1e-6, atol=1e-6)
        assert found.score == pytest.approx(expected.score, rel=1e-6)

    def test_travels_with_the_label(self) -> None:
        network, data = source(), cases()
        statistics = transfer_statistics(data, network, 3)
        keys = ["image", "label", "risk"]
        add = RiskMapd(source=network, statistics=statistics)
        move = Compose(
            [
                RandFlipd(keys, prob=1.0, spatial_axis=1),
                SpatialCropd(keys, roi_start=(2, 1, 0), roi_end=(9, 8, 7)),
            ]
        )
        found = move(add(data[1]))["risk"]
        assert torch.equal(
            found.as_tensor(), add(data[1])["risk"].as_tensor().flip(2)[:, 2:9, 1:8, 0:7]
        )

    def test_sliding_window(self) -> None:
        network, data = torch.nn.Conv3d(1, 4, 1), cases()
        inferer = SlidingWindowInferer((6, 6, 6), mode="constant")
        whole = transfer_statistics(data, network, 3)
        tiled = transfer_statistics(data, network, 3, inferer=inferer)
        torch.testing.assert_close(tiled.joint, whole.joint, rtol=1e-5, atol=1e-5)

    def test_cache(self, tmp_path: Path) -> None:
        calls = 0
        network, data = source(), cases()
        statistics = transfer_statistics(data, network, 3)

        def counted(image: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return network(image)

        def add(**options: Any) -> Tensor:
            keywords = {"statistics": statistics, "cache_dir": tmp_path, **options}
            return RiskMapd(source=counted, **keywords)(data[0])["risk"].as_tensor()

        first = add()
        (entry,) = tmp_path.iterdir()
        assert torch.equal(add(), first)
        assert calls == 1
        add(base=3.0)  # other options: another map
        assert calls == 2
        entry.write_bytes(entry.read_bytes()[:100])
        assert torch.equal(add(), first)
        assert calls == 3
        assert torch.equal(add(), first)
        assert calls == 3
        assert len(list(tmp_path.iterdir())) == 2

    def test_cache_knows_the_source(self, tmp_path: Path) -> None:
        data, networks = cases(), (source(), source())
        with torch.no_grad():
            networks[1].bias.add_(1.0)
        statistics = transfer_statistics(data, networks[0], 3)
        for network in networks:
            RiskMapd(source=network, statistics=statistics, cache_dir=tmp_path)(data[0])
        assert len(list(tmp_path.iterdir())) == 2

    def test_arguments(self) -> None:
        statistics = transfer_statistics(cases(), source(), 3)
        with pytest.raises(ValueError, match="keys: expected those of image and label"):
            RiskMapd("image", source=source(), statistics=statistics)
        with pytest.raises(ValueError, match="range: expected 'dataset'"):
            RiskMapd(source=source(), statistics=statistics, range="volume")
        with pytest.raises(TypeError, match="statistics: expected TransferStatistics"):
            RiskMapd(source=source(), statistics=statistics.conditional)
        with pytest.raises(TypeError, match="source: expected a Module"):
            RiskMapd(source="checkpoint.pt", statistics=statistics)
        with pytest.raises(RuntimeError, match="nothing seen yet"):
            RiskMapd(source=source(), statistics=riskmap_ext.TransferStatistics(3))


def test_prepare_batch() -> None:
    batch = {
        "image": torch.rand(2, 1, 4),
        "label": torch.ones(2, 1, 4),
        "risk": torch.rand(2, 1, 4),
    }
    image, target = PrepareBatchRiskMap()(batch, "cpu")
    assert image is batch["image"]
    assert target.keys() == {"label", "risk"}
    assert torch.equal(target["risk"], batch["risk"])
    assert PrepareBatchRiskMap("map")(batch, "cpu")[1].keys() == {"label"}


def test_in_a_bundle() -> None:
    """The configuration of docs/howto/monai.md."""
    text = (Path(__file__).parents[1] / "docs" / "howto" / "monai.md").read_text(encoding="utf-8")
    config = json.loads(text.split("```json\n")[1].split("```")[0])
    network = source()
    config |= {"output_dir": "out", "source_network": network}
    config["statistics"] = transfer_statistics(cases(), network, 3)
    parser = ConfigParser(config)
    loss = parser.get_parsed_content("loss")
    assert isinstance(loss, RiskMapDiceCELoss)
    assert isinstance(parser.get_parsed_content("prepare_batch"), PrepareBatchRiskMap)
    assert parser.get_parsed_content("risk").cache_dir == Path("out/riskmaps")
