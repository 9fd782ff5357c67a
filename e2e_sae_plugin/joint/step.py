"""One optimizer step of SAEs that are spliced together: one pass, one objective, one backward, an update for each SAE."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from e2e_sae_plugin.architectures import combine_sae_losses
from e2e_sae_plugin.faults import NonFiniteError, StepStatistics
from e2e_sae_plugin.joint.splice import JointMicroBatch, JointOutput, JointSplice, squared_change
from e2e_sae_plugin.joint.spliced_sae import SplicedSAE, TrainedSAE
from e2e_sae_plugin.kernels.sparse import fired_counts
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.precision import gradient_scale
from e2e_sae_plugin.spliced_losses import (
    downstream_error_sum,
    draw_positions,
    kl_sum,
    position_draws,
)
from e2e_sae_plugin.step_output import merge_step_outputs, without_large_tensors
from e2e_sae_plugin.trainer import E2ESAETrainer

logger = logging.getLogger(__name__)


class JointStep:
    """Trains SAEs at several places of one pass under one objective:

        kl * D_KL(y || y_hat)
          + beta / (L - l) * sum_k ||a_hat^(k) - a^(k)||^2          l of the first SAE; k after it
          + agreement / n * sum_i ||f_i(a_hat) - f_i(a)||^2         n SAEs i that read what a trained one wrote
          + for each trained SAE: mse * ||a_hat - SAE(a_hat)||^2 + its sparsity, as its architecture defines it

    `a_hat` is what an SAE reads in the spliced pass. Gradients reach an SAE from everything behind it, later SAEs included;
    the agreement's go through the features `f_i` to the SAEs before, with SAE `i` itself as it is. Each SAE has its own
    optimizer, schedules and clipping, as it would have alone.

    Args:
        splice: all places.
        trainers: of the SAEs that are trained, by name. They have the same `runner_cfg` but for the SAE and its place.
        frozen: the other SAEs in the pass.
        objective: the terms that all share.
        agreement: weight of the features' agreement.
    """

    def __init__(
        self,
        splice: JointSplice,
        trainers: Mapping[str, E2ESAETrainer],
        frozen: Mapping[str, SplicedSAE],
        objective: Objective,
        agreement: float = 0.0,
    ):
        self.splice, self.trainers, self.objective, self.agreement = splice, dict(trainers), objective, agreement
        self.trained = {name: TrainedSAE(trainer) for name, trainer in trainers.items()}
        self.saes: dict[str, SplicedSAE] = {**frozen, **self.trained}
        order = list(splice.places)
        first_trained = min(order.index(name) for name in trainers)
        self.readers = order[first_trained + 1 :] if agreement > 0 else []
        """SAEs that read what a trained one wrote, where their features are to agree."""
        self.terms: dict[str, Tensor] = {}
        """Of the last step, unweighted: means over its tokens."""
        self.loss: Tensor | None = None
        """Of the last step: the whole objective."""
        self.n_skipped_in_a_row = 0

    @property
    def _leader(self) -> E2ESAETrainer:
        """Any trainer, for what all have alike."""
        return next(iter(self.trainers.values()))

    def __call__(self, batch: Tensor) -> dict[str, TrainStepOutput]:
        """Train on `batch [n_prompts, pos]`; the output of each SAE, its `loss` without the others' own terms.

        Raises:
            ValueError: every token of the batch is excluded.
            NonFiniteError: `max_skipped_steps` in a row had a loss or gradient that is not finite.
        """
        leader = self._leader
        n_tokens = leader._n_trained_tokens(batch)
        if not n_tokens:
            raise ValueError(
                f"Every token of the batch at step {leader.n_training_steps} is excluded by exclude_special_tokens="
                f"{leader.runner_cfg.exclude_special_tokens!r}, so there is nothing to train on."
            )
        before = {name: StepStatistics(trainer) for name, trainer in self.trainers.items()}
        try:
            outputs, fired = self._gradient(batch, n_tokens)
            for name, trainer in self.trainers.items():
                trainer._count_firing(fired[name], n_tokens)
            broken = self._broken(outputs)
        except BaseException:
            for name, trainer in self.trainers.items():
                before[name].restore(trainer)
            raise
        if broken:
            for name, trainer in self.trainers.items():
                before[name].restore(trainer)
            self._skip(broken)
        for trainer in self.trainers.values():
            trainer.is_updating = True  # from here to the last count, the weights are of no step
        for trainer in self.trainers.values():
            if not broken:
                trainer._update()
            trainer._advance_schedules()
            trainer.n_training_samples += len(batch) * trainer.runner_cfg.training_context_size
        for trainer in self.trainers.values():
            trainer.is_updating = False
        self.n_skipped_in_a_row = self.n_skipped_in_a_row if broken else 0
        return outputs

    # The gradient.

    def _gradient(self, batch: Tensor, n_tokens: int) -> tuple[dict[str, TrainStepOutput], dict[str, Tensor]]:
        """Adds it up over micro-batches, in the parameters of all trained SAEs."""
        cfg = self._leader.runner_cfg
        draws = position_draws(cfg.seed, self._leader.n_training_steps)
        fired = {name: torch.zeros_like(trainer.act_freq_scores) for name, trainer in self.trainers.items()}
        outputs: dict[str, list[TrainStepOutput]] = {name: [] for name in self.trainers}
        shares: list[float] = []
        scale = 1.0
        self.terms, self.loss = {}, None
        for tokens in batch.split(cfg.micro_batch_size_prompts):
            with self._leader.model_autocast():
                micro = self.splice.clean(
                    tokens,
                    hidden=self.objective.kl > 0,
                    downstream=self.objective.beta > 0,
                    seqpos_slice=cfg.seqpos_slice,
                    excluded=self._leader.excluded_tokens,
                )
                if not micro.n_tokens:
                    continue
                positions = None
                if self.objective.kl_positions < 1:
                    positions = draw_positions(micro.n_tokens, self.objective.kl_positions, draws)
                joint = self.splice.run(micro, self.saes, hidden=self.objective.kl > 0)
                shared = self._shared_terms(micro, joint, positions)
            shares.append(micro.n_tokens / n_tokens)
            scale = gradient_scale(micro.first.clean.activation.dtype, n_tokens)
            self._backward(shared, shares[-1], scale, outputs, fired)
        self._divide_gradients(scale)
        whole = len(shares) == 1
        return {
            name: merge_step_outputs(each if whole else [without_large_tensors(one) for one in each], shares)
            for name, each in outputs.items()
        }, fired

    def _shared_terms(
        self, micro: JointMicroBatch, joint: JointOutput, positions: Tensor | None
    ) -> dict[str, tuple[float, Tensor]]:
        """name -> (weight, mean over the micro-batch's tokens): what no single SAE's output decides."""
        terms: dict[str, tuple[float, Tensor]] = {}
        first, objective, n_tokens = self.splice.first, self.objective, micro.n_tokens
        if objective.kl > 0:
            kl = kl_sum(first, micro.first, joint.spliced, positions=positions, top_k=objective.kl_top_k)
            terms["kl_loss"] = (objective.kl, kl / (n_tokens if positions is None else len(positions)))
        if objective.beta > 0:
            errors = [downstream_error_sum(micro.first, joint.spliced, hook) for hook in first.downstream_hooks]
            error = torch.stack([value.to(errors[0].device) for value in errors]).sum()
            terms["downstream_mse_loss"] = (objective.beta, error / (first.position.layers_after * n_tokens))
        for name in self.readers:
            with torch.no_grad():
                clean = self.saes[name].features(self.splice.clean_sae_in(micro, name))
            change = squared_change(self.saes[name].features(joint.sae_in[name]), clean).mean()
            terms[f"agreement_loss/{name}"] = (self.agreement / len(self.readers), change)
        return terms

    def _backward(
        self,
        shared: dict[str, tuple[float, Tensor]],
        share: float,
        scale: float,
        outputs: dict[str, list[TrainStepOutput]],
        fired: dict[str, Tensor],
    ) -> None:
        """One backward of a micro-batch's part of the objective, whose gradients come out times `scale`."""
        device = next(iter(shared.values()))[1].device
        weighted = torch.stack([weight * term.to(device) for weight, term in shared.values()]).sum()
        total = weighted
        values = {name: term.detach() for name, (_, term) in shared.items()}
        for name, sae in self.trained.items():
            output = sae.output
            assert output is not None
            sae.output = None
            with torch.no_grad():
                fired[name] += fired_counts(output.feature_acts)
            spliced_value = weighted.detach().to(output.loss.device)
            architecture = sae.trainer.sae.cfg.architecture()
            own, own_terms = combine_sae_losses(output, architecture, self.objective, spliced_value)
            total = total + own.to(device)
            output.loss = (spliced_value + own).detach()
            output.losses = {**{key: value.to(own.device) for key, value in values.items()}, **own_terms}
            outputs[name].append(output)
            values_of = {f"{key}/{name}": value for key, value in own_terms.items()}
            self._add(values_of, share)
        self._add(values, share)
        part = share * total.detach()  # left where it is: to read a number waits for the device
        self.loss = part if self.loss is None else self.loss + part
        (total * (share * scale)).backward()

    def _divide_gradients(self, scale: float) -> None:
        if scale == 1:
            return
        for trainer in self.trainers.values():
            for parameter in trainer.trained_parameters().values():
                if parameter.grad is not None:
                    parameter.grad /= scale

    def _add(self, values: Mapping[str, Tensor], share: float) -> None:
        for name, value in values.items():
            part = share * value.detach()
            self.terms[name] = part if name not in self.terms else self.terms[name] + part

    # Steps that are not finite.

    def _broken(self, outputs: Mapping[str, TrainStepOutput]) -> list[str]:
        """Clip each SAE's gradient; the SAEs whose loss or gradient is not finite."""
        finite = {name: trainer._clip_gradients() for name, trainer in self.trainers.items()}
        return [name for name in finite if not finite[name] or not bool(torch.isfinite(outputs[name].loss))]

    def _skip(self, broken: list[str]) -> None:
        self.n_skipped_in_a_row += 1
        limit = self._leader.runner_cfg.max_skipped_steps
        for trainer in self.trainers.values():
            trainer.n_skipped_steps += 1
        terms = {name: float(value) for name, value in self.terms.items()}
        not_finite = [name for name, value in terms.items() if not math.isfinite(value)]
        fault = (
            f"Loss or gradient of {', '.join(broken)} is not finite; of the terms, {', '.join(not_finite) or 'none'}."
        )
        if self.n_skipped_in_a_row >= limit:
            raise NonFiniteError(
                f"{self.n_skipped_in_a_row} steps in a row (max_skipped_steps), up to step {self._leader.n_training_steps}, "
                f"could not be made. None of them has reached the weights. {fault}"
            )
        if self.n_skipped_in_a_row == 1:
            logger.warning("Step %d is skipped. %s", self._leader.n_training_steps, fault)
