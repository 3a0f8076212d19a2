"""riskmap_ext.nn: modules over the functional API."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, loss_and_gradients
from torch import Tensor
from torch.nn.functional import interpolate

import riskmap_ext
from riskmap_ext.nn import _ELSEWHERE, DeferredLogits, RiskWeightedLoss

CPU = torch.device("cpu")
LOGITS = torch.zeros(2, 3, 8, 8)
TARGET = torch.zeros(1, 8, 8, dtype=torch.int64).expand(2, 8, 8)
CASE = Case("module", with_weight=True, with_foreground=True, batch=3)


def test_equals_the_function(device: torch.device) -> None:
    (logits, target, risk), kwargs = CASE.loss_call(device)
    foreground = kwargs["foreground"]
    options: dict[str, Any] = {"dice_weight": 0.5, "label_smoothing": 0.1, "reduction": "sum"}
    weights: dict[str, Any] = {name: kwargs[name] for name in ("weight", "dice_class_weight")}
    module = RiskWeightedLoss(**weights, **options).to(device)
    found = loss_and_gradients(
        ((logits, target, risk), {}), lambda x, y, r: module(x, y, r, foreground)
    )
    expected = loss_and_gradients(((logits, target, risk), {**kwargs, **options}))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_risk_may_be_left_out() -> None:
    (logits, target, _), _ = CASE.loss_call(torch.device("cpu"))
    assert torch.equal(
        RiskWeightedLoss()(logits, target), riskmap_ext.weighted_loss(logits, target)
    )


def test_weight_moves_along_but_is_not_saved() -> None:
    module = RiskWeightedLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    moved = module.to("meta").weight
    assert moved is not None
    assert moved.is_meta


def test_copies_and_prints() -> None:
    module = RiskWeightedLoss(dice_weight=0.25, ce_voxels="foreground")
    (logits, target, risk), _ = CASE.loss_call(torch.device("cpu"))
    assert torch.equal(copy.deepcopy(module)(logits, target, risk), module(logits, target, risk))
    assert "dice_weight=0.25" in repr(module)
    assert "foreground" in repr(module)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"reduction": "average"}, ValueError, "reduction"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"dice_weigth": 1.0}, TypeError, "dice_weigth"),
    ],
)
def test_bad_options_are_said_at_once(
    options: dict[str, Any], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=name):
        RiskWeightedLoss(**options)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("class_weights", "did you mean weight?"),
        ("class_weight", "did you mean weight?"),
        ("weigth", "did you mean weight"),
        ("ignore_label", "did you mean ignore_index?"),
        ("dice", "did you mean dice_weight?"),
        ("lambda_dice", "did you mean dice_weight?"),
        ("lambda_ce", "did you mean ce_weight?"),
        ("dice_weigth", "did you mean dice_weight"),
        ("scale_weight", "did you mean scale_weights"),
        ("foreground", "it goes with the call, loss(input, target, risk, foreground)"),
        ("zzz", "expected weight, regions, scale_weights, ignore_index"),
    ],
)
def test_what_an_unknown_option_may_mean(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"unknown option {name!r}; {hint}")):
        RiskWeightedLoss(**{name: 1.0})  # type: ignore[arg-type]


def test_other_names_are_of_options_there_are() -> None:
    options = inspect.signature(riskmap_ext.weighted_loss).parameters
    assert set(_ELSEWHERE.values()) <= {"scale_weights", *options}


# ---- deep supervision ----------------------------------------------------------------------------

SIZES = ((12, 9, 10), (6, 5, 5), (3, 2, 4))  # finest first; not all of them halves


def _scales(
    dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, targets, risks and foregrounds, one of each for every scale."""
    calls = [
        Case(f"scale_{i}", spatial=size, dtype=dtype, with_foreground=True).loss_call(device)
        for i, size in enumerate(SIZES)
    ]
    logits, targets, risks = (list(values) for values in zip(*(c[0] for c in calls), strict=True))
    return logits, targets, risks, [c[1]["foreground"] for c in calls]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale_weights", [None, (1.0, 0.5, 0.25), [0.5, 0, 2]])
def test_scales_are_added_up(scale_weights: Any, reduction: str, device: torch.device) -> None:
    logits, targets, risks, foregrounds = _scales(device=device)
    options = {"dice_weight": 0.5, "reduction": reduction}
    module = RiskWeightedLoss(scale_weights=scale_weights, **options).to(device)
    for tensor in (*logits, *risks):
        tensor.requires_grad_()
    loss = module(logits, targets, risks, foregrounds)
    loss.backward()

    factors = scale_weights or (4 / 7, 2 / 7, 1 / 7)
    total: Any = 0.0
    for factor, x, y, r, f in zip(factors, logits, targets, risks, foregrounds, strict=True):
        single, gradient, grad_risk = loss_and_gradients(
            ((x, y, r), {"foreground": f, **options}), None, factor
        )
        total = total + factor * single
        if factor == 0:
            assert x.grad is None
            assert r.grad is None
        else:
            torch.testing.assert_close(x.grad, gradient, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(r.grad, grad_risk, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss.detach(), total, rtol=1e-6, atol=0)


def test_lists_and_tuples_and_single_scales() -> None:
    logits, targets, risks, foregrounds = _scales()
    module = RiskWeightedLoss()
    as_lists = module(logits, targets, risks, foregrounds)
    as_tuples = module(tuple(logits), tuple(targets), tuple(risks), tuple(foregrounds))
    assert torch.equal(as_lists, as_tuples)
    one = module(logits[:1], targets[:1], risks[:1], foregrounds[:1])
    assert torch.equal(one, module(logits[0], targets[0], risks[0], foregrounds[0]))
    without = module(logits, targets)
    assert torch.equal(without, module(logits, targets, None, None))


NEAREST_SIZES = [
    ((12, 9, 10), (6, 5, 5)),
    ((12, 9, 10), (4, 3, 2)),
    ((13, 7, 11), (5, 7, 1)),
    ((8, 8), (4, 4)),
    ((9, 15), (4, 7)),
    ((17,), (5,)),
    ((6, 5), (12, 7)),  # logits finer than the labels
]


@pytest.mark.parametrize(("fine", "coarse"), NEAREST_SIZES)
@pytest.mark.parametrize("channel", [False, True])
def test_single_tensors_are_sampled_at_the_nearest_voxel(
    channel: bool, fine: tuple[int, ...], coarse: tuple[int, ...], device: torch.device
) -> None:
    case = Case("nearest", spatial=fine, channel=channel, with_foreground=True)
    (logits, target, risk), kwargs = case.loss_call(device)
    coarse_logits = Case("nearest_coarse", spatial=coarse).logits(device)

    def sampled(tensor: Tensor) -> Tensor:
        as_image = tensor.double() if channel else tensor.double().unsqueeze(1)
        return interpolate(as_image, size=coarse, mode="nearest-exact").to(tensor.dtype)

    module = RiskWeightedLoss(dice_weight=1.0)
    tensors = (target, risk, kwargs["foreground"])
    found = module([logits, coarse_logits], *tensors)
    expected = module(
        [logits, coarse_logits],
        *([tensor, sampled(tensor)] for tensor in tensors),
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32,
        torch.uint64, torch.float16, torch.bfloat16, torch.float64,
    ],
)  # fmt: skip
def test_labels_of_every_dtype_are_sampled(dtype: torch.dtype) -> None:
    logits, targets, _, _ = _scales()
    target = targets[0].clamp(min=0)
    expected = RiskWeightedLoss()(logits, target)
    assert torch.equal(RiskWeightedLoss()(logits, target.to(dtype)), expected)


def test_masks_and_regions_at_every_scale() -> None:
    logits, targets, risks, foregrounds = _scales()
    table = [[0, 1, 1, 0, 1], [0, 0, 1, 0, 1], [1, 0, 0, 1, 1]]
    module = RiskWeightedLoss([1.0, 2.0, 0.5], regions=table, background=3, dice_weight=1.0)
    found = module(logits, targets, risks, foregrounds)
    expected = sum(
        factor
        * riskmap_ext.weighted_loss(
            *tensors,
            foreground=mask,
            weight=torch.tensor([1.0, 2.0, 0.5]),
            regions=torch.tensor(table),
            background=3,
            dice_weight=1.0,
        )
        for factor, mask, *tensors in zip(
            (4 / 7, 2 / 7, 1 / 7), foregrounds, logits, targets, risks, strict=True
        )
    )
    torch.testing.assert_close(found, expected)


def test_risk_of_the_finest_scale_takes_a_gradient() -> None:
    """That of the sampled voxels adds up, the others get that of the finest scale alone."""
    logits, targets, risks, _ = _scales()
    target, risk = targets[0].clamp(min=0), risks[0].nan_to_num(1.0).requires_grad_()
    RiskWeightedLoss(scale_weights=(1, 1, 1))(logits, target, risk).backward()
    separate = [risk.detach().clone().requires_grad_() for _ in logits]
    for x, r in zip(logits, separate, strict=True):
        y = target
        for dim, size in enumerate(x.shape[2:], start=1):
            picked = [int((i + 0.5) * y.size(dim) / size) for i in range(size)]
            y, r = (
                y.index_select(dim, torch.tensor(picked)),
                r.index_select(dim, torch.tensor(picked)),
            )
        riskmap_ext.weighted_loss(x, y, r).backward()
    torch.testing.assert_close(risk.grad, sum(r.grad for r in separate))


def test_monai_tensors_at_every_scale() -> None:
    data = pytest.importorskip("monai.data", reason="MONAI is not installed")
    logits, targets, risks, foregrounds = _scales()
    module = RiskWeightedLoss(dice_weight=1.0)

    def wrap(tensors: list[Tensor]) -> list[Tensor]:
        return [data.MetaTensor(tensor) for tensor in tensors]

    expected = module(logits, targets, risks, foregrounds)
    found = module(wrap(logits), wrap(targets), wrap(risks), wrap(foregrounds))
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
    single = [data.MetaTensor(tensors[0].unsqueeze(1)) for tensors in (targets, risks)]
    found = module(wrap(logits), *single)
    assert type(found) is torch.Tensor
    assert torch.equal(found, module(logits, targets[0], risks[0]))


@pytest.mark.parametrize("single", [False, True], ids=["lists", "tensors"])
@pytest.mark.parametrize("in_forward", [True, False])
def test_compiled_with_lists(in_forward: bool, single: bool) -> None:
    scales: Any = _scales()
    logits, targets, risks, foregrounds = scales
    if single:  # one tensor each, sampled inside
        targets, risks, foregrounds = targets[0], risks[0].nan_to_num(1.0), foregrounds[0]
    module = RiskWeightedLoss(dice_weight=0.5, label_smoothing=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, module):
        leaves = [x.detach().clone().requires_grad_() for x in logits]
        with riskmap_ext.gradient_in_forward(in_forward):
            loss = function(leaves, targets, risks, foregrounds)
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"input": []}, ValueError, ["input", "at least one"]),
        ({"input": None}, TypeError, ["input", "NoneType"]),
        ({"input": [None, None, None]}, TypeError, ["input", "NoneType"]),
        ({"input": {0: LOGITS}}, TypeError, ["input", "dict"]),
        ({"target": [TARGET] * 2}, ValueError, ["target", "3 tensors", "got 2"]),
        ({"target": None}, TypeError, ["target", "NoneType"]),
        ({"target": "labels"}, TypeError, ["target", "str"]),
        ({"risk": [TARGET] * 4}, ValueError, ["risk", "3 tensors", "got 4"]),
        ({"risk": torch.ones(2, 8)}, ValueError, ["risk", "2 spatial", "[2, 8]"]),
        ({"target": TARGET[:1].expand(3, 8, 8)}, ValueError, ["target", "[2, 8, 8]", "[3, 8, 8]"]),
        ({"target": TARGET[:, None].expand(-1, 2, -1, -1)}, ValueError, ["target", "[2, 2, 8, 8]"]),
        ({"foreground": []}, ValueError, ["foreground", "3 tensors", "got 0"]),
        ({"foreground": torch.ones(2, 8, 8)}, TypeError, ["foreground", "float32"]),
        ({"target": [TARGET] * 3}, ValueError, ["target", "[2, 4, 4]", "[2, 8, 8]"]),
    ],
)
def test_bad_scales(change: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    arguments = {"input": [LOGITS, LOGITS[..., ::2, ::2], LOGITS[..., :2, :2]], "target": TARGET}
    RiskWeightedLoss()(**arguments)
    with pytest.raises(error) as caught:
        RiskWeightedLoss()(**{**arguments, **change})
    for part in parts:
        assert part in str(caught.value)


def test_a_list_needs_a_reduction_and_its_weights() -> None:
    with pytest.raises(ValueError, match=r"reduction: .* list of logits, got 'none'"):
        RiskWeightedLoss(reduction="none")([LOGITS], TARGET)
    with pytest.raises(ValueError, match=r"scale_weights: expected 1 values.*got 2"):
        RiskWeightedLoss(scale_weights=(1.0, 0.5))([LOGITS], TARGET)
    plain = RiskWeightedLoss(scale_weights=(1.0, 0.5))(LOGITS, TARGET)  # not used
    assert torch.equal(plain, RiskWeightedLoss()(LOGITS, TARGET))


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"scale_weights": (1.0, -0.5)}, ValueError, ["scale_weights", "-0.5"]),
        ({"scale_weights": (1.0, float("nan"))}, ValueError, ["scale_weights", "nan"]),
        ({"scale_weights": ("1", 2)}, TypeError, ["scale_weights", "str"]),
        ({"scale_weights": 0.5}, TypeError, ["scale_weights", "sequence", "float"]),
        ({"scale_weights": "half"}, TypeError, ["scale_weights", "sequence", "str"]),
        ({"scale_weights": (0.0, 0)}, ValueError, ["scale_weights", "above 0"]),
        ({"weight": 1.0}, TypeError, ["weight", "sequence", "float"]),
        ({"weight": "abc"}, TypeError, ["weight", "sequence", "str"]),
        ({"weight": ["a"]}, TypeError, ["weight", "number", "str"]),
        ({"weight": [1.0, -1.0]}, ValueError, ["weight", "-1"]),
        ({"weight": []}, ValueError, ["weight", "[0]"]),
        ({"weight": torch.tensor([1, 2])}, TypeError, ["weight", "floating", "int64"]),
        ({"weight": torch.tensor(1.0)}, ValueError, ["weight", "[C]", "[]"]),
        ({"weight": torch.ones(2, 2)}, ValueError, ["weight", "[C]", "[2, 2]"]),
        ({"weight": torch.ones(3), "background": 3}, ValueError, ["background", "3"]),
        ({"regions": [[1, 2, 3], [2, 3], [3]]}, ValueError, ["regions", "0 or 1"]),
        ({"regions": torch.ones(3)}, TypeError, ["regions", "float32"]),
        ({"regions": torch.ones(2, 2, 2, dtype=torch.bool)}, ValueError, ["regions", "[2, 2, 2]"]),
        ({"dice_weight": 1.0, "reduction": "none"}, ValueError, ["dice_weight", "none"]),
    ],
)
def test_bad_tables_and_weights(
    options: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        RiskWeightedLoss(**options)
    for part in parts:
        assert part in str(caught.value)


def test_numpy_weights_are_like_lists() -> None:
    numbers: Any = np.array([0.5, 1.0, 2.0])
    module = RiskWeightedLoss(numbers, scale_weights=numbers)
    other = RiskWeightedLoss(numbers.tolist(), scale_weights=numbers.tolist())
    logits, targets, _, _ = _scales()
    assert torch.equal(module(logits, targets), other(logits, targets))


def test_regions_move_along_but_are_not_saved() -> None:
    module = RiskWeightedLoss(regions=[[0, 1, 1], [0, 0, 1]])
    assert module.state_dict() == {}
    assert module.regions is not None
    assert module.regions.dtype == torch.bool
    for to in (torch.float16, torch.device("meta")):
        module.to(to)
        assert module.regions is not None
        assert module.regions.dtype == torch.bool
    assert module.regions.is_meta


# ---- logits that have not been made --------------------------------------------------------------


def _deferred(sizes: tuple[tuple[int, ...], ...], device: torch.device) -> list[DeferredLogits]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    return [DeferredLogits(random(2, 4, *size), random(3, 4), random(3)) for size in sizes]


@pytest.mark.parametrize("single", [False, True], ids=["lists", "tensors"])
@pytest.mark.parametrize("regions", [None, [[0, 1, 1, 0, 1], [0, 0, 1, 0, 1], [1, 0, 0, 1, 1]]])
def test_deferred_logits_at_every_scale(regions: Any, single: bool, device: torch.device) -> None:
    """As logits: the weights of the classes, the map, its gradient, and sampled targets."""
    scales: Any = _scales(device=device)
    _, targets, risks, foregrounds = scales
    if single:
        targets, risks, foregrounds = targets[0], risks[0].nan_to_num(1.0), foregrounds[0]
    options: dict[str, Any] = {
        "dice_weight": 0.5,
        "label_smoothing": 0.1,
        "dice_class_weight": [1.0, 0.5, 2.0],
    }
    module = RiskWeightedLoss([1.0, 2.0, 0.5], regions=regions, **options).to(device)
    results = []
    for made in (False, True):
        deferred = _deferred(SIZES, device)
        maps: Any = risks if single else list(risks)
        leaves = [part for each in deferred for part in each.parts if part is not None]
        wanted: list[Tensor] = [maps] if single else maps
        for each in wanted:
            each.requires_grad_().grad = None
        given = [each.logits() for each in deferred] if made else deferred
        loss = module(given, targets, maps, foregrounds)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in (*leaves, *wanted))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for each in wanted:
        each.requires_grad_(False)


def test_deferred_logits_of_one_scale_and_beside_logits() -> None:
    logits, targets, risks, _ = _scales()
    module = RiskWeightedLoss(dice_weight=1.0)
    deferred = _deferred(SIZES, CPU)
    found = module(deferred[0], targets[0], risks[0])
    torch.testing.assert_close(found, module(deferred[0].logits(), targets[0], risks[0]))
    mixed = module([deferred[0], *logits[1:]], targets, risks)
    torch.testing.assert_close(mixed, module([deferred[0].logits(), *logits[1:]], targets, risks))
    with pytest.raises(ValueError, match="target: expected 3 tensors, one for each scale"):
        module(deferred, targets[:2])
    overwriting = RiskWeightedLoss(dice_weight=1.0, overwrite_logits=True)
    assert torch.equal(overwriting(deferred[0], targets[0], risks[0]), found)
