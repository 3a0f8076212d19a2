"""A frozen source model, called on the images of MONAI data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.utils import convert_to_tensor
from torch import Tensor

from riskmap_ext._arguments import plain_tensor
from riskmap_ext._deferred import DeferredLogits
from riskmap_ext._files import digest

Inferer = Callable[..., Any]
Source = Callable[[Tensor], Any]


def as_plain(value: Any) -> Tensor:
    """A plain tensor from an array or MetaTensor; arrays with negative strides are copied."""
    return convert_to_tensor(value, track_meta=False)


class FrozenSource:
    """A source model, called on one image without gradients and in eval mode."""

    def __init__(
        self,
        source: Source,
        inferer: Inferer | None,
        device: str | torch.device | None,
        regions: Tensor | None,
    ) -> None:
        if not callable(source):
            raise TypeError(f"source: expected a Module or a function, got {type(source).__name__}")
        self.source, self.inferer = source, inferer
        self.has_regions = regions is not None
        self.dtype: torch.dtype | None = None
        if isinstance(source, torch.nn.Module):
            first = next(source.parameters(), None)
            if first is not None:
                device = first.device if device is None else device
                self.dtype = first.dtype if first.is_floating_point() else None
        self.device = torch.device("cpu" if device is None else device)
        self._digest: tuple[Any, str] | None = None

    def __call__(self, image: Any) -> Tensor | DeferredLogits:
        inputs = as_plain(image)[None].to(self.device, self.dtype)
        module = self.source if isinstance(self.source, torch.nn.Module) else None
        training = module is not None and module.training
        if training and module is not None:
            module.eval()
        try:
            with torch.no_grad():
                if self.inferer is None:
                    logits = self.source(inputs)
                else:
                    logits = self.inferer(inputs=inputs, network=self._of_window)
        finally:
            if training and module is not None:
                module.train()
        if isinstance(logits, (list, tuple)):
            logits = logits[0]
        if not isinstance(logits, DeferredLogits):
            logits = plain_tensor("logits of the source", logits)
        shape = logits.shape
        if len(shape) == inputs.dim() and shape[1] == 1 and not self.has_regions:
            raise ValueError(
                "source: gives one channel of logits, over which a softmax is constant; "
                "regions=[[0, 1]] declares it a sigmoid"
            )
        return logits

    def _of_window(self, *inputs: Any, **options: Any) -> Any:
        """Windows are summed as logits."""
        logits = self.source(*inputs, **options)
        return logits.logits() if isinstance(logits, DeferredLogits) else logits

    @property
    def is_known(self) -> bool:
        """Whether a digest can distinguish this source from another."""
        plain = self.inferer is None or type(self.inferer).__module__.startswith("monai.")
        return plain and isinstance(self.source, torch.nn.Module)

    def digest(self) -> str:
        """Of weights, architecture and inferer; recomputed when a weight has changed."""
        assert isinstance(self.source, torch.nn.Module)
        state = self.source.state_dict()
        versions = [(key, value.data_ptr(), value._version) for key, value in state.items()]
        if self._digest is None or self._digest[0] != versions:
            parts: list[Any] = [repr(self.source), _described(self.inferer)]
            for key in sorted(state):
                parts += [key, state[key]]
            self._digest = versions, digest(*parts)
        return self._digest[1]


def _described(value: Any) -> str:
    """Type and plain settings of an object; no address, which differs from run to run."""
    settings = {
        name: setting
        for name, setting in sorted(getattr(value, "__dict__", {}).items())
        if isinstance(setting, (bool, int, float, str, tuple, list, type(None)))
    }
    return f"{type(value).__qualname__} {settings}"
