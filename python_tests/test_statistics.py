"""TransferStatistics: streaming, merging, processes, saving."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import Case

import riskmap_ext
from riskmap_ext import TransferStatistics, reference

CASE = Case("statistics", batch=6, classes=3, source_classes=5, spatial=(12, 11))


def _data(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that tell something about the labels."""
    source, target = CASE.source(device), CASE.target(device)
    hints = torch.nn.functional.one_hot(target.clamp(min=0), CASE.source_classes)
    return source + 4 * hints.movedim(-1, 1), target


def _complete(parts: list[slice], device: torch.device) -> TransferStatistics:
    source, target = _data(device)
    statistics = TransferStatistics(CASE.classes)
    for part in parts:
        statistics.update(source[part], target[part])
    for part in parts:
        statistics.update_range(source[part], target[part])
    return statistics


def test_against_reference(device: torch.device) -> None:
    source, target = _data(device)
    statistics = _complete([slice(0, 6)], device)
    joint = reference.leep_statistics(source.double(), target, CASE.classes)
    given = reference.conditional(joint)
    valid = CASE.valid(device)
    transfer = reference.transferability_map(source.double(), target, given)[valid].double()
    labels = target[valid]

    torch.testing.assert_close(statistics.conditional.to(device), given, rtol=1e-6, atol=1e-9)
    assert statistics.num_voxels == int(valid.sum())
    assert statistics.score == pytest.approx(transfer.mean().item(), rel=1e-6)
    assert statistics.hardness_range == pytest.approx(
        (-transfer.max().item(), -transfer.min().item()), rel=1e-5
    )
    assert all(type(limit) is float for limit in (*statistics.hardness_range, statistics.score))
    frequencies = torch.bincount(labels, minlength=CASE.classes).double() / labels.numel()
    torch.testing.assert_close(
        statistics.class_frequencies.to(device), frequencies, rtol=1e-6, atol=0
    )
    assert statistics.class_frequencies.dtype == torch.float64


def test_streamed_equals_whole(device: torch.device) -> None:
    whole = _complete([slice(0, 6)], device)
    streamed = _complete([slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 6)], device)
    torch.testing.assert_close(streamed.conditional, whole.conditional, rtol=1e-7, atol=0)
    assert streamed.num_voxels == whole.num_voxels
    assert streamed.score == pytest.approx(whole.score, rel=1e-7)
    assert streamed.hardness_range == pytest.approx(whole.hardness_range, rel=1e-6)


@pytest.mark.filterwarnings("ignore:LEEP score")
def test_voxels_are_counted_exactly() -> None:
    """1/24 in float32, added up, is off in the same direction at every voxel."""
    target = torch.randint(2, (1, 600, 600), generator=torch.Generator().manual_seed(0))
    source = torch.zeros(1, 24, 1, 1).expand(1, 24, 600, 600)
    statistics = TransferStatistics(2)
    statistics.update(source, target)
    statistics.update_range(source, target)
    assert statistics.num_voxels == 360000
    assert statistics.score == pytest.approx(-statistics.label_entropy, rel=1e-6)


def test_merge_equals_whole() -> None:
    device = torch.device("cpu")
    source, target = _data(device)
    whole = _complete([slice(0, 6)], device)
    first, second = TransferStatistics(CASE.classes), TransferStatistics(CASE.classes)
    first.update(source[:4], target[:4])
    second.update(source[4:], target[4:])
    first.merge(second)
    torch.testing.assert_close(first.conditional, whole.conditional, rtol=1e-7, atol=0)
    torch.testing.assert_close(first.class_frequencies, whole.class_frequencies, rtol=1e-7, atol=0)
    assert first.num_voxels == whole.num_voxels
    assert second.num_voxels < whole.num_voxels


def test_merge_of_second_passes() -> None:
    """Workers that share the merged first pass add up; passes with different P(y|z) do not."""
    device = torch.device("cpu")
    source, target = _data(device)
    parts = [slice(0, 4), slice(4, 6)]
    whole = _complete([slice(0, 6)], device)
    merged = TransferStatistics(CASE.classes)
    for part in parts:
        one = TransferStatistics(CASE.classes)
        one.update(source[part], target[part])
        merged.merge(one)
    workers = []
    for part in parts:
        worker = TransferStatistics(CASE.classes)
        worker.load_state_dict(merged.state_dict())
        worker.update_range(source[part], target[part])
        workers.append(worker)
    workers[0].merge(workers[1])
    assert workers[0].score == pytest.approx(whole.score, rel=1e-6)
    assert workers[0].hardness_range == pytest.approx(whole.hardness_range, rel=1e-6)
    assert workers[0].num_voxels == whole.num_voxels

    apart = []
    for part in parts:
        one = TransferStatistics(CASE.classes)
        one.update(source[part], target[part])
        one.update_range(source[part], target[part])
        apart.append(one)
    with pytest.raises(ValueError, match="another P"):
        apart[0].merge(apart[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_that_is_not_finite_is_refused_where_it_comes_in(value: float) -> None:
    source, target = _data(torch.device("cpu"))
    statistics = TransferStatistics(CASE.classes)
    statistics.update(source, target)
    before = statistics.joint.clone()
    bad = source.clone()
    bad[0, :, target[0] != CASE.ignore_index] = value
    with pytest.raises(ValueError, match="source"):
        statistics.update(bad, target)
    assert torch.equal(statistics.joint, before)
    with pytest.raises(ValueError, match="source"):
        statistics.update_range(bad, target)
    statistics.update_range(source, target)
    assert statistics.score < 0


def test_state_of_another_kind_is_refused() -> None:
    statistics = TransferStatistics(CASE.classes, ignore_index=255)
    with pytest.raises(ValueError, match="ignore_index"):
        statistics.load_state_dict(TransferStatistics(CASE.classes).state_dict())
    with pytest.raises(TypeError, match="state"):
        statistics.load_state_dict(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("joint", [1.0], TypeError),
        ("joint", torch.rand(2, 2).to_sparse(), TypeError),
        ("joint", torch.rand(9, 5, dtype=torch.float64), ValueError),
        ("joint", torch.rand(CASE.classes, 5), ValueError),
        ("joint", torch.tensor(1.0, dtype=torch.float64), ValueError),
        ("joint", torch.full((CASE.classes, 5), math.nan, dtype=torch.float64), ValueError),
        ("joint", torch.full((CASE.classes, 5), -1.0, dtype=torch.float64), ValueError),
        ("voxels", "a", TypeError),
        ("low", None, TypeError),
        ("range_is_global", 1, TypeError),
    ],
)
def test_a_damaged_state_changes_nothing(key: str, value: Any, error: type[Exception]) -> None:
    statistics = TransferStatistics(CASE.classes)
    statistics.update(*_data(torch.device("cpu")))
    before = statistics.joint.clone()
    with pytest.raises(error, match=f"state: {key}: expected"):
        statistics.load_state_dict({**statistics.state_dict(), key: value})
    assert torch.equal(statistics.joint, before)


@pytest.mark.parametrize(
    "counts", [[0.03, 0.02], [0.1, 0.1], [1e308, 1e308], [5.0, 0.0, 1.0], [0.0, 0.0]]
)
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_class_weights_have_a_mean_of_1(counts: list[float], kind: Any) -> None:
    given = torch.tensor(counts, dtype=torch.float64)
    weights = riskmap_ext.sqrt_inverse_frequency(counts if kind is list else given)
    shares = given / max(*counts, 1e-300)
    assert float((weights * shares).sum()) == pytest.approx(float(shares.sum()))
    assert torch.equal(weights > 0, shares > 0)


@pytest.mark.parametrize(
    ("counts", "error"),
    [
        (torch.tensor([-1.0, 2.0]), ValueError),
        (torch.tensor([math.nan, 2.0]), ValueError),
        (torch.tensor([math.inf, 2.0]), ValueError),
        (torch.tensor([1j, 2.0]), TypeError),
        (torch.ones(2, 2), ValueError),
        ([], ValueError),
        ([1e-300, 1.0], ValueError),
    ],
)
def test_counts_that_are_none(counts: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="counts: expected"):
        riskmap_ext.sqrt_inverse_frequency(counts)


def test_merge_refuses_other_classes() -> None:
    source, target = _data(torch.device("cpu"))
    first, second = TransferStatistics(3), TransferStatistics(4)
    first.update(source, target)
    second.update(source, target)
    with pytest.raises(ValueError, match="3"):
        first.merge(second)


def test_score_needs_the_second_pass() -> None:
    statistics = TransferStatistics(CASE.classes)
    statistics.update(*_data(torch.device("cpu")))
    with pytest.raises(RuntimeError, match="update_range"):
        _ = statistics.score
    with pytest.raises(RuntimeError, match="update_range"):
        _ = statistics.hardness_range


def test_passes_over_other_data_are_noticed() -> None:
    device = torch.device("cpu")
    source, target = _data(device)
    statistics = TransferStatistics(CASE.classes)
    statistics.update(source, target)
    statistics.update_range(source[:2], target[:2])
    with pytest.raises(RuntimeError, match="second pass"):
        _ = statistics.score
    with pytest.raises(RuntimeError, match="first pass"):
        statistics.update(source, target)


@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [(torch.uint8, -100), (torch.uint8, 255), (torch.uint16, 65535), (torch.float32, -100)],
)
def test_label_dtypes(dtype: torch.dtype, ignore_index: int) -> None:
    """Labels up to 199: 156 is no -100, even where the two have the same bits."""
    case = Case(
        "statistics_dtypes",
        classes=200,
        spatial=(40, 41),
        ignored=0.0 if ignore_index == -100 else 0.2,
        ignore_index=ignore_index,
    )
    device = torch.device("cpu")
    scores = []
    for labels in (case.target(device), case.target(device).to(dtype).unsqueeze(1)):
        statistics = TransferStatistics(200, ignore_index=ignore_index)
        statistics.update(case.source(device), labels)
        statistics.update_range(case.source(device), labels)
        scores.append((statistics.score, statistics.hardness_range, statistics.num_voxels))
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["joint", "conditional", "class_frequencies"])
def test_nothing_seen_is_said_so(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"\.{name}: nothing seen yet; call update, the first"):
        getattr(TransferStatistics(3), name)


@pytest.mark.parametrize("name", ["score", "hardness_range"])
def test_what_needs_two_passes_names_them_both(name: str) -> None:
    statistics = TransferStatistics(CASE.classes)
    with pytest.raises(RuntimeError, match=rf"\.{name}: nothing seen .* update .*, then update_ra"):
        getattr(statistics, name)
    source, target = _data(torch.device("cpu"))
    nothing = torch.full_like(target, CASE.ignore_index)
    statistics.update(source, nothing)
    statistics.update_range(source, nothing)
    with pytest.raises(RuntimeError, match=rf"\.{name}: update saw no valid voxel.* -100"):
        getattr(statistics, name)


def test_the_second_pass_comes_second() -> None:
    with pytest.raises(RuntimeError, match=r"\.update_range: nothing seen yet; call update"):
        TransferStatistics(CASE.classes).update_range(*_data(torch.device("cpu")))


def test_state_dict_of_tensors_and_plain_types() -> None:
    statistics = _complete([slice(0, 6)], torch.device("cpu"))
    file = io.BytesIO()
    torch.save(statistics.state_dict(), file)
    file.seek(0)
    restored = TransferStatistics(CASE.classes)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored.conditional, statistics.conditional)
    assert restored.score == statistics.score
    assert restored.hardness_range == statistics.hardness_range
    assert restored.num_voxels == statistics.num_voxels


def test_uninformative_source_warns() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (2, 50, 50), generator=generator)
    source = torch.randn(2, 4, 50, 50, generator=generator)
    statistics = TransferStatistics(3)
    statistics.update(source, target)
    statistics.update_range(source, target)
    with pytest.warns(UserWarning, match=r"(?i)frequenc"):
        score = statistics.score
    frequencies = statistics.class_frequencies
    entropy = -(frequencies * frequencies.log()).sum().item()
    assert score == pytest.approx(-entropy, rel=0.01)


def test_informative_source_does_not_warn() -> None:
    target = torch.randint(3, (2, 50, 50), generator=torch.Generator().manual_seed(0))
    source = 4.0 * torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float()
    statistics = TransferStatistics(3)
    statistics.update(source, target)
    statistics.update_range(source, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert -1 < statistics.score < 0


def test_hardness_range_is_the_dataset_scope_of_risk_map(device: torch.device) -> None:
    statistics = _complete([slice(0, 3), slice(3, 6)], device)
    weights = riskmap_ext.risk_map(
        *_data(device),
        statistics.conditional.to(device),
        range=statistics.hardness_range,
    )[CASE.valid(device)]
    torch.testing.assert_close(weights.min().item(), 1.0, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights.max().item(), 10.0, rtol=1e-5, atol=0)


def test_all_reduce_alone_changes_nothing() -> None:
    statistics = _complete([slice(0, 6)], torch.device("cpu"))
    before = statistics.conditional.clone(), statistics.score, statistics.hardness_range
    statistics.all_reduce()
    assert torch.equal(statistics.conditional, before[0])
    assert (statistics.score, statistics.hardness_range) == before[1:]


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    device = torch.device("cpu")
    part = (slice(0, 2), slice(2, 6))[rank]
    source, target = (each[part] for each in _data(device))
    statistics = TransferStatistics(CASE.classes)
    statistics.update(source, target)
    statistics.all_reduce()
    statistics.update_range(source, target)
    statistics.all_reduce()
    torch.save(
        {
            "conditional": statistics.conditional,
            "score": statistics.score,
            "range": list(statistics.hardness_range),
            "num_voxels": statistics.num_voxels,
        },
        f"{folder}/rank{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)
    whole = _complete([slice(0, 6)], torch.device("cpu"))
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["conditional"], whole.conditional, rtol=1e-7, atol=0)
        assert found["num_voxels"] == whole.num_voxels
        assert found["score"] == pytest.approx(whole.score, rel=1e-7)
        assert math.isclose(found["range"][0], whole.hardness_range[0], rel_tol=1e-6)
        assert math.isclose(found["range"][1], whole.hardness_range[1], rel_tol=1e-6)


class TestSqrtInverseFrequency:
    def test_worked_by_hand(self) -> None:
        weights = riskmap_ext.sqrt_inverse_frequency([900, 0, 100])
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights[2] / weights[0], torch.tensor(3.0))
        assert weights[1] == 0
        assert (0.9 * weights[0] + 0.1 * weights[2]).item() == pytest.approx(1.0)

    def test_a_class_of_one_voxel_in_very_many(self) -> None:
        weights = riskmap_ext.sqrt_inverse_frequency([10**18, 1])
        assert (weights[1] / weights[0]).item() == pytest.approx(1e9)

    def test_counts_of_any_kind(self) -> None:
        expected = riskmap_ext.sqrt_inverse_frequency([900, 0, 100])
        for counts in (torch.tensor([900, 0, 100]), torch.tensor([0.9, 0.0, 0.1])):
            torch.testing.assert_close(riskmap_ext.sqrt_inverse_frequency(counts), expected)

    @pytest.mark.parametrize(
        ("counts", "error", "words"),
        [
            (5, TypeError, "sequence"),
            ([1, -2], ValueError, ">= 0"),
            ([1, "2"], TypeError, "number"),
            ([], ValueError, r"\[C\]"),
            (torch.ones(2, 2), ValueError, r"\[2, 2\]"),
        ],
    )
    def test_bad_counts(self, counts: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=f"^counts: .*{words}"):
            riskmap_ext.sqrt_inverse_frequency(counts)
