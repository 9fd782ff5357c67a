"""Checkpoints as folders: whole or not there, and what a manifest finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from e2e_sae_plugin.checkpoint import DamagedCheckpointError, RunFolder, read_manifest, verify_checkpoint
from e2e_sae_plugin.checkpoint import folder as folder_module
from e2e_sae_plugin.checkpoint.folder import atomic_folder, recover, whole_files, write_manifest, write_whole

DETAILS = {"n_training_steps": 3, "n_training_samples": 96}


def fill(folder: Path, text: str = "weights") -> None:
    (folder / "a.bin").write_text(text)
    (folder / "b.json").write_text("{}")


def checkpoint(parent: Path, name: str = "96", text: str = "weights") -> Path:
    return RunFolder(parent, keep=5).write(name, "rolling", DETAILS, lambda folder: fill(folder, text))


def test_a_checkpoint_lists_its_files_with_sizes_and_sums(tmp_path: Path):
    manifest = verify_checkpoint(checkpoint(tmp_path))
    # printf weights | sha256sum; printf '{}' | sha256sum
    assert manifest["files"] == {
        "a.bin": {"bytes": 7, "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"},
        "b.json": {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},
    }
    assert (manifest["kind"], manifest["n_training_steps"], manifest["format"]) == ("rolling", 3, 1)


@pytest.mark.parametrize("moment", ["fill", "manifest", "sync", "rename"])
def test_a_failure_at_any_moment_leaves_what_was_there(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = checkpoint(tmp_path, text="old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    if moment == "manifest":
        monkeypatch.setattr(folder_module, "file_digest", fail)
    if moment == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    if moment == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        RunFolder(tmp_path, keep=5).write("96", "rolling", DETAILS, fail if moment == "fill" else fill)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["96"]
    assert verify_checkpoint(first)
    assert (first / "a.bin").read_text() == "old"


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path):
    checkpoint(tmp_path, text="old")
    assert (checkpoint(tmp_path, text="new") / "a.bin").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["96"]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def temporary(name: str, pid: int, suffix: str, host: str | None = None) -> str:
    return f".{name}.{host or folder_module._host()}+{pid}+abc+def{suffix}"


def test_what_a_killed_process_left_is_cleared_and_what_it_was_replacing_comes_back(tmp_path: Path):
    dead = dead_process()
    write_into = {
        temporary("96", dead, ".partial"): "half",
        temporary("64", dead, ".replaced"): "old 64",  # killed between the two renames: 64 itself is gone
        temporary("32", dead, ".replaced"): "old 32",
        "32": "new 32",
        temporary("128", os.getppid(), ".partial"): "being written by a living process",
        temporary("160", dead, ".partial", host="elsewhere"): "being written by another machine",
        temporary("192", os.getpid(), ".partial"): "left by a container whose process had our number",
        ".hidden": "a person's",
    }
    for name, text in write_into.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    recover(tmp_path)
    left = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert left == {
        "64": "old 64",
        "32": "new 32",
        temporary("128", os.getppid(), ".partial"): "being written by a living process",
        temporary("160", dead, ".partial", host="elsewhere"): "being written by another machine",
        ".hidden": "a person's",
    }


def test_what_this_process_is_writing_is_not_cleared(tmp_path: Path):
    with atomic_folder(tmp_path / "96") as folder:
        recover(tmp_path)
        assert folder.exists()


def test_files_are_moved_into_place_together_and_the_one_that_names_them_last(tmp_path: Path):
    (tmp_path / "cfg.json").write_text("old")
    (tmp_path / "other").write_text("stays")
    with whole_files(tmp_path, last="cfg.json") as folder:
        fill(folder)
        (folder / "cfg.json").write_text("new")
        assert (tmp_path / "cfg.json").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "cfg.json": "new", "other": "stays", "a.bin": "weights", "b.json": "{}",
    }  # fmt: skip
    with pytest.raises(ZeroDivisionError), whole_files(tmp_path, last="cfg.json") as folder:
        (folder / "cfg.json").write_text(str(1 / 0))
    assert (tmp_path / "cfg.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 4
    write_whole(tmp_path / "cfg.json", "newer")
    assert (tmp_path / "cfg.json").read_text() == "newer"


# Damage.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").write_text("weight"), r"a\.bin has 6 bytes instead of 7"),
        (lambda folder: (folder / "a.bin").write_text("weighty"), r"a\.bin has the right size but other bytes"),
        (lambda folder: (folder / "a.bin").unlink(), r"a\.bin is missing"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            r"no checkpoint of this package: it has no manifest\.json",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json' is damaged: JSONDecodeError"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), r"manifest\.json' is damaged"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json' is damaged"),
        (
            lambda folder: (folder / "manifest.json").write_text(
                (folder / "manifest.json").read_text().replace('"n_training_steps": 3', '"n_training_steps": 2')
            ),
            "its own sum differs",
        ),
    ],
    ids=range(8),
)
def test_damage_is_refused_by_name(damage: object, message: str, tmp_path: Path):
    folder = checkpoint(tmp_path)
    assert callable(damage)
    damage(folder)
    with pytest.raises(DamagedCheckpointError, match=message):
        verify_checkpoint(folder)


def test_all_that_is_damaged_is_listed(tmp_path: Path):
    folder = checkpoint(tmp_path)
    (folder / "a.bin").unlink()
    (folder / "b.json").write_text("{ }")
    with pytest.raises(DamagedCheckpointError, match=r"a\.bin is missing; b\.json has 3 bytes instead of 2"):
        verify_checkpoint(folder)


def test_every_single_bit_of_a_checkpoint_matters(tmp_path: Path):
    folder = checkpoint(tmp_path)
    n_flips = 0
    for path in folder.iterdir():
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 7):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(DamagedCheckpointError):
                verify_checkpoint(folder)
            n_flips += 1
        path.write_bytes(content)
    assert n_flips > 500
    verify_checkpoint(folder)


def test_another_format_is_refused_with_the_version_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder_module, "FORMAT", 9)
    tmp_path.joinpath("new").mkdir()
    fill(tmp_path / "new")
    write_manifest(tmp_path / "new", "rolling", {"e2e_sae_plugin_version": "7.0", **DETAILS})
    monkeypatch.undo()
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint format 9, but .* reads format 1\. .* \(7\.0\)"):
        read_manifest(tmp_path / "new")
