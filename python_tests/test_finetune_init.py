"""`riskmap init`: the configuration that it writes for each layout runs as it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import (
    RAS,
    configuration,
    image_of,
    label_of,
    phantom,
    real_data,
    save,
    write_cases,
)

from riskmap_ext.finetune import Config, DataError, InputError, check_run, finetune, load_config
from riskmap_ext.finetune.init import write_first_config

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (20, 24, 17)


def write(root: Path, images: str, labels: str, count: int = 5, shape: Any = SHAPE) -> None:
    """images, labels: paths of case {n}."""
    for n in range(count):
        image, label = phantom(n, shape)
        save(root / images.format(n=n), image)
        save(root / labels.format(n=n), label)


def folders(root: Path) -> None:
    write(root, "images/case{n}.nii.gz", "labels/case{n}.nii.gz")


def suffixes(root: Path) -> None:
    for kind in ("_FLAIR", "_T1w"):
        write(root, f"images/case{{n}}{kind}.nii.gz", "labels/case{n}_lesion.nii.gz")
    for n in range(5):  # a contrast of another grid is no channel of the same input
        save(root / "images" / f"case{n}_T2w.nii.gz", phantom(n, (8, 9, 10))[0])
    save(root / "images" / "case9_FLAIR.nii.gz", phantom(9, SHAPE)[0])  # without a label


def training_folders(root: Path) -> None:
    for channel in range(2):
        write(root, f"imagesTr/c_{{n}}_000{channel}.nii.gz", "labelsTr/c_{n}.nii.gz")


def nnunet(root: Path) -> None:
    training_folders(root)
    labels = {"background": 0, "box": 1, "crate": 2}
    names = {"0": "T1", "1": "T2"}
    content = {"labels": labels, "channel_names": names, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content))


def decathlon(root: Path) -> None:
    write(root, "imagesTr/a_{n}.nii.gz", "labelsTr/a_{n}.nii.gz")
    entries = [{k: f"./{k}sTr/a_{n}.nii.gz" for k in ("image", "label")} for n in range(5)]
    content = {"labels": {"0": "background", "1": "box", "2": "crate"}, "training": entries}
    (root / "dataset.json").write_text(json.dumps(content))


def bids(root: Path) -> None:
    for kind in ("_FLAIR", "_T1w"):
        image = f"sub-{{n}}/ses-1/anat/sub-{{n}}_ses-1{kind}.nii.gz"
        place = "derivatives/hand/sub-{n}/ses-1/anat/sub-{n}_ses-1_label-box_mask.nii.gz"
        write(root, image, place)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (folders, {"image_suffix": "", "label_suffix": ""}),
        (suffixes, {"image_suffix": ["_FLAIR", "_T1w"], "label_suffix": "_lesion"}),
        (training_folders, {"image_suffix": ["_0000", "_0001"], "label_suffix": ""}),
        (nnunet, {"classes": None}),
        (decathlon, {"classes": None}),
        (bids, {"image_suffix": ["_FLAIR", "_T1w"], "label_suffix": "_label-box_mask"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_it_writes_runs_as_it_is(
    riskmap: Callable, tmp_path: Path, layout: Callable[[Path], None], expected: dict[str, Any]
) -> None:
    root, path = tmp_path / "the data", tmp_path / "my run.yaml"
    layout(root)
    code, out, err = riskmap("init", root, "--output", path)
    assert (code, err) == (0, "")
    assert ("Warning: 1 left out, no image _T1w and label" in out) == (layout is suffixes)
    first, second = out.splitlines()[-2:]
    assert shlex.split(first) == ["riskmap", "finetune", str(path), "--dry-run"]
    assert shlex.split(second) == ["riskmap", "finetune", str(path)]
    config = load_config(path)
    assert {key: getattr(config.data, key) for key in expected} == expected
    assert config.output == tmp_path / "runs" / "the data"
    assert config.train.patch_size == [16, 24, 16]
    found = check_run(config, progress=False)
    assert [len(fold.val) for fold in found.folds] == [1] * 5
    names = ["box", "crate"] if "classes" in expected else ["label_1", "label_2"]
    assert list(found.class_voxels) == ["background", *names]


def suggested(root: Path, **options: Any) -> Config:
    path = write_first_config(root, root / "run.yaml", progress=False, **options)
    assert path.read_text().endswith("\n")
    config = load_config(path)
    check_run(config, progress=False)
    return config


def test_what_it_finds_in_the_voxels(tmp_path):
    write_cases(tmp_path, 3)  # 12 slices
    save(image_of(tmp_path), phantom(0)[0] - 1000)
    for n in range(3):
        save(label_of(tmp_path, f"case0{n}"), phantom(n)[1] * 40, RAS if n else RAS * 2)
    save(image_of(tmp_path), phantom(0)[0] - 1000, RAS * 2)
    config = suggested(tmp_path)
    assert config.network is not None
    assert config.network.args["spatial_dims"] == 2
    assert config.train.patch_size == [16, 24]
    assert config.data.label_map == {40: "label_40", 80: "label_80"}
    assert config.data.window == [-175, 250]  # CT
    assert (config.data.normalize, config.data.image_foreground) == ("rescale", "otsu")
    text = (tmp_path / "run.yaml").read_text()
    assert "# spacing: [1.0, 1.0, 1.0]" in text
    # A table of the values has names for them.
    (tmp_path / "names.csv").write_text("value,name\n40,box\n80,crate\n120,barrel\n")
    config = suggested(tmp_path, overwrite=True)
    assert config.data.label_map == {40: "box", 80: "crate"}


def test_with_a_source(tmp_path):
    suffixes(tmp_path / "data")
    write_cases(tmp_path / "other", 3)
    run = finetune(configuration(tmp_path / "other", tmp_path / "source"), progress=False)
    config = suggested(tmp_path / "data", source=run.checkpoint)
    assert config.source is not None
    assert config.source.checkpoint == run.checkpoint
    assert config.source.channels == [0]
    assert config.network is None
    assert config.train.patch_size == [16, 16]


def test_a_run_that_is_there_and_a_file_that_is_there(riskmap, tmp_path):
    write_cases(tmp_path / "data", 2, shape=SHAPE)
    (tmp_path / "runs" / "data").mkdir(parents=True)
    path = tmp_path / "run.yaml"
    write_first_config(tmp_path / "data", path, progress=False)
    assert load_config(path).output == tmp_path / "runs" / "data_2"
    before = path.read_text()
    code, _, err = riskmap("init", tmp_path / "data", "--output", path)
    assert code == 2
    assert f"--output: {path} exists already; --overwrite replaces it" in err
    assert path.read_text() == before
    assert riskmap("init", tmp_path / "data", "--output", path, "--overwrite", "--quiet")[0] == 0


def test_of_two_cases_one_is_for_validation_and_of_one_none(tmp_path):
    write_cases(tmp_path, 2, shape=SHAPE)
    assert suggested(tmp_path).data.validation == 1
    for path in (image_of(tmp_path), label_of(tmp_path)):
        path.unlink()
    assert suggested(tmp_path, overwrite=True).data.validation == 0


def refusal(root: Path) -> str:
    with pytest.raises(InputError) as error:
        write_first_config(root, root / "run.yaml", progress=False)
    assert not (root / "run.yaml").exists()
    return str(error.value)


def test_what_nothing_can_be_made_of(tmp_path):
    assert "expected dataset.json, images/ and labels/" in refusal(tmp_path)
    write_cases(tmp_path, 3, shape=SHAPE)
    for n in range(3):
        save(label_of(tmp_path, f"case0{n}"), np.zeros(SHAPE, dtype=np.uint8))
    assert f"{tmp_path / 'labels'}: no labels: every voxel is 0" in refusal(tmp_path)
    for spoilt in (image_of(tmp_path), label_of(tmp_path, "case01")):
        spoilt.write_bytes(b"nothing")
    told = refusal(tmp_path)
    assert f"{image_of(tmp_path)}: cannot be read" in told
    assert f"{label_of(tmp_path, 'case01')}: cannot be read" in told
    (tmp_path / "labels").rename(tmp_path / "elsewhere")
    assert "found elsewhere/, images/" in refusal(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        write_first_config(tmp_path / "none", tmp_path / "run.yaml")


def test_of_real_brains(tmp_path):
    root = real_data("brain_ixi")
    config = load_config(write_first_config(root, tmp_path / "run.yaml", progress=False))
    assert config.data.label_map == root.resolve() / "labels.csv"
    assert (config.data.image_suffix, config.data.label_suffix) == (["_T1w"], "_dlmuse")
