"""Checkpoints that would run code, fill memory or crash the process if something in them were used.

Each payload would make the file `marker`.
"""

from __future__ import annotations

import builtins
import collections
import functools
import io
import operator
import os
import pathlib
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Calls:
    """Calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self._made = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made


def _opcodes(*lines: str) -> bytes:
    """A pickle of protocol 0."""
    return "\n".join(lines).encode()


def objects(marker: Path) -> dict[str, Any]:
    """Payloads that torch.save can write."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    inner = pickle.dumps(Calls(os.system, command))
    storage = torch.zeros(4).untyped_storage()
    return {
        "os.system": Calls(os.system, command),
        "os.popen": Calls(os.popen, command),
        "subprocess.Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "subprocess.check_output": Calls(subprocess.check_output, ["touch", str(marker)]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(marker), "w"),
        "shutil.copy": Calls(shutil.copy, __file__, str(marker)),
        "os.mkdir": Calls(os.mkdir, str(marker)),
        "Path.touch": Calls(pathlib.Path.touch, marker),
        "getattr": Calls(getattr, Calls(builtins.__import__, "os"), "system"),
        "functools.partial": Calls(functools.partial, os.system, command),
        "functools.reduce": Calls(functools.reduce, os.system, [command], 0),
        "operator.methodcaller": Calls(operator.methodcaller("touch"), marker),
        "map": Calls(list, Calls(map, os.system, [command])),
        "pickle.loads": Calls(pickle.loads, inner),
        "torch.load": Calls(torch.load, io.BytesIO(inner)),
        "torch.hub.load": Calls(torch.hub.load, str(marker.parent), "model"),
        "torch.jit.load": Calls(torch.jit.load, str(marker)),
        "torch.save": Calls(torch.save, 1, str(marker)),
        "torch.Tensor.numpy": Calls(torch.Tensor.numpy, torch.zeros(1)),
        "torch.from_file": Calls(torch.from_file, str(marker), True, 10),
        "torch.UntypedStorage.from_file": Calls(
            torch.UntypedStorage.from_file, str(marker), True, 10
        ),
        "torch.cuda.init": Calls(torch.cuda.init),
        "torch.nn.Module": torch.nn.Linear(1, 1),
        "numpy.memmap": Calls(np.memmap, str(marker), "u1", "w+", 0, (4,)),
        "numpy.load": Calls(np.load, str(marker), None, True),
        "numpy.save": Calls(np.save, str(marker), np.zeros(1)),
        "numpy.objects": np.array([Calls(os.system, command)], dtype=object),
        "setstate": Calls(collections.OrderedDict, state={"__class__": Calls(os.system, command)}),
        "hooks": Calls(
            *(torch._utils._rebuild_tensor_v2, storage, 0, (4,), (1,), False),
            collections.OrderedDict({0: Calls(os.system, command)}),
        ),
        "type_v2": Calls(
            *(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (command,), {})
        ),
        "defaultdict": collections.defaultdict(list, a=Calls(os.system, command)),
        "deque": collections.deque([Calls(os.system, command)]),
        "key": {Calls(eval, code): 1},
    }


def streams(marker: Path) -> dict[str, bytes]:
    """Pickles as bytes, of what no pickler writes."""
    command = f"touch {marker}"
    return {
        "GLOBAL": _opcodes("cos", "system", f"(S'{command}'", "tR."),
        "posix": _opcodes("cposix", "system", f"(S'{command}'", "tR."),
        "INST": _opcodes(f"(S'{command}'", "ios", "system", "."),
        "OBJ": _opcodes("(cos", "system", f"S'{command}'", "o."),
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x01x\x85R.",
        "builtins": _opcodes("cbuiltins", "exec", f"(S'open({str(marker)!r}, \"w\")'", "tR."),
        "__builtin__": _opcodes("c__builtin__", "eval", f"(S'open({str(marker)!r}, \"w\")'", "tR."),
        "EXT": b"\x80\x02\x82\x01.",
        "PERSID": _opcodes(f"P{command}", "."),
        "BINPERSID": b"\x80\x02(X\x07\0\0\0storagecos\nsystem\n"
        + b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ.",
        "BUILD": _opcodes("ctorch", "Tensor", "(tR(S'__class__'", "cos", "system", "db."),
        "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
        "laughs": b"\x80\x02}X\x01\0\0\0aK\x01" + b"".join(map(_twice, range(60))) + b"s.",
        "cycle": b"\x80\x02}q\0X\x01\0\0\0ah\0s.",
        "depth": b"\x80\x02}X\x01\0\0\0a" + b"]" * 100_000 + b"a" * 99_999 + b"s.",
        "bytearray": b"\x80\x02}X\x01\0\0\0ac__builtin__\nbytearray\n"
        + b"\x8a\x06\0\0\0\0\0\x40\x85Rs.",
        "size": b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "rubbish": b"\x80\x02" + bytes(range(256)),
        "no end": b"\x80\x02}q\0",
        "numpy.pointers": _numpy_scalar(b"O8"),
        "numpy.pointer in a record": _numpy_scalar(b"f8,O"),
        "numpy.size": _numpy_scalar(b"f8", 2**31 - 1),
        "numpy.no size": _numpy_scalar(b"f8", -1),
        "numpy.text": _numpy_scalar(b"S1000000000"),
        "numpy.array": _numpy_scalar(b"(1000000,1000000)f8"),
    }


def _twice(number: int) -> bytes:
    """Puts what is on the stack into a pair, twice."""
    memo = bytes([number])
    return b"q" + memo + b"h" + memo + b"\x86"


def _numpy_scalar(kind: bytes, size: int | None = None) -> bytes:
    """A number of a type whose description is false, or whose bytes would be a pointer.

    size: of an element, as a pickled state says it.
    """
    made = b"cnumpy\ndtype\n(X" + len(kind).to_bytes(4, "little") + kind + b"\x89\x88tR"
    if size is not None:
        made += b"(K\x03X\x01\0\0\0<NNNJ" + size.to_bytes(4, "little", signed=True)
        made += b"J\xff\xff\xff\xffK\0tb"
    text = b"X\x10\0\0\0" + b"A" * 16 + b"X\x06\0\0\0latin1"
    data = b"c_codecs\nencode\n(" + text + b"tR"
    value = b"cnumpy.core.multiarray\nscalar\n(" + made + data + b"tR"
    return b"\x80\x02}X\x01\0\0\0a" + value + b"s."


def tensors() -> dict[str, Any]:
    """Weights that are no plain tensors, or of which the file has less than they say."""
    few = torch.zeros(1)
    return {
        "expanded": few.expand(2**40),
        "meta": torch.zeros(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(few, 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([few, torch.zeros(2)]),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "bool": torch.zeros(3, dtype=torch.bool),
        "float8": torch.zeros(3).to(torch.float8_e5m2),
        "none": torch.zeros(0),
        "scalar": torch.zeros(()),
        "negative": Calls(torch._utils._rebuild_tensor_v2, few.untyped_storage(), -9, (4,), (1,)),
        "outside": Calls(
            *(torch._utils._rebuild_tensor_v2, few.untyped_storage(), 0, (4000,), (1000,)),
            *(False, collections.OrderedDict()),
        ),
        "parameter": torch.nn.Parameter(few),
        "gradient": few.clone().requires_grad_(),
    }


# The containers.


def as_archive(path: Path, content: Any) -> None:
    torch.save(content, path)


def as_legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


def as_tar(path: Path, content: Any) -> None:
    """Of the first releases of torch: a pickle each of storages, tensors and the content."""
    with tarfile.open(path, "w") as archive:
        for name, each in (("storages", 0), ("tensors", 0), ("pickle", content)):
            data = pickle.dumps(each)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def put_in_archive(path: Path, stream: bytes, member: str = "data.pkl") -> None:
    """In the place of a genuine archive's own pickle."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    top = next(iter(members)).split("/")[0]
    members[f"{top}/{member}"] = stream
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in members.items():
            new.writestr(name, content)


CONTAINERS: dict[str, Callable[[Path, Any], None]] = {
    "archive": as_archive,
    "legacy": as_legacy,
    "pickle": as_pickle,
    "tar": as_tar,
}
