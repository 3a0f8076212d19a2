"""Instructions that are functions of their sources: f(instruction, predicates read, sources...)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from listing import Instruction, SassError

Array = np.ndarray[Any, Any]
U8, U16, U32, U64, I32, I64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.int64
F16, F32, F64, LONG = np.float16, np.float32, np.float64, np.longdouble
INTEGERS = {
    **{"U32": U32, "S32": I32, "U64": U64, "S64": I64},
    **{"U16": U16, "S16": np.int16, "U8": U8, "S8": np.int8},
}
ROUNDING = frozenset({"RM", "RP", "RZ", "SAT"})
APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "EX2": np.exp2,
    "LG2": np.log2,
    "RCP": np.reciprocal,
    "RSQ": lambda x: 1 / np.sqrt(x),
    "SQRT": np.sqrt,
    "TANH": np.tanh,
    "SIN": lambda x: np.sin(2 * np.pi * x),  # of turns
    "COS": lambda x: np.cos(2 * np.pi * x),
}
TWO: list[Callable[[Array, Array], Array]] = [  # functions of two bits, by their table
    lambda b, c: b ^ b,
    lambda b, c: ~(b | c),
    lambda b, c: ~b & c,
    lambda b, c: ~b,
    lambda b, c: b & ~c,
    lambda b, c: ~c,
    lambda b, c: b ^ c,
    lambda b, c: ~(b & c),
    lambda b, c: b & c,
    lambda b, c: ~(b ^ c),
    lambda b, c: c,
    lambda b, c: ~b | c,
    lambda b, c: b,
    lambda b, c: b | ~c,
    lambda b, c: b | c,
    lambda b, c: ~(b ^ b),
]


def rounded(i: Instruction, x: Array, dtype: type[Any]) -> Array:
    y: Array = x.astype(dtype)
    if not i.modifiers & ROUNDING:
        return y
    y = np.where(i.has("RM") & (y > x), np.nextafter(y, dtype(-np.inf)), y)
    y = np.where(i.has("RP") & (y < x), np.nextafter(y, dtype(np.inf)), y)
    y = np.where(i.has("RZ") & (abs(y) > abs(x)), np.nextafter(y, dtype(0)), y)
    return np.clip(np.nan_to_num(y), dtype(0), dtype(1)) if i.has("SAT") else y


def select(i: Instruction, p: list[Array], a: Array, b: Array) -> Array:
    return np.where(p[0], a, b)


def least_or_most(i: Instruction, p: list[Array], a: Array, b: Array) -> Array:
    if a.dtype == U32 and not i.has("U32"):
        a, b = a.view(I32), b.view(I32)
    loose = a.dtype.kind == "f" and not i.has("NAN")
    least, most = (np.fmin, np.fmax) if loose else (np.minimum, np.maximum)
    return np.where(p[0], least(a, b), most(a, b))


def least_or_most_of_three(i: Instruction, p: list[Array], a: Array, b: Array, c: Array) -> Array:
    return least_or_most(i, p, least_or_most(i, p, a, b).view(U32), c)


def look_up(table: int, a: Array, b: Array, c: Array) -> Array:
    """Bits by a table of 8: that of a = 1 is its upper half."""
    one, none = table >> 4, table & 15
    if one == none:
        return TWO[none](b, c) | (a & ~a)  # of the shape of all
    if none == 0:
        return a & TWO[one](b, c)
    if one == 0:
        return ~a & TWO[none](b, c)
    if one == 15:
        return a | TWO[none](b, c)
    if none == 15:
        return ~a | TWO[one](b, c)
    if one == 15 - none:
        return a ^ TWO[none](b, c)
    return (a & TWO[one](b, c)) | (~a & TWO[none](b, c))


def shift(i: Instruction, p: list[Array], low: Array, count: Array, high: Array) -> Array:
    count = count.astype(U64)
    wide = i.has("U64") or i.has("S64")
    count = count & U64(63 if wide else 31) if i.has("W") or wide else np.minimum(count, U64(32))
    both = high.astype(U64) << U64(32) | low
    if i.has("L"):
        v = both << count >> U64(32) if i.has("HI") else low.astype(U64) << count
    elif i.has("HI") and i.has("S32"):
        v = high.view(I32).astype(I64) >> np.minimum(count, U64(31)).astype(I64)
    elif i.has("HI") and i.has("S64"):
        v = both.view(I64) >> count.astype(I64) >> I64(32)
    elif i.has("HI"):
        v = both >> U64(32) >> count
    else:
        v = both >> count
    return v.astype(U32)


def permute(i: Instruction, p: list[Array], a: Array, selector: Array, b: Array) -> Array:
    if i.mods:
        raise SassError("modes of PRMT are not supported")
    if selector.size == 1:
        total = np.zeros(1, U32)
        for k in range(4):
            nibble = int(selector[0]) >> 4 * k & 15
            source, at = (b if nibble & 4 else a), U32(8 * (nibble & 3))
            byte = source >> at & U32(255)
            total = total | ((byte >> U32(7)) * U32(255) if nibble & 8 else byte) << U32(8 * k)
        return total
    a, selector, b = np.broadcast_arrays(a, selector, b)
    choice = np.stack([x >> U32(8 * k) & U32(255) for x in (a, b) for k in range(4)])
    v = np.zeros_like(a)
    for k in range(4):
        which = selector >> U32(4 * k) & U32(15)
        byte = choice[which & U32(7), np.arange(a.size)]
        v |= np.where(which & U32(8), (byte >> U32(7)) * U32(255), byte) << U32(8 * k)
    return v


def narrowed(x: Array, bfloat: bool) -> Array:
    """A float as 16 bits, rounded to the nearest even."""
    if not bfloat:
        return x.astype(F16).view(U16).astype(U32)
    bits = x.astype(F32).view(U32)
    to_even = bits.astype(U64) + U64(0x7FFF) + (bits >> U32(16) & U32(1))
    return np.where(np.isnan(x), U32(0x7FFF), (to_even >> U64(16)).astype(U32))


def halves(word: Array, suffix: str, bfloat: bool) -> tuple[Array, Array]:
    """The lower and the upper half of a register, as `.H0_H0` and the like choose them."""
    parts = (word & U32(0xFFFF), word >> U32(16))
    if suffix in (".H0_H0", ".H1_H1"):
        parts = (parts[suffix == ".H1_H1"],) * 2
    elif suffix == ".F32":
        return (word.view(F32),) * 2
    elif suffix not in ("", ".H1_H0"):
        raise SassError(f"{suffix} is not supported")
    low, high = (
        (half << U32(16)).view(F32) if bfloat else half.astype(U16).view(F16).astype(F32)
        for half in parts
    )
    return low, high


def pack_halves(i: Instruction, p: list[Array], high: Array, low: Array) -> Array:
    if i.has("RELU") or i.modifiers & ROUNDING:
        raise SassError("this rounding is not supported")
    bfloat = i.has("BF16") or i.has("BF16_V2")
    return narrowed(high, bfloat) << U32(16) | narrowed(low, bfloat)


def integer_of(i: Instruction) -> type[Any]:
    return next((INTEGERS[m] for m in i.mods if m in INTEGERS), I32)


def to_integer(i: Instruction, p: list[Array], x: Array) -> Array:
    kind = integer_of(i)
    if i.has("F16"):
        x = x.view(U32).astype(U16).view(F16).astype(F32)
    if i.has("TRUNC") or i.has("FLOOR") or i.has("CEIL"):
        whole = (np.trunc if i.has("TRUNC") else np.floor if i.has("FLOOR") else np.ceil)(x)
    else:
        whole = np.rint(x)
    # NaN becomes 0 of an integer of 32 bits; clipped in long double, which holds 64 bits.
    limits = np.iinfo(kind)
    wide = np.nan_to_num(whole).astype(LONG)
    v: Array = np.clip(wide, LONG(limits.min), LONG(limits.max)).astype(kind)
    return v.astype(I32) if v.itemsize < 4 else v


def from_integer(i: Instruction, p: list[Array], x: Array) -> Array:
    kind = integer_of(i)
    if np.dtype(kind).itemsize < 4:
        x = x.astype(kind)
    if i.has("F16"):
        return narrowed(x.view(kind).astype(F32), False)
    if i.has("F64"):
        return rounded(i, x.view(kind).astype(LONG), F64)
    return rounded(i, x.view(kind).astype(LONG if x.itemsize == 8 else F64), F32)


def to_whole(i: Instruction, p: list[Array], x: Array) -> Array:
    how = next((m for m in i.mods if m in ("TRUNC", "FLOOR", "CEIL")), "RINT")
    functions = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil, "RINT": np.rint}
    return functions[how](x)


def approximate(i: Instruction, p: list[Array], x: Array) -> Array:
    """Exact, where the hardware's last bits may be off."""
    if i.has("RCP64H") or i.has("RSQ64H"):  # of the upper half of a double
        double = (x.view(U32).astype(U64) << U64(32)).view(F64)
        result = 1 / double if i.has("RCP64H") else 1 / np.sqrt(double)
        return (result.view(U64) >> U64(32)).astype(U32)
    known = [m for m in i.mods if m in APPROXIMATE]
    if len(known) != 1 or i.has("F16"):
        raise SassError("this function is not supported")
    return APPROXIMATE[known[0]](x.astype(F64)).astype(F32)


def wider(x: Array) -> Array:
    return x.astype(LONG if x.dtype == F64 else F64)


def fused(i: Instruction, p: list[Array], a: Array, b: Array, c: Array) -> Array:
    """Rounds twice, the first time to many more digits."""
    if a.dtype == F32 or i.modifiers & ROUNDING:
        return rounded(i, wider(a) * b + c, a.dtype.type)
    # What the product and the sum lose by rounding, after Dekker and Knuth: ten times as fast as
    # long double.
    product, total = a * b, a * b + c
    parts = []
    for x in (a, b):
        high = x * 134217729.0 - (x * 134217729.0 - x)
        parts += [high, x - high]
    lost = parts[0] * parts[2] - product + parts[0] * parts[3] + parts[1] * parts[2]
    lost += parts[1] * parts[3]
    back = total - product
    lost += product - (total - back) + (c - back)
    return np.where(np.isfinite(lost), total + lost, total)


def add(i: Instruction, p: list[Array], a: Array, b: Array) -> Array:
    return rounded(i, wider(a) + b, a.dtype.type) if i.modifiers & ROUNDING else a + b


def multiply(i: Instruction, p: list[Array], a: Array, b: Array) -> Array:
    return rounded(i, wider(a) * b, a.dtype.type) if i.modifiers & ROUNDING else a * b


def count_bits(i: Instruction, p: list[Array], x: Array) -> Array:
    return np.bitwise_count(x).astype(U32)


def reverse_bits(i: Instruction, p: list[Array], x: Array) -> Array:
    for width, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        x = x >> U32(width) & U32(mask) | (x & U32(mask)) << U32(width)
    return x >> U32(16) | x << U32(16)


def leading_one(i: Instruction, p: list[Array], x: Array) -> Array:
    """The place of the highest bit, as .SH counted from above; all ones where there is none."""
    if not i.has("U32"):
        x = np.where(x.view(I32) < 0, ~x, x)
    place = np.frexp(x.astype(F64))[1].astype(I64) - 1
    place = np.where(x == 0, -1, 31 - place if i.has("SH") else place)
    return place.astype(I32).view(U32)


def extend_sign(i: Instruction, p: list[Array], x: Array, bits: Array) -> Array:
    bits = np.minimum(bits & U32(31) if i.has("W") else bits, U32(32))
    up = (U32(32) - bits).astype(U64)
    wide = (x.astype(U64) << up).astype(U32)
    if i.has("U32"):
        return (wide.astype(U64) >> up).astype(U32)
    return (wide.view(I32).astype(I64) >> up.astype(I64)).astype(I32)


def bit_mask(i: Instruction, p: list[Array], start: Array, width: Array) -> Array:
    """`width` ones from bit `start` on."""
    if i.has("W"):
        start, width = start & U32(31), width & U32(31)
    start, width = (np.minimum(x, U32(32)).astype(U64) for x in (start, width))
    return (((U64(1) << width) - U64(1)) << start).astype(U32)


def dot_of_bytes(i: Instruction, p: list[Array], a: Array, b: Array, c: Array) -> Array:
    if not i.has("4A") or [m for m in i.mods if m in ("U8", "S8")] != ["U8", "U8"]:
        raise SassError("this dot product is not supported")
    for k in range(4):
        c = c + (a >> U32(8 * k) & U32(255)) * (b >> U32(8 * k) & U32(255))
    return c


Function = Callable[..., Array]
# The letter is how the sources are read: words, floats, doubles or quads (of 64 bits); of two
# letters the second is for 64 bits. The dtype of what a function returns says how it is written.
FUNCTIONS: dict[str, tuple[str, Function]] = {
    "MOV": ("w", lambda i, p, a: a),
    "R2UR": ("w", lambda i, p, a: a),
    "VIADD": ("w", lambda i, p, a, b: a + b),
    "IABS": ("w", lambda i, p, a: abs(a.view(I32))),
    "SEL": ("w", select),
    "FSEL": ("f", select),
    "VIMNMX": ("w", least_or_most),
    "VIMNMX3": ("w", least_or_most_of_three),
    "IMNMX": ("w", least_or_most),
    "VIADDMNMX": ("w", lambda i, p, a, b, c: least_or_most(i, p, a + b, c)),
    "FMNMX": ("f", least_or_most),
    "SHF": ("w", shift),
    "PRMT": ("w", permute),
    "FADD": ("f", add),
    "FMUL": ("f", multiply),
    "FFMA": ("f", fused),
    "F2FP": ("f", pack_halves),
    "MUFU": ("f", approximate),
    "FRND": ("fd", to_whole),
    "DADD": ("d", add),
    "DMUL": ("d", multiply),
    "DFMA": ("d", fused),
    "F2F": ("fd", lambda i, p, a: rounded(i, a, F64 if i.mods[0] == "F64" else F32)),
    "F2I": ("fd", to_integer),
    "I2F": ("wq", from_integer),
    "I2FP": ("w", from_integer),
    "POPC": ("w", count_bits),
    "BREV": ("w", reverse_bits),
    "FLO": ("w", leading_one),
    "SGXT": ("w", extend_sign),
    "BMSK": ("w", bit_mask),
    "IDP": ("w", dot_of_bytes),
}
