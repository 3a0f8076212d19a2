"""The machine code of a kernel as cuobjdump lists it."""

from __future__ import annotations

import re
from functools import cache, cached_property

import numpy as np

ZERO = {"R": 255, "UR": 63, "P": 7, "UP": 7}  # of each register file the one that is 0, or true
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes moved; 4 otherwise


class SassError(Exception):
    """What the interpreter cannot do, or a kernel must not."""


class Operand:
    """R4, -|R4|, R4.H1_H1, ~UR2, !P0, c[0x0][0x210], 0x10, 1.5, SR_TID.X or an address."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"([-~!+]?)(\|?)(.*?)\|?", text.replace(".reuse", "").strip())
        assert found
        sign, bar, body = found.groups()
        self.name, self.absolute, self.negative = body, bool(bar), sign == "-"
        self.inverted = sign in ("~", "!")
        self.kind, self.number, self.suffix, self.offset = "special", -1, "", 0
        self.word, self.float, self.terms = 0, 0.0, list[Operand]()
        if register := re.fullmatch(r"(U?[RP])(\d+|Z|T)((?:\.\w+)*)", body):
            self.kind, number, self.suffix = register.groups()
            self.number = ZERO[self.kind] if number in "ZT" else int(number)
        elif constant := re.fullmatch(r"c\[0x(\w+)\]\[(U?R\w+)?\+?(-?0x\w+)?\](\.\w+)?", body):
            self.kind, self.number = "constant", int(constant[1], 16)
            self.offset, self.suffix = int(constant[3] or "0", 16), constant[4] or ""
            self.index = Operand(constant[2] or "RZ")
        elif body.endswith("]"):
            self.kind = "address"
            inside = body[body.rindex("[") + 1 : -1].replace("+-", "+ -")
            self.terms = [Operand(term) for term in inside.split("+") if term]
        elif re.match(r"0x|\d|INF|QNAN", body):
            self.kind = "immediate"
            whole = re.fullmatch(r"0x\w+|\d+", body)
            self.word = int(body, 0) if whole else 0
            bits = np.uint32(self.word & 0xFFFFFFFF).view(np.float32)
            self.float = float(bits if body.startswith("0x") else body.replace("Q", ""))
        self.is_predicate = self.kind in ("P", "UP")
        self.is_zero = self.kind in ZERO and self.number == ZERO[self.kind]
        self.plain = self.kind in ("R", "UR") and not (
            self.absolute or self.negative or self.inverted or self.suffix
        )


@cache
def operand(text: str) -> Operand:
    return Operand(text)


class Instruction:
    """Operands by their role: predicates written (outs), the register written (dest), sources,
    predicates read (ins)."""

    def __init__(self, address: int, guard: str, name: str, operands: str) -> None:
        self.address, self.text = address, f"{name} {operands}".strip()
        self.guard = operand(guard) if guard else None
        self.base, *self.mods = name.split(".")
        self.size = next((SIZES[m] for m in self.mods if m in SIZES), 4)
        if self.base.startswith(("ATOM", "RED")) and "F64" in self.mods:
            self.size = 8
        apart = r"\s+" if self.base in ("BRX", "RET") else r",\s*(?![^\[]*\])"
        self.all = [operand(text) for text in re.split(apart, operands) if text]
        rest = self.all
        first = next((k for k, o in enumerate(rest) if not o.is_predicate), len(rest))
        self.outs, rest = rest[:first], rest[first:]
        self.dest = operand("RZ")
        if rest and "SETP" not in self.base:
            self.dest, *rest = rest
            more = next((k for k, o in enumerate(rest) if not o.is_predicate), len(rest))
            self.outs, rest = self.outs + rest[:more], rest[more:]
        self.sources = [o for o in rest if not o.is_predicate]
        self.ins = rest[len(self.sources) :]
        self.uniform = self.base[0] == "U" or self.base == "VOTEU"  # on the data path of a warp
        self.name = "VOTE" if self.base == "VOTEU" else self.base.removeprefix("U")
        self.writes = any(not o.is_zero for o in self.outs)
        self.modifiers = frozenset(self.mods)

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


class Kernel:
    """One kernel of a cubin; its listing is parsed when it is wanted."""

    def __init__(
        self,
        name: str,
        mangled: str,
        listing: str,
        banks: dict[int, bytes],
        resources: dict[str, int],
    ) -> None:
        self.name, self.mangled, self.listing = name, mangled, listing
        self.banks, self.resources = banks, resources

    @cached_property
    def code(self) -> list[Instruction]:
        pattern = r"/\*([0-9a-f]{4,})\*/ +(?:@(!?U?P\w+) +)?([A-Z][\w.]*) *([^;]*?) *;"
        return [Instruction(int(a, 16), *rest) for a, *rest in re.findall(pattern, self.listing)]
