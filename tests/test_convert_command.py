"""`e2e-sae convert`: its flags, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from convert_runs import HOOK, LATER, authors_config

from e2e_sae_plugin.command_line.hub_flags import convert_parser
from e2e_sae_plugin.convert.command import convert_command

SECOND = "blocks.2.hook_resid_pre"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    config = authors_config("local", [HOOK, SECOND], saes__dict_size_to_input_ratio=1.5, n_widgets=1)
    (folder / "final_config.yaml").write_text(yaml.dump(config))
    for n in (8, 20):
        state = {}
        for hook in (HOOK, SECOND):
            place = hook.replace(".", "-")
            state |= {
                f"{place}.encoder.0.weight": torch.randn(6, 4), f"{place}.encoder.0.bias": torch.randn(6),
                f"{place}.decoder.weight": torch.randn(4, 6), f"{place}.decoder.bias": torch.randn(4),
            }  # fmt: skip
        torch.save(state, folder / f"samples_{n}.pt")
    return folder


def test_it_prints_what_was_converted_the_notes_and_what_comes_next(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "my saes"
    convert_command(convert_parser().parse_args([str(run), "--output", str(out)]))
    names = [f"{hook}-samples_20" for hook in (HOOK, SECOND)]
    assert sorted(folder.name for folder in out.iterdir()) == names
    assert capsys.readouterr().out.splitlines() == [
        "SAE                                 model       hook                     kind   lambda  d_sae x d_in  config",
        f"{names[0]}  gpt2-small  {HOOK}  local  3       6 x 4         yes",
        f"{names[1]}  gpt2-small  {SECOND}  local  3       6 x 4         yes",
        f"Note: {names[0]}: Not known, and kept in the metadata: n_widgets.",
        f"Note: {names[1]}: Not known, and kept in the metadata: n_widgets.",
        "",
        "Next:",
        f"  e2e-sae evaluate '{out / names[0]}'",
        f"  e2e-sae evaluate '{out / names[1]}'",
        f"  e2e-sae train --config '{out / names[0] / 'e2e_runner_cfg.json'}'     trains such an SAE anew",
    ]


def test_checkpoints_and_positions_are_chosen(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    convert_command(
        convert_parser().parse_args([str(run), "--output", str(out), "--samples", "all", "--position", SECOND])
    )
    assert sorted(folder.name for folder in out.iterdir()) == [f"{SECOND}-samples_20", f"{SECOND}-samples_8"]
    convert_command(convert_parser().parse_args([str(run), "--output", str(out), "--samples", "8", "--position", HOOK]))
    assert (out / f"{HOOK}-samples_8").is_dir()
    assert "samples_20" not in capsys.readouterr().out.split("Next:")[-1]


def test_a_run_without_a_config_here_is_said_and_no_training_offered(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = authors_config("e2e", [HOOK, SECOND], saes__dict_size_to_input_ratio=1.5)
    (run / "final_config.yaml").write_text(yaml.dump(config))
    convert_command(convert_parser().parse_args([str(run), "--output", str(tmp_path / "out")]))
    printed = capsys.readouterr().out
    assert "joint e2e  3       6 x 4         no" in printed
    assert f"Note: {HOOK}-samples_20: The run has no config here: the run trained 2 SAEs in one pass" in printed
    assert "e2e-sae train" not in printed


def test_layers_are_asked_for_and_taken(run: Path, tmp_path: Path):
    loss = {"in_to_orig": {"total_coeff": 1.0, "hook_positions": LATER}}
    for n in (8, 20):
        state = torch.load(run / f"samples_{n}.pt")
        torch.save({key: value for key, value in state.items() if key.startswith("blocks-1")}, run / f"samples_{n}.pt")
    config = authors_config(loss, tlens_model_name="another", saes__dict_size_to_input_ratio=1.5)
    (run / "final_config.yaml").write_text(yaml.dump(config))
    with pytest.raises(ValueError, match="--layers"):
        convert_command(convert_parser().parse_args([str(run), "--output", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
    convert_command(convert_parser().parse_args([str(run), "--output", str(tmp_path / "out"), "--layers", "5"]))
    assert (tmp_path / "out" / f"{HOOK}-samples_20" / "e2e_runner_cfg.json").is_file()


def test_wrong_flags_end_with_a_usage_error(run: Path, capsys: pytest.CaptureFixture[str]):
    for flags in ([], ["--output", "x", "--samples", "some"], ["--output", "x", "--pos", HOOK]):
        with pytest.raises(SystemExit) as exit_:
            convert_command(convert_parser().parse_args([str(run), *flags]))
        assert exit_.value.code == 2
    assert "expected a number of samples, or all, got 'some'" in capsys.readouterr().err
