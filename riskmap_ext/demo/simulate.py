"""Simulated brain MRI with tissue and deep-structure labels, offline, from the MNI152 templates.

Each subject is the ICBM 152 average brain that ships with nilearn (T1, grey-matter and
white-matter maps), warped by a random smooth deformation and given its own tissue intensities,
bias field and noise. The labels are warped with the image, so they are exact by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from riskmap_ext.finetune.base.files import write_json, write_nifti

TISSUES = ("background", "csf", "grey matter", "white matter")
STRUCTURES = ("background", "caudate", "putamen", "thalamus", "hippocampus", "ventricles")
LESIONS = ("background", "lesion")
_CLASSES = {"tissues": TISSUES, "structures": STRUCTURES, "lesions": LESIONS}

_MNI_CODE = 4  # NIFTI_XFORM_MNI_152

# Mean intensity of CSF, grey and white matter relative to the brightest tissue.
CONTRASTS = {
    "t1": (0.30, 0.65, 0.95),
    "t2": (1.00, 0.62, 0.45),
    "flair": (0.20, 0.85, 0.65),
}
# Intensity of a white-matter lesion, on the same scale: dark in T1, bright in T2 and FLAIR.
_LESION_INTENSITY = {"t1": 0.62, "t2": 0.90, "flair": 1.05}


@dataclass(frozen=True)
class _Ellipsoid:
    """An ellipsoid of the right hemisphere in MNI mm; the left one is its mirror image."""

    structure: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    yaw: float = 0.0  # degrees, turns the front end to the right
    pitch: float = 0.0  # degrees, raises the front end


# Coarse stand-ins for the structures' places and sizes; each is clipped to the tissue it is made
# of, so that its outer border follows the template. Earlier entries take precedence.
_ELLIPSOIDS = (
    _Ellipsoid("ventricles", (7, 14, 9), (8, 20, 11), yaw=12),
    _Ellipsoid("ventricles", (11, -12, 20), (9, 26, 9), yaw=-8),
    _Ellipsoid("ventricles", (24, -38, 8), (9, 14, 11)),
    _Ellipsoid("caudate", (13, 13, 8), (7, 11, 10), yaw=-8),
    _Ellipsoid("caudate", (16, -6, 20), (5, 15, 6), yaw=-12),
    _Ellipsoid("thalamus", (11, -18, 7), (9, 14, 8.5), yaw=-25),
    _Ellipsoid("putamen", (26, 3, 1), (6.5, 15, 10), yaw=-12),
    _Ellipsoid("hippocampus", (27, -21, -14), (8, 19, 8), yaw=8, pitch=-22),
)
_MADE_OF = {
    "caudate": ("grey matter",),
    "putamen": ("grey matter",),
    "thalamus": ("grey matter", "white matter"),
    "hippocampus": ("grey matter",),
    "ventricles": ("csf",),
}
# The thalamus has an intensity between grey and white matter.
_WHITE_SHARE = {"thalamus": 0.35, "putamen": 0.12}


@dataclass(frozen=True)
class Subject:
    """A simulated case on a grid in MNI space.

    image: [X, Y, Z] float32, > 0 in the brain, 0 around it (brain-extracted), arbitrary units.
    tissues: [X, Y, Z] uint8, indices into TISSUES.
    structures: [X, Y, Z] uint8, indices into STRUCTURES.
    lesions: [X, Y, Z] uint8, indices into LESIONS; all background in a healthy subject.
    affine: [4, 4] float64, voxel index to mm (RAS).
    """

    image: np.ndarray
    tissues: np.ndarray
    structures: np.ndarray
    lesions: np.ndarray
    affine: np.ndarray


def simulate_subject(
    seed: int,
    *,
    resolution: float = 3.0,
    contrast: str = "t1",
    extent: tuple[float, float] | None = None,
    lesions: bool = False,
) -> Subject:
    """Simulates one subject, deterministically for the same arguments.

    Args:
        seed: determines anatomy, intensities, bias field and noise (>= 0).
        resolution: isotropic voxel size in mm, 2 to 8 (below 2 mm the templates would only be
            interpolated).
        contrast: key of CONTRASTS: "t1", "t2" or "flair". The anatomy does not depend on it.
        extent: lowest and highest z in MNI mm of a slab; None is the whole brain.
        lesions: adds white-matter lesions, in the same places in every contrast; nothing else
            changes.

    Raises:
        ValueError: a negative seed, unknown contrast, resolution out of range or an empty extent.
    """
    if seed < 0:
        raise ValueError(f"seed: expected a whole number >= 0, got {seed}")
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast: expected one of {sorted(CONTRASTS)}, got {contrast!r}")
    if not 2.0 <= resolution <= 8.0:
        raise ValueError(f"resolution: expected 2 to 8 mm, got {resolution}")
    # Independent streams, so that contrast and slab do not change the anatomy.
    anatomy, appearance, disease = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)
    )
    grid, affine = _grid(resolution, extent)
    place = _deform(anatomy, grid)
    grey, white, fluid, texture = _sample_templates(place)
    brain = grey + white + fluid > 0.5
    tissues = np.where(brain, 1 + np.argmax([fluid, grey, white], axis=0), 0).astype(np.uint8)
    structures = _label_structures(place, tissues)
    if lesions:
        share = _lesion_share(disease, grid, place, white, structures)
    else:
        share = np.zeros(tissues.shape, dtype=np.float32)
    fractions = fluid, grey, white
    image = _render(appearance, grid, contrast, fractions, texture, structures, share)
    return Subject(image, tissues, structures, (share > 0.5).astype(np.uint8), affine)


def write_cohort(
    folder: Path | str,
    seeds: Sequence[int],
    *,
    labels: str = "structures",
    resolution: float = 3.0,
    contrast: str = "t1",
    extent: tuple[float, float] | None = None,
    validation_seeds: Sequence[int] = (),
) -> Path:
    """Writes a cohort as NIfTI with a datalist in Medical Segmentation Decathlon form.

    folder/imagesTr/case_0007.nii.gz and folder/labelsTr/case_0007.nii.gz for each seed, and
    folder/dataset.json that lists them under "training" or "validation", with label names.

    Args:
        labels: "tissues", "structures" or "lesions"; subjects have lesions only with "lesions".
        resolution, contrast, extent: as for `simulate_subject`.

    Returns: the path of dataset.json.

    Raises: ValueError as `simulate_subject`, for other labels, or for seeds in both lists.
    """
    if labels not in _CLASSES:
        raise ValueError(f"labels: expected one of {sorted(_CLASSES)}, got {labels!r}")
    both = sorted(set(seeds) & set(validation_seeds))
    if both:
        raise ValueError(f"validation_seeds: expected none of seeds, got {both} in both")
    folder = Path(folder)
    entries: dict[str, list[dict[str, str]]] = {}
    for key, chosen in (("training", seeds), ("validation", validation_seeds)):
        entries[key] = []
        for seed in chosen:
            subject = simulate_subject(
                seed,
                resolution=resolution,
                contrast=contrast,
                extent=extent,
                lesions=labels == "lesions",
            )
            name = f"case_{seed:04d}.nii.gz"
            for kind, volume in (("images", subject.image), ("labels", getattr(subject, labels))):
                path = folder / f"{kind}Tr" / name
                write_nifti(path, volume, subject.affine, codes=(_MNI_CODE, _MNI_CODE))
            entries[key].append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    names = _CLASSES[labels]
    path = folder / "dataset.json"
    write_json(
        path,
        {
            "name": f"simulated {contrast} brains: {labels}",
            "description": "Simulated from the MNI152 templates; no real subjects.",
            "modality": {"0": contrast},
            "labels": {str(index): name for index, name in enumerate(names)},
            "numTraining": len(entries["training"]),
            **entries,
        },
    )
    return path


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Grey, white and fluid fractions and T1 texture on the 2 mm template grid, and its affine."""
    from nilearn import datasets

    t1_image = datasets.load_mni152_template(resolution=2)
    t1 = t1_image.get_fdata(dtype=np.float32)
    grey = datasets.load_mni152_gm_template(resolution=2).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=2).get_fdata(dtype=np.float32)
    brain = ndimage.binary_fill_holes(t1 > 0.1)
    grey, white = (np.clip(part, 0, 1) * brain for part in (grey, white))
    total = np.maximum(grey + white, 1.0)
    grey, white = grey / total, white / total
    fluid = brain * (1.0 - grey - white)
    # What the three tissues do not explain of the T1 template, as texture.
    parts = np.stack([fluid[brain], grey[brain], white[brain]], axis=1)
    weights, *_ = np.linalg.lstsq(parts, t1[brain], rcond=None)
    texture = np.zeros_like(t1)
    texture[brain] = t1[brain] - parts @ weights
    return grey, white, fluid, texture, np.linalg.inv(t1_image.affine)


def _grid(resolution: float, extent: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """World coordinates [3, X, Y, Z] in mm of a box around the brain, and the affine."""
    low, high = np.array([-81.0, -117.0, -75.0]), np.array([81.0, 84.0, 87.0])
    if extent is not None:
        low[2], high[2] = extent
        if not high[2] > low[2]:
            raise ValueError(f"extent: expected lowest z < highest z, got {extent}")
    shape = np.floor((high - low) / resolution + 1e-6).astype(int) + 1
    affine = np.diag([resolution] * 3 + [1.0])
    affine[:3, 3] = low
    index = np.indices(shape, dtype=np.float32)
    return index * np.float32(resolution) + low.astype(np.float32)[:, None, None, None], affine


def _smooth_field(rng: np.random.Generator, grid: np.ndarray, spacing: float) -> np.ndarray:
    """Smooth random field on the grid: cubic spline through unit normal knots `spacing` mm apart.

    The knots cover a fixed box, so that the field at a place does not depend on the grid.
    """
    low, high = np.array([-120.0, -150.0, -110.0]), np.array([120.0, 120.0, 120.0])
    counts = np.ceil((high - low) / spacing).astype(int) + 1
    field = rng.standard_normal(counts)
    lines = grid[0, :, 0, 0], grid[1, 0, :, 0], grid[2, 0, 0, :]
    for line, start, count in zip(lines, low, counts, strict=True):
        # The spline through unit vectors is the matrix from knots to places along this axis.
        spline = make_interp_spline(np.arange(count), np.eye(count), k=3)
        field = np.tensordot(field, spline((line - start) / spacing), axes=(0, 1))
    return field.astype(np.float32)


def _deform(rng: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    """Template place [3, X, Y, Z] in mm of every voxel: random affine and elastic displacement."""
    angles = np.deg2rad(rng.normal(0.0, 3.0, 3))
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        plane = np.eye(3)
        plane[i, i] = plane[j, j] = np.cos(angle)
        plane[i, j], plane[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ plane
    matrix = turn @ np.diag(np.exp(rng.normal(0.0, 0.04, 3)))
    shift = rng.normal(0.0, 2.0, 3)
    place = np.tensordot(matrix, grid, axes=1) + shift[:, None, None, None]
    for axis in range(3):
        place[axis] += 3.5 * _smooth_field(rng, grid, 40.0) + 1.5 * _smooth_field(rng, grid, 18.0)
    return place.astype(np.float32)


def _sample_templates(place: np.ndarray) -> tuple[np.ndarray, ...]:
    *maps, to_index = _templates()
    index = np.tensordot(to_index[:3, :3], place, axes=1) + to_index[:3, 3, None, None, None]
    return tuple(ndimage.map_coordinates(m, index, order=1, mode="constant") for m in maps)


def _label_structures(place: np.ndarray, tissues: np.ndarray) -> np.ndarray:
    structures = np.zeros(tissues.shape, dtype=np.uint8)
    mirrored = np.concatenate([np.abs(place[:1]), place[1:]])
    for ellipsoid in _ELLIPSOIDS:
        yaw, pitch = np.deg2rad([ellipsoid.yaw, ellipsoid.pitch])
        front = np.array([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), np.sin(pitch)])
        right = np.array([np.cos(yaw), -np.sin(yaw), 0.0])
        axes = np.stack([right, front, np.cross(right, front)])
        offset = mirrored - np.array(ellipsoid.centre)[:, None, None, None]
        along = np.tensordot(axes, offset, axes=1) / np.array(ellipsoid.radii)[:, None, None, None]
        made_of = [TISSUES.index(name) for name in _MADE_OF[ellipsoid.structure]]
        inside = ((along**2).sum(axis=0) <= 1.0) & np.isin(tissues, made_of) & (structures == 0)
        structures[inside] = STRUCTURES.index(ellipsoid.structure)
    return structures


def _lesion_share(
    rng: np.random.Generator,
    grid: np.ndarray,
    place: np.ndarray,
    white: np.ndarray,
    structures: np.ndarray,
) -> np.ndarray:
    """How much of each voxel is lesion, 0 to 1: 8 to 24 uneven blobs in the white matter.

    Most lie around the ventricles; radii are 2 to 7 mm, small ones more often. Drawn in template
    space all over the brain, so that a slab has the lesions of the whole.
    """
    share = np.zeros(white.shape, dtype=np.float32)
    uneven = 0.25 * _smooth_field(rng, grid, 9.0)
    for _ in range(int(rng.integers(8, 25))):
        side = rng.choice([-1.0, 1.0])
        if rng.random() < 0.7:
            centre = [side * rng.uniform(12, 32), rng.uniform(-50, 38), rng.uniform(6, 32)]
        else:
            centre = [side * rng.uniform(10, 50), rng.uniform(-75, 50), rng.uniform(-10, 55)]
        radii = np.clip(rng.lognormal(np.log(3.5), 0.35), 2.0, 7.0) * rng.uniform(0.75, 1.3, 3)
        offset = (place - np.array(centre)[:, None, None, None]) / radii[:, None, None, None]
        distance = np.sqrt((offset**2).sum(axis=0)) + uneven
        # 1 in the middle, 1/2 at the border, 0 outside.
        share = np.maximum(share, np.clip(1.5 - distance, 0, 1))
    return (share * (white > 0.5) * (structures == 0)).astype(np.float32)


def _render(
    rng: np.random.Generator,
    grid: np.ndarray,
    contrast: str,
    fractions: tuple[np.ndarray, np.ndarray, np.ndarray],
    texture: np.ndarray,
    structures: np.ndarray,
    lesion: np.ndarray,
) -> np.ndarray:
    fluid, grey, white = CONTRASTS[contrast] + rng.normal(0.0, 0.03, 3)
    image = fluid * fractions[0] + grey * fractions[1] + white * fractions[2]
    # Texture keeps its sign in T1 and is turned around where grey matter is the brighter tissue.
    image += texture * (white - grey) / (CONTRASTS["t1"][2] - CONTRASTS["t1"][1])
    for name, share in _WHITE_SHARE.items():
        image[structures == STRUCTURES.index(name)] += share * 0.5 * (white - grey)
    image += lesion * (_LESION_INTENSITY[contrast] - image)
    inside = sum(fractions) > 0.5
    bias = np.exp(0.08 * _smooth_field(rng, grid, 80.0))
    scale = rng.uniform(300.0, 900.0)
    noise = rng.normal(0.0, 0.03, (2, *image.shape))
    # Rician: magnitude of a complex signal with equal noise in both parts.
    magnitude = np.hypot(image * bias + noise[0], noise[1])
    return (scale * magnitude * inside).astype(np.float32)
