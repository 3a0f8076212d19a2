"""Several channels, overlapping regions, label tables and raw data sets of nnU-Net."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai")
nib = pytest.importorskip("nibabel")

import torch  # noqa: E402
from finetune_data import (  # noqa: E402
    RAS,
    configuration,
    phantom,
    read,
    real_data,
    save,
    write_cases,
)

from riskmap_ext.finetune import (  # noqa: E402
    ConfigError,
    DataError,
    finetune,
    load_config,
    predict_images,
    prepare_cases,
)
from riskmap_ext.finetune.base.structures import IGNORE_INDEX, structures_of  # noqa: E402
from riskmap_ext.finetune.config.schema import SourceConfig  # noqa: E402
from riskmap_ext.finetune.data.datalist import list_cases  # noqa: E402
from riskmap_ext.finetune.data.memory import memory_need  # noqa: E402
from riskmap_ext.finetune.data.sampling import Batch, CropSampler  # noqa: E402
from riskmap_ext.finetune.metrics.dice import dice_per_structure  # noqa: E402
from riskmap_ext.finetune.source.checkpoint import load_source  # noqa: E402
from riskmap_ext.finetune.train.plan import make_plan  # noqa: E402
from riskmap_ext.finetune.train.session import session  # noqa: E402
from riskmap_ext.finetune.train.step import Stepper  # noqa: E402

REGIONS = {"whole": ["box", "crate"], "core": "crate"}
TRAIN = {"steps": 2, "validate_every": 1}
CPU = torch.device("cpu")


def channels_of(seed: int, count: int = 2) -> tuple[list[np.ndarray], np.ndarray]:
    image, label = phantom(seed)
    return [image * (index + 1) + 7 * index for index in range(count)], label


def write_channels(root: Path, count: int = 3, suffixes: tuple[str, ...] = ("_0000", "_0001")):
    names = [f"case{index:02d}" for index in range(count)]
    for seed, name in enumerate(names):
        images, label = channels_of(seed, len(suffixes))
        for suffix, image in zip(suffixes, images, strict=True):
            save(root / "imagesTr" / f"{name}{suffix}.nii.gz", image)
        save(root / "labelsTr" / f"{name}.nii.gz", label)
    return names


def dataset_json(root: Path, **content: Any) -> None:
    content = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "box": 1, "crate": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
        **content,
    }
    (root / "dataset.json").write_text(json.dumps(content))


class TestChannels:
    @pytest.mark.parametrize("given", [None, "suffix", "names"])
    def test_files_of_a_case_are_its_channels(self, tmp_path, given):
        write_channels(tmp_path)
        data = {None: {}, "suffix": {"image_suffix": ["_0000", "_0001"]}}.get(
            given, {"image_suffix": ["_0000", "_0001"], "channels": ["T1", "T2"]}
        )
        cases = read(tmp_path, normalize="none", **data)
        assert cases.channels == (["T1", "T2"] if given == "names" else ["0000", "0001"])
        image = cases.train[0].image
        assert image.shape[0] == 2
        torch.testing.assert_close(image[1], image[0] * 2 + 7)

    def test_a_suffix_chooses_channels_and_their_order(self, tmp_path):
        write_channels(tmp_path, suffixes=("_t1", "_t2", "_flair"))
        swapped = read(tmp_path, normalize="none", image_suffix=["_flair", "_t1"])
        assert swapped.channels == ["flair", "t1"]
        image = swapped.train[0].image
        torch.testing.assert_close(image[0], image[1] * 3 + 14)

    def test_four_dimensional_files(self, tmp_path):
        for seed in range(3):
            images, label = channels_of(seed)
            save(tmp_path / "images" / f"c{seed}.nii.gz", np.stack(images, axis=-1))
            save(tmp_path / "labels" / f"c{seed}.nii.gz", label)
        cases = read(tmp_path, channels=2, normalize="none")
        image = cases.train[0].image
        torch.testing.assert_close(image[1], image[0] * 2 + 7)
        with pytest.raises(DataError, match=r"expected a 3-D volume.*data\.channels"):
            read(tmp_path)
        with pytest.raises(DataError, match="4-D volume of 3 channels"):
            read(tmp_path, channels=3)

    def test_each_channel_is_normalized_on_its_own(self, tmp_path):
        write_channels(tmp_path)
        case = read(tmp_path).train[0]
        for channel in case.image:
            inside = channel[case.mask].double()
            assert float(inside.mean()) == pytest.approx(0, abs=1e-5)
            assert float(inside.std(correction=0)) == pytest.approx(1, rel=1e-5)

    def test_a_channel_on_another_grid(self, tmp_path):
        write_channels(tmp_path)
        path = tmp_path / "imagesTr" / "case00_0001.nii.gz"
        save(path, channels_of(0)[0][1], RAS * 2)
        with pytest.raises(DataError, match="corners up to") as error:
            read(tmp_path)
        assert str(path) in str(error.value)
        save(path, np.zeros((3, 4, 5), np.float32))
        with pytest.raises(DataError, match=r"shape \(20, 24, 12\); got \(3, 4, 5\)"):
            read(tmp_path)

    def test_a_missing_channel_is_told(self, tmp_path):
        write_channels(tmp_path, 4)
        (tmp_path / "imagesTr" / "case00_0001.nii.gz").unlink()
        cases = read(tmp_path)
        assert cases.listing.notes == ["1 left out, no image _0001: case00"]
        assert "case00" not in [case.name for case in cases.train]

    def test_cases_with_lists_of_images(self, tmp_path):
        write_channels(tmp_path)
        entries = [
            {
                "image": [str(tmp_path / "imagesTr" / f"case0{i}_000{c}.nii.gz") for c in (0, 1)],
                "label": str(tmp_path / "labelsTr" / f"case0{i}.nii.gz"),
            }
            for i in range(3)
        ]
        data = {"root": None, "cases": entries}
        assert read(tmp_path, **data).train[0].image.shape[0] == 2
        entries[1]["image"] = entries[1]["image"][:1]
        with pytest.raises(DataError, match=r"expected 2 files of case .*got 1"):
            read(tmp_path, **data)

    @pytest.mark.parametrize("dims", [2, 3])
    def test_train_and_predict(self, tmp_path, dims):
        names = write_channels(tmp_path / "data")
        network = {
            "name": "UNet",
            "args": {"spatial_dims": dims, "channels": [4, 8], "strides": [2]},
        }
        data = {"image_suffix": ["_0000", "_0001"]}
        patch = {"patch_size": 8 if dims == 3 else 16}
        config = configuration(
            tmp_path / "data", tmp_path / "run", network=network, data=data, train=TRAIN | patch
        )
        finetune(config, progress=False)
        checkpoint = tmp_path / "run" / "last.pt"
        assert load_source(SourceConfig(checkpoint=checkpoint)).channels == ["0000", "0001"]
        images = tmp_path / "data" / "imagesTr"
        written = predict_images(checkpoint, [images], tmp_path / "out", progress=False)
        assert [path.name for path in written] == [f"{name}.nii.gz" for name in names]
        again = tmp_path / "run" / "predictions" / "case02.nii.gz"
        np.testing.assert_array_equal(
            nib.load(tmp_path / "out" / again.name).dataobj, nib.load(again).dataobj
        )
        (images / "case01_0001.nii.gz").unlink()
        with pytest.raises(DataError, match="case01: no image case01_0001"):
            predict_images(checkpoint, [images], tmp_path / "more", progress=False)
        with pytest.raises(ConfigError, match="one for each of the 2 channels"):
            predict_images(
                checkpoint, [images], tmp_path / "more", suffix=["a", "b", "c"], progress=False
            )

    def test_suffixes_of_which_one_ends_in_the_other(self, tmp_path):
        suffixes = ("_T1w", "_ce_T1w")
        names = write_channels(tmp_path / "data", suffixes=suffixes)
        data = {"image_suffix": list(suffixes)}
        config = configuration(tmp_path / "data", tmp_path / "run", data=data, train=TRAIN)
        checkpoint = finetune(config, progress=False).checkpoint
        images = tmp_path / "data" / "imagesTr"
        written = predict_images(checkpoint, [images], tmp_path / "out", progress=False)
        assert [path.name for path in written] == [f"{name}.nii.gz" for name in names]

    def test_a_source_that_sees_one_of_them(self, tmp_path):
        write_channels(tmp_path / "data")
        one = configuration(
            tmp_path / "data", tmp_path / "one", data={"image_suffix": "_0001"}, train=TRAIN
        )
        finetune(one, progress=False)
        source = {"checkpoint": str(tmp_path / "one" / "last.pt")}

        def run(**more: Any):
            return configuration(
                tmp_path / "data",
                tmp_path / "two",
                data={"channels": ["T1", "FLAIR"]},
                source={**source, **more},
                train=TRAIN,
            )

        with pytest.raises(ConfigError, match=r"source\.channels: .*sees images of 1 channels"):
            finetune(run(), progress=False)
        with pytest.raises(ConfigError, match=r"source\.channels: 'T2' is no channel"):
            finetune(run(channels=["T2"]), progress=False)
        with pytest.raises(ConfigError, match=r"source\.channels: expected 1"):
            finetune(run(channels=[0, 1]), progress=False)
        result = finetune(run(channels=["FLAIR"]), progress=False)
        assert result.leep is not None
        assert result.keys is not None
        assert result.keys.mismatched, "the first layer sees more channels"


class TestRegions:
    def test_order_of_painting(self):
        found = structures_of(["b", "x", "y", "z"], {"in": [3], "all": [1, 2, 3], "mid": ["y", 3]})
        assert found.regions is not None
        assert found.table is not None
        assert list(found.regions) == ["all", "mid", "in"]
        assert found.region_classes == [1, 2, 3]
        logits = torch.tensor([[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1, -1, -1]])
        assert found.segmentation(logits).tolist() == [3, 2, 1, 0]
        assert found.table.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]

    @pytest.mark.parametrize(
        ("regions", "classes", "told"),
        [
            ({"a": [0, 1]}, None, "data.regions.a: expected classes beside 0, got the background"),
            ({"a": []}, None, "data.regions.a: expected classes beside 0, got none"),
            ({"a": [1, 2]}, None, "data.regions.a: expected one class that no smaller region has"),
            ({"a": ["nothing"]}, None, "data.regions.a: 'nothing' is no class"),
            ({"a": [9]}, None, "data.regions.a: 9 is no class"),
            ({"a": [1, 2]}, [1, 2], "data.region_classes: expected a class for each of the 1"),
            (None, [1], "data.region_classes: expected data.regions beside it"),
        ],
    )
    def test_errors(self, regions, classes, told):
        with pytest.raises(ConfigError) as error:
            structures_of(["background", "box", "crate"], regions, classes)
        assert told in str(error.value)

    def test_dice_of_regions(self):
        structures = structures_of(["background", "box", "crate"], {"whole": [1, 2], "core": [2]})
        label = torch.tensor([[0, 1, 2, 2, IGNORE_INDEX]], dtype=torch.int16)
        prediction = torch.tensor([[0, 2, 2, 1, 2]], dtype=torch.int16)
        whole, core = dice_per_structure(prediction, label, structures)
        assert whole == 1
        assert core == pytest.approx(2 * 1 / 4)

    def test_train_resume_predict(self, tmp_path):
        write_cases(tmp_path / "data", 3)
        config = configuration(
            tmp_path / "data", tmp_path / "run", data={"regions": REGIONS}, train=TRAIN
        )
        result = finetune(config, progress=False)
        assert list(result.dice) == ["whole", "core"]
        checkpoint = tmp_path / "run" / "last.pt"
        model = load_source(SourceConfig(checkpoint=checkpoint))
        assert model.structures.regions == {"whole": [1, 2], "core": [2]}
        assert model.structures.num_outputs == 2
        again = load_config(tmp_path / "run" / "config.yaml", [f"output={tmp_path / 'again'}"])
        assert finetune(again, progress=False).dice == pytest.approx(result.dice, nan_ok=True)
        images = tmp_path / "data" / "images"
        written = predict_images(checkpoint, [images], tmp_path / "out", progress=False)
        assert set(np.unique(nib.load(written[0]).dataobj)) <= {0, 1, 2}

    def test_class_weights_are_for_classes(self, tmp_path):
        write_cases(tmp_path / "data", 3)
        loss = {"class_weights": "sqrt_inverse_frequency"}
        config = configuration(
            tmp_path / "data", tmp_path / "run", data={"regions": REGIONS}, loss=loss
        )
        with pytest.raises(ConfigError, match=r"loss\.class_weights"):
            finetune(config, progress=False)


class TestNnunet:
    def test_raw_data_set(self, tmp_path):
        write_channels(tmp_path)
        dataset_json(tmp_path)
        cases = read(tmp_path, classes=None)
        assert cases.channels == ["T1", "FLAIR"]
        assert cases.classes == ["background", "box", "crate"]
        assert cases.listing.image_suffix == ["_0000", "_0001"]

    def test_regions_and_ignore_label(self, tmp_path):
        write_channels(tmp_path)
        path = tmp_path / "labelsTr" / "case00.nii.gz"
        label = phantom(0)[1]
        label[-1] = 3
        save(path, label)
        labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
        dataset_json(tmp_path, labels=labels, regions_class_order=[1, 2])
        cases = read(tmp_path, classes=None)
        assert cases.structures.regions == {"whole": [1, 2], "core": [2]}
        assert cases.structures.region_classes == [1, 2]
        assert cases.classes == ["background", "label 1", "core"]
        assert (cases.train[0].label[-1] == IGNORE_INDEX).all()
        assert cases.listing.label_map == {1: 1, 2: 2, 3: "ignore"}

    def test_cases_by_the_dataset_key(self, tmp_path):
        write_channels(tmp_path)
        listed = {
            f"n{i}": {
                "images": [f"imagesTr/case0{i}_0000.nii.gz", f"imagesTr/case0{i}_0001.nii.gz"],
                "label": f"labelsTr/case0{i}.nii.gz",
            }
            for i in range(3)
        }
        dataset_json(tmp_path, dataset=listed)
        assert [case.name for case in read(tmp_path, classes=None).train] == ["n0", "n1"]

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ({"channel_names": {"a": "b"}}, "channel names: expected 0: name"),
            ({"channel_names": ["a"]}, "channel names: expected 0: name"),
            ({"labels": {"background": 0, "a": "x"}}, "labels: expected number: name"),
            ({"labels": {"background": 0, "a": 1, "b": 1}}, "labels: expected distinct numbers"),
            ({"dataset": {"a": 3}}, "dataset.a: input should be a valid dictionary"),
            ({"dataset": {}}, "dataset: dictionary should have at least 1 item"),
            (
                {"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": 1},
                "regions_class_order: expected 1 labels",
            ),
        ],
    )
    def test_bad_dataset_json(self, tmp_path, content, told):
        write_channels(tmp_path)
        dataset_json(tmp_path, **content)
        with pytest.raises(DataError) as error:
            read(tmp_path, classes=None)
        assert str(tmp_path / "dataset.json") in str(error.value)
        assert told in str(error.value)


class TestLabelTables:
    @pytest.mark.parametrize(
        "text",
        [
            "value,name\n0,background\n47,hippocampus\n48,hippocampus\n99,other\n12,ignore\n",
            "Name\tIndex\nhippocampus\t47\nhippocampus\t48\nother\t99\nignore\t12\n",
        ],
    )
    def test_gaps_are_closed(self, tmp_path, text):
        (tmp_path / "labels.txt").write_text(text)
        image, _ = phantom(0)
        label = np.zeros(image.shape, np.int32)
        label[2:4], label[4:6], label[6:8], label[8:10] = 47, 48, 99, 12
        for name in ("a", "b", "c"):
            save(tmp_path / "images" / f"{name}.nii.gz", image)
            save(tmp_path / "labels" / f"{name}.nii.gz", label)
        cases = read(tmp_path, classes=None, label_map=str(tmp_path / "labels.txt"))
        assert cases.classes == ["background", "hippocampus", "other"]
        found = cases.train[0].label
        assert [int(found[x, 0, 0]) for x in (0, 2, 4, 6, 8)] == [0, 1, 1, 2, IGNORE_INDEX]
        assert cases.listing.label_map == {47: 1, 48: 1, 99: 2, 12: "ignore"}

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("", "line 1: expected a header with a column value"),
            ("a,b\n1,2\n", "line 1: expected a header with a column value"),
            ("value,name\nx,y\n", "line 2: expected a whole number, got 'x'"),
            ("value,name\n1\n", "line 2: expected a class name"),
            ("value,name\n1,\n", "line 2: expected a class name"),
            ("value,name\n1,a\n1,b\n", "line 3: 1 is a already"),
            ("value,name\n0,a\n", "no label value beside 0"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path, text, told):
        write_cases(tmp_path, 3)
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DataError) as error:
            read(tmp_path, classes=None, label_map=str(tmp_path / "t.csv"))
        assert str(tmp_path / "t.csv") in str(error.value)
        assert told in str(error.value)

    def test_missing_table(self, tmp_path):
        write_cases(tmp_path, 3)
        with pytest.raises(DataError, match=r"none\.csv: no such file"):
            read(tmp_path, classes=None, label_map=str(tmp_path / "none.csv"))

    def test_table_of_real_labels(self):
        root = real_data("brain_ixi")
        table = root / "labels.csv"
        data = {
            "root": None,
            "images": str(root / "images"),
            "labels": str(root / "labels"),
            "image_suffix": "_T1w",
            "label_suffix": "_dlmuse",
            "label_map": str(table),
            "classes": None,
        }
        cases = read(root, **data)
        assert len(cases.classes) > 100
        kinds = torch.unique(cases.train[0].label)
        assert len(kinds) > 100
        assert int(kinds.max()) < len(cases.classes)


def test_volumes_on_disk_give_the_same_run(tmp_path):
    write_cases(tmp_path / "data", 3)
    found = {}
    for storage in ("memory", "disk"):
        config = configuration(
            tmp_path / "data", tmp_path / storage, data={"storage": storage}, train=TRAIN
        )
        finetune(config, progress=False)
        found[storage] = torch.load(tmp_path / storage / "last.pt", weights_only=True)
    for key, value in found["memory"]["state_dict"].items():
        assert torch.equal(found["disk"]["state_dict"][key], value)
    assert list((tmp_path / "disk" / "cache" / "volumes").glob("case-*.pt"))
    assert list((tmp_path / "disk" / "cache" / "volumes").glob("crops-*.pt"))
    assert not (tmp_path / "memory" / "cache" / "volumes").exists()


def test_too_little_memory(tmp_path, monkeypatch):
    write_cases(tmp_path / "data", 3)
    plain = configuration(tmp_path / "data", tmp_path)
    need = memory_need(plain, list_cases(plain.data), outputs=3)

    def run(available: int, **data: Any):
        monkeypatch.setattr("riskmap_ext.finetune.data.memory.available_memory", lambda: available)
        config = configuration(tmp_path / "data", tmp_path / "run", data=data, train=TRAIN)
        return finetune(config, progress=False)

    with pytest.raises(DataError, match=r"case\d\d: the logits of this case take about"):
        run(need.largest - 1)
    with pytest.raises(DataError, match=r"data\.storage: memory"):
        run(need.volumes + need.largest - 1, storage="memory")
    assert not (tmp_path / "run").exists()
    run(2 * need.volumes - 1)
    assert list((tmp_path / "run" / "cache" / "volumes").glob("case-*.pt"))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "on disk, in" in log


def stepped(tmp_path: Path, parts: list[slice], **train: Any) -> dict[str, torch.Tensor]:
    """Weights after one step on a batch of four, given in parts."""
    config = configuration(
        tmp_path / "data", tmp_path, train={"batch_size": 4, "optimizer": "SGD", **train}
    )
    cases = prepare_cases(config)
    sampler = CropSampler(cases.train, None, [16, 16], config.train, seed=0, device=CPU)
    batch = sampler.next_batch()
    batches = [
        Batch(batch.image[p], batch.label[p], batch.foreground[p], None, batch.cases[p])
        for p in parts
    ]
    torch.manual_seed(0)
    with session(config, progress=False) as run:
        plan = make_plan(run, cases=cases)
        Stepper(plan)(batches)
    return plan.models.network.state_dict()


@pytest.mark.parametrize(
    ("parts", "train"),
    [
        ([slice(0, 2), slice(2, 4)], {}),
        ([slice(i, i + 1) for i in range(4)], {}),
        ([slice(0, 4)], {"channels_last": True}),
        ([slice(0, 2), slice(2, 4)], {"compile": True}),
    ],
    ids=["two parts", "four parts", "channels last", "compiled"],
)
def test_the_same_step_in_another_way(tmp_path, parts, train):
    write_cases(tmp_path / "data", 3)
    expected = stepped(tmp_path, [slice(0, 4)])
    found = stepped(tmp_path, parts, **train)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
