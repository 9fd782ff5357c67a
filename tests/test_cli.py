import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from marks import slow_except
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from time_limits import hang_seconds

from e2e_sae_plugin import __version__
from e2e_sae_plugin.checkpoint import read_manifest
from e2e_sae_plugin.cli import main
from e2e_sae_plugin.command_line.train_command import parse_train_config
from e2e_sae_plugin.config import E2ESAERunnerConfig
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
        assert re.search(rf"--{field.name}[ ,]", text), field.name
    assert "clean model first" in " ".join(text.split())
    assert "No effect in end-to-end training." in text
    assert "Data Generating Function" not in text, "a comment of the host's leaked into the help"


def test_config_file_is_read_and_equals_the_flags(tmp_path):
    cfg = E2ESAERunnerConfig.load(EXAMPLES / "run.yaml")
    assert cfg.sae.architecture() == "topk"
    assert cfg.training_tokens == 100_000_000
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(json.loads(json.dumps(cfg.to_dict()))))
    assert E2ESAERunnerConfig.load(saved).to_dict() == cfg.to_dict()


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
    cfg = E2ESAERunnerConfig.load(path)
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


# Real processes.


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run on a tiny model, from folders alone: 600 steps, a few seconds."""
    from helpers import runner_config, tiny_gpt2_model, tiny_tokenizer, token_batch

    tiny_gpt2_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": " ".join(f"t{token}" for token in row)}) for row in token_batch(200, 16).tolist()]
    (tmp_path / "data/train.jsonl").write_text("\n".join(rows))
    config = runner_config(
        model_name=str(tmp_path / "model"), model_class_name="AutoModelForCausalLM", hook_name="transformer.h.1",
        dataset_path=str(tmp_path / "data"), output_path=str(tmp_path / "out"), streaming=False,
        checkpoint_path=str(tmp_path / "checkpoints"), training_tokens=32 * 600, lr_scheduler_name="cosineannealing",
    ).to_dict()  # fmt: skip
    for name in ("checkpoint_path", "sae_lens_version", "sae_lens_training_version"):
        config.pop(name)
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({**json.loads(json.dumps(config)), "checkpoint_path": str(tmp_path / "checkpoints")})
    )
    return path


def e2e_sae(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "e2e_sae_plugin", "train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", slow_except([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_an_interrupted_command_has_the_conventional_status_and_resumes(number: signal.Signals, run_file: Path):
    process = e2e_sae("--config", str(run_file))
    log = run_file.parent / "out/metrics.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=hang_seconds())[0]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], output[-2000:]
    assert "Traceback" not in output
    assert f"{number.name}: stopping after this step." in output
    checkpoint = output.split("set resume_from_checkpoint='")[1].split("'")[0]
    steps = read_manifest(Path(checkpoint))["n_training_steps"]
    assert f"{number.name} at step {steps}. Saved a checkpoint." in output
    assert 0 < steps < 600
    process = e2e_sae("--config", str(run_file), "--resume", "auto")
    output = process.communicate(timeout=hang_seconds())[0]
    assert process.returncode == 0, output[-2000:]
    assert f"Resumed from {checkpoint}, after step {steps}." in output
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "losses/kl_loss" in line] == list(range(600))


def test_resume_stands_beside_a_config_file_and_beside_flags(run_file: Path):
    cfg = parse_train_config(["--config", str(run_file), "--resume", "auto"])
    assert cfg.resume_from_checkpoint == "auto"
    cfg = parse_train_config(["--resume", "folder", "--verbose", "False"])
    assert cfg.resume_from_checkpoint == "folder"


def test_a_run_that_cannot_go_on_exits_with_2_and_says_why(run_file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--config", str(run_file), "--resume", "nowhere"]) == 2
    assert "resume_from_checkpoint: There is no checkpoint folder 'nowhere'" in capsys.readouterr().err
