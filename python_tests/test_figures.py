"""Pictures: they show something, fit any number of classes, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra finetune")

from matplotlib import get_backend, rcParams
from matplotlib.image import imread

from riskmap_ext.finetune.pictures import figures

SHAPE = (20, 24, 12)


@pytest.fixture
def volumes():
    rng = np.random.default_rng(0)
    image = rng.random(SHAPE).astype(np.float32)
    labels = np.zeros(SHAPE, dtype=np.int16)
    labels[5:9, 5:9, 3] = 1
    labels[5:15, 5:15, 7] = 2
    labels[8:11, 8:11, 7] = 1
    risk = (1 + 9 * rng.random(SHAPE)).astype(np.float32)
    return image, labels, risk


def coloured_share(path):
    """Share of pixels that are not grey, and of those that are not white."""
    pixels = imread(path)[..., :3]
    return (np.ptp(pixels, axis=-1) > 0.1).mean(), (pixels.min(axis=-1) < 0.9).mean()


def test_overlay_draws_every_panel(tmp_path, volumes):
    image, labels, risk = volumes
    alone = figures.overlay(tmp_path / "alone.png", image)
    full = figures.overlay(
        tmp_path / "sub" / "full.png",
        image,
        labels=labels,
        prediction=np.roll(labels, 2, axis=0),
        risk=risk,
        class_names=["background", "one", "two"],
        title="case",
    )
    assert coloured_share(alone)[0] < 0.001
    assert coloured_share(alone)[1] > 0.3
    assert coloured_share(full)[0] > 0.15
    assert imread(full).shape[1] > 3 * imread(alone).shape[1]
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["full.png"]


def test_overlay_keeps_matplotlib_as_it_is(tmp_path, volumes):
    before = dict(rcParams), get_backend()
    figures.overlay(tmp_path / "a.png", volumes[0], labels=volumes[1])
    assert (dict(rcParams), get_backend()) == before


def test_overlay_shows_the_slice_with_most_labels(tmp_path, volumes):
    image, labels, _ = volumes

    def picture(volume):
        return imread(figures.overlay(tmp_path / "a.png", volume, labels=labels))

    # The same grey values elsewhere, so that the grey window stays.
    others, shown = image.copy(), image.copy()
    others[:, :, :7], others[:, :, 8:] = image[:, ::-1, :7], image[::-1, :, 8:]
    shown[:, :, 7] = image[:, ::-1, 7]
    np.testing.assert_array_equal(picture(others), picture(image))
    assert not np.array_equal(picture(shown), picture(image))


@pytest.mark.parametrize("count", [2, 8, 200])
def test_any_number_of_classes(tmp_path, count):
    labels = np.arange(SHAPE[0] * SHAPE[1] * SHAPE[2]).reshape(SHAPE) % count
    path = figures.overlay(tmp_path / "a.png", np.ones(SHAPE), labels=labels)
    assert coloured_share(path)[0] > 0.05
    colours = figures.class_colours(count)
    assert colours.shape == (count, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert len(np.unique(colours.round(3), axis=0)) == count


def test_odd_values_are_drawn_over(tmp_path, volumes):
    image, labels, _ = volumes
    image[0] = np.nan
    labels[0] = -100
    risk = np.zeros(SHAPE)
    path = figures.overlay(tmp_path / "a.png", image, labels=labels, risk=risk)
    assert coloured_share(path)[1] > 0.3
    figures.overlay(tmp_path / "b.png", np.zeros(SHAPE), labels=np.zeros(SHAPE, int), risk=risk + 1)
    assert coloured_share(tmp_path / "b.png")[1] > 0.3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"image": np.zeros((3, 4))},
            ValueError,
            r"image: expected .*3-D array, got shape \(3, 4\)",
        ),
        ({"labels": np.zeros((1, 2, 3), int)}, ValueError, r"labels: expected the image's shape"),
        ({"prediction": np.zeros((1, 2, 3), int)}, ValueError, "prediction: expected the image's"),
        ({"risk": np.zeros((1, 2, 3))}, ValueError, "risk: expected the image's shape"),
        ({"labels": np.full(SHAPE, 0.5)}, TypeError, "labels: expected class indices"),
    ],
)
def test_overlay_errors(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        figures.overlay(tmp_path / "a.png", **{"image": np.zeros(SHAPE), **arguments})
    assert list(tmp_path.iterdir()) == []


def test_comparison(tmp_path, volumes):
    image, labels, risk = volumes
    row = figures.ComparisonRow(
        "first", image, labels, risk, {"a": labels, "b": labels * 0}, {"a": "Dice 100.0"}
    )
    path = figures.comparison(
        tmp_path / "a.png", [row, row], class_names=["background", "one", "two"], title="cases"
    )
    assert coloured_share(path)[0] > 0.1
    other = figures.ComparisonRow("second", image, labels, None, {"a": labels, "b": labels})
    with pytest.raises(ValueError, match="rows: expected the columns of 'first'"):
        figures.comparison(path, [row, other])
    with pytest.raises(ValueError, match="rows: expected at least one case"):
        figures.comparison(path, [])
    wrong = figures.ComparisonRow("third", image, labels, risk, {"a": labels[1:], "b": labels})
    with pytest.raises(ValueError, match="prediction 'a' of 'third': expected the image's shape"):
        figures.comparison(path, [wrong])
