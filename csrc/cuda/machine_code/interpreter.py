"""Executes an sm_90 kernel on the CPU, from its machine code, and counts what it issues.

All threads of some blocks are lanes of numpy arrays. The lanes that are furthest back in the code
go on first, so that lanes which parted meet again where their paths do; an instruction counts once
for every warp that has a lane there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from functions import FUNCTIONS, I32, I64, U32, Array
from listing import Instruction, Kernel, SassError
from memory import ProcessMemory
from operations import Operations
from state import WARP, Launch

WITHOUT_EFFECT = (
    "NOP WARPSYNC ENDCOLLECTIVE DEPBAR LDGDEPBAR MEMBAR ERRBAR CGAERRBAR YIELD CCTL NANOSLEEP"
)
# Modifiers that are heeded, or that change neither result nor count. Any other is an error.
HEEDED = (
    "E CONSTANT EF EL LU EN U8 S8 U16 S16 U32 S32 U64 S64 32 64 128 F32 F64 F16 BF16 BF16_V2 BF"
    " H_AND PACK_AB MMA MOV SHL IADD WIDE HI X EX SX32 L R W SH LUT PAND AND OR XOR GE GT LE LT EQ"
    " NE GEU GTU LEU LTU EQU NEU NAN NUM MIN MAX RM RP RZ RN SAT FTZ TRUNC FLOOR CEIL NTZ EX2 LG2"
    " RCP RSQ SQRT TANH SIN COS RCP64H RSQ64H BFLY UP DOWN IDX ANY ALL SYNC DEFER_BLOCKING RED"
    " POPC INC RESULT COLLECTIVE DIV REL ABS NOINC NODEC STRONG WEAK GPU CTA SM SYS ADD EXCH CAS"
    " CAST SPIN SUM BYPASS LTC64B LTC128B LTC256B ZFILL 4A RELU U CONV"
)
IGNORED, MODIFIERS = frozenset(WITHOUT_EFFECT.split()), frozenset(HEEDED.split())
MOST_STEPS = 5_000_000  # of a launch: more can only be lanes that wait for others
LANES = 2048  # at once: blocks of a large grid are run in turn


class Grid(Operations):
    """Some blocks of a launch; `issued` counts the warps that issued an instruction, by address
    and block."""

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        blocks: Array,
        memory: ProcessMemory,
        counting: bool = False,
    ) -> None:
        super().__init__(kernel, launch, blocks, memory, counting)
        self.code = kernel.code
        self.places = {i.address: k for k, i in enumerate(self.code)}
        self.steps: list[Callable[[Array], None] | None] = [None] * len(self.code)
        self.groups: dict[int, Array] = {}  # lanes that may go on, by the place in the code
        self.waiting, self.resume = np.zeros(self.lanes, bool), np.zeros(self.lanes, I64)
        # Lanes that may part until they meet: by the name of the meeting the lanes of the warp that
        # are to come, and by place who waits there.
        self.meetings: dict[str, Array] = defaultdict(lambda: np.zeros(self.lanes, U32))
        self.parked: dict[int, tuple[str, Array]] = {}
        self.votes, self.tally = np.zeros(self.lanes, bool), np.zeros(self.lanes, U32)
        self.vote = "OR"
        self.at = 0
        self.straight: dict[tuple[int, int], Array] = defaultdict(self.nothing)
        self.taken = 0

    def nothing(self) -> Array:
        return np.zeros(self.blocks, I64)

    def run(self) -> None:
        self.groups = {0: self.alive.copy()}
        with np.errstate(all="ignore"):
            while self.groups or self.parked:
                if not self.groups:
                    self.give_up()
                self.at = min(self.groups)
                act = self.groups.pop(self.at)
                others = bool(self.groups) or bool(self.parked) or self.waiting.any()
                self.everyone = act if not others else np.zeros(0, bool)
                self.walk(act, min(self.groups, default=len(self.code)))
        if self.waiting.any():
            raise SassError(f"{self.kernel.name}: lanes wait at a barrier that others never reach")

    def walk(self, act: Array, limit: int) -> None:
        """Lets a group go on until it parts, ends, or reaches the next group."""
        start = self.at
        warps = act.reshape(self.blocks, -1, WARP).any(axis=2).sum(axis=1)
        count = np.count_nonzero(act)
        while True:
            if self.at >= limit:
                self.straight[start, self.at] += warps
                self.join(self.at, act)
                return
            i = self.code[self.at]
            now, self.at = self.at, self.at + 1
            lanes = act
            if i.guard:
                passes = self.predicate(i.guard)
                lanes = act & passes
                if not lanes.any():
                    continue
                if np.count_nonzero(lanes) == count:
                    lanes = act
            if (control := CONTROL.get(i.name)) is None:
                step = self.steps[now]
                if step is None:
                    step = self.steps[now] = self.prepare(i)
                step(lanes)
                continue
            together = self.controlled(control, i, lanes, act)
            if together and self.at == now + 1:
                continue
            self.straight[start, now + 1] += warps
            self.taken += now + 1 - start
            if self.taken > MOST_STEPS:
                raise SassError(f"{self.kernel.name} does not end")
            if not together:
                return
            if self.at >= limit:
                self.join(self.at, act)
                return
            start = self.at

    def controlled(
        self, control: Callable[..., bool], i: Instruction, lanes: Array, act: Array
    ) -> bool:
        try:
            return control(self, i, lanes, act)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise self.unsupported(i, error) from error

    def join(self, place: int, act: Array) -> None:
        if act.any():
            known = self.groups.get(place)
            self.groups[place] = act if known is None else known | act

    def prepare(self, i: Instruction) -> Callable[[Array], None]:
        """What an instruction does, as a function of the lanes that do it."""
        if i.name in IGNORED:
            return lambda act: None
        if unknown := i.modifiers - MODIFIERS:
            raise self.unsupported(i, f"the modifier {', '.join(sorted(unknown))} is not supported")
        action: Callable[[Array], None]
        if i.name in FUNCTIONS and i.name != "R2UR":
            action = self.function_of(i)
        else:
            method = getattr(self, f"op_{i.name}", None)
            if method is None:
                raise self.unsupported(i, "this instruction is not supported")

            def action(act: Array) -> None:
                method(i, act)

        def step(act: Array) -> None:
            try:
                action(act)
            except (SassError, KeyError, IndexError, ValueError, TypeError, AttributeError) as e:
                raise self.unsupported(i, e) from e

        return step

    def function_of(self, i: Instruction) -> Callable[[Array], None]:
        kinds, function = FUNCTIONS[i.name]
        if kinds == "wq":
            wide = i.has("S64") or i.has("U64")
        else:
            wide = "F64" in (i.mods[1:] if i.base == "F2F" else i.mods)
        if i.base in ("F2F", "FRND") and i.has("F16"):
            raise self.unsupported(i, "this conversion is not supported")
        kind = kinds[-1] if wide else kinds[0]
        sources, ins, dest = i.sources, i.ins, i.dest
        if dest.is_zero:
            return lambda act: None

        def action(act: Array) -> None:
            inputs = [self.predicate(o) for o in ins]
            self.put(dest, function(i, inputs, *[self.read(kind, o) for o in sources]), act)

        return action

    def unsupported(self, i: Instruction, why: Any) -> SassError:
        return SassError(f"{i.text}, at {i.address:#x} of {self.kernel.name}: {why}")

    @property
    def issued(self) -> dict[int, Array]:
        count: dict[int, Array] = defaultdict(self.nothing)
        for (start, end), warps in self.straight.items():
            for place in range(start, end):
                count[self.code[place].address] += warps
        return count

    # Control: what a group does next. True: all of it goes on at self.at, which may be new; false:
    # its lanes were handed to `join`.

    def go(self, place: int, lanes: Array, act: Array) -> bool:
        """`lanes` of the group jump, the rest goes on."""
        if lanes is act:
            self.at = place
            return True
        self.join(place, lanes)
        self.join(self.at, act & ~lanes)
        return False

    def control_BRA(self, i: Instruction, lanes: Array, act: Array) -> bool:
        if i.has("DIV") or i.has("CONV"):  # for warps whose lanes are apart: here they can
            return True  # shuffle without meeting
        for o in i.all[:-1]:
            if o.is_predicate:
                chosen = lanes & self.predicate(o)
                lanes = lanes if np.array_equal(chosen, lanes) else chosen
        if not lanes.any():
            return True
        return self.go(self.places[i.all[-1].word], lanes, act)

    def control_BRX(self, i: Instruction, lanes: Array, act: Array) -> bool:
        offset = np.zeros(1, I64)
        if i.base == "BRX":
            relative = self.read("w", i.all[1]).view(I32).astype(I64)
            offset = self.code[self.at].address + relative
        targets = np.broadcast_to(self.read("w", i.all[0]).astype(I64) + offset, self.lanes)
        places = np.unique(targets[lanes])
        if places.size == 1 and lanes is act:
            return self.go(self.places[int(places[0])], lanes, act)
        for address in places:
            self.join(self.places[int(address)], lanes & (targets == address))
        self.join(self.at, act & ~lanes)
        return False

    def control_EXIT(self, i: Instruction, lanes: Array, act: Array) -> bool:
        for o in i.all:
            lanes = lanes & self.predicate(o)
        if not lanes.any():
            return True
        self.alive = self.alive & ~lanes
        self.join(self.at, act & ~lanes)
        for place in list(self.parked):
            self.join(place, self.meet(place))
        self.release()
        return False

    def of_warp(self, lanes: Array) -> Array:
        """A bit for each of these lanes, in all lanes of its warp."""
        bits = (lanes.reshape(-1, WARP) << np.arange(WARP, dtype=U32)).sum(axis=1)
        return np.repeat(bits.astype(U32), WARP)

    def control_BSSY(self, i: Instruction, lanes: Array, act: Array) -> bool:
        np.copyto(self.meetings[i.all[0].name], self.of_warp(lanes), where=lanes)
        return True

    def control_BREAK(self, i: Instruction, lanes: Array, act: Array) -> bool:
        meeting = self.meetings[i.all[-1].name]
        meeting &= ~self.of_warp(lanes)
        return True

    def control_BSYNC(self, i: Instruction, lanes: Array, act: Array) -> bool:
        if lanes is self.everyone:
            return True
        name, others = i.all[0].name, self.parked.get(self.at)
        self.parked[self.at] = name, lanes if others is None else lanes | others[1]
        free = self.meet(self.at)
        if lanes is act and np.array_equal(free, lanes):
            return True
        self.join(self.at, free | act & ~lanes)
        return False

    def meet(self, place: int) -> Array:
        """Who waits there no longer: all lanes of the meeting have come, or ended."""
        name, waiting = self.parked.pop(place)
        missing = self.meetings[name] & self.of_warp(self.alive) & ~self.of_warp(waiting)
        free = waiting & (missing == 0)
        if not np.array_equal(free, waiting):
            self.parked[place] = name, waiting & ~free
        return free

    def give_up(self) -> None:
        """Nobody else can go on: those who wait do so in vain."""
        for place, (_, waiting) in self.parked.items():
            self.join(place, waiting)
        self.parked = {}

    def control_BAR(self, i: Instruction, lanes: Array, act: Array) -> bool:
        if i.all and (i.all[0].kind != "immediate" or i.all[0].word):
            raise self.unsupported(i, "only barrier 0 is supported")
        if i.has("RED"):
            np.copyto(self.votes, self.predicate(i.all[-1]), where=lanes)
            self.vote = next(m for m in ("AND", "OR", "POPC") if i.has(m))
        elif not i.has("SYNC"):
            raise self.unsupported(i, "this barrier is not supported")
        if lanes is act is self.everyone:
            self.count_votes(self.alive)
            return True
        self.waiting = self.waiting | lanes
        self.resume[lanes] = self.at
        self.join(self.at, act & ~lanes)
        self.release()
        return False

    def release(self) -> None:
        """Lanes of blocks all of whose threads are at the barrier go on."""
        late = (self.alive & ~self.waiting).reshape(self.blocks, -1).any(axis=1)
        free = self.waiting & ~late.repeat(self.width)
        if not free.any():
            return
        self.waiting = self.waiting & ~free
        self.count_votes(free)
        for place in np.unique(self.resume[free]):
            self.join(int(place), free & (self.resume == place))

    def count_votes(self, free: Array) -> None:
        of_blocks = (self.votes & free).reshape(self.blocks, -1).sum(axis=1)
        if self.vote == "AND":
            of_blocks = of_blocks == free.reshape(self.blocks, -1).sum(axis=1)
        np.copyto(self.tally, of_blocks.astype(U32).repeat(self.width), where=free)

    def op_B2R(self, i: Instruction, act: Array) -> None:
        self.put_with(i, self.tally, [self.tally != 0], act)


CONTROL: dict[str, Callable[..., bool]] = {
    "BRA": Grid.control_BRA,
    "CALL": Grid.control_BRA,
    "BRX": Grid.control_BRX,
    "RET": Grid.control_BRX,
    "EXIT": Grid.control_EXIT,
    "BSSY": Grid.control_BSSY,
    "BREAK": Grid.control_BREAK,
    "BSYNC": Grid.control_BSYNC,
    "BAR": Grid.control_BAR,
}


def run(
    kernel: Kernel, launch: Launch, memory: ProcessMemory, counting: bool = False
) -> list[Grid]:
    """All blocks of a launch, some at once; what they counted."""
    memory.refresh()
    total = int(np.prod(launch.grid))
    at_once = max(1, LANES // int(np.prod(launch.block)))
    done = list[Grid]()
    for first in range(0, total, at_once):
        blocks = np.arange(first, min(first + at_once, total))
        grid = Grid(kernel, launch, blocks, memory, counting)
        grid.run()
        if counting or not done:
            done.append(grid)
    return done
