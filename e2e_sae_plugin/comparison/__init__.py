"""SAEs side by side: Pareto fronts, pathways, geometry, the paper's findings, one report."""

from e2e_sae_plugin.comparison.compare import Comparison as Comparison
from e2e_sae_plugin.comparison.compare import compare as compare
from e2e_sae_plugin.comparison.findings import Finding as Finding
from e2e_sae_plugin.comparison.subjects import Subject as Subject
from e2e_sae_plugin.comparison.subjects import load_subjects as load_subjects
