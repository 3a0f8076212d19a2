"""The `riskmap` command: what it runs, and how it tells its user what is wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import configuration, settings, write_cases, write_config

import riskmap_ext
from riskmap_ext.finetune import cli, finetune

CLASSES = "background,box,crate"


def test_finetune_with_overrides(riskmap, config, tmp_path):
    output = tmp_path / "else"
    code, out, err = riskmap("finetune", config, "train.steps=1", f"output={output}")
    assert (code, err) == (0, "")
    assert "step 1/1" in out
    assert "mean Dice" in out
    assert f"Report: {output / 'report.html'}" in out
    assert f"  riskmap predict {output / 'last.pt'} --image IMAGES --output FOLDER" in out
    assert (output / "last.pt").is_file()
    assert not (tmp_path / "out").exists()
    code, out, _ = riskmap("finetune", config, f"output={output}", "overwrite=true", "--quiet")
    assert (code, out) == (0, "")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.stepz=1", "train.stepz: unknown key; did you mean steps"),
        ("tain.steps=10", "command line: tain: unknown key; did you mean train"),
        ("lr=1", "command line: lr: unknown key; did you mean train.lr?"),
        ("data.train=9", "data.train: asks for 9 cases"),
        ("data.root=/nowhere", "/nowhere: no such folder"),
        ("source.checkpoint=/none.pt", "/none.pt: no such checkpoint"),
    ],
)
def test_input_errors_are_one_message(riskmap, config, tmp_path, override, told):
    code, out, err = riskmap("finetune", config, override)
    assert code == 2
    assert told in err
    assert err.startswith("riskmap: error: ")
    assert "Traceback" not in err + out
    assert not (tmp_path / "out").exists()


def test_map_of_folders(riskmap, root, source, tmp_path):
    output = tmp_path / "maps"
    code, out, err = riskmap(
        "map",
        *("--source", source, "--image", root / "images", "--label", root / "labels"),
        *("--output", output, "--classes", CLASSES),
    )
    assert (code, err) == (0, "")
    assert "LEEP score" in out
    for name in ("case00", "case01", "case02"):
        for kind in ("risk", "transferability"):
            written = nib.load(output / "maps" / f"{name}_{kind}.nii.gz")
            assert written.get_data_dtype() == np.float32
        assert (output / "overlays" / f"{name}.png").stat().st_size > 5000
    assert nib.load(output / "maps" / "case00_transferability.nii.gz").get_fdata().max() <= 0
    assert not (output / "last.pt").exists()


def test_map_of_files_with_further_keys(riskmap, root, source, tmp_path):
    files = [root / kind / f"case0{i}.nii.gz" for i in (2, 0) for kind in ("images", "labels")]
    pairs = [o for i, f in zip(("--image", "--label") * 2, files, strict=True) for o in (i, f)]
    arguments = ("map", "--source", source, *pairs, "--output", tmp_path / "maps")
    code, out, err = riskmap(
        *arguments, "--classes", "background,thing", "data.label_map={1: 1, 2: 1}"
    )
    assert (code, err) == (0, "")
    assert "LEEP score" in out
    names = {p.name for p in (tmp_path / "maps" / "maps").iterdir()}
    assert names == {f"case0{i}_{k}.nii.gz" for i in (0, 2) for k in ("risk", "transferability")}
    code, _, err = riskmap(*arguments, "--classes", CLASSES)
    assert code == 2
    assert "already holds a run" in err


def test_map_errors(riskmap, root, source, tmp_path):
    image, label = root / "images" / "case00.nii.gz", root / "labels" / "case00.nii.gz"
    base = ("map", "--source", source, "--image", image, "--output", tmp_path / "maps")
    code, _, err = riskmap(*base, "--label", label)
    assert code == 2
    assert "--classes: missing" in err
    code, _, err = riskmap(*base, "--label", label, "--label", label, "--classes", CLASSES)
    assert code == 2
    assert "expected as many of each, got 1 and 2" in err
    code, _, err = riskmap(*base, "--label", tmp_path / "none.nii.gz", "--classes", CLASSES)
    assert code == 2
    assert "none.nii.gz: no such file" in err
    assert not (tmp_path / "maps").exists()


def test_folders_that_are_not_there(riskmap, root, source, tmp_path):
    none, there = tmp_path / "none", root / "labels"
    for command, keys in {
        ("evaluate", "--prediction", there, "--reference", none): ["--reference"],
        ("evaluate", "--prediction", none, "--reference", none): ["--prediction", "--reference"],
        ("map", "--source", source, "--image", none, "--label", none, "--output", "x"): [
            *("--image", "--label")
        ],
        ("predict", source, "--image", there, "--image", none, "--output", "x"): ["--image"],
    }.items():
        code, _, err = riskmap(*command)
        assert code == 2
        lines = [f"{key}: {none}: no such file or folder" for key in keys]
        assert err == f"riskmap: error: {chr(10).join(lines)}\n"


def test_map_of_files_that_share_a_name(riskmap, root, source, tmp_path):
    pairs = []
    for subject, case in (("a", "case00"), ("b", "case01")):
        for kind, option in (("images", "--image"), ("labels", "--label")):
            path = tmp_path / subject / "mri" / f"{option[2:]}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((root / kind / f"{case}.nii.gz").read_bytes())
            pairs += [option, path]
    arguments = ("map", "--source", source, "--classes", CLASSES, "--output", tmp_path / "maps")
    code, _, err = riskmap(*arguments, *pairs)
    assert (code, err) == (0, "")
    names = {p.name for p in (tmp_path / "maps" / "overlays").iterdir()}
    assert names == {"a_mri_image.png", "b_mri_image.png"}
    code, _, err = riskmap(*arguments, *pairs[:4], *pairs[:4], "overwrite=true")
    assert code == 2
    assert f"more than one case is named image ({pairs[1]}, {pairs[1]})" in err


@pytest.mark.parametrize("classes", ["b,,p", "b,p,", "b,p,p"])
def test_class_names_of_map(riskmap, root, source, tmp_path, classes):
    code, _, err = riskmap(
        *("map", "--source", source, "--image", root / "images", "--label", root / "labels"),
        *("--output", tmp_path / "maps", "--classes", classes),
    )
    assert code == 2
    assert "expected a name for each class" in err or "expected distinct names, got p" in err
    assert "classes" in err


def test_names_with_brackets_are_shown_as_they_are(riskmap, tmp_path):
    data, output = tmp_path / "data[/red]", tmp_path / "out[/x]"
    write_cases(data, 3)
    classes = ["background", "[/b]", "[red]<i>"]
    source = finetune(configuration(data, tmp_path / "source[/s]"), progress=False).checkpoint
    content = settings(data, output, data={"classes": classes}, source={"checkpoint": str(source)})
    config = write_config(tmp_path / "run.yaml", content)
    labels = str(data / "labels")
    evaluate = ["evaluate", "--prediction", labels, "--reference", labels]
    for command in (
        ["finetune", str(config), "--dry-run"],
        ["finetune", str(config)],
        ["rank", str(config), "--source", str(source)],
        [*evaluate, "--structure", "[/b]=1", "--structure", "[red]<i>=2"],
    ):
        code, out, err = riskmap(*command)
        assert (code, err) == (0, "")
        if command[0] != "rank":
            assert all(name in out for name in classes[1:])


def test_what_is_one_process_is_no_work_for_torchrun(riskmap, monkeypatch, source, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = tmp_path / "out"
    for command in (
        ["predict", source, "--image", tmp_path, "--output", output],
        ["map", "--source", source, "--image", tmp_path, "--label", tmp_path, "--output", output],
        ["evaluate", "--prediction", tmp_path, "--reference", tmp_path],
        ["report", source.parent],
        ["rank", tmp_path / "run.yaml", "--source", source],
    ):
        code, _, err = riskmap(*command)
        assert code == 2
        assert f"torchrun: riskmap {command[0]} is one process" in err
    assert not output.exists()


def test_folders_where_files_are_expected(riskmap, root, source, tmp_path):
    image, label = root / "images" / "case00.nii.gz", root / "labels" / "case00.nii.gz"
    folder = tmp_path / "x.nii.gz"
    folder.mkdir()
    for given in ((image, root / "labels"), (folder, label)):
        paths = ("--image", given[0], "--label", given[1], "--classes", CLASSES)
        code, _, err = riskmap("map", "--source", source, *paths, "--output", tmp_path / "maps")
        assert code == 2
        assert f"{next(p for p in given if p.is_dir())}: is a folder; expected" in err
        assert "no such" not in err
    pair = ("--image", image, "--label", label, "--classes", CLASSES)
    code, _, err = riskmap("map", "--source", root, *pair, "--output", tmp_path / "maps")
    assert code == 2
    assert f"{root}: is a folder; expected a checkpoint file" in err


def test_warnings_of_libraries_show_no_source_lines(riskmap, monkeypatch):
    monkeypatch.setattr("riskmap_ext.info.report", lambda: str(warnings.warn("odd", stacklevel=1)))
    code, _, err = riskmap("info")
    assert (code, err) == (0, "riskmap: warning: odd\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run(riskmap, config, tmp_path, monkeypatch, number, code):
    from riskmap_ext.finetune.train.step import Stepper

    plain, calls = Stepper.__call__, []

    def stopped_in_the_third(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            signal.raise_signal(number)
        return plain(self, batch)

    monkeypatch.setattr(Stepper, "__call__", stopped_in_the_third)
    output = tmp_path / "out"
    before = signal.getsignal(signal.SIGTERM)
    ended, _, err = riskmap("finetune", config, "train.steps=9")
    told = f"stopped at step 3; {output} holds an unfinished run (--resume goes on with it)"
    assert (ended, err) == (code, f"riskmap: {told}\n")
    assert told in (output / "log.txt").read_text()
    assert signal.getsignal(signal.SIGTERM) is before
    ended, _, err = riskmap("finetune", config, "train.steps=9")
    assert ended == 2
    assert "holds an unfinished run" in err
    assert "overwrite=true" in err
    ended, _, err = riskmap("finetune", config, "overwrite=true", "train.steps=1")
    assert (ended, err) == (0, "")
    assert "already holds a run" in riskmap("finetune", config)[2]


def test_info(riskmap):
    code, out, _ = riskmap("info")
    assert code == 0
    assert riskmap_ext.__version__ in out
    assert torch.__version__ in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "risk-weighted fine-tuning"),
        (["finetune", "-h"], "--resume"),
        (["--version"], f"riskmap_ext {riskmap_ext.__version__}"),
        (["info"], f"torch found          {torch.__version__}"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_torch_is_imported_when_a_command_runs(arguments, told, tmp_path):
    code = (
        f"import sys, riskmap_ext_command\nsys.argv = ['riskmap', *{arguments}]\n"
        "try: riskmap_ext_command.main()\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert told in ran.stdout
    assert ran.stdout.endswith(f"{arguments == ['info']} 0\n"), ran.stderr


def test_demo_gets_its_options(riskmap, monkeypatch, tmp_path):
    from riskmap_ext.demo import run as demo

    seen = {}
    monkeypatch.setattr(demo, "run", lambda **options: seen.update(options))
    code, _, _ = riskmap("demo", "--output", tmp_path, "--seeds", 2, "--steps", 5, "--workers", 1)
    assert code == 0
    assert seen == {"output": tmp_path, "seeds": 2, "steps": 5, "workers": 1}


def test_usage_errors(riskmap):
    code, _, err = riskmap("finetune")
    assert code == 2
    assert "CONFIG" in err
    code, _, _ = riskmap("no-such-command")
    assert code == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "of Python"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "memory: 8 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "CUDA out of memory"),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
        (RuntimeError("could not create a primitive"), "could not create a primitive"),
    ],
    ids=["python", "torch", "cuda", "c++", "onednn"],
)
def test_too_little_memory_is_told(riskmap, monkeypatch, error, told):
    def fail():
        raise error

    monkeypatch.setattr("riskmap_ext.info.report", fail)
    code, _, err = riskmap("info")
    assert code == 2
    assert err.startswith("riskmap: error: not enough memory (")
    assert told in err


def test_faults_of_the_program_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["riskmap", "info"])
    monkeypatch.setattr("riskmap_ext.info.report", lambda: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        cli.main()


@pytest.mark.parametrize("missing", ["typer", "monai", "pydantic"])
def test_a_missing_extra_is_told(missing, tmp_path):
    """As in an environment without the extra: the import of one package fails."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "sys.argv = ['riskmap', 'finetune', 'none.yaml']\n"
        "from riskmap_ext.finetune.__main__ import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2
    assert f"{missing}" in ran.stderr
    assert "riskmap_ext[finetune]" in ran.stderr
    assert "Traceback" not in ran.stderr
