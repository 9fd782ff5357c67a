"""One run of `quality.py`: an SAE on the bundled model, trained by one library, timed, and then measured.

Imported in the run's own process only.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainingRunner, evaluate
from e2e_sae_plugin.demo import demo_dataset, demo_tokens, load_demo_model
from e2e_sae_plugin.demo.run import quiet_host
from e2e_sae_plugin.presets import quick_config

HOOK_NAME = "blocks.3.hook_resid_pre"
D_IN, D_SAE, CONTEXT_SIZE = 128, 1024, 128
N_HELD_OUT = 400
"""Sequences of the held-out files that every SAE is measured on: 51,200 tokens."""
AUTHORS_PROMPTS = 16
"""Sequences of one optimizer step in the authors' configs (`effective_batch_size`)."""


def held_out_tokens() -> Tensor:
    """`[N_HELD_OUT, CONTEXT_SIZE]`, of files that neither the model nor an SAE was trained on."""
    return demo_tokens("evaluation", CONTEXT_SIZE)[:N_HELD_OUT]


def run(library: str, settings: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train, save the SAE in `folder`, and measure it.

    Args:
        library: "ours" or "e2e-sae".
        settings: of ours, what is changed of `quick_config` (`sae` as a mapping); of the authors', `train_authors`'s.
            `model_directory` of both: another model of the bundled one's shape and tokenizer.
        seed: of the initialisation and of the order of the data, which is the same for both libraries.

    Returns:
        `seconds` of wall-clock and `cpu_seconds` of processor time of the training alone, and what the SAE reaches.
    """
    train = {"ours": train_ours, "e2e-sae": train_authors}[library]
    changes = dict(settings)
    directory = changes.pop("model_directory", None)
    model = load_demo_model() if directory is None else load_demo_model(Path(directory))
    with quiet_host():
        seconds, cpu_seconds = train(model, changes, seed, folder)
        sae = SAE.load_from_disk(str(folder))
    found = evaluate(sae, model, held_out_tokens(), hook_name=HOOK_NAME, ablations=False)
    increase = found.metrics["ce_loss_increase"]
    assert increase is not None
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "ce_loss_increase": increase.value,
        "low": increase.low,
        "high": increase.high,
        "kl": found.value("kl"),
        "l0": found.value("l0"),
        "n_alive": found.n_alive,
    }


def train_ours(model: Any, settings: Mapping[str, Any], seed: int, folder: Path) -> tuple[float, float]:
    """`E2ESAETrainingRunner.run`: what it estimates before the first step and the saving of the SAE count."""
    fixed: dict[str, Any] = {
        "model_name": "e2e-sae-demo",
        "dataset_path": "e2e-sae-demo",
        "n_eval_batches": 0,
        "seed": seed,
        "output_path": str(folder),
        "overwrite_output": True,
        "checkpoint_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
        "verbose": False,
    }
    changes = dict(settings)
    if "sae" in changes:
        changes["sae"] = TrainingSAEConfig.from_dict({"d_in": D_IN, "d_sae": D_SAE, **changes["sae"]})
    cfg = quick_config(HOOK_NAME, D_IN, d_sae=D_SAE, context_size=CONTEXT_SIZE, **fixed, **changes)
    dataset = demo_dataset("train", CONTEXT_SIZE, seed=seed)
    runner = E2ESAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    start = time.perf_counter(), time.process_time()
    runner.run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def train_authors(model: Any, settings: Mapping[str, Any], seed: int, folder: Path) -> tuple[float, float]:
    """The authors' training loop for the e2e objective, put together from their parts in the order of their script.

    `settings` are `training_tokens`, `lr` and `sparsity` (their lambda). The rest is what their config of GPT2-small has:
    16 sequences a step, Adam, warm-up over a twentieth of the run, cosine to a tenth, gradients clipped at norm 10, an
    orthogonal decoder. Left out in their favour: logging, checkpoints, their streaming of the data, their second
    micro-batch (a step of this model fits into memory at once), and the initialisation.
    """
    authors = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "authors.py"))
    losses, transformers = authors["import_authors"]()
    from e2e_sae.utils import get_cosine_schedule_with_warmup

    torch.manual_seed(seed)
    n_steps = settings["training_tokens"] // (AUTHORS_PROMPTS * CONTEXT_SIZE)
    batches = demo_tokens("train", CONTEXT_SIZE, seed=seed).split(AUTHORS_PROMPTS)[:n_steps]
    if len(batches) < n_steps or len(batches[-1]) < AUTHORS_PROMPTS:
        raise ValueError(f"training_tokens={settings['training_tokens']:,} are more than the training text has.")
    joint = transformers.SAETransformer(model, [HOOK_NAME], D_SAE / D_IN)
    joint.saes.train()
    joint.tlens_model.requires_grad_(False)
    config = losses.LossConfigs(
        sparsity=losses.SparsityLoss(coeff=settings["sparsity"]),
        in_to_orig=None,
        out_to_orig=None,
        out_to_in=None,
        logits_kl=losses.LogitsKLLoss(coeff=1.0),
    )
    optimizer = torch.optim.Adam(joint.saes.parameters(), lr=settings["lr"])
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=n_steps // 20, num_training_steps=n_steps, min_lr_factor=0.1
    )
    start = time.perf_counter(), time.process_time()
    for tokens in batches:
        clean_logits, clean_acts = joint.forward_raw(tokens=tokens, run_entire_model=True)
        new_logits, new_acts = joint(tokens=tokens, sae_positions=[HOOK_NAME])
        loss, _ = losses.calc_loss(clean_acts, new_acts, clean_logits.detach().clone(), new_logits, config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(joint.saes.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    _save_authors_sae(next(iter(joint.saes.values())), folder)
    return seconds


@torch.no_grad()
def _save_authors_sae(theirs: Any, folder: Path) -> None:
    """In SAELens's format: their decoder's columns are normalised whenever it is used."""
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False))
    sae.W_enc.copy_(theirs.encoder[0].weight.T)
    sae.b_enc.copy_(theirs.encoder[0].bias)
    sae.W_dec.copy_(theirs.dict_elements.T)
    sae.b_dec.copy_(theirs.decoder.bias)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "e2e-sae-demo", HOOK_NAME
    sae.save_model(str(folder))
