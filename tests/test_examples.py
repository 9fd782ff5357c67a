"""The examples are what their README says, and those that need no network run and find what they promise."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import environment
from hub_server import HubServer
from time_limits import hang_seconds

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SHARED = {"bundled.py", "docstrings.py"}
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in SHARED)
README = (EXAMPLES / "README.md").read_text()
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

documentation = pytest.mark.documentation


def rows() -> dict[str, list[str]]:
    """The README's table: file -> its other cells."""
    lines = re.findall(r"^\| \[([\w.]+)\]\(\1\) \| (.+) \|$", README, re.M)
    return {name: cells.split(" | ") for name, cells in lines}


def run(
    script: str, folder: Path, *arguments: str, launcher: tuple[str, ...] = (), hub: HubServer | None = None
) -> str:
    """What an example prints, run in `folder`; fails where it ends with an error."""
    variables = dict(os.environ) if hub is None else environment(hub, folder / "hub-home")
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / script), *arguments],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=4 * hang_seconds(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1].replace(",", ""))


def test_the_table_lists_every_script_and_nothing_else():
    assert set(rows()) == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")} - SHARED
    for name in SHARED:
        assert f"`{name}`" in README


def test_every_guide_has_a_script_and_every_link_leads_somewhere():
    linked = {path for name in rows() for path in re.findall(r"\((\.\./docs/[\w/]+\.md)", rows()[name][1])}
    assert {(EXAMPLES / path).resolve() for path in linked} == set((ROOT / "docs/guides").glob("*.md"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_does_how_to_run_it_and_what_it_needs(script: str):
    tree = ast.parse((EXAMPLES / script).read_text())
    docstring = ast.get_docstring(tree)
    assert docstring is not None
    assert f"examples/{script}" in docstring
    needs = rows()[script][2]
    assert ("Hub" in needs) == bool(re.search(r"Needs the (Hugging Face )?Hub", docstring)), needs
    assert ("PyPI" in needs) == ("pip install" in docstring), needs
    assert ".parse_args()" in ast.unparse(tree)  # --help prints the docstring


@documentation
def test_train(tmp_path: Path):
    printed = run("train.py", tmp_path, "--tokens", "60000")
    local, e2e = (number(rf"\n{name} +\+([\d.]+) ", printed) for name in ("local", "e2e"))
    assert e2e < local
    assert "Plain SAELens loads it: a topk SAE on blocks.3.hook_resid_pre." in printed
    assert (tmp_path / "output/train/e2e/sae_weights.safetensors").is_file()


@documentation
def test_resume(tmp_path: Path):
    printed = run("resume.py", tmp_path, "--tokens", "16000")
    assert "Stopped by signal 15" in printed
    assert "Resumed against left alone: 0 of 263,296 weights differ;" in printed
    assert "lines of metrics.jsonl are the same." in printed


@documentation
def test_choose_objective(tmp_path: Path):
    printed = run("choose_objective.py", tmp_path, "--tokens", "16000")
    kl, downstream = number(r"\n  kl .* KL ([\d.]+) ", printed), number(r"\n  kl .*errors +(\d+)", printed)
    assert number(r"downstream errors = ([\d.e-]+)", printed) == pytest.approx(kl * 3 / downstream, rel=0.05)
    found = [float(value) for value in re.findall(r"\n  l1 .* L0 +([\d.]+) ", printed)]
    *higher, last_higher, lower, chosen = found
    assert sorted([*higher, last_higher], reverse=True) == [*higher, last_higher]
    assert lower <= 40 < last_higher
    assert lower < chosen < last_higher
    assert number(r"l1_coefficient: ([\d.e-]+)", printed) > 0


@documentation
def test_sweep_and_compare(tmp_path: Path):
    printed = run("sweep_and_compare.py", tmp_path, "--tokens", "8000")
    assert printed.count(",finished,") == 6
    assert "Pareto: " in printed
    assert "6 SAEs on 8,192 held-out tokens" in printed
    assert (tmp_path / "output/compared/report.html").is_file()


@documentation
def test_share_and_evaluate(tmp_path: Path):
    """One after the other on the SAE that the first one trains; the push goes to a Hub on this machine."""
    printed = run("share.py", tmp_path)
    for file in ("e2e-ds/sae_weights.safetensors", "e2e-ds/evaluation.json", "e2e-ds/checksums.sha256", "README.md"):
        assert re.search(rf"  {file} +[\d,]+ B  planned", printed), file
    assert "library_name: saelens" in printed
    with HubServer() as hub:
        printed = run("share.py", tmp_path, "--push", "someone/bundled-saes", hub=hub)
        assert printed.count("equal to the bit") == 2
        assert hub.repositories["someone/bundled-saes"].private
        (tmp_path / "my_text").mkdir()  # not "text", which is a builder of `datasets`
        (tmp_path / "my_text/own.txt").write_text("import os\n\n\ndef main() -> None:\n    print(os.getcwd())\n" * 60)
        printed = run(
            "load_published.py", tmp_path, "my_text", "--sae", "someone/bundled-saes:e2e-ds", "--tokens", "1024", hub=hub
        )  # fmt: skip
        assert "CE loss increase" in printed
        assert " of my_text" in printed
        assert hub.errors == []
    printed = run("evaluate_sae.py", tmp_path, "--tokens", "2560", "--features", "3")
    assert number(r"CE loss increase +\+([\d.]+)", printed) > 0
    assert len(re.findall(r"\n  \d+: KL [\d.e-]+ nats", printed)) == 3
    assert ">>" in printed
    assert (tmp_path / "output/bundled-sae/importance.csv").is_file()


@documentation
def test_finetune(tmp_path: Path):
    printed = run("finetune.py", tmp_path, "--tokens", "10240")
    assert number(r"closed (-?[\d.]+)%", printed) > 0
    assert (tmp_path / "output/finetune/tuned/finetune_features.csv").is_file()


@documentation
def test_convert_checkpoint(tmp_path: Path):
    printed = run("convert_checkpoint.py", tmp_path)
    assert number(r"forward pass: ([\d.e-]+)", printed) < 1e-5
    assert "kl=1.0" in printed
    assert "l1_coefficient: 0.01" in printed


@documentation
def test_many_devices(tmp_path: Path):
    run("many_devices.py", tmp_path, "--tokens", "2560")
    printed = run("many_devices.py", tmp_path, "--tokens", "2560", launcher=TORCHRUN)
    differences = [float(value) for value in re.findall(r"from one process ([\d.e+-]+)", printed)]
    assert len(differences) == 4
    assert max(differences) < 1e-3


@documentation
def test_custom_architecture(tmp_path: Path):
    printed = run("custom_architecture.py", tmp_path, "--tokens", "12800")
    assert re.search(r"\ntanh +standard +[\d.]+ +[\d.]+ \[", printed)
    assert '"tanh_loss"' not in printed
    metrics = (tmp_path / "output/custom_architecture/tanh/metrics.jsonl").read_text()
    assert "losses/tanh_loss" in metrics


@documentation
def test_own_loop(tmp_path: Path):
    printed = run("own_loop.py", tmp_path, "--steps", "60")
    kl = [float(value) for value in re.findall(r" kl +([\d.]+)", printed)]
    assert kl[-1] < kl[0]
    assert number(r"alive features +([\d,]+)", printed) > 100


@documentation
def test_joint_replacement_in_short(tmp_path: Path):
    ways = ("each alone, KL", "joint, KL + downstream")
    printed = run("joint_replacement.py", tmp_path, "--tokens", "10240", "--held-out", "16", "--only", *ways)
    alone, joint = (number(rf"\n\| {re.escape(way)} \| ([\d.]+) ", printed) for way in ways)
    assert joint < alone  # all five in one pass: what the joint run was trained for
