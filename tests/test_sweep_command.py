"""`e2e-sae sweep`."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_sweep import break_at

from e2e_sae_plugin.cli import main
from e2e_sae_plugin.command_line.run_flags import SWEEP_FILE as EXAMPLE
from e2e_sae_plugin.demo import corpus
from e2e_sae_plugin.step import SplicedStepTrainer
from e2e_sae_plugin.sweep import SweepConfig
from e2e_sae_plugin.sweep.command import _next_command as next_command  # pyright: ignore[reportPrivateUsage]


def example() -> dict[str, Any]:
    """The sweep that the command's help shows."""
    return yaml.safe_load(EXAMPLE.split("\n", 1)[1])


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the bundled text, which takes seconds to tokenise."""
    original = corpus.stdlib_files
    monkeypatch.setattr(corpus, "stdlib_files", lambda *args, **options: original(*args, **options)[:8])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two SAEs of two steps each on the bundled model."""
    content = example()
    content["base"] |= {"context_size": 16, "train_batch_size_tokens": 64, "training_tokens": 128, "n_eval_batches": 1}
    content["base"] |= {"n_batches_for_norm_estimate": 1, "eval_batch_size_prompts": 2}
    content["kinds"] = {"local": {"objective": "local", "sparsities": [1]}, "e2e": content["kinds"]["e2e"]}
    content["kinds"]["e2e"]["sparsities"] = ["5e-3"]
    content |= {"seeds": [0], "output_path": str(tmp_path / "saes")}
    return write(tmp_path, content)


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_help_explains_the_file_and_the_flags(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["sweep", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for words in ("--config FILE", "--part I/N", EXAMPLE):
        assert words in text
    assert "run the same command again" in " ".join(text.split())
    assert main(["--help"]) == 0
    assert "sweep " in capsys.readouterr().out


def test_a_file_is_trained_and_said_where_it_is(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", "--config", str(file)]) == 0
    folder = file.parent / "saes"
    text = capsys.readouterr().out
    assert f"2 of 2 SAEs are in {folder}, with their held-out metrics in sweep.csv." in text
    with (folder / "sweep.csv").open(newline="") as summary:
        rows = list(csv.DictReader(summary))
    shown = {line.split()[0]: line.split() for line in text.splitlines() if line.endswith("  finished")}
    assert list(shown) == [row["name"] for row in rows] == ["local-1-seed0", "e2e-0.005-seed0"]
    for row in rows:
        _, kind, *numbers, _ = shown[row["name"]]
        assert kind == row["kind"]
        for number, column in zip(numbers, ("ce_loss_increase", "held_out_kl", "held_out_l0"), strict=True):
            assert float(number) == float(f"{float(row[column]):.4g}")
            assert len(number) <= 9
    assert text.rstrip().endswith(f"Compare them: e2e-sae compare {folder} --output {folder}-compared")
    assert {path.name for path in folder.iterdir()} == {"local-1-seed0", "e2e-0.005-seed0", "sweep.csv"}
    assert all((path / "sae_weights.safetensors").exists() for path in folder.iterdir() if path.is_dir())
    assert main(["sweep", "--config", str(file)]) == 0  # finished: at once


def test_parts_share_the_folder(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", "--config", str(file), "--part", "2/2"]) == 0
    assert f"1 of 1 SAEs are in {file.parent / 'saes'}" in capsys.readouterr().out
    assert not (file.parent / "saes/local-1-seed0").exists()
    assert main(["sweep", "--config", str(file), "--part", "1/2"]) == 0
    assert (file.parent / "saes/sweep.csv").read_text().count("finished") == 2


@pytest.mark.parametrize("part", ["0/1", "2/1", "1", "1/", "/2", "a/b", "1/2/3", "-1/2", "1.0/2", "", "²/2"])
def test_parts_that_are_refused(part: str, file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", "--config", str(file), f"--part={part}"]) == 2
    error = capsys.readouterr().err
    assert f"e2e-sae sweep: --part takes I/N with 1 <= I <= N, for instance 1/2, got {part!r}." in error
    assert not (file.parent / "saes").exists()


def test_more_parts_than_saes_are_refused(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", "--config", str(file), "--part", "1/3"]) == 2
    assert "part=(1, 3): the sweep has only 2 SAEs." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 1}, "Unknown key 'kind' in the sweep. Did you mean 'kinds'?"),
        ({"base": {}}, "base.sae.architecture=None has no sparsity setting that a sweep knows"),
        ({"seeds": []}, "seeds of a sweep is empty"),
    ],
)
def test_files_that_are_refused_exit_with_2_and_say_why(
    change: dict[str, Any], message: str, file: Path, capsys: pytest.CaptureFixture[str]
):
    write(file.parent, {**yaml.safe_load(file.read_text()), **change})
    assert main(["sweep", "--config", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", "--config", str(tmp_path / "nowhere.yaml")]) == 2
    assert "--config: there is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main(["sweep"])
    assert exit_info.value.code == 2
    assert "the following arguments are required: --config" in capsys.readouterr().err


def test_when_some_or_all_fail_the_status_is_1(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    break_at(monkeypatch, "e2e-0.005-seed0", 1, RuntimeError("out of memory"))
    assert main(["sweep", "--config", str(file)]) == 1
    output = capsys.readouterr()
    assert "1 of 2 SAEs are in" in output.out
    row = next(line.split() for line in output.out.splitlines() if line.startswith("e2e-0.005-seed0 "))
    assert row == ["e2e-0.005-seed0", "e2e", "—", "—", "—", "failed"]
    assert "Compare them" not in output.out  # one SAE alone
    assert "e2e-sae sweep: 1 failed, see failed.json in their folders: e2e-0.005-seed0." in output.err
    content = yaml.safe_load(file.read_text())
    del content["kinds"]["local"]
    write(file.parent, content)
    assert main(["sweep", "--config", str(file)]) == 1
    assert "All 1 SAEs of the sweep failed: RuntimeError: out of memory" in capsys.readouterr().err


def test_a_signal_has_the_conventional_status_and_the_same_command_goes_on(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    original = SplicedStepTrainer.step

    def signalled(self: SplicedStepTrainer, batch: Any) -> Any:
        if self.runner_cfg.objective.needs_spliced_pass:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(SplicedStepTrainer, "step", signalled)
        assert main(["sweep", "--config", str(file)]) == 143
    checkpoint = file.parent / "saes-checkpoints/sweep/1"
    assert checkpoint.is_dir()
    assert main(["sweep", "--config", str(file)]) == 0
    assert f"Going on from {checkpoint}." in capsys.readouterr().out


def test_the_example_of_the_help_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = example()
    config = SweepConfig.from_dict(content)
    assert len(config.members()) == 12
    assert config.members()["e2e+ds-0.03-seed1"].config.objective.beta == 1e-4
    content["base"] |= {"training_tokens": 512, "n_eval_batches": 0, "n_batches_for_norm_estimate": 1}
    content |= {"seeds": [1], "output_path": str(tmp_path / "saes")}
    assert main(["sweep", "--config", str(write(tmp_path, content))]) == 0
    assert "6 of 6 SAEs are in" in capsys.readouterr().out


def test_the_example_of_the_docs_is_the_one_of_the_help():
    text = (Path(__file__).parent.parent / "docs/guides/comparing.md").read_text()
    assert yaml.safe_load(text.split('```yaml title="sweep.yaml"\n', 1)[1].split("```", 1)[0]) == example()


def test_saes_of_several_hooks_are_compared_hook_by_hook():
    rows = [{"name": f"e2e-{hook}-seed{seed}", "hook_name": hook} for hook in ("h.0", "h.1") for seed in (0, 1)]
    assert next_command(rows, "my saes") == (
        "e2e-sae compare 'my saes/e2e-h.0-seed0' 'my saes/e2e-h.0-seed1' --output 'my saes-compared/h.0' "
        "(and so for each of the 2 hooks)"
    )
    assert next_command(rows[:2], "saes") == "e2e-sae compare saes --output saes-compared"
    assert next_command(rows[:1], "saes") == next_command([], "saes") == ""
