"""From a run to the Hub: what a finished run has saved goes up, and nothing that happens there fails the run."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import get_token

from e2e_sae_plugin.checkpoint.run_folder import RunFolder
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.hub.calls import without_token
from e2e_sae_plugin.hub.upload import Push, push_to_hub

logger = logging.getLogger(__name__)


def warn_without_token(cfg: E2ESAERunnerConfig) -> None:
    """Say at a run's start what would be found out at its end."""
    if cfg.push_to_hub is not None and get_token() is None:
        logger.warning(
            "push_to_hub=%r, but nobody is logged in to the Hub. Log in before the run ends (`hf auth login`, or HF_TOKEN); "
            "what cannot be uploaded stays in output_path.",
            cfg.push_to_hub,
        )


def push_finished_run(cfg: E2ESAERunnerConfig, run_folder: RunFolder | None) -> Push | None:
    """Upload the SAE in `cfg.output_path`, and the SAEs of the run's milestones where that is asked.

    Returns:
        What was pushed; None where `cfg` does not ask for it, or where it failed. The log says why, and how to repeat it.
    """
    if cfg.push_to_hub is None or cfg.output_path is None:
        return None
    sae_id = cfg.hub_sae_id or cfg.hook_name
    saes: dict[str, Path] = {sae_id: Path(cfg.output_path)}
    if cfg.hub_checkpoints and run_folder is not None:
        for path, manifest in reversed(run_folder.checkpoints()):
            if manifest["kind"] == "milestone":
                saes[f"{sae_id}/checkpoints/{manifest['n_training_samples']}"] = path
        if len(saes) == 1:
            logger.warning(
                "hub_checkpoints=True, but there is no milestone in %s: only the SAE goes up.", run_folder.path
            )
    try:
        push = push_to_hub(saes, cfg.push_to_hub, private=cfg.hub_private or None, revision=cfg.hub_revision)
    except KeyboardInterrupt:
        logger.warning("The upload was stopped. %s", _how_to_repeat(cfg, saes))
        raise
    except Exception as error:  # a finished run is no place to fail in
        logger.error("%s %s", without_token(str(error)), _how_to_repeat(cfg, saes))
        return None
    return push


def _how_to_repeat(cfg: E2ESAERunnerConfig, saes: Mapping[str, Path]) -> str:
    command = [
        "e2e-sae",
        "push",
        str(cfg.push_to_hub),
        *(f"{sae_id}={path.absolute()}" for sae_id, path in saes.items()),
    ]
    command += ["--private"] if cfg.hub_private else []
    command += ["--revision", cfg.hub_revision] if cfg.hub_revision is not None else []
    return f"The SAE is in {cfg.output_path}. To upload it:\n  {shlex.join(command)}"
