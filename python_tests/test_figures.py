"""Pictures: they show something, fit any number of classes, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra finetune")

from matplotlib import get_backend, rc_context, rcParams
from matplotlib.image import imread

from riskmap_ext.finetune.pictures import figures
from riskmap_ext.finetune.pictures.slices import Volumes, class_colours, slice_of

SHAPE = (20, 24, 12)
NAMES = ["background", "one", "two"]


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


def draw(path, *arrays, names=NAMES, **options):
    return figures.comparison(path, [Volumes("case", *arrays, **options)], names, "title")


def coloured_share(path):
    """Share of pixels that are not grey, and of those that are not white."""
    pixels = imread(path)[..., :3]
    return (np.ptp(pixels, axis=-1) > 0.1).mean(), (pixels.min(axis=-1) < 0.9).mean()


def test_every_panel_is_drawn(tmp_path, volumes):
    image, labels, risk = volumes
    alone = draw(tmp_path / "alone.png", image, 0 * labels)
    moved = np.roll(labels, 2, axis=0)
    full = draw(tmp_path / "sub" / "full.png", image, labels, risk, predictions={"net": moved})
    assert coloured_share(alone)[0] < 0.001
    assert coloured_share(alone)[1] > 0.3
    assert coloured_share(full)[0] > 0.15
    assert imread(full).shape[1] > 1.8 * imread(alone).shape[1]
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["full.png"]


def test_settings_of_others_change_nothing(tmp_path, volumes):
    """nnU-Net sets seaborn's style for the whole process, with fonts of two and a half sizes."""
    with rc_context({"font.size": 30, "axes.grid": True, "figure.facecolor": "black"}):
        there = draw(tmp_path / "there.png", *volumes).read_bytes()
    assert there == draw(tmp_path / "here.png", *volumes).read_bytes()


def test_matplotlib_stays_as_it_is(tmp_path, volumes):
    before = dict(rcParams), get_backend()
    draw(tmp_path / "a.png", *volumes)
    assert (dict(rcParams), get_backend()) == before


def test_the_slice_with_most_labels_is_shown(tmp_path, volumes):
    image, labels, _ = volumes

    def picture(volume):
        return imread(draw(tmp_path / "a.png", volume, labels))

    # The same grey values elsewhere, so that the grey window stays.
    others, shown = image.copy(), image.copy()
    others[:, :, :7], others[:, :, 8:] = image[:, ::-1, :7], image[::-1, :, 8:]
    shown[:, :, 7] = image[:, ::-1, 7]
    np.testing.assert_array_equal(picture(others), picture(image))
    assert not np.array_equal(picture(shown), picture(image))


def test_cut_to_the_body_and_upright():
    image, labels = np.zeros(SHAPE), np.zeros(SHAPE, int)
    image[6:12, 4:18, :] = 1
    labels[6, 17, 4] = 1
    shown = slice_of(Volumes("case", image, labels, zooms=(1, 2, 3)))
    assert (shown.axis, shown.aspect) == (2, 2)
    assert shown.grey.shape == (14 + 4, 6 + 4)
    assert np.argwhere(shown.classes["label"]).tolist() == [[15, 2]]
    # What a prediction finds beside the body is not cut off.
    apart = np.roll(labels, 8, axis=0)
    assert slice_of(Volumes("case", image, labels, predictions={"net": apart})).grey.shape[1] > 10


@pytest.mark.parametrize("count", [2, 8, 200])
def test_any_number_of_classes(tmp_path, count):
    labels = np.arange(SHAPE[0] * SHAPE[1] * SHAPE[2]).reshape(SHAPE) % count
    path = draw(tmp_path / "a.png", np.ones(SHAPE), labels, names=list(map(str, range(count))))
    assert coloured_share(path)[0] > 0.05
    colours = class_colours(count)
    assert colours.shape == (count, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert len(np.unique(colours.round(3), axis=0)) == count


def test_odd_values_are_drawn_over(tmp_path, volumes):
    image, labels, _ = volumes
    image[0] = np.nan
    labels[0] = -100
    risk = np.zeros(SHAPE)
    assert coloured_share(draw(tmp_path / "a.png", image, labels, risk))[1] > 0.3
    flat = draw(tmp_path / "b.png", np.zeros(SHAPE), np.zeros(SHAPE, int), risk + 1)
    assert coloured_share(flat)[1] > 0.3


def test_rows_of_several_predictions(tmp_path, volumes):
    image, labels, risk = volumes
    row = Volumes("first", image, labels, risk, {"a": labels, "b": labels * 0}, {"a": "Dice 1"})
    path = figures.comparison(tmp_path / "a.png", [row, row], NAMES, "cases")
    assert coloured_share(path)[0] > 0.1


def test_panels_count_the_errors(volumes):
    image, labels, risk = volumes
    prediction = labels.copy()
    prediction[5, 5:15, 7] = 0
    prediction[15, 5:9, 7] = 2
    prediction[8, 8, 7] = 2
    drawn = figures.panels(Volumes("case", image, labels, risk, {"net": prediction}))
    assert drawn.errors == {"missed": 10, "extra": 4, "other class": 1}
    assert drawn.present == [1, 2]
    assert drawn.weights == (pytest.approx(risk.min()), pytest.approx(risk.max()))
