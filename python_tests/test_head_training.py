"""Training with a fused head: autocast, compile, checkpointing, several processes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import grad_of
from head_net import CLASSES, LOSS, Net, assert_same_step, data, fused, gradients, net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from riskmap_ext.nn import DeferredLogits, FusedHead, fuse_head


def test_an_optimizer_of_before_still_trains() -> None:
    image, label = data()
    networks = [net(), net()]
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in networks]
    assert fuse_head(networks[0], example_input=image) == ["head"]
    for _ in range(3):
        assert_same_step(networks[0], networks[1], image, label)
        for optimizer in optimizers:
            optimizer.step()
    weights = [each.state_dict()["head.weight"] for each in networks]
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], net().state_dict()["head.weight"])
    networks[0].load_state_dict(networks[1].state_dict())


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    """Whether the loss is within autocast, too, or not."""
    image, label = data(3)
    network = net(3)
    mine = fused(network, image).train()
    each: Any
    for each in (mine, network):
        with torch.autocast("cpu", torch.bfloat16):
            given = each(image)
            loss = LOSS(given, label) if inside else None
        if each is mine:
            assert {part.dtype for part in given.parts} == {torch.bfloat16}
        loss = LOSS(given, label) if loss is None else loss
        loss.backward()
        assert grad_of(each.head.weight).dtype == torch.float32
    for name, expected in gradients(network).items():
        found = gradients(mine)[name]
        assert found is not None
        assert expected is not None
        assert float((found - expected).norm()) <= 0.02 * float(expected.norm()), name


def test_float64_stays_under_autocast() -> None:
    head = FusedHead(nn.Conv2d(6, CLASSES, 1).double())
    with torch.autocast("cpu", torch.bfloat16):
        given = head(torch.randn(1, 6, 4, 4, dtype=torch.float64))
    assert {part.dtype for part in given.parts} == {torch.float64}


def test_fused_between_compile_and_the_first_call() -> None:
    """nnU-Net wraps first."""
    image, _ = data()
    network = net().train()
    compiled: Any = torch.compile(network, backend="aot_eager", fullgraph=True)
    fuse_head(compiled._orig_mod, example_input=image)
    assert isinstance(compiled(image), DeferredLogits)


@pytest.mark.parametrize("together", [True, False], ids=["one graph", "two graphs"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, together: bool) -> None:
    image, label = data()
    network = net()
    mine = fused(network, image).train()
    options: dict[str, Any] = {"fullgraph": True, "backend": backend}
    torch._dynamo.reset()
    if together:
        loss = torch.compile(lambda x, y: LOSS(mine(x), y), **options)(image, label)
    else:
        given = torch.compile(mine, **options)(image)
        assert isinstance(given, DeferredLogits)
        loss = torch.compile(LOSS, **options)(given, label)
    loss.backward()
    LOSS(network(image), label).backward()
    for name, expected in gradients(network).items():
        torch.testing.assert_close(gradients(mine)[name], expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        compiled = torch.compile(mine.eval(), **options)(image)
    torch.testing.assert_close(compiled, network(image))


def test_checkpointing() -> None:
    image, label = data()
    network = net()
    mine = fused(network, image).train()
    given = checkpoint(mine, image, use_reentrant=False)
    LOSS(given, label).backward()
    LOSS(network(image), label).backward()
    for name, expected in gradients(network).items():
        torch.testing.assert_close(gradients(mine)[name], expected)


def test_reentrant_checkpointing_is_no_silent_stop() -> None:
    """It runs the network without gradients and finds no tensor to hang its own on."""
    image, label = data()
    network = fused(net(), image).train()
    given = checkpoint(network, image.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        LOSS(given, label).backward()


def test_traced_in_training() -> None:
    image, _ = data()
    with pytest.raises(RuntimeError, match=r"DeferredLogits.*not computed"):
        torch.jit.trace(fused(net(), image).train(), image)


def test_hooks_of_the_network() -> None:
    """Forward hooks see what it gives; backward hooks need a tensor, as torch itself says."""
    image, label = data()
    network = fused(net(), image).train()
    seen: list[Any] = []
    network.register_forward_hook(lambda _, __, output: seen.append(output))
    assert network(image) is seen[0]
    network.register_full_backward_hook(lambda *given: seen.append(given))
    with pytest.warns(UserWarning, match=r"backward hooks .* received .*DeferredLogits"):
        LOSS(network(image), label).backward()
    assert len(seen) == 2


def test_replicas_of_data_parallel_give_logits() -> None:
    """It would join their weights along the first dimension."""
    head = FusedHead(nn.Conv2d(6, CLASSES, 1))
    replica = head._replicate_for_data_parallel()
    replica.weight, replica.bias = head.weight, head.bias
    assert type(replica(torch.randn(1, 6, 4, 4))) is Tensor


class _Two(Net):
    """With a head of which the loss sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(6, 2, 1)

    def forward(self, image: Tensor) -> Any:
        features = self.body(image)
        return [self.head(features), self.unused(features)]


def _steps(network: nn.Module, model: nn.Module, image: Tensor, label: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        given = model(image)
        LOSS(given[0] if isinstance(given, list) else given, label).backward()
        optimizer.step()
    return network.state_dict()


def _process(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.set_num_threads(1)
    image, label = data(batch=4)
    mine = slice(2 * rank, 2 * rank + 2)
    found = {}
    for name, build, options in _DISTRIBUTED:
        torch.manual_seed(0)
        network = build()
        if name != "fused afterwards":
            fuse_head(network, example_input=image)
        model = DistributedDataParallel(network, **options)
        fuse_head(model.module, example_input=image)
        found[name] = _steps(network, model, image[mine], label[mine])
        del model
    torch.save(found, f"{folder}/{rank}.pt")
    gc.collect()  # DistributedDataParallel is part of a cycle and keeps gloo's threads
    dist.destroy_process_group()


_DISTRIBUTED: list[tuple[str, Callable[[], nn.Module], dict[str, Any]]] = [
    ("plain", Net, {}),
    ("fused afterwards", Net, {}),  # nnU-Net wraps first
    ("unused", _Two, {"find_unused_parameters": True}),
    ("static", Net, {"static_graph": True}),
]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_end_in_the_weights_of_one(tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)
    image, label = data(batch=4)
    for name, build, _ in _DISTRIBUTED:
        torch.manual_seed(0)
        network = build()
        expected = _steps(network, network, image, label)
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name]
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
