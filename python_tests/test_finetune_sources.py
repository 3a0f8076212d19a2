"""Sources in the formats of other tools: nnU-Net's checkpoints."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import NETWORK_3D, configuration, phantom, save, settings
from source_data import (
    Runs,
    load,
    nnunet_dataset,
    nnunet_network,
    nnunet_plans,
    refusal,
    save_nnunet,
)

from riskmap_ext.finetune import ConfigError, finetune, load_config, parse_config
from riskmap_ext.finetune.config.schema import InferenceConfig, NetworkConfig, SourceConfig
from riskmap_ext.finetune.data.prepare import read_image
from riskmap_ext.finetune.predict import predict_images
from riskmap_ext.finetune.rank import rank_sources
from riskmap_ext.finetune.source.network import build_network
from riskmap_ext.finetune.train.finetune import make_maps
from riskmap_ext.finetune.train.models import predictor_of_source

ARCHITECTURE = nnunet_plans()["configurations"]["3d_fullres"]["architecture"]
LOOP: list[Any] = []
LOOP.append(LOOP)
RUN = {"train": {"steps": 2, "patch_size": 8, "validate_every": 0}, "network": None}


@pytest.fixture
def networks() -> None:
    pytest.importorskip("dynamic_network_architectures", reason="needs nnU-Net's networks")


def make_nnunet(tmp_path: Path, dims: int = 3, outputs: int = 3, **dataset: Any) -> Path:
    plans = nnunet_plans(dims)
    content = nnunet_dataset(**dataset)
    channels = len(content["channel_names"])
    network = nnunet_network(plans, channels, outputs)
    return save_nnunet(tmp_path / "nnunet.pth", network, plans, content)


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("dims", [2, 3])
def test_an_nnunet_checkpoint_says_everything(tmp_path: Path, dims: int) -> None:
    source = load(make_nnunet(tmp_path, dims))
    assert source.classes == ["background", "box", "crate"]
    assert source.structures.regions is None
    assert source.channels == ["MRI"]
    assert source.config.name == "PlainConvUNet"
    assert not source.network.training
    assert not any(p.requires_grad for p in source.network.parameters())
    assert source.preprocessing["normalize"] == "zscore"
    assert source.preprocessing["image_foreground"] == "all"
    if dims == 3:
        # nnU-Net's z, y, x are the driver's x, y, z the other way round.
        assert source.config.orientation == "SAR"
        assert source.preprocessing["patch_size"] == [16, 12, 8]
        assert source.preprocessing["spacing"] == [1.0, 2.0, 3.0]
    else:
        assert source.config.orientation == "AR"
        assert source.preprocessing["slice_axis"] == "axial"
        assert source.preprocessing["patch_size"] == [16, 12]
        assert source.preprocessing["spacing"] == [1.0, 2.0, None]


@pytest.mark.usefixtures("networks")
def test_labels_of_nnunet(tmp_path: Path) -> None:
    regions = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    path = make_nnunet(tmp_path, outputs=2, labels=regions, regions_class_order=[1, 2])
    structures = load(path).structures
    assert structures.regions == {"whole": [1, 2], "core": [2]}
    assert structures.region_classes == [1, 2]
    ignored = {"background": 0, "box": 1, "ignore": 2}
    assert load(make_nnunet(tmp_path, outputs=2, labels=ignored)).classes == ["background", "box"]
    alone = {"background": 0, "box": [1], "crate": [2]}
    assert load(make_nnunet(tmp_path, labels=alone)).structures.regions is None


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(
    ("transpose", "stored", "seen", "patch"),
    [
        ([0, 1, 2], None, "SAR", [16, 12, 8]),
        ([0, 1, 2], "LPS", "SPL", [16, 12, 8]),
        ([2, 0, 1], None, "RSA", [8, 16, 12]),
        ([0, 1, 2], "ASR", "RSA", [8, 16, 12]),
    ],
)
def test_axes_of_nnunet(
    tmp_path: Path, transpose: list[int], stored: str | None, seen: str, patch: list[int]
) -> None:
    plans = {**nnunet_plans(), "transpose_forward": transpose}
    path = save_nnunet(tmp_path / "a.pth", nnunet_network(plans, 1, 3), plans, nnunet_dataset())
    source = load(path, orientation=stored)
    assert source.config.orientation == seen
    assert source.preprocessing["patch_size"] == patch
    assert bool(source.notes) is (stored is None)


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("dims", [2, 3])
def test_volumes_are_seen_as_nnunet_sees_them(tmp_path: Path, dims: int) -> None:
    """A file that is stored as LPS, read by its own axes as nnU-Net reads it."""
    plans = nnunet_plans(dims)
    network = nnunet_network(plans, 1, 3)
    path = save_nnunet(tmp_path / "a.pth", network, plans, nnunet_dataset())
    source = load(path, orientation="LPS")
    values, _ = phantom(0, (16, 12, 8))
    image = save(tmp_path / "image.nii.gz", values, np.diag([-1.0, -1.0, 1.0, 1.0]))
    config = configuration(tmp_path, tmp_path / "run", data={"image_foreground": "all"})
    config = config.model_copy(update={"source": SourceConfig(checkpoint=path)})
    case = read_image([image], "image", config.data)
    logits = predictor_of_source(config, source, ["MRI"], torch.device("cpu"))(case.image)
    found = case.grid.to_file(logits[0].argmax(0).numpy().astype(np.uint8))

    array = torch.from_numpy(values.transpose(2, 1, 0).copy())
    array = (array - array.mean()) / array.std(correction=0)
    with torch.no_grad():
        if dims == 3:
            expected = network(array[None, None])[0]
        else:
            expected = network(array[:, None]).movedim(0, 1)
    expected = expected.argmax(0).numpy().transpose(2, 1, 0)
    assert len(np.unique(expected)) > 1
    assert np.mean(found != expected) < 1e-3


@pytest.mark.usefixtures("networks")
def test_volumes_with_another_axis_last(tmp_path: Path, root: Path) -> None:
    """A 3-D source sees the same, whatever the axis of slices is."""
    source = {"checkpoint": str(make_nnunet(tmp_path)), "orientation": "LPS"}
    maps = {}
    for axis in ("axial", "coronal"):
        sections = {**RUN, "source": source, "data": {"slice_axis": axis}}
        maps[axis] = make_maps(configuration(root, tmp_path / axis, **sections), progress=False)
    one, other = (maps[axis].risk["case00"] for axis in ("axial", "coronal"))
    torch.testing.assert_close(one, other.permute(0, 2, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("networks")
def test_slices_along_another_axis_are_refused(tmp_path: Path, root: Path) -> None:
    path = make_nnunet(tmp_path, 2)
    other = {"source": {"checkpoint": str(path)}, "data": {"slice_axis": "coronal"}}
    with pytest.raises(ConfigError, match=r"sees axial slices .* set data\.slice_axis=axial"):
        finetune(configuration(root, tmp_path / "run", **RUN, **other), progress=False)


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("dims", [2, 3])
def test_a_run_from_nnunet_goes_on_as_our_own(tmp_path: Path, root: Path, dims: int) -> None:
    path = make_nnunet(tmp_path, dims)
    sections = {**RUN, "source": {"checkpoint": str(path)}}
    first = finetune(configuration(root, tmp_path / "a", **sections), progress=False)
    keys = json.loads((tmp_path / "a" / "keys.json").read_text())
    assert keys["loaded"]
    assert not any(keys[name] for name in ("reinitialized", "mismatched", "new", "skipped"))
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "Weights from" in log
    assert "source.orientation" in log
    own = load(first.checkpoint)
    assert own.config.orientation == {2: "AR", 3: "SAR"}[dims]
    assert not own.notes

    # predict sees the axes as training did
    images = [root / "images" / "case02.nii.gz"]
    (written,) = predict_images(first.checkpoint, images, tmp_path / "out", progress=False)
    final = tmp_path / "a" / "predictions" / "case02.nii.gz"
    assert written.read_bytes() == final.read_bytes()

    again = {**RUN, "source": {"checkpoint": str(first.checkpoint)}}
    second = finetune(configuration(root, tmp_path / "b", **again), progress=False)
    assert second.keys is not None
    assert second.keys.loaded == list(own.network.state_dict())
    # the resolved configuration names the network in plain values
    resolved = load_config(tmp_path / "b" / "config.yaml")
    assert resolved.source == SourceConfig(checkpoint=first.checkpoint)


@pytest.mark.usefixtures("networks")
def test_a_network_of_nnunet_from_nothing(tmp_path: Path, root: Path) -> None:
    args = nnunet_plans()["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    sections = {**RUN, "network": {"name": "PlainConvUNet", "args": args}}
    result = finetune(configuration(root, tmp_path / "a", **sections), progress=False)
    assert load(result.checkpoint).config.orientation is None
    own = NetworkConfig(name="PlainConvUNet", args=args)
    sections["source"] = {"checkpoint": str(make_nnunet(tmp_path))}
    sections["network"] = own.model_dump()
    result = finetune(configuration(root, tmp_path / "b", **sections), progress=False)
    # kernels have directions: the weights bring their order of axes along
    assert load(result.checkpoint).config.orientation == "SAR"
    residual = {**args, "n_blocks_per_stage": [1, 1], "block": "BottleneckD"}
    residual |= {"bottleneck_channels": 2}
    del residual["n_conv_per_stage"]
    built = build_network(NetworkConfig(name="ResidualEncoderUNet", args=residual), 3)
    assert sum(p.numel() for p in built.parameters()) > 0
    elsewhere = NetworkConfig(name="ResidualUNet", args={**residual, "block": "os.BottleneckD"})
    with pytest.raises(
        ConfigError, match=r"network\.args\.block: expected one of BasicBlockD, Bott"
    ):
        build_network(elsewhere, 3)


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("conv_op", "os.system"),
        ("conv_op", "evil.Conv3d"),
        ("conv_op", None),
        ("nonlin", "torch.nn.Linear"),
        ("norm_op", ["torch.nn.InstanceNorm3d"]),
    ],
)
def test_layers_come_from_a_list(argument: str, value: Any) -> None:
    args = nnunet_plans()["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    config = NetworkConfig(name="PlainConvUNet", args={**args, argument: value})
    got = "nothing" if value is None else repr(value)
    with pytest.raises(ConfigError) as caught:
        build_network(config, 3)
    assert f"network.args.{argument}: expected one of " in str(caught.value)
    assert f"got {got}" in str(caught.value)


@pytest.mark.usefixtures("networks")
def test_maps_and_ranks_with_nnunet(tmp_path: Path, root: Path) -> None:
    path = make_nnunet(tmp_path)
    config = configuration(root, tmp_path / "maps", **RUN, source={"checkpoint": str(path)})
    maps = make_maps(config, progress=False)
    assert set(maps.risk) == {"case00", "case01", "case02"}
    ranked = rank_sources(config, [path], progress=False)
    assert ranked[0].leep == pytest.approx(maps.score)


@pytest.mark.usefixtures("networks")
def test_preprocessing_of_nnunet_is_told(tmp_path: Path, root: Path) -> None:
    plans = nnunet_plans(normalization_schemes=["CTNormalization"])  # without its fingerprint
    path = save_nnunet(tmp_path / "a.pth", nnunet_network(plans, 1, 3), plans, nnunet_dataset())
    sections: dict[str, Any] = {**RUN, "source": {"checkpoint": str(path), "orientation": "RAS"}}
    sections["data"] = {"spacing": None}
    make_maps(configuration(root, tmp_path / "a", **sections), progress=False)
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "were prepared with CTNormalization" in log
    assert "data.spacing=[1.0, 2.0, 3.0]" in log
    assert "source.orientation" not in log
    with pytest.raises(ConfigError, match="were prepared with CTNormalization"):
        predict_images(path, [root / "images"], tmp_path / "out", progress=False)

    path = make_nnunet(tmp_path)
    sections = {**RUN, "source": {"checkpoint": str(path)}}
    make_maps(configuration(root, tmp_path / "b", **sections), progress=False)
    assert "may suffer" not in (tmp_path / "b" / "log.txt").read_text()
    window = InferenceConfig(overlap=0.5)
    found = predict_images(path, [root / "images"], tmp_path / "out", inference=window)
    assert len(found) == 5
    slices = make_nnunet(tmp_path, 2)
    assert len(predict_images(slices, [root / "images"], tmp_path / "2d", progress=False)) == 5


@pytest.mark.usefixtures("networks")
def test_a_checkpoint_without_its_plans(tmp_path: Path) -> None:
    plans, dataset = nnunet_plans(), nnunet_dataset()
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    path = folder / "fold_0" / "checkpoint_best.pth"
    network = nnunet_network(plans, 1, 3)
    save_nnunet(path, network, plans, dataset, init_args={"fold": 0})
    assert "its init_args.plans: missing; init_args.dataset_json: missing" in refusal(path)
    assert f"is a folder of folds; take a checkpoint of one, such as {path}" in refusal(folder)


@pytest.mark.usefixtures("networks")
def test_inherited_configurations(tmp_path: Path) -> None:
    plans = nnunet_plans()
    heir = copy.deepcopy(plans)
    heir["configurations"] = {"heir": {"inherits_from": "3d_fullres"}, **heir["configurations"]}
    network = nnunet_network(plans, 1, 3)
    path = save_nnunet(tmp_path / "a.pth", network, heir, nnunet_dataset())
    assert load(path).preprocessing["patch_size"] == [16, 12, 8]


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade"),
        ({"patch_size": None}, "configurations.3d_fullres.patch_size: expected 2 or 3 numbers"),
        ({"patch_size": [8, 8, math.inf]}, "patch_size: expected 2 or 3 numbers, got [8, 8, inf]"),
        ({"architecture": {"network_class_name": "os.system"}}, "got 'os.system'"),
        (
            {"architecture": {"network_class_name": "evil.PlainConvUNet"}},
            "network_class_name: expected one of PlainConvUNet",
        ),
        ({"architecture": 7}, "3d_fullres.architecture: input should be a valid dictionary, got 7"),
        ({"spacing": [1.0, 1.0]}, "configurations.3d_fullres.spacing: expected 3 numbers"),
        ({"inherits_from": "3d_huge"}, "expected a configuration '3d_huge'"),
        ({"inherits_from": ["2d"]}, "expected a configuration ['2d']"),
        (
            {"architecture": {**ARCHITECTURE, "arch_kwargs": {"a": LOOP}}},
            "not loaded: expected at most",
        ),
    ],
)
def test_plans_that_cannot_work(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    network = nnunet_network(nnunet_plans(), 1, 3)
    path = save_nnunet(tmp_path / "a.pth", network, nnunet_plans(**changes), nnunet_dataset())
    assert told in refusal(path)


@pytest.mark.usefixtures("networks")
def test_weights_that_do_not_fit_the_plans(tmp_path: Path) -> None:
    plans = nnunet_plans()
    network = nnunet_network(plans, 1, 5)
    told = refusal(save_nnunet(tmp_path / "a.pth", network, plans, nnunet_dataset()))
    assert "the weights do not fit PlainConvUNet(" in told
    assert "3 outputs of its dataset.json" in told
    path = make_nnunet(tmp_path)
    assert load(path, classes=["void", "a", "b"]).classes == ["void", "a", "b"]


@pytest.mark.usefixtures("networks")
def test_channels_of_nnunet(tmp_path: Path, root: Path) -> None:
    names = {"0": "T1", "1": "FLAIR"}
    path = make_nnunet(tmp_path, channel_names=names)
    assert load(path).channels == ["T1", "FLAIR"]
    config = configuration(root, tmp_path / "run", **RUN, source={"checkpoint": str(path)})
    with pytest.raises(ConfigError, match=r"source\.channels: .* sees images of 2 channels"):
        finetune(config, progress=False)


def test_nnunets_networks_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = nnunet_plans()
    network = build_network(NetworkConfig(**NETWORK_3D), 3)  # the network comes first
    path = save_nnunet(tmp_path / "a.pth", network, plans, nnunet_dataset())
    for name in [*sys.modules, "dynamic_network_architectures"]:
        if name.startswith("dynamic_network_architectures"):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install dynamic-network-architectures"):
        load(path)


@pytest.mark.usefixtures("networks")
def test_damaged_and_foreign_objects_in_nnunet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make_nnunet(tmp_path)
    whole = path.read_bytes()
    for kept in (-100, -2000, len(whole) // 2, 600):
        path.write_bytes(whole[:kept])
        assert "is damaged or incomplete" in refusal(path), kept
    plans = nnunet_plans()
    network = nnunet_network(plans, 1, 3)
    save_nnunet(path, network, plans, nnunet_dataset(), logging=Runs())
    told = refusal(path)
    assert "holds objects other than tensors and plain types" in told
    assert "would run its code" in told
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("letters", ["RAX", "RLS", "RA SS", "R", "RASS"])
def test_orientations_that_are_none(tmp_path: Path, letters: str) -> None:
    content = settings(tmp_path, tmp_path / "run", source={"checkpoint": "a.pth"})
    content["source"]["orientation"] = letters
    with pytest.raises(ConfigError, match=r"source\.orientation: expected a letter of R or L"):
        parse_config(content)
    with pytest.raises(ConfigError, match=r"--orientation: expected a letter of R or L"):
        predict_images(tmp_path / "a.pth", [], tmp_path / "out", orientation=letters)
