"""What the frozen source networks of a run say of its cases, beside the driver's own maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riskmap_ext
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.prepare import Case
from riskmap_ext.finetune.source.checkpoint import SourceModel, load_source
from riskmap_ext.finetune.source.network import patch_size
from riskmap_ext.finetune.source.predictor import Predictor
from riskmap_ext.finetune.train.models import predictor_of_source


class Sources:
    """checkpoints: the run's own source, then others of the same cases and other seeds."""

    def __init__(self, config: Config, checkpoints: Sequence[Path], num_classes: int) -> None:
        assert config.source is not None
        self._config = config
        self._given = config.source
        self._checkpoints = list(checkpoints)
        self.num_classes = num_classes

    @cached_property
    def _models(self) -> list[SourceModel]:
        return [
            load_source(self._given.model_copy(update={"checkpoint": path}))
            for path in self._checkpoints
        ]

    @property
    def digests(self) -> list[str]:
        return [model.digest for model in self._models]

    def likelihoods(self, cases: Sequence[Case]) -> list[dict[str, Tensor]]:
        """Of each source: case name -> LEEP's probability of the label, [X, Y, Z]."""
        return [self._likelihood(model, cases) for model in self._models]

    def _likelihood(self, model: SourceModel, cases: Sequence[Case]) -> dict[str, Tensor]:
        channels = [str(index) for index in range(len(cases[0].image))]
        device = torch.device(self._config.device)
        predictor = predictor_of_source(self._config, model, channels, device)
        logits = {case.name: predictor(case.image) for case in cases}
        statistics = riskmap_ext.TransferStatistics(self.num_classes, ignore_index=IGNORE_INDEX)
        for case in cases:
            statistics.update(logits[case.name], case.label[None].to(device))
        found = {}
        for case in cases:
            label = case.label[None].to(device)
            found[case.name] = riskmap_ext.transferability_map(
                logits[case.name], label, statistics.conditional, ignore_index=IGNORE_INDEX
            )[0].exp_()
        return found

    def features(self, cases: Sequence[Case]) -> dict[str, Tensor]:
        """Case name -> [F, X, Y, Z] float32 of the run's own source, of unit variance."""
        model = self._models[0]
        network = _Features(model.network)
        dims = int(model.config.args["spatial_dims"])
        predictor = Predictor(network, dims, patch_size(self._config, dims), self._config.inference)
        found = {case.name: predictor(case.image)[0] for case in cases}
        variance = torch.stack([each.flatten(1).var(dim=1) for each in found.values()]).mean(dim=0)
        for each in found.values():
            each /= variance.sqrt().clamp(min=1e-6).view(-1, 1, 1, 1)
        return found


class _Features(nn.Module):
    """What the last block of MONAI's UNet is given, brought to the image's size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        blocks: Any = network.get_submodule("model")
        blocks[-1].register_forward_pre_hook(self._keep)
        self._kept: Tensor | None = None

    def _keep(self, block: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._kept = given[0]

    def forward(self, image: Tensor) -> Tensor:
        self.network(image)
        assert self._kept is not None
        mode = "bilinear" if image.dim() == 4 else "trilinear"
        return F.interpolate(self._kept, image.shape[2:], mode=mode, align_corners=False)
