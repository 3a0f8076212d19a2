"""MONAI bundles as sources: what is read of them, and what is refused and never evaluated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import configuration
from monai.bundle import init_bundle
from monai.networks import nets
from source_data import (
    BUNDLE_NETWORK,
    Runs,
    bundle_config,
    bundle_metadata,
    load,
    refusal,
    save_bundle,
)

from riskmap_ext.finetune import CheckpointError, ConfigError, finetune
from riskmap_ext.finetune.predict import predict_images
from riskmap_ext.finetune.rank import rank_sources

RUN = {"train": {"steps": 2, "patch_size": 8, "validate_every": 0}, "network": None}


def make_network(**changes: Any) -> torch.nn.Module:
    args = {k: v for k, v in {**BUNDLE_NETWORK, **changes}.items() if k != "_target_"}
    torch.manual_seed(0)
    return nets.UNet(**args)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bundles of these tests have expressions that would make a file."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return save_bundle(tmp_path / "bundle", make_network(), bundle_config(), bundle_metadata())


def rewrite(root: Path, config: dict[str, Any] | None = None, **metadata: Any) -> None:
    if config is not None:
        (root / "configs" / "inference.json").write_text(json.dumps(config))
    if metadata:
        content = bundle_metadata(**metadata)
        (root / "configs" / "metadata.json").write_text(json.dumps(content))


@pytest.mark.parametrize("inner", [".", "models/model.pt"])
def test_a_bundle_says_everything(bundle: Path, inner: str) -> None:
    source = load(bundle / inner)
    assert source.classes == ["background", "box", "crate"]
    assert source.channels == ["T1"]
    assert source.config.name == "UNet"
    assert source.config.args["norm"] == "batch"
    assert source.config.orientation == "RAS"
    assert source.preprocessing == {
        "spacing": [1.0, 1.0, 1.0],
        "normalize": "zscore_foreground",
        "image_foreground": "nonzero",
        "patch_size": [16, 16, 8],
    }
    assert not source.notes
    assert not source.network.training
    for key, value in make_network().state_dict().items():
        assert torch.equal(source.network.state_dict()[key], value)


@pytest.mark.parametrize(
    "network",
    [
        {**BUNDLE_NETWORK, "_target_": "monai.networks.nets.UNet"},
        {**BUNDLE_NETWORK, "_target_": "monai.networks.nets.unet.UNet", "_mode_": "debug"},
        {**BUNDLE_NETWORK, "in_channels": "@images::0", "out_channels": "@classes"},
        {**BUNDLE_NETWORK, "channels": ["@images#1", 8], "_requires_": "$open('ran', 'w')"},
    ],
    ids=["module", "file", "references", "older references"],
)
def test_layouts_of_the_network(bundle: Path, network: dict[str, Any]) -> None:
    rewrite(bundle, bundle_config(network_def=network, images=[1, 4], classes="@n", n=3))
    expected = {k: v for k, v in BUNDLE_NETWORK.items() if k != "_target_"}
    del expected["in_channels"], expected["out_channels"]
    assert load(bundle).config.args == expected


def test_yaml_train_and_other_keys(bundle: Path) -> None:
    (bundle / "configs" / "inference.json").unlink()
    config = bundle_config(network=BUNDLE_NETWORK)
    del config["network_def"]
    (bundle / "configs" / "train.yaml").write_text(yaml.safe_dump(config))
    assert load(bundle).classes == ["background", "box", "crate"]


def test_names_that_the_metadata_lacks(bundle: Path) -> None:
    (bundle / "configs" / "metadata.json").unlink()
    source = load(bundle)
    assert source.classes == ["class 0", "class 1", "class 2"]
    assert source.channels == ["channel 0"]
    assert "patch_size" not in source.preprocessing
    rewrite(bundle, image={"spatial_shape": ["8*n", "8*n", "*"]})
    assert "patch_size" not in load(bundle).preprocessing
    assert load(bundle, classes=["void", "a", "b"]).classes == ["void", "a", "b"]


def test_axes_of_a_bundle(bundle: Path) -> None:
    config = bundle_config()
    config["preprocessing"]["transforms"][2]["axcodes"] = "SPL"
    config["preprocessing"]["transforms"][3]["pixdim"] = [3.0, 2.0, 1.0]
    rewrite(bundle, config)
    source = load(bundle, orientation="LPS")
    assert source.config.orientation == "SPL"
    assert source.preprocessing["spacing"] == [1.0, 2.0, 3.0]
    assert source.preprocessing["patch_size"] == [8, 16, 16]
    del config["preprocessing"]["transforms"][2]
    rewrite(bundle, config)
    assert load(bundle).config.orientation == "RAS"
    assert "does not say in which order of axes" in load(bundle).notes[0]
    assert load(bundle, orientation="LPS").config.orientation == "LPS"


def test_sigmoids(tmp_path: Path, bundle: Path) -> None:
    config = bundle_config()
    config["postprocessing"]["transforms"][0] = {"_target_": "Activationsd", "sigmoid": True}
    rewrite(bundle, config)
    told = refusal(bundle)
    assert "its 3 outputs are sigmoids, so they may overlap" in told
    assert "set source.classes" in told
    assert load(bundle, classes=3).structures.regions is None
    rewrite(bundle, bundle_config(), pred={"channel_def": {"0": "core", "1": "whole", "2": "en"}})
    assert "of which the first is 'core'" in refusal(bundle)

    network = {**BUNDLE_NETWORK, "out_channels": 1}
    metadata = bundle_metadata(pred={"channel_def": {"0": "lesion"}})
    config = bundle_config(network_def=network)
    one = save_bundle(tmp_path / "one", make_network(out_channels=1), config, metadata)
    structures = load(one).structures
    assert structures.classes == ["background", "lesion"]
    assert structures.regions == {"lesion": [1]}


def test_a_run_from_a_bundle_goes_on_as_our_own(tmp_path: Path, root: Path, bundle: Path) -> None:
    sections = {**RUN, "source": {"checkpoint": str(bundle)}}
    result = finetune(configuration(root, tmp_path / "a", **sections), progress=False)
    keys = json.loads((tmp_path / "a" / "keys.json").read_text())
    assert keys["loaded"] == list(make_network().state_dict())
    assert "may suffer" not in (tmp_path / "a" / "log.txt").read_text()
    own = load(result.checkpoint)
    assert own.config == load(bundle).config
    ranked = rank_sources(
        configuration(root, tmp_path / "b", **sections), [bundle, result.checkpoint], progress=False
    )
    assert {each.checkpoint for each in ranked} == {bundle, result.checkpoint}
    assert len(predict_images(bundle, [root / "images"], tmp_path / "out", progress=False)) == 5


@pytest.mark.parametrize("clip", [True, False])
def test_a_range_of_intensities(tmp_path: Path, root: Path, bundle: Path, clip: bool) -> None:
    config = bundle_config(low=-57)
    target = {"a_min": "@low", "a_max": 164, "b_min": -1.0, "b_max": 1.0, "clip": clip}
    transform = {"_target_": "ScaleIntensityRanged", "keys": "image", **target}
    config["preprocessing"]["transforms"][4] = transform
    rewrite(bundle, config)
    told = load(bundle).preprocessing
    assert told["window"] == ([-57, 164] if clip else None)
    assert told["mean_std"] == [53.5, 110.5]
    written = predict_images(bundle, [root / "images"], tmp_path / "out", progress=False)
    assert len(written) == 5


def test_preprocessing_that_the_driver_lacks(tmp_path: Path, root: Path, bundle: Path) -> None:
    config = bundle_config()
    config["preprocessing"]["transforms"][4] = {"_target_": "ScaleIntensityRanged", "a_min": 0}
    rewrite(bundle, config)
    with pytest.raises(ConfigError, match="were prepared with ScaleIntensityRanged"):
        predict_images(bundle, [root / "images"], tmp_path / "out", progress=False)
    sections = {**RUN, "source": {"checkpoint": str(bundle)}}
    finetune(configuration(root, tmp_path / "a", **sections), progress=False)
    assert "were prepared with ScaleIntensityRanged" in (tmp_path / "a" / "log.txt").read_text()
    config["preprocessing"]["transforms"][3:] = [{"_target_": "Spacingd", "pixdim": [1, 1, -1]}]
    rewrite(bundle, config)
    with pytest.raises(ConfigError, match=r"were prepared with \[1, 1, -1\]"):
        predict_images(bundle, [root / "images"], tmp_path / "out", progress=False)
    rewrite(bundle, bundle_config(preprocessing="$make()"))
    with pytest.raises(ConfigError, match="in a way that its file does not say"):
        predict_images(bundle, [root / "images"], tmp_path / "out", progress=False)


RAN = "$open('ran', 'w')"


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (RAN, f'got network_def: "{RAN}" in inference.json, network: '),
        ("@a", "got network_def: '@a' in inference.json, network: "),
        ({**BUNDLE_NETWORK, "in_channels": RAN}, "network_def.in_channels: expected a plain value"),
        ({**BUNDLE_NETWORK, "channels": [4, RAN]}, "network_def.channels.1: expected a plain"),
        ({**BUNDLE_NETWORK, "norm": ["batch", {"eps": RAN}]}, "network_def.norm.1.eps: expected"),
        ({**BUNDLE_NETWORK, "norm": "%other.json::norm"}, "got '%other.json::norm', which is not"),
        ({**BUNDLE_NETWORK, "norm": "@nowhere"}, "got '@nowhere'"),
        ({**BUNDLE_NETWORK, "norm": "@a"}, "got '@a'"),
        ({**BUNDLE_NETWORK, "norm": "@device"}, "network_def.norm: expected a plain value"),
        ({**BUNDLE_NETWORK, "act": {"_target_": "os.system", "command": "touch ran"}}, "component"),
        ({**BUNDLE_NETWORK, "_target_": RAN}, "_target_: expected a class of monai.networks.nets"),
        ({**BUNDLE_NETWORK, "_target_": "os.system"}, "got 'os.system', which is not imported"),
        ({**BUNDLE_NETWORK, "_target_": "scripts.net.UNet"}, "got 'scripts.net.UNet'"),
        ({**BUNDLE_NETWORK, "_target_": "???"}, "got '???'"),
        ({**BUNDLE_NETWORK, "_target_": "Sequence"}, "got 'Sequence'"),
        ({**BUNDLE_NETWORK, "chanels": [1]}, "UNet takes no chanels; did you mean channels"),
        ({**BUNDLE_NETWORK, "out_channels": "3"}, "out_channels: expected a number of channels"),
        ({k: v for k, v in BUNDLE_NETWORK.items() if k != "_target_"}, "got None"),
    ],
)
def test_networks_that_are_refused(bundle: Path, network: Any, told: str) -> None:
    rewrite(bundle, bundle_config(network_def=network, a="@b", b="@a"))
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(told)):
        load(bundle)


def test_bundles_without_their_parts(tmp_path: Path, bundle: Path) -> None:
    weights = bundle / "models" / "model.pt"
    content = weights.read_bytes()
    weights.unlink()
    assert f"{weights}: no such checkpoint; its folder holds nothing" in refusal(bundle)
    (bundle / "models" / "model.ts").write_bytes(b"")
    assert "its folder holds model.ts" in refusal(bundle)
    weights.write_bytes(content[: len(content) // 2])
    assert "is damaged or incomplete" in refusal(bundle)
    torch.save({"model": Runs()}, weights)
    assert "would run its code" in refusal(bundle)
    torch.save({"model": make_network(out_channels=5).state_dict()}, weights)
    told = refusal(bundle)
    assert "the weights do not fit UNet(" in told
    assert "inference.json describes UNet" in told
    torch.save({"model": make_network().state_dict()}, weights)
    assert len(load(bundle).classes) == 3
    (bundle / "configs" / "metadata.json").write_text("{'single': 'quotes'}")
    assert "metadata.json: cannot be read as JSON" in refusal(bundle)
    (bundle / "configs" / "inference.json").write_text("[1]")
    assert "inference.json: expected keys with values, got [1]" in refusal(bundle)
    (bundle / "configs" / "inference.json").unlink()
    assert "expected inference or train as .json or .yaml" in refusal(bundle)
    network = {"name": "UNet", "args": {k: v for k, v in BUNDLE_NETWORK.items() if k[0] != "_"}}
    assert load(bundle, network=network, classes=3).classes == ["class 0", "class 1", "class 2"]


def test_a_bundle_that_monai_makes(tmp_path: Path) -> None:
    """As monai.bundle init_bundle leaves it, and with a network put in."""
    root = tmp_path / "made"
    init_bundle(root, network=make_network())
    assert "_target_: expected a class of monai.networks.nets, got '???'" in refusal(root)
    file = root / "configs" / "inference.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "network_def": BUNDLE_NETWORK}))
    source = load(root)
    assert source.classes == ["class 0", "class 1", "class 2"]
    assert source.preprocessing["normalize"] == "ScaleIntensityd"
