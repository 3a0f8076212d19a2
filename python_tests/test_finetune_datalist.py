"""Which files make up the cases: folders, lists, datalists, their names and their classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import image_of, label_of, phantom, problem, read, save, write_cases

from riskmap_ext.finetune import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cases(tmp_path / "data", 3)
    return tmp_path / "data"


def test_missing_image(root):
    image_of(root).unlink()
    data = {"cases": None, "images": "images", "labels": "labels"}
    with pytest.raises(ConfigError, match="case00"):
        read(root, train=["case00"], **data)


def test_missing_file_of_a_datalist(root):
    entries = [{"image": "images/none.nii.gz", "label": "labels/case00.nii.gz"}]
    (root / "dataset.json").write_text(json.dumps({"training": entries}))
    told = problem(root, train=1, validation=0)
    assert str(root / "images" / "none.nii.gz") in told
    assert "no such file" in told


def test_numbers_count_in_the_order_of_names(root):
    cases = read(root, train=1, validation=2)
    assert [c.name for c in cases.train] == ["case00"]
    assert [c.name for c in cases.validation] == ["case01", "case02"]


def test_named_cases(root):
    cases = read(root, train=["case02"], validation=["case00"])
    assert [c.name for c in cases.train] == ["case02"]
    assert [c.name for c in cases.validation] == ["case00"]


def test_the_rest_is_for_training(root):
    cases = read(root, train=None, validation=1)
    assert [c.name for c in cases.train] == ["case00", "case01"]
    assert [c.name for c in cases.validation] == ["case02"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"train": 4}, "asks for 4 cases, but 3"),
        ({"train": 2, "validation": 2}, "data.validation: asks for 2 cases, but 1"),
        ({"train": ["case00"], "validation": ["case00"]}, "both name case00"),
        ({"train": ["case00", "case00"]}, "data.train: names case00 more than once"),
        ({"train": ["case09"]}, "no case is named case09"),
        ({"train": None, "validation": 3}, "no case is left"),
        ({"train": None, "validation": 4}, "data.validation: asks for 4 cases, but 3 are left"),
        ({"classes": None}, "data.classes: missing"),
    ],
)
def test_bad_selections(root, data, told):
    with pytest.raises(ConfigError, match=told):
        read(root, **data)


def test_suffixes_tell_contrasts_apart(tmp_path):
    for name in ("a", "b", "c"):
        values, label = phantom(0)
        save(tmp_path / "images" / f"{name}_T1w.nii.gz", values)
        save(tmp_path / "images" / f"{name}_T2w.nii.gz", values)
        save(tmp_path / "labels" / f"{name}_seg.nii.gz", label)
    cases = read(tmp_path, image_suffix="_T2w", label_suffix="_seg")
    assert [c.name for c in cases.train] == ["a", "b"]
    assert cases.train[0].files.image.name == "a_T2w.nii.gz"
    told = problem(tmp_path)
    assert "images/a_T1w.nii.gz and " in told
    assert "labels/a_seg.nii.gz: no image and label" in told
    assert "data.image_suffix" in told


def test_first_nnunet_channel_needs_no_suffix(tmp_path):
    for name in ("a", "b", "c"):
        values, label = phantom(0)
        save(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", values)
        save(tmp_path / "labelsTr" / f"{name}.nii.gz", label)
    names = ["background", "box", "crate"]
    content = {"labels": {n: i for i, n in enumerate(names)}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    cases = read(tmp_path, classes=None)
    assert cases.classes == names
    assert [c.name for c in cases.train] == ["a", "b"]
    (tmp_path / "dataset.json").unlink()
    assert [c.name for c in read(tmp_path).train] == ["a", "b"]


def test_two_files_of_one_name(root):
    path = root / "labels" / "case00.nii"
    save(path, phantom(1)[1])
    message = problem(root)
    assert f"{path.with_suffix('.nii.gz')}: has the same name as {path}" in message
    path.rename(path.with_name("case00_old.nii"))
    assert [case.name for case in read(root).train] == ["case00", "case01"]


def test_images_without_a_label_are_told(root):
    label_of(root).unlink()
    cases = read(root, train=1)
    assert [c.name for c in cases.train] == ["case01"]
    assert any("case00" in note for note in cases.listing.notes)


def test_decathlon_datalist(tmp_path):
    names = write_cases(tmp_path, 3)
    entries = [{"image": f"./images/{n}.nii.gz", "label": f"./labels/{n}.nii.gz"} for n in names]
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    content = {"labels": labels, "training": entries[:2], "validation": entries[2:]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    cases = read(tmp_path, classes=None, train=None, validation=None)
    assert cases.classes == list(labels.values())
    assert [c.name for c in cases.train] == names[:2]
    assert [c.name for c in cases.validation] == names[2:]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "JSON"),
        ("[]", "expected keys with values, got []"),
        ("{}", "list 'training'"),
        ('{"training": [{"image": "x"}]}', "training.0.label: missing"),
        (
            '{"training": [{"image": ["a", 1], "label": "c"}]}',
            "training.0.image: expected a file, or a list with one for each",
        ),
        ('{"training": [1], "labels": {"a": "b"}}', "labels"),
        ('{"training": 5}', "training: input should be a valid list, got 5"),
        (
            '{"training": [], "validation": "x"}',
            "validation: input should be a valid list, got 'x'",
        ),
        ('{"training": [1], "labels": {"0": "b", "\u00b2": "a"}}', "labels"),
        ('{"training": [1], "labels": {"b": 0, "whole": []}}', "for each region"),
        ('{"training": [1], "labels": {"b": 0, "c": [1, 2], "d": 40000}}', "up to 32767"),
    ],
)
def test_bad_datalists(tmp_path, text, told):
    (tmp_path / "dataset.json").write_text(text)
    message = problem(tmp_path)
    assert str(tmp_path / "dataset.json") in message
    assert told in message


def test_folders_that_are_not_there(tmp_path):
    assert "no such folder" in problem(tmp_path / "none")
    assert "images/ and labels/" in problem(tmp_path)
    assert str(tmp_path / "a") in problem(tmp_path, images="a", labels="b")


def test_a_folder_without_nifti(root):
    for path in (root / "images").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", ".nrrd")))
    told = problem(root)
    assert f"{root / 'images'}: no NIfTI in it (found .nrrd): convert with dcm2niix" in told
    (root / "labels").rename(root / "masks")
    assert problem(root).endswith("or sub-*/ of BIDS in it; found images/, masks/")


def bids(root: Path, kind: str, label: str, places: tuple[str, ...]) -> None:
    """An image of each place beside others, its label below derivatives/ (or beside: "")."""
    for index, place in enumerate(places):
        name, (image, values) = place.replace("/", "_"), phantom(index)
        save(root / place / "anat" / f"{name}{kind}.nii.gz", image)
        save(root / "derivatives" / "manual" / place / "anat" / f"{name}{label}.nii.gz", values)


BIDS = ("sub-01/ses-1", "sub-01/ses-2", "sub-02/ses-1")


def test_a_bids_tree(tmp_path):
    bids(tmp_path, "_T1w", "_space-T1w_dseg", BIDS)
    (tmp_path / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T1w.json").write_text("{}")
    cases = read(tmp_path)
    assert [case.name for case in cases.train] == ["sub-01_ses-1", "sub-01_ses-2"]
    assert cases.train[1].files.label.parts[-6:-3] == ("derivatives", "manual", "sub-01")
    assert cases.listing.image_suffix == ["_T1w"]
    # Sessions of one subject stay apart, subjects without sessions are cases as well.
    for index, kind in enumerate(("_acq-x_T1w", "_label-box_mask")):
        save(tmp_path / "sub-03" / "anat" / f"sub-03{kind}.nii.gz", phantom(3)[index])
    with pytest.raises(ConfigError) as error:
        read(tmp_path)
    assert str(error.value) == (
        f"data.image_suffix: expected files of one kind in {tmp_path}, found _T1w (3), "
        "_acq-x_T1w (1)"
    )
    with pytest.raises(
        ConfigError, match=r"data\.label_suffix: .*_dseg \(3\), _label-box_mask \(1\)"
    ):
        read(tmp_path, image_suffix="_T1w")
    cases = read(tmp_path, image_suffix="_T1w", label_suffix="_dseg")
    assert cases.listing.notes == ["1 left out, no label: sub-03"]
    assert read(tmp_path, image_suffix="_T1w", label_suffix="_mask", train=1, validation=0).train[
        0
    ].files.label.name == ("sub-03_label-box_mask.nii.gz")
    with pytest.raises(ConfigError, match=r"names that end in '_FLAIR' in .*, found _T1w \(3\)"):
        read(tmp_path, image_suffix=["_T1w", "_FLAIR"], label_suffix="_dseg")


def test_two_images_of_a_session(tmp_path):
    for run in ("_run-1_T1w", "_run-2_T1w"):
        bids(tmp_path, run, "_seg", BIDS)
    told = problem(tmp_path, image_suffix="_T1w")
    assert "sub-01_ses-1 has sub-01_ses-1_run-1_T1w.nii.gz as well; a longer" in told
    assert len(read(tmp_path, image_suffix="_run-2_T1w").train) == 2
    channels = read(tmp_path, image_suffix=["_run-1_T1w", "_run-2_T1w"]).channels
    assert channels == ["run-1_T1w", "run-2_T1w"]


def subjects(root: Path, places: list[str]) -> list[dict[str, str]]:
    """Entries of data.cases, one image and label below each of `places`."""
    for index, place in enumerate(places):
        image, label = phantom(index)
        save(root / place / "T1.nii.gz", image)
        save(root / place / "seg.nii.gz", label)
    return [
        {"image": str(root / p / "T1.nii.gz"), "label": str(root / p / "seg.nii.gz")}
        for p in places
    ]


def names_of(root: Path, cases: list[dict[str, str]]) -> list[str]:
    read_cases = read(root, cases=cases, train=None, validation=None)
    return [case.name for case in read_cases.train]


def test_images_that_share_a_name_are_told_apart_by_their_folders(tmp_path):
    assert names_of(tmp_path, subjects(tmp_path, ["a", "b"])) == ["a_T1", "b_T1"]
    deep = subjects(tmp_path, ["s1/mri", "s2/mri", "s2/pet"])
    assert names_of(tmp_path, deep) == ["s1_mri_T1", "s2_mri_T1", "pet_T1"]
    deep[0]["name"] = "first"
    assert names_of(tmp_path, deep)[0] == "first"
    # An image whose name is its own keeps it.
    assert names_of(tmp_path, deep[:1]) == ["first"]
    assert names_of(tmp_path, subjects(tmp_path, ["a"])) == ["T1"]


def test_the_same_image_twice(tmp_path):
    cases = subjects(tmp_path, ["a", "a"])
    with pytest.raises(DataError, match=r"more than one case is named T1 .*list each image once"):
        names_of(tmp_path, cases)
    cases[1]["name"] = "again"
    assert names_of(tmp_path, cases)[1] == "again"


def test_a_datalist_of_one_folder_per_subject(tmp_path):
    subjects(tmp_path, ["a", "b"])
    entries = [{"image": f"{n}/T1.nii.gz", "label": f"{n}/seg.nii.gz"} for n in "ab"]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    cases = read(tmp_path, train=None, validation=None)
    assert [case.name for case in cases.train] == ["a_T1", "b_T1"]


def test_folders_and_files_in_each_others_place(root):
    folder, file = root / "x.nii.gz", root / "images" / "case00.nii.gz"
    folder.mkdir()
    entry = {"image": str(folder), "label": str(label_of(root))}
    told = problem(root, cases=[entry], train=None, validation=None)
    assert f"{folder}: is a folder; expected a file" in told
    assert f"{file}: is a file; expected a folder" in problem(file)
    assert f"{file}: is a file; expected a folder" in problem(
        root, images=str(file), labels="labels"
    )
    assert f"{folder}: is a folder; expected a file" in problem(root, datalist=str(folder))


def test_class_names_of_a_datalist_are_distinct(root):
    content = {"training": [], "labels": {"0": "background", "1": "a", "2": "a"}}
    (root / "dataset.json").write_text(json.dumps(content))
    assert "labels: expected distinct names, got a more than once" in problem(root, classes=None)
