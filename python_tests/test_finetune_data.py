"""Reading image and label files: awkward headers are handled, bad files refused by name."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import (
    RAS,
    SHAPE,
    configuration,
    image_of,
    label_of,
    phantom,
    problem,
    read,
    real_data,
    save,
    settings,
    write_cases,
)

from riskmap_ext.finetune import ConfigError, DataError, parse_config, prepare_cases
from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.orientation import slice_axis_of
from riskmap_ext.finetune.base.structures import IGNORE_INDEX

ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*order)
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cases(tmp_path / "data", 3)
    return tmp_path / "data"


def one_case(image: Path, label: Path, **data):
    """The single case of an image and label file."""
    given = {"root": None, "cases": [{"image": str(image), "label": str(label)}]}
    given |= {"train": None, "validation": None} | data
    (case,) = prepare_cases(configuration(image.parent, image.parent / "unused", data=given)).train
    return case


def oriented(values: np.ndarray, codes: str, affine: np.ndarray = RAS):
    """`values` (RAS order) stored with other axes, in the same place of the world."""
    image = nib.Nifti1Image(values, affine)
    wanted = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), wanted))


# Bad files.


@pytest.mark.parametrize("which", [image_of, label_of])
def test_truncated_gzip(root, which):
    path = which(root)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told = problem(root)
    assert str(path) in told
    assert "cannot be read" in told


def test_truncated_after_a_valid_header(root):
    path = image_of(root)
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain[: len(plain) // 2]))
    told = problem(root)
    assert str(path) in told
    assert "cannot be read" in told


def test_text_under_an_image_name(root):
    image_of(root).write_text("not an image")
    told = problem(root)
    assert str(image_of(root)) in told


def test_hdr_without_img(root):
    image_of(root).unlink()
    pair = nib.Nifti1Pair(phantom(0)[0], RAS)
    nib.save(pair, root / "images" / "case00.hdr")
    (root / "images" / "case00.img").unlink()
    assert str(root / "images" / "case00.hdr") in problem(root)


def test_four_dimensions(root):
    save(image_of(root), np.ones((*SHAPE, 2), dtype=np.float32))
    told = problem(root)
    assert str(image_of(root)) in told
    assert "4-D" in told
    assert str((*SHAPE, 2)) in told


def test_a_fourth_axis_of_one_is_dropped(root):
    save(image_of(root), np.ones((*SHAPE, 1), dtype=np.float32))
    assert read(root).train[0].image.shape == (1, *SHAPE)


def test_two_dimensions(root):
    save(image_of(root), np.ones(SHAPE[:2], dtype=np.float32))
    assert "2-D" in problem(root)


def test_other_shape(root):
    save(label_of(root), np.zeros((20, 24, 11), dtype=np.uint8))
    told = problem(root)
    assert str(label_of(root)) in told
    assert str(image_of(root)) in told
    assert "(20, 24, 11)" in told


@pytest.mark.parametrize(
    "affine",
    [np.diag([1, 1, 1.5, 1]), np.diag([-1, 1, 1, 1]), RAS + 5 * np.eye(4, k=3)],
    ids=["spacing", "flipped", "shifted"],
)
def test_other_affine(root, affine):
    save(label_of(root), phantom(0)[1], affine)
    told = problem(root)
    assert str(label_of(root)) in told
    assert "affines" in told


def test_an_affine_that_differs_by_rounding_is_taken(root):
    save(label_of(root), phantom(0)[1], RAS + 1e-3 * np.eye(4, k=3))
    assert len(read(root).train) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number(root, value):
    image = phantom(0)[0]
    image[3, 3, 3] = value
    save(image_of(root), image)
    told = problem(root)
    assert str(image_of(root)) in told
    assert "1 of 5760 voxels are NaN or infinite" in told


def test_label_out_of_range(root):
    label = phantom(0)[1].astype(np.int16)
    label[0, 0, 0], label[0, 0, 1] = 7, -1
    save(label_of(root), label)
    told = problem(root)
    assert str(label_of(root)) in told
    assert "-1, 7" in told
    assert "data.classes: background, box, crate" in told


def test_label_outside_the_map(root):
    told = problem(root, label_map={1: 1})
    assert str(label_of(root)) in told
    assert "2 are not in data.label_map" in told
    assert "data.other_labels" in told


def test_fractional_labels(root):
    label = phantom(0)[1].astype(np.float32)
    label[0, 0, 0] = 0.5
    save(label_of(root), label)
    told = problem(root)
    assert str(label_of(root)) in told
    assert "not whole numbers" in told
    assert "0.5" in told


def test_nan_label(root):
    label = phantom(0)[1].astype(np.float32)
    label[0, 0, 0] = np.nan
    save(label_of(root), label)
    assert str(label_of(root)) in problem(root)


def test_singular_affine(root):
    image = nib.Nifti1Image(phantom(0)[0], None)
    image.header["sform_code"] = 1
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    nib.save(image, image_of(root))
    told = problem(root)
    assert str(image_of(root)) in told


def test_complex_voxels(root):
    save(image_of(root), np.ones(SHAPE, dtype=np.complex64))
    assert "real numbers" in problem(root)


@pytest.mark.parametrize("largest", [1e300, -2e38])
def test_voxels_beyond_float32(root, largest, recwarn):
    image = phantom(0)[0].astype(np.float64)
    image[3, 3, 3] = largest
    save(image_of(root), image)
    told = problem(root)
    assert f"{image_of(root)}: 1 of 5760 voxels are too large for float32" in told
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("spacing", "told"),
    [
        ([1e-3, 1e-3, 1e-3], "makes 19001 x 23001 x 11001 of its 20 x 24 x 12 voxels"),
        ([1e-12, 1, 1], "GiB of memory available: use coarser voxels"),
        ([100, 100, 100], "makes 1 x 1 x 1 of its 20 x 24 x 12 voxels of 1 x 1 x 1 mm"),
        ([1, 1, 5], "expected 4 or more along each axis"),
    ],
)
def test_absurd_spacing(root, spacing, told):
    message = problem(root, spacing=spacing)
    assert f"{image_of(root)}: data.spacing" in message
    assert told in message


def test_spacing_that_memory_does_not_hold(root, monkeypatch):
    monkeypatch.setattr("riskmap_ext.finetune.data.resample.available_memory", lambda: 2**20)
    told = problem(root, spacing=[0.5, 0.5, 0.5])
    assert "makes 39 x 47 x 23" in told
    assert "takes about 0.00251 GiB; expected no more than half of the 0.000977 GiB" in told


def test_memory_is_known_here():
    assert available_memory() > 2**20


def test_thin_volumes_may_be_resampled_in_plane(tmp_path):
    values, label = phantom(0, shape=(20, 24, 12))
    save(tmp_path / "i.nii.gz", values[..., :3])
    save(tmp_path / "l.nii.gz", label[..., :3])
    case = one_case(tmp_path / "i.nii.gz", tmp_path / "l.nii.gz", spacing=[2, 2, 1])
    assert case.image.shape == (1, 10, 12, 3)


def test_all_problems_are_told_at_once(root):
    image_of(root, "case00").write_text("x")
    save(label_of(root, "case01"), np.full(SHAPE, 9, dtype=np.uint8))
    save(image_of(root, "case02"), np.full(SHAPE, np.nan, dtype=np.float32))
    told = problem(root)
    assert "3 problems" in told
    for path in (image_of(root), label_of(root, "case01"), image_of(root, "case02")):
        assert str(path) in told


def test_everything_ignored(root):
    told = problem(root, label_map={0: "ignore", 1: "ignore", 2: "ignore"})
    assert "every voxel is ignored" in told


# Handled.


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_any_orientation_comes_to_ras_and_back(tmp_path, codes, axis):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = -10, 5, 7
    values, label = phantom(1)
    nib.save(oriented(values, codes, affine), tmp_path / "i.nii.gz")
    nib.save(oriented(label, codes, affine), tmp_path / "l.nii.gz")
    case = one_case(tmp_path / "i.nii.gz", tmp_path / "l.nii.gz", normalize="none", slice_axis=axis)
    np.testing.assert_array_equal(case.grid.to_ras(case.image[0]), values)
    np.testing.assert_array_equal(case.grid.to_ras(case.label), label)
    np.testing.assert_allclose(case.grid.ras_spacing(), (1, 2, 3))
    assert slice_axis_of(case.grid.orientation[2]) == axis
    file = nib.load(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(case.grid.to_file(case.label), file.get_fdata())
    np.testing.assert_allclose(case.grid.affine, file.affine)
    assert not case.grid.resampled


def test_oblique_affine(tmp_path):
    angle = np.radians(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    values, label = phantom(1)
    save(tmp_path / "i.nii.gz", values, turn)
    save(tmp_path / "l.nii.gz", label, turn)
    case = one_case(tmp_path / "i.nii.gz", tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(case.grid.to_file(case.label), label)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_labels_of_any_type(root, dtype):
    label = phantom(0)[1]
    save(label_of(root), label.astype(dtype))
    case = read(root).train[0]
    assert case.label.dtype == torch.int16
    np.testing.assert_array_equal(case.label, label)


def test_scaled_and_big_endian_files(tmp_path):
    raw = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nib.Nifti1Image(raw.astype(">i2"), RAS, nib.Nifti1Header(endianness=">"))
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "i.nii")
    save(tmp_path / "l.nii", np.zeros(raw.shape, dtype=np.uint8))
    case = one_case(tmp_path / "i.nii", tmp_path / "l.nii", normalize="none")
    expected = nib.load(tmp_path / "i.nii").get_fdata()
    np.testing.assert_allclose(case.image[0], expected)
    assert case.image.dtype == torch.float32


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgz", ".hdr"])
def test_formats(tmp_path, ending):
    values, label = phantom(2)
    kinds = {".mgz": nib.MGHImage, ".hdr": nib.Nifti1Pair}
    kind = kinds.get(ending, nib.Nifti1Image)
    nib.save(kind(values, RAS), tmp_path / f"i{ending}")
    nib.save(kind(label, RAS), tmp_path / f"l{ending}")
    case = one_case(tmp_path / f"i{ending}", tmp_path / f"l{ending}", normalize="none")
    np.testing.assert_array_equal(case.image[0], values)
    np.testing.assert_array_equal(case.label, label)
    assert case.name == "i"


def test_zscore_over_the_image_foreground(root):
    case = read(root).train[0]
    np.testing.assert_array_equal(case.mask, phantom(0)[0] != 0)
    inside = case.image[0, case.mask].double()
    assert abs(float(inside.mean())) < 1e-4
    assert abs(float(inside.std(correction=0)) - 1) < 1e-4


def test_image_foreground_kinds(root):
    values = phantom(0)[0]
    save(image_of(root), values + 3)  # air that is not zero
    masks = {
        kind: read(root, image_foreground=kind).train[0].mask.numpy()
        for kind in ("all", "nonzero", "otsu")
    }
    assert masks["all"].all()
    assert masks["nonzero"].all()
    np.testing.assert_array_equal(masks["otsu"], values != 0)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_images(root, value):
    save(image_of(root), np.full(SHAPE, value, dtype=np.float32))
    case = read(root).train[0]
    assert bool(case.mask.all())
    assert bool(torch.isfinite(case.image).all())


def test_label_map_merges_ignores_and_names(root):
    case = read(root, label_map={1: "crate", 2: "ignore"}).train[0]
    label = phantom(0)[1]
    expected = np.select([label == 1, label == 2], [2, IGNORE_INDEX], 0)
    np.testing.assert_array_equal(case.label, expected)


@pytest.mark.parametrize(("rest", "value"), [("background", 0), ("ignore", IGNORE_INDEX)])
def test_other_labels(root, rest, value):
    case = read(root, label_map={1: 1}, other_labels=rest).train[0]
    label = phantom(0)[1]
    np.testing.assert_array_equal(case.label, np.select([label == 1, label == 2], [1, value], 0))


def test_classes_follow_from_the_names_in_the_map(root):
    cases = read(root, classes=None, label_map={1: "thing", 2: "thing"})
    assert cases.classes == ["background", "thing"]


def test_unknown_class_in_the_map(root):
    with pytest.raises(ConfigError, match=r"data\.label_map: 1: 'boxx' is no class"):
        read(root, label_map={1: "boxx", 2: 2})


def test_resampling_and_back(root):
    label = phantom(0)[1]
    case = read(root, spacing=[2, 2, 2]).train[0]
    assert case.image.shape == (1, 10, 12, 6)
    assert case.image.shape[1:] == case.label.shape == case.mask.shape
    np.testing.assert_allclose(case.grid.spacing, (2, 2, 2))
    assert case.grid.resampled
    np.testing.assert_array_equal(case.full_label, label)
    back = case.grid.to_full(case.label)
    assert back.shape == label.shape
    assert back.dtype == case.label.dtype
    assert float((back.numpy() == label).mean()) > 0.9
    smooth = case.grid.to_full(torch.ones(2, *case.label.shape), mode="bilinear")
    np.testing.assert_allclose(smooth, np.ones((2, *label.shape)), rtol=1e-5)


def test_digest_follows_the_content(root):
    before = [c.digest for c in read(root).train]
    assert before == [c.digest for c in read(root).train]
    label = phantom(0)[1]
    label[0, 0, 0] = 1
    save(label_of(root), label)
    after = [c.digest for c in read(root).train]
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert [c.digest for c in read(root, normalize="none").train][1] != before[1]


# Headers met in the wild.

READABLE = {
    "nibabel_anatomical.nii": (33, 41, 25),
    "nibabel_reoriented_anat_moved.nii": (21, 26, 22),
    "niivue_AIL.nii.gz": (79, 67, 64),
    "niivue_low_res.nii.gz": (7, 5, 3),
    "niivue_minimal.nii.gz": (64, 64, 10),
    "niivue_ras.hdr": (62, 41, 34),
}


@pytest.mark.parametrize("name", READABLE)
def test_awkward_headers_are_read(tmp_path, name):
    path = real_data("headers") / name
    image = nib.load(path)
    values = image.get_fdata()
    label = save(tmp_path / "l.nii.gz", (values > values.mean()).astype(np.uint8), image.affine)
    case = one_case(path, label, normalize="none")
    assert case.grid.shape == READABLE[name]
    np.testing.assert_allclose(case.grid.to_file(case.image[0]), values, rtol=1e-5)
    np.testing.assert_allclose(case.grid.affine, image.affine)


def test_a_label_drawn_on_an_ail_image():
    folder = real_data("headers")
    case = one_case(
        folder / "niivue_AIL.nii.gz",
        folder / "niivue_draw.nii.gz",
        label_map={1: 1, 2: 2, 3: 2},
        other_labels="background",
    )
    label = nib.load(folder / "niivue_draw.nii.gz").get_fdata()
    np.testing.assert_array_equal(case.grid.to_file(case.label) > 0, np.isin(label, (1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nibabel_functional.nii", "4-D"),
        ("nibabel_example4d.nii.gz", "4-D"),
        ("nibabel_example_nifti2.nii.gz", "4-D"),
        ("nibabel_test.mgz", "4-D"),
        ("nibabel_resampled_anat_moved.nii", "153 of"),
    ],
)
def test_awkward_headers_are_refused_by_name(tmp_path, name, told):
    path = real_data("headers") / name
    image = nib.load(path)
    label = save(tmp_path / "l.nii.gz", np.zeros(image.shape[:3], np.uint8), image.affine)
    with pytest.raises(DataError) as caught:
        one_case(path, label)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


def test_a_parcellation_with_sparse_values():
    folder = real_data("multiclass_fs")
    case = one_case(
        folder / "norm.mgz",
        folder / "aparc.a2009s+aseg.mgz",
        label_map={17: 1, 53: 1, 12175: 2},
        other_labels="background",
    )
    assert case.image.shape == (1, 256, 256, 256)
    values = np.asarray(nib.load(folder / "aparc.a2009s+aseg.mgz").dataobj)
    counts = torch.bincount(case.label.flatten().long())
    assert counts[1:].tolist() == [np.isin(values, (17, 53)).sum(), (values == 12175).sum()]


def test_settings_are_not_shared_between_tests(tmp_path):
    first = settings(tmp_path, tmp_path, data={"train": 1})
    assert settings(tmp_path, tmp_path)["data"]["train"] == 2
    assert parse_config(first).data.train == 1
