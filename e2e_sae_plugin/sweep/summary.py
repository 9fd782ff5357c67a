"""`sweep.csv`: every SAE of a sweep, of all its parts, with its held-out metrics."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e_sae_plugin.checkpoint.folder import write_whole
from e2e_sae_plugin.metrics_log import METRICS_FILENAME
from e2e_sae_plugin.output_folder import is_finished
from e2e_sae_plugin.report.table import Table
from e2e_sae_plugin.sweep.config import SideBySide
from e2e_sae_plugin.sweep.member import FAILURE_FILENAME

SUMMARY_FILENAME = "sweep.csv"
COLUMNS = ("ce_loss_increase", "held_out_kl", "held_out_l0", "held_out_explained_variance")


def write_summary(cfg: SideBySide) -> None:
    """Write it anew, from what lies in the SAEs' folders.

    Raises:
        OSError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["name", "kind", "sparsity", "seed", "hook_name", "status", *COLUMNS])
    for name, member in cfg.members().items():
        folder = Path(str(member.config.output_path))
        failed = (folder / FAILURE_FILENAME).exists()
        status = "finished" if is_finished(folder) else "failed" if failed else "not finished"
        values = _last_evaluation(folder) if status == "finished" else {}
        figures = [values.get(f"metrics/{column}", "") for column in COLUMNS]
        writer.writerow([name, member.kind, member.sparsity, member.seed, member.hook_name, status, *figures])
    Path(cfg.output_path).mkdir(parents=True, exist_ok=True)
    write_whole(Path(cfg.output_path) / SUMMARY_FILENAME, text.getvalue())


def read_summary(cfg: SideBySide) -> list[dict[str, str]]:
    """Its rows, as `write_summary` wrote them."""
    with (Path(cfg.output_path) / SUMMARY_FILENAME).open(newline="") as file:
        return list(csv.DictReader(file))


def summary_table(rows: Sequence[dict[str, str]]) -> Table:
    """What a person looks at first."""
    metrics = {"CE loss increase": "ce_loss_increase", "KL": "held_out_kl", "L0": "held_out_l0"}
    cells = [
        (
            row["name"],
            row["kind"],
            *(float(row[column]) if row[column] else None for column in metrics.values()),
            row["status"],
        )
        for row in rows
    ]
    return Table("sweep", "The sweep", "Held out.", ("SAE", "kind", *metrics, "status"), tuple(cells))


def _last_evaluation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    path = folder / METRICS_FILENAME
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        if "metrics/ce_loss_increase" in entry:
            found = entry
    return found
