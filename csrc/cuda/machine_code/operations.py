"""Instructions that need more than their sources: carries, memory, other lanes of a warp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from functions import (
    F16,
    F32,
    F64,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    halves,
    look_up,
    narrowed,
)
from listing import Instruction, Kernel, Operand, SassError
from memory import BASE, ProcessMemory
from state import WARP, Launch, State

COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    **{"GE": np.greater_equal, "GT": np.greater, "LE": np.less_equal},
    **{"LT": np.less, "EQ": np.equal, "NE": np.not_equal},
}
COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    **{"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
}
ATOMIC = {
    **{"ADD": np.add, "MIN": np.minimum, "MAX": np.maximum},
    **{"AND": np.bitwise_and, "OR": np.bitwise_or, "XOR": np.bitwise_xor},
}
REDUCE = {"SUM": np.add, "OR": np.bitwise_or, "AND": np.bitwise_and, "XOR": np.bitwise_xor}
GARBAGE = 0xCD  # in shared memory that nobody wrote


class Operations(State):
    def __init__(
        self, kernel: Kernel, launch: Launch, blocks: Array, memory: ProcessMemory, counting: bool
    ) -> None:
        super().__init__(kernel, launch, blocks)
        self.memory, self.counting = memory, counting
        self.room = -(-(kernel.resources.get("SHARED", 0) + launch.shared_bytes) // 16) * 16
        self.shared = self.views(np.full(self.room * self.blocks, GARBAGE, U8))
        self.local = self.views(np.zeros(self.stack * self.lanes, U8))
        # By address, of instructions on memory: warps in which the guard let a lane pass, and
        # their sectors of 32 bytes, or passes over the banks of shared memory.
        self.passed, self.cost = Counter[int](), Counter[int]()
        self.sectors: dict[str, list[Array]] = {"L": [], "S": []}  # of global memory

    @staticmethod
    def views(data: Array) -> dict[int, Array]:
        return {1: data, 2: data.view(U16), 4: data.view(U32), 8: data.view(U64)}

    def put_with(self, i: Instruction, v: Array, outs: list[Array], act: Array) -> None:
        self.put(i.dest, v, act)
        self.put_outs(i, outs, act)

    def put_outs(self, i: Instruction, outs: list[Array], act: Array) -> None:
        for o, out in zip(i.outs, outs, strict=False):
            self.put(o, out, act)

    # Integers.

    def op_IMAD(self, i: Instruction, act: Array) -> None:
        a, b = self.read("w", i.sources[0]), self.read("w", i.sources[1])
        carry = self.predicate(i.ins[0]) if i.has("X") else U32(0)
        if i.has("WIDE") or i.has("HI"):
            if i.has("U32"):
                product = a.astype(U64) * b
            else:
                product = (a.view(I32).astype(I64) * b.view(I32)).view(U64)
            total = product + self.read("q", i.sources[2]) + carry
            high = (total >> U64(32)).astype(U32) if i.has("HI") else total
            self.put_with(i, high, [total < product], act)
        else:
            self.put(i.dest, a * b + self.read("w", i.sources[2]) + carry, act)

    def op_IADD3(self, i: Instruction, act: Array) -> None:
        if not i.writes and not i.has("X"):
            a, b, c = (self.read("w", o) for o in i.sources)
            self.put(i.dest, a + b + c, act)
            return
        total = np.zeros(1, U64)
        for o in i.ins if i.has("X") else ():
            total = total + self.predicate(o).astype(U64)
        for o in i.sources:
            v = self.read("w", o)
            total = total + v + (v == 0) * U64(o.negative << 32)  # -v carries as ~v + 1 does
        carries = [total >> U64(32) > 0, total >> U64(32) > 1]
        self.put_with(i, total.astype(U32), carries, act)

    def op_LEA(self, i: Instruction, act: Array) -> None:
        low, b, *rest = (self.read("w", o) for o in i.sources)
        v, count = low.astype(U64), U64(i.sources[-1].word)
        if i.has("HI"):
            signs = (low.view(I32) >> 31).view(U32)
            high = rest[0] if len(rest) > 1 else signs if i.has("SX32") else np.zeros(1, U32)
            v = (high.astype(U64) << U64(32) | v) << count >> U64(32)
        else:
            v = v << count
        v = v & U64(0xFFFFFFFF)
        total = v + b + (self.predicate(i.ins[0]) if i.has("X") else U64(0))
        self.put_with(i, total.astype(U32), [total >> U64(32) != 0], act)

    def op_LOP3(self, i: Instruction, act: Array) -> None:
        a, b, c = (self.read("w", o) for o in i.sources[:3])
        v = look_up(i.sources[3].word, a, b, c)
        if i.writes:
            some = v != 0
            if i.has("PAND"):
                some = some & self.predicate(i.ins[0])
            elif i.ins and not (i.ins[0].is_zero and i.ins[0].inverted):
                some = some | self.predicate(i.ins[0])
            self.put_with(i, v, [some], act)
        else:
            self.put(i.dest, v, act)

    def op_PLOP3(self, i: Instruction, act: Array) -> None:
        a, b, c = (self.predicate(o) for o in i.all[2:5])
        for o, table in zip(i.all[:2], i.all[5:], strict=True):
            if not o.is_zero:
                self.put(o, look_up(table.word, a, b, c), act)

    def op_S2R(self, i: Instruction, act: Array) -> None:
        wide = i.base == "CS2R" and not i.has("32")
        v = self.special[i.sources[0].name].astype(U64 if wide else U32)
        self.put(i.dest, self.of_first(v, act) if i.base == "S2UR" else v, act)

    op_S2UR = op_CS2R = op_S2R

    def op_R2UR(self, i: Instruction, act: Array) -> None:
        self.put(i.dest, self.of_first(self.read("w", i.sources[0]), act), act)

    def op_LDC(self, i: Instruction, act: Array) -> None:
        words = self.constant(i.sources[0], i.size)
        if i.modifiers & {"S8", "S16"}:
            raise SassError("constants with a sign are not supported")
        v = words[0]
        if len(words) > 1:
            v = v.astype(U64) | words[1].astype(U64) << U64(32)
        self.put(i.dest, v, act)

    # Comparisons and predicates.

    def compare(self, i: Instruction, a: Array, b: Array) -> Array:
        kind = next(m for m in i.mods if m[:2] in COMPARE or m in ("NAN", "NUM"))
        if a.dtype.kind != "f":
            return COMPARE[kind](a, b)
        nan = np.isnan(a) | np.isnan(b)
        if kind in ("NAN", "NUM"):
            return nan if kind == "NAN" else ~nan
        result = COMPARE[kind[:2]](a, b)
        return result | nan if kind[2:] == "U" else result & ~nan

    def combined(self, i: Instruction, result: Array, act: Array) -> None:
        """Writes a comparison and its opposite, each with the predicate read."""
        combine = next(COMBINE[m] for m in i.mods if m in COMBINE)
        with_it = i.ins[0]
        for o, out in zip(i.outs, (result, ~result), strict=False):
            if o.is_zero:
                continue
            if not (combine is np.logical_and and with_it.is_zero and not with_it.inverted):
                out = combine(out, self.predicate(with_it))
            self.put(o, out, act)

    def op_ISETP(self, i: Instruction, act: Array) -> None:
        kind = {"F": "f", "D": "d"}.get(i.base[0], "w")
        a, b = (self.read(kind, o) for o in i.sources)
        if kind == "w" and not i.has("U32"):
            a, b = a.view(I32), b.view(I32)
        if i.has("MIN") or i.has("MAX"):
            raise SassError("this comparison is not supported")
        result = self.compare(i, a, b)
        if i.has("EX"):  # the upper half of a comparison; the last predicate is of the lower one
            result = result & (a != b) | (a == b) & self.predicate(i.ins[1])
        self.combined(i, result, act)

    op_FSETP = op_DSETP = op_ISETP

    def op_FSET(self, i: Instruction, act: Array) -> None:
        result = self.compare(i, *(self.read("f", o) for o in i.sources))
        combine = next(COMBINE[m] for m in i.mods if m in COMBINE)
        result = combine(result, self.predicate(i.ins[0]))
        one = np.float32(1).view(U32) if i.has("BF") else U32(0xFFFFFFFF)
        self.put(i.dest, result * one, act)

    def op_P2R(self, i: Instruction, act: Array) -> None:
        self.whole_register(i)
        bits = np.zeros(self.lanes, U32)
        for k in range(7):
            bits |= self.bits["P"][k].astype(U32) << U32(k)
        mask = self.read("w", i.sources[2])
        self.put(i.dest, self.read("w", i.sources[1]) & ~mask | bits & mask, act)

    def op_R2P(self, i: Instruction, act: Array) -> None:
        self.whole_register(i)
        word, mask = self.read("w", i.sources[-2]), self.read("w", i.sources[-1])
        for k in range(7):
            chosen = act & (mask >> U32(k) & U32(1) > 0)
            np.copyto(self.bits["P"][k], word >> U32(k) & U32(1) > 0, where=chosen)

    @staticmethod
    def whole_register(i: Instruction) -> None:
        if any(o.suffix or (o.name != "PR" and o.kind == "special") for o in i.all):
            raise SassError("bytes of a register are not supported")

    # Two halves of a register.

    def pairs(self, i: Instruction) -> list[tuple[Array, Array]]:
        """Low and high half of every source as floats; two immediates are high and low of one."""
        bfloat, found, sources = i.has("BF16_V2"), list[tuple[Array, Array]](), list(i.sources)
        while sources:
            o = sources.pop(0)
            if o.kind == "immediate":
                low = sources.pop(0)
                low_half, high_half = (np.full(1, x.float, F32) for x in (low, o))
                signs = (-1 if low.negative else 1), (-1 if o.negative else 1)
                found.append((low_half * signs[0], high_half * signs[1]))
                continue
            bare = Operand(o.name.split(".")[0]) if o.kind in ("R", "UR") else o
            word = self.rows["w", o.kind][o.number] if bare.plain else self.constant(o, 4)[0]
            low_half, high_half = halves(word, o.suffix, bfloat)
            if o.absolute:
                low_half, high_half = abs(low_half), abs(high_half)
            if o.negative:
                low_half, high_half = -low_half, -high_half
            found.append((low_half, high_half))
        return found

    def op_HFMA2(self, i: Instruction, act: Array) -> None:
        sources, bfloat = self.pairs(i), i.has("BF16_V2")
        results = []
        for half in (0, 1):
            a, b, *c = (pair[half].astype(F64) for pair in sources)
            if i.base == "HMNMX2":
                functions = (np.fmin, np.fmax) if not i.has("NAN") else (np.minimum, np.maximum)
                x = np.where(self.predicate(i.ins[0]), functions[0](a, b), functions[1](a, b))
            else:
                x = a + b if i.base == "HADD2" else a * b + (c[0] if c else 0)
            if i.has("SAT"):
                x = np.clip(np.nan_to_num(x), 0, 1)
            if i.has("RELU"):
                x = np.fmax(x, 0)
            results.append(x)
        if i.has("F32"):
            self.put(i.dest, results[0].astype(F32), act)
        else:
            low, high = (narrowed(x.astype(F32) if bfloat else x, bfloat) for x in results)
            self.put(i.dest, high << U32(16) | low, act)

    op_HADD2 = op_HMUL2 = op_HMNMX2 = op_HFMA2

    def op_HSETP2(self, i: Instruction, act: Array) -> None:
        (a, b), bfloat = self.pairs(i), i.has("BF16_V2")
        both = [self.compare(i, a[half], b[half]) for half in (0, 1)]
        combine = next(COMBINE[m] for m in i.mods if m in COMBINE)
        both = [combine(each, self.predicate(i.ins[0])) for each in both]
        if i.base == "HSETP2":
            for o, out in zip(
                i.outs, [both[0] & both[1]] * 2 if i.has("H_AND") else both, strict=False
            ):
                self.put(o, out, act)
            return
        one = 0xFFFF if not i.has("BF") else 0x3F80 if bfloat else int(F16(1).view(U16))
        self.put(i.dest, both[0] * U32(one) | both[1] * U32(one << 16), act)

    op_HSET2 = op_HSETP2

    # Memory.

    def addresses(self, i: Instruction, o: Operand, wide: bool, act: Array) -> Array:
        total, offset = np.zeros(1, U64), 0
        for term in o.terms:
            if term.kind == "immediate":
                offset += -term.word if term.negative else term.word
                continue
            if ".X" in term.suffix:
                scale = U64(int(term.suffix[term.suffix.index(".X") + 2 :]))
                total = total + self.rows["w", term.kind][term.number].astype(U64) * scale
            elif term.suffix == ".64" or (wide and not term.suffix):
                total = total + self.read("q", term)
            elif term.suffix in ("", ".U32"):
                total = total + self.rows["w", term.kind][term.number]
            else:
                raise SassError(f"{term.suffix} is not supported")
        at = (total + U64(offset & 0xFFFFFFFFFFFFFFFF)).view(I64)
        if at.size == 1:
            at = at.repeat(self.lanes)
        return at if act.all() else at[act]

    def place(
        self, i: Instruction, space: str, o: Operand, act: Array
    ) -> tuple[dict[int, Array], Array]:
        """Where an instruction reads or writes: the cells, and for every lane the first byte."""
        at, full = self.addresses(i, o, space == "G", act), act.all()
        warp = self.warp if full else self.warp[act]
        size = i.size
        if space == "G":
            self.memory.check(at, size)
            if self.counting:
                sectors = np.unique(warp << 50 | at >> 5)
                self.cost[i.address] += sectors.size
                self.sectors["S" if i.base[0] in "SR" else "L"].append(
                    np.unique(sectors & ((1 << 50) - 1))
                )
            return self.memory.cells, at - BASE
        at = at & 0xFFFFFF  # without the number of the block in its cluster
        limit = self.room if space == "S" else self.stack
        if at.min() < 0 or at.max() + size > limit or (at & (size - 1)).any():
            raise SassError(f"{int(at.max()):#x} of {limit:#x} is out of bounds, or misaligned")
        if space == "L":
            return self.local, at + np.flatnonzero(act) * self.stack
        if self.counting:  # equal words cost nothing more
            words = np.unique([(warp << 32 | at // 4) + k for k in range(max(1, size // 4))])
            banks = (words >> 32) * WARP + words % WARP
            per_bank = np.bincount(banks, minlength=self.lanes).reshape(-1, WARP)
            self.cost[i.address] += int(per_bank.max(axis=1).sum())
        return self.shared, at + (self.block if full else self.block[act]) * self.room

    def count_pass(self, i: Instruction, act: Array) -> None:
        if self.counting:
            self.passed[i.address] += int(act.reshape(-1, WARP).any(axis=1).sum())

    def op_LDG(self, i: Instruction, act: Array) -> None:
        """Global, shared (S) and local (L) memory, loads and stores."""
        self.count_pass(i, act)
        cells, at = self.place(i, i.base[2], next(o for o in i.all if o.kind == "address"), act)
        data = next(o for o in i.all if o.kind == "R")
        n, full, size = data.number, act.all(), i.size
        rows = self.rows["w", "R"]
        wide = 8 if size == 16 else size
        index = at >> (wide.bit_length() - 1)
        view = cells[wide]
        if i.base[0] == "S":
            for k in range(0, max(size, 4) // 4, 2 if size >= 8 else 1):
                v: Array = rows[n + k] if full else rows[n + k][act]
                if size >= 8:
                    high = rows[n + k + 1] if full else rows[n + k + 1][act]
                    v = v.astype(U64) | high.astype(U64) << U64(32)
                view[index + k // 2] = v.astype(view.dtype)
            return
        if data.is_zero:
            return
        chosen = slice(None) if full else act
        for k in range(max(size // 8, 1)):
            v = view[index + k]
            if size >= 8:
                rows[n + 2 * k][chosen] = (v & U64(0xFFFFFFFF)).astype(U32)
                rows[n + 2 * k + 1][chosen] = (v >> U64(32)).astype(U32)
            elif i.has("S8") or i.has("S16"):
                rows[n][chosen] = v.view(np.int8 if size == 1 else np.int16).astype(I32).view(U32)
            else:
                rows[n][chosen] = v

    op_LDS = op_LDL = op_STG = op_STS = op_STL = op_LDG

    def op_LDGSTS(self, i: Instruction, act: Array) -> None:
        """Asynchronous on a GPU; here the copy is there at once."""
        if i.has("ZFILL") or any(not o.is_zero for o in i.ins):
            raise SassError("a copy that may be left out is not supported")
        self.count_pass(i, act)
        to, source = (o for o in i.all if o.kind == "address")
        cells, at = self.place(i, "G", source, act)
        wide = min(i.size, 8)
        found = [cells[wide][(at + k) // wide] for k in range(0, i.size, wide)]
        counting, self.counting = self.counting, False
        cells, at = self.place(i, "S", to, act)
        self.counting = counting
        for k, v in enumerate(found):
            cells[wide][at // wide + k] = v

    def op_ATOMG(self, i: Instruction, act: Array) -> None:
        """One lane after the other."""
        self.count_pass(i, act)
        space = "S" if i.base == "ATOMS" else "G"
        at_operand = next(o for o in i.all if o.kind == "address")
        size = i.size
        cells, at = self.place(i, space, at_operand, act)
        index, kind = at >> (3 if size == 8 else 2), "q" if size == 8 else "w"
        given = [o for o in i.sources if o.kind != "address"]
        values = [np.broadcast_to(self.read(kind, o), self.lanes)[act] for o in given]
        dtype: Any = F64 if i.has("F64") else F32 if i.has("F32") else None
        if dtype is None and (i.has("S32") or i.has("S64")):
            dtype = I64 if size == 8 else I32
        view = cells[size].view(dtype) if dtype else cells[size]
        brought = [v.view(dtype) if dtype else v for v in values]
        name = next((m for m in i.mods if m in (*ATOMIC, "EXCH", "CAS", "CAST", "INC")), "")
        if i.has("POPC"):
            name, brought = "ADD", [np.ones(index.size, view.dtype)]
        returns = not i.base.startswith("RED") and not i.dest.is_zero
        if name in ATOMIC and not returns:
            places, each = np.unique(index, return_inverse=True)
            values_there = view[places]
            ATOMIC[name].at(values_there, each, brought[0])
            view[places] = values_there
            return
        before = np.empty(index.size, view.dtype)
        for k, place in enumerate(index):
            old = before[k] = view[place]
            mine = [v[k] for v in brought]
            if name in ATOMIC:
                view[place] = ATOMIC[name](old, mine[0])
            elif name == "EXCH":
                view[place] = mine[0]
            elif name in ("CAS", "CAST"):
                view[place] = mine[1] if old == mine[0] else old
            elif name == "INC":
                view[place] = 0 if old >= mine[0] else old + 1
            else:
                raise SassError("this atomic operation is not supported")
        whole = np.zeros(self.lanes, U64 if size == 8 else U32)
        whole[act] = before.view(whole.dtype)
        if name == "CAST":  # says whether it did
            whole[act] = before == brought[0]
        self.put(i.dest, whole, act)

    op_ATOMS = op_ATOM = op_RED = op_REDG = op_ATOMG

    # Other lanes of the warp.

    def op_VOTE(self, i: Instruction, act: Array) -> None:
        mine = self.predicate(i.all[-1])
        votes = (mine & act).reshape(-1, WARP)
        some, every = votes.any(axis=1), (mine | ~act).reshape(-1, WARP).all(axis=1)
        places = [o for o in i.all[:-1] if o.is_predicate]
        for o in places[:1]:
            self.put(o, (every if i.has("ALL") else some).repeat(WARP), act)
        if not i.dest.is_zero and not i.dest.is_predicate:
            ballot = (votes * (U64(1) << np.arange(WARP, dtype=U64))).sum(axis=1)
            self.put(i.dest, ballot.astype(U32).repeat(WARP), act)

    def op_MATCH(self, i: Instruction, act: Array) -> None:
        v = self.read("q" if i.has("U64") else "w", i.sources[0])
        values = np.broadcast_to(v, self.lanes).reshape(-1, WARP)
        active = act.reshape(-1, 1, WARP)
        same = (values[:, :, None] == values[:, None, :]) & active
        bits = U64(1) << np.arange(WARP, dtype=U64)
        masks = (same * bits).sum(axis=2, dtype=U64).reshape(-1)
        if i.has("ANY"):
            self.put(i.dest, masks.astype(U32), act)
            return
        everyone = (active[:, 0] * bits).sum(axis=1, dtype=U64).repeat(WARP)
        agreed = self.of_first(masks, act) == everyone
        self.put_with(i, (agreed * everyone).astype(U32), [agreed], act)

    def op_REDUX(self, i: Instruction, act: Array) -> None:
        v = np.broadcast_to(self.read("w", i.sources[0]), self.lanes)
        v = v.view(I32) if i.has("S32") else v
        limits = np.iinfo(v.dtype)
        name = next((m for m in ("MIN", "MAX", *REDUCE) if i.has(m)), "OR")
        neutral = {"MIN": limits.max, "MAX": limits.min, "AND": -1 if i.has("S32") else limits.max}
        rest = np.where(act, v, v.dtype.type(neutral.get(name, 0))).reshape(-1, WARP)
        function = ATOMIC["MIN" if name == "MIN" else "MAX"] if name[0] == "M" else REDUCE[name]
        self.put(i.dest, function.reduce(rest, axis=1).astype(v.dtype).view(U32).repeat(WARP), act)

    def op_SHFL(self, i: Instruction, act: Array) -> None:
        value, step, limit = (
            np.broadcast_to(self.read("w", o), self.lanes).astype(I64) for o in i.sources
        )
        part = limit >> 8 & 31
        first = self.lane & part
        last = first | (limit & 31 & ~part)
        if i.has("UP"):
            source = self.lane - step
            inside = source >= last
        else:
            index = first | (step & ~part & 31)
            source = {"BFLY": self.lane ^ step, "DOWN": self.lane + step}.get(i.mods[0], index)
            inside = source <= last
        chosen = np.where(inside, source, self.lane) + self.warp * WARP
        self.put_with(i, value[chosen].astype(U32), [inside], act)
