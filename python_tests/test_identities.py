"""What must hold by mathematics: links between the functions and to others' formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BASE, Call, Case, loss_and_gradients
from compare import assert_gradient_close, cosine, relative_l2

import riskmap_ext


def leep_double_loop(probabilities: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """LEEP of probabilities [n, Z] and labels [n] (Nguyen et al. 2020, equations 1 and 2)."""
    n, num_source = probabilities.shape
    joint = np.zeros((num_classes, num_source))
    for i in range(n):
        for z in range(num_source):
            joint[labels[i], z] += probabilities[i, z] / n
    marginal = np.zeros(num_source)
    for y in range(num_classes):
        for z in range(num_source):
            marginal[z] += joint[y, z]
    score = 0.0
    for i in range(n):
        expected = 0.0
        for z in range(num_source):
            expected += joint[labels[i], z] / marginal[z] * probabilities[i, z]
        score += math.log(expected) / n
    return score


LEEP_CASES = [
    Case("leep_plane", spatial=(9, 11), classes=3, source_classes=5),
    Case("leep_volume", spatial=(5, 4, 6), classes=6, source_classes=2, batch=3),
    Case("leep_float64", spatial=(40,), classes=2, source_classes=9, dtype=torch.float64),
    Case("leep_bfloat16", spatial=(9, 11), dtype=torch.bfloat16),
]


@pytest.mark.filterwarnings("ignore:LEEP score")  # random sources tell little
@pytest.mark.parametrize("case", LEEP_CASES, ids=lambda case: case.name)
def test_score_is_the_mean_of_the_map_and_of_a_double_loop(
    case: Case, device: torch.device
) -> None:
    (source, target, _), kwargs = case.leep_call(device)
    given = riskmap_ext.conditional(
        riskmap_ext.leep_statistics(source, target, case.classes, **kwargs)
    )
    transfer = riskmap_ext.transferability_map(source, target, given, **kwargs)
    valid = case.valid(device)
    mean = transfer[valid].double().mean().item()

    theta = torch.softmax(source.double(), dim=1).movedim(1, -1)[valid]
    score = leep_double_loop(theta.cpu().numpy(), target[valid].cpu().numpy(), case.classes)
    assert score < 0
    assert mean == pytest.approx(score, rel=2e-6)

    statistics = riskmap_ext.TransferStatistics(case.classes, ignore_index=case.ignore_index)
    statistics.update(source, target)
    statistics.update_range(source, target)
    assert statistics.score == pytest.approx(score, rel=2e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("spatial", [(31,), (9, 8), (4, 5, 6)])
@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_plain_mean_is_cross_entropy(
    spatial: tuple[int, ...], label_smoothing: float, ignore_index: int, device: torch.device
) -> None:
    case = Case("torch", batch=1, spatial=spatial, classes=5, ignore_index=ignore_index)
    logits, target = case.logits(device), case.target(device)

    def torch_loss(logits: torch.Tensor, target: torch.Tensor, risk: None) -> torch.Tensor:
        return F.cross_entropy(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing
        )

    options = {
        "normalization": "valid",
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    found = loss_and_gradients(((logits, target, None), options))
    expected = loss_and_gradients(((logits, target, None), {}), torch_loss)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    # Both sides round in float32.
    assert_gradient_close(found[1], expected[1], tolerance=2e-6)


@pytest.mark.parametrize("dice_weight", [0.0, 0.5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_mean_is_cross_entropy(
    weighted: bool, label_smoothing: float, dice_weight: float, device: torch.device
) -> None:
    """Over a batch whose images have different numbers of valid voxels."""
    case = Case("torch_weighted", batch=3, classes=5, empty_image=True, dtype=torch.float64)
    logits, target = case.logits(device), case.target(device)
    options: dict[str, Any] = {"label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = case.weight(device).double()
    dice = riskmap_ext.weighted_loss(logits, target, ce_weight=0.0, dice_weight=dice_weight)
    normalization = "weighted" if weighted else "batch_valid"
    found = riskmap_ext.weighted_loss(
        logits, target, normalization=normalization, dice_weight=dice_weight, **options
    )
    expected = F.cross_entropy(logits, target, **options) + dice
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_voxel_map_is_cross_entropy_with_class_weights(
    label_smoothing: float, device: torch.device
) -> None:
    case = Case("torch_weights", classes=5, batch=3)
    logits, target, weight = case.logits(device), case.target(device), case.weight(device)
    options: dict[str, Any] = {
        "weight": weight,
        "label_smoothing": label_smoothing,
        "reduction": "none",
    }
    found = riskmap_ext.weighted_loss(logits, target, **options)
    expected = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_loss_is_linear_in_the_risk(device: torch.device) -> None:
    (logits, target, risk), kwargs = BASE.loss_call(device)
    other = risk.flip(0).nan_to_num(0)
    risk = risk.nan_to_num(0)

    def loss(weights: torch.Tensor) -> float:
        return riskmap_ext.weighted_loss(logits, target, weights, **kwargs).item()

    assert loss(2 * risk + 3 * other) == pytest.approx(2 * loss(risk) + 3 * loss(other), rel=1e-6)
    assert loss(torch.ones_like(risk)) == pytest.approx(
        riskmap_ext.weighted_loss(logits, target, **kwargs).item(), rel=1e-6
    )


@pytest.mark.parametrize("dice", [0.0, 1.0], ids=["ce", "dice"])
def test_constant_added_to_a_voxel_changes_nothing(dice: float, device: torch.device) -> None:
    (logits, target, risk), kwargs = BASE.loss_call(device)
    kwargs["dice_weight"] = dice
    shift = torch.randint(-64, 64, (BASE.batch, 1, *BASE.spatial), device=device)
    found = loss_and_gradients(((logits + shift, target, risk), kwargs))
    expected = loss_and_gradients(((logits, target, risk), kwargs))
    # The shifted logits are themselves rounded: 64 has a unit in the last place of 4e-6.
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert relative_l2(found[1], expected[1]) <= 1e-5

    (source, labels, given), kwargs = BASE.map_call(device)
    torch.testing.assert_close(
        riskmap_ext.transferability_map(source + shift, labels, given, **kwargs),
        riskmap_ext.transferability_map(source, labels, given, **kwargs),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        riskmap_ext.leep_statistics(source + shift, labels, BASE.classes, **kwargs),
        riskmap_ext.leep_statistics(source, labels, BASE.classes, **kwargs),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("dice", [0.0, 1.0], ids=["ce", "dice"])
def test_order_of_voxels_changes_nothing(dice: float, device: torch.device) -> None:
    case = Case("permuted", spatial=(217,), with_foreground=True)
    (logits, target, risk), kwargs = case.loss_call(device)
    kwargs["dice_weight"] = dice
    order = torch.randperm(217, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = {**kwargs, "foreground": kwargs["foreground"][..., order]}
    expected = loss_and_gradients(((logits, target, risk), kwargs))
    found = loss_and_gradients(
        ((logits[..., order], target[..., order], risk[..., order]), shuffled)
    )
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert relative_l2(found[1], expected[1][..., order]) <= 1e-6

    (source, labels, given), kwargs = case.risk_call(device)
    torch.testing.assert_close(
        riskmap_ext.leep_statistics(source[..., order], labels[..., order], 3, **kwargs),
        riskmap_ext.leep_statistics(source, labels, 3, **kwargs),
        rtol=1e-6,
        atol=0,
    )
    for function in (riskmap_ext.transferability_map, riskmap_ext.risk_map):
        torch.testing.assert_close(
            function(source[..., order], labels[..., order], given, **kwargs),
            function(source, labels, given, **kwargs)[..., order],
            rtol=1e-6,
            atol=1e-6,
        )


def test_dimensions_do_not_matter(device: torch.device) -> None:
    """A volume, its slices side by side and its voxels in a row have one loss."""
    case = Case("reshaped", spatial=(5, 6, 7))
    (logits, target, risk), kwargs = case.loss_call(device)
    losses = [
        riskmap_ext.weighted_loss(
            logits.reshape(2, 3, *shape),
            target.reshape(2, *shape),
            risk.reshape(2, *shape),
            dice_weight=1.0,
            **kwargs,
        ).item()
        for shape in ((5, 6, 7), (30, 7), (210,))
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_splitting_a_batch_and_adding_changes_nothing(device: torch.device) -> None:
    case = Case("split", batch=5, spatial=(13, 7))
    (source, target, classes), kwargs = case.leep_call(device)
    whole = riskmap_ext.leep_statistics(source, target, classes, **kwargs)
    parts = sum(
        riskmap_ext.leep_statistics(source[part], target[part], classes, **kwargs)
        for part in (slice(0, 2), slice(2, 2), slice(2, 5))
    )
    # Softmax in float32 may round otherwise where vectors of voxels are cut elsewhere.
    torch.testing.assert_close(parts, whole, rtol=1e-7, atol=0)


def test_images_share_a_loss_as_reduction_says(device: torch.device) -> None:
    case = Case("images", batch=3, spatial=(8, 9))
    (logits, target, risk), kwargs = case.loss_call(device)
    kwargs["dice_weight"] = 0.5
    alone = [
        riskmap_ext.weighted_loss(
            logits[b : b + 1], target[b : b + 1], risk[b : b + 1], **kwargs
        ).item()
        for b in range(3)
    ]
    for reduction, expected in (("mean", sum(alone) / 3), ("sum", sum(alone))):
        together = riskmap_ext.weighted_loss(logits, target, risk, reduction=reduction, **kwargs)
        assert together.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ce_voxels", ["valid", "foreground"])
def test_voxel_map_adds_up_to_the_sum(ce_voxels: str, device: torch.device) -> None:
    args, kwargs = BASE.loss_call(device)
    kwargs.update(ce_voxels=ce_voxels, normalization="none")
    voxels = riskmap_ext.weighted_loss(*args, reduction="none", **kwargs)
    total = riskmap_ext.weighted_loss(*args, reduction="sum", **kwargs)
    assert voxels.sum().item() == pytest.approx(total.item(), rel=1e-6)


def test_dice_and_cross_entropy_parts_add_up(device: torch.device) -> None:
    args, kwargs = BASE.loss_call(device)
    parts = [(1.0, 0.0), (0.0, 1.0), (2.0, 3.0)]
    losses, gradients, _ = zip(
        *(
            loss_and_gradients((args, {**kwargs, "ce_weight": ce, "dice_weight": dice}))
            for ce, dice in parts
        ),
        strict=True,
    )
    assert losses[2].item() == pytest.approx(2 * losses[0].item() + 3 * losses[1].item(), rel=1e-6)
    assert relative_l2(gradients[2], 2 * gradients[0] + 3 * gradients[1]) <= 1e-6


def test_exponential_over_the_dataset_is_a_power(device: torch.device) -> None:
    """base^((h - lo) / (hi - lo)) = p^(-a) e^(-a lo) with a = ln(base) / (hi - lo)."""
    case = Case("power", spatial=(20, 20), magnitude=8.0)
    args, kwargs = case.map_call(device)
    valid = case.valid(device)
    hardness = -riskmap_ext.transferability_map(*args, **kwargs)[valid]
    lo, hi = hardness.min().item(), hardness.max().item()
    alpha = math.log(10) / (hi - lo)
    assert 0 < alpha <= 1

    options = {"scheme": "exponential", "range": (lo, hi), **kwargs}
    exponential = riskmap_ext.risk_map(*args, **options)[valid]
    power = riskmap_ext.risk_map(*args, scheme="power", alpha=alpha, **kwargs)[valid]
    torch.testing.assert_close(exponential, power * math.exp(-alpha * lo), rtol=2e-5, atol=0)


def test_image_scope_is_the_range_of_the_image(device: torch.device) -> None:
    case = Case("scope", batch=1, spatial=(12, 13))
    args, kwargs = case.map_call(device)
    hardness = -riskmap_ext.transferability_map(*args, **kwargs)[case.valid(device)]
    limits = (hardness.min().item(), hardness.max().item())
    for scheme in ("exponential", "linear"):
        torch.testing.assert_close(
            riskmap_ext.risk_map(*args, scheme=scheme, **kwargs),
            riskmap_ext.risk_map(*args, scheme=scheme, range=limits, **kwargs),
            rtol=1e-5,
            atol=0,
        )


def test_constant_source_is_as_hard_as_the_labels_are_rare(device: torch.device) -> None:
    target = torch.tensor([[0] * 70 + [1] * 25 + [2] * 5], device=device)
    source = torch.zeros(1, 4, 100, device=device)
    source[:, 2] = 1e4
    given = riskmap_ext.conditional(riskmap_ext.leep_statistics(source, target, 3))
    transfer = riskmap_ext.transferability_map(source, target, given)
    frequency = torch.tensor([0.70, 0.25, 0.05], device=device)
    torch.testing.assert_close(transfer, frequency.log()[target], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("include_background", [False, True])
def test_dice_agrees_with_monai(
    include_background: bool, batch_dice: bool, device: torch.device
) -> None:
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed")
    case = Case("monai", classes=4, batch=3, spatial=(9, 10), ignored=0.0)
    monai_loss = losses.DiceLoss(
        include_background=include_background,
        to_onehot_y=True,
        softmax=True,
        batch=batch_dice,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
    call: Call = (case.logits(device), case.target(device).unsqueeze(1), None), {}
    options = {
        "ce_weight": 0.0,
        "dice_weight": 1.0,
        "include_background": include_background,
        "batch_dice": batch_dice,
    }
    found = loss_and_gradients((call[0], options))
    expected = loss_and_gradients(call, lambda logits, target, _: monai_loss(logits, target))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_gradient_close(found[1], expected[1], tolerance=5e-6)  # both sides round in float32


def test_loss_of_a_case_worked_by_hand(device: torch.device) -> None:
    """Two voxels of ln 4 and ln(4/3), weights 2 and 3, one of two voxels foreground."""
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), math.log(3)]]], device=device)
    target = torch.tensor([[0, 1]], device=device)
    risk = torch.tensor([[2.0, 3.0]], device=device)
    hard, easy = 2 * math.log(4), 3 * math.log(4 / 3)
    cases = {
        ("foreground", "valid"): hard + easy,
        ("valid", "valid"): (hard + easy) / 2,
        ("none", "valid"): hard + easy,
        ("foreground", "foreground"): easy,
        ("valid", "foreground"): easy / 2,
    }
    for (normalization, ce_voxels), expected in cases.items():
        loss = riskmap_ext.weighted_loss(
            logits, target, risk, normalization=normalization, ce_voxels=ce_voxels
        )
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    labelled: dict[str, Any] = {"normalization": "foreground"}
    floored = riskmap_ext.weighted_loss(logits, target, risk, foreground_floor=0.75, **labelled)
    assert floored.item() == pytest.approx((hard + easy) / 1.5, rel=1e-6)


def test_default_normalization_is_by_the_mask(device: torch.device) -> None:
    """The image's own foreground where it is given, else all valid voxels."""
    case = Case("default_normalization", with_foreground=True)
    args, kwargs = case.loss_call(device)
    foreground = kwargs.pop("foreground")
    for mask, normalization in ((foreground, "foreground"), (None, "valid")):
        default = riskmap_ext.weighted_loss(*args, foreground=mask, **kwargs)
        named = riskmap_ext.weighted_loss(
            *args, foreground=mask, normalization=normalization, **kwargs
        )
        assert torch.equal(default, named)


def test_risk_points_the_gradient_at_the_hard_voxels(device: torch.device) -> None:
    (logits, target, _), kwargs = Case("direction", ignored=0.0).loss_call(device)
    risk = torch.ones_like(target, dtype=torch.float32)
    risk[target == 2] = 10.0
    _, plain, _ = loss_and_gradients(((logits, target, None), kwargs))
    _, weighted, _ = loss_and_gradients(((logits, target, risk), kwargs))
    factor = torch.where(target == 2, 10.0, 1.0).unsqueeze(1)
    assert relative_l2(weighted, factor * plain) <= 1e-6
    assert cosine(weighted, plain) < 0.99
