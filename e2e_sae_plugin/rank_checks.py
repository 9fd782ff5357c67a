"""What several processes cannot train together, refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.distributed import Ranks, launched_size


def check_alone(what: str, instead: str) -> None:
    """Refuse what has no use for several processes.

    Raises:
        ValueError: it was started by `torchrun`.
    """
    if launched_size() > 1:
        raise ValueError(
            f"{what} does not run on several ranks, but torchrun has started {launched_size()} processes of it. {instead}"
        )


def check_one_process(cfg: E2ESAERunnerConfig) -> None:
    """Refuse what only has an effect on several ranks.

    Raises:
        ValueError: names the field and what to do.
    """
    if cfg.shard_dictionary:
        raise ValueError(
            "shard_dictionary=True has no effect: this is one process, which has all of the dictionary. Start several with "
            "torchrun (docs/guides/many_devices.md), or leave it at False."
        )


def check_ranks(cfg: E2ESAERunnerConfig, ranks: Ranks) -> None:
    """Refuse a step that does not divide by the ranks, devices that are not there, and what has not been made to work.

    Raises:
        ValueError: names the field, what it got, and what to do.
    """
    prompts, per_sequence = cfg.step_size_prompts, cfg.training_context_size
    if prompts % ranks.size:
        below, above = (prompts // ranks.size + extra for extra in (0, 1))
        nearest = " or ".join(str(n * ranks.size * per_sequence) for n in (below, above) if n)
        raise ValueError(
            f"train_batch_size_tokens={cfg.train_batch_size_tokens} is one step of {prompts} sequences, which do not divide "
            f"by {ranks.size} ranks. Nearest usable: {nearest}."
        )
    if cfg.shard_dictionary:
        _check_shards(cfg, ranks)
    if cfg.compile_sae:
        raise ValueError(
            f"compile_sae=True is refused with {ranks.size} ranks: features that are chosen across ranks, and losses that "
            "are, are not part of the compiled code. Leave it at False."
        )
    for name in ("device", "llm_device"):
        device = getattr(cfg, name)
        if device is not None and torch.device(device).type == "cuda":
            _check_cuda(name, str(device), ranks)


def _check_shards(cfg: E2ESAERunnerConfig, ranks: Ranks) -> None:
    d_sae, target = cfg.sae.d_sae, getattr(cfg.sae, "target_l0", None)
    if d_sae % ranks.size:
        below, above = (d_sae // ranks.size + extra for extra in (0, 1))
        nearest = " or ".join(str(n * ranks.size) for n in (below, above) if n)
        raise ValueError(
            f"shard_dictionary=True divides d_sae={d_sae} features between {ranks.size} ranks, by which they do not divide. "
            f"Nearest usable: {nearest}."
        )
    if target is not None and target > d_sae // ranks.size:
        raise ValueError(
            f"sae.target_l0={target} is more than the {d_sae // ranks.size} features that shard_dictionary=True leaves each "
            f"of {ranks.size} ranks, which SAELens refuses of an SAE. Lower it, or use fewer ranks."
        )


def _check_cuda(name: str, device: str, ranks: Ranks) -> None:
    if torch.device(device).index is not None:
        raise ValueError(
            f"{name}={device!r} names one GPU for all {ranks.size} ranks. Use 'cuda': each rank takes the GPU of its number."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"{name}={device!r} cannot be used here: torch finds no CUDA device. Use device='cpu', or a build of torch with "
            "CUDA on a machine with GPUs."
        )
    if ranks.local_size > torch.cuda.device_count():
        raise ValueError(
            f"{ranks.local_size} ranks were started on this machine, which has {torch.cuda.device_count()} GPU(s). Start "
            f"torchrun with --nproc-per-node {torch.cuda.device_count()}."
        )


def check_same_config(cfg: E2ESAERunnerConfig, ranks: Ranks) -> None:
    """Refuse ranks with different configs, and give all the folder of checkpoints that rank 0 has drawn a name for.

    Raises:
        ValueError: names the fields, their values and the ranks.
    """
    differences = _differences(ranks.gather(_comparable(cfg)))
    if differences:
        raise ValueError(
            "The ranks were given different configs:\n  "
            + "\n  ".join(differences)
            + "\nStart all of them with the same settings."
        )
    # SAELens puts the checkpoints of every start into a folder with a random name.
    cfg.checkpoint_path = ranks.from_leader(cfg.checkpoint_path)


def _comparable(cfg: E2ESAERunnerConfig) -> dict[str, Any]:
    config = cfg.to_dict()
    if cfg.checkpoint_path is not None:
        config["checkpoint_path"] = str(Path(cfg.checkpoint_path).parent)
    nested = ((name, value if isinstance(value, dict) else {"": value}) for name, value in config.items())
    return {f"{a}.{b}".rstrip("."): json.dumps(value, default=str) for a, part in nested for b, value in part.items()}


def check_same(what: str, value: Any, ranks: Ranks, cure: str) -> None:
    """Refuse ranks that see different things.

    Raises:
        ValueError: says what each of them sees.
    """
    differences = _differences(ranks.gather({what: str(value)}))
    if differences:
        raise ValueError(f"The ranks differ in {differences[0]}. {cure}")


def _differences(seen: list[dict[str, str]]) -> list[str]:
    differences: list[str] = []
    for name in sorted({name for each in seen for name in each}):
        values = [each.get(name, "(absent)") for each in seen]
        if len(set(values)) > 1:
            holders = {value: [rank for rank, v in enumerate(values) if v == value] for value in values}
            said = ", ".join(f"{value} on rank(s) {', '.join(map(str, on))}" for value, on in holders.items())
            differences.append(f"{name}: {said}")
    return differences
