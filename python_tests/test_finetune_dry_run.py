"""`riskmap finetune --dry-run`: what it finds, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")

from finetune_data import (
    RAS,
    configuration,
    phantom,
    save,
    settings,
    stop_at,
    write_cases,
    write_config,
)

from riskmap_ext.finetune import CheckpointError, ConfigError, DataError, check_run, finetune
from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.cli import main
from riskmap_ext.finetune.folder.workspace import claimed_output

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cases(tmp_path / "data", 4)
    return tmp_path / "data"


def test_tells_the_plan_and_writes_nothing(root, tmp_path, capsys):
    found = check_run(configuration(root, tmp_path / "out"))
    assert found.train == ["case00", "case01"]
    assert found.validation == ["case02"]
    assert found.read == ["case00", "case01", "case02"]
    labels = np.concatenate([phantom(seed)[1].ravel() for seed in range(2)])
    assert list(found.class_voxels.values()) == np.bincount(labels).tolist()
    assert 2 * found.memory.volumes == (2 * 31 + 15) * labels.size  # the docs' bytes a voxel
    told = capsys.readouterr().out
    for part in (
        "2 (case00, case01)",
        "UNet",
        "unweighted; soft Dice",
        "nothing is in the way",
        "MiB",
    ):
        assert part in told
    assert not (tmp_path / "out").exists()


def test_what_has_no_effect_is_told(root, tmp_path, capsys):
    for seed in range(2):  # the training cases; the validation case has the class
        label = phantom(seed)[1]
        save(root / "labels" / f"case0{seed}.nii.gz", np.where(label == 2, 0, label), RAS)
    given = configuration(root, tmp_path / "out", risk={"scheme": "power"})
    check_run(given)
    warnings = [
        "no voxel of class crate in the 2 training cases",
        "risk.scheme: there is no source, so that no map is made",
    ]
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"Warning: {text}" in told for text in warnings)
    finetune(given, progress=False)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Warning: no voxel of class crate in the training cases" in log
    assert f"Warning: {warnings[1]}" in log


def test_keys_of_the_source(root, tmp_path):
    source = finetune(configuration(root, tmp_path / "source"), progress=False).checkpoint
    config = configuration(root, tmp_path / "out", source={"checkpoint": str(source)})
    found = check_run(config, progress=False)
    assert found.keys is not None
    assert found.keys.loaded
    assert not (tmp_path / "out").exists()
    source.write_bytes(source.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        check_run(config, progress=False)


def test_headers_of_all_cases_are_looked_at(root, tmp_path, monkeypatch):
    monkeypatch.setattr("riskmap_ext.finetune.dry_run._SECONDS", -1.0)
    config = configuration(root, tmp_path / "out")
    assert check_run(config, progress=False).read == []
    image, label = phantom(1)
    save(root / "labels" / "case01.nii.gz", label[:-1])
    save(root / "images" / "case02.nii.gz", image, RAS * 3)
    with pytest.raises(DataError) as error:
        check_run(config, progress=False)
    assert "case01.nii.gz: expected the grid of its image" in str(error.value)
    assert "case02.nii.gz" in str(error.value)
    (root / "labels" / "case00.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"case00\.nii\.gz: cannot be read"):
        check_run(config, progress=False)


def test_a_header_without_axes(root, tmp_path):
    path = root / "labels" / "case00.nii.gz"
    image = nib.load(path)
    header = image.header.copy()
    header["sform_code"], header["qform_code"] = 1, 0
    header["srow_x"] = 0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, header), path)
    with pytest.raises(DataError, match=r"case00\.nii\.gz: the header's affine cannot be inverted"):
        check_run(configuration(root, tmp_path / "out"), progress=False)


def test_labels_are_read(root, tmp_path):
    label = phantom(0)[1]
    label[0, 0, 0] = 9
    path = save(root / "labels" / "case00.nii.gz", label)
    with pytest.raises(DataError, match="label values 9 are not in") as error:
        check_run(configuration(root, tmp_path / "out"), progress=False)
    assert str(path) in str(error.value)


def test_a_batch_that_memory_does_not_hold(root, tmp_path):
    config = configuration(root, tmp_path / "out", train={"batch_size": 10**9})
    with pytest.raises(ConfigError, match=r"train\.batch_size: 1000000000 crops of .* take .*GiB"):
        check_run(config, progress=False)


def test_problems_of_headers_and_of_voxels_are_told_at_once(root, tmp_path):
    label = phantom(0)[1]
    label[0, 0, 0] = 9
    save(root / "labels" / "case00.nii.gz", label)
    save(root / "labels" / "case01.nii.gz", label[..., :-1])
    with pytest.raises(DataError) as error:
        check_run(configuration(root, tmp_path / "out"), progress=False)
    assert "case00.nii.gz: label values 9 are not in" in str(error.value)
    assert str(error.value).count("case01.nii.gz: expected the grid of its image") == 1


def test_a_class_without_voxels_is_told(root, tmp_path, capsys):
    data = {"classes": ["background", "box", "crate", "barrel"]}
    check_run(configuration(root, tmp_path / "out", data=data))
    assert "no voxel of class barrel in the 2 training cases" in capsys.readouterr().out


def test_a_folder_that_is_taken(root, tmp_path):
    config = configuration(root, tmp_path / "out")
    finetune(config, progress=False)
    with pytest.raises(ConfigError, match="already holds a run"):
        check_run(config, progress=False)


def test_all_that_is_in_the_way_is_told_at_once(riskmap, root, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("stopped")
    save(root / "labels" / "case01.nii.gz", phantom(1)[1][:-1])
    save(root / "labels" / "case02.nii.gz", np.full_like(phantom(2)[1], 7))
    for unpaired in ("labels/case03.nii.gz", "images/case04.nii.gz"):
        (root / unpaired).unlink(missing_ok=True)
    content = settings(root, tmp_path / "out", source={"checkpoint": str(tmp_path / "none.pt")})
    path = write_config(tmp_path / "run.yaml", content)
    code, out, err = riskmap("finetune", path, "--dry-run", "data.train=1", "data.validation=2")
    assert code == 2
    assert "1 left out, no label: case03" in out
    for told in (
        "holds an unfinished run",
        "none.pt: no such checkpoint",
        "case01.nii.gz: expected the grid of its image",
        "case02.nii.gz: label values 7 are not in",
    ):
        assert told in err
    code, _, err = riskmap("finetune", path, "data.train=9", f"output={tmp_path / 'new'}")
    assert "data.train: asks for 9 cases, but 3 are left; left out: case03: no label" in err
    assert "none.pt: no such checkpoint" in err  # of the run itself, too
    assert not (tmp_path / "new").exists()


def test_one_line_for_each_kind_of_problem(root, tmp_path):
    write_cases(root, 9)
    for index in range(9):
        save(root / "labels" / f"case0{index}.nii.gz", phantom(index)[1][: -1 - index])
    with pytest.raises(DataError) as error:
        check_run(configuration(root, tmp_path / "out", data={"train": 8}), progress=False)
    assert len(error.value.problems) == 9
    head, line = str(error.value).splitlines()
    assert head == "9 problems in the data:"
    first = root / "labels" / "case00.nii.gz"
    assert line.startswith(f"{first}: expected the grid of its image")
    shown = ", ".join(f"case0{index}.nii.gz" for index in range(1, 5))
    assert line.endswith(f"(and 8 more in {root / 'labels'}: {shown}, ...)")
    entry = {"image": "none.nii.gz", "label": "none_seg.nii.gz"}
    data = {"root": None, "cases": [entry], "train": None, "validation": None}
    with pytest.raises(DataError, match="no such file") as error:
        check_run(configuration(root, tmp_path / "out", data=data), progress=False)
    assert str(error.value).endswith(f"(and 1 more in {Path.cwd()}: none_seg.nii.gz)")


def test_of_a_run_that_is_gone_on_with(root, tmp_path, monkeypatch):
    config = configuration(root, tmp_path / "out", train={"steps": 4})
    stop_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, progress=False)
    monkeypatch.undo()
    listed = check_run(config, progress=False, resume=True)
    other = configuration(root, tmp_path / "out", train={"steps": 4, "lr": 0.02})
    with pytest.raises(ConfigError, match=r"--resume: train\.lr: not as in"):
        check_run(other, progress=False, resume=True)
    for name in (listed.train[0], listed.validation[0]):
        path = root / "images" / f"{name}.nii.gz"
        before = path.read_bytes()
        save(path, phantom(7)[0])
        with pytest.raises(ConfigError, match="the cases have changed"):
            check_run(config, progress=False, resume=True)
        with pytest.raises(ConfigError, match="the cases have changed"):
            finetune(config, progress=False, resume=True)
        path.write_bytes(before)


def test_a_folder_in_use(root, tmp_path):
    config = configuration(root, tmp_path / "out", overwrite=True)
    with claimed_output(config, Log(quiet=True)):
        for resume in (False, True):
            with pytest.raises(ConfigError, match="is in use by a run"):
                check_run(config, progress=False, resume=resume)
        with pytest.raises(ConfigError, match="is in use by a run"):
            check_run(configuration(root, tmp_path / "out"), progress=False)
    check_run(config, progress=False)


def test_labels_that_are_ignored_throughout(root, tmp_path):
    label_map = {0: "ignore", 1: "ignore", 2: "ignore"}
    config = configuration(root, tmp_path / "out", data={"label_map": label_map})
    for work in (check_run, finetune):
        with pytest.raises(DataError, match=r"case00\.nii\.gz: every voxel is ignored .* case01"):
            work(config, progress=False)


def test_of_several_processes(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = configuration(root, tmp_path / "out", train={"batch_size": 3})
    with pytest.raises(ConfigError, match="a multiple of the 2 processes"):
        check_run(config, progress=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        check_run(configuration(root, tmp_path / "out"))
    assert capsys.readouterr().out.count("nothing is in the way") == 1


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        (["data.train=70"], "command line: data.train: asks for 70"),
        ([], "line 9: data.train: asks for 50"),
    ],
)
def test_errors_have_their_place(root, tmp_path, monkeypatch, capsys, overrides, place):
    content = settings(root, tmp_path / "out", data={"train": 50})
    path = write_config(tmp_path / "run.yaml", content)
    line = next(
        number
        for number, text in enumerate(path.read_text().splitlines(), 1)
        if text.strip() == "train: 50"
    )
    arguments = ["riskmap", "finetune", str(path), "--dry-run", *overrides]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"{path}: {place.replace('line 9', f'line {line}')}" in capsys.readouterr().err
