"""Registers, predicates and constants of all threads of a grid: every thread is a lane."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from functions import F32, F64, I32, I64, U8, U32, U64, Array
from listing import Kernel, Operand, SassError

WARP = 32
PARAMETERS = 0x210  # where they begin in constant bank 0
DTYPES: dict[str, type[Any]] = {"w": U32, "q": U64, "f": F32, "d": F64}


class Launch(NamedTuple):
    """What the host code asked for; `argument` holds the bytes of the one struct of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    argument: bytes


def split(number: Array, sizes: tuple[int, int, int]) -> list[Array]:
    """x, y and z of a running number."""
    return [number % sizes[0], number // sizes[0] % sizes[1], number // sizes[0] // sizes[1]]


class State:
    """The registers of some blocks of a launch; lanes fill every block up to whole warps."""

    def __init__(self, kernel: Kernel, launch: Launch, blocks: Array) -> None:
        argument = launch.argument
        if len(kernel.banks[0]) != PARAMETERS + len(argument):
            raise SassError(f"{kernel.name} does not take {len(argument)} bytes of parameters")
        self.kernel, self.blocks = kernel, len(blocks)
        threads = int(np.prod(launch.block))
        self.width = -(-threads // WARP) * WARP  # lanes of a block
        self.lanes = self.width * self.blocks
        self.stack = -(-(kernel.resources.get("STACK", 0) + 512) // 16) * 16
        bank0 = bytearray(PARAMETERS) + argument
        struct.pack_into("<6I", bank0, 0, *launch.block, *launch.grid)
        struct.pack_into("<I", bank0, 0x28, self.stack)
        banks = kernel.banks | {0: bytes(bank0)}
        self.banks = {bank: np.frombuffer(data, U8) for bank, data in banks.items()}

        # With neighbours of RZ, which pairs and quads of it read.
        self.words = {"R": np.zeros((260, self.lanes), U32), "UR": np.zeros((68, self.lanes), U32)}
        self.rows: dict[tuple[str, str], list[Array]] = {
            **{("w", name): list(words) for name, words in self.words.items()},
            **{("f", name): list(words.view(F32)) for name, words in self.words.items()},
        }
        bits = {name: list(np.zeros((8, self.lanes), bool)) for name in ("P", "UP")}
        bits["P"][7][:] = bits["UP"][7][:] = True
        self.bits: dict[str, list[Array]] = bits
        self.fixed: dict[tuple[int, str], Array] = {}  # sources that are the same for all lanes

        thread = np.tile(np.arange(self.width), self.blocks)
        self.thread, self.block = thread, np.repeat(np.arange(self.blocks), self.width)
        self.lane, self.warp = thread % WARP, np.arange(self.lanes) // WARP
        tid, ctaid = split(thread, launch.block), split(np.repeat(blocks, self.width), launch.grid)
        zero = np.zeros(1, U32)
        self.special: dict[str, Array] = {"SRZ": zero, "SR_CgaCtaId": zero, "SR_LANEID": self.lane}
        for k, axis in enumerate("XYZ"):
            self.special |= {f"SR_TID.{axis}": tid[k], f"SR_CTAID.{axis}": ctaid[k]}
        self.special["SR_SWINHI"] = U64(0)  # of the addresses of shared memory among all others
        below = (U64(1) << self.lane.astype(U64)) - U64(1)
        self.special |= {"SR_LTMASK": below, "SR_EQMASK": below + U64(1)}
        self.alive = thread < threads
        self.everyone = self.alive  # is the mask of a group that has all lanes which live

    def read(self, kind: str, o: Operand) -> Array:
        """A source as words, floats, doubles or quads, with its sign; one number may stand for
        all lanes."""
        if o.plain and kind in "wf":
            return self.rows[kind, o.kind][o.number]
        if (known := self.fixed.get((id(o), kind))) is not None:
            return known
        fixed = o.kind == "immediate" or (o.kind == "constant" and o.index.is_zero)
        v: Array
        if o.kind == "immediate":
            v = np.full(1, o.float if kind in "fd" else o.word, DTYPES[kind])
        elif o.kind in ("constant", "R", "UR"):
            rows = (
                self.constant(o, 8 if kind in "dq" else 4)
                if o.kind == "constant"
                else self.rows["w", o.kind][o.number : o.number + 2]
            )
            v = rows[0].astype(U64) | rows[1].astype(U64) << U64(32) if kind in "dq" else rows[0]
            v = self.part(v, o.suffix).view(DTYPES[kind])
        else:
            raise SassError(f"{o.name} is not a source that is supported")
        if o.absolute:
            v = abs(v.view(I32)).view(U32) if kind == "w" else abs(v)
        v = ~v if o.inverted else v
        if o.negative:
            v = -v if kind in "fd" else v.dtype.type(0) - v
        if fixed:
            self.fixed[id(o), kind] = v
        return v

    @staticmethod
    def part(v: Array, suffix: str) -> Array:
        if suffix in ("", ".64", ".F32"):
            return v
        if suffix in (".B0", ".B1", ".B2", ".B3"):
            return v >> U32(8 * int(suffix[2])) & U32(255)
        if suffix in (".H0", ".H1"):
            return v >> U32(16 * int(suffix[2])) & U32(0xFFFF)
        raise SassError(f"{suffix} is not supported")

    def constant(self, o: Operand, size: int) -> list[Array]:
        """Its words."""
        data = self.banks[o.number]
        if o.index.is_zero:
            cells = data[o.offset : o.offset + size]
            if cells.size != size:
                raise SassError("beyond the constants")
            return list(cells.view(U32).reshape(-1, 1)) if size >= 4 else [cells.astype(U32)]
        start = self.read("w", o.index).view(I32).astype(I64) + o.offset
        start = np.clip(start, 0, data.size - size)  # lanes that are off may have anything
        parts = [data[start + k].astype(U32) << U32(8 * (k % 4)) for k in range(size)]
        return [
            np.bitwise_or.reduce(parts[k : k + 4]) for k in range(0, size, 4)
        ]  # of 4 bytes each, or fewer

    def predicate(self, o: Operand) -> Array:
        row = self.bits[o.kind][o.number]
        return ~row if o.inverted else row

    def put(self, o: Operand, v: Array, act: Array) -> None:
        """Writes a predicate, a register or, 64 bits, two. A uniform one belongs to a warp: who
        computes it sees to it that all lanes of a warp bring the same."""
        if o.is_zero:
            return
        if o.kind[0] == "U" and act is not self.everyone:
            act = self.of_warps(act)
        if o.is_predicate:
            self.set(self.bits[o.kind][o.number], v, act)
            return
        row = self.rows["w", o.kind]
        if v.dtype.itemsize == 8:
            v = v.view(U64)
            self.set(row[o.number], (v & U64(0xFFFFFFFF)).astype(U32), act)
            self.set(row[o.number + 1], (v >> U64(32)).astype(U32), act)
        else:
            self.set(row[o.number], v.view(U32), act)

    def set(self, row: Array, v: Array, act: Array) -> None:
        if act is self.everyone:
            row[:] = v
        else:
            np.copyto(row, v, where=act)

    def of_warps(self, act: Array) -> Array:
        """All lanes of the warps that have one."""
        return np.repeat(act.reshape(-1, WARP).any(axis=1), WARP)

    def of_first(self, v: Array, act: Array) -> Array:
        """For all lanes of a warp what its first active one has."""
        first = act.reshape(-1, WARP).argmax(axis=1) + np.arange(0, self.lanes, WARP)
        return np.repeat(np.broadcast_to(v, self.lanes)[first], WARP)
