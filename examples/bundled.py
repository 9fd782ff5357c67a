"""What the scripts without a network share: a run's settings on the bundled model, and an SAE of it to work on."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig, TopKTrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective

HOOK_NAME = "blocks.3.hook_resid_pre"
STEP_TOKENS = 512

warnings.filterwarnings("ignore", message="\nThis SAE has non-empty model_from_pretrained_kwargs")  # of every SAE
logging.getLogger("sae_lens").setLevel(logging.ERROR)


def topk(**changes: Any) -> TopKTrainingSAEConfig:
    """A TopK SAE on the bundled model: its L0 is fixed, so that objectives are compared at equal sparsity."""
    settings = {"d_in": 128, "d_sae": 1024, "k": 40, "normalize_activations": "expected_average_only_in"}
    return TopKTrainingSAEConfig(**{**settings, **changes})


def settings(output: str | Path | None, training_tokens: int, **changes: Any) -> dict[str, Any]:
    """Fields of `E2ESAERunnerConfig` that suit short runs on the bundled model; see docs/demo.md for how they were found."""
    found: dict[str, Any] = {
        "model_name": "e2e-sae-demo",
        "dataset_path": "e2e-sae-demo",
        "hook_name": HOOK_NAME,
        "context_size": 128,
        "training_tokens": training_tokens // STEP_TOKENS * STEP_TOKENS,
        "train_batch_size_tokens": STEP_TOKENS,
        "store_batch_size_prompts": 4,
        "sae": topk(),
        "lr": 1e-2,
        "lr_scheduler_name": "cosineannealing",
        "lr_end": 1e-4,
        "lr_warm_up_steps": max(1, training_tokens // STEP_TOKENS // 20),
        "adam_beta2": 0.99,  # 0.999 remembers the first, largest gradients for half of so short a run
        "b_dec_init_method": "mean",
        "n_batches_for_norm_estimate": 10,
        "n_eval_batches": 6,
        "eval_batch_size_prompts": 16,
        "checkpoint_path": None,
        "output_path": None if output is None else str(output),
        "overwrite_output": True,  # the examples' own folders: a second run starts anew
        "logger": LoggingConfig(log_to_wandb=False),
        "verbose": False,
    }
    return {**found, **changes}


def trained_sae(folder: str | Path = "output/bundled-sae", training_tokens: int = 60_000) -> Path:
    """The folder of a small e2e + downstream SAE, which is trained (a quarter of a minute) where it is not there yet."""
    if not (Path(folder) / "sae_weights.safetensors").is_file():
        print(f"Training an SAE on the bundled model into {folder} ...", flush=True)
        objective = Objective.e2e_downstream(beta=1e-4)
        cfg = E2ESAERunnerConfig(**settings(folder, training_tokens, objective=objective, local_first=0.6))
        E2ESAETrainingRunner(cfg).run()
    return Path(folder)
