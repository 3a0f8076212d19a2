"""Intensities, crops and resampling, and images prepared as the source's training had them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from finetune_data import NETWORK_2D, configuration, save, write_cases
from source_data import load, nnunet_dataset, nnunet_network, nnunet_plans, save_nnunet

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from riskmap_ext.finetune import ConfigError, finetune, load_config
from riskmap_ext.finetune.config.schema import DataConfig
from riskmap_ext.finetune.data.intensity import crop_mask, image_foreground, normalized
from riskmap_ext.finetune.data.prepare import Case, read_image
from riskmap_ext.finetune.data.resample import resample_as_nnunet, resized_as_nnunet
from riskmap_ext.finetune.source.model import prepared_as_source

IMAGE = np.random.default_rng(0).normal(50, 300, (2, 6, 7, 5)).astype(np.float32)


def options(**data: Any) -> DataConfig:
    return DataConfig(root=Path(), **data)


def scaled(image: np.ndarray = IMAGE, **data: Any) -> np.ndarray:
    given = options(**data)
    return normalized(image, image_foreground(image, given), given)


class TestIntensities:
    def test_a_window_becomes_0_to_1(self) -> None:
        found = scaled(normalize="rescale", window=[-175, 250])
        np.testing.assert_allclose(found, (IMAGE.clip(-175, 250) + 175) / 425, atol=1e-6)
        assert found.dtype == np.float32
        assert (found.min(), found.max()) == (0, 1)

    def test_the_image_becomes_0_to_1(self) -> None:
        found = scaled(normalize="rescale")
        np.testing.assert_allclose(found.min(axis=(1, 2, 3)), 0)
        np.testing.assert_allclose(found.max(axis=(1, 2, 3)), 1)
        assert not scaled(np.ones_like(IMAGE), normalize="rescale").any()

    def test_fixed_mean_and_standard_deviation(self) -> None:
        found = scaled(window=[-100, 300], mean_std=[80.5, 120.0])
        np.testing.assert_allclose(found, (IMAGE.clip(-100, 300) - 80.5) / 120, rtol=1e-5)

    def test_outside_the_foreground(self) -> None:
        image = IMAGE.copy()
        image[:, :2] = 0
        inside = scaled(image, normalize="zscore_foreground")
        assert not inside[:, :2].any()
        np.testing.assert_allclose(inside[0, 2:].mean(), 0, atol=1e-6)
        np.testing.assert_array_equal(inside[:, 2:], scaled(image)[:, 2:])

    def test_one_for_each_channel(self) -> None:
        found = scaled(
            normalize=["zscore", "none"], window=[[0, 1], None], mean_std=[[0.5, 0.5], None]
        )
        np.testing.assert_allclose(found[0], IMAGE[0].clip(0, 1) * 2 - 1, atol=1e-6)
        np.testing.assert_array_equal(found[1], IMAGE[1])
        with pytest.raises(ConfigError, match=r"data\.window: expected one for each of 2 channels"):
            scaled(window=[[0, 1]])

    @pytest.mark.parametrize(
        "data",
        [
            {"window": [250, -175]},
            {"window": [0]},
            {"mean_std": [0, 0]},
            {"mean_std": [0, float("nan")]},
            {"normalize": "minmax"},
            {"normalize": []},
            {"spacing": [1, None]},
            {"spacing": [1, 0, None]},
        ],
    )
    def test_refused(self, root: Path, data: dict[str, Any], tmp_path: Path) -> None:
        (key,) = data
        with pytest.raises(ConfigError, match=rf"data\.{key}.*: expected"):
            configuration(root, tmp_path, data=data)

    def test_holes_are_inside(self) -> None:
        image = np.zeros((1, 7, 7, 7), np.float32)
        image[:, 1:6, 1:6, 1:6] = 1
        image[:, 3, 3, 3] = 0
        assert crop_mask(image).sum() == 125
        assert image_foreground(image, options()).sum() == 124
        assert image_foreground(image, options(crop="nonzero")).sum() == 125


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cases(tmp_path / "data", 3)
    return tmp_path / "data"


def read(path: Path, **data: Any) -> Case:
    return read_image([path], "a", options(**data))


class TestCrops:
    @pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
    @pytest.mark.parametrize("spacing", [None, [1.5, 1.0, 2.0]])
    @pytest.mark.parametrize("geometry", ["monai", "nnunet"])
    def test_there_and_back(
        self, tmp_path: Path, axis: Any, spacing: list[float] | None, geometry: Any
    ) -> None:
        image = np.zeros((16, 18, 14), np.float32)
        image[3:13, 5:17, 2:9] = np.random.default_rng(0).normal(100, 5, (10, 12, 7))
        affine = np.array([[0, 0, -1.5, 4], [-1, 0, 0, 3], [0, 2, 0, -7], [0, 0, 0, 1.0]])
        path = save(tmp_path / "a.nii.gz", image, affine)
        case = read(path, crop="nonzero", slice_axis=axis, spacing=spacing, geometry=geometry)
        assert case.grid.box_shape != case.grid.full_shape
        if spacing is None:
            assert sorted(case.image.shape[1:]) == [7, 10, 12]
        back = case.grid.to_file(case.grid.to_full(torch.ones(case.label.shape)))
        np.testing.assert_array_equal(back, image > 0)
        # In the middle of the box the prepared grid says the same place as the file's.
        middle = (np.array(case.label.shape) - 1) / 2
        of_file = np.array([7.5, 10.5, 5.0])
        np.testing.assert_allclose(
            (case.grid.prepared_affine @ [*middle, 1])[:3],
            (affine @ [*of_file, 1])[:3],
            atol=1.0 if geometry == "monai" else 1e-6,
        )

    def test_an_empty_image_stays(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.nii.gz", np.zeros((8, 8, 8), np.float32))
        grid = read(path, crop="nonzero").grid
        assert grid.box_shape == grid.full_shape == grid.prepared_shape

    def test_a_run(self, tmp_path: Path, root: Path) -> None:
        for path in (root / "images").iterdir():
            values = np.asarray(nib.load(path).dataobj).copy()
            values[:4] = values[:, -3:] = 0
            save(path, values)
        config = configuration(
            root,
            tmp_path / "run",
            data={"crop": "nonzero"},
            network=NETWORK_2D,
            train={"steps": 2, "patch_size": 8},
        )
        finetune(config, progress=False)
        name = "case02.nii.gz"
        found = np.asarray(nib.load(tmp_path / "run" / "predictions" / name).dataobj)
        label = np.asarray(nib.load(root / "labels" / name).dataobj)
        assert found.shape == label.shape
        assert not found[:4].any()
        assert (tmp_path / "run" / "report.html").exists()


class TestCubic:
    """Against nnU-Net's own resampling."""

    @pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 2.5), (3.0, 0.7, 0.7)])
    @pytest.mark.parametrize("wanted", [(0.8, 1.2, 1.5), (1.0, 4.0, 1.0)])
    @pytest.mark.parametrize("order", [3, 1])
    def test_values(self, spacing: Any, wanted: Any, order: int) -> None:
        module = "nnunetv2.preprocessing.resampling.default_resampling"
        theirs = pytest.importorskip(module, reason="needs nnU-Net")
        values = np.random.default_rng(1).normal(size=(2, 11, 9, 8))
        shape = theirs.compute_new_shape(values.shape[1:], spacing, wanted)
        expected = theirs.resample_data_or_seg_to_shape(
            values, shape, spacing, wanted, order=order, force_separate_z=None
        )
        found = resized_as_nnunet(torch.from_numpy(values), shape, spacing, wanted, order=order)
        np.testing.assert_allclose(found, expected, atol=1e-9)

    def test_place(self) -> None:
        ramp = torch.arange(12.0).expand(1, 4, 5, 12).contiguous()
        affine = np.diag([1.0, 1.0, 2.0, 1.0])
        mask = torch.ones(4, 5, 12, dtype=torch.bool)
        (image, label, _), moved = resample_as_nnunet(
            [ramp, mask.to(torch.int16), mask], affine, [1.0, 1.0, 1.0]
        )
        assert image.shape == (1, 4, 5, 24)
        assert label.dtype == torch.int16
        inner = (moved @ np.array([0, 0, 10, 1]))[2] / 2
        np.testing.assert_allclose(image[0, 0, 0, 10], inner, atol=1e-3)


def ct_plans(**changes: Any) -> dict[str, Any]:
    plans = nnunet_plans(normalization_schemes=["CTNormalization"], **changes)
    fingerprint = {"mean": 90.0, "std": 120.0, "percentile_00_5": -160.0, "percentile_99_5": 310.0}
    plans["foreground_intensity_properties_per_channel"] = {"0": fingerprint}
    return plans


class TestOfTheSource:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        pytest.importorskip("dynamic_network_architectures", reason="needs nnU-Net's networks")
        plans = ct_plans()
        network = nnunet_network(plans, 1, 3)
        return save_nnunet(tmp_path / "ct.pth", network, plans, nnunet_dataset())

    def test_ct_normalization(self, source: Path) -> None:
        told = load(source).preprocessing
        assert told["window"] == [-160, 310]
        assert told["mean_std"] == [90, 120]
        assert told["normalize"] == "zscore"
        assert told["geometry"] == "nnunet"
        assert told["crop"] == "nonzero"

    def test_what_is_left_out_is_taken(self, source: Path, root: Path, tmp_path: Path) -> None:
        chosen: dict[str, Any] = {"source": {"checkpoint": str(source)}, "network": None}
        chosen["train"] = {"steps": 1, "patch_size": 8, "validate_every": 0}
        config = configuration(root, tmp_path / "a", data={"crop": "none"}, **chosen)
        data = prepared_as_source(config, load(source)).data
        assert data.spacing == [1.0, 2.0, 3.0]
        assert (data.window, data.mean_std, data.geometry) == ([-160, 310], [90, 120], "nnunet")
        assert data.crop == "none"
        assert finetune(config, progress=False).leep is not None
        kept = load_config(tmp_path / "a" / "config.yaml").data
        assert kept.window == [-160, 310]
        assert load(tmp_path / "a" / "last.pt").preprocessing["mean_std"] == [90, 120]
        log = (tmp_path / "a" / "log.txt").read_text()
        assert log.count("may suffer") == log.count("trained with data.crop=nonzero") == 1

    def test_of_each_channel(self) -> None:
        plans = ct_plans(use_mask_for_norm=[False, True])
        configuration = next(iter(plans["configurations"].values()))
        configuration["normalization_schemes"] = ["CTNormalization", "ZScoreNormalization"]
        told = self._told(plans)
        assert told["normalize"] == ["zscore", "zscore_foreground"]
        assert told["window"] == [[-160, 310], None]
        assert told["mean_std"] == [[90, 120], None]

    @staticmethod
    def _told(plans: dict[str, Any]) -> dict[str, Any]:
        from riskmap_ext.finetune.source import nnunet

        each = nnunet._Configuration.model_validate(next(iter(plans["configurations"].values())))
        return nnunet._normalization(each, nnunet._Plans.model_validate(plans))
