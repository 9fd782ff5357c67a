"""First contact with the command line: what comes at once, and what is said of what was mistyped."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from time_limits import hang_seconds

import e2e_sae_plugin
from e2e_sae_plugin.cli import main
from e2e_sae_plugin.command_line import sae_flags
from e2e_sae_plugin.command_line.commands import COMMANDS
from e2e_sae_plugin.command_line.run_flags import DEFAULT_STEPS
from e2e_sae_plugin.command_line.suggestions import did_you_mean, near
from e2e_sae_plugin.config import MODEL_CLASSES
from e2e_sae_plugin.cost import estimate
from e2e_sae_plugin.finetune import recipe

PACKAGE = Path(e2e_sae_plugin.__file__).parent


def answer(*arguments: str) -> int:
    """The status, whether it is returned or exited with."""
    try:
        return main(list(arguments))
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else -1


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=hang_seconds(),
        env={**os.environ, **variables},
    )  # fmt: skip


# The package's names.


def test_every_name_is_listed_alike_for_readers_and_for_the_import():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    for_checkers = {
        alias.asname: (node.module or "").removeprefix("e2e_sae_plugin.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_checkers == e2e_sae_plugin._MODULE_OF
    assert set(e2e_sae_plugin.__all__) == {*for_checkers, "__version__"}
    assert set(e2e_sae_plugin.__all__) <= set(dir(e2e_sae_plugin))


def test_every_name_is_the_object_of_its_module():
    for name, module in e2e_sae_plugin._MODULE_OF.items():
        found = getattr(e2e_sae_plugin, name)
        assert found is getattr(importlib.import_module(f"e2e_sae_plugin.{module}"), name)
        # A name that is a module's too would be the one or the other, by what was imported first.
        assert not (PACKAGE / name).is_dir()
        assert not (PACKAGE / f"{name}.py").exists()


def test_modules_are_attributes_and_other_names_are_not():
    found = python("import e2e_sae_plugin as e; print(e.hub_names.__name__); print(hasattr(e, 'nonsense')); e.Objectiv")
    assert found.stdout.split() == ["e2e_sae_plugin.hub_names", "False"]
    assert "module 'e2e_sae_plugin' has no attribute 'Objectiv'" in found.stderr


# What takes no torch.

AT_ONCE = [
    [], ["--version"], ["--help"], ["trian"], ["help", "push"], ["sweep", "--confg", "x"],
    *([name, "--help"] for name in COMMANDS if name != "train"),
]  # fmt: skip


def test_help_and_refusals_import_neither_torch_nor_saelens():
    code = f"""
import contextlib, io, sys
from e2e_sae_plugin.cli import main
for argv in {AT_ONCE!r}:
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with quiet[0], quiet[1], contextlib.suppress(SystemExit):
        main(argv)
    heavy = {{"torch", "sae_lens", "transformer_lens", "numpy", "plotly"}} & set(sys.modules)
    assert not heavy, (argv, heavy)
"""
    found = python(code)
    assert found.returncode == 0, found.stderr


def test_what_is_written_twice_to_spare_an_import_is_the_same():
    assert sae_flags.MODEL_CLASSES == MODEL_CLASSES
    assert get_args(recipe.Trained) == sae_flags.TRAINED
    assert (recipe.TRAINING_TOKENS, recipe.EVALUATION_TOKENS) == (
        sae_flags.TRAINING_TOKENS,
        sae_flags.EVALUATION_TOKENS,
    )
    assert recipe.DTYPES == sae_flags.DTYPES
    assert estimate.DEFAULT_STEPS == DEFAULT_STEPS


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_while_libraries_are_imported_ends_with_130_and_no_traceback(swallowed: bool, tmp_path: Path):
    # A library that takes long to import; some turn what is raised meanwhile into another error.
    wait = (
        "try:\n    time.sleep(3600)\nexcept BaseException:\n    raise ImportError\n"
        if swallowed
        else "time.sleep(3600)\n"
    )
    (tmp_path / "torch.py").write_text(f"import time\nprint('importing', flush=True)\n{wait}")
    process = subprocess.Popen(
        [sys.executable, "-m", "e2e_sae_plugin", "sweep", "--config", "sweep.yaml"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"PATH": "", "PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=hang_seconds())
    assert (process.returncode, errors) == (130, "")


# What was meant.


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("--outptu", ["--output"]),
        ("--batch-tokens", ["--batch_tokens"]),  # this word alone, though --batch_token is as near
        ("--BATCH_TOKENS", ["--batch_tokens"]),
        ("--batch", ["--batch_token", "--batch_tokens"]),
        ("--zzz", []),
    ],
)
def test_near_matches(typed: str, found: list[str]):
    assert near(typed, ["--output", "--batch_tokens", "--batch_token", "--kl"]) == found


def test_the_sentence_of_near_matches():
    assert did_you_mean("trian", ["train", "sweep"]) == " Did you mean train?"
    assert did_you_mean("steps", ["n_steps", "step"]) == " Did you mean step or n_steps?"
    assert did_you_mean("xyz", ["abc"]) == ""


MISTYPED = [
    ("train", ["--trainig_tokens", "5"], "--training_tokens"),
    ("train", ["--training-tokens=5"], "--training_tokens?"),
    ("train", ["--architecture", "topk", "--kk", "5"], "--k"),
    ("estimate", ["--d_saee", "5"], "--d_sae?"),
    ("estimate", ["--no_measure", "--d_in", "5"], "--no-measure?"),
    ("finetune", ["--sae", "x", "--outptu", "y"], "--output?"),
    ("finetune", ["--sae_id", "x"], "--sae-id?"),
    ("sweep", ["--confg", "x"], "--config?"),
    ("evaluate", ["x", "--batch_prompts", "3"], "--batch-prompts?"),
    ("compare", ["x", "--csrds", "3"], "--cards?"),
    ("push", ["me/x", "y", "--dryrun"], "--dry-run?"),
    ("pretrained", ["--layr", "6"], "--layer?"),
    ("convert", ["x", "--ouput", "y"], "--output?"),
    ("demo", ["--tokns", "4"], "--tokens?"),
    ("completion", ["bash", "--hlp"], "--help?"),
]


@pytest.mark.parametrize(("command", "arguments", "meant"), MISTYPED)
def test_an_unknown_option_names_the_one_that_was_meant(
    command: str, arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
):
    assert answer(command, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"e2e-sae {command}: unknown option --")
    assert f"Did you mean {meant}" in lines[0]
    assert lines[1:] == [f"e2e-sae {command} --help explains every option."]


def test_every_command_is_among_the_mistyped():
    assert {command for command, _, _ in MISTYPED} == set(COMMANDS)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--architecture", "topkk"], "got 'topkk'. Did you mean topk?"),
        ("estimate", ["--architecture", "topkk"], "got 'topkk'. Did you mean topk?"),
        ("train", ["--adapter", "lowrank"], "got 'lowrank'. Did you mean low_rank?"),
        ("finetune", ["--sae", "x", "--output", "y", "--trained", "decodr"], "got 'decodr'. Did you mean decoder?"),
        ("pretrained", ["--layer", "7"], "argument --layer: expected one of 2, 6, 10, got '7'."),
        ("completion", ["bsh"], "Did you mean bash?"),
    ],
)
def test_a_wrong_choice_names_the_one_that_was_meant(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert answer(command, *arguments) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"e2e-sae {command}: argument ")
    assert message in line


def test_an_option_of_another_architecture_is_no_spelling_mistake(capsys: pytest.CaptureFixture[str]):
    assert answer("train", "--k", "3") == 2
    assert "--k is an option of other architectures. Give --architecture abstopk or" in capsys.readouterr().err


def test_values_with_a_dash_and_all_after_two_dashes_are_no_options(capsys: pytest.CaptureFixture[str]):
    assert answer("compare", "--cards", "-1", "x") == 2  # as a value that is too small, not as an option
    assert "--cards and --exact take whole numbers from 0 on, got -1 and 0." in capsys.readouterr().err
    assert answer("sweep", "--config", "nowhere.yaml", "--", "--x") == 2
    assert "e2e-sae sweep: unexpected argument --x." in capsys.readouterr().err


def test_an_unknown_command_names_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]):
    assert answer("trian") == 2
    assert capsys.readouterr().err.splitlines() == [
        "e2e-sae: unknown command 'trian'. Did you mean train?", "e2e-sae --help explains the commands.",
    ]  # fmt: skip
    assert answer("--verison") == 2
    assert "unknown option '--verison'. Did you mean --version?" in capsys.readouterr().err
    assert answer("help", "xxxxx") == 2
    assert "unknown command 'xxxxx'. Expected one of train, estimate, finetune" in capsys.readouterr().err


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_with_every_default_and_examples(
    command: str, capsys: pytest.CaptureFixture[str]
):
    assert answer("help", command) == 0
    text = capsys.readouterr().out
    assert answer(command, "--help") == 0
    assert capsys.readouterr().out == text
    assert text.startswith(f"usage: e2e-sae {command} ")
    assert f"\nexamples:\n  e2e-sae {command}" in text
    parser: Any = COMMANDS[command].parser
    for action in parser()._actions if parser is not None else ():
        assert action.help, action.dest
        if action.default not in (None, False, True, "==SUPPRESS==", []):
            assert "default" in action.help, action.dest


def test_no_arguments_print_the_usage_with_status_2(capsys: pytest.CaptureFixture[str]):
    assert answer() == 2
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.summary in text
    assert answer("help") == 0
    assert capsys.readouterr().out == text


def test_the_first_options_of_train_are_those_of_a_first_run(capsys: pytest.CaptureFixture[str]):
    assert answer("train", "--architecture", "topk", "--help") == 0
    text = capsys.readouterr().out
    first = text.split("begin with these:")[1].split("\n\n")[0]
    k = "-k, --k int" if "-k, --k int" in text else "-k int, --k int"  # argparse: since Python 3.13, and before
    for option in ("--config FILE", "--model_name", "--hook_name", k, "--training_tokens", "--log_to_wandb"):
        assert option in first
        assert text.count(f"\n  {option}") == 1
    assert "--adam_beta1" not in first
    assert "'cfg" not in text, "simple-parsing's names leaked"
    assert "CommandLine" not in text


def test_the_exit_of_train_without_arguments(capsys: pytest.CaptureFixture[str]):
    assert answer("train") == 2
    assert "e2e-sae train: give --config FILE, or the flags of a run." in capsys.readouterr().err


def test_commands_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        COMMANDS["train"].name = "x"  # type: ignore[misc]


@pytest.mark.slow
def test_the_example_of_train_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As it is in the help, with fewer tokens."""
    monkeypatch.chdir(tmp_path)
    assert answer("train", "--help") == 0
    example = (
        capsys.readouterr().out.split("--resume auto\n  e2e-sae ")[1].split("\n      an SAE")[0].replace("\\\n", "")
    )
    words = example.replace("200_000", "1_024").split()
    assert answer(*words) == 0
    assert (tmp_path / "first_sae/sae_weights.safetensors").is_file()
