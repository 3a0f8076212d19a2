"""A short form of `make fuzz-files`, and the spoilt files that it found a fault with."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")

import malformed
import numpy as np
import source_data
import torch
from finetune_data import (
    MERGED,
    configuration,
    image_of,
    phantom,
    problem,
    rows_of,
    save,
    settings,
    stop_at,
    write_cases,
    write_config,
)
from malformed_place import Place

from riskmap_ext.finetune import ConfigError, InputError, finetune, load_config, parse_config
from riskmap_ext.finetune.data.labels import read_label_map
from riskmap_ext.finetune.report.read import read_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("malformed") / "work")


def test_spoilt_files(place: Place) -> None:
    failures: list[str] = []
    counts = malformed.run(iter(range(40)), place, time.monotonic() + 600, failures.append)
    assert failures == []
    assert counts["last"] == 39


def test_a_failure_is_reported_with_its_number(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> malformed.Answer:
        return malformed.Answer(2, "", "riskmap: error: a file\n")

    monkeypatch.setattr(malformed, "riskmap", broken)
    failures: list[str] = []
    malformed.run(iter([3]), place, time.monotonic() + 600, failures.append)
    assert failures[0].startswith("3: ")
    assert "does not name" in failures[0]


# What is waited for, or is far more than it looks.


@pytest.fixture
def mine(root: Path, tmp_path: Path) -> Path:
    """The data set, to be spoilt."""
    shutil.copytree(root, tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def stopped(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that --resume goes on with."""
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(configuration(mine, tmp_path / "out"), progress=False)
    write_config(tmp_path / "run.yaml", settings(mine, tmp_path / "out"))
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["run.yaml", "splits.json", "labels.csv", "mine/dataset.json"])
def test_a_pipe_is_not_waited_for(
    riskmap: Callable, mine: Path, config: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    config = tmp_path / "run.yaml" if name == "run.yaml" else config
    reads: dict[str, list[object]] = {
        "splits.json": ["--folds", path],
        "labels.csv": [f"data.label_map={path}", "data.classes=null"],
    }
    more = reads.get(name, [])
    code, _, err = riskmap("finetune", config, "--dry-run", f"data.root={mine}", *more)
    assert code == 2
    assert f"{path}: is a pipe or a device; expected a file" in err


@pytest.mark.parametrize("name", ["resume.pt", "log.txt"])
def test_a_pipe_in_a_run(riskmap: Callable, stopped: Path, name: str) -> None:
    (stopped / name).unlink()
    os.mkfifo(stopped / name)
    code, _, err = riskmap("finetune", stopped.parent / "run.yaml", "--resume")
    assert code == 2
    assert str(stopped / name) in err


def test_a_lock_that_is_a_folder(riskmap: Callable, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".lock").mkdir(parents=True)
    code, _, err = riskmap("finetune", config)
    assert code == 2
    assert ".lock cannot be written" in err


def test_a_link_to_nothing_is_not_overlooked(mine: Path) -> None:
    (mine / "dataset.json").symlink_to("nowhere.json")
    assert "dataset.json: no such file" in problem(mine)


@pytest.mark.parametrize("name", ["splits_final.json", "last.pt"])
def test_a_run_that_links_to_nothing(riskmap: Callable, stopped: Path, name: str) -> None:
    (stopped / name).unlink(missing_ok=True)
    (stopped / name).symlink_to("nowhere")
    images = stopped.parent / "mine" / "images"
    code, _, err = riskmap("predict", stopped, "--image", images, "--output", stopped / "masks")
    assert code == 2
    assert f"{stopped / name}: no such " in err


def laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty; expected keys with values"),
        (laughs(), "expected at most 200,000 values, with those of aliases"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("data: " + "{a: " * 150 + "1" + "}" * 150, "100 deep"),
        ('output: "a\\0b"', "expected a path, got 'a\\x00b'"),
        ('output: "a\\ud800b"', "expected a path, got 'a\\ud800b'"),
        (f"output: [{'y' * 5000}]", "yyy..."),
    ],
)
def test_configurations(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 300 + "1" + "}" * 300])
def test_json_without_end(mine: Path, text: str) -> None:
    (mine / "dataset.json").write_text(text)
    assert f"{mine / 'dataset.json'}: cannot be read as JSON" in problem(mine)


@pytest.mark.parametrize(
    "text", ["value,name\n1,x" + "x" * 200_000, "value,name\n" + "9" * 5000 + ",a"]
)
def test_label_tables(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=r"labels\.csv: ") as caught:
        read_label_map(tmp_path / "labels.csv")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("labels", [3, {"0": "background", "9" * 5000: "a"}])
def test_labels_that_are_none_name_their_file(mine: Path, labels: Any) -> None:
    (mine / "dataset.json").write_text(
        json.dumps(source_data.nnunet_dataset() | {"labels": labels})
    )
    told = problem(mine)
    assert f"{mine / 'dataset.json'}: labels: expected number: name, got " in told
    assert len(told) < 1000


# Images.


@pytest.mark.parametrize("sizes", [(1000, 1000, 900), (3000, 40, 40)])
def test_a_header_of_more_than_the_file_can_have(mine: Path, sizes: tuple[int, ...]) -> None:
    content = bytearray(gzip.decompress(image_of(mine).read_bytes()))
    struct.pack_into("<3h", content, 42, *sizes)
    path = image_of(mine)
    if sizes[0] == 1000:
        path.write_bytes(gzip.compress(bytes(content)))
    else:
        path.unlink()
        path = path.with_suffix("")
        path.write_bytes(content)
    told = problem(mine, classes=["background", "box", "crate"])
    assert str(path) in told
    assert "more than the file can have" in told or "of memory is available" in told


@pytest.mark.parametrize("second", [(0.0, 1e30, 0.0), (1e17, 1.0, 0.0)], ids=["huge", "parallel"])
def test_an_affine_beyond_numbers(mine: Path, second: tuple[float, ...]) -> None:
    affine = np.eye(4)
    affine[:3, :2] = np.transpose([(second[0] or second[1], 0.0, 0.0), second])
    image = image_of(mine)
    for path in (image, mine / "labels" / image.name):
        save(path, phantom(0)[0], affine)
    assert "the header's affine cannot be inverted" in problem(mine)


@pytest.mark.parametrize("name", ["../../up", "a\0b", "x" * 300, "\ud800"])
def test_names_of_cases_stay_in_the_output_folder(mine: Path, name: str) -> None:
    entry = {"images": ["images/case00.nii.gz"], "label": "labels/case00.nii.gz"}
    content = {**source_data.nnunet_dataset(), "dataset": {name: entry, "b": entry}}
    (mine / "dataset.json").write_text(json.dumps(content).replace("\\ud800", "\\udcff"))
    told = problem(mine, train=1, validation=1)
    assert "the case's name" in told or "cannot be read as JSON" in told


def test_file_names_that_are_not_utf8(riskmap: Callable, mine: Path, config: Path) -> None:
    for folder in ("images", "labels"):
        (mine / folder / "case00.nii.gz").rename(mine / folder / "\udcff.nii.gz")
    code, _, err = riskmap("finetune", config, f"data.root={mine}")
    assert code == 2
    assert "expected a name in UTF-8; rename the file" in err


def test_names_do_not_act_on_the_terminal(riskmap: Callable, tmp_path: Path) -> None:
    code, _, err = riskmap("finetune", tmp_path / "\x1b[31m\u202e.yaml")
    assert code == 2
    assert "\\x1b[31m\\u202e.yaml: no such file" in err


# What a run reads again of its own.


@pytest.mark.parametrize(
    "change",
    [
        {"step": "one"},
        {"seconds": float("nan")},
        {"metrics": [{"step": 1.0}]},
        {"losses": {"rows": [[1]], "sum": 3, "count": 0}},
        {"network": {}},
        {"sampler": {"rng": 1}},
        {"rng": None},
        {"stepper": {}},
        {"stepper": {"optimizer": {"param_groups": [{}], "state": {}}}},
    ],
)
def test_a_state_that_does_not_fit(
    riskmap: Callable, stopped: Path, change: dict[str, Any]
) -> None:
    path = stopped / "resume.pt"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    code, _, err = riskmap("finetune", stopped.parent / "run.yaml", "--resume")
    assert code == 2
    assert f"{path} is damaged (" in err
    assert "overwrite=true without --resume starts anew" in err


@pytest.mark.parametrize("spoil", ["flipped", "another"])
def test_the_cache_of_volumes_is_checked(
    root: Path, source: Path, tmp_path: Path, spoil: str
) -> None:
    sections = {"data": {"storage": "disk", **MERGED}, "source": {"checkpoint": str(source)}}
    content = settings(root, tmp_path / "a", cache=str(tmp_path / "cache"), **sections)
    first = finetune(parse_config(content), progress=False)
    for path in (tmp_path / "cache").rglob("*.pt"):
        if spoil == "another":
            torch.save({"transferability": 3, "a": torch.zeros(3)}, path)
            continue
        data = bytearray(path.read_bytes())
        for at in range(len(data) // 3, len(data) // 2, 50):
            data[at] ^= 0xFF
        path.write_bytes(data)
    again = finetune(parse_config({**content, "output": str(tmp_path / "b")}), progress=False)
    assert again.leep == first.leep
    assert again.cases == first.cases
    assert rows_of(tmp_path / "a" / "losses.csv") == rows_of(tmp_path / "b" / "losses.csv")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.csv", "step,train_loss,mean_dice,lr,seconds\ninf,1,1,1,1\n"),
        ("metrics.csv", "step,train_loss,mean_dice,lr,seconds\nnan,1,1,1,1\n"),
        ("losses.csv", "step,loss,lr\n1," + "1" * 200_000 + ",1\n"),
        ("config.yaml", "[" * 5000),
        ("config.yaml", laughs()),
    ],
)
def test_files_of_a_report(stopped: Path, name: str, text: str) -> None:
    (stopped / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: is damaged"):
        read_run(stopped)


def test_a_duration_beyond_numbers(riskmap: Callable, stopped: Path) -> None:
    (stopped / "environment.json").write_text('{"starts": [{"seconds": 1e300}]}')
    code, _, err = riskmap("report", stopped)
    assert (code, err) == (0, "")


def test_odd_names_in_results(riskmap: Callable, tmp_path: Path) -> None:
    """Of classes and cases: tables have them as they are, and the page as text."""
    from html_page import Page

    case, classes = "[bold]a,b;'\"<i>{0}%s", ["<script>alert(1)</script>", "[/]\n\u2028=1,2"]
    write_cases(tmp_path / "data", 3)
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder / "case02.nii.gz").rename(
            tmp_path / "data" / folder / f"{case}.nii.gz"
        )
    data = {"classes": ["background", *classes], "train": ["case00", "case01"], "validation": 1}
    config = write_config(
        tmp_path / "run.yaml", settings(tmp_path / "data", tmp_path / "out", data=data)
    )
    code, _, err = riskmap("finetune", config)
    assert (code, err) == (0, "")
    with (tmp_path / "out" / "dice.csv").open(newline="", encoding="utf-8") as file:
        rows = [*csv.reader(file)]
    assert rows[0] == ["case", *classes, "mean"]
    assert rows[1][0] == case
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert classes[0] in page.text
    assert case in page.text
