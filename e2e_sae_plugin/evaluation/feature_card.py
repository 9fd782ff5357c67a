"""What a person looks at to judge one feature."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivatingContext:
    """A piece of text around one of a feature's highest activations."""

    tokens: tuple[str, ...]
    """The text of each token."""
    activations: tuple[float, ...]
    """The feature's activation at each of them; 0 where the SAE is not applied."""
    peak: int
    """Index of the token with the activation that the context was chosen for."""
    prompt: int | None = None
    """Which of the sequences `[n_prompts, pos]` it is from."""
    position: int | None = None
    """Where in that sequence the peak is."""


@dataclass(frozen=True)
class FeatureCard:
    """One feature of an SAE."""

    feature: int
    density: float
    """Share of the tokens that it fires on."""
    importance: float
    """Mean over all tokens of the KL that ablating it causes, in nats per token."""
    importance_is_exact: bool
    """False: the first-order estimate."""
    max_activation: float
    contexts: tuple[ActivatingContext, ...]
    """Highest first."""
    top_logits: tuple[tuple[str, float], ...]
    """Tokens that its decoder direction raises most, through the unembedding; highest first."""
    bottom_logits: tuple[tuple[str, float], ...]
    """Tokens that it lowers most; lowest first."""
    density_interval: tuple[float, float] | None = None
    """Wilson's 95% interval of the density, from the number of tokens; None if that is not known."""
