"""Source checkpoints: what is read, what is loaded, and what the report says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import MERGED, NETWORK_2D, configuration, phantom, save, write_cases

from riskmap_ext.finetune import CheckpointError, ConfigError, FinetuneResult, finetune
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.source.checkpoint import load_source, save_checkpoint, start_from_source
from riskmap_ext.finetune.source.network import build_network, head_keys

NETWORK = NetworkConfig(**NETWORK_2D)
NAMES = ["background", "a", "b"]
NAMED = Structures(NAMES)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "source.pt"
    network = build_network(NETWORK, 3)
    save_checkpoint(path, network, NETWORK, NAMED, ["T1"], {"spacing": None}, {"step": 4})
    return path


def load(path: Path, **options):
    return load_source(SourceConfig(checkpoint=path, **options))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_plain_types_only(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["network"] == NETWORK_2D
    assert content["classes"] == NAMES
    assert content["progress"] == {"step": 4}


def test_source_is_frozen_and_complete(checkpoint):
    source = load(checkpoint)
    assert source.classes == NAMES
    assert source.config == NETWORK
    assert not source.network.training
    assert not any(p.requires_grad for p in source.network.parameters())
    state = source.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights(checkpoint).items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes": None}, "does not say which classes it has"),
        ({"network": None}, "does not say which network it belongs to"),
        ({"network": {"nam": "UNet"}}, "its network.name: missing; network.nam: unknown key; did"),
        ({"regions": {"a": [0]}, "region_classes": [1]}, "its.regions.a: expected classes"),
    ],
)
def test_an_own_checkpoint_that_lacks_something(checkpoint, changes, told):
    torch.save({**torch.load(checkpoint, weights_only=True), **changes}, checkpoint)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert told in str(caught.value)


def test_digest_follows_the_weights(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    next(iter(content["state_dict"].values())).view(-1)[0] += 1
    torch.save(content, tmp_path / "other.pt")
    assert load(checkpoint).digest == load(checkpoint).digest
    assert load(checkpoint).digest != load(tmp_path / "other.pt").digest


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"network_weights": state},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"net.{k}": v for k, v in state.items()}},
        lambda state: {"net": {f"module._orig_mod.net.{k}": v for k, v in state.items()}},
    ],
    ids=["bare", "monai", "nnunet", "parallel", "compiled", "lightning", "several"],
)
def test_checkpoints_of_other_tools(checkpoint, tmp_path, wrap):
    state = weights(checkpoint)
    torch.save(wrap(state), tmp_path / "foreign.pt")
    source = load(tmp_path / "foreign.pt", network=NETWORK, classes=3)
    assert source.classes == ["class 0", "class 1", "class 2"]
    assert all(torch.equal(source.network.state_dict()[k], v) for k, v in state.items())


def test_head_is_new_where_class_counts_differ(checkpoint):
    torch.manual_seed(1)
    network = build_network(NETWORK, 5)
    fresh = {key: value.clone() for key, value in network.state_dict().items()}
    source = load(checkpoint)
    report = start_from_source(network, NETWORK, of(5), source, "auto")
    assert set(report.reinitialized) == head_keys(NETWORK, 5)
    assert set(report.loaded) == set(fresh) - set(report.reinitialized)
    assert report.new == report.skipped == report.mismatched == []
    for key, value in network.state_dict().items():
        expected = fresh[key] if key in report.reinitialized else weights(checkpoint)[key]
        assert torch.equal(value, expected), key
    assert "reinitialized" in report.summary()


def of(classes: int) -> Structures:
    return Structures([f"class {index}" for index in range(classes)])


def test_head_is_kept_where_class_counts_agree(checkpoint):
    for head, renewed in (("auto", False), ("keep", False), ("reinitialize", True)):
        network = build_network(NETWORK, 3)
        report = start_from_source(network, NETWORK, of(3), load(checkpoint), head)
        assert bool(report.reinitialized) is renewed
    with pytest.raises(CheckpointError, match=r"source\.head: keep needs"):
        start_from_source(build_network(NETWORK, 4), NETWORK, of(4), load(checkpoint), "keep")


def test_a_source_of_regions_for_classes(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", 3)
    regions = {"whole": ["box", "crate"], "core": "crate"}
    train = {"steps": 2, "validate_every": 1}

    def run(name: str, data: dict[str, Any], **sections: Any) -> FinetuneResult:
        config = configuration(
            tmp_path / "data", tmp_path / name, data=data, train=train, **sections
        )
        return finetune(config, progress=False)

    source = {"source": {"checkpoint": run("regions", {"regions": regions}).checkpoint}}
    found = run("classes", MERGED, **source, risk={"use": True})
    assert found.leep is not None
    assert found.leep < 0
    assert list(found.dice) == ["thing"]
    assert found.keys is not None
    assert found.keys.reinitialized  # two outputs each, but of other kinds
    others = {**MERGED, "classes": ["background", "other"]}
    kept = run("kept", others, source={"checkpoint": found.checkpoint})
    assert kept.keys is not None
    assert not kept.keys.reinitialized
    log = (tmp_path / "kept" / "log.txt").read_text()
    assert "The output layer is the source's (thing); source.head=reinitialize" in log


def test_other_network(checkpoint):
    wider = NetworkConfig(name="UNet", args={**NETWORK.args, "channels": [4, 12]})
    report = start_from_source(build_network(wider, 3), wider, of(3), load(checkpoint), "auto")
    assert report.loaded
    assert report.mismatched
    deeper = NetworkConfig(name="UNet", args={**NETWORK.args, "num_res_units": 2})
    report = start_from_source(build_network(deeper, 3), deeper, of(3), load(checkpoint), "auto")
    assert report.new
    other = NetworkConfig(name="SegResNet", args={"spatial_dims": 2, "init_filters": 8})
    with pytest.raises(CheckpointError) as caught:
        start_from_source(build_network(other, 3), other, of(3), load(checkpoint), "auto")
    for told in (str(checkpoint), "the file holds UNet(", "SegResNet(", "source.initialize=false"):
        assert told in str(caught.value)


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_a_network_that_the_file_is_not_of(checkpoint, tmp_path, kind):
    other = NetworkConfig(name="SegResNet", args={"spatial_dims": 2, "init_filters": 8})
    path, told = checkpoint, "it holds UNet with 3 outputs"
    if kind == "foreign":
        path, told = tmp_path / "foreign.pt", "its keys are such as model.0."
        torch.save(weights(checkpoint), path)
    with pytest.raises(CheckpointError) as caught:
        load(path, network=other, classes=3)
    for text in (str(path), "no weight in it belongs to SegResNet(", told, "source.network"):
        assert text in str(caught.value)
    with pytest.raises(CheckpointError, match=r"do not fit UNet\(.*with 5 outputs"):
        load(path, network=NETWORK, classes=5)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("out_channels", "3 (the number of classes or regions)"),
        ("in_channels", "1 (the number of image channels)"),
    ],
)
def test_channels_of_the_source(checkpoint, argument, told):
    args = {**NETWORK.args, argument: 7}
    with pytest.raises(ConfigError) as caught:
        load(checkpoint, network=NetworkConfig(name="UNet", args=args))
    assert f"source.network.args.{argument}: expected {told}, got 7" in str(caught.value)
    right = {"in_channels": 1, "out_channels": 3, **NETWORK.args}
    source = load(checkpoint, network=NetworkConfig(name="UNet", args=right))
    # The target's classes are others: they must not meet the source's channels.
    assert source.config == NETWORK
    assert source.digest == load(checkpoint).digest


def test_files_that_are_no_checkpoints(tmp_path):
    image = save(tmp_path / "image.nii.gz", phantom(0)[0])
    (tmp_path / "run.yaml").write_text("output: a")
    told = {
        image: "is an image",
        tmp_path / "run.yaml": "is a text file",
        tmp_path: "is a folder; expected a checkpoint file",
    }
    for path, text in told.items():
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert f"{path}: {text}" in str(caught.value)


def test_keys_that_the_network_lacks_are_skipped(tmp_path):
    deeper = NetworkConfig(name="UNet", args={**NETWORK.args, "num_res_units": 2})
    save_checkpoint(tmp_path / "s.pt", build_network(deeper, 3), deeper, NAMED, ["T1"], {}, {})
    source = load(tmp_path / "s.pt")
    report = start_from_source(build_network(NETWORK, 3), NETWORK, of(3), source, "auto")
    assert report.skipped
    assert not set(report.skipped) & set(build_network(NETWORK, 3).state_dict())


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (None, {}, "no such checkpoint"),
        (b"", {}, "is empty"),
        (b"\xff\x00\x17", {}, "is of an unknown kind; expected a torch checkpoint"),
        (b"PK\x03\x04 cut", {}, "is damaged or incomplete"),
        (b"rubbish", {}, "is a text file; expected a torch checkpoint"),
        ([1, 2], {}, "expected a dictionary"),
        ({"epoch": 3}, {}, "no weights"),
        ({"w": torch.zeros(1)}, {}, "source.network.name"),
        ({"w": torch.tensor([1.0, math.nan])}, {}, "NaN or infinite weights in 1 of 1 tensors (w)"),
        ({"w": torch.tensor([-math.inf])}, {}, "NaN or infinite weights"),
        ({"w": torch.zeros(1)}, {"network": NETWORK}, "source.classes"),
        (
            {"w": torch.zeros(1)},
            {"network": NETWORK, "classes": 3},
            "no weight in it belongs to UNet(",
        ),
    ],
)
def test_bad_checkpoints(tmp_path, content, options, told):
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": build_network(NETWORK, 3)}, tmp_path / "pickled.pt")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "pickled.pt", network=NETWORK, classes=3)
    told = str(caught.value)
    assert "objects other than tensors and plain types (such as monai." in told
    assert "would run its code" in told
    # torch's own advice.
    assert "weights_only" not in told


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript archive"):
        load(tmp_path / "script.pt")
