"""Nothing in a checkpoint is run: hostile pickles, bundles and plans, and weights that are none."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")

import hostile_pickles
import source_data
import torch
from finetune_data import NETWORK_2D
from malformed_targets import expressions
from source_data import load, refusal

from riskmap_ext._files import read_torch
from riskmap_ext.finetune.config.schema import NetworkConfig
from riskmap_ext.finetune.source.network import build_network, without_downloads

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What hostile code would make."""
    yield tmp_path / "RAN"
    assert not (tmp_path / "RAN").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("container", sorted(hostile_pickles.CONTAINERS))
def test_hostile_objects(tmp_path: Path, marker: Path, container: str) -> None:
    path = tmp_path / "model.pt"
    for name, payload in hostile_pickles.objects(marker).items():
        layouts = {
            "alone": payload,
            "own": {"format": "riskmap_ext.checkpoint.1", "state_dict": {"w": payload}},
            "nnU-Net": {"network_weights": {}, "init_args": {"plans": payload}},
            "resume": {"format": "riskmap_ext.resume.1", "stepper": payload},
        }
        for layout, content in layouts.items():
            hostile_pickles.CONTAINERS[container](path, content)
            assert read_torch(path) is None, (name, layout)
            told = refusal(path, network=NETWORK_2D, classes=3)
            assert not marker.exists(), (name, layout)
            assert len(told) < 1000, (name, layout)


@pytest.mark.filterwarnings("ignore")
def test_hostile_streams(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "model.pt"
    for name, stream in hostile_pickles.streams(marker).items():
        path.write_bytes(stream)
        refusal(path, network=NETWORK_2D, classes=3)
        torch.save({"w": torch.zeros(1)}, path)
        hostile_pickles.put_in_archive(path, stream)
        refusal(path, network=NETWORK_2D, classes=3)
        assert not marker.exists(), name


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_with_code(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    stream = hostile_pickles.streams(marker)["GLOBAL"]
    hostile_pickles.put_in_archive(path, stream)
    refusal(path)
    hostile_pickles.put_in_archive(path, stream, "constants.pkl")
    refusal(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["expanded", "meta", "sparse", "csr", "quantized", "nested", "complex", "float8"]
)
def test_tensors_that_are_no_weights(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": hostile_pickles.tensors()[kind]}, path)
    told = refusal(path, network=NETWORK_2D, classes=3)
    assert "expected plain tensors" in told or kind == "nested"


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    torch.save({1: torch.zeros(1)}, tmp_path / "model.pt")
    assert "no weights in it" in refusal(tmp_path / "model.pt")


def test_an_archive_made_to_fill_memory(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.writestr("last/data/99", bytes(2**27))
    assert "is not loaded: expected an archive as torch.save writes it" in refusal(path)
    assert read_torch(path) is None


@pytest.mark.parametrize("name", ["laughs", "cycle", "depth"])
def test_values_without_end(tmp_path: Path, marker: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    torch.save({}, path)
    hostile_pickles.put_in_archive(path, hostile_pickles.streams(marker)[name])
    assert "is not loaded: expected at most" in refusal(path)
    assert read_torch(path) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": 5},
        {"classes": ["a", None]},
        {"channels": 3},
        {"regions": [1]},
        {"preprocessing": "none"},
        {"preprocessing": {"patch_size": "x"}},
        {"preprocessing": {"slice_axis": "x"}},
        {"preprocessing": {"image_suffix": 3}},
        {"network": {"name": "UNet", "args": {"spatial_dims": torch.zeros(3)}}},
        {"network": {"name": "os.system"}},
        {"network": {"name": "Transchex"}},
        {"network": {"name": "UNet", "args": {**NETWORK_2D["args"], "channels": [4, 10**12]}}},
        {"network": {"name": "UNet", "args": {**NETWORK_2D["args"], "num_res_units": 10**9}}},
    ],
)
def test_what_a_checkpoint_says_of_itself(source: Path, tmp_path: Path, changes: Any) -> None:
    path = tmp_path / "model.pt"
    torch.save({**torch.load(source, weights_only=True), **changes}, path)
    refusal(path)


def test_a_file_does_not_download_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def online(*_: Any, **__: Any) -> None:
        raise AssertionError("asks the internet")

    monkeypatch.setattr("torch.hub.download_url_to_file", online)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", online)
    args = {"spatial_dims": 2, "model_name": "efficientnet-b0"}
    asked = NetworkConfig(name="EfficientNetBN", args={**args, "pretrained": True})
    for network in (asked, NetworkConfig(name="EfficientNetBN", args=args)):
        assert without_downloads(network).args["pretrained"] is False
        build_network(without_downloads(network), 3)
    unet = NetworkConfig(**NETWORK_2D)
    assert without_downloads(unet) == unet


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    network = build_network(
        NetworkConfig(name="UNet", args={k: v for k, v in _definition().items() if k[0] != "_"}), 3
    )
    config, metadata = source_data.bundle_config(), source_data.bundle_metadata()
    return source_data.save_bundle(tmp_path / "bundle", network, config, metadata)


def _definition() -> dict[str, Any]:
    return source_data.BUNDLE_NETWORK


def test_expressions_of_a_bundle_are_not_evaluated(bundle: Path, marker: Path) -> None:
    path = bundle / "configs" / "inference.json"
    for expression in expressions(marker):
        for key in ("_target_", "channels", "act"):
            changed = {**_definition(), key: expression}
            path.write_text(json.dumps(source_data.bundle_config(network_def=changed)))
            refusal(bundle)
            assert not marker.exists(), (key, expression)
        path.write_text(json.dumps(source_data.bundle_config(preprocessing=expression)))
        load(bundle)


@pytest.mark.parametrize("name", ["inference", "metadata"])
def test_a_configuration_that_links_to_nothing(bundle: Path, name: str) -> None:
    path = bundle / "configs" / f"{name}.json"
    path.unlink()
    path.symlink_to("nowhere.json")
    assert f"{path}: no such file" in refusal(bundle)


@pytest.mark.parametrize("key", ["network_def", "preprocessing"])
def test_references_without_end(bundle: Path, key: str) -> None:
    config = source_data.bundle_config()
    more = {f"r{n}": [f"@r{n + 1}"] * 10 for n in range(12)}
    config[key] = {**_definition(), "channels": "@r0"} if key == "network_def" else "@r0"
    (bundle / "configs" / "inference.json").write_text(json.dumps({**config, **more}))
    assert "references (@) stand for more than" in refusal(bundle)


def test_names_in_nnunets_plans_are_not_imported(tmp_path: Path, marker: Path) -> None:
    pytest.importorskip("dynamic_network_architectures")
    plans = source_data.nnunet_plans()
    network = source_data.nnunet_network(plans, 1, 3)
    for expression in expressions(marker):
        for key in ("conv_op", "norm_op", "nonlin", "nonlin_kwargs", "kernel_sizes"):
            changed = source_data.nnunet_plans()
            architecture = changed["configurations"]["3d_fullres"]["architecture"]
            architecture["arch_kwargs"][key] = expression
            architecture["_kw_requires_import"].append(key)
            path = source_data.save_nnunet(
                tmp_path / "a.pth", network, changed, source_data.nnunet_dataset()
            )
            refusal(path)
            assert not marker.exists(), (key, expression)
