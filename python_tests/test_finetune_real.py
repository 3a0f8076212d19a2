"""A few steps on real images: hippocampus (whole to anterior and posterior) and whole brains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import real_data

from riskmap_ext.finetune import finetune, load_config, parse_config
from riskmap_ext.finetune.source.checkpoint import load_source

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Left and right hippocampus, caudate, putamen, thalamus of labels.csv.
STRUCTURES = {
    "hippocampus": (47, 48),
    "caudate": (36, 37),
    "putamen": (57, 58),
    "thalamus": (59, 60),
}


def example(name: str, output: Path, *overrides: str):
    """An example configuration with the real data and few steps."""
    return load_config(
        EXAMPLES / name,
        [
            f"output={output}",
            f"data.root={real_data('hippocampus')}",
            "device=cpu",
            "write.tensorboard=false",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hippocampus")
    quick = ("train.validate_every=0", "write.overlays=2")
    source = finetune(
        example("hippocampus_source.yaml", folder / "source", "train.steps=60", *quick),
        progress=False,
    )
    target = finetune(
        example(
            "hippocampus.yaml",
            folder / "target",
            "train.steps=25",
            f"source.checkpoint={source.checkpoint}",
            *quick,
        ),
        progress=False,
    )
    return source, target


def test_hippocampus_is_learnt(hippocampus):
    source, target = hippocampus
    assert source.mean_dice > 0.5
    assert set(target.dice) == {"anterior", "posterior"}
    assert target.mean_dice > 0.3
    assert len(target.cases) == 8
    assert target.keys is not None
    assert target.keys.reinitialized
    assert len(target.keys.loaded) > len(target.keys.reinitialized)
    # The source tells structure from background, so it beats the class frequencies.
    assert target.remark is None
    assert -0.4 < target.leep < 0


def test_hippocampus_files(hippocampus):
    _, target = hippocampus
    output, data = target.output, real_data("hippocampus")
    assert len(list((output / "maps").glob("*_risk.nii.gz"))) == 20
    assert len(list((output / "predictions").iterdir())) == 8
    assert len(list((output / "overlays").iterdir())) == 2
    inside, outside = [], []
    for name in target.cases:
        image = nib.load(data / "images" / f"{name}.nii.gz")
        label = nib.load(data / "labels" / f"{name}.nii.gz").get_fdata()
        for path in (f"maps/{name}_risk.nii.gz", f"predictions/{name}.nii.gz"):
            written = nib.load(output / path)
            assert written.shape == image.shape
            np.testing.assert_allclose(written.affine, image.affine)
        risk = nib.load(output / "maps" / f"{name}_risk.nii.gz").get_fdata()
        inside.append(risk[label > 0].mean())
        outside.append(risk[label == 0].mean())
    # The source cannot tell anterior from posterior: the structure is the harder part.
    assert np.mean(inside) > np.mean(outside) + 0.2
    torch.load(output / "last.pt", weights_only=True)


def test_brains_in_another_orientation(tmp_path):
    """PSR files with scaled bytes, four structures out of 148 labels, slice by slice."""
    data = real_data("brain_ixi")
    label_map = {value: name for name, values in STRUCTURES.items() for value in values}
    shared: dict[str, Any] = {
        "threads": 1,
        "device": "cpu",
        "data": {
            "root": str(data),
            "image_suffix": "_T1w",
            "label_suffix": "_dlmuse",
            "train": 3,
            "validation": 1,
            "label_map": label_map,
            "other_labels": "background",
        },
        "train": {"steps": 40, "batch_size": 4, "patch_size": 64, "lr": 0.01, "validate_every": 0},
        "write": {"overlays": 1, "tensorboard": False},
    }
    args = {"spatial_dims": 2, "channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1}
    tissue = {**shared["data"], "label_map": {**dict.fromkeys(range(1, 300), "brain")}}
    source = finetune(
        parse_config(
            {
                **shared,
                "output": str(tmp_path / "source"),
                "data": tissue,
                "network": {"name": "UNet", "args": args},
            }
        ),
        progress=False,
    )
    assert source.mean_dice > 0.7
    chosen = {"checkpoint": str(source.checkpoint)}
    sections = {"source": chosen, "risk": {"use": True}}
    result = finetune(
        parse_config({**shared, "output": str(tmp_path / "target"), **sections}),
        progress=False,
    )
    assert result.classes == ["background", *STRUCTURES]
    assert all(0 <= value <= 1 or math.isnan(value) for value in result.dice.values())
    (name,) = result.cases
    image = nib.load(data / "images" / f"{name}_T1w.nii.gz")
    label = nib.load(data / "labels" / f"{name}_dlmuse.nii.gz").get_fdata()
    risk = nib.load(tmp_path / "target" / "maps" / f"{name}_risk.nii.gz")
    assert nib.aff2axcodes(risk.affine) == nib.aff2axcodes(image.affine) == ("P", "S", "R")
    np.testing.assert_allclose(risk.affine, image.affine)
    wanted = np.isin(label, list(label_map))
    assert risk.get_fdata()[wanted].mean() > 2 * risk.get_fdata()[~wanted].mean()
    found = parse_config({**shared, "output": str(tmp_path / "x"), "source": chosen}).source
    assert found is not None
    assert load_source(found).classes == ["background", "brain"]
