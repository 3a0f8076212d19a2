"""The machine code in the objects of a CMake build of the CUDA library."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from listing import Kernel
from names import readable

ARCHITECTURE = "sm_90"


def tool(name: str) -> Path | None:
    """A tool of the toolkit: on PATH, or of the Python package that brings it."""
    if found := shutil.which(name):
        return Path(found)
    for folder in sys.path:
        for place in sorted(Path(folder).glob(f"nvidia/*/bin/{name}")):
            return place
    return None


def objects(build: Path) -> list[Path]:
    """Of every .cu file of the build."""
    entries = json.loads((build / "compile_commands.json").read_text())
    return [
        Path(entry["directory"]) / entry["output"]
        for entry in entries
        if entry["file"].endswith(".cu")
    ]


def cuobjdump(*options: str | Path, folder: Path | None = None) -> str:
    program, disassembler = tool("cuobjdump"), tool("nvdisasm")
    if program is None or disassembler is None:
        sys.exit("cuobjdump or nvdisasm is not installed")
    path = os.pathsep.join([str(disassembler.parent), os.environ["PATH"]])
    done = subprocess.run(
        [program, *options], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"cuobjdump {' '.join(map(str, options))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def kernels_of(path: Path, prefix: str) -> dict[str, Kernel]:
    """By `file: name`, of an object or a cubin; what cuobjdump says is kept beside it."""
    kept = path.with_suffix(path.suffix + f".{ARCHITECTURE}.json")
    if not kept.exists() or kept.stat().st_mtime < path.stat().st_mtime:
        text = json.dumps(disassembled(path))
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, kept)
    parts = json.loads(kept.read_text())
    found = {}
    for short, part in zip(readable(list(parts)), parts.items(), strict=True):
        mangled, (listing, banks, resources) = part
        constants = {int(bank): bytes.fromhex(data) for bank, data in banks.items()}
        name = f"{prefix}: {short}"
        found[name] = Kernel(name, mangled, listing, constants, resources)
    return found


Part = tuple[str, dict[int, str], dict[str, int]]  # listing, constant banks, resources


def disassembled(path: Path) -> dict[str, Part]:
    path = path.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if path.suffix == ".cubin":
            cubin = path
        else:
            cuobjdump("-xelf", ARCHITECTURE, path, folder=folder)
            cubin = next(folder.glob("*.cubin"))
        sections = elf_sections(cubin.read_bytes())
        sass = cuobjdump("-sass", cubin)
        usage = re.findall(r"Function (\S+):\s+(.*)", cuobjdump("-res-usage", cubin))
    resources = {
        mangled: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        for mangled, text in usage
    }
    pattern = r"Function : (\S+)\n(.*?)(?=\n\t\tFunction :|\Z)"
    found: dict[str, Part] = {}
    for mangled, listing in re.findall(pattern, sass, re.DOTALL):
        names = {bank: f".nv.constant{bank}.{mangled}" for bank in range(8)}
        banks = {bank: sections[name].hex() for bank, name in names.items() if name in sections}
        listing = re.sub(r" */\* 0x\w+ \*/", "", listing)
        found[mangled] = (listing, banks, resources[mangled])
    return found


def elf_sections(data: bytes) -> dict[str, bytes]:
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, start + k * size) for k in range(count)]
    texts = [
        data[headers[names][4] + header[0] :].split(b"\0", 1)[0].decode() for header in headers
    ]
    return {
        text: data[header[4] : header[4] + header[5]]
        for text, header in zip(texts, headers, strict=True)
    }


def load(build: Path) -> dict[str, Kernel]:
    paths = objects(build)
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda path: kernels_of(path, path.name.split(".")[0]), paths)
    return {name: kernel for part in parts for name, kernel in part.items()}
