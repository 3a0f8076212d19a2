"""Source models whose logits are never made: the numbers of those that are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import riskmap_ext
from riskmap_ext import TransferStatistics
from riskmap_ext.nn import DeferredLogits, FusedHead
from riskmap_ext.ops import deferred

CLASSES, SOURCE_CLASSES, FEATURES = 3, 19, 5
CPU = torch.device("cpu")


@pytest.fixture(params=[None, 1100], ids=["one chunk", "chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many voxels of float32 logits in a chunk, rounded to a tile of the kernels."""
    if request.param is not None:
        monkeypatch.setattr(deferred, "_CPU_BYTES", request.param * SOURCE_CLASSES * 4)


every_chunk = pytest.mark.usefixtures("_chunks")


def source(
    spatial: tuple[int, ...] = (13, 11, 12),
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    bias: bool = True,
    outputs: int = SOURCE_CLASSES,
) -> DeferredLogits:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator)).to(dtype)

    features = random(2, FEATURES, *spatial)
    if layout == "channels_last":
        features = features.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "turned":  # as networks that see other orders of axes give them
        features = features.movedim(2, -1).contiguous().movedim(-1, 2).flip(2)
    weight = random(outputs, FEATURES)
    return DeferredLogits(features, weight, random(outputs) if bias else None)


def labels(given: DeferredLogits, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(-1, CLASSES, (2, *given.shape[2:]), generator=generator)
    target[1, :1] = 0
    return target.masked_fill_(target < 0, 77).to(dtype)


def table(regions: Tensor | None = None) -> Tensor:
    columns = SOURCE_CLASSES if regions is None else regions.size(1)
    generator = torch.Generator().manual_seed(2)
    return torch.rand(CLASSES, columns, generator=generator).softmax(0)


REGIONS = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)).gt(0.5)
CASES: list[dict[str, Any]] = [
    {},
    {"spatial": (9, 10)},
    {"spatial": (1200,)},
    {"layout": "channels_last"},
    {"layout": "turned"},
    {"bias": False},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"outputs": 4, "regions": REGIONS},
]
RISKS: list[dict[str, Any]] = [
    {},
    {"scheme": "exponential"},
    {"scheme": "power"},
    {"range": (0.5, 3.0)},
    {"range": (1.0, 1.05), "scheme": "exponential"},
    {"background": None},
]


@every_chunk
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_numbers_of_logits(case: dict[str, Any]) -> None:
    regions = case.get("regions")
    given = source(**{name: each for name, each in case.items() if name != "regions"})
    options: dict[str, Any] = {"ignore_index": 77, "regions": regions}
    target, conditional, logits = labels(given), table(regions), given.logits()
    # 16-bit logits are rounded once, here as there, but not always to the same side.
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5}.get(given.dtype, 3e-2)

    joint = riskmap_ext.leep_statistics(given, target, CLASSES, **options)
    expected = riskmap_ext.leep_statistics(logits, target, CLASSES, **options)
    assert joint.dtype == torch.float64
    torch.testing.assert_close(joint, expected, rtol=tolerance, atol=tolerance)
    assert joint.sum().item() == pytest.approx(int(target.ne(77).sum()), rel=1e-6)

    found = riskmap_ext.transferability_map(given, target, conditional, **options)
    expected = riskmap_ext.transferability_map(logits, target, conditional, **options)
    assert (found.shape, found.dtype) == (target.shape, torch.float32)
    limit = max(tolerance, 1e-6)
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)

    for more in RISKS:
        found = riskmap_ext.risk_map(given, target, conditional, **options, **more)
        expected = riskmap_ext.risk_map(logits, target, conditional, **options, **more)
        assert (found.shape, found.dtype) == (target.shape, torch.float32)
        assert torch.count_nonzero(found[target == 77]) == 0
        limit = 10 * max(tolerance, 1e-6)
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit, msg=str(more))


@every_chunk
def test_images_without_foreground_or_spread() -> None:
    """The range of each image is its own, and none where nothing is foreground."""
    given = source()
    target = labels(given)
    target[0] = 0
    for features in (given.features, torch.zeros_like(given.features)):
        alike = replace(given, features=features)
        found = riskmap_ext.risk_map(alike, target, table(), ignore_index=77)
        expected = riskmap_ext.risk_map(alike.logits(), target, table(), ignore_index=77)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.all(found[0] == 1)


@every_chunk
@pytest.mark.filterwarnings("ignore:LEEP score")
def test_statistics() -> None:
    given = source()
    target = labels(given, torch.uint8).unsqueeze(1)
    both = []
    for each in (given, given.logits()):
        statistics = TransferStatistics(CLASSES, ignore_index=77)
        statistics.update(each, target)
        statistics.update_range(each, target)
        both.append(statistics)
    found, expected = both
    torch.testing.assert_close(found.joint, expected.joint, rtol=1e-5, atol=1e-5)
    assert found.num_voxels == expected.num_voxels
    assert found.score == pytest.approx(expected.score, rel=1e-5)
    assert found.hardness_range == pytest.approx(expected.hardness_range, rel=1e-4)


def test_chunks_depend_on_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = source()
    monkeypatch.setattr(deferred, "_CPU_BYTES", 1100 * SOURCE_CLASSES * 4)
    found = [
        (image.start, mine.start, mine.stop)
        for image, mine, _, _ in deferred.in_chunks(given, labels(given))
    ]
    assert found == [(image, *part) for image in (0, 1) for part in ((0, 1024), (1024, 1716))]
    joints = [
        riskmap_ext.leep_statistics(given, labels(given), CLASSES, ignore_index=77) for _ in (0, 1)
    ]
    assert torch.equal(*joints)


def test_no_logits_of_a_whole_image() -> None:
    """Of 105 classes: neither the op nor torch gets more than a chunk."""
    head = FusedHead(nn.Conv3d(4, 105, 1), when="always").eval()
    given = head(torch.randn(1, 4, 40, 32, 32))
    sizes = [logits.numel() * 4 for _, _, logits, _ in deferred.in_chunks(given, labels(given))]
    assert sum(sizes) == 40 * 32 * 32 * 105 * 4
    assert max(sizes) <= deferred._CPU_BYTES
    assert len(sizes) > 4


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_see(batch: int) -> None:
    given = source((0, 4) if batch else (3, 4))
    given = replace(given, features=given.features[:batch])
    target = labels(given)[:batch]
    joint = riskmap_ext.leep_statistics(given, target, CLASSES)
    assert joint.shape == (CLASSES, SOURCE_CLASSES)
    assert joint.sum() == 0
    assert riskmap_ext.risk_map(given, target, table()).shape == target.shape


def test_autocast_does_not_change_them() -> None:
    given = source()
    expected = riskmap_ext.transferability_map(given, labels(given), table(), ignore_index=77)
    with torch.autocast("cpu", torch.bfloat16):
        found = riskmap_ext.transferability_map(given, labels(given), table(), ignore_index=77)
    assert torch.equal(found, expected)


def test_compiled() -> None:
    given, conditional = source((9, 10)), table()
    target = labels(given)

    def maps(x: DeferredLogits, y: Tensor) -> tuple[Tensor, ...]:
        return (
            riskmap_ext.leep_statistics(x, y, CLASSES, ignore_index=77),
            riskmap_ext.risk_map(x, y, conditional, ignore_index=77),
            riskmap_ext.risk_map(x, y, conditional, ignore_index=77, range=(0.5, 3.0)),
        )

    torch._dynamo.reset()
    compiled = torch.compile(maps, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(given, target), maps(given, target), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_gradient_flows() -> None:
    given = source()
    given.features.requires_grad_()
    given.weight.requires_grad_()
    found = riskmap_ext.risk_map(given, labels(given), table(), ignore_index=77)
    assert not found.requires_grad


def test_bad_values_are_told_as_of_logits() -> None:
    given = source()
    with pytest.raises(ValueError, match="target must hold classes 0 to 2"):
        riskmap_ext.leep_statistics(given, labels(given), CLASSES)
    given.features[1, 0, 2, 2, 2] = math.nan
    target = labels(given).clamp(max=2)
    with pytest.raises(ValueError, match=r"^source: expected finite logits"):
        riskmap_ext.leep_statistics(given, target, CLASSES)
    found = riskmap_ext.risk_map(given, target, table())
    expected = riskmap_ext.risk_map(given.logits(), target, table())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": torch.zeros(SOURCE_CLASSES, 4)},
            ValueError,
            r"^weight: expected \[C, 5\], .* to go with features .*, got shape \[19, 4\]",
        ),
        ({"weight": torch.zeros(19, 5, 3)}, ValueError, r"^weight: .*\[19, 5, 3\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"^bias: expected \[19\].*\[4\]"),
        (
            {"bias": torch.zeros(19, dtype=torch.float64)},
            TypeError,
            r"^bias: expected torch.float32 as features have, got torch.float64",
        ),
        ({"features": None}, TypeError, r"^features: expected a torch.Tensor"),
        ({"features": torch.zeros(2, 5)}, ValueError, r"^features: expected \[B, F"),
    ],
    ids=range(6),
)
def test_parts_that_do_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = source()
    target = labels(given)
    with pytest.raises(error, match=message):
        riskmap_ext.leep_statistics(replace(given, **change), target, CLASSES)


def test_target_that_does_not_fit() -> None:
    given = source()
    told = r"^target: .* to go with source \[2, 19, 13, 11, 12\], got \[2, 3\]"
    with pytest.raises(ValueError, match=told):
        riskmap_ext.risk_map(given, torch.zeros(2, 3), table())


@every_chunk
def test_a_bad_label_is_found_again() -> None:
    given = source()
    target = labels(given)
    target[1, 3, 5, 7] = 9
    for call in (
        lambda: riskmap_ext.leep_statistics(given, target, CLASSES, ignore_index=77),
        lambda: riskmap_ext.transferability_map(given, target, table(), ignore_index=77),
    ):
        with pytest.raises(
            ValueError, match=r"it is 9 at .* of voxels 0 to .* of (image|images 0 to) 1$"
        ):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_many_small_images(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them are a chunk."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(23, FEATURES, 6, 7, generator=generator).to(dtype)
    weight = torch.randn(SOURCE_CLASSES, FEATURES, generator=generator).to(dtype)
    given = DeferredLogits(features, weight, weight[:, 0].clone() if bias else None)
    target = torch.randint(CLASSES, (23, 6, 7), generator=generator)
    monkeypatch.setattr(deferred, "_CPU_BYTES", 5 * SOURCE_CLASSES * 42 * features.itemsize)
    chunks = [(images.start, images.stop) for images, *_ in deferred.in_chunks(given, target)]
    assert chunks == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    for call in (
        lambda logits: riskmap_ext.leep_statistics(logits, target, CLASSES),
        lambda logits: riskmap_ext.transferability_map(logits, target, table()),
    ):
        torch.testing.assert_close(call(given), call(given.logits()), rtol=limit, atol=limit)
