"""Rows of the evidence on disk: nothing that was stored is lost or counts twice."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")
pytest.importorskip("benchmarks", reason="needs the repository's root on the path")

from benchmarks.transfer.store import CURVE_FIELDS, RUN_FIELDS, SCORE_FIELDS, Rows, Store


def append(store: Store, name: str) -> None:
    numbers = dict.fromkeys(("steps", "lr", "seed", "mean_dice", "leep", "entropy"), 0)
    run = {**dict.fromkeys(RUN_FIELDS, "x"), **numbers, "run": name, "scores": 2}
    scores = [{**dict.fromkeys(SCORE_FIELDS, 0.5), "run": name, "class": c} for c in "ab"]
    curve = [{**dict.fromkeys(CURVE_FIELDS, 0.5), "run": name}]
    store.append(run, scores, curve)


def names(found: Rows) -> list[str]:
    assert found.cut == 0
    assert all(len(found.scores[row["run"]]) == 2 for row in found.runs)
    assert all(len(found.curves[row["run"]]) == 1 for row in found.runs)
    return [row["run"] for row in found.runs]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_packed_rows_are_the_same_rows(tmp_path: Path) -> None:
    store = Store(tmp_path)
    append(store, "one")
    append(store, "two")
    before = store.read()
    text = (tmp_path / "scores.csv").read_bytes()
    store.pack()
    assert files(tmp_path) == ["curves.csv.xz", "runs.csv.xz", "scores.csv.xz"]
    assert store.read() == before
    packed = (tmp_path / "scores.csv.xz").read_bytes()
    assert lzma.decompress(packed) == text
    store.pack()
    append(store, "three")
    assert names(store.read()) == ["one", "two", "three"]
    store.pack()
    assert names(store.read()) == ["one", "two", "three"]
    assert lzma.decompress((tmp_path / "scores.csv.xz").read_bytes()).startswith(text)


def test_the_same_rows_have_the_same_bytes(tmp_path: Path) -> None:
    for name, steps in (("at_once", "ab"), ("bit_by_bit", "a|b|")):
        store = Store(tmp_path / name)
        for step in steps:
            store.pack() if step == "|" else append(store, step)
        store.pack()
    for each in files(tmp_path / "at_once"):
        one, other = ((tmp_path / k / each).read_bytes() for k in ("at_once", "bit_by_bit"))
        assert one == other


def test_parts_are_packed_apart(tmp_path: Path) -> None:
    for part in ("1of2", "2of2"):
        append(Store(tmp_path, part), part)
    Store(tmp_path).pack()
    assert len(files(tmp_path)) == 6
    assert names(Store(tmp_path).read()) == ["1of2", "2of2"]


@pytest.mark.parametrize("after", range(6))
def test_killed_while_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Before or after any of the files is removed."""
    store = Store(tmp_path)
    append(store, "packed")
    store.pack()
    append(store, "new")
    steps = 0
    remove = Path.unlink

    def killed(path: Path, **options: bool) -> None:
        nonlocal steps
        if path.suffix == ".csv":
            if steps == after:
                raise KeyboardInterrupt
            remove(path)
            if steps + 1 == after:
                raise KeyboardInterrupt
            steps += 2
        else:
            remove(path, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        store.pack()
    monkeypatch.undo()
    assert names(store.read()) == ["packed", "new"]
    append(store, "later")
    store.pack()
    assert names(store.read()) == ["packed", "new", "later"]


def test_what_another_process_packs_meanwhile_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    append(store, "one")
    read = Path.read_bytes

    def late(path: Path) -> bytes:
        monkeypatch.undo()
        store.pack()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", late)
    assert names(store.read()) == ["one"]


def test_a_cut_line_is_not_packed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    append(store, "one")
    with (tmp_path / "runs.csv").open("a") as file:
        file.write("two,x,x")
    store.pack()
    assert names(store.read()) == ["one"]


def test_a_damaged_file_is_named_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    append(store, "one")
    store.pack()
    path = tmp_path / "runs.csv.xz"
    path.write_bytes(path.read_bytes()[:-9])
    append(store, "two")
    for does in (store.read, store.pack):
        with pytest.raises(ValueError, match=rf"{path}: not a file of rows: Compressed data"):
            does()
    assert (tmp_path / "runs.csv").exists()
