"""riskmap_ext.integrations.nnunet with nnU-Net itself: a tiny data set, one epoch."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_data import nnunet_folders, prepare, write_raw_data_set
from test_howto import HOWTO, blocks, run_command
from torch import Tensor

pytest.importorskip("nnunetv2", reason="needs nnU-Net")
pytest.importorskip("dynamic_network_architectures", reason="needs nnU-Net's networks")

from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
    entry_point_move_plans_between_datasets,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, predict_entry_point
from nnunetv2.model_sharing.entry_points import install_from_zip_entry_point
from nnunetv2.run.run_training import maybe_load_checkpoint, run_training_entry
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

import riskmap_ext
from riskmap_ext.integrations import _nnunet_source, nnunet
from riskmap_ext.nn import FusedHead
from riskmap_ext.statistics import sqrt_inverse_frequency

pytestmark = pytest.mark.slow
CASES = 6
LABELS: dict[str, dict[str, Any]] = {
    "whole": {"background": 0, "hippocampus": 1},
    "parts": {"background": 0, "anterior": 1, "posterior": 2},
    "ignored": {"background": 0, "anterior": 1, "posterior": 2, "ignore": 3},
    "regions": {"background": 0, "hippocampus": [1, 2], "posterior": [2]},
}
NAMES = {kind: f"Dataset{401 + index}_{kind}" for index, kind in enumerate(LABELS)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's three folders with the hippocampus set in four ways, planned and preprocessed."""
    root = tmp_path_factory.mktemp("nnunet")
    with nnunet_folders(root) as patch:
        patch.setenv("nnUNet_extTrainer", nnunet.trainer_folder())
        for kind in LABELS:
            order: Any = {"regions_class_order": [1, 2]} if kind == "regions" else {}
            change = partial(_changed, kind)
            write_raw_data_set(root / "raw" / NAMES[kind], CASES, LABELS[kind], change, **order)
        prepare(root, list(NAMES.values()), ["3d_fullres"], patch)
        yield root


def _changed(kind: str, values: np.ndarray) -> np.ndarray:
    if kind == "whole":
        return (values > 0).astype(np.uint8)
    if kind == "ignored":
        values[:3] = 3
    return values


def trainer_of(
    kind: str, make: type = nnunet.nnUNetTrainerRiskMap, plans_name: str = "nnUNetPlans"
) -> Any:
    folder = Path(os.environ["nnUNet_preprocessed"]) / NAMES[kind]  # noqa: SIM112
    plans = json.loads((folder / f"{plans_name}.json").read_text()) | {"continue_training": False}
    labels = json.loads((folder / "dataset.json").read_text())
    trainer = make(plans, "3d_fullres", 0, labels, torch.device("cpu"))
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    return trainer


@pytest.fixture(scope="module")
def checkpoint(folders: Path) -> Path:
    """A model of the whole hippocampus, as nnU-Net's own trainer leaves it after an epoch."""
    torch.manual_seed(0)
    trainer = trainer_of("whole", nnunet.nnUNetTrainer)
    trainer.num_iterations_per_epoch = 4
    trainer.run_training()
    return Path(trainer.output_folder) / "checkpoint_final.pth"


@pytest.fixture
def source(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RISKMAP_SOURCE", str(checkpoint))
    return checkpoint


@pytest.mark.parametrize("kind", ["parts", "ignored", "regions"])
def test_trains_an_epoch(kind: str, source: Path) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    trainer = trainer_of(kind)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(source))
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))
    assert trainer.statistics.joint.shape == (3, 2)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").exists()


def test_statistics_are_those_of_whole_volumes(source: Path) -> None:
    """Tiles cover every voxel once: the counts are exact."""
    trainer = trainer_of("ignored")
    trainer.initialize()
    trainer.on_train_start()
    keys, _ = trainer.do_split()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, keys)
    labels = [torch.from_numpy(np.array(dataset.load_case(key)[1])).clamp(min=0) for key in keys]
    counts = torch.bincount(torch.cat([label.flatten() for label in labels]).long(), minlength=4)
    assert counts[3] > 0
    assert trainer.statistics.num_voxels == int(counts[:3].sum())
    torch.testing.assert_close(
        trainer.statistics.joint.sum(1), counts[:3].double(), rtol=1e-5, atol=1e-3
    )


def test_a_step_is_that_of_the_weighted_loss(source: Path) -> None:
    trainer = trainer_of("parts")
    trainer.initialize()
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    network = copy.deepcopy(trainer.network)
    loss = trainer.train_step(batch)["loss"]
    with torch.no_grad():
        risk = riskmap_ext.risk_map(
            trainer.source.network(batch["data"]),
            batch["target"][0],
            trainer.statistics.conditional,
            range=trainer.statistics.hardness_range,
        )
        outputs = network(batch["data"])
        expected = riskmap_ext.nn.RiskWeightedLoss(
            dice_weight=1.0,
            normalization="valid",
            batch_dice=trainer.configuration_manager.batch_dice,
            scale_weights=_weights(len(outputs)),
        )(outputs, batch["target"], risk)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(trainer.loss(outputs, batch["target"])) < float(expected)  # nnU-Net's own


def _weights(scales: int) -> list[float]:
    weights = [0.5**scale for scale in range(scales - 1)] + [0.0]
    return [weight / sum(weights) for weight in weights]


def test_regions_are_the_data_sets(source: Path) -> None:
    trainer = trainer_of("regions")
    trainer.initialize()
    expected = torch.tensor([[False, True, True], [False, False, True]])
    assert torch.equal(trainer.loss.weighted.regions, expected)
    trainer.on_train_start()
    target: Tensor = next(trainer.dataloader_train)["target"][0]
    assert target.shape[1] == 1
    assert next(trainer.dataloader_val)["target"][0].shape[1] == 2


def test_statistics_are_kept_with_the_run(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer_of("parts")
    first.initialize()
    first.on_train_start()
    monkeypatch.delenv("RISKMAP_SOURCE")
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "402", "3d_fullres", "0", "--c"])
    again = trainer_of("parts")
    again.initialize()
    monkeypatch.setattr(nnunet.nnUNetTrainerRiskMap, "_tiles", None)
    again.on_train_start()
    assert again.source.path == source
    assert torch.equal(again.statistics.joint, first.statistics.joint)


def test_finds_the_checkpoint_on_the_command_line(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RISKMAP_SOURCE")
    arguments = ["402", "3d_fullres", "0", "-tr", "x", "-pretrained_weights", str(source), "--npz"]
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", *arguments])
    assert trainer_of("parts")._source_path() == source
    # -p is nnU-Net's option for plans
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", *arguments, "-p", "nnUNetPlans"])
    assert trainer_of("parts")._source_path() == source
    monkeypatch.setenv("RISKMAP_SOURCE", "other.pth")
    with pytest.raises(RuntimeError, match=r"-pretrained_weights .* and RISKMAP_SOURCE=other\.pth"):
        trainer_of("parts")._source_path()


def test_a_map_of_ones_gives_the_loss_of_nnunet(source: Path) -> None:
    trainer = trainer_of("parts")
    trainer.initialize()
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    with torch.no_grad():
        outputs = trainer.network(batch["data"])
        with trainer.loss.weighted_by(torch.ones(batch["target"][0].shape)):
            weighted = trainer.loss(outputs, batch["target"])
        plain = trainer.loss(outputs, batch["target"])
    assert float(weighted) == pytest.approx(float(plain) + 1, rel=1e-4)  # 1 - Dice for -Dice


def test_statistics_follow_the_labels(source: Path) -> None:
    trainer = trainer_of("parts")
    trainer.initialize()
    keys, _ = trainer.do_split()
    before = trainer._data_digest(keys)
    assert trainer._data_digest(keys) == before
    folder = Path(trainer.preprocessed_dataset_folder)
    label = next(
        path for path in sorted(folder.iterdir()) if path.name.startswith(f"{keys[0]}_seg")
    )
    os.utime(label)
    assert trainer._data_digest(keys) != before


def test_says_what_is_missing(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RISKMAP_SOURCE", raising=False)
    trainer = trainer_of("parts")
    trainer.output_folder = str(folders / "none")
    trainer.initialize()
    with pytest.raises(RuntimeError, match="expected the source model's checkpoint"):
        trainer.on_train_start()


class _Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def test_refuses_a_checkpoint_that_runs_code(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"network_weights": {}, "init_args": {}, "logging": _Runs()}, tmp_path / "bad.pth")
    cpu = torch.device("cpu")
    monkeypatch.setenv("RISKMAP_SOURCE", str(tmp_path / "bad.pth"))
    with pytest.raises(RuntimeError, match=r"bad\.pth: not loaded: .*would run code"):
        # as the command line does
        maybe_load_checkpoint(trainer_of("parts"), False, False, str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RuntimeError, match=r"none\.pth: no such checkpoint"):
        nnunet.SourceNetwork(tmp_path / "none.pth", 1, cpu)
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=r"other\.pth: expected an nnU-Net checkpoint"):
        nnunet.SourceNetwork(tmp_path / "other.pth", 1, cpu)
    with pytest.raises(RuntimeError, match="expected a model of 2 input channels"):
        nnunet.SourceNetwork(checkpoint, 2, cpu)


def test_example(source: Path, tmp_path: Path) -> None:
    *_, example = blocks("nnunet")
    small = {"DATASET": NAMES["parts"], "EPOCHS": "1", "ITERATIONS": "1"}
    output = run_command([sys.executable, "-c", example], tmp_path, **small)
    assert re.search(r"LEEP -\d\.\d", output)


def test_class_weights_are_counted_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the training cases without ignored voxels, with mean 1; no source."""
    monkeypatch.delenv("RISKMAP_SOURCE", raising=False)
    make = nnunet.nnUNetTrainerClassWeights
    trainer = trainer_of("ignored", make)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))
    keys, _ = trainer.do_split()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, keys)
    labels = np.concatenate([np.array(dataset.load_case(key)[1]).ravel() for key in keys])
    counts = np.bincount(np.maximum(labels, 0))
    assert counts[3] > 0
    share = counts[:3] / counts[:3].sum()
    expected = torch.tensor(share**-0.5 / (share**0.5).sum(), dtype=torch.float32)
    torch.testing.assert_close(trainer.loss.weighted.weight, expected)
    logged = ", ".join(f"{weight:.3g}" for weight in expected)
    assert f"class weights, background first: {logged}" in capsys.readouterr().out
    again = trainer_of("ignored", make)
    monkeypatch.setattr(make, "_count", None)
    again.on_train_start()
    assert torch.equal(again.loss.weighted.weight, trainer.loss.weighted.weight)


def test_a_class_without_voxels_has_no_weight() -> None:
    weights = sqrt_inverse_frequency(torch.tensor([90, 0, 10]))
    assert weights[1] == 0
    assert float(weights @ torch.tensor([0.9, 0.0, 0.1])) == pytest.approx(1)


def test_settings_of_the_page(folders: Path) -> None:
    names: dict[str, Any] = {}
    exec(blocks("nnunet")[1], names)
    power = trainer_of("parts", names["nnUNetTrainerRiskMapPower"])
    power.initialize()
    assert power.loss.weighted.options["dice_weight"] == 0.5
    assert power.risk_options["alpha"] == 0.5
    tumour = trainer_of("parts", names["nnUNetTrainerTumour"])
    tumour.on_train_start()
    assert tumour.loss.weighted.weight.tolist() == [1, 1, 4]
    bright = trainer_of("parts", names["nnUNetTrainerBright"])
    bright.on_train_start()
    batch = next(bright.dataloader_train)
    network = copy.deepcopy(bright.network)
    loss = float(bright.train_step(batch)["loss"])
    with torch.no_grad(), bright.loss.weighted_by(torch.exp(batch["data"][:, :1].clamp(-2, 2))):
        assert loss == pytest.approx(float(bright.loss(network(batch["data"]), batch["target"])))


@pytest.mark.parametrize("kind", ["parts", "ignored", "regions"])
def test_the_pages_trainer_starts_at_the_prior(kind: str, source: Path) -> None:
    names: dict[str, Any] = {}
    exec(blocks("nnunet")[2], names)
    heads = []
    for make in (nnunet.nnUNetTrainerRiskMap, names["nnUNetTrainerRiskMapPrior"]):
        torch.manual_seed(0)
        trainer = trainer_of(kind, make)
        trainer.on_train_start()
        heads.append([layer.bias.detach().clone() for layer in trainer.network.decoder.seg_layers])
    shares = trainer.statistics.class_frequencies
    expected = (shares + 1e-4).log()
    if kind == "regions":
        shares = torch.stack([shares[1] + shares[2], shares[2]])
        expected = ((shares + 1e-4) / (1 - shares + 1e-4)).log()
    for plain, prior in zip(*heads, strict=True):
        torch.testing.assert_close(prior - plain, expected.float(), rtol=1e-5, atol=1e-5)
    trainer.current_epoch = 1  # as --c has it
    trainer.on_train_start()
    for prior, layer in zip(heads[1], trainer.network.decoder.seg_layers, strict=True):
        assert torch.equal(layer.bias, prior)


class Fused(nnunet.nnUNetTrainerVoxelWeights):
    fused_head = True


class NotFused(nnunet.nnUNetTrainerVoxelWeights):
    fused_head = False


def heads_of(network: Any) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, FusedHead)]


@pytest.mark.parametrize("kind", ["parts", "ignored", "regions"])
def test_a_fused_head_takes_the_same_steps(kind: str, folders: Path) -> None:
    trainers = []
    for make in (Fused, NotFused):
        torch.manual_seed(0)
        trainer = trainer_of(kind, make)
        trainer.on_train_start()
        trainers.append(trainer)
    mine, plain = trainers
    scales = len(plain.network.decoder.seg_layers)
    assert heads_of(mine.network) == [f"decoder.seg_layers.{i}" for i in range(scales)]
    assert heads_of(plain.network) == []
    batch, tested = next(plain.dataloader_train), next(plain.dataloader_val)
    for _ in range(2):
        found, expected = (float(each.train_step(batch)["loss"]) for each in trainers)
        assert found == pytest.approx(expected, rel=1e-4)
    keys = list(plain.network.state_dict())
    assert list(mine.network.state_dict()) == keys
    for key, value in plain.network.state_dict().items():
        torch.testing.assert_close(mine.network.state_dict()[key], value, rtol=1e-3, atol=1e-5)

    mine.network.load_state_dict(plain.network.state_dict())
    results = []
    for each in trainers:  # nnU-Net's own loss and Dice, of real logits
        each.on_validation_epoch_start()
        with torch.no_grad():
            results.append(each.validation_step(copy.deepcopy(tested)))
    for name, value in results[1].items():
        np.testing.assert_array_equal(results[0][name], value)


def test_a_fused_head_in_checkpoints_and_predictions(folders: Path) -> None:
    trainer = trainer_of("parts", Fused)
    trainer.run_training()
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    plain = trainer_of("parts", NotFused)
    plain.load_checkpoint(str(path))
    again = trainer_of("parts", Fused)
    again.load_checkpoint(str(path))
    image = torch.randn(1, 40, 40, 40)
    volumes = []
    for each in (plain, again):
        each.set_deep_supervision_enabled(False)
        predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False)
        managers = (each.plans_manager, each.configuration_manager)
        predictor.manual_initialization(
            each.network, *managers, None, each.dataset_json, type(each).__name__, None
        )
        volumes.append(predictor.predict_sliding_window_return_logits(image))
    assert torch.equal(*volumes)
    predictor.network = plain.build_network_architecture(
        plain.plans_manager, plain.configuration_manager, 1, 3, False
    )
    predictor.network.load_state_dict(again.network.state_dict())
    assert torch.equal(predictor.predict_sliding_window_return_logits(image), volumes[0])


class WithoutAHead(nnunet.nnUNetTrainerVoxelWeights):
    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, *_
    ):
        return torch.nn.Conv3d(num_input_channels, num_output_channels, 3, padding=1)


def test_when_a_head_is_fused(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = trainer_of("parts", nnunet.nnUNetTrainerVoxelWeights)
    few.initialize()
    assert heads_of(few.network) == []
    monkeypatch.setattr(nnunet, "WORTH_FUSING", 3)
    enough = trainer_of("parts", nnunet.nnUNetTrainerVoxelWeights)
    enough.initialize()
    assert heads_of(enough.network)
    assert "fused with the loss: decoder.seg_layers.0" in capsys.readouterr().out
    none = trainer_of("parts", WithoutAHead)
    none.initialize()
    assert "the head is not fused with the loss" in capsys.readouterr().out
    for wanted, told in ((True, "expected a network with a 1x1 head"), ("no", "got 'no'")):
        monkeypatch.setattr(WithoutAHead, "fused_head", wanted)
        with pytest.raises(ValueError, match=f"^fused_head: .*{told}"):
            trainer_of("parts", WithoutAHead).initialize()


def test_a_source_of_many_classes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are not made: neither for the statistics nor for the map of a batch."""
    found, batch = [], None
    for enough in (16, 2):
        monkeypatch.setattr(_nnunet_source, "WORTH_FUSING", enough)
        torch.manual_seed(0)
        trainer = trainer_of("parts")
        trainer.output_folder = str(Path(trainer.output_folder) / str(enough))
        Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
        trainer.on_train_start()
        assert bool(heads_of(trainer.source.network)) == (enough == 2)
        batch = batch or next(trainer.dataloader_train)
        weights = trainer.voxel_weights(batch["data"], batch["target"][0])
        found.append((trainer.statistics.joint, trainer.statistics.score, weights))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_somebody_elses_checkpoint(
    checkpoint: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's steps as they stand, for a model of which nothing but its results is there."""
    model = checkpoint.parent.parent
    other = folders / "results" / "Dataset499_other" / model.name
    shutil.copytree(model, other)
    (steps,) = re.findall(r"^```bash\n(SOURCE=.*?)^```$", page(), flags=re.DOTALL | re.MULTILINE)
    steps = steps.replace("Dataset291_Organs", "Dataset499_other").replace("501_Kidneys", "501")
    steps = steps.replace("Dataset501", NAMES["parts"]).replace("501", NAMES["parts"][7:10])
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run_command(["bash", "-euc", steps], tmp_path, PATH=scripts, nnUNet_def_n_proc="1")
    script = tmp_path / "nnUNetTrainerRiskMapFinetune.py"
    script.write_text(blocks("nnunet")[0], encoding="utf-8")
    trainer = trainer_of("parts", found_by_nnunet(script.stem, tmp_path), "nnUNetPlansOf291")
    monkeypatch.setenv("RISKMAP_SOURCE", str(other / "fold_0" / "checkpoint_final.pth"))
    maybe_load_checkpoint(trainer, False, False, os.environ["RISKMAP_SOURCE"])
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    trainer.run_training()
    assert "nnUNetPlansOf291" in trainer.output_folder
    assert trainer.statistics.joint.shape == (3, 2)


ENTRIES = {
    "nnUNetv2_extract_fingerprint": plan_and_preprocess_entrypoints.extract_fingerprint_entry,
    "nnUNetv2_install_pretrained_model_from_zip": install_from_zip_entry_point,
    "nnUNetv2_move_plans_between_datasets": entry_point_move_plans_between_datasets,
    "nnUNetv2_predict": predict_entry_point,
    "nnUNetv2_preprocess": plan_and_preprocess_entrypoints.preprocess_entry,
    "nnUNetv2_train": run_training_entry,
}


def test_commands_of_the_page_are_nnunets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by nnU-Net's own parser, and strictly: some of them pass over what they do not know."""
    known = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser) -> None:
        _, unknown = known(self)
        assert unknown == []
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    lines = re.findall(r"(?:^|`)(nnUNetv2_\w+ [^`\n#]+)", page(), flags=re.MULTILINE)
    assert {line.split()[0] for line in lines} == set(ENTRIES)
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(StopIteration):
            ENTRIES[sys.argv[0]]()


def page() -> str:
    return (HOWTO / "nnunet.md").read_text(encoding="utf-8")


def found_by_nnunet(name: str, folder: Path) -> Any:
    return recursive_find_python_class(
        str(folder), name, None, base_folder=str(folder), cleanup_imports_from_base_folder=True
    )


def test_are_found_in_their_folder() -> None:
    folder = Path(nnunet.trainer_folder())
    found = run_command([sys.executable, "-m", "riskmap_ext.integrations.nnunet"], folder)
    assert Path(found.strip()) == folder
    names = {"nnUNetTrainerClassWeights", "nnUNetTrainerRiskMap"}
    assert {path.stem for path in folder.glob("nn*.py")} == names
    for name in names:
        assert found_by_nnunet(name, folder) is getattr(nnunet, name)
