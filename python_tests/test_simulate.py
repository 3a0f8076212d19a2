"""Simulated brains: determinism, labels, affine, files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="needs the extra demo")
pytest.importorskip("nilearn", reason="needs the extra demo")
pytest.importorskip("pydantic", reason="needs the extra demo")

from riskmap_ext.demo import simulate  # noqa: E402
from riskmap_ext.finetune.config.load import parse_config  # noqa: E402
from riskmap_ext.finetune.data.prepare import prepare_cases  # noqa: E402

CSF, GREY, WHITE = 1, 2, 3


@pytest.fixture(scope="module")
def subject():
    return simulate.simulate_subject(3)


def index_of(name):
    return simulate.STRUCTURES.index(name)


def test_same_seed_same_subject_and_other_seed_another(subject):
    again = simulate.simulate_subject(3)
    other = simulate.simulate_subject(4)
    for name in ("image", "tissues", "structures", "affine"):
        np.testing.assert_array_equal(getattr(again, name), getattr(subject, name))
    assert (other.tissues != subject.tissues).mean() > 0.02
    assert not np.array_equal(other.structures, subject.structures)


@pytest.mark.parametrize("contrast", ["t2", "flair"])
def test_contrast_leaves_the_anatomy(subject, contrast):
    other = simulate.simulate_subject(3, contrast=contrast)
    np.testing.assert_array_equal(other.tissues, subject.tissues)
    np.testing.assert_array_equal(other.structures, subject.structures)
    assert not np.array_equal(other.image, subject.image)


@pytest.mark.parametrize(
    ("contrast", "from_dark"),
    [("t1", (CSF, GREY, WHITE)), ("t2", (WHITE, GREY, CSF)), ("flair", (CSF, WHITE, GREY))],
)
def test_tissues_are_ordered_as_in_the_contrast(contrast, from_dark):
    made = simulate.simulate_subject(5, contrast=contrast)
    medians = [np.median(made.image[made.tissues == tissue]) for tissue in from_dark]
    assert medians[0] < medians[1] < medians[2]


def test_slab_is_a_part_of_the_whole(subject):
    low = subject.affine[2, 3]
    slab = simulate.simulate_subject(3, extent=(low + 51, low + 51 + 3 * 10))
    assert slab.image.shape[2] == 11
    np.testing.assert_array_equal(slab.structures, subject.structures[:, :, 17:28])
    np.testing.assert_allclose(slab.affine[2, 3], low + 51)


@pytest.mark.parametrize("contrast", ["t1", "t2", "flair"])
def test_lesions_are_small_spots_of_white_matter(contrast):
    options = {"resolution": 2.0, "contrast": contrast}
    healthy = simulate.simulate_subject(3, **options)
    made = simulate.simulate_subject(3, lesions=True, **options)
    for name in ("tissues", "structures"):
        np.testing.assert_array_equal(getattr(made, name), getattr(healthy, name))
    inside = made.lesions == 1
    assert not healthy.lesions.any()
    assert 0.5 < inside.sum() * 8 / 1000 < 30  # ml
    assert (made.tissues[inside] == WHITE).mean() > 0.9
    assert not made.structures[inside].any()
    lesion, white = (made.image[where].mean() for where in (inside, made.tissues == WHITE))
    assert lesion < 0.9 * white if contrast == "t1" else lesion > 1.1 * white
    # Only lesions and their borders differ.
    assert (made.image != healthy.image).mean() < 0.02


def test_lesions_are_those_of_the_whole_and_of_every_contrast():
    whole = simulate.simulate_subject(3, contrast="flair", lesions=True)
    low = whole.affine[2, 3]
    slab = simulate.simulate_subject(3, lesions=True, extent=(low + 51, low + 51 + 3 * 10))
    np.testing.assert_array_equal(slab.lesions, whole.lesions[:, :, 17:28])
    assert slab.lesions.any()


def test_image_is_brain_extracted(subject):
    np.testing.assert_array_equal(subject.image > 0, subject.tissues > 0)
    assert np.isfinite(subject.image).all()
    assert subject.image.dtype == np.float32


@pytest.mark.parametrize("seed", range(4))
def test_structures_have_plausible_volumes_and_tissues(seed):
    made = simulate.simulate_subject(seed, resolution=2.0)
    millilitres = np.bincount(made.structures.ravel(), minlength=6) * 8 / 1000
    # Both sides together; ventricles and subjects vary a lot.
    limits = {
        "caudate": (2, 14),
        "putamen": (2, 16),
        "thalamus": (3, 20),
        "hippocampus": (2, 16),
        "ventricles": (4, 45),
    }
    for name, (low, high) in limits.items():
        assert low < millilitres[index_of(name)] < high, name
    brain = (made.tissues > 0).sum() * 8 / 1000
    assert 1000 < brain < 2800
    tissues_of = {k: set(made.tissues[made.structures == index_of(k)]) for k in limits}
    assert tissues_of["ventricles"] == {CSF}
    assert tissues_of["caudate"] == tissues_of["putamen"] == {GREY}
    assert tissues_of["hippocampus"] == {GREY}
    assert tissues_of["thalamus"] <= {GREY, WHITE}


def test_affine_puts_structures_where_mni_has_them(subject):
    np.testing.assert_allclose(np.diag(subject.affine), [3, 3, 3, 1])
    expected = {
        "caudate": (13, 8, 12),
        "putamen": (26, 3, 1),
        "thalamus": (11, -18, 7),
        "hippocampus": (27, -21, -14),
    }
    for name, place in expected.items():
        voxels = np.argwhere(subject.structures == index_of(name))
        world = voxels @ subject.affine[:3, :3].T + subject.affine[:3, 3]
        for side in (1, -1):
            centre = world[world[:, 0] * side > 0].mean(axis=0)
            distance = np.linalg.norm(centre - np.array(place) * (side, 1, 1))
            assert distance < 14, (name, side, centre)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed: expected a whole number >= 0, got -1"),
        ({"seed": 0, "contrast": "pd"}, "contrast: expected one of .*'t1'.* got 'pd'"),
        ({"seed": 0, "resolution": 0.5}, "resolution: expected 2 to 8 mm, got 0.5"),
        ({"seed": 0, "extent": (5.0, 5.0)}, "extent: expected lowest z < highest z"),
    ],
)
def test_subject_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate.simulate_subject(**arguments)


@pytest.mark.parametrize("labels", ["tissues", "structures", "lesions"])
def test_cohort_is_read_back_by_the_driver(tmp_path, labels):
    path = simulate.write_cohort(
        tmp_path / "cohort",
        [0, 1],
        labels=labels,
        resolution=6.0,
        extent=(-24.0, 30.0),
        validation_seeds=[2],
    )
    listed = json.loads(path.read_text())
    assert [e["image"] for e in listed["training"]] == [
        "./imagesTr/case_0000.nii.gz",
        "./imagesTr/case_0001.nii.gz",
    ]
    options: dict[str, Any] = {"resolution": 6.0, "extent": (-24.0, 30.0)}
    made = simulate.simulate_subject(1, lesions=labels == "lesions", **options)
    for folder, array in (("imagesTr", made.image), ("labelsTr", getattr(made, labels))):
        volume = nibabel.load(path.parent / folder / "case_0001.nii.gz")
        np.testing.assert_array_equal(np.asarray(volume.dataobj), array)
        np.testing.assert_allclose(volume.affine, made.affine)
        assert int(volume.header["sform_code"]) == 4  # MNI 152
        assert volume.header.get_xyzt_units()[0] == "mm"
    config = parse_config(
        {
            "output": tmp_path / "out",
            "network": {"name": "UNet"},
            "data": {"root": path.parent},
        }
    )
    cases = prepare_cases(config)
    names = getattr(simulate, labels.upper())
    assert cases.classes == list(names)
    assert [c.name for c in cases.train] == ["case_0000", "case_0001"]
    assert [c.name for c in cases.validation] == ["case_0002"]


def test_cohort_errors(tmp_path):
    with pytest.raises(ValueError, match=r"labels: expected one of .*'lesions'.* got 'organs'"):
        simulate.write_cohort(tmp_path, [0], labels="organs")
    with pytest.raises(ValueError, match=r"validation_seeds: expected none of seeds, got \[1\]"):
        simulate.write_cohort(tmp_path, [0, 1], validation_seeds=[1])
    assert list(tmp_path.iterdir()) == []
