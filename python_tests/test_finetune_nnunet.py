"""A checkpoint of nnU-Net's own trainer as the source of the driver, beside nnU-Net's predictor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from finetune_data import configuration, real_data, rows_of
from nnunet_data import nnunet_folders, prepare, write_raw_data_set

pytest.importorskip("nnunetv2", reason="needs nnU-Net")
pytest.importorskip("monai", reason="needs the extra 'finetune'")

from riskmap_ext.finetune import finetune, load_config
from riskmap_ext.finetune.config.schema import InferenceConfig, SourceConfig
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


def saved(image: Path, output: Path, scale: list[float], border: int) -> Path:
    """The image, longer along two axes, with other voxels and a border of zeros."""
    given = nib.load(image)
    values = np.asarray(given.dataobj)
    values = np.pad(
        values, [(0, values.shape[0] // 2), (0, values.shape[1] // 3), (0, 0)], "reflect"
    )
    values[:border] = values[:, : 2 * border] = 0
    affine = given.affine @ np.diag([*scale, 1.0])
    nib.save(nib.Nifti1Image(values, affine), output / "image.nii.gz")
    return output / "image.nii.gz"


@pytest.mark.parametrize("kind", ["2d", "3d_fullres"])
def test_a_model_of_nnunets_trainer(folder: Path, tmp_path: Path, kind: str) -> None:
    model = train(folder, kind)
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    source = load_source(SourceConfig(checkpoint=checkpoint))
    assert source.classes == list(LABELS)
    assert source.channels == ["MRI"]

    root = folder / "raw" / NAME
    config = configuration(
        root,
        tmp_path / "run",
        data={"classes": None},
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


def test_segmentations_are_those_of_nnunet(folder: Path, tmp_path: Path) -> None:
    """At least 99.9 % of the voxels; nnU-Net adds up its windows in half precision."""
    model = train(folder, "3d_fullres")
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    patch = load_source(SourceConfig(checkpoint=checkpoint)).preprocessing["patch_size"]
    # Four steps of SGD segment noise; these segment a hippocampus.
    run = configuration(
        folder / "raw" / NAME,
        tmp_path / "run",
        data={"classes": None, "train": CASES, "validation": 0},
        network=None,
        source={"checkpoint": str(checkpoint), "orientation": "RAS", "head": "reinitialize"},
        train={"steps": 30, "patch_size": patch, "validate_every": 0, "lr": 0.005},
        write={"report": False},
    )
    trained = torch.load(finetune(run, progress=False).checkpoint, weights_only=True)["state_dict"]
    assert trained.keys() == content["network_weights"].keys()
    content["network_weights"] = trained
    torch.save(content, checkpoint)

    first = sorted((folder / "raw" / NAME / "imagesTr").iterdir())[0]
    mr = saved(first, tmp_path, [1.3, 0.8, 1.1], 4)
    theirs, mine = both(model, mr, tmp_path / "mr", "RAS")
    assert (theirs > 0).mean() > 0.01
    assert np.mean(mine == theirs) >= 0.999
    # Kernels have directions.
    assert np.mean(both(model, mr, tmp_path / "other", "LAS")[1] == theirs) < 0.999

    configured = content["init_args"]["plans"]["configurations"]["3d_fullres"]
    configured["normalization_schemes"] = ["CTNormalization"]
    (model / "plans.json").write_text(json.dumps(content["init_args"]["plans"]))
    torch.save(content, checkpoint)
    assert load_source(SourceConfig(checkpoint=checkpoint)).preprocessing["window"] is not None
    ct = saved(first, tmp_path, [0.9, 1.0, 4.0], 2)
    theirs, mine = both(model, ct, tmp_path / "ct", "RAS")
    assert (theirs > 0).mean() > 0.01
    assert np.mean(mine == theirs) >= 0.999


def both(model: Path, image: Path, output: Path, orientation: str) -> tuple[np.ndarray, np.ndarray]:
    """Segmentations by nnU-Net and by the driver."""
    (mine,) = predict_images(
        model / "fold_0" / "checkpoint_final.pth",
        [image],
        output,
        orientation=orientation,
        inference=InferenceConfig(overlap=0.5),
        progress=False,
    )
    return segmented_by_nnunet(model, image), np.asarray(nib.load(mine).dataobj)


def test_the_page_of_ten_scans(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, riskmap: Callable
) -> None:
    """Its commands, from an empty folder, with a source of CT and two steps a fold."""
    organs = tmp_path / "organs" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    shutil.copytree(train(folder, "3d_fullres"), organs)
    path = organs / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    configured = content["init_args"]["plans"]["configurations"]["3d_fullres"]
    configured["normalization_schemes"] = ["CTNormalization"]
    torch.save(content, path)
    shutil.copytree(tmp_path / "organs", tmp_path / "other")
    files = sorted((real_data("hippocampus") / "images").iterdir())[:11]
    for image, place in zip(files, ["scans"] * 10 + ["new"], strict=True):
        for kind in ("images", "labels"):
            (tmp_path / place / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(image.parent.parent / kind / image.name, tmp_path / place / kind)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "howto" / "ten_scans.md").read_text()
    commands = re.findall(r"^riskmap (.*)$", page, re.MULTILINE)
    assert [line.split()[0] for line in commands] == [
        *("init", "rank", "finetune", "finetune", "predict", "evaluate")
    ]
    for line in commands:
        short = ["train.steps=2", "threads=1"] if line.startswith("finetune") else []
        code, _, err = riskmap(*line.split(), *short)
        assert code == 0, err
    run = tmp_path / "runs" / "scans"
    assert len(json.loads((run / "splits_final.json").read_text())) == 5
    assert sum(bool(row["fold"]) for row in rows_of(run / "dice.csv")) == 10
    assert (run / "report.html").exists()
    assert len(list((tmp_path / "segmentations").iterdir())) == 1
    assert load_config(run / "config.yaml").data.window is not None
