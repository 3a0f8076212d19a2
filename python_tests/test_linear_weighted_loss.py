"""The loss from features and its gradients against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BASE, LOSS_CASES, REGION_CASES, Call, Case, in_double
from compare import ROUNDING, assert_gradient_close, assert_map_close, grad_of, relative_l2
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import riskmap_ext
from riskmap_ext import gradient_in_forward, reference
from riskmap_ext.ops import head_on_cuda

CPU = torch.device("cpu")
CHANNELS = (6, 1, 16, 33)  # features: below, at and beyond whole vectors
# The loss has all of them in test_weighted_loss; a third shows that a head changes nothing.
CASES = [
    replace(case, features=CHANNELS[i % len(CHANNELS)])
    for i, case in enumerate((*LOSS_CASES, *REGION_CASES)[::3])
]
MANY = Case("many_classes", classes=105, features=32, spatial=(13, 11, 9), with_weight=True)
WIDE = Case("many_features", classes=20, features=300, spatial=(30, 31))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none", "ce_voxels": "foreground"},
    {"reduction": "sum", "label_smoothing": 0.1, "normalization": "batch_foreground"},
    {"dice_weight": 0.8, "ce_weight": 0.5, "squared_pred": True, "alpha": 0.3, "beta": 0.7},
    {"dice_weight": 0.8, "batch_dice": True, "label_smoothing": 0.2},
    {"normalization": "weighted"},
]


def _gradients(call: Call, function: Any = None, grad_output: float = 0.75) -> list[Any]:
    """The loss, then the gradients of features, weight, bias and risk: None where there is none."""
    (features, weight, bias, target, risk), kwargs = call
    leaves = [
        None if each is None else each.detach().requires_grad_()
        for each in (features, weight, bias, risk)
    ]
    function = function or riskmap_ext.linear_weighted_loss
    loss = function(*leaves[:3], target, leaves[3], **kwargs)
    loss.backward(torch.full_like(loss, grad_output))
    return [loss.detach(), *(None if each is None else each.grad for each in leaves)]


@pytest.fixture
def rounds_logits(request: pytest.FixtureRequest, device: torch.device) -> bool:
    """On CUDA the logits of a chunk are in the dtype of the features, as those of a convolution."""
    return device.type == "cuda" or bool(request.config.getoption("--cuda-on-host"))


def assert_matches(call: Call, dtype: torch.dtype, rounds_logits: bool) -> None:
    # float16 gradients of a mean over voxels are small, those of the weight sums over voxels; a
    # bfloat16 gradient that was made in the forward pass is rounded again when it is scaled.
    grad_output = {torch.float16: 4.0, torch.bfloat16: 1.0}.get(dtype, 0.75)
    found = _gradients(call, grad_output=grad_output)
    expected = _gradients(in_double(call), reference.linear_weighted_loss, grad_output)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [each is None or each.dtype == dtype for each in found[1:4]] == [True] * 3
    if rounds_logits and dtype in ROUNDING:
        # A bias's gradient may be a small difference of large sums: measured with the weight's.
        for several in (found, expected):
            several[2:4] = [torch.cat([each.double().flatten() for each in several[2:4]])]
        for one, other in zip(found, expected, strict=True):
            assert one is None or relative_l2(one, other) <= 8 * ROUNDING[dtype]
        return
    exact = dtype == torch.float64
    assert_map_close(found[0], expected[0], rtol=1e-12 if exact else 1e-5, atol=1e-5)
    for one, other in zip(found[1:4], expected[1:4], strict=True):
        # Sums over voxels of terms that cancel: a float32 sum of n terms is right to about 1e-6 of
        # the largest of them.
        assert_gradient_close(one, other, None if exact else 1e-5)
    assert_gradient_close(found[4], expected[4], None if exact else 2e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case: Case, rounds_logits: bool, device: torch.device) -> None:
    assert_matches(case.head_call(device), case.dtype, rounds_logits)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("base", [MANY, WIDE], ids=lambda case: case.name)
def test_many_classes_and_features(
    base: Case,
    dtype: torch.dtype,
    options: dict[str, Any],
    rounds_logits: bool,
    device: torch.device,
) -> None:
    case = replace(base, dtype=dtype, loss_options=options, layout="channels_last")
    assert_matches(case.head_call(device), dtype, rounds_logits)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_equals_a_convolution_and_the_loss(options: dict[str, Any], device: torch.device) -> None:
    (features, weight, bias, target, risk), kwargs = MANY.head_call(device)
    convolution = torch.nn.Conv3d(MANY.features, MANY.classes, 1, device=device)
    assert convolution.bias is not None
    with torch.no_grad():
        convolution.weight.copy_(weight.view_as(convolution.weight))
        convolution.bias.copy_(bias)
    features.requires_grad_()
    weights = kwargs.pop("class_weight")

    loss = riskmap_ext.weighted_loss(
        convolution(features), target, risk, weight=weights, **kwargs, **options
    )
    leaves = (features, convolution.weight, convolution.bias)
    expected = torch.autograd.grad(loss.sum(), leaves)
    kwargs |= options
    ours = riskmap_ext.linear_weighted_loss(*leaves, target, risk, class_weight=weights, **kwargs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(ours.sum(), leaves), expected, strict=True):
        assert one.shape == other.shape
        assert relative_l2(one, other) <= 1e-5


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (4,), (0, 4), (0, 1, 2)])
@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("dice", [0.0, 0.5])
def test_only_what_is_wanted(
    wanted: tuple[int, ...], in_forward: bool, dice: float, device: torch.device
) -> None:
    call = MANY.head_call(device)
    call[1]["dice_weight"] = dice
    _, *every = _gradients(call, grad_output=1.0)
    every.insert(3, None)  # target
    arguments = [each.requires_grad_() if i in wanted else each for i, each in enumerate(call[0])]
    with gradient_in_forward(in_forward):
        loss = riskmap_ext.linear_weighted_loss(*arguments, **call[1])
        loss.backward()
    for i, each in enumerate(arguments):
        if i in wanted:
            assert relative_l2(grad_of(each), every[i]) <= 1e-6
        else:
            assert each.grad is None


@pytest.mark.parametrize("case", CASES[:: len(CASES) // 40], ids=lambda case: case.name)
def test_both_paths_agree(case: Case, rounds_logits: bool, device: torch.device) -> None:
    """The gradient made in the forward pass, and in the backward pass: on the CPU bit for bit."""
    call = case.head_call(device)
    found = _gradients(call, grad_output=1.0)
    with gradient_in_forward(False):
        expected = _gradients(call, grad_output=1.0)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        limit = 1e-5 + 4 * ROUNDING.get(case.dtype, 0.0) if rounds_logits else 0.0
        assert one is None or relative_l2(one, other) <= limit


@pytest.mark.parametrize(
    "options", [{}, {"dice_weight": 0.7, "squared_pred": True}, {"reduction": "none"}]
)
def test_gradcheck(options: dict[str, Any], device: torch.device) -> None:
    case = Case("gradcheck", dtype=torch.float64, risk_dtype=torch.float64, spatial=(3, 5))
    (*head, target, risk), kwargs = case.head_call(device)
    leaves = [each.requires_grad_() for each in (*head, risk.nan_to_num(1.0))]

    def call(features: Tensor, weight: Tensor, bias: Tensor, risk: Tensor) -> Tensor:
        return riskmap_ext.linear_weighted_loss(
            features, weight, bias, target, risk, **kwargs, **options
        )

    # On CUDA a second backward pass takes the other way to the same numbers.
    assert torch.autograd.gradcheck(call, leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dice", [0.0, 0.5])
def test_compiles_without_a_graph_break(dynamic: bool, dice: float) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        riskmap_ext.linear_weighted_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for spatial in ((7, 9), (5, 12)):
        (*arguments, risk), kwargs = replace(BASE, spatial=spatial).head_call(CPU)
        call = (*arguments, risk.nan_to_num(1.0)), {**kwargs, "dice_weight": dice}
        found, expected = _gradients(call, compiled), _gradients(call)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_in_an_inductor_graph_with_a_layer() -> None:
    features, weight, bias, target, _ = Case("inductor_head", classes=5).head_call(CPU)[0]
    layer = torch.nn.Conv2d(features.size(1), features.size(1), 3, padding=1)

    def step(features: Tensor, weight: Tensor) -> Tensor:
        return riskmap_ext.linear_weighted_loss(layer(features).relu(), weight, bias, target)

    weight.requires_grad_()
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(features, weight), weight)
    expected = torch.autograd.grad(step(features, weight), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_autocast(device: torch.device) -> None:
    (features, weight, bias, target, _), _ = MANY.head_call(device)
    leaves = (features, weight, bias)
    for each in leaves:
        each.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        loss = riskmap_ext.linear_weighted_loss(*leaves, target)
    assert loss.dtype == torch.float32
    rounded = [each.detach().bfloat16() for each in leaves]
    expected = _gradients(((*rounded, target, None), {}), grad_output=1.0)
    assert torch.equal(loss, expected[0])
    for one, other in zip(torch.autograd.grad(loss, leaves), expected[1:4], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())
    (features, weight, bias), _ = in_double((leaves, {}))
    with torch.autocast(device.type, torch.bfloat16):
        loss = riskmap_ext.linear_weighted_loss(features, weight, bias, target)
        assert loss.dtype == torch.float64


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    (features, weight, bias, target, _), _ = MANY.head_call(CPU)
    leaves = [each.requires_grad_() for each in (features, weight, bias)]

    def step(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return riskmap_ext.linear_weighted_loss(features, weight, bias, target, dice_weight=0.5)

    step(*leaves).backward()
    expected = [each.grad for each in leaves]
    for each in leaves:
        each.grad = None
    checkpoint(step, *leaves, use_reentrant=reentrant).backward()
    for each, other in zip(leaves, expected, strict=True):
        assert torch.equal(each.grad, other)


def test_backward_twice(device: torch.device) -> None:
    (features, weight, bias, target, _), _ = MANY.head_call(device)
    features.requires_grad_()
    loss = riskmap_ext.linear_weighted_loss(features, weight, bias, target)
    (first,) = torch.autograd.grad(loss, features, retain_graph=True)
    (second,) = torch.autograd.grad(loss, features)
    assert relative_l2(first, second) <= 1e-6
    loss = riskmap_ext.linear_weighted_loss(features, weight, bias, target, dice_weight=1.0)
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_weighted_loss has no second derivative"):
        gradient.square().sum().backward()


def test_any_number_of_threads(restored_threads: None) -> None:
    case = replace(MANY, spatial=(30, 31, 29))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(_gradients(case.head_call(CPU)))
    for other in found[1:]:
        for one, again in zip(found[0], other, strict=True):
            assert torch.equal(one, again)


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    features = torch.zeros(shape, device=device, requires_grad=True)
    weight = torch.ones(3, 5, device=device, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    for dice in (0.0, 1.0):
        loss = riskmap_ext.linear_weighted_loss(features, weight, None, target, dice_weight=dice)
        features_grad, weight_grad = torch.autograd.grad(loss, (features, weight))
        assert features_grad.shape == shape
        assert torch.count_nonzero(weight_grad) == 0


def test_ignored_voxels_reach_no_gradient_of_the_features(device: torch.device) -> None:
    call = MANY.head_call(device)
    ignored = ~MANY.valid(device)
    gradient = _gradients(call)[1]
    assert torch.count_nonzero(gradient.movedim(1, -1)[ignored]) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(3, 4)}, ValueError, r"features: expected \[B, F, \*S\]"),
        ({"features": torch.zeros(2, 0, 5)}, ValueError, "features: expected at least one channel"),
        ({"features": torch.zeros(2, 4, 5).int()}, TypeError, "features: expected float64"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight: expected \[C, 4\].*got shape \[3, 5"),
        ({"weight": torch.zeros(3, 4, 3)}, ValueError, "as a 1x1 convolution has it"),
        ({"weight": torch.zeros(3, 4).double()}, TypeError, "weight: expected torch.float32"),
        ({"weight": [1.0]}, TypeError, "weight: expected a torch.Tensor, got list"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias: expected \[3\], one value per row"),
        ({"bias": torch.zeros(3).double()}, TypeError, "bias: expected torch.float32"),
        ({"target": torch.zeros(2, 6).long()}, ValueError, "target: expected shape"),
        ({"class_weight": [1.0]}, ValueError, r"class_weight: expected \[3\]"),
        ({"regions": torch.ones(2, 4).bool()}, ValueError, r"regions: expected \[3, L\]"),
        ({"background": 3}, ValueError, "background: expected an integer <= 2"),
        ({"dice_weight": -1.0}, ValueError, "dice_weight: expected"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        riskmap_ext.linear_weighted_loss(**{**_small_call(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.full((2, 5), 7)}, "target must hold classes 0 to 2"),
        ({"risk": torch.full((2, 5), -1.0)}, "risk must be finite and at least 0"),
        ({"class_weight": [1.0, 1.0, 1e39]}, "class_weight: expected a finite number"),
        (
            {"class_weight": torch.tensor([1.0, -1.0, 0.0])},
            "class_weight must be finite and at least 0, got -1",
        ),
    ],
)
def test_errors_of_values(change: dict[str, Any], message: str, cpu_kernels: None) -> None:
    with pytest.raises(ValueError, match=rf"^(?!weighted_loss).*{message}"):
        riskmap_ext.linear_weighted_loss(**{**_small_call(), **change})


def _small_call() -> dict[str, Any]:
    return {
        "features": torch.zeros(2, 4, 5),
        "weight": torch.zeros(3, 4),
        "bias": torch.zeros(3),
        "target": torch.zeros(2, 5).long(),
    }


@pytest.mark.parametrize("dice", [0.0, 1.0])
@pytest.mark.parametrize("wrong", ["target", "risk"])
def test_bad_values_on_cuda(
    wrong: str, dice: float, cuda_kernels: None, device: torch.device
) -> None:
    """No error can wait for the device: the loss is NaN, and the gradient of the image."""
    call = {name: each.to(device) for name, each in _small_call().items()}
    call["features"].requires_grad_()
    if wrong == "target":
        call["target"][1, 2] = 7
    else:
        call["risk"] = torch.tensor([[1.0] * 5, [1.0, 1.0, -1.0, 1.0, 1.0]], device=device)
    loss = riskmap_ext.linear_weighted_loss(**call, dice_weight=dice)
    loss.backward()
    assert loss.isnan()
    assert call["features"].grad[1].isnan().all()
    assert call["features"].grad[0].isfinite().all()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_several_chunks_of_an_image_on_cuda(
    options: dict[str, Any],
    cuda_kernels: None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("chunks", classes=11, features=9, spatial=(30, 31, 3), with_foreground=True)
    call = replace(case, loss_options=options, ignored=0.4).head_call(device)
    monkeypatch.setattr(head_on_cuda, "CHUNK_BYTES", 1)
    assert_matches(call, torch.float32, False)
    one, other = _gradients(call), _gradients(call)
    assert all(a is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_cuda_needs_no_memory_for_logits(device: torch.device) -> None:
    """Nor does it wait for the device."""
    if device.type != "cuda":
        pytest.skip("of a GPU's allocator")
    features = torch.randn(1, 32, 96, 96, 96, device=device, requires_grad=True)
    weight = torch.randn(105, 32, device=device, requires_grad=True)
    target = torch.randint(105, (1, 96, 96, 96), device=device)
    logits = features.numel() // 32 * 105 * 4
    for dice in (0.0, 1.0):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = riskmap_ext.linear_weighted_loss(
                features, weight, None, target, dice_weight=dice
            )
            gradients = torch.autograd.grad(loss, (features, weight))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        used = torch.cuda.max_memory_allocated() - before
        assert used <= gradients[0].nbytes + 3 * head_on_cuda.CHUNK_BYTES < logits
