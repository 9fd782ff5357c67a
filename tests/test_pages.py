"""Every code block of README and documentation runs, or is marked with what it needs and then checked as far as can be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import LANGUAGES, PAGES, ROOT, Block, blocks, check_yaml, run, run_commands, sides
from sae_lens import LoggingConfig, TopKTrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, paper_config
from e2e_sae_plugin.convert.authors import read_config
from e2e_sae_plugin.convert.config import run_config
from e2e_sae_plugin.convert.objective import authors_objective, loss_terms

ALL = [block for page in PAGES for block in blocks(page)]
# What the pages say of the runs that they make.
OBJECTIVES = {
    "getting_started.md": {"first": "e2e+ds", "local": "local"},
    "from_saelens.md": {"output/end_to_end": "e2e+mse"},
}
RUNNING = [
    page
    for page in PAGES
    if any(block.language in ("python", "bash") and block.needs is None for block in blocks(page))
]


@pytest.fixture(scope="session")
def an_sae_of_yours(tmp_path_factory) -> Path:
    """What the pages call `run_output`: a finished run on the bundled model."""
    folder = tmp_path_factory.mktemp("yours") / "run_output"
    cfg = E2ESAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=128, d_sae=256, k=16),
        model_name="e2e-sae-demo",
        dataset_path="e2e-sae-demo",
        hook_name="blocks.3.hook_resid_pre",
        context_size=128,
        training_tokens=20 * 512,
        train_batch_size_tokens=512,
        store_batch_size_prompts=4,
        lr=1e-2,
        n_eval_batches=1,
        checkpoint_path=None,
        output_path=str(folder),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    E2ESAETrainingRunner(cfg).run()
    return folder


@pytest.mark.documentation
@pytest.mark.filterwarnings("default")  # as for a reader
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_from_top_to_bottom(page, an_sae_of_yours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run_output").symlink_to(an_sae_of_yours)
    shutil.copy(ROOT / "examples/run.yaml", tmp_path)  # where a page means a config of the reader's
    run(page, tmp_path)
    for folder, kind in OBJECTIVES.get(page.name, {}).items():
        objective = E2ESAERunnerConfig.load(tmp_path / folder / "e2e_runner_cfg.json").objective
        assert objective.kind == kind, f"{folder} was trained with {objective}"


def test_blocks_say_what_they_are():
    assert len(ALL) > 60
    for block in ALL:
        assert block.language in LANGUAGES, f"{block}: a block of language {block.language!r}"
        if block.language == "yaml":
            check_yaml(block)
        if block.language == "python":
            compile(block.source, str(block), "exec")
        for side in sides(block) if block.language == "diff" else ():
            compile(side.replace("=...", "=None").replace("...)", ")"), str(block), "exec")


def test_most_of_the_python_runs():
    python = [block for block in ALL if block.language == "python"]
    marked = [block for block in python if block.needs is not None]
    assert len(marked) <= len(python) / 3, [str(block) for block in marked]


@pytest.mark.documentation
def test_python_blocks_type_check(tmp_path):
    """Marked ones too: a page's blocks are one script."""
    lines: dict[Path, list[Block]] = {}
    for page in PAGES:
        python = [block for block in blocks(page) if block.language == "python"]
        if not python:
            continue
        script = tmp_path / (str(page.relative_to(ROOT)).replace("/", "__")[:-3] + ".py")
        text = [""] * page.read_text().count("\n")
        for block in python:
            text[block.line : block.line + block.source.count("\n")] = block.source.splitlines()
        script.write_text("\n".join(text) + "\n")  # line n of the script is line n of the page
        lines[script] = python
    settings = {"include": ["."], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = Path(sys.executable).with_name("pyright")
    done = subprocess.run(
        [pyright, "--project", tmp_path, "--pythonpath", sys.executable, "--level", "error"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


def test_the_two_configs_of_the_migration_page_are_the_same_run(tmp_path):
    by_title = {block.title: block for block in blocks(ROOT / "docs/migrating/from_e2e_sae.md")}
    theirs = tmp_path / "authors.yaml"
    theirs.write_text(by_title["authors.yaml"].source)
    ours = E2ESAERunnerConfig.from_dict({**yaml.safe_load(by_title["run.yaml"].source), "device": "cpu"})
    config, notes = read_config(theirs), []
    terms = loss_terms(config)
    assert config.unknown_keys() == []
    hook = ours.hook_name
    objective = authors_objective(terms, hook, 768, n_positions=1, n_layers=12, model_name="gpt2-small")
    converted = run_config(config, terms, objective, hook, d_in=768, d_sae=46080, samples=None, notes=notes)
    assert notes == []
    theirs, mine = settings_of(converted), settings_of(ours)
    assert {name for name in theirs if mine[name] != pytest.approx(theirs[name])} == set()
    paper = settings_of(paper_config(6, "e2e+ds", device="cpu"))
    assert {name for name in paper if mine[name] != pytest.approx(paper[name])} <= {"seed", "streaming"}


def settings_of(cfg: E2ESAERunnerConfig) -> dict[str, object]:
    """All settings, those of the SAE and the objective too; without where and how it runs."""
    whole = cfg.to_dict()
    sae, objective = whole.pop("sae"), whole.pop("objective")
    del sae["metadata"], whole["logger"], whole["checkpoint_path"]
    nested = {f"sae.{name}": value for name, value in sae.items()}
    nested |= {f"objective.{name}": value for name, value in objective.items()}
    return {**whole, **nested}


def test_a_block_that_fails_is_named(tmp_path):
    page = ROOT / "docs/broken.md"
    block = Block(page, 3, "bash", None, "exit 3\n")
    with pytest.raises(AssertionError, match=r"docs/broken\.md:3 ended with status 3"):
        run_commands(block, tmp_path)
