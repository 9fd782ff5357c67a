"""The recipes of `quality.py`: who is compared, and what was tried on the way to ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STEP_TOKENS = 512
"""Of `quick_config`: four sequences of 128 tokens."""
SEARCH_SEED = 100
"""Not among the seeds that are compared, so that no recipe is chosen for what it does on those."""


@dataclass(frozen=True)
class Recipe:
    """What one run does, but for its seed."""

    name: str
    library: str
    """"ours" or "e2e-sae"."""
    settings: Mapping[str, Any]
    """As `quality_runs.run` takes them."""

    @property
    def tokens(self) -> int:
        """That are trained on."""
        return self.settings["training_tokens"]

    def with_tokens(self, tokens: int) -> Recipe:
        """The same for another number of tokens; its schedule stretches or shrinks with it."""
        return Recipe(self.name, self.library, {**self.settings, "training_tokens": tokens})


def ours(name: str, steps: int, **changes: Any) -> Recipe:
    """`e2e_sae_plugin.presets.quick_config` for so many steps' tokens, with what is changed of it."""
    return Recipe(name, "ours", {"training_tokens": steps * STEP_TOKENS, **changes})


def authors(name: str, lr: float, sparsity: float, tokens: int = 2_000_000) -> Recipe:
    """The authors' recipe with a learning rate and a sparsity coefficient (their lambda)."""
    return Recipe(name, "e2e-sae", {"training_tokens": tokens, "lr": lr, "sparsity": sparsity})


_RELU = {
    "architecture": "standard",
    "l1_warm_up_steps": 10,
    "normalize_activations": "expected_average_only_in",
}
_BATCH_TOPK = {"architecture": "batchtopk", "k": 40, "normalize_activations": "expected_average_only_in"}
_LOCAL: dict[str, Any] = {"objective": "local", "local_first": 0.0}
_KL: dict[str, Any] = {"objective": "e2e", "local_first": 0.0}
_DOWNSTREAM = {"kl": 1.0, "beta": 1e-4}

# Their sparsity coefficients, and the L1 coefficients of ours, are for an L0 of 40 at the end of just so many tokens.
PEER = authors("e2e-sae", lr=5e-4, sparsity=0.129)
PEER_TUNED = authors("e2e-sae-tuned", lr=4e-3, sparsity=0.092)

CONTESTANTS = {
    recipe.name: recipe
    for recipe in (
        PEER,
        PEER_TUNED,
        ours("ours-50", 50),
        ours("ours-200", 200),
        ours("ours-200-local", 200, **_LOCAL),
        ours("ours-400-relu-e2e", 400, **_KL, sae={**_RELU, "l1_coefficient": 0.018}),
        ours("ours-2000", 2000),
        ours("ours-2000-e2e", 2000, **_KL),
    )
}
"""The authors' recipe; their code with the learning rate that suits this model better; ours for so many steps' tokens, and
as a control its local part alone; their objective and architecture with our rate, step size and normalisation; and, for the
price, ours and the KL alone for a million tokens."""

SEARCH = (
    *(
        authors(f"e2e-sae, lr {lr:g}, lambda {sparsity:g}", lr, sparsity)
        for lr, sparsity in ((5e-4, 0.1), (2e-3, 0.07), (4e-3, 0.1))
    ),
    # How long.
    *(ours(f"{steps} steps", steps) for steps in (50, 100, 200, 400, 800)),
    # What of it.
    ours("200 steps, local alone", 200, **_LOCAL),
    ours("200 steps, KL alone", 200, **_KL),
    ours("200 steps, KL and downstream", 200, objective=_DOWNSTREAM, local_first=0.0),
    ours("200 steps, KL alone after 60 % local", 200, objective="e2e", local_first=0.6),
    ours("200 steps, KL and MSE after 60 % local", 200, local_first=0.6),
    ours("200 steps, BatchTopK, KL alone after 60 % local", 200, objective="e2e", local_first=0.6, sae=_BATCH_TOPK),
    ours("200 steps, ReLU, KL alone", 200, **_KL, sae={**_RELU, "l1_coefficient": 0.04}),
    ours("200 steps, local alone, b_dec at 0", 200, **_LOCAL, b_dec_init_method="zeros"),
    ours("200 steps, local alone, beta2 0.99", 200, **_LOCAL, adam_beta2=0.99),
    ours("200 steps, local alone, lr 5e-3", 200, **_LOCAL, lr=5e-3),
    ours("200 steps, local alone, lr 2e-2", 200, **_LOCAL, lr=2e-2),
    ours("400 steps of half the size, local alone", 200, **_LOCAL, step_sequences=2),
    ours("100 steps of twice the size, local alone", 200, **_LOCAL, step_sequences=8),
    # What the end of the run is for, where the local part is nearly at rest.
    ours("800 steps, KL alone after 80 % local", 800, objective="e2e", local_first=0.8),
    ours("800 steps, KL and downstream after 80 % local", 800, objective=_DOWNSTREAM, local_first=0.8),
    ours("800 steps, KL and MSE after 80 % local", 800, local_first=0.8),
    ours("950 steps", 950),
    ours("1250 steps, local alone", 1250, **_LOCAL),
)
"""Tried with one seed: each is `quick_config` but for what its name says."""

_STEPS = 1  # token_curve.py sets the tokens
_E2E_3E3: dict[str, Any] = {**_KL, "lr": 3e-3}

CURVES = {
    recipe.name: recipe
    for recipe in (
        ours("local", _STEPS, **_LOCAL),
        ours("e2e", _STEPS, **_E2E_3E3),
        ours("e2e+ds", _STEPS, objective=_DOWNSTREAM, local_first=0.0, lr=3e-3),
        ours("local then e2e", _STEPS, objective="e2e", local_first=0.6),
    )
}
"""The kinds of `token_curve.py`: the paper's three, and plain e2e that starts from 60 % of local training."""

E2E_SEARCH = (
    ours("e2e", _STEPS, **_E2E_3E3),
    *(ours(f"e2e, lr {lr:g}", _STEPS, **_KL, lr=lr) for lr in (1e-3, 6e-3, 1e-2)),
    ours("e2e, steps of twice the size", _STEPS, **_E2E_3E3, step_sequences=8),
    ours("e2e, steps of half the size", _STEPS, **_E2E_3E3, step_sequences=2),
    ours("e2e, b_dec at 0", _STEPS, **_E2E_3E3, b_dec_init_method="zeros"),
    ours("e2e, decoder norms kept", _STEPS, **_E2E_3E3, keep_decoder_norms=True),
    ours("e2e, gradients not clipped", _STEPS, **_E2E_3E3, max_grad_norm=None),
    *(ours(f"e2e+ds, lr {lr:g}", _STEPS, objective=_DOWNSTREAM, local_first=0.0, lr=lr) for lr in (3e-3, 6e-3, 1e-2)),
)
"""What plain e2e and e2e+ds were tried with, one setting changed at a time, at the shortest length of the curve."""
