"""One SAE of a model card: what its metadata, its run and its measurements say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.result import Evaluation
from e2e_sae_plugin.hub.card.text import is_local_path
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.report.text import is_finite

NOT_OF_THE_MODEL = ("cache_dir", "device", "force_download", "local_files_only", "token", "use_auth_token")
HELD_OUT_NAMES = {
    "ce_loss_increase": "metrics/ce_loss_increase",
    "ce_loss_with_sae": "metrics/ce_loss_with_sae",
    "kl": "metrics/held_out_kl",
    "l0": "metrics/held_out_l0",
    "explained_variance": "metrics/held_out_explained_variance",
    "mse": "metrics/held_out_mse",
}
"""What the log of a run calls the metrics of `evaluation.result.LABELS`."""
MAIN_METRICS = (
    "ce_loss_increase", "kl", "top1_agreement", "l0", "explained_variance", "mse", "ce_loss_recovered_zero",
)  # fmt: skip
"""What is shown of many SAEs, of all in `LABELS`."""
HELD_OUT_DOWNSTREAM = "metrics/held_out_downstream_mse/"


@dataclass(frozen=True)
class CardEntry:
    """One SAE of the repository that a card describes."""

    sae_id: str
    """Its folder in the repository."""
    cfg: Mapping[str, Any]
    """Its `cfg.json`."""
    run: Mapping[str, Any] | None = None
    """Its `e2e_runner_cfg.json`, if there is one."""
    evaluation: Evaluation | None = None
    """What `evaluate` found, if it was measured."""
    held_out: Mapping[str, float] | None = None
    """The last held-out evaluation in the run's `metrics.jsonl`, under the names of the log."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The SAE's metadata; empty where there are none."""
        return _mapping(self.cfg.get("metadata"))

    @property
    def model_settings(self) -> dict[str, Any]:
        """The model's keyword arguments, without those that mean nothing on another machine or in another account."""
        said = _mapping(self.metadata.get("model_from_pretrained_kwargs"))
        return {
            str(name): value
            for name, value in said.items()
            if name not in NOT_OF_THE_MODEL and not (isinstance(value, str) and is_local_path(value))
        }

    @property
    def objective(self) -> Objective | None:
        """What was minimised; None for an SAE whose metadata name no objective that can be read (SAELens's own)."""
        said = self.metadata.get("objective")
        if not isinstance(said, Mapping):
            return None
        known = {field.name for field in fields(Objective)}
        try:
            return Objective.from_dict({name: value for name, value in said.items() if name in known})
        except (ValueError, TypeError):
            return None

    @property
    def kind(self) -> str | None:
        """As a sweep or a conversion calls it, else from the objective: "local", "e2e", "e2e+ds", "e2e+mse", ..."""
        if self.metadata.get("kind"):
            return str(self.metadata["kind"])
        return None if self.objective is None else self.objective.kind

    @property
    def is_end_to_end(self) -> bool:
        """Whether the model's output, or its later layers, are part of the objective."""
        return self.objective is not None and self.objective.needs_spliced_pass

    @property
    def authors_norm(self) -> float:
        """The p of the sparsity term of a run of the paper's authors' library; 1 where nothing else is said."""
        loss = _mapping(_mapping(self.metadata.get("authors_config")).get("loss"))
        said = _mapping(loss.get("sparsity")).get("p_norm")
        return float(said) if is_finite(said) else 1.0

    @property
    def architecture(self) -> str:
        """The architecture that is loaded."""
        return str(self.cfg.get("architecture") or "unknown")

    @property
    def training_architecture(self) -> str:
        """The architecture that was trained (BatchTopK is saved as JumpReLU)."""
        said = self.metadata.get("training_architecture") or _mapping((self.run or {}).get("sae")).get("architecture")
        return str(said or self.architecture)

    @property
    def training_settings(self) -> dict[str, Any]:
        """Settings of the SAE that count in training alone, such as its sparsity coefficient."""
        details = _mapping(self.metadata.get("training_architecture_details"))
        run = _mapping((self.run or {}).get("sae"))
        k = {"k": self.cfg["k"]} if "k" in self.cfg else {}
        return {**k, **details, **{n: v for n, v in run.items() if n in details or n not in (*self.cfg, "metadata")}}

    @property
    def training_normalisation(self) -> str | None:
        """How the activations were normalised in training; it is folded into the finished weights. None: not at all."""
        said = _mapping((self.run or {}).get("sae")).get("normalize_activations")
        return None if said in (None, "none") else str(said)

    def measured(self, name: str) -> Estimate | float | None:
        """A metric of `LABELS`: with its interval from the evaluation, else from the run's own held-out evaluation."""
        if self.evaluation is not None:
            return self.evaluation.metrics.get(name)
        value = (self.held_out or {}).get(HELD_OUT_NAMES.get(name, ""))
        return float(value) if is_finite(value) else None

    def point(self, name: str) -> float | None:
        """`measured` without its interval; None where it is not finite."""
        value = self.measured(name)
        value = value.value if isinstance(value, Estimate) else value
        return float(value) if is_finite(value) else None

    @property
    def clean_ce_loss(self) -> float | None:
        """CE loss of the model without the SAE, where the metrics were measured: it tells one text from another."""
        if self.evaluation is not None:
            value = self.evaluation.value("ce_loss_without_sae")
        else:
            value = (self.held_out or {}).get("metrics/ce_loss_without_sae")
        return float(value) if is_finite(value) else None

    @property
    def alive(self) -> int | None:
        """Features that fire: on the tokens of the evaluation, else at the end of a run that was long enough to tell."""
        if self.evaluation is not None:
            return self.evaluation.n_alive
        dead, d_sae = self.metadata.get("num_dead_features"), self.cfg.get("d_sae")
        window, n_steps = (self.run or {}).get("dead_feature_window"), self._n_steps
        # SAELens counts a feature as dead after more than `window` steps without firing: before, none can be.
        if not isinstance(window, int) or n_steps is None or n_steps <= window:
            return None
        return d_sae - dead if isinstance(dead, int) and isinstance(d_sae, int) else None

    @property
    def _n_steps(self) -> int | None:
        """Steps of the run."""
        run = self.run or {}
        n_tokens, per_step = run.get("training_tokens"), run.get("train_batch_size_tokens")
        if not isinstance(n_tokens, int) or not isinstance(per_step, int) or per_step < 1:
            return None
        if run.get("patience_evaluations") is None:
            return n_tokens // per_step
        # It may have stopped at an evaluation, which then is its last.
        last = (self.held_out or {}).get("step")
        return min(n_tokens // per_step, int(last)) if is_finite(last) else None

    @property
    def downstream_mse(self) -> dict[str, float]:
        """The error at each later hook."""
        if self.evaluation is not None:
            return {hook: estimate.value for hook, estimate in self.evaluation.downstream_mse().items()}
        return {
            name.removeprefix(HELD_OUT_DOWNSTREAM): float(value)
            for name, value in (self.held_out or {}).items()
            if name.startswith(HELD_OUT_DOWNSTREAM)
        }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
