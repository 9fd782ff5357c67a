"""Non-finite losses and gradients: what a skipped step takes back, and a search for where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from e2e_sae_plugin.architectures import sae_losses
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.spliced_losses import MicroBatch, downstream_error_sum, kl_sum, splice

if TYPE_CHECKING:
    from e2e_sae_plugin.step import SplicedStepTrainer


NOT_AGAIN = "It did not come again when the batch was computed again: it depends on the order of the device's sums."
"""What `find_fault` says where it finds nothing."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient; none of them has reached the weights."""


class StepStatistics:
    """What a step changes before its update: sparsity statistics and the SAE's buffers (BatchTopK's threshold)."""

    def __init__(self, trainer: SplicedStepTrainer):
        self._kept = (
            trainer.act_freq_scores.clone(),
            trainer.n_forward_passes_since_fired.clone(),
            trainer.n_frac_active_samples,
        )
        self._buffers = {name: buffer.clone() for name, buffer in trainer.sae.named_buffers()}

    @torch.no_grad()
    def restore(self, trainer: SplicedStepTrainer) -> None:
        """Take the step back: as if its forward pass had not been."""
        trainer.act_freq_scores, trainer.n_forward_passes_since_fired, trainer.n_frac_active_samples = self._kept
        for name, buffer in trainer.sae.named_buffers():
            buffer.copy_(self._buffers[name])
        trainer.optimizer.zero_grad()
        trainer.sae.zero_grad()  # the weights that an adapter stands for are not the optimizer's


def find_fault(trainer: SplicedStepTrainer, batch: Tensor) -> str:
    """Compute a batch again, part by part, and name the first part that is not finite.

    Returns:
        A sentence that tells the model's own overflow from the SAE's, and the terms of the objective apart.
    """
    objective, statistics = trainer.objective, StepStatistics(trainer)
    try:
        micro_batches = trainer.clean_micro_batches(batch, hidden=objective.kl > 0, downstream=objective.beta > 0)
        return _clean_fault(trainer, micro_batches) or _sae_fault(trainer, micro_batches, objective)
    finally:
        statistics.restore(trainer)


def find_fault_alone(trainer: SplicedStepTrainer, batch: Tensor) -> str | None:
    """What of `find_fault` a rank with a part of the SAE's features can tell by itself: the model's own overflow, and
    parameters that are not finite. None where neither is."""
    objective = trainer.objective
    micro_batches = trainer.clean_micro_batches(batch, hidden=objective.kl > 0, downstream=objective.beta > 0)
    return _clean_fault(trainer, micro_batches) or _parameter_fault(trainer)


def _parameter_fault(trainer: SplicedStepTrainer) -> str | None:
    for name, parameter in trainer.sae.named_parameters():
        if not _finite(parameter):
            return f"The SAE's {name} is not finite."
    return None


def _clean_fault(trainer: SplicedStepTrainer, micro_batches: list[MicroBatch]) -> str | None:
    precision = "autocast_lm=True" if trainer.runner_cfg.autocast_lm else "its dtype"
    cure = (
        f"The language model overflows by itself, without the SAE, under {precision}: run it in a wider dtype, or leave the "
        "data out, if it is right otherwise."
    )
    for micro in micro_batches:
        parts = {f"the activation at {trainer.runner_cfg.hook_name}": micro.clean.activation}
        parts |= {f"the activation at {hook}": value for hook, value in micro.clean.downstream.items()}
        if micro.clean.hidden is not None:
            parts["the final hidden state"] = micro.clean.hidden
        for name, value in parts.items():
            if not _finite(value):
                return f"{name[0].upper()}{name[1:]} of the clean pass is not finite. {cure}"
    return None


def _sae_fault(trainer: SplicedStepTrainer, micro_batches: list[MicroBatch], objective: Objective) -> str:
    fault = _parameter_fault(trainer)
    if fault is not None:
        return fault
    output = trainer.sae_forward(trainer.scaled_sae_in(micro_batches))
    if not _finite(output.sae_out):
        return "The SAE's reconstruction is not finite, while the activation that it reads is."
    for suffix, _, reconstruction in trainer.reconstructions(output):
        chunks = reconstruction.detach().split([micro.n_tokens for micro in micro_batches])
        for micro, chunk in zip(micro_batches, chunks, strict=True):
            fault = _spliced_fault(trainer, objective, micro, chunk)
            if fault is not None:
                level = f" (of the inner level {suffix[1:]})" if suffix else ""
                return fault + level + "."
    return _own_fault(trainer, output, objective)


def _own_fault(trainer: SplicedStepTrainer, output: TrainStepOutput, objective: Objective) -> str:
    """The SAE's own terms, as far as the objective counts them, and their gradients."""
    architecture = trainer.sae.cfg.architecture()
    ignored = {"mse": objective.mse == 0, "inner_level": objective.mse == 0, "auxiliary": objective.auxiliary == 0}
    counted = [(name, loss) for name, kind, loss in sae_losses(output, architecture) if not ignored.get(kind, False)]
    for name, loss in counted:
        if not _finite(loss):
            return f"The SAE's own term {name} is not finite."
    for name, loss in counted:
        if not loss.requires_grad:
            continue
        trained = [parameter for parameter in trainer.sae.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        if not all(gradient is None or _finite(gradient) for gradient in gradients):
            return f"The gradient of the SAE's own term {name} is not finite, while its value is."
    return NOT_AGAIN


def _spliced_fault(trainer: SplicedStepTrainer, objective: Objective, micro: MicroBatch, sae_out: Tensor) -> str | None:
    """The spliced pass, then each downstream hook and the KL by itself: its value, and its gradient."""
    model, leaf = trainer.spliced_model, sae_out.clone().requires_grad_()
    with trainer.model_autocast():
        spliced = splice(model, micro, leaf, head_index=trainer.runner_cfg.hook_head_index, hidden=objective.kl > 0)
        hooks = model.downstream_hooks if objective.beta > 0 else ()
        for name, value in [*((hook, spliced.downstream[hook]) for hook in hooks), ("the end", spliced.hidden)]:
            if value is not None and not _finite(value):
                return f"The model overflows at {name} of the spliced pass, on a reconstruction that is finite"
        terms = {f"the downstream error at {hook}": downstream_error_sum(micro, spliced, hook) for hook in hooks}
        if objective.kl > 0:
            terms["the KL"] = kl_sum(model, micro, spliced)
    for name, value in terms.items():
        if not _finite(value):
            return f"{name[0].upper()}{name[1:]} is not finite, while what it compares is"
        if not _finite(torch.autograd.grad(value, leaf, retain_graph=True)[0]):
            return f"The gradient of {name} is not finite, while its value is"
    return None


def _finite(value: Tensor) -> bool:
    values = value.values() if value.is_sparse else value
    return bool(torch.isfinite(values).all())
