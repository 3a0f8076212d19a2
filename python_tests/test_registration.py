"""The operators as torch sees them: opcheck, torch.compile, autograd, autocast, subclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import every_op
import numpy as np
import pytest
import torch
from cases import BASE, Call, Case, loss_and_gradients
from compare import assert_gradient_close, grad_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import riskmap_ext
from riskmap_ext import reference
from riskmap_ext._loss_arguments import LossOptions

CPU = torch.device("cpu")


def _registered() -> set[str]:
    """Names of the operators that take tensors."""
    return {
        schema.name.removeprefix("riskmap_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("riskmap_ext::")
        and any("Tensor" in str(argument.type) for argument in schema.arguments)
    }


SMALL = Case("opcheck", spatial=(3, 5), with_weight=True, with_foreground=True)
VOLUME = Case(
    "opcheck_3d", spatial=(3, 2, 5), dtype=torch.bfloat16, layout="channels_last", with_risk=False
)
EMPTY = Case("opcheck_empty", batch=0)
REGIONS = Case("opcheck_regions", spatial=(3, 5), regions=3, source_regions=3, with_weight=True)
EVERY = (SMALL, VOLUME, EMPTY, REGIONS)


def _run_from_features(case: Case, device: torch.device, frozen: int = 0, **options: Any) -> None:
    """``frozen``: so many of features, weight and bias have no gradient."""
    args, kwargs = case.head_call(device)
    for in_forward in (True, False):
        features, weight, bias = (
            each.detach().requires_grad_(i >= frozen) for i, each in enumerate(args[:3])
        )
        given = None if options.get("dice_weight") else bias
        with riskmap_ext.gradient_in_forward(in_forward):
            loss = riskmap_ext.linear_weighted_loss(
                features, weight, given, *args[3:], **{**kwargs, **options}
            )
        loss.backward(torch.ones_like(loss))


def _run_sums_of_features(case: Case, device: torch.device) -> None:
    features, weight, bias = case.head(device)
    target, risk = case.target(device), case.risk(device)
    torch.ops.riskmap_ext._linear_weighted_loss_sums(
        features, weight, bias, target, risk, *[None] * 3, case.ignore_index, 0, 0, 0.1, False
    )


WORKS: list[Callable[[torch.device], object]] = [
    *(partial(every_op.results, case) for case in EVERY),
    partial(every_op.results, VOLUME, losses={"plain": {"background": None}}),
    *(partial(_run_from_features, SMALL, frozen=i) for i in range(3)),
    *(partial(_run_from_features, case) for case in (VOLUME, EMPTY, REGIONS)),
    partial(_run_from_features, SMALL, dice_weight=1.0),
    partial(_run_from_features, SMALL, reduction="none"),
    *(partial(_run_sums_of_features, case) for case in (SMALL, EMPTY)),
]


@cache
def _samples(device: torch.device) -> dict[str, list[tuple[Any, ...]]]:
    """What the public functions give the ops, once for each set of types, shapes and options."""
    found: dict[str, dict[str, tuple[Any, ...]]] = {name: {} for name in _registered()}

    def spied(name: str, op: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            plain = [each.detach().clone() if isinstance(each, torch.Tensor) else each
                     for each in arguments]  # fmt: skip
            kind = [(each.dtype, each.shape) if isinstance(each, torch.Tensor) else each
                    for each in arguments]  # fmt: skip
            found[name].setdefault(str(kind), tuple(plain))
            return op(*arguments)

        return call

    ops = torch.ops.riskmap_ext
    with pytest.MonkeyPatch.context() as patch:
        for name in found:
            patch.setattr(ops, name, spied(name, getattr(ops, name)))
        for work in WORKS:
            work(device)
    return {name: list(samples.values()) for name, samples in found.items()}


@pytest.mark.parametrize("name", sorted(_registered()))
def test_opcheck(name: str, device: torch.device) -> None:
    samples = _samples(device)
    operator = getattr(torch.ops.riskmap_ext, name).default
    differentiable = {"weighted_loss": (0, 2), "linear_weighted_loss": (0, 1, 2, 4)}.get(name, ())
    assert samples[name]
    for sample in samples[name]:
        torch.library.opcheck(operator, sample)
        if differentiable:
            arguments = list(sample)
            for i in differentiable:
                if arguments[i] is not None:
                    arguments[i] = arguments[i].nan_to_num(1.0).requires_grad_()
            torch.library.opcheck(operator, tuple(arguments))


FUNCTIONS = ["leep_statistics", "conditional", "transferability_map", "risk_map", "weighted_loss"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_and_docstring(name: str) -> None:
    public = inspect.signature(getattr(riskmap_ext, name))
    truth = inspect.signature(getattr(reference, name))
    assert list(public.parameters)[:3] == list(truth.parameters)[:3]
    for parameter in truth.parameters.values():
        if not parameter.name.startswith("_") and parameter.kind != parameter.VAR_KEYWORD:
            found = public.parameters[parameter.name]
            assert (found.kind, found.default) == (parameter.kind, parameter.default)
    assert getattr(riskmap_ext, name).__doc__


def test_the_options_of_a_loss_are_those_of_the_functions() -> None:
    defaults = riskmap_ext.weighted_loss.__kwdefaults__ or {}
    assert LossOptions._field_defaults == {name: defaults[name] for name in LossOptions._fields}
    tensors = {"weight", "dice_class_weight", "foreground", "regions"}
    assert set(defaults) == tensors | set(LossOptions._fields)


def _loss(logits: torch.Tensor, target: torch.Tensor, risk: torch.Tensor) -> torch.Tensor:
    return riskmap_ext.weighted_loss(logits, target, risk, label_smoothing=0.1, dice_weight=0.5)


def _maps(case: Case) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    given = case.conditional(CPU)

    def statistics(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return riskmap_ext.conditional(riskmap_ext.leep_statistics(source, target, case.classes))

    return {
        "statistics": statistics,
        "transferability": lambda s, t: riskmap_ext.transferability_map(s, t, given),
        "risk": lambda s, t: riskmap_ext.risk_map(s, t, given, range=(0.1, 2.0)),
        "risk_of_image": lambda s, t: riskmap_ext.risk_map(s, t, given, scheme="linear"),
    }


SHAPES = [Case(f"dynamic_{b}_{h}", batch=b, spatial=(h, w)) for b, h, w in ((2, 7, 9), (3, 5, 12))]


@pytest.mark.parametrize("name", _maps(BASE))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_maps(name: str, dynamic: bool) -> None:
    function = _maps(BASE)[name]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    frames = []
    for case in SHAPES:
        inputs = case.source(CPU), case.target(CPU)
        torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=1e-6, atol=1e-6)
        frames.append(counter.frame_count)
    assert (frames[0] == frames[1]) == dynamic


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_loss(dynamic: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, dynamic=dynamic, backend=counter)
    frames = []
    for case in SHAPES:
        call: Call = case.loss_call(CPU)[0], {}
        found, expected = loss_and_gradients(call, compiled), loss_and_gradients(call, _loss)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
        frames.append(counter.frame_count)
    assert (frames[0] == frames[1]) == dynamic


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none", "ce_voxels": "foreground"},
        {"normalization": "batch_foreground", "background": None, "batch_dice": True},
        {"weight": [0.5] * BASE.classes, "dice_weight": 0.5},
    ],
    ids=["none", "batch", "numbers"],
)
def test_compiled_loss_with_options(options: dict[str, Any]) -> None:
    call = BASE.loss_call(CPU)[0], options
    torch._dynamo.reset()
    compiled = torch.compile(riskmap_ext.weighted_loss, fullgraph=True, backend="aot_eager")
    found, expected = loss_and_gradients(call, compiled), loss_and_gradients(call)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_compiled_by_inductor() -> None:
    """A training step: maps without gradient, a layer, the loss, its backward."""
    case = Case("inductor", classes=3, source_classes=4)
    given, layer = case.conditional(CPU), torch.nn.Conv2d(3, 3, 1)

    def step(source: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        risk = riskmap_ext.risk_map(source, target, given)
        return riskmap_ext.weighted_loss(layer(logits).relu(), target, risk, dice_weight=1.0)

    inputs = case.source(CPU), case.logits(CPU), case.target(CPU)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    found = torch.autograd.grad(compiled(*inputs), list(layer.parameters()))
    expected = torch.autograd.grad(step(*inputs), list(layer.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("in_forward", [True, False])
def test_double_backward_is_refused_in_words(in_forward: bool) -> None:
    (logits, target, risk), _ = BASE.loss_call(CPU)
    logits.requires_grad_()
    with riskmap_ext.gradient_in_forward(in_forward):
        loss = riskmap_ext.weighted_loss(logits, target, risk)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)(double backward|first.order|twice|second)"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_graph_may_be_kept(dice_weight: float) -> None:
    (logits, target, risk), _ = BASE.loss_call(CPU)
    logits.requires_grad_()
    risk = risk.nan_to_num(1.0).requires_grad_()
    loss = riskmap_ext.weighted_loss(logits, target, risk, dice_weight=dice_weight)
    loss.backward(retain_graph=True)
    once = logits.grad.clone(), risk.grad.clone()
    logits.grad.mul_(0)  # the first gradient is the caller's to change
    risk.grad = None
    loss.backward()
    torch.testing.assert_close((logits.grad, risk.grad), once, rtol=1e-6, atol=1e-9)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_logits_are_noticed() -> None:
    """The gradient is that of the logits as they were, or there is an error."""
    leaf = BASE.logits(CPU).requires_grad_()
    logits = leaf * 1
    with riskmap_ext.gradient_in_forward(False):
        loss = riskmap_ext.weighted_loss(logits, BASE.target(CPU))
    logits.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()

    (expected,) = torch.autograd.grad(riskmap_ext.weighted_loss(leaf, BASE.target(CPU)), leaf)
    logits = leaf * 1
    loss = riskmap_ext.weighted_loss(logits, BASE.target(CPU))
    logits.mul_(2)
    (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    (logits, target, risk), _ = BASE.loss_call(CPU)
    expected = loss_and_gradients(((logits, target, risk), {}), _loss)
    found = loss_and_gradients(
        ((logits, target, risk), {}),
        lambda x, y, r: checkpoint(_loss, x, y, r, use_reentrant=reentrant),
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_no_grad_and_inference_mode(device: torch.device) -> None:
    (logits, target, risk), _ = BASE.loss_call(device)
    expected = riskmap_ext.weighted_loss(logits, target, risk)
    logits.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = riskmap_ext.weighted_loss(logits, target, risk)
        assert not found.requires_grad
        assert torch.equal(found, expected)


def test_autocast(device: torch.device) -> None:
    """Half-precision logits of a network give a float32 loss, float32 logits stay as they are."""
    case = Case("autocast", classes=3)
    target, risk = case.target(device), case.risk(device)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 3, 1).to(device)
    inputs = case.logits(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = layer(inputs)
        assert logits.dtype == torch.bfloat16
        loss = riskmap_ext.weighted_loss(logits, target, risk, dice_weight=1.0)
        inside = riskmap_ext.weighted_loss(inputs, target, risk, dice_weight=1.0)
        maps = [
            riskmap_ext.risk_map(scores, target, case.conditional(device)[:, :3])
            for scores in (logits, inputs)
        ]
        joint = riskmap_ext.leep_statistics(inputs, target, case.classes)
    loss.backward()

    assert loss.dtype == torch.float32
    expected = reference.weighted_loss(logits.double(), target, risk.double(), dice_weight=1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert grad_of(layer.weight).dtype == torch.float32
    assert torch.count_nonzero(grad_of(layer.weight)) > 0
    assert torch.equal(inside, riskmap_ext.weighted_loss(inputs, target, risk, dice_weight=1.0))
    assert maps[0].dtype == maps[1].dtype == torch.float32
    assert torch.equal(
        maps[1], riskmap_ext.risk_map(inputs, target, case.conditional(device)[:, :3])
    )
    assert torch.equal(joint, riskmap_ext.leep_statistics(inputs, target, case.classes))


def test_monai_tensors_are_like_plain_ones(device: torch.device) -> None:
    data = pytest.importorskip("monai.data", reason="MONAI is not installed")
    case = Case("monai", channel=True, with_foreground=True, with_weight=True)

    def wrapped(call: Any) -> Any:
        def wrap(value: Any) -> Any:
            return data.MetaTensor(value) if isinstance(value, torch.Tensor) else value

        return tuple(map(wrap, call[0])), {name: wrap(value) for name, value in call[1].items()}

    for function, call in (
        (riskmap_ext.leep_statistics, case.leep_call(device)),
        (riskmap_ext.transferability_map, case.map_call(device)),
        (riskmap_ext.risk_map, case.risk_call(device)),
    ):
        args, kwargs = wrapped(call)
        found = function(*args, **kwargs)
        assert type(found) is torch.Tensor
        assert torch.equal(found, function(*call[0], **call[1]))
    joint = riskmap_ext.leep_statistics(*case.leep_call(device)[0], ignore_index=-100)
    assert type(riskmap_ext.conditional(data.MetaTensor(joint))) is torch.Tensor

    call = case.loss_call(device)
    args, kwargs = wrapped(call)
    logits, risk = args[0].requires_grad_(), args[2].requires_grad_()
    loss = riskmap_ext.weighted_loss(logits, args[1], risk, **kwargs)
    assert type(loss) is torch.Tensor
    loss.backward()
    expected = loss_and_gradients(call)
    assert torch.equal(loss, expected[0])
    assert torch.equal(torch.as_tensor(logits.grad), expected[1])
    assert torch.equal(torch.as_tensor(grad_of(risk)), expected[2])


def test_numpy_scalars_are_like_python_numbers(device: torch.device) -> None:
    (logits, target, risk), _ = BASE.loss_call(device)
    plain: dict[str, Any] = {
        "ignore_index": -100,
        "background": 1,
        "foreground_floor": 0.25,
        "batch_dice": True,
    }
    plain |= {"dice_weight": 0.5, "label_smoothing": 0.125}
    numpy: dict[str, Any] = {
        "ignore_index": np.int16(-100),
        "background": np.int64(1),
        "foreground_floor": np.float32(0.25),
        "batch_dice": np.bool_(True),
        "dice_weight": np.float64(0.5),
        "label_smoothing": np.float16(0.125),
    }
    assert torch.equal(
        riskmap_ext.weighted_loss(logits, target, risk, **plain),
        riskmap_ext.weighted_loss(logits, target, risk, **numpy),
    )
    source, _, given = BASE.map_call(device)[0]
    limits: Any = (np.float32(0.5), np.float64(3.0))
    base: Any = np.int32(5)
    classes: Any = np.int64(3)
    ignored: Any = np.int8(-100)
    assert torch.equal(
        riskmap_ext.risk_map(source, target, given, range=(0.5, 3.0), base=5.0),
        riskmap_ext.risk_map(source, target, given, range=limits, base=base),
    )
    assert torch.equal(
        riskmap_ext.leep_statistics(source, target, classes, ignore_index=ignored),
        riskmap_ext.leep_statistics(source, target, 3),
    )


def test_parameters_may_be_logits() -> None:
    parameter = torch.nn.Parameter(BASE.logits(CPU))
    loss = riskmap_ext.weighted_loss(parameter, BASE.target(CPU))
    loss.backward()
    expected = loss_and_gradients(((parameter.detach(), BASE.target(CPU), None), {}))
    assert_gradient_close(parameter.grad, expected[1])
