"""Configuration of the driver: YAML, overrides, and errors that name the key and the way out."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import NETWORK_2D, settings, write_config

from riskmap_ext.finetune import ConfigError, load_config, parse_config
from riskmap_ext.finetune.config.schema import AugmentConfig, LossConfig
from riskmap_ext.finetune.config.yaml_text import read_yaml
from riskmap_ext.finetune.source.network import build_network, head_keys, spatial_dims
from riskmap_ext.nn import RiskWeightedLoss


def content(tmp_path: Path, **sections):
    return settings(tmp_path / "data", tmp_path / "out", **sections)


def test_relative_paths_start_from_the_file(tmp_path):
    plain = content(tmp_path, source={"checkpoint": "../source.pt"}) | {"output": "out"}
    plain["data"]["root"] = "data"
    config = load_config(write_config(tmp_path / "run.yaml", plain))
    assert config.output == tmp_path / "out"
    assert config.data.root == tmp_path / "data"
    assert config.source is not None
    assert config.source.checkpoint == tmp_path.parent / "source.pt"


def test_images_and_labels_start_from_root(tmp_path):
    plain = content(tmp_path, data={"images": "a", "labels": "/b"})
    config = load_config(write_config(tmp_path / "run.yaml", plain))
    assert config.data.images == tmp_path / "data" / "a"
    assert config.data.labels == Path("/b")


def test_overrides_are_yaml_and_paths_start_here(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write_config(tmp_path / "run.yaml", content(tmp_path))
    config = load_config(
        path,
        [
            "train.steps=7",
            "data.label_map={47: 1, 48: box}",
            "train.augment.flip=[coronal]",
            "train.lr=1e-4",
            "output=elsewhere",
            "loss.class_weights=sqrt_inverse_frequency",
            "train.grad_clip=null",
        ],
    )
    assert config.train.steps == 7
    assert config.data.label_map == {47: 1, 48: "box"}
    assert config.train.augment.flip == ["coronal"]
    assert config.train.lr == 1e-4
    assert config.train.grad_clip is None
    assert config.output == here / "elsewhere"
    assert config.loss.class_weights == "sqrt_inverse_frequency"


def test_an_override_starts_a_section_that_the_file_lacks(tmp_path):
    path = write_config(tmp_path / "run.yaml", content(tmp_path))
    config = load_config(path, ["source.checkpoint=/s.pt", "risk.range=[0, 5]"])
    assert config.source is not None
    assert config.source.checkpoint == Path("/s.pt")
    assert config.risk.range == [0, 5]


def test_resolved_configuration_loads_again(tmp_path):
    data = {"label_map": {3: "ignore", 2: 1}, "spacing": [1, 1, 2]}
    config = parse_config(content(tmp_path, data=data, risk={"use": False}))
    again = load_config(write_config(tmp_path / "again.yaml", yaml.safe_load(config.to_yaml())))
    assert again == config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trian": {}}, ["trian: unknown key", "did you mean train"]),
        ({"train": {"step": 5}}, ["train.step: unknown key", "did you mean steps"]),
        ({"train": {"augment": {"flips": []}}}, ["train.augment.flips", "did you mean flip"]),
        ({"train": {"steps": 0}}, ["train.steps", "greater than or equal to 1", "got 0"]),
        ({"train": {"steps": "many"}}, ["train.steps", "integer", "'many'"]),
        ({"train": {"optimizer": "adamw"}}, ["train.optimizer", "did you mean Adam or AdamW"]),
        ({"risk": {"scheme": "linaer"}}, ["risk.scheme", "did you mean linear"]),
        ({"risk": {"range": [2, 1]}}, ["risk.range", "lo <= hi"]),
        ({"risk": {"use": True}}, ["risk.use", "source.checkpoint"]),
        ({"data": {"datalist": "a.json", "images": "i", "labels": "l"}}, ["data", "one of"]),
        ({"data": {"images": "i"}}, ["data", "images and labels together"]),
        ({"data": {"root": None}}, ["data", "no data given", "dataset.json"]),
        ({"data": {"classes": ["background"]}}, ["data.classes", "two or more"]),
        ({"loss": {"ce_weight": 0, "dice_weight": 0}}, ["loss", "above 0"]),
        ({"network": None}, ["network", "or a source"]),
        (
            {
                "network": {"name": "DynUNet", "args": {"deep_supervision": True}},
                "loss": {"overwrite_logits": True},
            },
            ["loss.overwrite_logits: expected false with network.args.deep_supervision"],
        ),
        ({"network": {"args": {}}}, ["network.name: missing"]),
        ({"device": "gpu"}, ["device: expected auto, cpu, cuda or cuda:N", "'gpu'"]),
        ({"device": "mps"}, ["device: expected auto, cpu, cuda or cuda:N", "'mps'"]),
        ({"output": None}, ["output: expected a folder, got None"]),
        ({"output": " "}, ["output: expected a path, got an empty text"]),
        (
            {"data": {"train": 0}},
            ["data.train: expected a number >= 1 or a list of case names, got 0"],
        ),
        (
            {"data": {"train": ["a", 2]}},
            ["data.train: expected a number >= 1 or a list of case names, got ['a', 2]"],
        ),
        ({"write": {"overlays": -1}}, ["write.overlays: expected true, false or a number >= 0"]),
        ({"data": {"classes": ["b", "p", "p"]}}, ["data.classes: expected distinct names, got p"]),
        ({"data": {"classes": ["b", "", "p"]}}, ["data.classes: expected a name for each class"]),
        (
            {"source": {"checkpoint": "s.pt", "classes": ["b", "b"]}},
            ["source.classes: expected distinct names, got b"],
        ),
        ({"data": {"spacing": [1, 1]}}, ["data.spacing: expected [x, y, z] in mm, each above 0"]),
        ({"data": {"label_map": 3}}, ["data.label_map: expected label value: class, or a file"]),
        ({"data": {"datalist": ""}}, ["data.datalist: expected a path, got an empty text"]),
        ({"data": {"regions": {"a": [1.5]}}}, ["data.regions.a.0: expected the number or name"]),
        ({"data": {"regions": {1: [1]}}}, ["data.regions.1: input should be a valid string"]),
        (
            {"data": {"root": None, "cases": [{"image": [], "label": "l"}]}},
            ["data.cases.0.image: expected a file, or a list with one for each channel, got []"],
        ),
        (
            {"data": {"root": None, "cases": [{"image": "i", "lable": "l"}]}},
            ["data.cases.0.label: missing", "data.cases.0.lable: unknown key; did you mean label"],
        ),
        (
            {"source": {"checkpoint": "s.pt", "channels": ["T1", -1]}},
            ["source.channels.1: expected the number or name of a channel, got -1"],
        ),
        ({"train": {"patch_size": [8, True]}}, ["train.patch_size.1: expected a number, got true"]),
        ({"loss": {"fused_head": "never"}}, ["expected auto, true or false, got 'never'"]),
        (
            {"loss": {"class_weights": [0, 0], "dice_weight": 0}},
            ["all are 0, and there is no Dice"],
        ),
        ({"loss": {"class_weights": [1, -1]}}, ["loss.class_weights: expected sqrt_inverse_freq"]),
    ],
)
def test_errors_name_key_and_way_out(tmp_path, change, told):
    plain = content(tmp_path)
    for key, value in change.items():
        replaced = isinstance(value, dict) and key in plain and key != "network"
        plain[key] = {**plain[key], **value} if replaced else value
    path = write_config(tmp_path / "run.yaml", plain)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for text in (str(path), *told):
        assert text in str(caught.value)
    # How the checks are made is not the reader's business.
    assert "constrained" not in str(caught.value)


def test_all_errors_are_told_at_once(tmp_path):
    plain = content(tmp_path, train={"steps": -1, "lr": -1}, seed="x")
    with pytest.raises(ConfigError) as caught:
        parse_config(plain)
    for key in ("train.steps", "train.lr", "seed"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("train.steps=[1", "not valid YAML"),
        ("output.sub=3", "output is a value, not a section"),
        ("train.stepps=3", "did you mean steps"),
        ("data.label_map={47: 1, 48: 2, 47: 2}", "the key 47 is given twice"),
        ("output=", "output: expected a folder"),
        ("output=''", "output: expected a path, got an empty text"),
        ("data.root=''", "data.root: expected a path, got an empty text"),
        ("train.steps=true", "train.steps: expected a number, got true"),
        ("train.grad_clip=no", "train.grad_clip: expected a number, got false"),
        ("data.train=yes", "data.train: expected a number, got true"),
        ("output=2020-13-45", "not valid YAML .no timestamp: month must be in 1..12"),
    ],
)
def test_bad_overrides(tmp_path, override, told):
    path = write_config(tmp_path / "run.yaml", content(tmp_path))
    with pytest.raises(ConfigError, match=told.replace("[", r"\[")):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file"),
        ("a: [1", "cannot be read as YAML ("),
        ("- 1", "expected keys"),
        (
            "train:\n  steps: 1\n  lr: 1\n  steps: 2",
            "line 4: the key steps is given twice, first in",
        ),
        ("output: a\noutput: a", "line 2: the key output is given twice, first in line 1"),
        ("output: 2020-13-45", "no timestamp: month must be in 1..12; a text goes in quotes"),
        ("seed: !!int x", "cannot be read as YAML (no int: "),
        ("output: &a [*a]", "line 1: an alias (*) of this value is within itself"),
        (
            "data: &d {root: x, more: {on: *d}}",
            "line 1: an alias (*) of this value is within itself",
        ),
    ],
)
def test_bad_files(tmp_path, text, told):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", "1e-3"),  # of which a key that takes a number makes one
        ("1.0e-3", 1e-3),
        ("012", 10),
        ("0o12", "0o12"),
        ("0x1f", 31),
        ("1_000", 1000),
        ("1:30", 90),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("2020-01-02", datetime.date(2020, 1, 2)),
        ("[&a {x: 1}, *a]", [{"x": 1}, {"x": 1}]),
        ("{5: a, '5': b}", {5: "a", "5": "b"}),
    ],
)
def test_values_are_those_of_yaml_1_1(text, value):
    assert read_yaml(text)[0] == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a:\n\tb: 1", "cannot start any token"),
        ("a: *b", "found undefined alias 'b'"),
        ("? [1]\n: 2", "found unhashable key"),
        ("!!timestamp x", "no timestamp: "),
        ("!!float ''", "no float: "),
        ("!!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_what_is_no_yaml(text, told):
    with pytest.raises(yaml.YAMLError, match=told):
        read_yaml(text)


def test_places_of_keys(tmp_path):
    path = write_config(tmp_path / "run.yaml", content(tmp_path))
    text = "train: {steps: 0}\nloss:\n  alpha: -1\nrisk:\n  scheme: linear\n  range:\n  - 0\n"
    path.write_text(f"{text}output: out\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["seed=x"])
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()[1:]] == [
        ["  command line", "seed"],
        ["  data", "missing"],
        ["  line 6", "risk.range"],
        ["  line 3", "loss.alpha"],
        ["  line 1", "train.steps"],
    ]


def test_merged_keys_may_be_given_again():
    text = "train: &t {steps: 3, lr: 1}\nother: {<<: *t, steps: 4}"
    assert read_yaml(text)[0] == {"train": {"steps": 3, "lr": 1}, "other": {"steps": 4, "lr": 1}}


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; expected a file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        ({"name": "UNett"}, "did you mean"),
        ({"name": "optim"}, "no class of monai.networks.nets"),
        ({"name": "VoxelMorphUNet", "args": {"spatial_dims": 3}}, "segmentation network"),
        ({"name": "UNet", "args": {"spatial_dims": 4}}, "2 (slices) or 3"),
        ({"name": "UNet", "args": {}}, "got nothing"),
        ({"name": "UNet", "args": {"spatial_dims": 2, "chanels": [4]}}, "did you mean channels"),
        (
            {"name": "UNet", "args": {"spatial_dims": 2, "channels": [4], "strides": [2]}},
            "refuses",
        ),
    ],
)
def test_bad_networks(tmp_path, network, told):
    found = parse_config(content(tmp_path, network=None) | {"network": network}).network
    assert found is not None

    def build():
        spatial_dims(found)
        return build_network(found, 3)

    with pytest.raises(ConfigError) as caught:
        build()
    assert told in str(caught.value)


def test_head_is_found_by_its_shape(tmp_path):
    network = parse_config(content(tmp_path)).network
    assert network is not None
    heads = head_keys(network, 3)
    state = build_network(network, 3).state_dict()
    assert heads
    assert heads < set(state)
    assert all(3 in state[key].shape for key in heads)


def test_the_loss_section_has_the_options_of_the_loss(tmp_path):
    options = LossConfig().model_dump(exclude={"class_weights", "fused_head"})
    loss = RiskWeightedLoss(**options)
    assert loss.options == options


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({}, []),
        ({"risk": {"scheme": "power"}}, ["risk.scheme: there is no source"]),
        ({"risk": {"use": False, "scheme": "power"}}, []),
        (
            {"source": {"checkpoint": "a.pt"}, "risk": {"scheme": "power"}},
            ["risk.scheme: the map is"],
        ),
        ({"source": {"checkpoint": "a.pt"}, "risk": {"use": True, "scheme": "power"}}, []),
        ({"loss": {"class_weights": [1, 2], "label_smoothing": 0.1}}, ["loss.class_weights weigh"]),
    ],
    ids=str,
)
def test_what_has_no_effect_or_a_bad_one_is_told(tmp_path, sections, told):
    config = parse_config(content(tmp_path) | sections)
    assert [note[: len(text)] for note, text in zip(config.notes, told, strict=True)] == told
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert not any(note.startswith("risk.") for note in again.notes)


def test_augmentation_is_gentle_by_default():
    augment = AugmentConfig()
    # Left and right are classes of their own in many label sets.
    assert augment.flip == []
    assert augment.rotation <= 15


def test_networks_are_given_by_name_only(tmp_path):
    config = parse_config(content(tmp_path))
    assert config.network is not None
    assert config.network.model_dump(exclude_defaults=True) == NETWORK_2D
