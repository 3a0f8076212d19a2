"""Bad arguments: the type of the error, the argument's name, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import riskmap_ext

SOURCE = torch.zeros(2, 4, 5, 6)
LOGITS = torch.zeros(2, 3, 5, 6)
TARGET = torch.zeros(2, 5, 6, dtype=torch.int64)
GIVEN = torch.full((3, 4), 1 / 3, dtype=torch.float64)


def leep(**changes: Any) -> torch.Tensor:
    arguments = {"source": SOURCE, "target": TARGET, "num_classes": 3, **changes}
    return riskmap_ext.leep_statistics(**arguments)


def transfer(**changes: Any) -> torch.Tensor:
    arguments = {"source": SOURCE, "target": TARGET, "conditional": GIVEN, **changes}
    return riskmap_ext.transferability_map(**arguments)


def risk(**changes: Any) -> torch.Tensor:
    arguments = {"source": SOURCE, "target": TARGET, "conditional": GIVEN, **changes}
    return riskmap_ext.risk_map(**arguments)


def loss(**changes: Any) -> torch.Tensor:
    return riskmap_ext.weighted_loss(**{"logits": LOGITS, "target": TARGET, **changes})


MAPS = (leep, transfer, risk)
BAD_ARGUMENTS: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], list[str]]] = [
    *((f, {"source": [1, 2]}, TypeError, ["source", "Tensor", "list"]) for f in MAPS),
    *((f, {"source": SOURCE.int()}, TypeError, ["source", "float32", "int32"]) for f in MAPS),
    *(
        (f, {"source": SOURCE.to(torch.complex64)}, TypeError, ["source", "complex64"])
        for f in MAPS
    ),
    *(
        (f, {"source": SOURCE[:, 0, 0]}, ValueError, ["source", "[B, C, *S]", "[2, 6]"])
        for f in MAPS
    ),
    *(
        (f, {"source": SOURCE[..., None, None]}, ValueError, ["source", "[2, 4, 5, 6, 1, 1]"])
        for f in MAPS
    ),
    *((f, {"source": SOURCE[:, :0]}, ValueError, ["source", "[2, 0, 5, 6]"]) for f in MAPS),
    *(
        (f, {"target": TARGET[:, :4]}, ValueError, ["target", "[2, 5, 6]", "[2, 4, 6]"])
        for f in (*MAPS, loss)
    ),
    *(
        (f, {"target": TARGET[:1]}, ValueError, ["target", "[2, 5, 6]", "[1, 5, 6]"])
        for f in (*MAPS, loss)
    ),
    *(
        (
            f,
            {"target": TARGET[:, None].expand(2, 3, 5, 6)},
            ValueError,
            ["target", "[2, 1, 5, 6]", "[2, 3, 5, 6]"],
        )
        for f in (*MAPS, loss)
    ),
    *((f, {"target": None}, TypeError, ["target", "Tensor", "NoneType"]) for f in (*MAPS, loss)),
    *(
        (f, {"target": TARGET.to(torch.complex64)}, TypeError, ["target", "complex64"])
        for f in (*MAPS, loss)
    ),
    *(
        (f, {"target": TARGET.to("meta")}, ValueError, ["target", "cpu", "meta"])
        for f in (*MAPS, loss)
    ),
    *(
        (f, {"ignore_index": 0.5}, TypeError, ["ignore_index", "integer", "float"])
        for f in (*MAPS, loss)
    ),
    (leep, {"num_classes": 0}, ValueError, ["num_classes", "1", "0"]),
    (leep, {"num_classes": 10**9}, ValueError, ["num_classes", "65536", "1000000000"]),
    (leep, {"num_classes": 2.5}, TypeError, ["num_classes", "integer", "float"]),
    (leep, {"num_classes": True}, TypeError, ["num_classes", "integer", "bool"]),
    *(
        (f, {"conditional": GIVEN.t()}, ValueError, ["conditional", "[C, 4]", "[4, 3]"])
        for f in (transfer, risk)
    ),
    *(
        (f, {"conditional": GIVEN[0]}, ValueError, ["conditional", "[C, 4]", "[4]"])
        for f in (transfer, risk)
    ),
    *(
        (f, {"conditional": GIVEN.long()}, TypeError, ["conditional", "floating", "int64"])
        for f in (transfer, risk)
    ),
    *(
        (f, {"conditional": GIVEN.to("meta")}, ValueError, ["conditional", "cpu", "meta"])
        for f in (transfer, risk)
    ),
    (
        risk,
        {"scheme": "exp"},
        ValueError,
        ["scheme", "'exponential'", "'power'", "'linear'", "'exp'"],
    ),
    (risk, {"scheme": 1}, TypeError, ["scheme", "'exponential'", "int"]),
    (risk, {"base": 0.0}, ValueError, ["base", "(0, 1e+38]", "0.0"]),
    (risk, {"base": -2}, ValueError, ["base", "(0, 1e+38]", "-2"]),
    (risk, {"base": 1e300}, ValueError, ["base", "(0, 1e+38]", "1e+300"]),
    (risk, {"scale": 1e39}, ValueError, ["scale", "[0, 1e+38]", "1e+39"]),
    (risk, {"base": float("inf")}, ValueError, ["base", "finite", "inf"]),
    (risk, {"base": "10"}, TypeError, ["base", "number", "str"]),
    (risk, {"alpha": 0.0}, ValueError, ["alpha", "(0, 1]", "0.0"]),
    (risk, {"alpha": 1.5}, ValueError, ["alpha", "(0, 1]", "1.5"]),
    (risk, {"scale": -1.0}, ValueError, ["scale", "[0, 1e+38]", "-1.0"]),
    (risk, {"scale": float("nan")}, ValueError, ["scale", "finite", "nan"]),
    (risk, {"range": (1.0,)}, ValueError, ["range", "(lo, hi)", "(1.0,)"]),
    (risk, {"range": 3.0}, ValueError, ["range", "(lo, hi)", "3.0"]),
    (risk, {"range": (2.0, 1.0)}, ValueError, ["range", "lo <= hi", "2.0", "1.0"]),
    (risk, {"range": (0.0, float("inf"))}, ValueError, ["range", "finite", "inf"]),
    *((f, {"background": 3}, ValueError, ["background", "2", "3"]) for f in (risk, loss)),
    *((f, {"background": -1}, ValueError, ["background", "0", "-1"]) for f in (risk, loss)),
    *((f, {"background": "air"}, TypeError, ["background", "str"]) for f in (risk, loss)),
    (loss, {"logits": LOGITS.long()}, TypeError, ["logits", "float32", "int64"]),
    (loss, {"logits": LOGITS[0, 0]}, ValueError, ["logits", "[B, C, *S]", "[5, 6]"]),
    (loss, {"risk": TARGET}, TypeError, ["risk", "float32", "int64"]),
    (loss, {"risk": 2.0}, TypeError, ["risk", "Tensor", "float"]),
    (loss, {"risk": torch.ones(2, 5, 7)}, ValueError, ["risk", "[2, 5, 6]", "[2, 5, 7]"]),
    (loss, {"risk": torch.ones(2, 3, 5, 6)}, ValueError, ["risk", "[2, 1, 5, 6]", "[2, 3, 5, 6]"]),
    (loss, {"weight": torch.ones(4)}, ValueError, ["weight", "[3]", "[4]"]),
    (loss, {"weight": torch.ones(3, 1)}, ValueError, ["weight", "[3]", "[3, 1]"]),
    (loss, {"weight": torch.ones(3).int()}, TypeError, ["weight", "floating", "int32"]),
    (loss, {"dice_class_weight": torch.ones(4)}, ValueError, ["dice_class_weight", "[3]", "[4]"]),
    (loss, {"smooth_nr": -1.0}, ValueError, ["smooth_nr", ">= 0", "-1.0"]),
    (loss, {"smooth_dr": float("nan")}, ValueError, ["smooth_dr", "finite", "nan"]),
    (loss, {"squared_pred": 1}, TypeError, ["squared_pred", "True", "int"]),
    (loss, {"regions": torch.full((3, 2), 2)}, ValueError, ["regions", "0 or 1", "2"]),
    (loss, {"regions": [[torch.zeros(2)], [1], [0]]}, ValueError, ["regions", "0 or 1", "tensor"]),
    (loss, {"ce_weight": 10**400}, ValueError, ["ce_weight", "inf"]),
    (loss, {"alpha": None}, TypeError, ["alpha", "number", "NoneType"]),
    (loss, {"beta": -0.5}, ValueError, ["beta", ">= 0", "-0.5"]),
    (loss, {"sync_dice": True}, ValueError, ["sync_dice", "batch_dice=True"]),
    (
        loss,
        {"normalization": "weighted", "regions": [[1, 1, 0], [0, 1, 0], [0, 0, 1]]},
        ValueError,
        ["normalization", "regions", "'weighted'"],
    ),
    (loss, {"weight": [1.0, 2.0]}, ValueError, ["weight", "[3]", "[2]"]),
    (loss, {"weight": [1.0, "2", 3.0]}, TypeError, ["weight", "number", "str"]),
    (loss, {"weight": (1.0, -2.0, 3.0)}, ValueError, ["weight", "[0, 1e+38]", "-2"]),
    (loss, {"weight": [1.0, 1e39, 3.0]}, ValueError, ["weight", "[0, 1e+38]", "1e+39"]),
    (loss, {"weight": 2.0}, TypeError, ["weight", "sequence", "float"]),
    (loss, {"weight": {0: 1.0, 1: 2.0, 2: 3.0}}, TypeError, ["weight", "sequence", "dict"]),
    (loss, {"foreground": torch.ones(2, 5, 6)}, TypeError, ["foreground", "bool", "float32"]),
    (
        loss,
        {"foreground": TARGET[..., :3]},
        ValueError,
        ["foreground", "[2, 5, 6]", "[2, 5, 3]"],
    ),
    (loss, {"foreground_floor": 1.2}, ValueError, ["foreground_floor", "[0, 1]", "1.2"]),
    (loss, {"foreground_floor": None}, TypeError, ["foreground_floor", "number", "NoneType"]),
    (loss, {"label_smoothing": -0.1}, ValueError, ["label_smoothing", "[0, 1]", "-0.1"]),
    (loss, {"label_smoothing": float("nan")}, ValueError, ["label_smoothing", "nan"]),
    (
        loss,
        {"normalization": "mean"},
        ValueError,
        ["normalization", "'foreground'", "'batch_foreground'", "'valid'", "'none'", "'mean'"],
    ),
    (loss, {"ce_voxels": "all"}, ValueError, ["ce_voxels", "'valid'", "'foreground'", "'all'"]),
    (loss, {"reduction": None}, TypeError, ["reduction", "'mean'", "NoneType"]),
    (loss, {"reduction": "max"}, ValueError, ["reduction", "'mean'", "'sum'", "'none'", "'max'"]),
    (loss, {"ce_weight": -1.0}, ValueError, ["ce_weight", ">= 0", "-1.0"]),
    (loss, {"dice_weight": float("inf")}, ValueError, ["dice_weight", "finite", "inf"]),
    (loss, {"include_background": 1}, TypeError, ["include_background", "True", "int"]),
    (loss, {"batch_dice": "yes"}, TypeError, ["batch_dice", "True", "str"]),
    (loss, {"dice_weight": 1.0, "reduction": "none"}, ValueError, ["dice_weight", "reduction"]),
    (
        loss,
        {"logits": LOGITS[:, :1], "dice_weight": 1.0},
        ValueError,
        ["dice_weight", "background"],
    ),
]


TENSORS: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "source": (risk, SOURCE),
    "target": (risk, TARGET),
    "conditional": (risk, GIVEN),
    "logits": (loss, LOGITS),
    "risk": (loss, torch.ones(2, 5, 6)),
    "weight": (loss, torch.ones(3)),
    "foreground": (loss, TARGET),
    "regions": (loss, torch.ones(3, 4, dtype=torch.bool)),
    "joint": (riskmap_ext.conditional, torch.ones(3, 4)),
}
NOT_DENSE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sparse": (torch.Tensor.to_sparse, "layout torch.sparse_coo"),
    "mkldnn": (lambda tensor: tensor.float().to_mkldnn(), "layout torch._mkldnn"),
    "nested": (lambda tensor: torch.nested.nested_tensor(list(tensor)), "a nested one"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("form", NOT_DENSE)
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_dense(name: str, form: str) -> None:
    function, tensor = TENSORS[name]
    function(**{name: tensor})
    change, got = NOT_DENSE[form]
    with pytest.raises(TypeError) as caught:
        function(**{name: change(tensor)})
    assert str(caught.value) == f"{name}: expected a dense tensor, got {got}"


def _name(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(value)
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("function", "changes", "error", "fragments"), BAD_ARGUMENTS, ids=_name)
def test_bad_argument(
    function: Callable[..., Any],
    changes: dict[str, Any],
    error: type[Exception],
    fragments: list[str],
) -> None:
    function()  # the arguments that stay are good
    with pytest.raises(error) as caught:
        function(**changes)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("target", [(2, 5, 6), (2, 1, 5, 6), (2, 7), (2, 1, 7)])
def test_a_stack_of_deep_supervision(target: tuple[int, ...]) -> None:
    """The stack of volumes has too many dimensions, those of images and lines look like volumes."""
    space = target[1:] if target[1] != 1 else target[2:]
    stacked, labels = torch.zeros(2, 4, 3, *space), torch.zeros(target, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^target: .*torch\.unbind\(output, 1\)"):
        loss(target=labels, logits=stacked)
    with pytest.raises(ValueError, match=r"^logits: .*torch\.unbind\(output, 1\)"):
        loss(logits=torch.zeros(2, 4, 3, 5, 6, 7))
    with pytest.raises(ValueError, match=r"^target: ") as caught:
        loss(target=labels[:1], logits=stacked)
    assert "unbind" not in str(caught.value)
    heads = torch.unbind(stacked, 1)
    assert riskmap_ext.nn.RiskWeightedLoss()(heads, labels).isfinite()


@pytest.mark.parametrize("value", [3, 100, -1, -100000, 12345678])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("function", [*MAPS, loss])
def test_bad_labels(function: Callable[..., Any], dtype: torch.dtype, value: int) -> None:
    target = TARGET.to(dtype, copy=True)
    target[1, 2, 3] = value
    target[1, 4, 0] = 77
    with pytest.raises(ValueError, match=r"\btarget\b") as caught:
        function(target=target)
    message = str(caught.value)
    assert str(value) in message
    assert "[1, 2, 3]" in message
    assert " 2 " in message  # voxels
    assert "-100" in message  # ignore_index


@pytest.mark.parametrize("value", [0.5, 1.999, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [*MAPS, loss])
def test_labels_that_are_no_integers(
    function: Callable[..., Any], dtype: torch.dtype, value: float
) -> None:
    target = TARGET.to(dtype, copy=True)
    target[0, 4, 5] = value
    if target[0, 4, 5] == 2:
        pytest.skip("1.999 rounds to 2 in this dtype")
    with pytest.raises(ValueError, match=r"\btarget\b") as caught:
        function(target=target)
    assert "[0, 4, 5]" in str(caught.value)


@pytest.mark.parametrize("function", [*MAPS, loss])
def test_ignore_index_does_not_wrap_around(function: Callable[..., Any]) -> None:
    """156 has in uint8 the bits of -100: it is a bad label, not an ignored voxel."""
    target = TARGET.to(torch.uint8, copy=True)
    target[0, 0, 1] = 156
    with pytest.raises(ValueError, match="156"):
        function(target=target)
    function(target=target, ignore_index=156)


@pytest.mark.parametrize("function", [*MAPS, loss])
def test_labels_are_not_cut_to_32_bits(function: Callable[..., Any]) -> None:
    target = TARGET.clone()
    target[0, 0, 1] = 2**32 + 1
    with pytest.raises(ValueError, match=str(2**32 + 1)):
        function(target=target)
    function(target=target, ignore_index=2**32 + 1)
    target[0, 0, 1] = 1
    assert torch.equal(function(target=target, ignore_index=2**32 + 1), function(target=target))


@pytest.mark.parametrize("function", [*MAPS, loss])
def test_bad_labels_in_a_strided_channel(function: Callable[..., Any]) -> None:
    target = TARGET.clone()
    target[1, 3, 2] = 9
    strided = target.permute(2, 1, 0).contiguous().permute(2, 1, 0).unsqueeze(1)
    with pytest.raises(ValueError, match=r"\btarget\b") as caught:
        function(target=strided)
    assert "9" in str(caught.value)
    assert "[1, 3, 2]" in str(caught.value)


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_risk(reduction: str, dtype: torch.dtype, value: float) -> None:
    weights = torch.ones(2, 5, 6, dtype=dtype)
    weights[1, 4, 3] = value
    with pytest.raises(ValueError, match=r"\brisk\b"):
        loss(risk=weights, reduction=reduction)
    ignored = TARGET.clone()
    ignored[1, 4, 3] = -100
    assert loss(risk=weights, target=ignored, reduction=reduction).isfinite().all()


def test_bad_risk_outside_the_summed_voxels_is_still_bad() -> None:
    weights = torch.ones(2, 5, 6)
    weights[0, 0, 0] = -1
    with pytest.raises(ValueError, match=r"\brisk\b"):
        loss(risk=weights, ce_voxels="foreground")


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_bad_class_weight(value: float) -> None:
    with pytest.raises(ValueError, match=r"\bweight\b"):
        loss(weight=torch.tensor([1.0, value, 1.0]))


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("function", [transfer, risk])
def test_bad_conditional(function: Callable[..., Any], value: float) -> None:
    given = GIVEN.clone()
    given[2, 1] = value
    with pytest.raises(ValueError, match=r"\bconditional\b"):
        function(conditional=given)


@pytest.mark.parametrize(
    ("joint", "error", "fragments"),
    [
        (torch.ones(3), ValueError, ["joint", "[C, Z]", "[3]"]),
        (torch.ones(3, 2, 1), ValueError, ["joint", "[C, Z]", "[3, 2, 1]"]),
        (torch.tensor([[1.0, -1.0]]), ValueError, ["joint", "-1"]),
        (torch.tensor([[1.0, float("nan")]]), ValueError, ["joint", "nan"]),
        (torch.tensor([[1.0, float("inf")]]), ValueError, ["joint", "inf"]),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, ["joint", "floating", "int64"]),
        ([[1.0]], TypeError, ["joint", "Tensor", "list"]),
    ],
)
def test_bad_joint(joint: Any, error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error) as caught:
        riskmap_ext.conditional(joint)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_nothing_is_computed_from_bad_labels_in_the_backward() -> None:
    logits = LOGITS.clone().requires_grad_()
    target = TARGET.clone()
    target[0, 0, 0] = 7
    with pytest.raises(ValueError, match="7"):
        loss(logits=logits, target=target)
    assert logits.grad is None
