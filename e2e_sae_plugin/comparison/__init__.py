"""SAEs side by side: Pareto fronts, pathways, geometry, the paper's findings, one report."""

from __future__ import annotations

from pathlib import Path

from e2e_sae_plugin.comparison.compare import Comparison as Comparison
from e2e_sae_plugin.comparison.compare import compare as compare
from e2e_sae_plugin.comparison.findings import Finding as Finding
from e2e_sae_plugin.comparison.subjects import Subject as Subject
from e2e_sae_plugin.comparison.subjects import load_subjects as load_subjects


def write_comparison(found: Comparison, folder: str | Path, title: str = "SAEs compared") -> dict[str, Path]:
    """Write `report.html` (one file, works offline), `report.md`, `tables/*.csv`, `figures/*.svg` and `*.png` and
    `importance/*.csv` of a comparison; the paths by name."""
    from e2e_sae_plugin.comparison.report import write_report_of  # plotly and matplotlib are for those who draw

    return write_report_of(found, Path(folder), title)
