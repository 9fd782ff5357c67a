"""The line that a run begins with, and the few that it ends with."""

from __future__ import annotations

from e2e_sae_plugin.architectures import AUXILIARY_FOR_DEAD_FEATURES
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.trainer import E2ESAETrainer


def announce(cfg: E2ESAERunnerConfig) -> str:
    """What is about to be trained, and in how many steps."""
    weights = {name: getattr(cfg.objective, name) for name in ("kl", "beta", "mse")}
    objective = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)
    return (
        f"Training a {cfg.sae.architecture()} SAE ({cfg.sae.d_in} x {cfg.sae.d_sae}) on {cfg.hook_name} "
        f"of {cfg.model_name}, {objective}: {cfg.n_steps:,} steps of {cfg.step_size_prompts:,} x "
        f"{cfg.training_context_size:,} tokens, {cfg.micro_batch_size_prompts:,} sequences at once."
    )


def summarise(trainer: E2ESAETrainer, cfg: E2ESAERunnerConfig) -> str:
    """What was trained, what it reached on the held-out sequences, and where it lies."""
    sae = trainer.sae.cfg
    lines = [
        f"Trained a {sae.architecture()} SAE ({sae.d_in} x {cfg.sae.d_sae}) on {cfg.hook_name} for "
        f"{trainer.n_training_steps:,} steps, {trainer.n_training_samples:,} tokens."
    ]
    held_out = trainer.last_evaluation
    if held_out:
        lines.append(
            f"  held out   CE loss increase {held_out['metrics/ce_loss_increase']:+.4f} "
            f"(from {held_out['metrics/ce_loss_without_sae']:.4f})   KL {held_out['metrics/held_out_kl']:.4f}   "
            f"L0 {held_out['metrics/held_out_l0']:.1f}   "
            f"explained variance {held_out['metrics/held_out_explained_variance']:.3f}"
        )
        if held_out["metrics/held_out_explained_variance"] < 0:
            lines.append(
                "             worse than the mean activation: trained for too little, or with a rate or sparsity that "
                "does not suit it"
            )
    lines.append(f"  features   {_dead_features(trainer, cfg)}")
    if trainer.n_training_samples < trainer.cfg.total_training_samples - cfg.train_batch_size_tokens + 1:
        lines.append(
            f"  stopped    early, of {cfg.training_tokens:,} tokens: the held-out KL has not fallen for "
            f"{trainer.early_stop.n_without_gain} evaluations in a row"
        )
    if trainer.n_skipped_steps:
        lines.append(f"  skipped    {trainer.n_skipped_steps:,} steps, whose loss or gradient was not finite")
    if cfg.output_path is not None:
        lines.append(f"  saved in   {cfg.output_path}   (sae_lens.SAE.load_from_disk reads it)")
    return "\n".join(lines)


def _dead_features(trainer: E2ESAETrainer, cfg: E2ESAERunnerConfig) -> str:
    """Say how many are dead, or why that is not known."""
    if trainer.n_training_steps > cfg.dead_feature_window:
        return f"{int(trainer.dead_neurons.sum()):,} of {cfg.sae.d_sae:,} dead"
    text = f"none counted as dead: the run is not longer than dead_feature_window={cfg.dead_feature_window:,} steps"
    if cfg.sae.architecture() in AUXILIARY_FOR_DEAD_FEATURES and cfg.objective.auxiliary != 0:
        text += ", so the auxiliary loss has not acted"
    return text
