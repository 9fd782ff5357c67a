"""A comparison as a report: verdicts, tables, charts, feature cards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from e2e_sae_plugin.comparison.charts import (
    alive_chart,
    cosine_charts,
    layer_charts,
    pareto_charts,
    ratio_chart,
)
from e2e_sae_plugin.comparison.compare import Comparison, file_stem, mean_increase
from e2e_sae_plugin.comparison.dictionaries import Comparison1D
from e2e_sae_plugin.comparison.findings import ALIKE, E2E, E2E_DS, Finding, ratio
from e2e_sae_plugin.comparison.subjects import LOCAL, ordered_kinds
from e2e_sae_plugin.evaluation.result import Evaluation
from e2e_sae_plugin.hub.published import PublishedSAE, published, published_at
from e2e_sae_plugin.report import CardGroup, Report, Section, SummaryLine, Table, write_report
from e2e_sae_plugin.report.page import MARKDOWN_FILENAME
from e2e_sae_plugin.report.table import Cell

STATUS: dict[str, Literal["ok", "not"]] = {"confirmed": "ok", "not confirmed": "not"}
"""Of findings that are decided."""


def write_report_of(found: Comparison, folder: Path, title: str = "SAEs compared") -> dict[str, Path]:
    """Write `report.html`, `report.md`, `tables/*.csv` and `figures/*` of a comparison; the paths by name."""
    written = write_report(comparison_report(found, title), folder)
    for name, importance in found.importance.items():
        path = folder / "importance" / f"{file_stem(name)}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        importance.write_csv(path)
        written[f"importance/{path.name}"] = path
    return written


def report_in(folder: Path) -> str | None:
    """What the report in a folder is called, how many SAEs it is of and when it was written; None where there is none."""
    path = folder / MARKDOWN_FILENAME
    if not path.is_file():
        return None
    blocks = path.read_text(encoding="utf-8", errors="replace").split("\n\n", 2)
    saes = re.match(r"\d+ SAEs?\b", blocks[1]) if len(blocks) > 1 else None
    written = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
    title = blocks[0].removeprefix("# ").strip()
    return f'"{title}"{f" of {saes[0]}" if saes else ""} ({written:%Y-%m-%d %H:%M})'


def comparison_report(found: Comparison, title: str = "SAEs compared") -> Report:
    """The page. With one SAE alone, the parts that compare are left out."""
    first = found.evaluations[found.subjects[0].name]
    clean = first.value("ce_loss_without_sae")
    paper = published_at(found.subjects[0].sae.cfg.metadata.model_name, found.place.hook_name)
    kinds = ordered_kinds(found.subjects)
    several = len(found.subjects) > 1
    sections = [_overview(found, paper), _pathways(found), _features_section(found)]
    if several:
        sections.insert(2, _geometry(found))
    # The findings are about the paper's kinds: of others, such as before and after, there is nothing to say.
    findings = found.findings if len({LOCAL, E2E, E2E_DS} & set(kinds)) > 1 else ()
    if findings:
        sections.append(_findings(found))
    return Report(
        title=title,
        subtitle=f"{len(found.subjects)} SAE{'s' * several} on {found.place.hook_name} of "
        f"{found.subjects[0].sae.cfg.metadata.model_name or 'a model without a name'}, on {first.n_tokens:,} tokens in "
        f"{first.n_sequences:,} sequences{_of(first)}; clean CE loss {clean:.4f} nats per "
        "token. Brackets: 95 % intervals of a bootstrap over sequences.",
        summary=_summary(findings),
        sections=tuple(section for section in sections if section.charts or section.tables or section.card_groups),
        warnings=found.warnings,
        groups=tuple(kinds),
    )


def _of(first: Evaluation) -> str:
    """What the tokens are of."""
    text = "" if first.measured_on is None else str(first.measured_on)
    text = text if first.text is None or first.text in text else ", ".join(filter(None, (first.text, text)))
    return f" of {text}" if text else ""


def _summary(findings: Sequence[Finding]) -> tuple[SummaryLine, ...]:
    """The findings that are decided; where there is none, what that takes."""
    decided = tuple(
        SummaryLine(f"{each.title}: {each.verdict} here. The paper's claim: {each.claim}", STATUS[each.verdict])
        for each in findings
        if each.verdict in STATUS
    )
    if decided or not findings:
        return decided
    parts = [verdict for each in findings for _, verdict in each.parts]
    n_told = sum(verdict in STATUS for verdict in parts)
    text = "No finding of the paper can be told from these SAEs as a whole"
    text += f", but {n_told} of their {len(parts)} parts can: see the end. " if n_told else ". "
    text += (
        "That takes several sparsities of each kind (local, e2e and e2e+ds; of local and one of the others, parts can be "
        "told), and two seeds for the geometry. e2e-sae sweep trains such a set."
    )
    return (SummaryLine(text),)


def _findings(found: Comparison) -> Section:
    rows = tuple(
        (each.title, evidence.partition(": ")[0], evidence.partition(": ")[2])
        for each in found.findings
        for evidence in each.evidence
    )
    parts = tuple((each.title, part, verdict) for each in found.findings for part, verdict in each.parts)
    verdicts = Table("verdicts", "Part by part", "", ("finding", "part of the claim", "verdict"), parts)
    told = any(verdict in STATUS for _, _, verdict in parts)
    table = Table(
        "findings",
        "What they rest on",
        "",
        ("finding", "what was measured", "value [95 % interval]"),
        rows,
    )
    return Section(
        "The paper's findings",
        "What Braun et al. 2024 found on GPT2-small, put to the test on these SAEs. Ratios are geometric means along curves "
        "that are interpolated in logarithms, over the range that all curves cover. A part has a verdict where its 95 % "
        "interval lies on one side of the threshold.",
        tables=(verdicts, table) if told else (table,),
    )


def _overview(found: Comparison, paper: Sequence[PublishedSAE]) -> Section:
    tables = sae_tables(found)
    if ratios := _ratio_rows(found):
        tables.append(
            Table(
                "ratios",
                "At equal L0, and at equal CE loss increase",
                "Over the local SAEs' value; below 1 is better.",
                (
                    "kind",
                    "CE loss increase at equal L0",
                    "range of L0",
                    "alive features at equal CE",
                    "range of CE",
                ),
                ratios,
                {"CE loss increase at equal L0": "{:.3f}", "alive features at equal CE": "{:.3f}"},
            )
        )
    if paper:
        tables.append(
            Table(
                "paper",
                "The paper's SAEs at this hook",
                published()["source"],
                ("kind", "lambda", "L0", "alive", "CE loss increase"),
                tuple((p.kind, p.sparsity_coefficient, p.l0, p.alive, p.ce_loss_increase) for p in paper),
            )
        )
    charts = pareto_charts(found, paper) if len(found.subjects) > 1 or paper else ()
    return Section("How much each keeps", charts=(*charts, alive_chart(found)), tables=tuple(tables))


def sae_tables(found: Comparison) -> list[Table]:
    """Every SAE's costs, agreement and reconstruction: several, as the columns of one would not fit a laptop."""
    ordered = [each for kind in ordered_kinds(found.subjects) for each in found.subjects if each.kind == kind]

    def table(name: str, title: str, caption: str, metrics: dict[str, tuple[str, str]], **more: list[Cell]) -> Table:
        rows = [
            (
                each.name,
                each.kind,
                *(found.evaluations[each.name].metrics.get(metric) for metric, _ in metrics.values()),
            )
            for each in ordered
        ]
        rows = [(*row, *(column[i] for column in more.values())) for i, row in enumerate(rows)]
        forms = {column: form for column, (_, form) in metrics.items() if form}
        return Table(name, title, caption, ("SAE", "kind", *metrics, *more), tuple(rows), forms)

    quantiles = [found.evaluations[each.name].l0_quantiles((0.05, 0.5, 0.95)).values() for each in ordered]
    rarest = max(each.rarest_seen for each in found.evaluations.values())
    costs = {
        "CE loss increase": ("ce_loss_increase", "{:+.4f}"),
        "KL": ("kl", "{:.4f}"),
        "L0": ("l0", "{:.1f}"),
    }
    agreement = {
        "CE recovered (zero)": ("ce_loss_recovered_zero", "{:.3f}"),
        "CE recovered (mean)": ("ce_loss_recovered_mean", "{:.3f}"),
        "top-1 agreement": ("top1_agreement", "{:.3f}"),
        "statistical distance": ("statistical_distance", "{:.3f}"),
    }
    variance = {
        "explained variance": ("explained_variance", "{:.3f}"),
        "explained variance per token": ("explained_variance_per_token", "{:.3f}"),
        "MSE": ("mse", ""),
    }
    return [
        table(
            "saes",
            "Every SAE",
            "L0 also as the 5 %, 50 % and 95 % quantiles over tokens; alive: features that fire at least once on these; the "
            f"others fire on fewer than 1 in {1 / rarest:,.0f} tokens (95 %).",
            costs,
            **{
                "L0 5/50/95 %": ["/".join(map(str, each)) for each in quantiles],
                "alive": [found.evaluations[each.name].n_alive for each in ordered],
            },
        ),
        table(
            "agreement",
            "Every SAE: agreement with the model",
            "CE loss recovered: 1 is the model itself, 0 is zero or mean ablation. The distance is that of the predictions.",
            agreement,
        ),
        table(
            "reconstruction",
            "Every SAE: reconstruction",
            "Explained variance as a ratio of means, and as the mean over tokens of ratios.",
            variance,
        ),
    ]


def _ratio_rows(found: Comparison) -> tuple[tuple[Cell, ...], ...]:
    rows: list[tuple[Cell, ...]] = []
    for kind in ordered_kinds(found.subjects):
        if kind == LOCAL:
            continue
        increase = ratio(found.subjects, found.evaluations, kind, "ce_loss_increase", "l0")
        alive = ratio(found.subjects, found.evaluations, kind, "alive", "ce_loss_increase")
        if increase is not None or alive is not None:
            rows.append(
                (
                    kind,
                    None if increase is None else increase.estimate,
                    None if increase is None else "{:.3g} to {:.3g}".format(*increase.x_range),
                    None if alive is None else alive.estimate,
                    None if alive is None else "{:.3g} to {:.3g}".format(*alive.x_range),
                )
            )
    return tuple(rows)


def _pathways(found: Comparison) -> Section:
    rows: list[tuple[Cell, ...]] = []
    token_rows: list[tuple[Cell, ...]] = []
    length_rows: list[tuple[Cell, ...]] = []
    for kind, setting in found.matched.items():
        for each in found.groups[kind, setting]:
            evaluation = found.evaluations[each.name]
            for hook, layer in evaluation.layers.items():
                rows.append(
                    (each.name, kind, hook, layer.mse, layer.explained_variance, layer.layernorm_explained_variance)
                )
                per_token = layer.explained_variance_per_token, layer.layernorm_explained_variance_per_token
                token_rows.append((each.name, kind, hook, *per_token))
            lengths = (evaluation.metrics.get(f"l2_ratio_{where}") for where in ("position_0", "later"))
            length_rows.append((each.name, kind, *lengths))
    variance, normalised = "explained variance", "after LayerNorm"
    forms = {variance: "{:.3f}", normalised: "{:.3f}"}
    tables = (
        Table(
            "layers",
            "By layer",
            "Explained variance is 1 - mean squared error / variance.",
            ("SAE", "kind", "hook", "MSE", variance, normalised),
            tuple(rows),
            forms,
        ),
        Table(
            "layers_per_token",
            "Explained variance by layer, per token",
            "Mean over tokens of 1 - squared error / squared distance from the mean, as in the paper's figure 12.",
            ("SAE", "kind", "hook", variance, normalised),
            tuple(token_rows),
            forms,
        ),
        Table(
            "l2_ratios",
            "Length of the reconstruction",
            "",
            ("SAE", "kind", "L2 ratio at position 0", "L2 ratio later"),
            tuple(length_rows),
            {"L2 ratio at position 0": "{:.3f}", "L2 ratio later": "{:.3f}"},
        ),
    )
    matched = ", ".join(
        f"{kind} at {setting} ({mean_increase(found.groups[kind, setting], found.evaluations):.3g} nats)"
        for kind, setting in found.matched.items()
    )
    increases = [
        mean_increase(found.groups[kind, setting], found.evaluations) for kind, setting in found.matched.items()
    ]
    text = f"Shown are the SAEs whose CE loss increases are most alike: {matched}." if len(found.matched) > 1 else ""
    if max(increases) > ALIKE * min(increases):
        text += (
            " They are not alike, and what differs here may be due to that: train at sparsities of similar increases."
        )
    return Section("By the same pathway?", text, charts=(*layer_charts(found), ratio_chart(found)), tables=tables)


def _geometry(found: Comparison) -> Section:
    rows: list[tuple[Cell, ...]] = []
    mode_rows: list[tuple[Cell, ...]] = []
    for (kind, setting), geometry in found.geometry.items():
        for what, label in (("within", "within an SAE"), ("cross_seed", "across seeds"), ("cross_type", "to local")):
            each: Comparison1D | None = getattr(geometry, what)
            if each is None:
                continue
            test = each.bimodality
            rows.append(
                (
                    kind,
                    setting,
                    label,
                    each.summary.n,
                    each.summary.mean,
                    each.summary.median,
                    each.summary.share_near,
                    each.matched_cosine,
                )
            )
            if test is not None:
                modes = (*test.modes, test.weights[1]) if test.is_bimodal else (None, None, None)
                mode_rows.append((kind, setting, label, test.dip, test.p_value, *modes))
    columns = (
        "kind", "setting", "neighbours", "features", "mean cosine", "median", "above 0.9", "one to one",
    )  # fmt: skip
    caption = (
        "Cosines of nearest neighbours; above 0.9: share of features with one that near; one to one: mean cosine of the "
        "best one-to-one matching."
    )
    forms: dict[str, str] = dict.fromkeys(columns[4:], "{:.3f}")
    tables = [Table("geometry", "Geometry of the dictionaries", caption, columns, tuple(rows), forms)]
    if mode_rows:
        columns = ("kind", "setting", "neighbours", "dip", "p", "lower mode", "upper mode", "share of the upper")
        caption = (
            "Hartigan's dip test of these cosines against a single mode. Where it rejects that (p < 0.05), the two that a "
            "mixture of Gaussians finds."
        )
        forms = dict.fromkeys(columns[3:], "{:.3f}")
        tables.append(Table("modes", "One kind of features, or two?", caption, columns, tuple(mode_rows), forms))
    return Section(
        "The same features?",
        "Cosine similarities of decoder directions of alive features. Here, intervals are of a bootstrap over features.",
        charts=cosine_charts(found),
        tables=tuple(tables),
    )


def _features_section(found: Comparison) -> Section:
    groups = tuple(CardGroup(name, cards) for name, cards in found.cards.items() if cards)
    return Section(
        "Most important features",
        "Importance is the KL that ablating the feature causes, in nats per token over all tokens. The ranking of all "
        "features is in importance/.",
        card_groups=groups,
    )
