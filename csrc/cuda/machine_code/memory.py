"""The memory of this process, read and written in vectors: pointers of kernels are real ones."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from listing import SassError

Array = np.ndarray[Any, Any]
BASE = 1 << 16  # nothing is mapped below
END = 1 << 47


class ProcessMemory:
    """Views over the whole address space; an address must be mapped before it is touched."""

    def __init__(self) -> None:
        cells: Any = (ctypes.c_uint8 * (END - BASE)).from_address(BASE)
        everything = np.frombuffer(cells, np.uint8)
        dtypes = (np.uint8, np.uint16, np.uint32, np.uint64)
        self.cells: dict[int, Array] = {1 << k: everything.view(t) for k, t in enumerate(dtypes)}
        self.starts, self.ends = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def refresh(self) -> None:
        """Reads what is mapped; neighbours that are both writable count as one."""
        starts, ends = list[int](), list[int]()
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, rights = line.split()[:2]
                start, end = (int(part, 16) for part in span.split("-"))
                if not rights.startswith("rw") or end > END:
                    continue
                if ends and ends[-1] == start:
                    ends[-1] = end
                else:
                    starts.append(start)
                    ends.append(end)
        self.starts, self.ends = np.array(starts, np.int64), np.array(ends, np.int64)

    def check(self, at: Array, size: int) -> None:
        """Every address lies in one piece of memory, and is a multiple of the size."""
        least, most = int(at.min()), int(at.max())
        for attempt in range(2):
            k = int(np.searchsorted(self.starts, least, "right")) - 1
            if k >= 0 and most + size <= self.ends[k]:
                break
            places = np.searchsorted(self.starts, at, "right") - 1
            wrong = (places < 0) | (at + size > self.ends[places]) if self.ends.size else at >= 0
            if not wrong.any():
                break
            if attempt:
                raise SassError(f"nothing is mapped at {int(at[wrong][0]):#x}")
            self.refresh()
        if (at & (size - 1)).any():
            raise SassError(
                f"{int(at[(at & (size - 1)) != 0][0]):#x} is misaligned for {size} bytes"
            )
