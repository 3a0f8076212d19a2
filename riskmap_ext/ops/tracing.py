"""Whether a call is real, or comes from a tracer or a transform."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced(logits: Tensor) -> bool:
    """Whether the backward pass must not read the value of the incoming gradient."""
    return (
        logits.is_meta
        or not (type(logits) is Tensor or isinstance(logits, torch.nn.Parameter))  # FakeTensor
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, FakeTensorMode
        or torch._C._are_functorch_transforms_active()
    )


def is_batched(grad_loss: Tensor) -> bool:
    """Whether there are many incoming gradients: is_grads_batched=True, or vmap around backward."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad_loss) or functorch.is_batchedtensor(grad_loss)
