"""What a whole run refuses or warns of, and what that leaves on disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import NETWORK_2D, configuration, phantom, save, write_cases

from riskmap_ext.finetune import ConfigError, DataError, InputError, finetune, make_maps
from riskmap_ext.finetune.base.device import device_of
from riskmap_ext.finetune.base.lock import check_free, locked
from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.folder.workspace import claimed_output

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_source_with_other_preprocessing_is_told(root, source, tmp_path):
    config = configuration(
        root,
        tmp_path / "out",
        data={"spacing": [2, 2, 2]},
        source={"checkpoint": str(source)},
        train={"steps": 1},
    )
    finetune(config, progress=False)
    log = (config.output / "log.txt").read_text()
    assert "Warning: the source was trained with data.spacing=None" in log
    stamps = [re.findall(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in log.splitlines()]
    assert all(len(found) <= 1 for found in stamps)  # a table has lines without


def test_a_source_that_tells_nothing_is_told(root, source, tmp_path):
    content = torch.load(source, weights_only=True)
    for value in content["state_dict"].values():
        value.zero_()
    torch.save(content, tmp_path / "blank.pt")
    config = configuration(
        root, tmp_path / "out", source={"checkpoint": str(tmp_path / "blank.pt")}
    )
    result = finetune(config, progress=False)
    assert result.remark is not None
    assert "tells nothing" in result.remark
    assert "tells nothing" in (config.output / "log.txt").read_text()


def test_a_run_is_not_replaced_unasked(root, tmp_path):
    config = configuration(root, tmp_path / "out")
    finetune(config, progress=False)
    before = (config.output / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run .*overwrite=true"):
        finetune(config, progress=False)
    assert (config.output / "last.pt").read_bytes() == before
    (config.output / "notes.md").write_text("mine")
    (config.output / "predictions" / "old.nii.gz").write_text("x")
    finetune(config.model_copy(update={"overwrite": True, "seed": 3}), progress=False)
    assert (config.output / "notes.md").read_text() == "mine"
    assert not (config.output / "predictions" / "old.nii.gz").exists()
    assert (config.output / "last.pt").read_bytes() != before


def test_the_source_is_not_overwritten(root, source, tmp_path):
    config = configuration(root, source.parent, source={"checkpoint": str(source)}, overwrite=True)
    with pytest.raises(ConfigError, match="would be replaced"):
        finetune(config, progress=False)
    assert source.is_file()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"patch_size": [15, 15]}}, "train.patch_size: UNet turns a patch of [15, 15]"),
        ({"train": {"patch_size": [8, 8, 8]}}, "train.patch_size: expected 1 or 2 sizes"),
        ({"inference": {"patch_size": [8, 8, 8]}}, "inference.patch_size"),
        ({"loss": {"class_weights": [1, 2]}}, "loss.class_weights: expected 3"),
        ({"train": {"augment": {"flip": ["axial"]}}}, "slice axis"),
        ({"train": {"amp": "fp16"}}, "train.amp: fp16 needs a CUDA device"),
        (
            {"network": {"name": "UNet", "args": {**NETWORK_2D["args"], "out_channels": 7}}},
            "network.args.out_channels: expected 3 (the number of classes or regions), got 7",
        ),
        (
            {"network": {"name": "UNet", "args": {**NETWORK_2D["args"], "in_channels": 2}}},
            "network.args.in_channels: expected 1 (the number of image channels), got 2",
        ),
        (
            {"network": {"name": "UNet", "args": {**NETWORK_2D["args"], "spatial_dims": "2"}}},
            "network.args.spatial_dims: expected 2 (slices) or 3 (volumes), got '2'",
        ),
        ({"device": "cuda:7"}, "device: cuda:7"),
        ({"source": {"checkpoint": "/none.pt"}}, "/none.pt"),
        ({"network": {**NETWORK_2D, "name": "UNett"}}, "network.name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_leave_nothing_behind(root, tmp_path, sections, told):
    with pytest.raises(InputError) as caught:
        finetune(configuration(root, tmp_path / "out", **sections), progress=False)
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_files_leave_nothing_behind(tmp_path):
    write_cases(tmp_path / "data", 3)
    image = phantom(0)[0]
    image[0, 0, 0] = np.nan
    path = save(tmp_path / "data" / "images" / "case01.nii.gz", image)
    with pytest.raises(DataError, match="NaN") as caught:
        finetune(configuration(tmp_path / "data", tmp_path / "out"), progress=False)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_explodes_is_told(root, tmp_path):
    train = {"steps": 30, "lr": 1e30, "optimizer": "SGD", "grad_clip": None}
    with pytest.raises(InputError, match=r"not finite .*lower train\.lr"):
        finetune(configuration(root, tmp_path / "out", train=train), progress=False)


def poisoned(source: Path, path: Path, value: float) -> Path:
    """The source with one weight set to `value`."""
    content = torch.load(source, weights_only=True)
    next(iter(content["state_dict"].values())).view(-1)[0] = value
    torch.save(content, path)
    return path


@pytest.mark.parametrize("work", [finetune, make_maps])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_source_with_weights_that_are_no_numbers(root, source, tmp_path, work, value):
    path = poisoned(source, tmp_path / "bad.pt", value)
    config = configuration(root, tmp_path / "out", source={"checkpoint": str(path)})
    with pytest.raises(InputError, match="NaN or infinite weights in 1 of") as caught:
        work(config, progress=False)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("work", [finetune, make_maps])
def test_logits_that_are_no_numbers(root, source, tmp_path, monkeypatch, work):
    """Finite weights of such a size that their sums are not."""
    content = torch.load(source, weights_only=True)
    for value in content["state_dict"].values():
        if value.is_floating_point() and value.dim() > 1:
            value.fill_(3e38)
    torch.save(content, tmp_path / "large.pt")
    config = configuration(
        root, tmp_path / "out", source={"checkpoint": str(tmp_path / "large.pt")}
    )
    monkeypatch.setattr("riskmap_ext.finetune.train.finetune.Trainer", None)
    with pytest.raises(InputError, match="logits of case case00 are NaN or infinite") as caught:
        work(config, progress=False)
    assert str(root / "images" / "case00.nii.gz") in str(caught.value)


@pytest.mark.parametrize("key", ["output", "cache"])
@pytest.mark.parametrize("below", ["", "sub"])
def test_a_file_where_a_folder_is_expected(root, source, tmp_path, key, below):
    file = tmp_path / "file"
    file.write_text("mine")
    places = {"output": tmp_path / "out"} | {key: file / below}
    output = places.pop("output")
    given = {k: str(v) for k, v in places.items()} | {"source": {"checkpoint": str(source)}}
    for work in (finetune, make_maps):
        config = configuration(root, output, **given)
        with pytest.raises(ConfigError, match=f"{key}: .*{file} is a file; expected a folder"):
            work(config, progress=False)
    assert file.read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_more_threads_than_can_be_meant(root, tmp_path):
    limit = 4 * (os.cpu_count() or 1)
    config = configuration(root, tmp_path / "out", threads=limit + 1)
    told = rf"threads: expected at most {limit} .* CPUs found\), got {limit + 1}"
    with pytest.raises(ConfigError, match=told):
        finetune(config, progress=False)
    assert not (tmp_path / "out").exists()


def test_channels_that_say_what_the_data_say(root, source, tmp_path):
    args = {**NETWORK_2D["args"], "in_channels": 1, "out_channels": 3}
    config = configuration(root, tmp_path / "out", network={"name": "UNet", "args": args})
    result = finetune(config, progress=False)
    data = {"classes": ["background", "thing"], "label_map": {1: 1, 2: 1}}
    again = configuration(
        root,
        tmp_path / "again",
        data=data,
        network=None,
        source={"checkpoint": str(result.checkpoint)},
    )
    keys = finetune(again, progress=False).keys
    assert keys is not None
    assert keys.reinitialized


def test_volumes_that_a_spacing_makes_smaller_than_the_patch(root, tmp_path):
    config = configuration(
        root, tmp_path / "out", data={"spacing": [4, 4, 2]}, train={"patch_size": 32}
    )
    finetune(config, progress=False)
    log = (config.output / "log.txt").read_text()
    assert "Warning: data.spacing makes 2 of 2 training volumes less than half" in log


def test_a_run_that_ended_early_is_unfinished(root, tmp_path):
    config = configuration(root, tmp_path / "out", data={"validation": 0})
    finetune(config, progress=False)
    with pytest.raises(ConfigError, match="already holds a run"):
        finetune(config, progress=False)
    (config.output / "environment.json").unlink()
    log = config.output / "log.txt"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=r"holds an unfinished run .*overwrite=true"):
        finetune(config, progress=False)


def test_class_names_in_any_script(root, source, tmp_path, recwarn):
    config = configuration(
        root,
        tmp_path / "out",
        data={"classes": ["background", "\u6d77\u99ac", "$\\foo_$"]},
        source={"checkpoint": str(source)},
        write={"overlays": 1},
    )
    make_maps(config, progress=False)
    assert (config.output / "overlays" / "case00.png").stat().st_size > 5000
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_the_automatic_device_is_one_that_runs():
    assert device_of("auto").type in ("cpu", "cuda")


def test_messages_reach_the_handlers_of_a_program(tmp_path, caplog):
    first, second = Log(quiet=True), Log(quiet=True)
    with caplog.at_level("INFO", "riskmap_ext.finetune"):
        first("early")
        for log, name in ((first, "first.txt"), (second, "second.txt")):
            log.open(tmp_path / name)
        first.note("100 %")
        second.warn("late")
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [("INFO", "early"), ("INFO", "100 %"), ("WARNING", "Warning: late")]
    for name, expected in (("first.txt", ["early", "100 %"]), ("second.txt", ["Warning: late"])):
        lines = (tmp_path / name).read_text().splitlines()
        assert [line[20:] for line in lines] == expected


def test_two_runs_in_one_folder(root, tmp_path):
    output = tmp_path / "out"
    held = configuration(root, output)
    with claimed_output(held, Log(quiet=True)):
        for run in (
            lambda: finetune(configuration(root, output, overwrite=True), progress=False),
            lambda: finetune(held, progress=False, resume=True),
        ):
            with pytest.raises(ConfigError, match=rf"in use by a run \(process {os.getpid()} on"):
                run()
    assert finetune(configuration(root, output, overwrite=True), progress=False).history


def test_a_killed_run_leaves_no_lock(root, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from riskmap_ext.finetune.base.lock import locked\n"
        "from pathlib import Path\n"
        "with locked(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    output = tmp_path / "out"
    output.mkdir()
    subprocess.run([sys.executable, "-c", script, str(output)], check=False)
    assert (output / ".lock").exists()
    assert finetune(configuration(root, output), progress=False).history
    assert not (output / ".lock").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        with locked(tmp_path):
            check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_half_written_is_cleared(root, tmp_path):
    config = configuration(root, tmp_path / "out")
    left = [config.output / name for name in (".12-34-resume.pt", "maps/.12-34-a_risk.nii.gz")]
    mine = config.output / ".notes"
    for path in (*left, mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (config.output / "log.txt").write_text("")
    finetune(config, progress=False, resume=True)
    assert not any(path.exists() for path in left)
    assert mine.exists()


def test_a_loss_that_is_not_finite_names_its_cases(root, tmp_path):
    train = {"steps": 40, "lr": 1e30, "grad_clip": None, "optimizer": "SGD", "validate_every": 0}
    config = configuration(root, tmp_path / "out", train=train)
    with pytest.raises(InputError, match="the loss is not finite any more from step"):
        finetune(config, progress=False)
    batch = json.loads((tmp_path / "out" / "nonfinite.json").read_text())
    assert 1 <= batch["step"] <= 25
    assert len(batch["cases"]) == config.train.batch_size
    again = configuration(root, tmp_path / "out", overwrite=True)
    finetune(again, progress=False)
    assert not (tmp_path / "out" / "nonfinite.json").exists()
