"""Random crops: what travels together stays together, and nothing is made up at the borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import SHAPE, configuration, write_cases

from riskmap_ext.finetune import Case, ConfigError, prepare_cases
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.config.schema import AugmentConfig, TrainConfig
from riskmap_ext.finetune.data.sampling import Batch, CropSampler

STILL = {"affine_probability": 0, "intensity_probability": 0, "noise_probability": 0}
CPU = torch.device("cpu")


@pytest.fixture
def cases(root, tmp_path) -> list[Case]:
    return prepare_cases(configuration(root, tmp_path)).train


def sampler(cases, patch, *, risk=None, seed=0, augment=STILL, **train) -> CropSampler:
    options = TrainConfig(augment=AugmentConfig(**augment), **{"batch_size": 8, **train})
    return CropSampler(cases, risk, patch, options, seed=seed, device=CPU)


def numbered(cases: list[Case]) -> dict[str, torch.Tensor]:
    """A risk map that numbers each voxel, so that every crop tells where it is from."""
    count = cases[0].label.numel()
    return {
        case.name: (torch.arange(count).float() + 1 + index * count).reshape(case.label.shape)
        for index, case in enumerate(cases)
    }


def source_voxels(batch: Batch, cases: list[Case], name: str) -> torch.Tensor:
    """The case's volume `name` at the voxels that the numbered risk map points to."""
    flat = torch.cat([getattr(case, name).flatten() for case in cases])
    assert batch.risk is not None
    return flat[(batch.risk.long() - 1).clamp(min=0)]


def in_place(batch: Batch, cases: list[Case]) -> None:
    """Asserts that label and foreground are those of the voxel the risk map belongs to."""
    valid = batch.label != IGNORE_INDEX
    assert valid.any()
    assert batch.risk is not None
    assert torch.equal(batch.risk > 0, valid)
    assert torch.equal(batch.label[valid], source_voxels(batch, cases, "label")[valid])
    assert torch.equal(batch.foreground[valid], source_voxels(batch, cases, "mask")[valid])
    assert not batch.foreground[~valid].any()


@pytest.mark.parametrize("patch", [[8, 10], [20, 24], [7, 5], [6, 8, 4], [20, 24, 12], [5, 7, 3]])
def test_crops_without_change_are_voxels_of_the_volume(cases, patch):
    batch = sampler(cases, patch, risk=numbered(cases)).next_batch()
    assert batch.image.shape == (8, 1, *patch)
    assert batch.risk is not None
    assert batch.label.shape == batch.risk.shape == batch.foreground.shape == (8, *patch)
    assert batch.label.dtype == torch.int16
    assert batch.foreground.dtype == torch.bool
    in_place(batch, cases)
    assert (batch.label != IGNORE_INDEX).all()
    expected = source_voxels(batch, cases, "image")
    torch.testing.assert_close(batch.image[:, 0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("patch", [[32, 16], [32, 16, 16]])
def test_outside_the_volume_is_ignored(cases, patch):
    batch = sampler(cases, patch, risk=numbered(cases)).next_batch()
    in_place(batch, cases)
    inside = (batch.label != IGNORE_INDEX).flatten(1).sum(dim=1)
    size = [min(p, s) for p, s in zip(patch, SHAPE, strict=False)]
    assert (inside == int(np.prod(size))).all()
    assert torch.isfinite(batch.image).all()


@pytest.mark.parametrize("patch", [[16, 16], [12, 12, 12]])
def test_everything_turns_together(cases, patch):
    augment = {**STILL, "affine_probability": 1, "rotation": 45, "scale": 0.3}
    batch = sampler(cases, patch, risk=numbered(cases), augment=augment).next_batch()
    in_place(batch, cases)
    # Linear in the image, nearest in the rest: alike up to noise and borders.
    valid = batch.label != IGNORE_INDEX
    image = torch.stack([batch.image[:, 0][valid], source_voxels(batch, cases, "image")[valid]])
    assert float(torch.corrcoef(image)[0, 1]) > 0.8


def test_rotation_keeps_lengths_in_millimetres(tmp_path):
    write_cases(tmp_path / "data", 1, affine=np.diag([1.0, 2.0, 4.0, 1.0]))
    data = {"train": 1, "validation": 0}
    cases = prepare_cases(configuration(tmp_path / "data", tmp_path, data=data)).train
    augment = {**STILL, "affine_probability": 1, "rotation": 30, "scale": 0}
    crops = sampler(cases, [8, 8, 8], augment=augment)
    spacing = np.array([1.0, 2.0, 4.0])
    matrix = crops._random_matrix(spacing)
    in_mm = spacing[:, None] * matrix / spacing
    np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-6)
    assert not np.allclose(matrix, np.eye(3), atol=0.05)


@pytest.mark.parametrize(("axis", "dim"), [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_flips_go_along_the_named_axis(cases, axis, dim):
    augment = {**STILL, "flip": [axis]}
    batch = sampler(cases, list(SHAPE), risk=numbered(cases), augment=augment).next_batch()
    in_place(batch, cases)
    upright = numbered(cases)
    seen = {0, 1}
    assert batch.risk is not None
    for risk in batch.risk:
        matches = [
            torch.equal(risk, volume.flip(dim)) if flipped else torch.equal(risk, volume)
            for volume in upright.values()
            for flipped in (0, 1)
        ]
        assert sum(matches) == 1
        seen.discard(matches.index(True) % 2)
    assert not seen


def test_the_slice_axis_cannot_be_flipped(cases):
    with pytest.raises(ConfigError, match=r"train\.augment\.flip: axial is the slice axis"):
        sampler(cases, [8, 8], augment={"flip": ["axial"]})


@pytest.mark.parametrize("balance", ["class", "voxel"])
@pytest.mark.parametrize("patch", [[1, 1], [1, 1, 1]])
def test_foreground_crops_are_centred_on_foreground(cases, patch, balance):
    options: dict[str, Any] = {"foreground_crops": 1.0, "crop_balance": balance, "batch_size": 400}
    label = sampler(cases, patch, **options).next_batch().label
    assert (label > 0).all()
    share = float((label == 1).float().mean())
    voxels = [[int((case.label == c).sum()) for c in (1, 2)] for case in cases]
    expected = 0.5 if balance == "class" else float(np.mean([a / (a + b) for a, b in voxels]))
    assert abs(share - expected) < 0.1


def test_cases_without_foreground_are_cropped_anywhere(cases):
    for case in cases:
        case.label.zero_()
    batch = sampler(cases, [8, 8], foreground_crops=1.0).next_batch()
    assert (batch.label == 0).all()
    assert batch.risk is None


def test_seed_decides(cases):
    first, again, other = (sampler(cases, [8, 8], seed=s, augment={}) for s in (3, 3, 4))
    for _ in range(3):
        a, b, c = (s.next_batch() for s in (first, again, other))
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)
        assert not torch.equal(a.image, c.image)


def test_intensity_changes_the_image_alone(cases):
    kinds = {
        "intensity": {**STILL, "intensity_probability": 1},
        "noise": {**STILL, "noise_probability": 1, "noise": 1},
    }
    plain = sampler(cases, [16, 16]).next_batch()
    for kind, augment in kinds.items():
        changed = sampler(cases, [16, 16], augment=augment).next_batch()
        assert torch.equal(changed.label, plain.label), kind
        assert torch.isfinite(changed.image).all()
        assert not torch.allclose(changed.image, plain.image, atol=1e-2), kind


def test_flat_crops_survive_every_change(cases):
    for case in cases:
        case.image.zero_()
    augment = {"affine_probability": 1, "intensity_probability": 1, "noise_probability": 1}
    assert torch.isfinite(sampler(cases, [16, 16], augment=augment).next_batch().image).all()
