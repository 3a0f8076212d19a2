"""weighted_loss under torch's other machinery: saved tensors elsewhere, checkpoints, torch.func,
tracers; with the gradient made in the forward pass and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BASE, BRATS, loss_and_gradients, loss_leaves
from compare import grad_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import riskmap_ext
from riskmap_ext import gradient_in_forward

CPU = torch.device("cpu")


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("regions", [False, True])
def test_saved_tensors_elsewhere(regions: bool, path: bool) -> None:
    options: dict[str, Any] = {"regions": BRATS[:, 1:]} if regions else {}
    call = tuple(t.detach() for t in loss_leaves(BASE, CPU)), options
    expected = loss_and_gradients(call)
    with gradient_in_forward(path), torch.autograd.graph.save_on_cpu():
        found = loss_and_gradients(call)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        logits, target, risk = loss_leaves(BASE, CPU)
        loss = riskmap_ext.weighted_loss(logits, target, risk, **options)
        for _ in range(2):
            again = torch.autograd.grad(loss, (logits, risk), retain_graph=True)
            for one, other in zip(again, expected[1:], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_gradient_checkpointing(factor: float, reentrant: bool, path: bool) -> None:
    """Of the loss alone, and of a layer together with the loss."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 3, 1)
    _, target, risk = loss_leaves(BASE, CPU)
    inputs = BASE.logits(CPU)

    def step(inputs: Tensor, risk: Tensor) -> Tensor:
        return factor * riskmap_ext.weighted_loss(layer(inputs).relu(), target, risk)

    def gradients(recomputed: bool) -> list[Tensor]:
        leaf = inputs.clone().requires_grad_()
        own_risk = risk.detach().clone().requires_grad_()
        layer.zero_grad()
        if recomputed:
            loss = checkpoint(step, leaf, own_risk, use_reentrant=reentrant)
        else:
            loss = step(leaf, own_risk)
        loss.backward()
        return [loss.detach(), grad_of(leaf), grad_of(own_risk), grad_of(layer.weight).clone()]

    with gradient_in_forward(path):
        found, expected = gradients(True), gradients(False)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("path", [True, False])
def test_many_incoming_gradients_at_once(path: bool) -> None:
    """is_grads_batched, which jacobian(vectorize=True) uses, and vmap around autograd.grad."""
    logits, target, risk = loss_leaves(BASE, CPU)
    with gradient_in_forward(path):
        loss = riskmap_ext.weighted_loss(logits, target, risk)
    factors = torch.tensor([1.0, -2.0, 0.0])
    expected = torch.autograd.grad(loss, (logits, risk), retain_graph=True)
    batched = torch.autograd.grad(
        loss, (logits, risk), factors, is_grads_batched=True, retain_graph=True
    )
    mapped = torch.func.vmap(
        lambda factor: torch.autograd.grad(loss, (logits, risk), factor, retain_graph=True)
    )(factors)
    for found in (batched, mapped):
        for one, other in zip(found, expected, strict=True):
            for index, factor in enumerate(factors):
                torch.testing.assert_close(one[index], factor * other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("wanted", ["logits", "risk"])
def test_other_derivatives_are_refused_in_words(wanted: str, path: bool) -> None:
    """Torch would drop the tangents of a forward-mode derivative, and call it 0."""
    logits, target, risk = (t.detach() for t in loss_leaves(BASE, CPU))
    value = logits if wanted == "logits" else risk

    def loss(value: Tensor) -> Tensor:
        changed = {"logits": logits, "risk": risk, wanted: value}
        return riskmap_ext.weighted_loss(changed["logits"], target, changed["risk"])

    calls = (
        lambda: torch.func.grad(loss)(value),
        lambda: torch.func.vjp(loss, value),
        lambda: torch.func.jacrev(loss)(value),
        lambda: torch.func.jvp(loss, (value,), (value,)),
    )
    with gradient_in_forward(path):
        for call in calls:
            with pytest.raises(RuntimeError, match=r"backward\(\).*torch\.func.*reference"):
                call()
        with forward_ad.dual_level():
            for leaf in (value, value.clone().requires_grad_()):
                dual = forward_ad.make_dual(leaf, value)
                with pytest.raises(RuntimeError, match=r"backward\(\).*forward-mode.*reference"):
                    loss(dual)
        # Functions of torch.func that differentiate nothing here are left alone.
        mapped = torch.func.vmap(loss)(value.unsqueeze(0))
        torch.testing.assert_close(mapped[0], loss(value))


@pytest.mark.parametrize("path", [True, False])
def test_tracers_see_the_operators(path: bool) -> None:
    """No tracer may be asked for the value of the incoming gradient."""
    logits, target, risk = loss_leaves(BASE, CPU)

    def gradient(logits: Tensor) -> Tensor:
        return torch.autograd.grad(riskmap_ext.weighted_loss(logits, target, risk), logits)[0]

    expected, values = gradient(logits), logits.detach()
    with gradient_in_forward(path):
        graph = make_fx(gradient)(logits)
        assert "riskmap_ext._weighted_loss_backward" in graph.code
        assert torch.equal(graph(logits), expected)

        with FakeTensorMode() as mode:
            fake = mode.from_tensor(values).requires_grad_()
            loss = riskmap_ext.weighted_loss(fake, mode.from_tensor(target))
            loss.backward()
            assert grad_of(fake).shape == logits.shape

        meta = values.to("meta").requires_grad_()
        riskmap_ext.weighted_loss(meta, target.to("meta")).backward()
        assert grad_of(meta).is_meta


def test_hooks_see_the_gradient() -> None:
    """What a hook returns is what the leaf gets; the tensor it saw is its own."""
    leaf, target, _ = loss_leaves(BASE, CPU)
    _, expected, _ = loss_and_gradients(((leaf.detach(), target, None), {}))
    logits = leaf * 1
    seen: list[Tensor] = []

    def doubled(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 2 * gradient

    logits.register_hook(doubled)
    riskmap_ext.weighted_loss(logits, target).backward()
    assert torch.equal(seen[0], expected)
    assert torch.equal(grad_of(leaf), 2 * expected)
