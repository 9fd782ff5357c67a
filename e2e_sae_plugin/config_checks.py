"""Values of a config that cannot train, or would have no effect: refused before anything is loaded."""

from __future__ import annotations

import logging
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from e2e_sae_plugin.architectures import (
    AUXILIARY_FOR_DEAD_FEATURES,
    FIXED_L0,
    NAMES_EVERY_LOSS,
    RUN_TIME_NORMALISATIONS,
    SHARDED_ARCHITECTURES,
    WITH_AUXILIARY,
)
from e2e_sae_plugin.config_fields import host_defaults
from e2e_sae_plugin.hub_names import check_repo_id, check_revision, sae_id_problem

if TYPE_CHECKING:
    from e2e_sae_plugin.config import E2ESAERunnerConfig

logger = logging.getLogger(__name__)

# Whole-number fields for which zero or less means nothing.
_AT_LEAST_ONE = (
    "eval_batch_size_prompts", "feature_sampling_window", "dead_feature_window", "keep_checkpoints", "max_skipped_steps",
    "patience_evaluations",
)  # fmt: skip
_AT_LEAST_ZERO = ("n_checkpoints", "lr_warm_up_steps", "lr_decay_steps", "n_eval_batches")
_SCHEDULES = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
_ESTIMATED = ("expected_average_only_in", "covariance_whitening")


def check_values(cfg: E2ESAERunnerConfig) -> None:
    """Ranges of numbers in the config, its SAE's and its logger's.

    Raises:
        ValueError: names the field, what it got and what it expected.
    """
    if not (math.isfinite(cfg.lr) and cfg.lr > 0):
        raise ValueError(f"lr must be a positive finite number, got {cfg.lr!r}.")
    if cfg.lr_end is not None and not 0 <= cfg.lr_end < math.inf:
        raise ValueError(f"lr_end must be a finite number, 0 or more, or None for lr / 10, got {cfg.lr_end!r}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(cfg, name)!r}.")
    if not -(2**63) <= cfg.seed < 2**63:
        raise ValueError(f"seed must have at most 63 bits, got {cfg.seed!r}.")
    for name in ("hook_name", "model_name", "device"):
        if not getattr(cfg, name):
            raise ValueError(f"{name} must not be empty.")
    estimates = cfg.b_dec_init_method == "mean" or cfg.sae.normalize_activations in _ESTIMATED
    for name in (*_AT_LEAST_ONE, *(("n_batches_for_norm_estimate",) if estimates else ())):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}.")
    for name in _AT_LEAST_ZERO:
        if getattr(cfg, name) < 0:
            raise ValueError(f"{name} must be 0 or more, got {getattr(cfg, name)!r}.")
    for name in ("wandb_log_frequency", "eval_every_n_wandb_logs"):
        if (value := getattr(cfg.logger, name)) < 1:
            raise ValueError(f"logger.{name} must be at least 1 (it is a number of steps), got {value!r}.")
    _check_sae(cfg)


def _check_sae(cfg: E2ESAERunnerConfig) -> None:
    sae: Any = cfg.sae
    for field in fields(sae):
        value = getattr(sae, field.name)
        if field.name.endswith("coefficient") and isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(f"sae.{field.name} must be a finite number, 0 or more, got {value!r}.")
    for name in ("d_in", "d_sae"):
        if not getattr(sae, name) >= 1:
            raise ValueError(f"sae.{name} must be at least 1, got {getattr(sae, name)!r}.")
    if sae.reshape_activations not in ("none", "hook_z"):
        raise ValueError(f"sae.reshape_activations must be 'none' or 'hook_z', got {sae.reshape_activations!r}.")
    if sae.reshape_activations == "hook_z" and (not cfg.hook_name.endswith("_z") or cfg.hook_head_index is not None):
        raise ValueError(
            f"sae.reshape_activations='hook_z' does not fit hook_name={cfg.hook_name!r} with "
            f"hook_head_index={cfg.hook_head_index!r}. Leave it at 'none': the finished SAE of a hook_z has it."
        )
    k = getattr(sae, "k", None)
    if isinstance(k, int | float) and not 0 < k <= sae.d_sae:
        raise ValueError(f"sae.k (active features per token) must be above 0 and at most d_sae={sae.d_sae}, got {k!r}.")


def check_start(cfg: E2ESAERunnerConfig) -> None:
    """How a run starts, and what of the objective has no effect on its architecture.

    Raises:
        ValueError: names the field, what it got, what it expected and what to do.
    """
    architecture = cfg.sae.architecture()
    if architecture in NAMES_EVERY_LOSS:  # of a user's own architecture nothing is known
        if cfg.objective.auxiliary is not None and architecture not in WITH_AUXILIARY:
            raise ValueError(
                f"objective.auxiliary={cfg.objective.auxiliary!r} has no effect: architecture {architecture!r} has no "
                f"auxiliary reconstruction ({sorted(WITH_AUXILIARY)} have). Leave it at None."
            )
        if cfg.objective.matryoshka_levels != "all" and architecture != "matryoshka_batchtopk":
            raise ValueError(
                f"objective.matryoshka_levels={cfg.objective.matryoshka_levels!r} has no effect: architecture "
                f"{architecture!r} has no inner levels. Leave it at 'all'."
            )
    names = cfg.frozen_parameters
    if cfg.keep_decoder_norms and "W_dec" in names:
        raise ValueError(
            "keep_decoder_norms=True has no effect: W_dec is among frozen_parameters. Leave one of them out."
        )
    _check_adapter(cfg)
    if cfg.checkpoint_blocks and not cfg.objective.needs_spliced_pass:
        raise ValueError(
            "checkpoint_blocks=True has no effect: the objective is local, so no backward pass goes through the model. "
            "Leave it at False."
        )
    if cfg.b_dec_init_method not in ("auto", "mean", "zeros"):
        raise ValueError(f"b_dec_init_method must be 'auto', 'mean' or 'zeros', got {cfg.b_dec_init_method!r}.")
    if cfg.b_dec_init_method == "mean" and cfg.from_pretrained_path is not None:
        raise ValueError(
            "b_dec_init_method='mean' would overwrite the b_dec of from_pretrained_path. Leave it at 'auto'."
        )
    if not 0 <= cfg.local_first < 1:
        raise ValueError(
            f"local_first must be a share of training_tokens, at least 0 and below 1, got {cfg.local_first!r}. "
            "For local training alone use objective=Objective.local()."
        )
    if cfg.local_first == 0:
        return
    if not cfg.objective.needs_spliced_pass:
        raise ValueError(
            f"local_first={cfg.local_first} has no effect: the objective is local throughout. Leave it at 0."
        )
    if architecture not in FIXED_L0 and cfg.objective.mse == 0:
        raise ValueError(
            f"local_first={cfg.local_first} cannot be trained with architecture {architecture!r} and objective.mse=0: the "
            "sparsity coefficient that suits the local part would be far too large or small for the KL. Use one of "
            f"{sorted(FIXED_L0)}, set objective.mse, or leave local_first at 0."
        )


def check_shards(cfg: E2ESAERunnerConfig) -> None:
    """What a dictionary whose features are divided between processes cannot be combined with.

    Raises:
        ValueError: names the field, what it got, and what to do.
    """
    if not cfg.shard_dictionary:
        return
    sae, instead = cfg.sae, "or leave shard_dictionary at False."
    if sae.architecture() not in SHARDED_ARCHITECTURES:
        raise ValueError(
            f"shard_dictionary=True cannot train architecture {sae.architecture()!r}. Use one of "
            f"{sorted(SHARDED_ARCHITECTURES)}, {instead}"
        )
    if sae.normalize_activations in RUN_TIME_NORMALISATIONS:
        raise ValueError(
            f"shard_dictionary=True is refused with sae.normalize_activations={sae.normalize_activations!r}, which is kept "
            f"from the input for the output of the same tokens. Use 'expected_average_only_in' or 'none', {instead}"
        )
    if getattr(sae, "lp_norm", 1) != 1:
        raise ValueError(
            f"shard_dictionary=True is refused with sae.lp_norm={getattr(sae, 'lp_norm', 1)!r}: only the norm of 1 is a sum "
            f"over features. Leave it at 1, {instead}"
        )
    refused = {"adapter": "none", "patience_evaluations": None, "autocast": False, "compile_sae": False}
    for name, default in refused.items():
        if getattr(cfg, name) != default:
            raise ValueError(
                f"shard_dictionary=True is refused with {name}={getattr(cfg, name)!r}, which has not been made to work with "
                f"it. Leave {name} at {default!r}, {instead}"
            )


def _check_adapter(cfg: E2ESAERunnerConfig) -> None:
    if cfg.adapter not in ("none", "low_rank", "scale"):
        raise ValueError(f"adapter must be 'none', 'low_rank' or 'scale', got {cfg.adapter!r}.")
    if cfg.adapter_rank is not None and cfg.adapter != "low_rank":
        raise ValueError(
            f"adapter_rank={cfg.adapter_rank!r} has no effect with adapter={cfg.adapter!r}: leave it out, or set "
            "adapter='low_rank'."
        )
    if cfg.adapter_rank is not None and not 1 <= cfg.adapter_rank <= cfg.sae.d_in:
        raise ValueError(f"adapter_rank must be from 1 to d_in={cfg.sae.d_in}, got {cfg.adapter_rank!r}.")
    if cfg.adapter == "scale" and cfg.keep_decoder_norms:
        raise ValueError(
            "adapter='scale' changes the decoder's norms, which keep_decoder_norms=True would hold. Drop one."
        )
    if cfg.adapter == "scale" and cfg.sae.architecture() == "matching_pursuit":
        raise ValueError(
            "adapter='scale' cannot be trained with architecture 'matching_pursuit', which reads with its decoder. Use "
            "adapter='low_rank' or 'none'."
        )


def _check_local_first_ends(cfg: E2ESAERunnerConfig) -> None:
    step = cfg.step_size_prompts * cfg.training_context_size
    last_begins = step * (math.ceil(cfg.training_tokens / step) - 1)
    if last_begins < cfg.local_first * cfg.training_tokens:
        raise ValueError(
            f"local_first={cfg.local_first} leaves none of the {last_begins // step + 1} steps ({step:,} tokens each) for "
            f"the objective. Train on more tokens, or lower local_first; for local training, set objective to 'local'."
        )


def _check_patience(cfg: E2ESAERunnerConfig) -> None:
    if cfg.patience_evaluations is None:
        return
    interval = cfg.logger.wandb_log_frequency * cfg.logger.eval_every_n_wandb_logs
    n_evaluations = cfg.total_training_steps // interval
    if cfg.n_eval_batches == 0 or n_evaluations <= cfg.patience_evaluations:
        raise ValueError(
            f"patience_evaluations={cfg.patience_evaluations!r} has no effect: the run of {cfg.total_training_steps} steps "
            f"has {n_evaluations if cfg.n_eval_batches else 0} evaluations (every logger.wandb_log_frequency * "
            f"logger.eval_every_n_wandb_logs = {interval} steps, on n_eval_batches={cfg.n_eval_batches}). Evaluate more "
            "often, or leave it at None."
        )


def _check_warm_ups_end(cfg: E2ESAERunnerConfig) -> None:
    """Refuse a sparsity coefficient that no step would be trained with: it reaches its value after the warm-up."""
    for field in fields(cfg.sae):
        warm_up = getattr(cfg.sae, field.name)
        is_warm_up = field.name.endswith("warm_up_steps") and isinstance(warm_up, int)
        if is_warm_up and warm_up >= cfg.n_steps:
            raise ValueError(
                f"sae.{field.name}={warm_up} does not end within the run, which has {cfg.n_steps} steps (training_tokens / "
                f"train_batch_size_tokens): the coefficient would reach {100 * (cfg.n_steps - 1) / warm_up:.3g} % of its "
                "value. Lower it, or train on more tokens."
            )


def _warn_of_long_windows(cfg: E2ESAERunnerConfig) -> None:
    """Say what a window that the run does not fill leaves out, where the window or its effect was asked for.

    SAELens's defaults of 1,000 and 2,000 steps are longer than many a run, whose summary says so.
    """
    if not cfg.verbose:
        return
    defaults = host_defaults()
    dead, sampling = cfg.dead_feature_window, cfg.feature_sampling_window
    if sampling > cfg.n_steps and sampling != defaults["feature_sampling_window"]:
        logger.warning(
            "feature_sampling_window=%d is longer than the run of %d steps: no feature sparsities (sparsity/below_1e-5) are "
            "logged.", sampling, cfg.n_steps,
        )  # fmt: skip
    idle = _weights_for_dead_features(cfg)
    if dead >= cfg.n_steps and (idle or dead != defaults["dead_feature_window"]):
        logger.warning(
            "dead_feature_window=%d is not shorter than the run of %d steps: no feature is counted as dead%s.",
            dead, cfg.n_steps, "".join(f", and {name} has no effect" for name in idle),
        )  # fmt: skip


def _weights_for_dead_features(cfg: E2ESAERunnerConfig) -> list[str]:
    """Name the weights that were given and act on dead features alone."""
    names: list[str] = []
    if cfg.objective.auxiliary and cfg.sae.architecture() in AUXILIARY_FOR_DEAD_FEATURES:
        names.append("objective.auxiliary")
    if getattr(cfg.sae, "pre_act_loss_coefficient", None):
        names.append("sae.pre_act_loss_coefficient")
    return names


def check_schedule(cfg: E2ESAERunnerConfig) -> None:
    """Learning-rate schedule and checkpoints against the length of the run and the folders there are.

    Raises:
        ValueError: names the field, what it got, what it expected and what to do.
    """
    if cfg.lr_scheduler_name not in _SCHEDULES:
        raise ValueError(f"lr_scheduler_name must be one of {list(_SCHEDULES)}, got {cfg.lr_scheduler_name!r}.")
    n_steps, ramps = cfg.total_training_steps, cfg.lr_warm_up_steps + cfg.lr_decay_steps
    if ramps > n_steps or (ramps == n_steps and cfg.lr_scheduler_name != "constant"):
        raise ValueError(
            f"lr_warm_up_steps={cfg.lr_warm_up_steps} and lr_decay_steps={cfg.lr_decay_steps} do not fit into the run, "
            f"which has {n_steps} steps (training_tokens / train_batch_size_tokens). Lower them, or train on more tokens."
        )
    if cfg.lr_scheduler_name == "cosineannealingwarmrestarts" and not 1 <= cfg.n_restart_cycles <= n_steps - ramps:
        raise ValueError(
            f"n_restart_cycles must be from 1 to the {n_steps - ramps} steps between warm-up and decay, got "
            f"{cfg.n_restart_cycles!r}."
        )
    if cfg.lr_decay_steps > 0 and cfg.lr_end == 0 and cfg.lr_scheduler_name != "constant":
        raise ValueError(
            f"lr_decay_steps={cfg.lr_decay_steps} has nothing to decay from: lr_end is 0. Leave one of them out."
        )
    _check_warm_ups_end(cfg)
    _warn_of_long_windows(cfg)
    _check_local_first_ends(cfg)
    _check_patience(cfg)
    every = cfg.checkpoint_every_minutes
    if every is not None and not 0 < every < math.inf:
        raise ValueError(f"checkpoint_every_minutes must be a finite number above 0, or None for none, got {every!r}.")
    if cfg.checkpoint_path is not None:
        return
    defaults = {field.name: field.default for field in fields(cfg)}
    for name in ("n_checkpoints", "checkpoint_every_minutes", "keep_checkpoints", "save_final_checkpoint"):
        if getattr(cfg, name) in (defaults[name], None) or cfg.logger.log_to_wandb:
            continue
        if name in host_defaults():  # SAELens accepts it, and writes nothing
            logger.warning("%s=%r writes no checkpoints: checkpoint_path is None.", name, getattr(cfg, name))
            continue
        raise ValueError(
            f"{name}={getattr(cfg, name)!r} has no effect without a checkpoint_path. Set one, or leave it out."
        )
    if cfg.resume_from_checkpoint == "auto":
        raise ValueError(
            "resume_from_checkpoint='auto' looks below checkpoint_path, which is None: set it, or name a folder."
        )


def check_sharing(cfg: E2ESAERunnerConfig) -> None:
    """Where the finished SAE is uploaded to.

    Raises:
        ValueError: a name that the Hub does not allow, or a setting without effect.
    """
    if cfg.push_to_hub is None:
        for name in ("hub_private", "hub_revision", "hub_sae_id", "hub_checkpoints"):
            if getattr(cfg, name) not in (None, False):
                raise ValueError(
                    f"{name}={getattr(cfg, name)!r} has no effect without push_to_hub. Set that, or leave it out."
                )
        return
    check_repo_id(cfg.push_to_hub, "push_to_hub")
    if cfg.output_path is None:
        raise ValueError("push_to_hub uploads what the run has saved, so it needs an output_path; got None.")
    if (problem := sae_id_problem(cfg.hub_sae_id or cfg.hook_name)) is not None:
        raise ValueError(f"hub_sae_id: {problem}")
    if cfg.hub_revision is not None:
        check_revision(cfg.hub_revision, "hub_revision")
    if cfg.hub_checkpoints and (cfg.n_checkpoints < 1 or cfg.checkpoint_path is None):
        raise ValueError(
            "hub_checkpoints=True uploads the n_checkpoints of checkpoint_path, and there are none. Set both."
        )
