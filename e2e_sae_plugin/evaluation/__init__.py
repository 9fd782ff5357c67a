"""Measuring SAEs: what they cost the model, which features matter, what their dictionaries look like."""

from e2e_sae_plugin.evaluation.bimodality import Bimodality as Bimodality
from e2e_sae_plugin.evaluation.bimodality import bimodality as bimodality
from e2e_sae_plugin.evaluation.cards import feature_cards as feature_cards
from e2e_sae_plugin.evaluation.estimate import Estimate as Estimate
from e2e_sae_plugin.evaluation.evaluate import evaluate as evaluate
from e2e_sae_plugin.evaluation.evaluate import evaluate_many as evaluate_many
from e2e_sae_plugin.evaluation.feature_card import ActivatingContext as ActivatingContext
from e2e_sae_plugin.evaluation.feature_card import FeatureCard as FeatureCard
from e2e_sae_plugin.evaluation.geometry import compare_dictionaries as compare_dictionaries
from e2e_sae_plugin.evaluation.geometry import match_features as match_features
from e2e_sae_plugin.evaluation.geometry import nearest_cosines as nearest_cosines
from e2e_sae_plugin.evaluation.importance import FeatureImportance as FeatureImportance
from e2e_sae_plugin.evaluation.importance import feature_importance as feature_importance
from e2e_sae_plugin.evaluation.metrics import SpliceMetrics as SpliceMetrics
from e2e_sae_plugin.evaluation.metrics import encode_with as encode_with
from e2e_sae_plugin.evaluation.metrics import measure as measure
from e2e_sae_plugin.evaluation.metrics import reconstruct_with as reconstruct_with
from e2e_sae_plugin.evaluation.result import Evaluation as Evaluation
from e2e_sae_plugin.evaluation.result import LayerMetrics as LayerMetrics
from e2e_sae_plugin.evaluation.tokens import MeasuredTokens as MeasuredTokens
from e2e_sae_plugin.evaluation.umap import umap_coordinates as umap_coordinates
