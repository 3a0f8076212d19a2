"""Where the driver starts a fresh output layer: train.head_init."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import DYNUNET_2D, MERGED, NETWORK_2D, configuration, label_of
from test_finetune_head import PLAIN, assert_goes_on_in_the_same_bits

from riskmap_ext.finetune import finetune
from riskmap_ext.finetune.train import models

pytestmark = pytest.mark.usefixtures("one_thread")

UNET_BIAS = "model.2.1.conv.unit0.conv.bias"
NO_BIAS = {**NETWORK_2D, "args": {**NETWORK_2D["args"], "bias": False}}
TOLD = "The output layer starts at the class prior: "


def start(
    root: Path, output: Path, drawn: list[torch.Tensor] | None = None, **sections: Any
) -> tuple[dict[str, torch.Tensor], str]:
    """The weights before the first step, and the log; `drawn` gets the random state then."""
    found: dict[str, torch.Tensor] = {}

    def look(plan: Any, _: Any) -> None:
        state = plan.models.network.state_dict()
        found.update({key: value.clone() for key, value in state.items()})
        if drawn is not None:
            drawn.append(torch.get_rng_state())

    train = {"steps": 1, "validate_every": 0, **sections.pop("train", {})}
    write = {"overlays": False, "tensorboard": False, "maps": False, "report": False}
    sections["data"] = {"validation": 0, **sections.get("data", {})}
    config = configuration(root, output, train=train, write=write, **sections)
    finetune(config, progress=False, prepare=look)
    return found, (output / "log.txt").read_text()


def prior_of(
    root: Path, tmp_path: Path, **sections: Any
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What head_init: prior adds to the weights of random, and the log's numbers."""
    log, starts = "", []
    drawn: list[torch.Tensor] = []
    for kind in ("random", "prior"):
        weights, log = start(root, tmp_path / kind, drawn, **sections, train={"head_init": kind})
        starts.append(weights)
        assert log.count(TOLD) == (kind == "prior")
    random, prior = starts
    assert torch.equal(*drawn)
    added = {k: prior[k] - random[k] for k in random if not torch.equal(prior[k], random[k])}
    (line,) = re.findall(TOLD + "(.*)", log)
    return added, dict(each.rsplit(" ", 1) for each in line.split(", "))


def counts(root: Path) -> np.ndarray:
    """Voxels of the labels 0, 1, 2 in the two training cases."""
    labels = [np.asarray(nib.load(label_of(root, f"case0{i}")).dataobj).ravel() for i in (0, 1)]
    return np.bincount(np.concatenate(labels).astype(int), minlength=3)


def logs(shares: Sequence[float]) -> list[float]:
    return [math.log(share + 1e-4) for share in shares]


@pytest.mark.parametrize(
    ("network", "biases", "fused"),
    [
        (NETWORK_2D, [UNET_BIAS], False),
        (DYNUNET_2D, ["output_block.conv.conv.bias"], True),
        (PLAIN, ["decoder.seg_layers.0.bias", "decoder.seg_layers.1.bias"], False),
        ({**DYNUNET_2D, "orientation": "AR"}, ["output_block.conv.conv.bias"], False),
    ],
    ids=["UNet", "fused", "scales", "turned"],
)
def test_classes(root: Path, tmp_path: Path, network: Any, biases: list[str], fused: bool) -> None:
    added, told = prior_of(root, tmp_path, network=network, loss={"fused_head": fused})
    expected = logs(counts(root) / counts(root).sum())
    assert sorted(added) == biases
    for name in biases:
        assert added[name].tolist() == pytest.approx(expected, abs=1e-5)
    assert list(told) == ["background", "box", "crate"]
    assert [float(number) for number in told.values()] == pytest.approx(expected, abs=0.006)


def test_regions(root: Path, tmp_path: Path) -> None:
    regions = {"core": ["crate"], "whole": ["box", "crate"]}
    added, told = prior_of(root, tmp_path, data={"regions": regions})
    _, box, crate = counts(root) / counts(root).sum()
    shares = [box + crate, crate]  # the driver has the largest first
    expected = [math.log((f + 1e-4) / (1 - f + 1e-4)) for f in shares]
    assert added[UNET_BIAS].tolist() == pytest.approx(expected, abs=1e-5)
    assert list(told) == ["whole", "core"]


def test_ignored_labels_and_an_absent_class(root: Path, tmp_path: Path) -> None:
    data = {"label_map": {1: 1, 2: "ignore"}}
    added, told = prior_of(root, tmp_path, data=data)
    valid = counts(root)[:2]
    expected = logs([*valid / valid.sum(), 0.0])
    assert added[UNET_BIAS].tolist() == pytest.approx(expected, abs=1e-5)
    assert told["crate"] == "-9.21"


def test_a_head_of_the_source_stays(root: Path, source: Path, tmp_path: Path) -> None:
    theirs = torch.load(source, weights_only=True)["state_dict"]
    sections: dict[str, Any] = {"data": MERGED, "network": None}
    for head in ("auto", "keep", "reinitialize"):
        chosen = {"checkpoint": str(source), "head": head}
        weights, log = start(root, tmp_path / head, source=chosen, **sections)
        kept = head != "reinitialize"
        assert torch.equal(weights[UNET_BIAS], theirs[UNET_BIAS]) == kept
        assert (TOLD in log) != kept
    # Of the source the map alone is taken.
    alone = {"checkpoint": str(source), "initialize": False}
    _, log = start(root, tmp_path / "map", source=alone, data=MERGED)
    assert TOLD in log


def test_a_fresh_head_beside_weights_of_the_source(
    root: Path, source: Path, tmp_path: Path
) -> None:
    added, _ = prior_of(root, tmp_path, source={"checkpoint": str(source)})
    assert list(added) == [UNET_BIAS]


def test_random_tries_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "head_biases", None)
    _, log = start(root, tmp_path / "out", train={"head_init": "random"})
    assert "prior" not in log


def test_a_network_without_a_bias(root: Path, tmp_path: Path) -> None:
    """The run warns and goes on, and says nothing where the head is the source's."""
    warned = "train.head_init: no class prior: network: nothing in UNet is a bias of its output"
    _, log = start(root, tmp_path / "first", data=MERGED, network=NO_BIAS)
    assert log.count(warned) == 1
    checkpoint = str(tmp_path / "first" / "last.pt")
    for head in ("keep", "reinitialize"):
        chosen = {"checkpoint": checkpoint, "head": head}
        _, log = start(root, tmp_path / head, data=MERGED, network=None, source=chosen)
        assert (warned in log) == (head == "reinitialize")


def test_goes_on_in_the_same_bits(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prior is not added once more."""
    sections: dict[str, Any] = {"train": {"steps": 4, "validate_every": 2}, "network": PLAIN}
    assert_goes_on_in_the_same_bits(root, tmp_path, monkeypatch, **sections)
    assert (tmp_path / "stopped" / "log.txt").read_text().count(TOLD) == 1
