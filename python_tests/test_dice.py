"""The Dice part against MONAI's loss and against nnU-Net's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BRATS, Case
from compare import assert_gradient_close, grad_of
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import riskmap_ext

pytestmark = pytest.mark.ops

DICE: dict[str, Any] = {"ce_weight": 0.0, "dice_weight": 1.0}
JACCARD: dict[str, Any] = {"alpha": 1.0, "beta": 1.0}
SPATIAL = ((31,), (9, 11), (5, 6, 7))
BOTH = pytest.mark.parametrize("include_background", [False, True], ids=["foreground", "all"])
BATCH = pytest.mark.parametrize("batch", [False, True], ids=["images", "batch"])
SHAPES = pytest.mark.parametrize("spatial", SPATIAL, ids=lambda spatial: f"{len(spatial)}d")
CLASSES = pytest.mark.parametrize("classes", [2, 5, 13])


def _inputs(device: torch.device, **options: Any) -> tuple[Tensor, Tensor]:
    case = Case("dice_peers", batch=3, dtype=torch.float64, **options)
    return case.logits(device).requires_grad_(), case.target(device)


def _assert_same(logits: Tensor, found: Tensor, expected: Tensor) -> None:
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    one, other = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert torch.count_nonzero(one) > 0
    assert_gradient_close(one, other)


@SHAPES
@CLASSES
@BOTH
@BATCH
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_monai(
    reduction: str,
    batch: bool,
    include_background: bool,
    classes: int,
    spatial: tuple[int, ...],
    device: torch.device,
) -> None:
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed")
    logits, target = _inputs(device, classes=classes, spatial=spatial, ignored=0.0)
    peer = losses.DiceLoss(
        softmax=True,
        to_onehot_y=True,
        include_background=include_background,
        batch=batch,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        reduction=reduction,
    )
    found = riskmap_ext.weighted_loss(
        logits,
        target,
        **DICE,
        include_background=include_background,
        batch_dice=batch,
        reduction=reduction,
    )
    expected = peer(logits, target.unsqueeze(1))
    if reduction == "sum":  # MONAI adds the classes up too
        expected = expected / (classes - (not include_background))
    _assert_same(logits, found, expected)


@BATCH
def test_monai_with_sigmoids(batch: bool, device: torch.device) -> None:
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed")
    logits, target = _inputs(device, classes=4, regions=3, spatial=(5, 6, 7), ignored=0.0)
    peer = losses.DiceLoss(sigmoid=True, batch=batch, smooth_nr=1e-5, smooth_dr=1e-5)
    inside = BRATS.t().to(device)[target].movedim(-1, 1)  # [B, R, *S]
    found = riskmap_ext.weighted_loss(
        logits, target, **DICE, batch_dice=batch, regions=BRATS.to(device)
    )
    _assert_same(logits, found, peer(logits, inside))


@BOTH
def test_monai_with_cross_entropy(include_background: bool, device: torch.device) -> None:
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed")
    logits, target = _inputs(device, classes=5, spatial=(5, 6, 7), ignored=0.0)
    peer = losses.DiceCELoss(
        softmax=True,
        to_onehot_y=True,
        include_background=include_background,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        lambda_dice=0.7,
        lambda_ce=1.3,
    )
    found = riskmap_ext.weighted_loss(
        logits,
        target,
        normalization="valid",
        ce_weight=1.3,
        dice_weight=0.7,
        include_background=include_background,
    )
    _assert_same(logits, found, peer(logits, target.unsqueeze(1)))


@BATCH
@pytest.mark.parametrize("jaccard", [False, True], ids=["dice", "jaccard"])
@pytest.mark.parametrize("squared", [False, True], ids=["plain", "squared"])
@pytest.mark.parametrize("smooth", [(1e-6, 1e-6), (0.0, 1e-6), (0.0, 0.0), (1.0, 2.0)], ids=str)
@pytest.mark.parametrize(
    ("activation", "include_background"), [("softmax", False), ("softmax", True), ("sigmoid", True)]
)
def test_monai_family(
    activation: str,
    smooth: tuple[float, float],
    squared: bool,
    jaccard: bool,
    batch: bool,
    include_background: bool,
    device: torch.device,
) -> None:
    """With class weights on the Dice, which MONAI averages without dividing by their sum."""
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed")
    regions = activation == "sigmoid"
    channels = 3 if regions else 4
    logits, target = _inputs(
        device, classes=4, regions=channels * regions, spatial=(5, 6, 7), ignored=0.0
    )
    members = BRATS.to(device).t() if regions else torch.eye(channels, device=device)
    truth = members[target].movedim(-1, 1).double()  # MONAI's own one-hot is float32
    weight = torch.linspace(0.2, 2.0, channels, dtype=torch.float64, device=device)
    family: dict[str, Any] = {"squared_pred": squared}
    family |= {"smooth_nr": smooth[0], "smooth_dr": smooth[1]}
    peer = losses.DiceLoss(
        **{activation: True},
        include_background=include_background,
        batch=batch,
        weight=weight if include_background else weight[1:],
        jaccard=jaccard,
        **family,
    ).to(device)
    found = riskmap_ext.weighted_loss(
        logits,
        target,
        **DICE,
        include_background=include_background,
        batch_dice=batch,
        dice_class_weight=weight,
        regions=BRATS.to(device) if regions else None,
        **(JACCARD if jaccard else {}),
        **family,
    )
    _assert_same(logits, found, peer(logits, truth))


@BATCH
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_monai_tversky(activation: str, batch: bool, device: torch.device) -> None:
    """MONAI counts true positives once, Dice twice: its constants are half of ours."""
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed")
    regions = activation == "sigmoid"
    logits, target = _inputs(device, classes=4, regions=3 * regions, spatial=(5, 6, 7), ignored=0.0)
    members = BRATS.to(device).t() if regions else torch.eye(4, device=device)
    peer = losses.TverskyLoss(
        **{activation: True}, alpha=0.3, beta=0.8, batch=batch, smooth_nr=0.01, smooth_dr=0.02
    )
    found = riskmap_ext.weighted_loss(
        logits,
        target,
        **DICE,
        alpha=0.3,
        beta=0.8,
        smooth_nr=0.02,
        smooth_dr=0.04,
        include_background=True,
        batch_dice=batch,
        regions=BRATS.to(device) if regions else None,
    )
    _assert_same(logits, found, peer(logits, members[target].movedim(-1, 1).double()))


@pytest.mark.parametrize("jaccard", [False, True], ids=["dice", "jaccard"])
@pytest.mark.parametrize(
    ("smooth_nr", "smooth_dr", "expected"), [(0.0, 0.0, 1.0), (0.0, 1e-5, 1.0), (2.0, 2.0, 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_empty_class_has_a_defined_value(
    dtype: torch.dtype,
    smooth_nr: float,
    smooth_dr: float,
    expected: float,
    jaccard: bool,
    device: torch.device,
) -> None:
    """Its probability is 0 everywhere, and no voxel has its label: 0 / 0 without smoothing."""
    logits = torch.zeros(1, 2, 6, dtype=dtype, device=device)
    logits[:, 1] = -1e4
    logits.requires_grad_()
    loss = riskmap_ext.weighted_loss(
        logits,
        torch.zeros(1, 6, dtype=torch.int64, device=device),
        **DICE,
        **(JACCARD if jaccard else {}),
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
    )
    loss.backward()
    assert loss.item() == expected
    assert torch.count_nonzero(grad_of(logits)) == 0


def test_extreme_logits_have_finite_gradients(device: torch.device) -> None:
    logits = 1e4 * Case("extreme_family", classes=5).logits(device)
    target = Case("extreme_family", classes=5, ignored=0.0).target(device)
    for options in ({}, JACCARD):
        leaf = logits.clone().requires_grad_()
        riskmap_ext.weighted_loss(
            leaf, target, **DICE, **options, squared_pred=True, smooth_nr=0.0, smooth_dr=0.0
        ).backward()
        assert grad_of(leaf).isfinite().all()


def _nnunet_soft_dice(
    logits: Tensor, target: Tensor, *, batch_dice: bool, do_bg: bool, smooth: float = 1e-5
) -> Tensor:
    """Minus the mean Dice of softmax and one-hot labels, ignored voxels masked out of both."""
    classes = logits.size(1)
    mask = (target != -100).to(logits.dtype).unsqueeze(1)
    truth = one_hot(target.clamp(min=0), classes).movedim(-1, 1).to(logits.dtype) * mask
    predicted = torch.softmax(logits, dim=1)
    if not do_bg:
        predicted, truth = predicted[:, 1:], truth[:, 1:]
    axes = tuple(range(2, logits.dim()))
    if batch_dice:
        axes = (0, *axes)
    both = (predicted * truth * mask).sum(axes)
    size = (predicted * mask).sum(axes) + truth.sum(axes)
    return -((2 * both + smooth) / (size + smooth).clamp(min=1e-8)).mean()


@SHAPES
@CLASSES
@BOTH
@BATCH
@pytest.mark.parametrize("empty_image", [False, True])
def test_nnunet(
    empty_image: bool,
    batch: bool,
    include_background: bool,
    classes: int,
    spatial: tuple[int, ...],
    device: torch.device,
) -> None:
    """With ignored voxels, and with an image where all are: its Dice is 1 there and here."""
    logits, target = _inputs(device, classes=classes, spatial=spatial, empty_image=empty_image)
    found = riskmap_ext.weighted_loss(
        logits, target, **DICE, include_background=include_background, batch_dice=batch
    )
    expected = 1 + _nnunet_soft_dice(logits, target, batch_dice=batch, do_bg=include_background)
    _assert_same(logits, found, expected)


def test_nnunet_with_cross_entropy(device: torch.device) -> None:
    logits, target = _inputs(device, classes=5, spatial=(5, 6, 7))
    logits, target = logits.detach()[:1].requires_grad_(), target[:1]
    found = riskmap_ext.weighted_loss(
        logits, target, normalization="valid", dice_weight=1.0, batch_dice=True
    )
    dice = _nnunet_soft_dice(logits, target, batch_dice=True, do_bg=False)
    _assert_same(logits, found, 1 + dice + cross_entropy(logits, target))


def test_perfect_and_absent_classes(device: torch.device) -> None:
    """A class that is neither labelled nor predicted has a Dice of 1, one that is missed 0."""
    target = torch.tensor([[0, 0, 1, 1, 1, 0]], device=device)
    certain = torch.full((1, 4, 6), -200.0, dtype=torch.float64, device=device)
    perfect = certain.scatter(1, target.unsqueeze(1), 200.0)
    loss = riskmap_ext.weighted_loss(perfect, target, **DICE)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    missed = certain.clone()
    missed[:, 0] = 200.0
    loss = riskmap_ext.weighted_loss(missed, target, **DICE)
    assert loss.item() == pytest.approx(1 / 3, abs=1e-5)
