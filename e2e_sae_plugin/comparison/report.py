"""A comparison as a report: verdicts, tables, charts, feature cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from e2e_sae_plugin.comparison.charts import (
    alive_chart,
    cosine_charts,
    layer_charts,
    pareto_charts,
    ratio_chart,
    short_hook,
)
from e2e_sae_plugin.comparison.compare import Comparison
from e2e_sae_plugin.comparison.dictionaries import Comparison1D
from e2e_sae_plugin.comparison.findings import ratio
from e2e_sae_plugin.comparison.published import PublishedSAE, published, published_at
from e2e_sae_plugin.comparison.subjects import LOCAL, ordered_kinds
from e2e_sae_plugin.report import CardGroup, Report, Section, SummaryLine, Table, write_report
from e2e_sae_plugin.report.table import Cell

STATUS = {"confirmed": "ok", "not confirmed": "not", "cannot be told": "unclear"}


def write_comparison(found: Comparison, folder: Path, title: str = "SAEs compared") -> dict[str, Path]:
    """Write `report.html`, `report.md`, `tables/*.csv` and `figures/*` of a comparison; the paths by name."""
    written = write_report(comparison_report(found, title), folder)
    for name, importance in found.importance.items():
        path = folder / "importance" / f"{name.replace('/', '-').replace(':', '-')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        importance.write_csv(path)
        written[f"importance/{path.name}"] = path
    return written


def comparison_report(found: Comparison, title: str = "SAEs compared") -> Report:
    """The page. With one SAE alone, the parts that compare are left out."""
    first = found.evaluations[found.subjects[0].name]
    clean = first.value("ce_loss_without_sae")
    paper = published_at(found.subjects[0].sae.cfg.metadata.model_name, found.place.hook_name)
    kinds = ordered_kinds(found.subjects)
    several = len(found.subjects) > 1
    summary = [
        SummaryLine(f"{each.title}: {each.verdict}. {each.claim}", STATUS[each.verdict])  # pyright: ignore[reportArgumentType]
        for each in found.findings
        if len(kinds) > 1 and each.verdict != "cannot be told"
    ]
    sections = [_overview(found, paper), _pathways(found), _features_section(found)]
    if several:
        sections.insert(2, _geometry(found))
    if len(kinds) > 1:
        sections.insert(0, _findings(found))
    return Report(
        title=title,
        subtitle=f"{len(found.subjects)} SAE{'s' * several} on {found.place.hook_name} of "
        f"{found.subjects[0].sae.cfg.metadata.model_name or 'a model without a name'}, on {first.n_tokens:,} tokens in "
        f"{first.n_sequences:,} sequences; clean CE loss {clean:.4f} nats per token. Brackets: 95 % intervals of a "
        "bootstrap over sequences.",
        summary=tuple(summary),
        sections=tuple(section for section in sections if section.charts or section.tables or section.card_groups),
        warnings=found.warnings,
        groups=tuple(kinds),
    )


def _findings(found: Comparison) -> Section:
    rows = tuple(
        (each.title, each.verdict, evidence.partition(": ")[0], evidence.partition(": ")[2])
        for each in found.findings
        for evidence in each.evidence
    )
    text = "\n\n".join(f"{each.title}. {each.claim} Verdict: {each.verdict}." for each in found.findings)
    table = Table(
        "findings",
        "The paper's findings",
        "",
        ("finding", "verdict", "what was measured", "value [95 % interval]"),
        rows,
    )
    return Section(
        "The paper's three findings",
        "What Braun et al. 2024 found on GPT2-small, put to the test on these SAEs. Ratios are geometric means along curves "
        "that are interpolated in logarithms, over the range that all curves cover.\n\n" + text,
        tables=(table,),
    )


def _overview(found: Comparison, paper: Sequence[PublishedSAE]) -> Section:
    metrics = {
        "CE loss increase": ("ce_loss_increase", "{:+.4f}"),
        "KL": ("kl", "{:.4f}"),
        "L0": ("l0", "{:.1f}"),
        "CE recovered (zero)": ("ce_loss_recovered_zero", "{:.4f}"),
        "CE recovered (mean)": ("ce_loss_recovered_mean", "{:.4f}"),
        "top-1 agreement": ("top1_agreement", "{:.3f}"),
        "statistical distance": ("statistical_distance", "{:.3f}"),
        "explained variance": ("explained_variance", "{:.3f}"),
        "explained variance per token": ("explained_variance_per_token", "{:.3f}"),
    }
    rows = []
    for kind in ordered_kinds(found.subjects):
        for each in found.subjects:
            if each.kind != kind:
                continue
            evaluation = found.evaluations[each.name]
            values = [evaluation.metrics.get(name) for name, _ in metrics.values()]
            quantiles = evaluation.l0_quantiles((0.05, 0.5, 0.95))
            rows.append(
                (
                    each.name,
                    kind,
                    *values[:3],
                    "/".join(str(q) for q in quantiles.values()),
                    evaluation.n_alive,
                    *values[3:],
                )
            )
    names = list(metrics)
    columns = ("SAE", "kind", *names[:3], "L0 5/50/95 %", "alive", *names[3:])
    tables = [Table("saes", "Every SAE", "", columns, tuple(rows), {name: form for name, (_, form) in metrics.items()})]
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
    return Section("How much of the model each keeps", charts=(*charts, alive_chart(found)), tables=tuple(tables))


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
                    None if increase is None else "{:.0f} to {:.0f}".format(*increase.x_range),
                    None if alive is None else alive.estimate,
                    None if alive is None else "{:.3f} to {:.3f}".format(*alive.x_range),
                )
            )
    return tuple(rows)


def _pathways(found: Comparison) -> Section:
    rows = []
    for kind, setting in found.matched.items():
        for each in found.groups[kind, setting]:
            evaluation = found.evaluations[each.name]
            for hook, layer in evaluation.layers.items():
                rows.append((each.name, kind, short_hook(hook), *vars(layer).values()))
            ratios = [evaluation.metrics.get(f"l2_ratio_{where}") for where in ("position_0", "later")]
            rows[-len(evaluation.layers)] += tuple(ratios)
            for i in range(1, len(evaluation.layers)):
                rows[i - len(evaluation.layers)] += (None, None)
    columns = (
        "SAE", "kind", "hook", "MSE", "explained variance", "explained variance per token",
        "after LayerNorm", "after LayerNorm, per token", "L2 ratio at position 0", "L2 ratio later",
    )  # fmt: skip
    table = Table("layers", "By layer", "", columns, tuple(rows))
    matched = ", ".join(f"{kind} at {setting}" for kind, setting in found.matched.items())
    text = f"The SAEs whose CE loss increase is most alike: {matched}." if len(found.matched) > 1 else ""
    return Section("By the same pathway?", text, charts=(*layer_charts(found), ratio_chart(found)), tables=(table,))


def _geometry(found: Comparison) -> Section:
    rows = []
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
                    None if test is None else test.p_value,
                    "" if test is None or not test.is_bimodal else " and ".join(f"{m:.2f}" for m in test.modes),
                )
            )
    columns = (
        "kind", "setting", "nearest neighbours", "features", "mean cosine", "median", "share above 0.9",
        "mean of one-to-one matching", "p (one mode)", "modes",
    )  # fmt: skip
    return Section(
        "Do they find the same features?",
        "Cosine similarities of decoder directions of alive features. The modes are given where Hartigan's dip test rejects "
        "a single one (p < 0.05).",
        charts=cosine_charts(found),
        tables=(Table("geometry", "Geometry of the dictionaries", "", columns, tuple(rows)),),
    )


def _features_section(found: Comparison) -> Section:
    groups = tuple(CardGroup(name, cards) for name, cards in found.cards.items() if cards)
    return Section(
        "The most important features",
        "Importance is the KL that ablating the feature causes, in nats per token over all tokens. The ranking of all "
        "features is in importance/.",
        card_groups=groups,
    )
