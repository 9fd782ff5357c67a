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
)
from e2e_sae_plugin.comparison.compare import Comparison, file_stem, mean_increase
from e2e_sae_plugin.comparison.dictionaries import Comparison1D
from e2e_sae_plugin.comparison.findings import E2E, E2E_DS, ratio
from e2e_sae_plugin.comparison.published import PublishedSAE, published, published_at
from e2e_sae_plugin.comparison.subjects import LOCAL, ordered_kinds
from e2e_sae_plugin.report import CardGroup, Report, Section, SummaryLine, Table, write_report
from e2e_sae_plugin.report.table import Cell

STATUS = {"confirmed": "ok", "not confirmed": "not", "cannot be told": "unclear"}


def write_report_of(found: Comparison, folder: Path, title: str = "SAEs compared") -> dict[str, Path]:
    """Write `report.html`, `report.md`, `tables/*.csv` and `figures/*` of a comparison; the paths by name."""
    written = write_report(comparison_report(found, title), folder)
    for name, importance in found.importance.items():
        path = folder / "importance" / f"{file_stem(name)}.csv"
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
    sections = [_overview(found, paper), _pathways(found), _features_section(found)]
    if several:
        sections.insert(2, _geometry(found))
    # The findings are about the paper's kinds: of others, such as before and after, there is nothing to say.
    findings = found.findings if len({LOCAL, E2E, E2E_DS} & set(kinds)) > 1 else ()
    summary = [
        SummaryLine(f"{each.title}: {each.verdict}. {each.claim}", STATUS[each.verdict])  # pyright: ignore[reportArgumentType]
        for each in findings
    ]
    if findings:
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
    table = Table(
        "findings",
        "What they rest on",
        "",
        ("finding", "verdict", "what was measured", "value [95 % interval]"),
        rows,
    )
    return Section(
        "The paper's findings",
        "What Braun et al. 2024 found on GPT2-small, put to the test on these SAEs. Ratios are geometric means along curves "
        "that are interpolated in logarithms, over the range that all curves cover.",
        tables=(table,),
    )


def _overview(found: Comparison, paper: Sequence[PublishedSAE]) -> Section:
    tables = list(_sae_tables(found))
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


def _sae_tables(found: Comparison) -> tuple[Table, Table]:
    """Two, as the columns of one would not fit a laptop."""
    costs = {
        "CE loss increase": ("ce_loss_increase", "{:+.4f}"),
        "KL": ("kl", "{:.4f}"),
        "L0": ("l0", "{:.1f}"),
    }
    others = {
        "recovered (zero)": ("ce_loss_recovered_zero", "{:.3f}"),
        "recovered (mean)": ("ce_loss_recovered_mean", "{:.3f}"),
        "top-1": ("top1_agreement", "{:.3f}"),
        "distance": ("statistical_distance", "{:.3f}"),
        "variance": ("explained_variance", "{:.3f}"),
        "by token": ("explained_variance_per_token", "{:.3f}"),
    }
    rows: list[tuple[Cell, ...]] = []
    other_rows: list[tuple[Cell, ...]] = []
    for kind in ordered_kinds(found.subjects):
        for each in found.subjects:
            if each.kind != kind:
                continue
            evaluation = found.evaluations[each.name]
            values = [[evaluation.metrics.get(name) for name, _ in part.values()] for part in (costs, others)]
            quantiles = evaluation.l0_quantiles((0.05, 0.5, 0.95)).values()
            rows.append((each.name, kind, *values[0], "/".join(map(str, quantiles)), evaluation.n_alive))
            other_rows.append((each.name, *values[1]))
    return (
        Table(
            "saes",
            "Every SAE",
            "L0 also as the 5 %, 50 % and 95 % quantiles over tokens; alive: features that fire at least once.",
            ("SAE", "kind", *costs, "L0 5/50/95 %", "alive"),
            tuple(rows),
            {name: form for name, (_, form) in costs.items()},
        ),
        Table(
            "agreement",
            "Every SAE, by other measures",
            "CE loss recovered over zero and over mean ablation; agreement of the most likely token; statistical distance "
            "of the predictions; explained variance as a ratio of means, and as the mean over tokens of ratios.",
            ("SAE", *others),
            tuple(other_rows),
            {name: form for name, (_, form) in others.items()},
        ),
    )


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
        f"{kind} {setting} ({mean_increase(found.groups[kind, setting], found.evaluations):.3g} nats)"
        for kind, setting in found.matched.items()
    )
    text = f"Shown are the SAEs whose CE loss increases are most alike: {matched}." if len(found.matched) > 1 else ""
    return Section("By the same pathway?", text, charts=(*layer_charts(found), ratio_chart(found)), tables=tables)


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
                    "" if test is None or not test.is_bimodal else ", ".join(f"{m:.2f}" for m in test.modes),
                )
            )
    columns = (
        "kind", "setting", "neighbours", "features", "mean cosine", "median", "> 0.9", "matched", "p", "modes",
    )  # fmt: skip
    forms = dict.fromkeys(("mean cosine", "median", "> 0.9", "matched", "p"), "{:.3f}")
    caption = (
        "Cosines of nearest neighbours; > 0.9: share of features with one that near; matched: mean cosine of the best "
        "one-to-one matching; p: of Hartigan's dip test against one mode, and where the modes lie if it rejects that."
    )
    return Section(
        "The same features?",
        "Cosine similarities of decoder directions of alive features. Here, intervals are of a bootstrap over features.",
        charts=cosine_charts(found),
        tables=(Table("geometry", "Geometry of the dictionaries", caption, columns, tuple(rows), forms),),
    )


def _features_section(found: Comparison) -> Section:
    groups = tuple(CardGroup(name, cards) for name, cards in found.cards.items() if cards)
    return Section(
        "Most important features",
        "Importance is the KL that ablating the feature causes, in nats per token over all tokens. The ranking of all "
        "features is in importance/.",
        card_groups=groups,
    )
