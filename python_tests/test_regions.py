"""The loss over overlapping regions: sigmoids, and targets that stay one map of labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import BRATS, REGION_CASES, Call, Case, in_double, loss_and_gradients
from compare import (
    assert_gradient_close,
    assert_loss_matches_reference,
    grad_of,
)
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import riskmap_ext
from riskmap_ext import TransferStatistics, reference

pytestmark = pytest.mark.ops

BRATS_CASE = Case(
    "brats", classes=4, regions=3, spatial=(6, 7, 5), dtype=torch.float64, risk_dtype=torch.float64
)


@pytest.mark.parametrize("case", REGION_CASES, ids=lambda case: case.name)
def test_matches_reference(case: Case, device: torch.device) -> None:
    assert_loss_matches_reference(case, device)


@pytest.mark.parametrize("case", REGION_CASES, ids=lambda case: case.name)
def test_gradients_vanish_at_ignored_voxels(case: Case, device: torch.device) -> None:
    _, grad_logits, grad_risk = loss_and_gradients(case.loss_call(device))
    ignored = ~case.valid(device)
    assert torch.count_nonzero(grad_logits.movedim(1, -1)[ignored]) == 0
    if grad_risk is not None:
        assert torch.count_nonzero(grad_risk.reshape(ignored.shape)[ignored]) == 0


def _brats_inputs(device: torch.device, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    case = Case(**{**vars(BRATS_CASE), **changes})
    (logits, target, risk), _ = case.loss_call(device)
    return logits.requires_grad_(), target, risk.nan_to_num(1.0).requires_grad_()


def _by_hand(
    logits: Tensor,
    target: Tensor,
    risk: Tensor,
    *,
    foreground_only: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    dice_weight: float = 0.0,
    batch_dice: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Image by image and region by region, with the sums written out."""
    losses: list[Tensor] = []
    dices: list[Any] = []
    sums: list[list[list[Any]]] = []
    for image in range(len(logits)):
        valid = target[image] != -100
        foreground = valid & (target[image] != 0)
        summed = foreground if foreground_only else valid
        size = max(int(foreground.sum()), 0.05 * int(valid.sum()))
        if not foreground.any():
            size = int(valid.sum()) or 1
        voxel_loss: Any = 0.0
        sums.append([])
        for region, labels in enumerate(([1, 2, 3], [2, 3], [3])):
            x = logits[image, region]
            truth = torch.isin(target[image], torch.tensor(labels).to(target)).to(x.dtype)
            smooth = truth * (1 - label_smoothing) + label_smoothing / 2
            factor = 1.0 if weight is None else weight[region]
            bce = binary_cross_entropy_with_logits(x, smooth, reduction="none")
            voxel_loss = voxel_loss + factor * bce / 3
            p = torch.sigmoid(x)
            sums[-1].append([(p * truth)[valid].sum(), p[valid].sum(), truth[valid].sum()])
        losses.append((risk[image] * voxel_loss)[summed].sum() / size)
    if batch_dice:
        sums = [[[sum(image[r][k] for image in sums) for k in range(3)] for r in range(3)]]
    for image_sums in sums:
        scores = [(2 * both + 1e-5) / (p + t + 1e-5) for both, p, t in image_sums]
        dices.append(1 - sum(scores) / 3)
    reduce = torch.mean if reduction == "mean" else torch.sum
    return reduce(torch.stack(losses)) + dice_weight * reduce(torch.stack(dices))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"label_smoothing": 1.0},
        {"weight": torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)},
        {"dice_weight": 1.0},
        {"dice_weight": 0.7, "batch_dice": True, "label_smoothing": 0.1},
        {"ce_voxels": "foreground"},
        {"ce_voxels": "foreground", "dice_weight": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("empty_image", [False, True])
def test_equals_the_sums_written_out(
    empty_image: bool, options: dict[str, Any], reduction: str, device: torch.device
) -> None:
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    changes = {"batch": 3, "empty_image": empty_image}
    inputs = _brats_inputs(device, **changes)
    found = riskmap_ext.weighted_loss(
        *inputs,
        regions=BRATS.to(device),
        normalization="foreground",
        reduction=reduction,
        **options,
    )
    found.backward()

    copies = _brats_inputs(device, **changes)
    by_hand = {k: v for k, v in options.items() if k != "ce_voxels"}
    expected = _by_hand(
        *copies, foreground_only="ce_voxels" in options, reduction=reduction, **by_hand
    )
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip((inputs[0], inputs[2]), (copies[0], copies[2]), strict=True):
        assert_gradient_close(one.grad, other.grad)


def test_map_is_the_mean_over_regions(device: torch.device) -> None:
    (logits, target, _), _ = BRATS_CASE.loss_call(device)
    regions = BRATS.to(device)
    found = riskmap_ext.weighted_loss(logits, target, regions=regions, reduction="none")
    inside = regions.t().double()[target.clamp(min=0)].movedim(-1, 1)
    bce = binary_cross_entropy_with_logits(logits, inside, reduction="none").mean(dim=1)
    torch.testing.assert_close(found, bce.masked_fill(target == -100, 0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_region_is_a_softmax_of_two_classes(dtype: torch.dtype, device: torch.device) -> None:
    """softmax([0, x])[1] = sigmoid(x); the cross-entropies agree, label smoothing included."""
    case = Case("one_region", classes=2, regions=1, dtype=dtype, loss_options={})
    (logits, target, risk), kwargs = case.loss_call(device)
    kwargs |= {"label_smoothing": 0.1}
    found = loss_and_gradients(
        ((logits, target, risk), {**kwargs, "regions": torch.tensor([[0, 1]], device=device)})
    )
    both = torch.cat([torch.zeros_like(logits), logits], dim=1)
    del kwargs["regions"]
    expected = loss_and_gradients(((both, target, risk), kwargs))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(found[1], expected[1][:, 1:], rtol=tolerance, atol=tolerance / 100)
    torch.testing.assert_close(found[2], expected[2], rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool),
        torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.uint8),
        torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool).t(),
        [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]],
        ((False, True, True, True), (False, False, True, True), (False, False, False, True)),
    ],
    ids=["bool", "uint8", "transposed", "lists", "tuples"],
)
def test_tables_of_every_kind(table: Any, device: torch.device) -> None:
    call = BRATS_CASE.loss_call(device)
    expected = loss_and_gradients((call[0], {"regions": BRATS.to(device)}))
    table = table.to(device) if isinstance(table, Tensor) else table
    found = loss_and_gradients((call[0], {"regions": table}))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"label_smoothing": 0.3, "ce_voxels": "foreground", "reduction": "sum"},
        {"dice_weight": 1.0},
        {"dice_weight": 0.7, "batch_dice": True, "normalization": "batch_foreground"},
    ],
    ids=["default", "none", "smooth", "dice", "batch_dice"],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_gradcheck(
    layout: str, options: dict[str, Any], in_forward: bool, device: torch.device
) -> None:
    case = Case(
        "gradcheck_regions",
        spatial=(3, 4),
        classes=4,
        regions=3,
        layout=layout,
        dtype=torch.float64,
        magnitude=1.0,
        with_weight=True,
        with_foreground=True,
        loss_options=options,
    )
    (logits, target, risk), kwargs = in_double(case.loss_call(device))
    risk = risk.nan_to_num(1.0)
    with riskmap_ext.gradient_in_forward(in_forward):
        assert torch.autograd.gradcheck(
            lambda logits, risk: riskmap_ext.weighted_loss(logits, target, risk, **kwargs),
            (logits.requires_grad_(), risk.requires_grad_()),
        )


@pytest.mark.parametrize("dice", [0.0, 1.0], ids=["ce", "dice"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_extreme_logits(
    dtype: torch.dtype, label_smoothing: float, dice: float, device: torch.device
) -> None:
    case = Case(
        "extreme_regions",
        dtype=dtype,
        classes=4,
        regions=3,
        spatial=(5, 7),
        risk_dtype=dtype,
        loss_options={"dice_weight": dice, "label_smoothing": label_smoothing},
    )
    (logits, target, risk), kwargs = case.loss_call(device)
    logits = torch.where(logits > 0, 1e4, -1e4).to(dtype)
    call = (logits, target, risk), kwargs
    found = loss_and_gradients(call, grad_output=64.0)
    expected = loss_and_gradients(in_double(call), reference.weighted_loss, 64.0)
    assert found[0].isfinite()
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert_gradient_close(found[1], expected[1])
    assert_gradient_close(found[2], expected[2])


@pytest.mark.parametrize("function", [riskmap_ext.weighted_loss, reference.weighted_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_infinite_logits(function: Any, dtype: torch.dtype, device: torch.device) -> None:
    """One that is right costs nothing, one that is wrong costs everything, as with a softmax."""
    inf = math.inf
    logits = torch.tensor([[[-inf, inf, -inf, inf]]], dtype=dtype, device=device)
    target = torch.tensor([[0, 1, 1, 0]], device=device)
    regions = torch.tensor([[0, 1]], device=device)

    logits.requires_grad_()
    losses = function(logits, target, regions=regions, reduction="none")
    assert losses.tolist() == [[0.0, 0.0, inf, inf]]
    losses[0, :2].sum().backward()
    assert torch.count_nonzero(grad_of(logits)) == 0

    for scale, right in ((1.0, torch.tensor([[0, 1]], device=device)), (-1.0, 1 - target[:, :2])):
        two = (scale * logits.detach()[..., :2]).requires_grad_()
        loss = function(two, right, regions=regions, dice_weight=1.0, background=None)
        assert loss.item() == pytest.approx(0.0, abs=1e-6)
        loss.backward()
        assert torch.count_nonzero(grad_of(two)) == 0

    wrong = logits.detach()[..., 2:].clone().requires_grad_()
    loss = function(wrong, target[:, 2:], regions=regions, normalization="none", background=None)
    assert loss.item() == inf
    loss.backward()
    assert grad_of(wrong).flatten().tolist() == [-1.0, 1.0]

    losses = function(
        logits.detach(), target, regions=regions, reduction="none", label_smoothing=0.1
    )
    assert losses.tolist() == [[inf] * 4]


@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("dice", [0.0, 1.0], ids=["ce", "dice"])
def test_nan_is_not_hidden(dice: float, in_forward: bool, device: torch.device) -> None:
    for region in range(3):
        logits, target, risk = _brats_inputs(device, dtype=torch.float32)
        logits = logits.detach()
        target[0, 3, 4, 2] = 2
        logits[0, region, 3, 4, 2] = torch.nan
        logits.requires_grad_()
        with riskmap_ext.gradient_in_forward(in_forward):
            loss = riskmap_ext.weighted_loss(
                logits, target, risk, regions=BRATS.to(device), dice_weight=dice
            )
        assert loss.isnan()
        loss.backward()
        assert grad_of(logits)[0, region, 3, 4, 2].isnan()
        others = [r for r in range(3) if r != region]  # no softmax ties the regions together
        assert grad_of(logits)[0, others, 3, 4, 2].isfinite().all()


@pytest.mark.parametrize("dice", [0.0, 1.0], ids=["ce", "dice"])
def test_nothing_is_looked_at_in_ignored_voxels(dice: float, device: torch.device) -> None:
    (logits, target, risk), _ = BRATS_CASE.loss_call(device)
    options = {"regions": BRATS.to(device), "dice_weight": dice}
    expected = loss_and_gradients(((logits, target, risk), options))
    spoiled = logits.masked_fill((target == -100).unsqueeze(1), torch.nan)
    found = loss_and_gradients(((spoiled, target, risk), options))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_other_ignored_label(device: torch.device) -> None:
    (logits, target, risk), _ = BRATS_CASE.loss_call(device)
    options = {"regions": BRATS.to(device), "dice_weight": 1.0}
    expected = loss_and_gradients(((logits, target, risk), options))
    for label in (-1, 4, 255):
        moved = target.masked_fill(target == -100, label)
        found = loss_and_gradients(((logits, moved, risk), {**options, "ignore_index": label}))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("background", [0, 2, 3, None])
def test_background_is_a_label(background: int | None, device: torch.device) -> None:
    """Of 4 labels, beside 3 regions; it decides what is foreground, not which Dice counts."""
    (logits, target, _), _ = BRATS_CASE.loss_call(device)
    options: dict[str, Any] = {"regions": BRATS.to(device), "background": background}
    voxels = riskmap_ext.weighted_loss(logits, target, reduction="none", **options)
    foreground = (target != -100) & (target != (-100 if background is None else background))
    expected = (voxels.flatten(1).sum(1) / foreground.flatten(1).sum(1)).mean()
    found = riskmap_ext.weighted_loss(logits, target, normalization="foreground", **options)
    torch.testing.assert_close(found, expected)

    dice: dict[str, Any] = {"ce_weight": 0.0, "dice_weight": 1.0}
    found = riskmap_ext.weighted_loss(logits, target, **dice, **options)
    expected = riskmap_ext.weighted_loss(logits, target, **dice, regions=options["regions"])
    assert torch.equal(found, expected)


def test_result_does_not_depend_on_threads(device: torch.device, restored_threads: None) -> None:
    case = Case("threads_regions", regions=3, classes=4, spatial=(40, 41, 42))
    call = case.loss_call(device)
    call[1]["dice_weight"] = 1.0
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(loss_and_gradients(call))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_compiled(device: torch.device) -> None:
    (logits, target, risk), _ = BRATS_CASE.loss_call(device)
    table = BRATS.to(device)

    def loss(logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
        return riskmap_ext.weighted_loss(logits, target, risk, regions=table, dice_weight=1.0)

    def of_lists(logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
        lists: Any = [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
        return riskmap_ext.weighted_loss(logits, target, risk, regions=lists, dice_weight=1.0)

    call: Call = (logits, target, risk), {}
    expected = loss_and_gradients(call, loss)
    for function in (loss, of_lists):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = loss_and_gradients(call, compiled)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


LOGITS = torch.zeros(2, 3, 5, 6)
LABELS = torch.zeros(2, 5, 6, dtype=torch.int64)
BAD_TABLES: list[tuple[Any, type[Exception], list[str]]] = [
    (BRATS[:2], ValueError, ["[3, L]", "[2, 3, 5, 6]", "[2, 4]"]),
    (BRATS.t(), ValueError, ["[3, L]", "[4, 3]"]),
    (BRATS[0], ValueError, ["[R, L]", "[4]"]),
    (BRATS[None], ValueError, ["[R, L]", "[1, 3, 4]"]),
    (BRATS[:, :0], ValueError, ["[R, L]", "[3, 0]"]),
    (BRATS.float(), TypeError, ["bool", "float32"]),
    (BRATS.to(torch.complex64), TypeError, ["bool", "complex64"]),
    ([[1, 2, 3], [2, 3], [3]], ValueError, ["0 or 1", "2"]),
    ([[0, 1], [0, 1, 1], [1, 1]], ValueError, ["same length", "[0, 1, 1]"]),
    ([[0, 0.5], [0, 1], [0, 1]], ValueError, ["0 or 1", "0.5"]),
    ([["a"], ["b"], ["c"]], ValueError, ["0 or 1", "'a'"]),
    ([0, 1, 1], ValueError, ["rows", "[0, 1, 1]"]),
    ([], ValueError, ["[R, L]", "[0]"]),
    ([[], [], []], ValueError, ["[R, L]", "[3, 0]"]),
    ("brats", TypeError, ["torch.Tensor", "str"]),
    ({0: [0, 1]}, TypeError, ["torch.Tensor", "dict"]),
]


@pytest.mark.parametrize(("table", "error", "parts"), BAD_TABLES, ids=lambda part: str(part)[:30])
@pytest.mark.parametrize("function", ["loss", "leep", "map", "risk", "statistics", "module"])
def test_bad_table(function: str, table: Any, error: type[Exception], parts: list[str]) -> None:
    given = torch.full((2, 4), 0.5)
    calls = {
        "loss": lambda: riskmap_ext.weighted_loss(LOGITS, LABELS, regions=table),
        "leep": lambda: riskmap_ext.leep_statistics(LOGITS, LABELS, 2, regions=table),
        "map": lambda: riskmap_ext.transferability_map(LOGITS, LABELS, given, regions=table),
        "risk": lambda: riskmap_ext.risk_map(LOGITS, LABELS, given, regions=table),
        "statistics": lambda: TransferStatistics(2, regions=table).update(LOGITS, LABELS),
        "module": lambda: riskmap_ext.nn.RiskWeightedLoss(regions=table)(LOGITS, LABELS),
    }
    with pytest.raises(error) as caught:
        calls[function]()
    message = str(caught.value)
    assert message.startswith("regions: ")
    for part in parts if function in ("loss", "module") else parts[:1]:
        assert part in message


@pytest.mark.usefixtures("cpu_kernels")
def test_labels_beyond_the_table(device: torch.device) -> None:
    (logits, target, _), _ = BRATS_CASE.loss_call(device)
    target[1, 2, 3, 4] = 4
    for bad in (4, -1):
        target[1, 2, 3, 4] = bad
        for in_forward in (True, False):
            with (
                riskmap_ext.gradient_in_forward(in_forward),
                pytest.raises(ValueError, match=rf"(?s)target.*0 to 3.*{bad} at \[1, 2, 3, 4\]"),
            ):
                riskmap_ext.weighted_loss(logits.requires_grad_(), target, regions=BRATS.to(device))


@pytest.mark.parametrize("background", [4, -1, 7])
def test_background_beyond_the_table(background: int) -> None:
    with pytest.raises(ValueError, match="background"):
        riskmap_ext.weighted_loss(LOGITS, LABELS, regions=BRATS, background=background)
    with pytest.raises(ValueError, match="background"):
        riskmap_ext.nn.RiskWeightedLoss(regions=BRATS, background=background)


def test_weight_is_one_value_per_region() -> None:
    with pytest.raises(ValueError, match=r"weight: expected \[3\]"):
        riskmap_ext.weighted_loss(LOGITS, LABELS, regions=BRATS, weight=torch.ones(4))


def test_table_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"regions: expected on cpu .* got meta"):
        riskmap_ext.weighted_loss(LOGITS, LABELS, regions=BRATS.to("meta"))
