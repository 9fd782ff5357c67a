"""The model card: what a repository of SAEs says of them."""

from e2e_sae_plugin.hub.card.card import model_card as model_card
from e2e_sae_plugin.hub.card.entry import CardEntry as CardEntry
from e2e_sae_plugin.hub.card.figure import pareto_figure as pareto_figure
