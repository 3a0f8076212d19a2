"""Ways to spoil a file: its bytes, its structure, and what stands in its place."""

from __future__ import annotations

import builtins
import csv
import gzip
import io
import json
import math
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

# Returns the path if the file has another one now.
Mutation = Callable[[random.Random, Path], Path | None]

NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 255, 2**15, 2**31 - 1, -(2**31), 2**63, 10**30, -0.5, 0.5, 1.5),
    *(1e-300, 1e38, 1e300, math.nan, math.inf, -math.inf),
)
# In names of files, cases and classes; all but the last are valid UTF-8.
ODD_NAMES = (
    *("new\nline", "tab\ttab", "'single'", '"double"', "-dash", "--help", "a,b;c", "50%", "%s%n"),
    *("{}", "{0.__class__}", "[bold]", "[/]", "[link=x]y", "<script>alert(1)</script>", "a b"),
    *(
        "<img src=x onerror=alert(1)>",
        "&amp;",
        "\u00e9\u00e8",
        "e\u0301",
        "\u6f22\u5b57",
        "\u202egnp",
    ),
    *("\N{BRAIN}", "$(touch RAN)", "`touch RAN`", "=cmd()", "\x1b[31mred", "\x7f", "*", "?", "~"),
    *("a" * 120, "CON", "..x", "x.", "\u2028", "{{ 7 * 7 }}", "#", "a:b", "nan", "null", "mean"),
    *("case", "step", "\ufeffbom", "\udcff\udcfe"),
)
TEXTS = ("", " ", "x", "\0", "a\0b", "../../up", "/", ".", "\ud800", "y" * 5000, "1e400", "$1+1")
VALUES: tuple[Any, ...] = (
    *(None, True, False, *NUMBERS, *TEXTS, *ODD_NAMES),
    *([], {}, [[]], [None], [1, "a"], {"a": 1}, {"": None}, {"0": 0}, [1] * 40, [math.nan] * 3),
    *(["a", "a"], [["a"]], {"a": {"a": {"a": []}}}, [-1, 2, 3], [0, 0, 0], [10**9] * 3),
)


# Bytes.


def truncated(pick: random.Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: pick.choice((pick.randrange(len(content)), 1, 3, 100, -1))])


def emptied(pick: random.Random, path: Path) -> None:
    path.write_bytes(b"")


def bits_flipped(pick: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(pick.choice((1, 1, 3, 30))):
        # Headers are short, and at the start.
        end = pick.choice((len(content), min(400, len(content))))
        content[pick.randrange(end)] ^= 1 << pick.randrange(8)
    path.write_bytes(content)


def bytes_replaced(pick: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(pick.choice((1, 2, 16))):
        content[pick.randrange(len(content))] = pick.choice((0, 10, 34, 127, 128, 255))
    path.write_bytes(content)


def bytes_inserted(pick: random.Random, path: Path) -> None:
    content, at = path.read_bytes(), pick.randrange(path.stat().st_size + 1)
    path.write_bytes(content[:at] + pick.randbytes(pick.choice((1, 4, 64))) + content[at:])


def bytes_removed(pick: random.Random, path: Path) -> None:
    content, at = path.read_bytes(), pick.randrange(path.stat().st_size)
    path.write_bytes(content[:at] + content[at + pick.choice((1, 4, 64)) :])


def part_doubled(pick: random.Random, path: Path) -> None:
    content, at = path.read_bytes(), pick.randrange(path.stat().st_size)
    path.write_bytes(content[: at + 200] + content[at:])


def part_zeroed(pick: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    at, count = pick.randrange(len(content)), pick.choice((4, 64, 4096))
    content[at : at + count] = bytes(len(content[at : at + count]))
    path.write_bytes(content)


def noise(pick: random.Random, path: Path) -> None:
    path.write_bytes(pick.randbytes(pick.choice((1, 10, 352, 5000))))


def of_another_kind(pick: random.Random, path: Path) -> None:
    starts = (b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\x1f\x8b\x08\0", b"%PDF-1.4", b"\x80\x02}q\0.")
    path.write_bytes(pick.choice((*starts, b"{}", b"no image", b"\xef\xbb\xbf", b"BZh9")) * 40)


BYTES: tuple[Mutation, ...] = (
    *(truncated, truncated, emptied, bits_flipped, bits_flipped, bytes_replaced, bytes_inserted),
    *(bytes_removed, part_doubled, part_zeroed, noise, of_another_kind),
)


# What stands in the place of the file.


def missing(pick: random.Random, path: Path) -> None:
    path.unlink()


def folder(pick: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling_link(pick: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(pick.choice(("nowhere", "/nowhere/at/all", "x" * 255)))


def circular_link(pick: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def fifo(pick: random.Random, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(pick: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(pick.choice(("/dev/zero", "/dev/null", "/dev/random", "/proc/self/mem")))


def linked(pick: random.Random, path: Path) -> None:
    """Harmless."""
    there = path.with_name(f"there-{path.name}.moved")
    path.rename(there)
    path.symlink_to(there.name)


PLACES: tuple[Mutation, ...] = (
    *(missing, folder, dangling_link, circular_link, fifo, device, linked),
)


# Images.


def voxels_or_header(pick: random.Random, path: Path) -> None:
    """A change within a compressed file; in others, as it is."""
    change = pick.choice(BYTES)
    if not path.name.endswith(("gz", ".mgz")):
        change(pick, path)
        return
    path.write_bytes(gzip.decompress(path.read_bytes()))
    change(pick, path)
    path.write_bytes(gzip.compress(path.read_bytes(), 1))


def header_field(pick: random.Random, path: Path) -> None:
    """One to three fields of the header."""
    content = path.read_bytes()
    is_packed = content[:2] == b"\x1f\x8b"
    raw = bytearray(gzip.decompress(content) if is_packed else content)
    image: Any = nib.load(path, mmap=False)
    kind = image.header.structarr.dtype if hasattr(image.header, "structarr") else None
    assert kind is not None
    names = (*kind.names, *("dim", "pixdim", "dims", "datatype", "bitpix", "vox_offset", "magic"))
    names += (
        "srow_x",
        "srow_y",
        "qform_code",
        "sform_code",
        "scl_slope",
        "scl_inter",
        "sizeof_hdr",
    )
    for name in pick.sample([n for n in names if n in kind.names], pick.choice((1, 1, 2, 3))):
        dtype, offset = kind.fields[name][:2]
        base, count = dtype.base, int(np.prod(dtype.shape, dtype=int))
        at = offset + pick.randrange(count) * base.itemsize
        with np.errstate(all="ignore"):
            if base.kind in "iu":
                span = np.iinfo(base)
                number = pick.choice((*NUMBERS[:11], span.max, span.min, pick.randrange(100)))
                value = np.array(max(span.min, min(span.max, int(number))), base).tobytes()
            elif base.kind == "f":
                value = np.array(float(pick.choice(NUMBERS)), base).tobytes()
            else:
                value = pick.randbytes(base.itemsize)
        raw[at : at + base.itemsize] = value
    path.write_bytes(gzip.compress(raw, 1) if is_packed else bytes(raw))


def affine(pick: random.Random, path: Path) -> None:
    """A NIfTI or MGH file with another affine, written by nibabel as far as it can be."""
    image: Any = nib.load(path, mmap=False)
    made = np.array(image.affine)
    for _ in range(pick.choice((1, 3, 12))):
        made[pick.randrange(3), pick.randrange(4)] = pick.choice((*NUMBERS[-10:], 0.0, 1e-20))
    with np.errstate(all="ignore"), suppress(Exception):
        changed = type(image)(np.asanyarray(image.dataobj), made, image.header)
        changed.to_filename(path)


def voxels(pick: random.Random, path: Path) -> None:
    """Other values, types and numbers of axes; some of them are legitimate."""
    image: Any = nib.load(path, mmap=False)
    values = np.array(image.dataobj)
    change = pick.choice(("nan", "inf", "huge", "type", "axes", "small", "constant", "half"))
    if change in ("nan", "inf", "huge", "half"):
        values = values.astype(np.float64 if change == "huge" else np.float32)
        odd = {"nan": np.nan, "inf": np.inf, "huge": 1e300, "half": 0.5}[change]
        values.flat[pick.randrange(values.size)] = odd
    elif change == "type":
        kind = pick.choice(("u1", "i2", "f4", "f8", "c8", "c16", "i4", "u2", "i8", "u8", "f16"))
        values = values.astype(np.dtype(kind))
    elif change == "axes":
        shapes = ((*values.shape, 1), (*values.shape[:2], -1, 1, 1), (-1,), (*values.shape[:1], -1))
        values = values.reshape(pick.choice(shapes))
    elif change == "small":
        values = values[: pick.choice((0, 1, 2)), :, : pick.choice((1, 3))]
    else:
        values[:] = pick.choice((0, 1, 200))
    with suppress(Exception):
        type(image)(values, image.affine).to_filename(path)


def gzip_stream(pick: random.Random, path: Path) -> None:
    """Checksums, concatenated members, rubbish behind them, other compression."""
    content = path.read_bytes()
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    half = len(plain) // 2
    path.write_bytes(
        pick.choice(
            (
                content[:-8] + pick.randbytes(8),
                content[:-4] + struct.pack("<I", pick.choice((0, 1, 2**32 - 1))),
                content + b"rubbish",
                content * 2,
                gzip.compress(plain[:half]) + gzip.compress(plain[half:]),
                gzip.compress(content),
                zlib.compress(plain),
                content[:3] + b"\xff" + content[4:],
                plain,
            )
        )
    )


def bomb(pick: random.Random, path: Path) -> None:
    """A small compressed file of up to a gigabyte; the header may declare that it is needed."""
    plain = bytearray(path.read_bytes())
    if plain[:2] == b"\x1f\x8b":
        plain = bytearray(gzip.decompress(bytes(plain)))
    if pick.random() < 0.7 and plain[344:347] == b"n+1":
        size = pick.choice((700, 1290, 5000, 32767))
        struct.pack_into("<8h", plain, 40, 3, size, size, size, 1, 1, 1, 1)
    path.write_bytes(gzip.compress(bytes(plain), 1) + _zeros())


_ZEROS: list[bytes] = []


def _zeros() -> bytes:
    """Members of 64 MB of zeros: 1 GB."""
    if not _ZEROS:
        _ZEROS.append(gzip.compress(bytes(2**26), 9) * 16)
    return _ZEROS[0]


IMAGES: tuple[Mutation, ...] = (
    *(header_field, header_field, header_field, header_field, affine, affine, voxels, voxels),
    *(voxels_or_header, voxels_or_header, gzip_stream, *BYTES, *PLACES),
)


# Text with a structure.


def value_replaced(pick: random.Random, path: Path) -> None:
    """Another value at some key of a JSON or YAML file, or the key removed, renamed, repeated."""
    text = path.read_text()
    is_yaml = path.suffix in (".yaml", ".yml")
    content = yaml.safe_load(text) if is_yaml else json.loads(text)
    content = changed(pick, content)
    if is_yaml:
        path.write_bytes(yaml.safe_dump(content).encode("utf-8", "surrogatepass"))
    else:
        text = json.dumps(content, ensure_ascii=pick.random() < 0.5)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))


def changed(pick: random.Random, content: Any, values: tuple[Any, ...] = VALUES) -> Any:
    """`content` with one to three changes, anywhere."""
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        spots = [*_spots(content)]
        if not spots or pick.random() < 0.03:
            return pick.choice(values)
        above, key = pick.choice(spots)
        what = pick.random()
        if what < 0.7:
            above[key] = pick.choice(values)
        elif what < 0.8:
            del above[key]
        elif isinstance(above, dict):
            above[pick.choice((str(key) + "x", "", *ODD_NAMES[:20]))] = above.pop(key)
        else:
            above.append(above[key])
    return content


def _spots(content: Any) -> Iterator[tuple[Any, Any]]:
    keys = (
        [*content]
        if isinstance(content, dict)
        else range(len(content))
        if isinstance(content, list)
        else ()
    )
    for key in keys:
        yield content, key
        yield from _spots(content[key])


def laughs(pick: random.Random, path: Path) -> None:
    """Aliases of aliases: a kilobyte that says 10 ** 12 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    text = "\n".join(lines) + "\n"
    path.write_text(pick.choice((text, text + path.read_text())))


def deep(pick: random.Random, path: Path) -> None:
    depth = pick.choice((60, 1000, 100_000))
    start, end = pick.choice((("[", "]"), ('{"a": ', "}")))
    nested = start * depth + pick.choice(("", "1")) * (start != "[") + end * depth
    text = path.read_text()
    path.write_text(pick.choice((nested, text.replace(":", f": {nested}, ", 1), text + nested)))


def text_damaged(pick: random.Random, path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    at = pick.randrange(len(lines))
    name = pick.choice(ODD_NAMES[:-1])
    changes: list[Callable[[], bytes]] = [
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-32"),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.replace("a", "\u00e9").encode("latin-1", "replace"),
        lambda: text.replace(pick.choice(text), "\0", 1).encode(),
        lambda: text.replace(pick.choice(text), name).encode(),
        lambda: text.replace("\n", "\r\n").encode(),
        lambda: text.replace("\n", "\r").encode(),
        lambda: "\n".join([*lines[:at], *lines[at + 1 :]]).encode(),
        lambda: "\n".join([*lines[:at], lines[at], *lines[at:]]).encode(),
        lambda: "\n".join([*lines[:at], name, *lines[at:]]).encode(),
        lambda: (text + "x" * 300_000).encode(),
        lambda: (text + '"' + "x," * 100_000).encode(),
        lambda: text.replace("1", "9" * 5000, 1).encode(),
        lambda: text.replace("0", pick.choice(("NaN", "Infinity", "1e999", "0x", "-"))).encode(),
        lambda: (text + "\n" * 5000).encode(),
        lambda: text.replace(":", ": !!python/object/apply:os.system ['touch RAN'] #", 1).encode(),
        lambda: (text + "\n? [a, {b: c}]\n: 1\n2020-13-45: 2020-02-30\n").encode(),
        lambda: text.replace("{", "[", 1).encode(),
        lambda: (text + "\n---\n" + text).encode(),
    ]
    path.write_bytes(pick.choice(changes)())


TEXT: tuple[Mutation, ...] = (*(text_damaged,) * 6, *BYTES, *PLACES)
STRUCTURED: tuple[Mutation, ...] = (*(value_replaced,) * 24, *TEXT, deep, deep)
YAML: tuple[Mutation, ...] = (*STRUCTURED, laughs, laughs)


def cell_replaced(pick: random.Random, path: Path) -> None:
    text = path.read_text()
    mark = "\t" if path.suffix == ".tsv" else ","
    rows = [*csv.reader(text.splitlines(), delimiter=mark)]
    for _ in range(pick.choice((1, 1, 3))):
        row = pick.choice(rows)
        what, odd = pick.random(), str(pick.choice((*NUMBERS, *ODD_NAMES[:-1], *TEXTS[:8])))
        if what < 0.6 and row:
            row[pick.randrange(len(row))] = odd
        elif what < 0.7:
            row.append(odd)
        elif what < 0.8 and row:
            row.pop()
        elif what < 0.9 and len(rows) > 1:
            rows.remove(row)
        else:
            rows.append([*row])
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=mark).writerows(rows)


TABLES: tuple[Mutation, ...] = (*(cell_replaced,) * 12, *TEXT)


# Archives of torch.


def archive(pick: random.Random, path: Path) -> None:
    """Members lost, renamed, doubled, compressed, or far larger than the file."""
    with zipfile.ZipFile(path) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    name, content = members[at := pick.randrange(len(members))]
    what = pick.choice(("lost", "renamed", "doubled", "packed", "bomb", "shorter", "longer"))
    how = zipfile.ZIP_STORED
    if what == "lost":
        del members[at]
    elif what == "renamed":
        members[at] = (pick.choice(("../../RAN", "/RAN", name + "x", "x/" + name)), content)
    elif what == "doubled":
        members.append((name, content[::-1]))
    elif what == "shorter":
        members[at] = (name, content[: len(content) // 2])
    elif what == "longer":
        members[at] = (name, content * 3)
    else:
        how = zipfile.ZIP_DEFLATED
        members[at] = (name, content if what == "packed" else bytes(2**30))
    with zipfile.ZipFile(path, "w", how, compresslevel=1) as new:
        for name, content in members:
            new.writestr(name, content)


# Files that change while they are read.


@contextmanager
def changes_while_read(pick: random.Random, path: Path) -> Iterator[None]:
    """Cut, replaced or removed just before or after one of the first times it is opened."""
    real, at, seen = builtins.open, pick.choice((1, 1, 2, 3)), 0
    early, what = pick.random() < 0.5, pick.choice((truncated, emptied, missing, bits_flipped))

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        nonlocal seen
        mine = isinstance(file, (str, Path)) and str(file) == str(path) and "r" in mode
        seen += mine
        if mine and early and seen == at:
            with restored(), suppress(OSError):
                what(pick, path)
        found = real(file, mode, *rest, **options)
        if mine and not early and seen == at:
            with restored(), suppress(OSError):
                what(pick, path)
        return found

    @contextmanager
    def restored() -> Iterator[None]:
        builtins.open = io.open = real
        try:
            yield
        finally:
            builtins.open = io.open = opened  # type: ignore[assignment]

    builtins.open = io.open = opened  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.open = io.open = real
