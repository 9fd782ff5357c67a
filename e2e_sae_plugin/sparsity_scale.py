"""A warning for sparsity coefficients that were chosen for a squared error and are trained against a KL."""

from __future__ import annotations

import logging

from sae_lens.saes.sae import TrainStepOutput

from e2e_sae_plugin.architectures import SPARSITY_COEFFICIENT
from e2e_sae_plugin.config import E2ESAERunnerConfig

logger = logging.getLogger(__name__)

OUTWEIGHED = 10.0
"""Times the KL, from which on a sparsity term leaves few features alive. In the paper's runs it is about 1."""
FIRST_STEP = 10


class SparsityScale:
    """Compares, once, the sparsity term with the KL, when its coefficient has been warmed up.

    Args:
        cfg: the run's config.
    """

    def __init__(self, cfg: E2ESAERunnerConfig):
        self._name = SPARSITY_COEFFICIENT.get(cfg.sae.architecture())
        self._coefficient = getattr(cfg.sae, str(self._name), None)
        warm_ups = [getattr(cfg.sae, name, 0) for name in ("l1_warm_up_steps", "l0_warm_up_steps")]
        self._due_at = max(FIRST_STEP, *warm_ups)
        objective = cfg.objective
        self._kl_weight = objective.kl
        is_kl_alone = objective.kl > 0 and objective.mse == objective.beta == 0 and not objective.balance_kl
        self._is_open = self._name is not None and is_kl_alone

    def see(self, output: TrainStepOutput, step: int) -> None:
        """Warn at the step where the comparison is due, if the sparsity term outweighs the KL.

        Args:
            output: of the step.
            step: its number, from 0.
        """
        if not self._is_open or step < self._due_at:
            return
        self._is_open = False
        rest = self._kl_weight * float(output.losses["kl_loss"])
        sparsity = float(output.loss) - rest
        if sparsity <= OUTWEIGHED * rest:
            return
        logger.warning(
            "At step %d the sparsity term is %.3g, %.0f times the KL's (%.3g): %s=%g suits a squared error, and a KL "
            "is hundreds of times smaller. Lower it, or leave objective out: the default, Objective.finetune(), has the "
            "scale of a squared error.",
            step,
            sparsity,
            sparsity / max(rest, 1e-12),
            rest,
            self._name,
            self._coefficient or 0,
        )
