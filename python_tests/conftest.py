from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda-on-host",
        action="store_true",
        help="run the CUDA kernels on CPU tensors in the place of the CPU kernels",
    )


LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # counts what -k and -m have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU are none where there is no GPU: skips would bury the others."""
    if torch.cuda.is_available():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("cuda")]
    config.stash[LEFT_OUT] = len(needs_gpu)
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    count = config.stash.get(LEFT_OUT, 0)
    return [f"{count} left out: they need a GPU, and torch sees none"] if count else []


@pytest.fixture(scope="session", autouse=True)
def _cuda_on_host(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--cuda-on-host"):
        yield
        return
    import cuda_on_host

    cuda_on_host.load(cuda_on_host.library())
    with cuda_on_host.in_place_of_the_cpu_kernels():
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small cases for the driver, which no test writes to."""
    from finetune_data import write_cases

    folder = tmp_path_factory.mktemp("data")
    write_cases(folder, 5)
    return folder


@pytest.fixture(scope="session")
def turned_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored as P, S, L with voxels of 1.5 x 1 x 2 mm: nothing is right by chance."""
    from finetune_data import TURNED, write_cases

    folder = tmp_path_factory.mktemp("turned")
    write_cases(folder, 4, affine=TURNED, shape=(20, 10, 24))
    return folder


@pytest.fixture(scope="session")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model of `root` with its classes merged; to be read alone."""
    from finetune_data import train_source

    return train_source(root, tmp_path_factory.mktemp("source") / "run", 30, lr=0.02)


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Path:
    """The file of a quick run into the folder `out` beside it."""
    from finetune_data import settings, write_config

    return write_config(tmp_path / "run.yaml", settings(root, tmp_path / "out"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not _has_cuda_ops():
        pytest.skip("riskmap_ext was built without its CUDA operators")
    return torch.device(request.param)


@pytest.fixture
def cuda_kernels(request: pytest.FixtureRequest, device: torch.device) -> None:
    """For what they do otherwise than the CPU kernels."""
    if device.type == "cpu" and not request.config.getoption("--cuda-on-host"):
        pytest.skip("of the CUDA kernels alone: make cuda-on-host, or a GPU")


@pytest.fixture
def cpu_kernels(request: pytest.FixtureRequest, device: torch.device) -> None:
    """For what the CUDA kernels do otherwise."""
    if device.type != "cpu" or request.config.getoption("--cuda-on-host"):
        pytest.skip("of the CPU kernels alone: test_cuda_bad_values has the counterpart")


def _has_cuda_ops() -> bool:
    import riskmap_ext  # noqa: F401  (registers the operators)

    name = "riskmap_ext::weighted_loss"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For runs that are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Puts torch's number of threads back after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def riskmap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns exit code, standard output and error."""
    from riskmap_ext.finetune import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["riskmap", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return call
