"""RiskMapDiceCELoss beside MONAI's own losses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("monai", reason="needs MONAI")

from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss

import riskmap_ext
from riskmap_ext.integrations.monai import PrepareBatchRiskMap, RiskMapDiceCELoss

SHAPE = (12, 10, 9)


def labels(classes: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, classes, (batch, 1, *SHAPE), generator=generator)


def logits(classes: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, classes, *SHAPE)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def one_hot(target: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(target[:, 0], classes).movedim(-1, 1)


# The loss of every bundle of MONAI's model zoo that trains with DiceCELoss, as its configuration
# has it (configs/train.json or train.yaml, read in November 2026), and the channels of its network.
_SQUARED = {"to_onehot_y": True, "softmax": True, "squared_pred": True, "batch": True}
_DINTS = {**_SQUARED, "include_background": False, "smooth_nr": 1e-5, "smooth_dr": 1e-5}
_VISTA = {"include_background": True, "sigmoid": True, "squared_pred": True, "to_onehot_y": False}
BUNDLES: dict[str, tuple[int, dict[str, Any]]] = {
    "spleen_ct_segmentation": (
        2,
        {
            **_SQUARED,
            "include_background": True,
            "smooth_nr": 1e-5,
            "smooth_dr": 1e-5,
            "lambda_dice": 0.5,
            "lambda_ce": 0.5,
        },
    ),
    "swin_unetr_btcv_segmentation": (14, _SQUARED),
    "wholeBrainSeg_Large_UNEST_segmentation": (133, _SQUARED),
    "renalStructures_UNEST_segmentation": (4, _SQUARED),
    "multi_organ_segmentation": (8, _DINTS),
    "pancreas_ct_dints_segmentation": (3, _DINTS),
    "pediatric_abdominal_ct_segmentation": (4, {**_DINTS, "smooth_nr": 1e-6, "smooth_dr": 1e-6}),
    "vista3d": (1, {**_VISTA, "smooth_nr": 0, "smooth_dr": 1e-5}),
    "vista3d, train_continual": (1, {**_VISTA, "smooth_nr": 1e-4, "smooth_dr": 1e-2}),
    "wholeBody_ct_segmentation": (105, {"to_onehot_y": True, "softmax": True}),
    "spleen_deepedit_annotation": (2, {"to_onehot_y": True, "softmax": True}),
}

# The cases of MONAI's own test of DiceCELoss (tests/losses/test_dice_ce_loss.py).
_INPUTS = torch.tensor([[[1.0, 1, 0], [0, 0, 1]], [[1, 0, 1], [0, 1, 0]]])
_LARGE = torch.tensor([[[100.0, 100, 0], [0, 0, 1]], [[1, 0, 1], [0, 1, 0]]])
_LABELS = torch.tensor([[[0.0, 0, 1]], [[0, 1, 0]]])
_ONE_HOT = _INPUTS
_REST = {"include_background": False, "to_onehot_y": True}
_ONES, _SECOND = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])
OWN_CASES: list[tuple[dict[str, Any], Tensor, Tensor, float]] = [
    ({"to_onehot_y": True}, _INPUTS, _LABELS, 0.3133),
    ({"to_onehot_y": False}, _INPUTS, _ONE_HOT, 0.3133),
    ({"to_onehot_y": False}, _INPUTS, _ONE_HOT.to(torch.uint8), 0.3133),
    ({**_REST, "weight": _ONES}, _LARGE, _LABELS, 0.2088),
    ({**_REST, "weight": _ONES, "lambda_dice": 1.0, "lambda_ce": 2.0}, _LARGE, _LABELS, 0.4176),
    ({**_REST, "weight": _SECOND}, _LARGE, _LABELS, 0.3133),
    (
        {"weight": torch.tensor([0.5]), "sigmoid": True},
        torch.tensor([[[0.8, 0.6, 0.0]], [[0.0, 0.0, 0.9]]]),
        _LABELS,
        1.445239,
    ),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_background": {"include_background": False},
    "batch": {"batch": True},
    "lambdas": {"lambda_dice": 0.3, "lambda_ce": 1.7},
    "smoothing": {"label_smoothing": 0.2},
    "only_ce": {"lambda_dice": 0.0},
    "only_dice": {"lambda_ce": 0.0},
    "squared": {"squared_pred": True, "batch": True},
    "jaccard": {"jaccard": True},
    "squared_jaccard": {"squared_pred": True, "jaccard": True, "smooth_nr": 0.0},
    "constants": {"smooth_nr": 0.5, "smooth_dr": 2.0},
    "no_constants": {"smooth_nr": 0.0, "smooth_dr": 0.0},
    "sum": {"reduction": "sum"},
    "sum_without_background": {"reduction": "sum", "include_background": False, "batch": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def compare(ours: Tensor, theirs: Tensor, inputs: Tensor) -> None:
    """The same value and the same gradient."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-7)
    found, expected = (
        torch.autograd.grad(each, inputs, retain_graph=True)[0] for each in (ours, theirs)
    )
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)


class TestEqualsDiceCELoss:
    @pytest.mark.parametrize("bundle", BUNDLES)
    def test_bundles(self, bundle: str) -> None:
        channels, block = BUNDLES[bundle]
        inputs = logits(channels).detach().float().requires_grad_()
        target = labels(max(channels, 2)).to(torch.uint8 if channels > 1 else torch.float32)
        ours, theirs = (
            ConfigParser({"loss": {"_target_": name, **block}}).get_parsed_content("loss")
            for name in ("riskmap_ext.integrations.monai.RiskMapDiceCELoss", "DiceCELoss")
        )
        assert isinstance(ours, RiskMapDiceCELoss)
        assert isinstance(theirs, DiceCELoss)
        compare(ours(inputs, target), theirs(inputs, target), inputs)

    @pytest.mark.parametrize("case", range(len(OWN_CASES)))
    def test_monai_own_cases(self, case: int) -> None:
        """All but the last leave the activation out, which is refused unless Dice is off."""
        options, inputs, target, expected = OWN_CASES[case]
        inputs = inputs.clone().requires_grad_()
        theirs = DiceCELoss(**options)(inputs, target)
        assert theirs.item() == pytest.approx(expected, abs=1e-4)
        if options.get("sigmoid"):
            compare(RiskMapDiceCELoss(**options)(inputs, target), theirs, inputs)
            return
        with pytest.raises(ValueError, match="the Dice of raw inputs"):
            RiskMapDiceCELoss(**options)
        if not options["to_onehot_y"]:
            target = torch.nn.functional.one_hot(target.long().argmax(1), 2).movedim(-1, 1)
            target = target.to(torch.float32)
        for changed in ({"lambda_dice": 0.0}, {"softmax": True}):
            changed = {**options, **changed}
            ours = RiskMapDiceCELoss(**changed)(inputs, target)
            compare(ours, DiceCELoss(**changed)(inputs, target), inputs)

    @each_option
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("classes", [2, 5])
    def test_softmax(self, classes: int, weighted: bool, options: dict[str, Any]) -> None:
        inputs, target = logits(classes), labels(classes)
        keywords = {"to_onehot_y": True, "softmax": True, **options}
        if weighted:
            keywords["weight"] = torch.linspace(0.2, 2.0, classes, dtype=torch.float64)
        ours = RiskMapDiceCELoss(**keywords)(inputs, target)
        compare(ours, DiceCELoss(**keywords)(inputs, target), inputs)

    @each_option
    @pytest.mark.parametrize("weighted", [False, True])
    def test_one_hot_targets(self, weighted: bool, options: dict[str, Any]) -> None:
        inputs, target = logits(4), one_hot(labels(4), 4)
        keywords = {"softmax": True, **options}
        if weighted:
            keywords["weight"] = torch.linspace(0.2, 2.0, 4, dtype=torch.float64)
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
            ours = RiskMapDiceCELoss(**keywords)(inputs, target.to(dtype))
            compare(ours, DiceCELoss(**keywords)(inputs, target.float()), inputs)

    @each_option
    @pytest.mark.parametrize("weighted", [False, True])
    def test_one_channel_with_sigmoid(self, weighted: bool, options: dict[str, Any]) -> None:
        inputs, target = logits(1), labels(2).float()
        keywords = {"sigmoid": True, **options}
        if weighted:
            keywords["weight"] = torch.tensor([2.5], dtype=torch.float64)
        with (
            pytest.warns(UserWarning, match="ignored")
            if "include_background" in options
            else (contextlib.nullcontext())
        ):
            theirs = DiceCELoss(**keywords)(inputs, target)
        compare(RiskMapDiceCELoss(**keywords)(inputs, target), theirs, inputs)

    def test_positional_arguments_in_the_same_order(self) -> None:
        inputs, target = logits(3), labels(3)
        weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        arguments = (False, True, False, True, None, True, True, "mean", 0.1, 0.2, True, weight)
        ours, theirs = (each(*arguments, 0.5, 2.0, 0.1) for each in (RiskMapDiceCELoss, DiceCELoss))
        compare(ours(inputs, target), theirs(inputs, target), inputs)


class TestOverlappingChannels:
    """Sigmoids over several channels: MONAI's Dice, and the binary cross-entropy of each."""

    @staticmethod
    def target(channels: int) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        return (torch.rand(2, channels, *SHAPE, generator=generator) < 0.3).float()

    @each_option
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("channels", [3, 9, 20])
    def test_multi_hot(self, channels: int, weighted: bool, options: dict[str, Any]) -> None:
        inputs, target = logits(channels), self.target(channels)
        keywords = {"sigmoid": True, **options}
        smoothing = keywords.get("label_smoothing", 0.0)
        dice = {k: v for k, v in keywords.items() if not k.startswith(("la", "lambda"))}
        reduction = keywords.get("reduction", "mean")
        weight = torch.linspace(0.2, 2.0, channels, dtype=torch.float64) if weighted else None
        if weight is not None:
            keywords["weight"] = weight
            dice["weight"] = weight[1:] if options.get("include_background") is False else weight
        by_channel = None if weight is None else weight.view(-1, 1, 1, 1)
        cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(
            inputs, target * (1 - smoothing) + smoothing / 2, by_channel, reduction=reduction
        )
        expected = (
            keywords.get("lambda_dice", 1.0) * DiceLoss(**dice)(inputs, target)
            + keywords.get("lambda_ce", 1.0) * cross_entropy
        )
        for dtype in (torch.bool, torch.uint8, torch.float32):
            ours = RiskMapDiceCELoss(**keywords)(inputs, target.to(dtype))
            compare(ours, expected, inputs)

    def test_regions_are_the_same_as_their_multi_hot_target(self) -> None:
        inputs, target, risk = logits(3), labels(4), torch.rand(2, *SHAPE)
        table = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
        multi_hot = table.t()[target[:, 0]].movedim(-1, 1)
        for options in ({}, {"include_background": False}, {"normalization": "foreground"}):
            by_labels = RiskMapDiceCELoss(sigmoid=True, regions=table, **options)
            by_channels = RiskMapDiceCELoss(sigmoid=True, **options)
            compare(by_channels(inputs, multi_hot, risk), by_labels(inputs, target, risk), inputs)

    def test_labels_as_channels(self) -> None:
        inputs, target = logits(4), labels(4)
        loss = RiskMapDiceCELoss(sigmoid=True, to_onehot_y=True, squared_pred=True)
        expected = RiskMapDiceCELoss(sigmoid=True, squared_pred=True)
        compare(loss(inputs, target), expected(inputs, one_hot(target, 4)), inputs)

    def test_foreground_of_all_groups(self) -> None:
        """A voxel in the tenth channel alone is foreground for the first eight as well."""
        inputs = logits(10)
        target = torch.zeros(2, 10, *SHAPE)
        target[:, 9, :3] = 1
        inside = target[:, 9].bool()
        by_channels = RiskMapDiceCELoss(sigmoid=True, normalization="foreground", lambda_dice=0.0)
        voxels = torch.nn.functional.binary_cross_entropy_with_logits(
            inputs, target, reduction="none"
        ).mean(dim=1)
        expected = (voxels.flatten(1).sum(1) / inside.flatten(1).sum(1)).mean()
        compare(by_channels(inputs, target), expected, inputs)
        mask = torch.ones(2, 1, *SHAPE)
        compare(by_channels(inputs, target, foreground=mask), voxels.mean(), inputs)

    def test_deep_supervision(self) -> None:
        fine, coarse = logits(3), torch.randn(2, 3, 6, 5, 5)
        target, risk = self.target(3), torch.rand(2, *SHAPE)
        near = torch.nn.functional.interpolate(target, (6, 5, 5), mode="nearest-exact")
        near_risk = torch.nn.functional.interpolate(risk[:, None], (6, 5, 5), mode="nearest-exact")
        loss = RiskMapDiceCELoss(sigmoid=True, scale_weights=(0.8, 0.2))
        one = RiskMapDiceCELoss(sigmoid=True)
        expected = 0.8 * one(fine, target, risk) + 0.2 * one(coarse, near, near_risk)
        compare(loss([fine, coarse], target, risk), expected, fine)
        compare(loss([fine, coarse], [target, near], [risk, near_risk]), expected, fine)

    def test_soft_targets(self) -> None:
        soft = self.target(3)
        soft[0, 1, 2, 3, 4] = 0.5
        with pytest.raises(ValueError, match=r"target: expected multi-hot .* at 1 voxels"):
            RiskMapDiceCELoss(sigmoid=True)(logits(3), soft)

    @pytest.mark.parametrize("channels", [3, 8, 9])
    @pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255])
    def test_ignored_voxels(self, ignore_index: int, channels: int) -> None:
        """By their value in the target, whatever codes the voxels get."""
        inputs, target = logits(channels), self.target(channels)
        target[:, :, :2] = 1  # the largest code
        options: dict[str, Any] = {"sigmoid": True, "ignore_index": ignore_index}
        loss = RiskMapDiceCELoss(**options)
        everything = RiskMapDiceCELoss(sigmoid=True)
        compare(loss(inputs, target), everything(inputs, target), inputs)
        target[:, :, 5:] = ignore_index
        expected = everything(inputs[:, :, :5], target[:, :, :5])
        compare(loss(inputs, target), expected, inputs)

    @pytest.mark.parametrize("channels", [3, 9])
    def test_background_is_where_no_channel_holds(self, channels: int) -> None:
        inputs, target = logits(channels), self.target(channels)
        options: dict[str, Any] = {"sigmoid": True, "normalization": "foreground"}
        found = RiskMapDiceCELoss(**options, background=1)(inputs, target)
        compare(found, RiskMapDiceCELoss(**options)(inputs, target), inputs)

    def test_compiled_after_a_first_call(self) -> None:
        inputs, target = logits(3), self.target(3)
        loss = RiskMapDiceCELoss(sigmoid=True)
        expected = loss(inputs, target)
        torch.compiler.reset()
        found = torch.compile(loss, fullgraph=True, backend="aot_eager")(inputs.detach(), target)
        torch.testing.assert_close(found, expected.detach())

    def test_labels_without_a_table(self) -> None:
        with pytest.raises(ValueError, match=r"target: expected multi-hot \[B, 3, \*S\], got"):
            RiskMapDiceCELoss(sigmoid=True)(logits(3), labels(3))


class TestWithARiskMap:
    def test_is_the_weighted_loss(self) -> None:
        inputs, target = logits(3), labels(3)
        risk = torch.rand(2, *SHAPE) + 0.5
        loss = RiskMapDiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        options: dict[str, Any] = {"dice_weight": 1.0, "normalization": "valid"}
        expected = riskmap_ext.weighted_loss(inputs, target, risk, **options)
        assert torch.equal(loss(inputs, target, risk), expected)
        assert torch.equal(loss(inputs, {"label": target, "risk": risk[:, None]}), expected)

    def test_regions(self) -> None:
        inputs, target, risk = logits(2), labels(4), torch.rand(2, *SHAPE)
        table = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
        loss = RiskMapDiceCELoss(sigmoid=True, regions=table)
        options: dict[str, Any] = {"dice_weight": 1.0, "normalization": "valid", "regions": table}
        expected = riskmap_ext.weighted_loss(inputs, target, risk, **options)
        assert torch.equal(loss(inputs, target, risk), expected)

    def test_a_map_of_ones_changes_nothing(self) -> None:
        inputs, target = logits(4), labels(4)
        target[:, :, 2:] = 0  # little foreground
        loss = RiskMapDiceCELoss(to_onehot_y=True, softmax=True)
        found = loss(inputs, target, torch.ones(2, *SHAPE))
        torch.testing.assert_close(found, loss(inputs, target), rtol=1e-6, atol=0)
        by_foreground = RiskMapDiceCELoss(
            to_onehot_y=True, softmax=True, normalization="foreground"
        )
        assert by_foreground(inputs, target) > 2 * found
        mask = (torch.rand(2, 1, *SHAPE) > 0.1).float()  # as MONAI's transforms make it
        assert by_foreground(inputs, target, foreground=mask) < 1.2 * found

    def test_labels_as_resampling_leaves_them(self) -> None:
        inputs, target = logits(3), labels(3)
        loss = RiskMapDiceCELoss(to_onehot_y=True, softmax=True)
        assert torch.equal(loss(inputs, target + 7e-15), loss(inputs, target))
        assert torch.equal(loss(inputs, target.float() - 2e-4), loss(inputs, target))
        with pytest.raises(ValueError, match="target"):
            loss(inputs, target + 0.4)

    def test_deep_supervision(self) -> None:
        fine, coarse = logits(3), torch.randn(2, 3, 6, 5, 5)
        target, risk = labels(3), torch.rand(2, *SHAPE)
        loss = RiskMapDiceCELoss(to_onehot_y=True, softmax=True, scale_weights=(0.8, 0.2))
        found = loss([fine, coarse], target, risk)
        expected = riskmap_ext.nn.RiskWeightedLoss(
            dice_weight=1.0,
            include_background=True,
            scale_weights=(0.8, 0.2),
            normalization="valid",
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
            {"reduction": "none"},
            {"smooth_nr": -1.0},
            {"weight": torch.ones(3, 1)},
            {"weight": [1.0, -1.0]},
            {"class_weight": torch.ones(2, dtype=torch.int64)},
            {"regions": [[0, 1]]},
        ],
        ids=lambda keywords: next(iter(keywords)),
    )
    def test_what_it_does_not_compute(self, keywords: dict[str, Any]) -> None:
        name = next(iter(keywords))
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
            RiskMapDiceCELoss(**{"softmax": True, **keywords})

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

    @pytest.mark.parametrize("ignore_index", [3, 4])
    def test_soft_targets_in_compiled_code(self, ignore_index: int) -> None:
        """They get a label that is none, and not the one that is ignored."""
        torch.compiler.reset()
        loss = torch.compile(
            RiskMapDiceCELoss(softmax=True, ignore_index=ignore_index), backend="aot_eager"
        )
        with pytest.raises(ValueError, match="target must hold classes 0 to 2"):
            loss(logits(3).detach(), 0.5 * one_hot(labels(3), 3))

    @pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
    def test_targets_as_resampling_leaves_them(self, activation: str) -> None:
        inputs, target = logits(3), one_hot(labels(3), 3).double()
        options: dict[str, Any] = {activation: True}
        loss = RiskMapDiceCELoss(**options)
        assert torch.equal(loss(inputs, target + 7e-15), loss(inputs, target))
        assert torch.equal(loss(inputs, target - 2e-4), loss(inputs, target))

    @pytest.mark.parametrize("name", ["weight", "class_weight"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_class_weights_of_another_length(self, channels: int, name: str) -> None:
        options: dict[str, Any] = {name: [1.0, 5.0]}
        loss = RiskMapDiceCELoss(sigmoid=True, **options)
        target = torch.zeros(2, channels, *SHAPE)
        with pytest.raises(ValueError, match=rf"^{name}: expected \[{channels}\].* got \[2\]"):
            loss(logits(channels), target)

    @pytest.mark.parametrize(
        "keywords",
        [
            {"lambda_dice": -1.0},
            {"lambda_ce": "a"},
            {"squared_pred": "no"},
            {"include_background": None},
            {"sync_dice": True},
            {"class_weight": [1.0, -1.0]},
        ],
        ids=lambda keywords: next(iter(keywords)),
    )
    def test_bad_arguments_by_their_own_names(self, keywords: dict[str, Any]) -> None:
        name = next(iter(keywords))
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
            RiskMapDiceCELoss(softmax=True, **keywords)

    def test_no_scales(self) -> None:
        with pytest.raises(ValueError, match=r"^input: expected at least one scale"):
            RiskMapDiceCELoss(softmax=True)([], labels(2))

    def test_both_class_weights(self) -> None:
        with pytest.raises(ValueError, match="weight, class_weight: expected one of them"):
            RiskMapDiceCELoss(softmax=True, weight=[1.0, 2.0], class_weight=[1.0, 2.0])

    def test_one_channel_with_softmax(self) -> None:
        with pytest.raises(ValueError, match="input: expected several channels with softmax"):
            RiskMapDiceCELoss(softmax=True)(logits(1), labels(2))

    @pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
    def test_stacked_deep_supervision(self, activation: str) -> None:
        stack = torch.randn(2, 3, 4, *SHAPE)
        options: dict[str, Any] = {activation: True}
        loss = RiskMapDiceCELoss(**options, to_onehot_y=True)
        with pytest.raises(ValueError, match=r"torch\.unbind"):
            loss(stack, labels(4))


class TestDeepSupervisionLoss:
    def test_without_a_map(self) -> None:
        inputs = [logits(3), torch.randn(2, 3, 6, 5, 5)]
        options: dict[str, Any] = {"to_onehot_y": True, "softmax": True, "squared_pred": True}
        ours, theirs = (
            DeepSupervisionLoss(each(**options))(inputs, labels(3).float())
            for each in (RiskMapDiceCELoss, DiceCELoss)
        )
        compare(ours, theirs, inputs[0])

    def test_with_a_map_it_says_what_to_use(self) -> None:
        batch = {"image": torch.zeros(2, 1, *SHAPE), "label": labels(3), "risk": torch.ones(2, 1)}
        _, target = PrepareBatchRiskMap()(batch)
        loss = DeepSupervisionLoss(RiskMapDiceCELoss(to_onehot_y=True, softmax=True))
        with pytest.raises(AttributeError, match="takes a list of inputs"):
            loss([logits(3)], target)


def test_class_weights_are_no_state() -> None:
    loss = RiskMapDiceCELoss(softmax=True, to_onehot_y=True, weight=[1.0, 2.0])
    loss(logits(2), labels(2))
    assert loss.state_dict() == {}
