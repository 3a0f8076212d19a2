"""A checkpoint of nnU-Net's own trainer as the source of the driver, beside nnU-Net's predictor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from finetune_data import configuration
from nnunet_data import nnunet_folders, prepare, write_raw_data_set

pytest.importorskip("nnunetv2", reason="needs nnU-Net")
pytest.importorskip("monai", reason="needs the extra 'finetune'")

from riskmap_ext.finetune import finetune
from riskmap_ext.finetune.config.schema import SourceConfig
from riskmap_ext.finetune.predict import predict_images
from riskmap_ext.finetune.source.checkpoint import load_source

pytestmark = pytest.mark.slow
NAME, CASES = "Dataset411_Parts", 5
LABELS = {"background": 0, "anterior": 1, "posterior": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's folders with a small hippocampus data set, planned and preprocessed."""
    root = tmp_path_factory.mktemp("nnunet")
    write_raw_data_set(root / "raw" / NAME, CASES, LABELS)
    with nnunet_folders(root) as patch:
        prepare(root, [NAME], ["2d", "3d_fullres"], patch)
        yield root


def train(root: Path, configuration: str) -> Path:
    """The model folder after a few steps of nnU-Net's own trainer."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    prepared = root / "preprocessed" / NAME
    plans = json.loads((prepared / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset = json.loads((prepared / "dataset.json").read_text())
    torch.manual_seed(0)
    trainer = nnUNetTrainer(plans, configuration, 0, dataset, torch.device("cpu"))
    trainer.num_epochs = trainer.num_val_iterations_per_epoch = 1
    trainer.num_iterations_per_epoch = 4
    trainer.run_training()
    return Path(trainer.output_folder).parent


def segmented_by_nnunet(model: Path, image: Path) -> np.ndarray:
    """In the file's own order of axes."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu")
    )
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    values, properties = SimpleITKIO().read_images([str(image)])
    found = predictor.predict_single_npy_array(values, properties, None, None, False)
    return np.asarray(found).transpose(2, 1, 0)


def of_size(folder: Path, size: list[int], output: Path) -> Path:
    """The first image, mirrored at its ends until it has `size` voxels."""
    image = nib.load(sorted(folder.iterdir())[0])
    values = np.asarray(image.dataobj)
    missing = [max(0, wanted - have) for wanted, have in zip(size, values.shape, strict=True)]
    values = np.pad(values, [(0, each) for each in missing], mode="reflect")
    values = values[tuple(slice(each) for each in size)]
    nib.save(nib.Nifti1Image(values, image.affine), output / "image.nii.gz")
    return output / "image.nii.gz"


@pytest.mark.parametrize("kind", ["2d", "3d_fullres"])
def test_a_model_of_nnunets_trainer(folder: Path, tmp_path: Path, kind: str) -> None:
    model = train(folder, kind)
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    source = load_source(SourceConfig(checkpoint=checkpoint))
    assert source.classes == list(LABELS)
    assert source.channels == ["MRI"]

    root = folder / "raw" / NAME
    if kind == "3d_fullres":
        # As large as the window: the two tools pad and tile in different ways.
        image = of_size(root / "imagesTr", source.preprocessing["patch_size"], tmp_path)
        theirs = segmented_by_nnunet(model, image)
        assert len(np.unique(theirs)) > 1
        agreement = {}
        for orientation in ("RAS", "LAS", "RPS", "RAI", "ARS", "SAR"):
            (mine,) = predict_images(
                checkpoint,
                [image],
                tmp_path / orientation,
                orientation=orientation,
                progress=False,
            )
            agreement[orientation] = np.mean(np.asarray(nib.load(mine).dataobj) == theirs)
        # nnU-Net adds up its windows in half precision
        assert agreement.pop("RAS") > 0.99 > max(agreement.values()), agreement

    config = configuration(
        root,
        tmp_path / "run",
        data={"classes": None, "image_foreground": "all"},
        network=None,
        source={"checkpoint": str(checkpoint), "orientation": "RAS"},
        risk={"use": True},
        train={"steps": 1, "patch_size": 32, "validate_every": 0},
    )
    result = finetune(config, progress=False)
    assert result.keys is not None
    assert result.keys.loaded == list(source.network.state_dict())
    assert result.leep is not None
    assert np.isfinite(result.leep)
    assert "may suffer" not in (tmp_path / "run" / "log.txt").read_text()
    assert load_source(SourceConfig(checkpoint=result.checkpoint)).config == source.config
