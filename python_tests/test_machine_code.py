"""The interpreter of CUDA machine code (csrc/cuda/machine_code) on a kernel of its own."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "csrc" / "cuda" / "machine_code"
SOURCE = """
struct Arguments { const float* in; float* out; unsigned* count; int n; };

__global__ void sums(Arguments a) {
  __shared__ float part[8];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += gridDim.x * blockDim.x)
    sum += a.in[i] * a.in[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  if (__syncthreads_or(sum < 0)) return;
  if (threadIdx.x < 8) atomicMax(a.count, __float_as_uint(part[threadIdx.x]));
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < 8; ++warp) part[0] += part[warp];
    a.out[blockIdx.x] = part[0];
  }
}

__global__ void touch(Arguments a) { a.out[a.n] = 1; }
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    sys.path.append(str(FOLDER))
    import cubins

    if cubins.tool("cuobjdump") is None or cubins.tool("nvdisasm") is None:
        pytest.skip("no cuobjdump or nvdisasm: make cuda-machine-code installs them")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "sums.cu").write_text(SOURCE)
    cubin = folder / "sums.cubin"
    command = ["nvcc", "-arch=sm_90", "-cubin", "-o", str(cubin), str(folder / "sums.cu")]
    subprocess.run(command, check=True, capture_output=True)
    return cubins.kernels_of(cubin, "sums")


def execute(kernels: Any, name: str, blocks: int, *arguments: Any) -> Any:
    import interpreter
    import memory
    import state

    packed = struct.pack("<3Qi4x", *arguments)
    launch = state.Launch(f"sums: {name}", (blocks, 1, 1), (256, 1, 1), 0, packed)
    return interpreter.run(kernels[launch.kernel], launch, memory.ProcessMemory(), counting=True)


def test_a_kernel_gives_what_it_should(kernels: Any) -> None:
    given = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    sums, most = np.zeros(3, np.float32), np.zeros(1, np.uint32)
    pointers = (array.ctypes.data for array in (given, sums, most))
    (grid,) = execute(kernels, "sums", 3, *pointers, given.size)
    np.testing.assert_allclose(sums.sum(), (given.astype(np.float64) ** 2).sum(), rtol=1e-6)
    assert 0 < most.view(np.float32)[0] < sums.max()

    loads = [i.address for i in grid.kernel.code if i.base == "LDG"]
    issued = sum(int(grid.issued[address].sum()) for address in loads)
    assert issued >= -(-given.size // 32)
    assert sum(grid.cost[address] for address in loads) >= given.nbytes // 32


def test_an_address_that_is_not_mapped_is_named(kernels: Any) -> None:
    import listing

    with pytest.raises(listing.SassError, match=r"STG.*nothing is mapped at 0x20000"):
        execute(kernels, "touch", 1, 0, 0x20000, 0, 0)
