"""What is minimised: the weights of the KL, downstream and local terms, and where the downstream terms are measured.

No postponed annotations here: the command line reads the types of this class (simple-parsing).
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from e2e_sae_plugin.config_values import read_fields

MatryoshkaLevels = Literal["all", "sampled"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A weighted sum of three terms; sparsity stays in the SAE's own config.

        kl * D_KL(y || y_hat)
          + beta / (L - l) * sum_k ||a_hat^(k) - a^(k)||^2
          + mse * ||a^(l) - SAE(a^(l))||^2
          + sparsity, as the architecture defines it

    Squared norms are summed over features and averaged, like the KL, over the tokens that are trained on (Braun et al.
    2024, arXiv 2405.12241, section 2). Only the SAE gets a gradient, through blocks `l ... L` of the frozen model.

    Raises:
        ValueError: a weight is negative or not finite, all three are zero, downstream hooks are given without
            `beta`, `matryoshka_levels` is not one of its choices, `balance_kl` has no KL, or downstream terms, beside it,
            or `kl_positions` or `kl_top_k` is out of range or has no KL to approximate.
    """

    kl: float = 1.0
    """Weight of `D_KL(y || y_hat)`, in nats per token, clean model first."""

    beta: float = 0.0
    """The paper's beta: weight of the downstream reconstruction, before the division by `L - l`."""

    mse: float = 0.0
    """Weight of the local reconstruction error at the SAE (SAELens's `mse_loss`, in the SAE's normalised space)."""

    downstream_hooks: tuple[str, ...] | None = None
    """Hook names of the downstream terms. None: the residual stream entering every later block (method's default)."""

    auxiliary: float | None = None
    """Weight of the architecture's own reconstruction-like extras (`auxiliary_reconstruction_loss` of TopK, BatchTopK,
    Matryoshka and Gated). None: 1 with `balance_kl`, else `mse` where that is positive, as in SAELens; otherwise the
    extras are rescaled at each step, without gradient, to the share of the objective given by
    `architectures.DEFAULT_AUXILIARY_SHARE` (they are squared errors, hundreds of times a KL)."""

    matryoshka_levels: MatryoshkaLevels = "all"
    """Inner Matryoshka levels that get the objective at each step: `all`, or one `sampled` level weighted by their
    number (an unbiased estimate for the price of one more spliced pass)."""

    balance_kl: bool = False
    """Multiply the KL, at every step and without gradient, by `MSE / KL`: it then weighs as much as the squared error, and
    learning rates and sparsity coefficients that suit the latter keep their meaning (Karvonen 2025, arXiv 2503.17272)."""

    kl_positions: float = 1.0
    """Share, above 0 and up to 1, of the trained positions that the KL is computed on. Below 1, an approximation: a random
    subset drawn anew at each step (at least one position of each micro-batch), whose mean is an unbiased estimate of the KL
    and of its gradient. The model's blocks run on all positions; what is saved is the unembedding. Metrics on held-out
    tokens are exact."""

    kl_top_k: int | None = None
    """None for the exact KL. A number, 2 or more, for an approximation: the KL of both distributions renormalised over that
    many of the clean model's likeliest tokens, which is also what `kl_loss` then logs. It takes a linear unembedding, with
    or without scale and soft cap. Metrics on held-out tokens are exact."""

    def __post_init__(self) -> None:
        read_fields(self, "Objective.")
        for name in ("kl", "beta", "mse", "auxiliary"):
            value = getattr(self, name)
            if value is None:  # auxiliary alone
                continue
            if not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"Objective.{name} must be a finite weight >= 0, got {value!r}. Set it to 0 to leave the term out."
                )
        if self.kl == self.beta == self.mse == 0:
            raise ValueError(
                "Objective has kl, beta and mse all 0, so nothing would be reconstructed. "
                "Expected at least one positive weight, for instance Objective.e2e()."
            )
        if self.downstream_hooks is not None:
            self._check_downstream_hooks()
        if self.balance_kl and (self.kl == 0 or self.beta > 0):
            raise ValueError(
                f"Objective.balance_kl scales the KL to the squared error, so it needs kl > 0 and beta = 0; got "
                f"kl={self.kl!r}, beta={self.beta!r}. Leave it out, or change the weights."
            )
        if self.matryoshka_levels not in ("all", "sampled"):
            raise ValueError(f"Objective.matryoshka_levels must be 'all' or 'sampled', got {self.matryoshka_levels!r}.")
        self._check_approximations()

    def _check_approximations(self) -> None:
        share, k = self.kl_positions, self.kl_top_k
        if not 0 < share <= 1:
            raise ValueError(
                f"Objective.kl_positions must be a share of the positions, above 0 and up to 1, got {share!r}. Leave it at "
                "1 for the KL on all of them, or set kl=0 to leave the term out."
            )
        if k is not None and k < 2:
            raise ValueError(
                f"Objective.kl_top_k must be a whole number of tokens of the vocabulary, 2 or more (one alone has "
                f"probability 1 in every model), got {k!r}. Leave it at None for the exact KL."
            )
        for name, value, is_set in (("kl_positions", share, share != 1), ("kl_top_k", k, k is not None)):
            if is_set and self.kl == 0:
                raise ValueError(
                    f"Objective.{name} is set to {value!r} but kl is 0, so it would have no effect. Give kl a positive "
                    f"weight or drop {name}."
                )

    def _check_downstream_hooks(self) -> None:
        hooks = self.downstream_hooks or ()
        if not hooks:
            raise ValueError(
                "Objective.downstream_hooks is empty. Leave it None for the default, the residual stream entering "
                "every later block, or set beta=0 to leave the term out."
            )
        if len(set(hooks)) != len(hooks):
            raise ValueError(f"Objective.downstream_hooks names a hook twice: {list(hooks)}.")
        if self.beta == 0:
            raise ValueError(
                f"Objective.downstream_hooks is set to {list(hooks)} but beta is 0, so it would have no effect. "
                "Give beta a positive weight or drop the hooks."
            )

    @classmethod
    def local(cls, mse: float = 1.0, **settings: Any) -> Self:
        """SAELens's own objective: the reconstruction error at the SAE, nothing of the model's output."""
        return cls(**{"kl": 0.0, "mse": mse, **settings})

    @classmethod
    def e2e(cls, kl: float = 1.0, **settings: Any) -> Self:
        """The paper's end-to-end objective: the KL alone."""
        return cls(**{"kl": kl, **settings})

    @classmethod
    def e2e_downstream(cls, beta: float, kl: float = 1.0, **settings: Any) -> Self:
        """The paper's e2e + downstream objective. `beta` depends on the model's activation norms and has no default
        (the paper's runs on GPT2-small: kl=0.5 and beta 0.0036, 0.0039 and 0.00013 at layers 2, 6 and 10)."""
        return cls(**{"kl": kl, "beta": beta, **settings})

    @classmethod
    def finetune(cls, **settings: Any) -> Self:
        """The objective of a short fine-tune of a finished SAE: `0.5 * (alpha * KL + MSE)` with `alpha = MSE / KL`, without
        gradient, at every step; sparsity and auxiliary terms as in local training, at weight 1 (Karvonen 2025, arXiv
        2503.17272)."""
        return cls(**{"kl": 0.5, "mse": 0.5, "balance_kl": True, **settings})

    @property
    def kind(self) -> str:
        """What tables and charts call it: `kind_of_weights`."""
        return kind_of_weights(self.kl, self.beta, self.mse)

    @property
    def needs_spliced_pass(self) -> bool:
        """Whether the model has to be run a second time, with the reconstruction in place."""
        return self.kl > 0 or self.beta > 0

    @property
    def approximations(self) -> tuple[str, ...]:
        """What of the KL is approximated in training, in words, as cards and tables state it; none where it is exact."""
        said: list[str] = []
        if self.kl_positions < 1:
            said.append(f"KL on {100 * self.kl_positions:.3g} % of the positions, drawn at each step")
        if self.kl_top_k is not None:
            said.append(
                f"KL over the clean model's {self.kl_top_k} likeliest tokens, both distributions renormalised over them"
            )
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready fields; `from_dict` reads them back."""
        return {**asdict(self), "downstream_hooks": self.downstream_hooks and list(self.downstream_hooks)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | str) -> Self:
        """Read `to_dict`'s output, or the name of a constructor that needs no argument (`"local"`, `"e2e"`,
        `"finetune"`).

        Raises:
            ValueError: an unknown key or name (near matches are suggested), or a value that the class refuses.
        """
        if isinstance(settings, str):
            named = {"local": cls.local, "e2e": cls.e2e, "finetune": cls.finetune}
            if settings not in named:
                raise ValueError(
                    f"objective {settings!r} is not known. Expected 'local', 'e2e', 'finetune', or the fields "
                    f"{[f.name for f in fields(cls)]} as a mapping; e2e+ds, for instance, is {{kl: 1, beta: 0.004}}, with a "
                    "beta for your model."
                )
            return named[settings]()
        known = {f.name for f in fields(cls)}
        for key in settings:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"objective has an unknown key {key!r}. Expected some of {sorted(known)}.{hint}")
        return cls(**settings)


def kind_of_weights(kl: float, beta: float, mse: float) -> str:
    """The paper's name of an objective with such weights: "local", "e2e", "e2e+ds"; of a mixture all its terms, as in
    "e2e+mse"."""
    if not kl and not beta:
        return "local"
    return "+".join(["e2e"] * bool(kl) + ["ds"] * bool(beta) + ["mse"] * bool(mse))
