import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from e2e_sae_plugin import __version__
from e2e_sae_plugin.cli import load_config, main, parse_train_config
from e2e_sae_plugin.objective import Objective

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_train_flags_reach_the_config_the_sae_and_the_objective():
    flags = "--architecture topk --k 40 --d_in 128 --d_sae 256 --kl 0.5 --beta 0.01 --max_grad_norm 10 --verbose False"
    hooks = "--downstream_hooks blocks.4.hook_resid_pre blocks.5.hook_resid_pre --log_to_wandb False"
    cfg = parse_train_config(f"{flags} {hooks}".split())
    assert cfg.sae.architecture() == "topk"
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.k) == (128, 256, 40)
    assert cfg.objective == Objective(
        kl=0.5, beta=0.01, downstream_hooks=("blocks.4.hook_resid_pre", "blocks.5.hook_resid_pre")
    )
    assert cfg.max_grad_norm == 10
    assert cfg.logger.log_to_wandb is False


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
def test_every_registered_architecture_can_be_chosen(architecture):
    extra = ["--matryoshka_widths", "256", "1024"] if architecture == "matryoshka_batchtopk" else []
    extra += ["--decoder_init_norm", "1.0"] if architecture == "matching_pursuit" else []
    cfg = parse_train_config(["--architecture", architecture, "--verbose", "False", *extra])
    assert cfg.sae.architecture() == architecture


def test_help_explains_every_host_field_and_every_field_of_the_objective(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_train_config(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for field in (*dataclasses.fields(LanguageModelSAERunnerConfig), *dataclasses.fields(LoggingConfig)):
        if field.name not in ("sae", "logger"):
            assert f"--{field.name}" in text, field.name
    for field in dataclasses.fields(Objective):
        assert f"--{field.name} " in text, field.name
    assert "clean model first" in " ".join(text.split())
    assert "No effect in end-to-end training." in text
    assert "Data Generating Function" not in text, "a comment of the host's leaked into the help"


def test_config_file_is_read_and_equals_the_flags(tmp_path):
    cfg = load_config(EXAMPLES / "run.yaml")
    assert cfg.sae.architecture() == "topk"
    assert cfg.training_tokens == 100_000_000
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(json.loads(json.dumps(cfg.to_dict()))))
    assert load_config(saved).to_dict() == cfg.to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sae: {architecture: topk, d_in: 8, d_sae: 16}\nlearning_rate: 1", "Unknown key 'learning_rate' in config"),
        ("sae: {architecture: topk, d_in: 8, d_sae: 16, kk: 3}", "Unknown key 'kk' in sae"),
        ("sae: {architecture: topkk, d_in: 8, d_sae: 16}", "sae.architecture must be one of"),
        ("sae: {architecture: topk, d_in: 8, d_sae: 16}\nobjective: {klx: 1}", "Did you mean 'kl'"),
        ("sae: {architecture: topk, d_in: 8, d_sae: 16}\nlr: fast", "lr in config must be a number, got 'fast'"),
        ("sae: {architecture: topk, d_in: 8.5, d_sae: 16}", "d_in in sae must be a whole number, got 8.5"),
        ("- a list", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_config_files_exit_with_2_and_say_why(tmp_path, capsys, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["train", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_numbers_that_yaml_reads_as_strings_are_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "sae: {architecture: standard, d_in: 8, d_sae: 16, l1_coefficient: 2e-3}\nlr: 3e-4\ntraining_tokens: 1e6"
    )
    cfg = load_config(path)
    assert (cfg.lr, cfg.training_tokens, cfg.sae.l1_coefficient) == (3e-4, 1_000_000, 2e-3)


def test_config_file_beside_other_flags_is_refused(capsys):
    assert main(["train", "--config", "run.yaml", "--kl", "2"]) == 2
    assert "takes no other flags; got --kl 2" in capsys.readouterr().err


def test_missing_config_file_is_named(capsys):
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert "no file 'nowhere.yaml'" in capsys.readouterr().err


def test_refused_setting_exits_with_2_and_its_message(capsys):
    assert main(["train", "--kl", "-1"]) == 2
    assert "Objective.kl must be a finite weight >= 0, got -1.0" in capsys.readouterr().err


def test_top_level_help_version_and_unknown_command(capsys):
    assert main(["--help"]) == 0
    assert "commands:" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
