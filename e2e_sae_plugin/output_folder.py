"""A run's output folder: whose it is, whether its run is finished, and how it is marked."""

from __future__ import annotations

import json
from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from e2e_sae_plugin.checkpoint.folder import E2E_CFG_FILENAME, DamagedCheckpointError, write_whole
from e2e_sae_plugin.checkpoint.identity import identity_differences
from e2e_sae_plugin.checkpoint.resume import config_differences, read_saved_config
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.metrics_log import METRICS_FILENAME

EVALUATION_FILENAME = "evaluation.json"
"""An `Evaluation` beside an SAE, as `e2e-sae evaluate --output` writes it."""
HELD_OUT_FILENAME = "held_out.json"
"""The last held-out evaluation of the run, for the model card."""
CHECKSUMS_FILENAME = "checksums.sha256"
"""SHA-256 sums of the folder's other files, as `sha256sum` writes and checks them."""
FILES_OF_A_RUN = (
    SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME, METRICS_FILENAME, EVALUATION_FILENAME,
    HELD_OUT_FILENAME, CHECKSUMS_FILENAME,
)  # fmt: skip
"""What a run leaves besides its own config, and what is said of its SAE by files of known names."""


def is_finished(output: Path) -> bool:
    """Whether a run has saved its SAE there; `cfg.json` is the last of its files."""
    return (output / SAE_CFG_FILENAME).exists()


def holds_another_run(cfg: E2ESAERunnerConfig, output: Path) -> str | None:
    """What `output` holds that is not this run's; None for nothing. A run marks its folder with its config when it
    begins."""
    theirs = output / E2E_CFG_FILENAME
    if theirs.exists():
        try:
            differences = config_differences(read_saved_config(theirs), cfg)
        except DamagedCheckpointError as error:
            return f"another run, which would be overwritten: {error}"
        differing = "\n  ".join(differences)
        return f"another run, which would be overwritten. It differs in:\n  {differing}" if differences else None
    for name in (SAE_CFG_FILENAME, RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME, METRICS_FILENAME):
        if (output / name).exists():
            return f"another SAE or run ({name}), which would be overwritten."
    return None


def output_is_finished(cfg: E2ESAERunnerConfig, identity: dict[str, str | None]) -> bool:
    """Whether `cfg.output_path` holds the finished SAE of this very run."""
    if cfg.output_path is None or cfg.overwrite_output:
        return False
    output = Path(cfg.output_path)
    if not is_finished(output) or holds_another_run(cfg, output) is not None:
        return False
    metadata = read_saved_config(output / SAE_CFG_FILENAME).get("metadata", {})
    return not identity_differences({"identity": metadata.get("run_identity") or {}}, identity)


def mark_output(cfg: E2ESAERunnerConfig, folder: Path, *, starts_anew: bool) -> None:
    """Say whose folder it is, so that another run does not take it."""
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.overwrite_output and starts_anew:
        for name in FILES_OF_A_RUN:
            (folder / name).unlink(missing_ok=True)  # or they would pass for this run's
    write_whole(folder / E2E_CFG_FILENAME, json.dumps(cfg.to_dict(), indent=2) + "\n")


def write_configs(cfg: E2ESAERunnerConfig, folder: Path) -> None:
    """The config as SAELens reads it, and the whole of it."""
    for name, config in ((RUNNER_CFG_FILENAME, cfg.host_dict()), (E2E_CFG_FILENAME, cfg.to_dict())):
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
