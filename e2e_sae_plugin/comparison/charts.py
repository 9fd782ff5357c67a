"""The charts of a comparison, as data for `report` to draw."""

from __future__ import annotations

from collections.abc import Sequence

from e2e_sae_plugin.comparison.compare import Comparison
from e2e_sae_plugin.comparison.dictionaries import Comparison1D
from e2e_sae_plugin.comparison.subjects import Subject, ordered_kinds
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.geometry import HISTOGRAM_EDGES, CosineSummary
from e2e_sae_plugin.evaluation.pareto import dominated
from e2e_sae_plugin.hub.published import PublishedSAE, published_l2_ratios_at
from e2e_sae_plugin.report import Chart, Series

ZERO_BIN = len(HISTOGRAM_EDGES) // 2
"""Where histograms start, unless there are lower cosines; nearest neighbours seldom have them."""


def pareto_charts(found: Comparison, paper: Sequence[PublishedSAE]) -> tuple[Chart, ...]:
    """CE loss increase against L0, and against alive features."""
    return (
        _pareto(found, "pareto_l0", "L0 (active features per token)", [(each, each.l0) for each in paper]),
        _pareto(found, "pareto_alive", "alive features", [(each, float(each.alive)) for each in paper]),
    )


def _pareto(found: Comparison, name: str, x_label: str, paper: Sequence[tuple[PublishedSAE, float]]) -> Chart:
    series: list[Series] = []
    greyed: list[Series] = []
    for kind in ordered_kinds(found.subjects):
        points = [
            (_cost(found, each, name), found.evaluations[each.name]) for each in found.subjects if each.kind == kind
        ]
        beaten = dominated([(x, each.value("ce_loss_increase")) for x, each in points])
        for is_beaten, style in ((False, "solid"), (True, "greyed")):
            chosen = sorted(
                ((x, each) for (x, each), b in zip(points, beaten, strict=True) if b == is_beaten), key=lambda p: p[0]
            )
            if not chosen:
                continue
            estimates = [_estimate(each.metrics["ce_loss_increase"]) for _, each in chosen]
            (greyed if is_beaten else series).append(
                Series(
                    name="beaten by another of its kind" if is_beaten else kind,
                    x=tuple(x for x, _ in chosen),
                    y=tuple(e.value for e in estimates),
                    low=tuple(e.low for e in estimates),
                    high=tuple(e.high for e in estimates),
                    labels=tuple(each.name for _, each in chosen),
                    group=kind,
                    style=style,  # pyright: ignore[reportArgumentType]
                )
            )
        theirs = [(each, x) for each, x in paper if each.kind == kind]
        if theirs:
            series.append(
                Series(
                    name=f"{kind}, the paper's",
                    x=tuple(x for _, x in theirs),
                    y=tuple(each.ce_loss_increase for each, _ in theirs),
                    labels=tuple(f"lambda {each.sparsity_coefficient:g}" for each, _ in theirs),
                    group=kind,
                    style="reference",
                )
            )
    series += greyed  # they share an entry of the legend, its last
    positive = all(y > 0 for each in series for y in each.y)
    return Chart(
        name=name,
        title=f"CE loss increase against {'L0' if name == 'pareto_l0' else 'alive features'}",
        caption="Each point is an SAE; left and down is better. Lines join those that no other SAE of the kind beats; bars "
        "are 95 % intervals over sequences." + (" Hollow: the paper's numbers on GPT2-small." if paper else ""),
        x_label=x_label,
        y_label="CE loss increase (nats per token)",
        kind="scatter",
        series=tuple(series),
        x_log=all(x > 0 for each in series for x in each.x if not isinstance(x, str)),
        y_log=positive,
    )


def _cost(found: Comparison, each: Subject, name: str) -> float:
    evaluation = found.evaluations[each.name]
    return evaluation.value("l0") if name == "pareto_l0" else float(evaluation.n_alive)


def _estimate(value: Estimate | None) -> Estimate:
    return value or Estimate(float("nan"), float("nan"), float("nan"))


def layer_charts(found: Comparison) -> tuple[Chart, ...]:
    """Downstream MSE and explained variance by layer, of the matched SAEs."""
    per_token = "Mean over tokens of the ratio, as in the paper's figure 12."
    what = (
        ("downstream_mse", "Downstream error by layer", "squared distance", "mse", "Squared L2 distance, mean over tokens."),
        ("explained_variance", "Explained variance by layer", *_EXPLAINED, "explained_variance_per_token", per_token),
        (
            "explained_variance_layernorm", "Explained variance after LayerNorm",
            *_EXPLAINED, "layernorm_explained_variance_per_token", per_token,
        ),
    )  # fmt: skip
    return tuple(
        Chart(
            name=name,
            title=title,
            caption=f"SAEs of similar CE loss increase, a line per seed; the first point is the SAE's own output. {how}",
            x_label="hook",
            y_label=y_label,
            kind="lines",
            series=tuple(_layers(found, field)),
            y_log=field == "mse",
        )
        for name, title, y_label, field, how in what
    )


_EXPLAINED = ("explained variance",)


def _layers(found: Comparison, field: str) -> list[Series]:
    series: list[Series] = []
    for kind, setting in found.matched.items():
        for index, each in enumerate(found.groups[kind, setting]):
            layers = list(found.evaluations[each.name].layers.items())
            estimates = [getattr(layer, field) for _, layer in layers]
            series.append(
                Series(
                    name=kind,
                    x=tuple(short_hook(hook) for hook, _ in layers),
                    y=tuple(e.value for e in estimates),
                    low=tuple(e.low for e in estimates),
                    high=tuple(e.high for e in estimates),
                    labels=tuple(each.name for _ in layers),
                    group=kind,
                    style="solid" if index == 0 else "dashed",
                )
            )
    return series


def short_hook(hook: str) -> str:
    """A hook name that fits an axis."""
    return hook.replace("blocks.", "").replace(".hook_", " ").replace("model.layers.", "layer ")


def ratio_chart(found: Comparison) -> Chart:
    """L2 ratios at position 0 and later, of the matched SAEs."""
    names = {"l2_ratio_position_0": "position 0", "l2_ratio_later": "later positions"}
    paper = published_l2_ratios_at(found.subjects[0].sae.cfg.metadata.model_name, found.place.hook_name)
    series: list[Series] = []
    for kind, setting in found.matched.items():
        each = found.evaluations[found.groups[kind, setting][0].name]
        shown = {label: e for name, label in names.items() if (e := each.metrics.get(name)) is not None}
        series.append(
            Series(
                name=kind,
                x=tuple(shown),
                y=tuple(e.value for e in shown.values()),
                low=tuple(e.low for e in shown.values()),
                high=tuple(e.high for e in shown.values()),
                group=kind,
            )
        )
        if kind in paper:
            series.append(
                Series(f"{kind}, the paper's", tuple(names.values()), paper[kind], group=kind, style="reference")
            )
    return Chart(
        "l2_ratio",
        "Length of the reconstruction",
        "Mean of |SAE(a)| / |a|. End-to-end SAEs need not keep the length of what they reconstruct (the paper's table 5)."
        + (" Hollow: the paper's numbers on GPT2-small." if paper else ""),
        "",
        "L2 ratio",
        "bars",
        tuple(series),
    )


def cosine_charts(found: Comparison) -> tuple[Chart, ...]:
    """The three histograms of figure 3, of the matched SAEs."""
    titles = {
        "within": ("Within an SAE", "to another feature of the same SAE"),
        "cross_seed": ("Across seeds", "to a feature of the same kind of SAE with another seed"),
        "cross_type": ("To local features", "to a feature of the local SAE"),
    }
    shown: dict[str, list[tuple[str, CosineSummary]]] = {}
    for name in titles:
        compared: list[tuple[str, Comparison1D | None]] = [
            (kind, getattr(found.geometry[kind, setting], name)) for kind, setting in found.matched.items()
        ]
        shown[name] = [(kind, one.summary) for kind, one in compared if one is not None and one.summary.n]
    filled = [i for pairs in shown.values() for _, one in pairs for i, count in enumerate(one.histogram) if count]
    start = min([ZERO_BIN, *filled])
    edges = tuple(HISTOGRAM_EDGES[start:].tolist())
    charts: list[Chart] = []
    for name, (title, to) in titles.items():
        series = [
            Series(kind, edges, tuple(count / one.n for count in one.histogram[start:]), group=kind)
            for kind, one in shown[name]
        ]
        if series:
            charts.append(
                Chart(
                    f"cosine_{name}",
                    title,
                    f"For each alive feature, the largest cosine similarity {to}.",
                    "largest cosine similarity",
                    "share of features",
                    "histogram",
                    tuple(series),
                    y_format="percent",
                )
            )
    return tuple(charts)


def alive_chart(found: Comparison) -> Chart:
    """How many features have fired by so many tokens, of the matched SAEs."""
    series = [
        Series(
            name=kind,
            x=tuple(float(n) for n, _ in found.evaluations[each.name].alive_curve),
            y=tuple(float(alive) for _, alive in found.evaluations[each.name].alive_curve),
            labels=tuple(each.name for _ in found.evaluations[each.name].alive_curve),
            group=kind,
            style="solid" if index == 0 else "dashed",
        )
        for kind, setting in found.matched.items()
        for index, each in enumerate(found.groups[kind, setting])
    ]
    return Chart(
        "alive_curve",
        "Alive features by tokens seen",
        "Features that have fired at least once; a curve that still rises has rare features to come.",
        "tokens",
        "alive features",
        "lines",
        tuple(series),
        x_log=True,
    )
