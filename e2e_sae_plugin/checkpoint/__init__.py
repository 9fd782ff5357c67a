"""Checkpoints that are whole or not there, from which a run goes on as if it had never stopped."""

from e2e_sae_plugin.checkpoint.folder import CheckpointKind as CheckpointKind
from e2e_sae_plugin.checkpoint.folder import DamagedCheckpointError as DamagedCheckpointError
from e2e_sae_plugin.checkpoint.folder import read_manifest as read_manifest
from e2e_sae_plugin.checkpoint.folder import verify_checkpoint as verify_checkpoint
from e2e_sae_plugin.checkpoint.run_folder import RunFolder as RunFolder
