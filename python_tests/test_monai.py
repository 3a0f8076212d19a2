"""riskmap_ext.integrations.monai beside MONAI itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("monai", reason="needs MONAI")

from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, RandFlipd, SpatialCropd

import riskmap_ext
from riskmap_ext.integrations.monai import (
    PrepareBatchRiskMap,
    RiskMapd,
    RiskMapDiceCELoss,
    transfer_statistics,
)

SHAPE = (12, 10, 9)


def labels(classes: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, classes, (batch, 1, *SHAPE), generator=generator)


def source() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv3d(1, 4, 3, padding=1)


def cases(number: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(number):
        label = torch.randint(0, 3, (1, *SHAPE), generator=generator)
        affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
        image = label + torch.randn(label.shape, generator=generator)
        meta = {"filename_or_obj": f"case{index}"}
        found.append({"image": MetaTensor(image, affine), "label": MetaTensor(label, affine, meta)})
    return found


class TestRiskMapd:
    def test_is_the_map_of_the_case(self) -> None:
        network, data = source(), cases()
        statistics = transfer_statistics(data, network, 3)
        added = RiskMapd(source=network, statistics=statistics, base=5.0)(data[0])
        with torch.no_grad():
            expected = riskmap_ext.risk_map(
                network(data[0]["image"].as_tensor()[None]),
                data[0]["label"].as_tensor()[None],
                statistics.conditional,
                range=statistics.hardness_range,
                base=5.0,
            )
        assert isinstance(added["risk"], MetaTensor)
        assert added["risk"].dtype == torch.float32
        assert torch.equal(added["risk"].as_tensor(), expected)
        assert torch.equal(added["risk"].affine, data[0]["label"].affine)
        assert added["risk"].meta["filename_or_obj"] == "case0"
        assert "risk" not in data[0]

    def test_statistics_are_those_of_the_set(self) -> None:
        network, data = source(), cases()
        found = transfer_statistics(data, network, 3)
        expected = riskmap_ext.TransferStatistics(3)
        image, label = (
            torch.stack([case[key].as_tensor() for case in data]) for key in ("image", "label")
        )
        with torch.no_grad():
            expected.update(network(image), label)
            expected.update_range(network(image), label)
        torch.testing.assert_close(found.joint, expected.joint, rtol=1e-6, atol=1e-6)
        assert found.score == pytest.approx(expected.score, rel=1e-6)

    def test_travels_with_the_label(self) -> None:
        network, data = source(), cases()
        statistics = transfer_statistics(data, network, 3)
        keys = ["image", "label", "risk"]
        add = RiskMapd(source=network, statistics=statistics)
        move = Compose(
            [
                RandFlipd(keys, prob=1.0, spatial_axis=1),
                SpatialCropd(keys, roi_start=(2, 1, 0), roi_end=(9, 8, 7)),
            ]
        )
        found = move(add(data[1]))["risk"]
        assert torch.equal(
            found.as_tensor(), add(data[1])["risk"].as_tensor().flip(2)[:, 2:9, 1:8, 0:7]
        )

    def test_sliding_window(self) -> None:
        network, data = torch.nn.Conv3d(1, 4, 1), cases()
        inferer = SlidingWindowInferer((6, 6, 6), mode="constant")
        whole = transfer_statistics(data, network, 3)
        tiled = transfer_statistics(data, network, 3, inferer=inferer)
        torch.testing.assert_close(tiled.joint, whole.joint, rtol=1e-5, atol=1e-5)

    def test_cache(self, tmp_path: Path) -> None:
        calls = 0
        network, data = source(), cases()
        statistics = transfer_statistics(data, network, 3)

        def counted(image: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return network(image)

        def add(**options: Any) -> Tensor:
            keywords: dict[str, Any] = {
                "statistics": statistics,
                "cache_dir": tmp_path,
                "source_key": "a",
            }
            keywords |= options
            return RiskMapd(source=counted, **keywords)(data[0])["risk"].as_tensor()

        first = add()
        (entry,) = tmp_path.iterdir()
        assert torch.equal(add(), first)
        assert calls == 1
        add(base=3.0)  # other options: another map
        assert calls == 2
        entry.write_bytes(entry.read_bytes()[:100])
        assert torch.equal(add(), first)
        assert calls == 3
        assert torch.equal(add(), first)
        assert calls == 3
        assert len(list(tmp_path.iterdir())) == 2

    def test_cache_knows_the_source(self, tmp_path: Path) -> None:
        data, network = cases(), source()
        relu, tanh = (
            torch.nn.Sequential(network, activation)
            for activation in (torch.nn.ReLU(), torch.nn.Tanh())
        )
        statistics = transfer_statistics(data, network, 3)
        adds = {
            each: RiskMapd(source=each, statistics=statistics, cache_dir=tmp_path)
            for each in (network, relu, tanh)
        }
        for number, add in enumerate(adds.values(), start=1):
            add(data[0])
            assert len(list(tmp_path.iterdir())) == number
        bias = network.get_parameter("bias")
        with torch.no_grad():  # and one that has been changed since
            bias.add_(torch.arange(4.0))
        fresh = RiskMapd(source=network, statistics=statistics)(data[0])["risk"]
        assert torch.equal(adds[network](data[0])["risk"], fresh)
        assert len(list(tmp_path.iterdir())) == 4

    def test_source_is_in_eval_mode_for_the_call(self) -> None:
        network = torch.nn.Sequential(source(), torch.nn.BatchNorm3d(4), torch.nn.Dropout(0.5))
        data = cases()
        add = RiskMapd(source=network, statistics=transfer_statistics(data, network, 3))
        first = add(data[0])["risk"]
        network.train()
        assert torch.equal(add(data[0])["risk"], first)
        assert network.training
        assert int(network.get_buffer("1.num_batches_tracked")) == 0

    def test_schemes_without_a_range_need_one_pass(self) -> None:
        network, data = source(), cases()
        statistics = riskmap_ext.TransferStatistics(3)
        with torch.no_grad():
            for case in data:
                image, label = (case[key].as_tensor()[None] for key in ("image", "label"))
                statistics.update(network(image), label)
        for options in ({"range": "image"}, {"scheme": "power"}, {"range": (0.5, 3.0)}):
            risk = RiskMapd(source=network, statistics=statistics, **options)(data[0])["risk"]
            assert risk.isfinite().all()

    def test_arrays(self) -> None:
        network, data = source(), cases()
        add = RiskMapd(source=network, statistics=transfer_statistics(data, network, 3))
        image, label = (data[0][key].numpy() for key in ("image", "label"))
        flipped = {"image": image.astype("float64")[:, ::-1], "label": label[:, ::-1]}
        found = add(flipped)["risk"]
        assert type(found).__module__ == "numpy"
        copied = {key: value.copy() for key, value in flipped.items()}
        assert (add(copied)["risk"] == found).all()

    def test_arguments(self) -> None:
        statistics = transfer_statistics(cases(), source(), 3)
        with pytest.raises(ValueError, match="keys: expected those of image and label"):
            RiskMapd("image", source=source(), statistics=statistics)
        with pytest.raises(ValueError, match="range: expected 'dataset'"):
            RiskMapd(source=source(), statistics=statistics, range="volume")
        with pytest.raises(TypeError, match="statistics: expected TransferStatistics"):
            RiskMapd(source=source(), statistics=statistics.conditional)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="source: expected a Module"):
            RiskMapd(source="checkpoint.pt", statistics=statistics)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="unknown option 'schema'; did you mean scheme"):
            RiskMapd(source=source(), statistics=statistics, schema="power")
        with pytest.raises(ValueError, match="scheme: expected"):
            RiskMapd(source=source(), statistics=statistics, scheme="powr")
        with pytest.raises(ValueError, match="range: expected"):
            RiskMapd(source=source(), statistics=statistics, range=(3.0, 1.0))
        with pytest.raises(ValueError, match="source_key: expected a name"):
            RiskMapd(source=lambda x: x, statistics=statistics, cache_dir="maps")
        case = cases()[0]
        with pytest.raises(ValueError, match=r"label: expected labels \[1, \*S\]"):
            RiskMapd(source=source(), statistics=statistics)({**case, "label": case["label"][0]})
        with pytest.raises(TypeError, match=r"logits of the source: expected a torch\.Tensor"):
            RiskMapd(source=lambda x: {"logits": x}, statistics=statistics)(case)
        with pytest.raises(RuntimeError, match="nothing seen yet"):
            RiskMapd(source=source(), statistics=riskmap_ext.TransferStatistics(3))


class TestStatisticsOf:
    def test_a_generator(self) -> None:
        with pytest.raises(ValueError, match="3 cases in the first pass and 0 in the second"):
            transfer_statistics((case for case in cases()), source(), 3)

    def test_nothing(self) -> None:
        with pytest.raises(ValueError, match="data: expected cases, got none"):
            transfer_statistics([], source(), 3)
        ignored = [{**case, "label": torch.full((1, *SHAPE), -100)} for case in cases()]
        with pytest.raises(ValueError, match="data: expected labelled voxels"):
            transfer_statistics(ignored, source(), 3)

    def test_a_random_data_set(self) -> None:
        class Random(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 2

            def __getitem__(self, index: int) -> dict[str, Tensor]:
                valid = torch.rand(1, *SHAPE) > 0.5
                return {"image": torch.rand(1, *SHAPE), "label": torch.where(valid, 1, -100)}

        with pytest.raises(ValueError, match="other labels in the second pass"):
            transfer_statistics(Random(), source(), 3)  # type: ignore[arg-type]

    def test_a_data_set_without_an_end(self) -> None:
        class Endless(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 2

            def __getitem__(self, index: int) -> dict[str, Tensor]:
                assert index < 2
                return cases()[index % 3]

        network = source()
        found = transfer_statistics(Endless(), network, 3)  # type: ignore[arg-type]
        assert torch.equal(found.joint, transfer_statistics(cases()[:2], network, 3).joint)

    def test_a_loader(self) -> None:
        listed: Any = cases()
        loader = torch.utils.data.DataLoader(listed)
        with pytest.raises(TypeError, match=r"data: expected a data set.*DataLoader.*\.dataset"):
            transfer_statistics(loader, source(), 3)

    def test_a_key_that_is_not_there(self) -> None:
        data: list[Any] = cases()
        del data[1]["label"]
        with pytest.raises(ValueError, match=r"keys: expected 'label' .* case 1, got \['image'\]"):
            transfer_statistics(data, source(), 3)
        with pytest.raises(ValueError, match=r"keys: expected 'seg' .*\['image', 'label'\]"):
            transfer_statistics(data, source(), 3, keys=("image", "seg"))
        with pytest.raises(ValueError, match="keys: expected those of image and label"):
            transfer_statistics(data, source(), 3, keys="image")
        add = RiskMapd(source=source(), statistics=transfer_statistics(cases(), source(), 3))
        with pytest.raises(ValueError, match=r"keys: expected 'label' .* the case"):
            add(data[1])

    def test_a_case_that_is_not_loaded(self) -> None:
        data: list[Any] = [*cases(), {"image": "scan.nii.gz", "label": "label.nii.gz"}]
        with pytest.raises(TypeError, match=r"image: expected an array .* case 3, got str"):
            transfer_statistics(data, source(), 3)
        with pytest.raises(TypeError, match="expected case 0 to be a dictionary, got list"):
            transfer_statistics([cases()], source(), 3)  # type: ignore[list-item]

    def test_labels_that_are_none(self) -> None:
        data = cases()
        data[2]["label"][0, 1, 2, 3] = 7
        with pytest.raises(ValueError, match=r"data: case 2 \(case2\): .*target.* 7 "):
            transfer_statistics(data, source(), 3)
        data[2]["label"] = data[2]["label"][:, 1:].numpy()  # without a file
        with pytest.raises(ValueError, match="data: case 2: target: expected shape"):
            transfer_statistics(data, source(), 3)
        data[2] = cases()[2]
        data[1]["image"][0, 1, 2, 3] = torch.nan
        with pytest.raises(ValueError, match=r"data: case 1 \(case1\): source: expected finite"):
            transfer_statistics(data, source(), 3)

    @pytest.mark.parametrize("endless", [False, True], ids=["of_known_length", "stream"])
    def test_progress_in_lines(self, endless: bool, capsys: pytest.CaptureFixture[str]) -> None:
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self) -> Any:
                return iter(cases(23))

        data: Any = Stream() if endless else cases(23)
        transfer_statistics(data, source(), 3)
        assert capsys.readouterr().err == ""
        transfer_statistics(data, source(), 3, progress=True)
        printed = capsys.readouterr().err.splitlines()
        counts = (10, 20) if endless else (*range(3, 22, 3), 23)
        whole = "" if endless else " of 23"
        assert printed == [
            f"LEEP statistics, pass {step} of 2: {count}{whole} cases"
            for step in (1, 2)
            for count in counts
        ]

    @pytest.mark.parametrize("installed", [True, False])
    def test_progress_on_a_terminal(
        self,
        installed: bool,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if installed:
            pytest.importorskip("tqdm", reason="tqdm is not installed")
        else:
            monkeypatch.setitem(sys.modules, "tqdm", None)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        found = transfer_statistics(cases(), source(), 3, progress=True)
        printed = capsys.readouterr().err
        assert ("3/3" in printed) == installed
        assert ("3 of 3 cases" in printed) != installed
        assert torch.equal(found.joint, transfer_statistics(cases(), source(), 3).joint)

    def test_a_sigmoid_of_one_channel(self) -> None:
        network, data = torch.nn.Conv3d(1, 1, 1), cases()
        with pytest.raises(ValueError, match=r"source: gives one channel .* regions=\[\[0, 1\]\]"):
            transfer_statistics(data, network, 3)
        statistics = transfer_statistics(data, network, 3, regions=torch.tensor([[0, 1]]))
        assert statistics.joint.shape == (3, 2)
        assert RiskMapd(source=network, statistics=statistics)(data[0])["risk"].isfinite().all()


def test_prepare_batch() -> None:
    batch = {
        "image": torch.rand(2, 1, 4),
        "label": torch.ones(2, 1, 4),
        "risk": torch.rand(2, 1, 4),
    }
    image, target = PrepareBatchRiskMap()(batch, "cpu")
    assert image is batch["image"]
    assert target.keys() == {"label", "risk"}
    assert torch.equal(target["risk"], batch["risk"])
    assert PrepareBatchRiskMap("map")(batch, "cpu")[1].keys() == {"label"}


def test_in_a_bundle() -> None:
    """The configuration of docs/howto/monai.md."""
    text = (Path(__file__).parents[1] / "docs" / "howto" / "monai.md").read_text(encoding="utf-8")
    config = json.loads(text.split("```json\n")[1].split("```")[0])
    network = source()
    config |= {"output_dir": "out", "source_network": network, "plain_dataset": cases()}
    parser = ConfigParser(config)
    loss = parser.get_parsed_content("loss")
    assert isinstance(loss, RiskMapDiceCELoss)
    assert isinstance(parser.get_parsed_content("prepare_batch"), PrepareBatchRiskMap)
    assert parser.get_parsed_content("risk").cache_dir == Path("out/riskmaps")
