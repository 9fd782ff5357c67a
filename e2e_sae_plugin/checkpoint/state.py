"""A trainer's state as tensors and JSON, and back, to the bit. Nothing is pickled."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file, save_file
from torch import Tensor

from e2e_sae_plugin.checkpoint.folder import E2E_CFG_FILENAME
from e2e_sae_plugin.token_stream import TokenStream

if TYPE_CHECKING:
    from e2e_sae_plugin.step import SplicedStepTrainer

STATE_FILENAME = "trainer_state.json"
STATE_TENSORS_FILENAME = "trainer_state.safetensors"
OPTIMIZER_FILENAME = "optimizer.safetensors"
SAE_STATE_FILENAME = "sae_state.safetensors"
BEST_FILENAME = "best_weights.safetensors"

_COUNTS = (
    "n_training_steps", "n_training_samples", "n_frac_active_samples", "n_skipped_steps", "n_skipped_in_a_row",
    "started_fine_tuning",
)  # fmt: skip


@dataclass(frozen=True)
class LargeState:
    """The large part of a run's state, of the whole SAE."""

    sae: TrainingSAE[Any]
    moments: dict[str, Tensor]
    """The optimizer's, as `parameter/key`."""
    decoder_norms: Tensor | None
    """`[d_sae, 1]`, with `keep_decoder_norms`."""


def large_state(trainer: SplicedStepTrainer) -> LargeState | None:
    """What `save` writes besides `capture`'s. Of a sharded dictionary it is put together on rank 0's CPU, for which all
    ranks have to call it, and is None on the others."""
    moments = {
        f"{name}/{key}": value
        for name, parameter in trainer.trained_parameters().items()
        for key, value in trainer.optimizer.state.get(parameter, {}).items()
    }
    norms = {} if trainer.decoder_norms is None else {"decoder_norms": trainer.decoder_norms.norms}
    if trainer.shard is None:
        return LargeState(trainer.sae, moments, norms.get("decoder_norms"))
    sae, joined = trainer.shard.join_sae(trainer.sae), trainer.shard.join({**moments, **norms})
    if sae is None or joined is None:
        return None
    return LargeState(sae, {name: joined[name] for name in moments}, joined.get("decoder_norms"))


State = tuple[dict[str, Any], dict[str, Tensor]]


def capture(trainer: SplicedStepTrainer, *, last_batch_is_trained: bool = True) -> State:
    """All of a run that is small: counts, schedules, statistics, the data's place, random states.

    Returns:
        What JSON holds, and copies of the tensors. What is as large as the SAE is not in it: see `large_state`.
    """
    random_json, random_tensors = _random_states()
    data_json: dict[str, Any] | None = None
    data_tensors: dict[str, Tensor] = {}
    if isinstance(trainer.data_provider, TokenStream):
        data_json, data_tensors = trainer.data_provider.state(last_is_trained=last_batch_is_trained)
    state = {
        **{name: getattr(trainer, name) for name in _COUNTS},
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficient_schedulers": {
            name: scheduler.state_dict() for name, scheduler in trainer.coefficient_schedulers.items()
        },
        "optimizer_groups": [_without_parameters(group) for group in trainer.optimizer.param_groups],
        "random": random_json,
        "data": data_json,
        "metrics": trainer.metrics_log.state(),
        "early_stop": trainer.early_stop.state(),
    }
    adapter = {} if trainer.adapter is None else trainer.adapter.state()
    tensors = {
        **{f"adapter.{name}": tensor for name, tensor in adapter.items()},
        "act_freq_scores": trainer.act_freq_scores.clone(),
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired.clone(),
        **{f"random.{name}": tensor for name, tensor in random_tensors.items()},
        **{f"data.{name}": tensor for name, tensor in data_tensors.items()},
    }
    return json.loads(json.dumps(state)), tensors


def save(trainer: SplicedStepTrainer, folder: Path, captured: State, large: LargeState) -> None:
    """Write `captured` and the optimizer into `folder`, and the SAE's exact state where SAELens's own file differs."""
    state, tensors = captured
    if large.decoder_norms is not None:
        tensors = {**tensors, "decoder_norms": large.decoder_norms}
    (folder / STATE_FILENAME).write_text(json.dumps(state, indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STATE_TENSORS_FILENAME)
    save_file({name: value.contiguous() for name, value in large.moments.items()}, folder / OPTIMIZER_FILENAME)
    if trainer.early_stop.best_weights:
        save_file(trainer.early_stop.best_weights, folder / BEST_FILENAME)
    exact = large.sae.state_dict()
    as_saved = dict(exact)
    large.sae.process_state_dict_for_saving(as_saved)
    if as_saved.keys() != exact.keys() or any(as_saved[name] is not exact[name] for name in exact):
        save_file(exact, folder / SAE_STATE_FILENAME)


def load(trainer: SplicedStepTrainer, folder: Path) -> None:
    """Put a trainer, its SAE and its data back to where `save` found them.

    Raises:
        ValueError: the data is not what the checkpoint was made with, or the tensors do not fit the SAE.
    """
    state = json.loads((folder / STATE_FILENAME).read_text())
    tensors = load_file(folder / STATE_TENSORS_FILENAME)
    _load_sae(trainer, folder)
    read = load_file if trainer.shard is None else trainer.shard.read
    _load_optimizer(trainer, state["optimizer_groups"], read(folder / OPTIMIZER_FILENAME))
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for name, scheduler_state in state["coefficient_schedulers"].items():
        trainer.coefficient_schedulers[name].load_state_dict(scheduler_state)
    for name in _COUNTS:
        setattr(trainer, name, state[name])
    device = trainer.act_freq_scores.device
    trainer.act_freq_scores = tensors["act_freq_scores"].to(device)
    trainer.n_forward_passes_since_fired = tensors["n_forward_passes_since_fired"].to(device)
    if trainer.decoder_norms is not None:
        trainer.decoder_norms.norms = read(folder / STATE_TENSORS_FILENAME)["decoder_norms"].to(device)
    if trainer.adapter is not None:
        trainer.adapter.load({name.removeprefix("adapter."): tensor for name, tensor in tensors.items()})
    if "early_stop" in state:  # an older checkpoint has none
        best = folder / BEST_FILENAME
        trainer.early_stop.load(state["early_stop"], load_file(best) if best.exists() else {})
    trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= trainer.n_training_samples]
    if isinstance(trainer.data_provider, TokenStream) and state["data"] is not None:
        data = {name.removeprefix("data."): tensor for name, tensor in tensors.items() if name.startswith("data.")}
        trainer.data_provider.resume(state["data"], data)
    saved_output = json.loads((folder / E2E_CFG_FILENAME).read_text())["output_path"]
    earlier = None if saved_output is None else Path(saved_output)
    trainer.metrics_log.resume(state["metrics"], trainer.n_training_samples, earlier)
    _restore_random_states(state["random"], tensors)  # last: drawing data may draw random numbers


def _load_sae(trainer: SplicedStepTrainer, folder: Path) -> None:
    exact = folder / SAE_STATE_FILENAME
    if trainer.shard is not None:
        weights = trainer.shard.read(exact if exact.exists() else folder / SAE_WEIGHTS_FILENAME)
        if not exact.exists():
            trainer.sae.process_state_dict_for_loading(weights)
        trainer.sae.load_state_dict(weights)
    elif exact.exists():
        trainer.sae.load_state_dict(load_file(exact))
    else:
        trainer.sae.load_weights_from_checkpoint(folder)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _load_optimizer(trainer: SplicedStepTrainer, groups: list[dict[str, Any]], moments: dict[str, Tensor]) -> None:
    for group, saved in zip(trainer.optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    parameters = trainer.trained_parameters()
    trainer.optimizer.state.clear()
    for name, value in moments.items():
        parameter_name, key = name.split("/")
        parameter = parameters[parameter_name]
        # Adam counts its steps in a tensor on the CPU, whatever the parameter's device, unless it is fused.
        on_cpu = key == "step" and not trainer.optimizer.param_groups[0]["fused"]
        trainer.optimizer.state[parameter][key] = value if on_cpu else value.to(parameter.device)


def _random_states() -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy_state = [kind, np.asarray(keys).tolist(), position, has_gauss, cached]
    return {"python": random.getstate(), "numpy": numpy_state}, tensors


def _restore_random_states(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["random.torch"])
    for name, tensor in tensors.items():
        index = name.removeprefix("random.cuda.")
        if name != index and torch.cuda.is_available() and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(index))
