"""`e2e-sae completion`: its script, in a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import shtab
from marks import slow_except
from time_limits import hang_seconds

from e2e_sae_plugin.cli import main
from e2e_sae_plugin.command_line.commands import COMMANDS

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as written:
        assert main(["completion", "bash"]) == 0
    path = tmp_path_factory.mktemp("completion") / "e2e-sae.bash"
    path.write_text(written.getvalue())
    return path


def complete(script: Path, *words: str, folder: Path | None = None) -> set[str]:
    """What a bash offers for the last of the words."""
    done = subprocess.run(
        ["bash", "--norc", "-c",
         'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_e2e_sae; printf "%s\\n" "${COMPREPLY[@]}"',
         str(script), "e2e-sae", *words],
        capture_output=True, text=True, timeout=hang_seconds(), cwd=folder, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


@bash
def test_the_bash_script_is_valid(script: Path):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


@bash
def test_commands_are_completed(script: Path):
    assert complete(script, "") >= {*COMMANDS, "help"}
    assert complete(script, "e") == {"estimate", "evaluate"}
    assert complete(script, "help", "pr") == {"pretrained"}


@bash
def test_options_are_completed(script: Path):
    assert complete(script, "push", "--d") == {"--dry-run"}
    assert complete(script, "train", "--train") == {"--training_tokens", "--train_batch_size_tokens"}
    assert complete(script, "train", "--l0_c") == {"--l0_coefficient"}  # JumpReLU's
    assert "--k" in complete(script, "train", "--k")  # TopK's
    assert complete(script, "estimate", "--no-m") == {"--no-measure"}
    assert complete(script, "estimate", "--d_s") == {"--d_sae"}


@bash
def test_values_are_completed(script: Path, tmp_path: Path):
    (tmp_path / "run.yaml").touch()
    (tmp_path / "runs").mkdir()
    assert complete(script, "train", "--architecture", "top") == {"topk"}
    assert complete(script, "finetune", "--trained", "s") == {"scale_and_bias"}
    assert complete(script, "completion", "z") == {"zsh"}
    assert complete(script, "sweep", "--config", "ru", folder=tmp_path) == {"run.yaml", "runs"}
    assert complete(script, "compare", "--output", "ru", folder=tmp_path) == {"runs"}
    assert complete(script, "train", "--output_path", "ru", folder=tmp_path) == {"runs"}


@pytest.mark.parametrize("shell", slow_except([shell for shell in shtab.SUPPORTED_SHELLS if shell != "bash"], "zsh"))
def test_other_shells_have_a_script_with_every_command(shell: str, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert "training_tokens" in text
