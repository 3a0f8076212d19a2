"""``make fuzz``: generated calls of every op, against float64 and with wrong arguments.

Call number n depends on n alone, so ``python python_tests/fuzz.py --only N`` repeats a failure. Of
three calls two are right and are compared with the plain-PyTorch reference in float64. The third
has wrong arguments: it may raise ValueError or TypeError that names an argument, nothing else. A
run continues where the last one ended (build/fuzz). RISKMAP_CPU_CAPABILITY and ``--cuda-on-host``
choose the kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_op
import torch
from case import LAYOUTS, Call, Case, in_double
from compare import ROUNDING, assert_relative_l2
from torch import Tensor
from torch.testing import assert_close

import riskmap_ext
from riskmap_ext import reference

CPU = torch.device("cpu")
# The CUDA head keeps the logits of a chunk in the features' dtype, as a convolution does. Where a
# loss is NaN, the CUDA kernels give NaN at ignored voxels, too.
ON_CUDA = "--cuda-on-host" in sys.argv
ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CLASSES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 33, 87, 130)
# Wrong for most arguments, and right for some.
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 10**9, 2**63, -(2**63) - 1, 0.5, -0.5, 1e-300, 1e300),
    *(math.nan, math.inf, -math.inf, "", "mean", "linear", b"x", (), (1.0, 0.0), (0.0, math.nan)),
    *([], [1.0, 2.0, 3.0], {}, object, 1j),
)


def some_case(pick: random.Random, number: int) -> Case:
    """Shapes, dtypes, layouts, labels and values of a call."""
    dims = pick.choice((1, 1, 2, 2, 3, 3))
    sizes = {1: (1, 2, 7, 64, 257, 1030), 2: (1, 2, 5, 16, 33), 3: (1, 2, 4, 7, 11)}[dims]
    spatial = tuple(pick.choice(sizes) for _ in range(dims))
    classes = pick.choice(CLASSES)
    labels = pick.choice(("random", "random", "runs", "background", "ignored"))
    target_dtype = pick.choice(INTEGERS)
    ignore = 100 if target_dtype == torch.int8 and classes > 100 else pick.choice((-1, -100))
    if target_dtype == torch.uint8:
        ignore = 255
    if target_dtype == torch.int8 and classes > 127:
        target_dtype = torch.int16
    return Case(
        f"fuzz_{number}",
        batch=pick.choice((1, 1, 2, 3)),
        classes=classes,
        source_classes=pick.choice(CLASSES),
        spatial=spatial,
        dtype=pick.choice(DTYPES),
        target_dtype=target_dtype,
        risk_dtype=pick.choice(DTYPES),
        layout=pick.choice(LAYOUTS),
        map_layout=pick.choice(("", *LAYOUTS[3:9])),
        channel=pick.random() < 0.2,
        labels=labels,
        ignored=pick.choice((0.0, 0.15, 0.9)),
        ignore_index=ignore,
        magnitude=pick.choice((0.0, 1.0, 3.0, 3.0, 12.0)),
        with_risk=pick.random() < 0.7,
        with_foreground=pick.random() < 0.3,
        with_weight=pick.random() < 0.3,
        features=pick.choice((1, 2, 6, 16, 37)),
    )


def loss_options(pick: random.Random, case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {
        "normalization": pick.choice(
            (None, "image_foreground", "batch_foreground", "image_valid", "batch_valid")
        ),
        "ce_voxels": pick.choice(("valid", "foreground")),
        "reduction": pick.choice(("mean", "sum", "none")),
        "label_smoothing": pick.choice((0.0, 0.0, 0.1)),
        "ce_weight": pick.choice((1.0, 0.0, 0.7)),
    }
    if case.with_risk and pick.random() < 0.2:
        options["normalization"] = "weighted"
    if pick.random() < 0.6:
        options |= {
            "dice_weight": pick.choice((1.0, 0.3)),
            "alpha": pick.choice((0.5, 0.3, 1.0)),
            "beta": pick.choice((0.5, 0.7)),
            "squared_pred": pick.random() < 0.3,
            "include_background": pick.random() < 0.4,
            "batch_dice": pick.random() < 0.4,
            "smooth_nr": pick.choice((1e-5, 0.0, 1.0)),
            "smooth_dr": pick.choice((1e-5, 1.0)),
        }
    chosen = [name for name in options if pick.random() < 0.6]
    return {name: options[name] for name in chosen}


def right_call(pick: random.Random, number: int) -> tuple[str, Case, Callable[[], None]]:
    """One that may be refused by its options alone, and is else compared with the reference."""
    case = some_case(pick, number)
    kind = pick.choice(("loss", "loss", "loss", "head", "leep", "map", "risk", "regions"))
    if kind in ("loss", "head", "regions"):
        case = replace(case, loss_options=loss_options(pick, case))
        case = replace(case, classes=max(case.classes, 2))  # of one class the gradient is 0
    if kind == "regions":
        regions = pick.choice((1, 2, 3, 5, 9))
        case = replace(case, regions=regions, classes=min(case.classes, 17), with_weight=False)
    if kind in ("leep", "map", "risk") and pick.random() < 0.3:
        case = replace(case, source_regions=pick.choice((1, 2, 3)), source_classes=4)
    if kind == "risk":
        scheme = pick.choice(("linear", "exponential", "power"))
        scope = pick.choice((None, (0.5, 3.0)))
        case = replace(case, risk_options={"scheme": scheme, "range": scope})
    in_forward, special = pick.random() < 0.5, pick.random() < 0.15

    def check() -> None:
        with riskmap_ext.gradient_in_forward(in_forward):
            if kind in ("loss", "regions"):
                made = case.loss_call(CPU)
                made = with_special_values(made, pick) if special else made
                loss_matches(made, riskmap_ext.weighted_loss)
            elif kind == "head":
                loss_matches(case.head_call(CPU), riskmap_ext.linear_weighted_loss)
            elif kind == "leep":
                leep_matches(case)
            elif kind == "map" and case.source_regions:
                every_op.OF_REGIONS["maps of regions"][0](case, CPU)
            elif kind == "map":
                every_op.OF_SOFTMAX["transferability map"][0](case, CPU)
            else:
                every_op.OF_SOFTMAX["risk map"][0](replace(case, source_regions=0), CPU)

    return kind, case, check


# Logits that a diverging network or a masked class gives.
SPECIAL = (math.nan, math.inf, -math.inf, -math.inf, 1e4, -1e4, 6e4, -6e4, 1e-45, -0.0)


def with_special_values(call: Call, pick: random.Random) -> Call:
    """Some logits of a few voxels, all classes of which may be equal then."""
    (logits, *others), options = call
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for _ in range(pick.choice((1, 1, 2, 5)) if mask.numel() else 0):
        place: list[Any] = [pick.randrange(size) for size in mask.shape]
        if pick.random() < 0.2:
            place[1] = slice(None)
        mask[tuple(place)] = True
    logits = logits.detach().masked_fill(mask, pick.choice(SPECIAL))
    return (logits, *others), options


def loss_matches(call: Call, function: Callable[..., Tensor]) -> None:
    """Value, and gradients of every tensor that can have one; NaN and infinity where they belong.

    A gradient may be tiny beside the terms that it is the difference of. Their size is that of the
    gradient for logits of 0, where no class is certain: of a head, for features or weights of 0.
    """
    dtype = call[0][0].dtype
    truth = getattr(reference, function.__name__)
    is_head = function is riskmap_ext.linear_weighted_loss
    exact_call = in_double(call)
    found = value_and_gradients(call, function)
    expected, *neutral = (
        value_and_gradients(each, truth)
        for each in (exact_call, *neutral_calls(exact_call, is_head))
    )
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = dtype == torch.float64
    value, limit = (1e-12, 1e-11) if exact else (1e-5, 1e-5)
    if is_head and not exact:
        logits = rounding_of_logits(*exact_call[0][:2])
        value, limit = value + 2 * logits, limit + 4 * logits
    if is_head and ON_CUDA and not exact:
        features, weight = exact_call[0][:2]
        logits = float(largest(torch.einsum("ck,bk...->bc...", weight.flatten(1), features)))
        rounding = ROUNDING.get(dtype, 0.0) * max(logits, 4.0)
        value, limit = value + 2 * rounding, limit + 4 * rounding
    assert_close(found[0].double(), expected[0], rtol=value, atol=value, equal_nan=True)
    for one, other, *sizes in zip(found[1:], expected[1:], *(n[1:] for n in neutral), strict=True):
        rounding = ROUNDING.get(one.dtype, 0.0)
        if exact and one.dtype == torch.float32:  # of a float32 risk beside float64 logits
            rounding = 2.0**-24
        near = limit + 2 * rounding
        smallest = 2.0**-24 if one.dtype == torch.float16 else 0.0
        if is_head and ON_CUDA:  # the gradient of the logits is rounded before it is multiplied
            smallest *= 16
        scale = max(float(largest(t)) for t in (other, *sizes))
        if ON_CUDA and expected[0].isnan().any():
            one, other = (torch.where(other == 0, 0.0, each.double()) for each in (one, other))
        elif one.dtype == torch.float16:  # beyond its range both are infinite
            other = torch.where(other.abs() < 65520, other, other * math.inf)
        assert_close(one.double(), other, rtol=near, atol=near * scale + smallest, equal_nan=True)


def rounding_of_logits(features: Tensor, weight: Tensor) -> float:
    """In float32, of sums over the features whose terms may be larger than the logits."""
    terms = torch.einsum("ck,bk...->bc...", weight.flatten(1).abs(), features.abs())
    return 2.0**-24 * float(largest(terms))


def neutral_calls(call: Call, is_head: bool) -> list[Call]:
    """Where all classes are equally probable, and the terms of a gradient do not cancel out."""
    (first, *others), options = call
    if not is_head:
        return [((torch.zeros_like(first), *others), options)]
    weight, bias, *others = others
    signs = 1 - 2 * (torch.arange(weight.size(0), dtype=weight.dtype) % 2)
    apart = weight.abs() * signs.view(-1, *[1] * (weight.dim() - 1))
    no_bias = None if bias is None else torch.zeros_like(bias)
    return [
        ((torch.zeros_like(first), apart, bias, *others), options),
        ((first, torch.zeros_like(weight), no_bias, *others), options),
    ]


def largest(values: Tensor) -> Tensor:
    finite = values[values.isfinite()].abs()
    return finite.max() if finite.numel() else torch.zeros(())


def value_and_gradients(call: Call, function: Callable[..., Tensor]) -> list[Tensor]:
    args, options = call
    given = [t.detach().requires_grad_() if can_have_gradient(t) else t for t in args]
    loss = function(*given, **options)
    loss.sum().backward()
    leaves = filter(can_have_gradient, given)
    return [loss.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def can_have_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def leep_matches(case: Case) -> None:
    """Equal probabilities are rounded alike, and a tile of 512 voxels is added in float32."""
    call = case.leep_call(CPU)
    args, options = in_double(call)
    expected = reference.leep_statistics(*args, **options)
    found = riskmap_ext.leep_statistics(*call[0], **call[1])
    exact = case.dtype == torch.float64
    assert_relative_l2(found, expected, 1e-12 if exact else 1e-5)


def spoiled(pick: random.Random, value: Any) -> Any:
    """Something else in the place of an argument."""
    if not isinstance(value, Tensor) or pick.random() < 0.2:
        return pick.choice(VALUES)
    changes: list[Callable[[], Any]] = [
        lambda: value[:0],
        lambda: value[..., :0],
        lambda: value.unsqueeze(pick.randrange(value.dim() + 1)),
        lambda: value.flatten(),
        lambda: value.new_zeros(()),
        lambda: (
            value.repeat_interleave(2, dim=pick.randrange(value.dim())) if value.dim() else value
        ),
        lambda: value.to(pick.choice((*DTYPES, *INTEGERS, torch.bool, torch.complex64))),
        lambda: value.to("meta"),
        lambda: value.to_sparse(),
        lambda: torch.full_like(value, pick.choice((-(2**40), 2**40, 127, -1, 3))),
        lambda: value.double() * pick.choice((math.nan, math.inf, -math.inf, 1e300, -1.0)),
        lambda: value.detach().requires_grad_(),
        lambda: value.numpy(),
        lambda: value.tolist(),
        lambda: torch.nested.nested_tensor([value]),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8),
        lambda: value.conj(),
        lambda: value.expand(2, *value.shape),
    ]
    try:
        return pick.choice(changes)()
    except (RuntimeError, TypeError, ValueError, OverflowError, NotImplementedError):
        return pick.choice(VALUES)


def wrong_call(pick: random.Random, number: int) -> tuple[str, Case, Callable[[], None]]:
    """A call with one to three arguments replaced."""
    case = replace(some_case(pick, number), layout="contiguous", map_layout="")
    case = replace(case, regions=pick.choice((0, 0, 3)), loss_options=loss_options(pick, case))
    calls: dict[str, tuple[Callable[..., Any], Callable[[torch.device], Call]]] = {
        "weighted_loss": (riskmap_ext.weighted_loss, case.loss_call),
        "linear_weighted_loss": (riskmap_ext.linear_weighted_loss, case.head_call),
        "leep_statistics": (riskmap_ext.leep_statistics, case.leep_call),
        "transferability_map": (riskmap_ext.transferability_map, case.map_call),
        "risk_map": (riskmap_ext.risk_map, case.risk_call),
    }
    name = pick.choice(list(calls))
    function, made = calls[name]

    def check() -> None:
        positional, options = made(CPU)
        args: dict[Any, Any] = {**dict(enumerate(positional)), **options}
        for key in pick.sample(list(args), min(len(args), pick.choice((1, 1, 2, 3)))):
            args[key] = spoiled(pick, args[key])
        try:
            found = function(
                *(args[i] for i in range(len(positional))),
                **{key: value for key, value in args.items() if isinstance(key, str)},
            )
            if isinstance(found, Tensor) and found.requires_grad:
                found.sum().backward()
        except (ValueError, TypeError) as error:
            if not re.match(r"[\w.]+(: [\w.]+)?: ", str(error)):
                raise AssertionError(f"names no argument: {error}") from error

    return f"wrong {name}", case, check


def call(number: int) -> tuple[str, Case, Callable[[], None]]:
    pick = random.Random(number)
    return (wrong_call if number % 3 == 2 else right_call)(pick, number)


def refused(case: Case, error: Exception) -> bool:
    """Whether a combination of options is one that the function documents as an error."""
    told = str(error)
    return bool(case.loss_options) and isinstance(error, ValueError) and "expected" in told


def run(numbers: Iterator[int], until: float, failed: Callable[[str], None]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in numbers:
        if time.monotonic() > until:
            break
        counts["last"] = number
        kind, case, check = call(number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check()
            counts[kind] += 1
        except Exception as error:
            if not kind.startswith("wrong") and refused(case, error):
                counts[f"refused {kind}"] += 1
                continue
            counts["failed"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            failed(
                f"{number}: {kind}: {type(error).__name__} at {where}: {str(error)[:300]}\n  {case}"
            )
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--only", type=int, help="this call, with its traceback")
    parser.add_argument(
        "--start", type=int, help="first number; otherwise where the last run ended"
    )
    parser.add_argument("--cuda-on-host", action="store_true")
    options = parser.parse_args()
    kernels: Any = nullcontext()
    name = torch.ops.riskmap_ext._cpu_capability()
    if options.cuda_on_host:
        import cuda_on_host

        cuda_on_host.load(cuda_on_host.library())
        kernels, name = cuda_on_host.in_place_of_the_cpu_kernels(), "cuda_on_host"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with kernels:
        if options.only is not None:
            kind, case, check = call(options.only)
            print(kind, case, flush=True)
            check()
            return 0
        return campaign(name, options)


def memory_and_files() -> tuple[float, float]:
    """MiB of memory that is not of files, and open files; NaN where there is no /proc."""
    process = Path("/proc/self")
    if not process.exists():
        return math.nan, math.nan
    status = (process / "status").read_text()
    memory = re.search(r"RssAnon:\s+(\d+)", status)
    return int(memory[1]) / 1024 if memory else math.nan, float(
        len(list((process / "fd").iterdir()))
    )


def campaign(name: str, options: argparse.Namespace) -> int:
    folder = ROOT / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / f"{name}.json"
    known = json.loads(state.read_text()) if state.exists() else {}
    first = known.get("next", 0) if options.start is None else options.start
    begun = time.monotonic()

    def failed(text: str) -> None:
        print(text, flush=True)
        with (folder / f"{name}_failures.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    total: Counter[str] = Counter(known.get("counts", {}))
    until, end, here = begun + options.seconds, first + options.calls, first
    failures, growth = 0, []
    while here < end and time.monotonic() < until:
        # So that a crash costs little, and its number is known to lie in this part.
        state.write_text(json.dumps({"next": here, "counts": total}))
        counts = run(iter(range(here, min(here + 1000, end))), until, failed)
        here = counts.pop("last", here - 1) + 1
        failures += counts["failed"]
        total += counts
        growth.append(memory_and_files())
    state.write_text(json.dumps({"next": here, "counts": total}))
    print(
        f"{name}: calls {first} to {here - 1}, {failures} failed, {time.monotonic() - begun:.0f} s"
    )
    if len(growth) > 1:  # the first part loads and allocates what all use
        for what, before, after in zip(("MiB", "open files"), growth[1], growth[-1], strict=True):
            print(f"  {what}: {before:.0f} after 2,000 calls, {after:.0f} at the end")
    print("  of all runs:", ", ".join(f"{kind} {n}" for kind, n in sorted(total.items())))
    print("  python python_tests/fuzz.py --only N repeats one")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
