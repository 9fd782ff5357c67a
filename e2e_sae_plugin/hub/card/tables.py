"""The parts of a model card that are tables: how the SAEs were trained, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any
from urllib.parse import quote

from sae_lens.saes.sae import SAEConfig

from e2e_sae_plugin.evaluation.result import LABELS
from e2e_sae_plugin.hub.card.entry import HELD_OUT_NAMES, MAIN_METRICS, CardEntry
from e2e_sae_plugin.hub.card.text import markdown, python_literal, shown
from e2e_sae_plugin.report.table import Cell, Table
from e2e_sae_plugin.report.text import is_finite, number_text

MAX_COLUMNS = 3
"""With more SAEs than this, a table has a row for each of them instead of a column."""


def recipe(entry: CardEntry) -> dict[str, str]:
    """How the SAE was trained: setting -> text. From the run's config and the metadata; only what is known."""
    said, run = entry.metadata, entry.run or {}
    tuning = said.get("finetuning")
    tuning = tuning if isinstance(tuning, Mapping) else {}
    found: dict[str, Any] = {
        "model": said.get("model_name") or run.get("model_name"),
        "model class": said.get("model_class_name") or run.get("model_class_name"),
        "model loaded with": ", ".join(f"{n}={python_literal(v)}" for n, v in entry.model_settings.items()) or None,
        "hook": said.get("hook_name") or run.get("hook_name"),
        "dataset": tuning.get("dataset_path") or said.get("dataset_path") or run.get("dataset_path"),
        "context (tokens)": said.get("context_size") or run.get("context_size"),
        "training tokens": tuning.get("training_tokens") or run.get("training_tokens"),
        "tokens per step": run.get("train_batch_size_tokens") or tuning.get("train_batch_size_tokens"),
        "learning rate": _learning_rate(run) or tuning.get("lr"),
        "optimizer": _optimizer(run),
        "gradient norm clipped at": run.get("max_grad_norm"),
        "sparsity": _sparsity(entry),
        "other SAE settings": {n: v for n, v in _other_settings(entry).items() if v is not None} or None,
        "local objective first (share of the tokens)": said.get("local_first") or None,
        "b_dec starts at": None if run.get("from_pretrained_path") or tuning else _b_dec_start(run),
        "activations in training": entry.training_normalisation,
        "special tokens left out": said.get("exclude_special_tokens"),
        "positions trained on": said.get("seqpos_slice") if said.get("seqpos_slice") not in (None, [None]) else None,
        "frozen parameters": run.get("frozen_parameters") or None,
        "decoder norms kept": run.get("keep_decoder_norms") or tuning.get("keep_decoder_norms") or None,
        "adapter": next((a for a in (run.get("adapter"), tuning.get("adapter")) if a not in (None, "none")), None),
        "started from": run.get("from_pretrained_path"),
        "fine-tuned from": _source(said.get("finetuned_from")),
        "converted from": _source(said.get("converted_from")),
        "seed": said.get("seed") if said.get("seed") is not None else run.get("seed", tuning.get("seed")),
        "e2e-sae-plugin": said.get("e2e_sae_plugin_version"),
        "SAELens": said.get("sae_lens_training_version") or said.get("sae_lens_version"),
    }
    return {name: shown(value) for name, value in found.items() if value is not None and value != ""}


def _b_dec_start(run: Mapping[str, Any]) -> str | None:
    starts = {"auto": "the mean activation", "mean": "the mean activation", "zeros": "zero"}
    return starts.get(str(run.get("b_dec_init_method")))


def _learning_rate(run: Mapping[str, Any]) -> str | None:
    rate = run.get("lr")
    if not is_finite(rate):
        return None
    schedule = shown(run.get("lr_scheduler_name") or "constant")
    text = f"{rate:.6g}, {schedule}"
    end = run.get("lr_end")
    if schedule != "constant" and is_finite(end):
        text += f" to {end:.6g}"
    for name, label in (("lr_warm_up_steps", "warm-up"), ("lr_decay_steps", "decay")):
        if run.get(name):
            text += f", {label} {shown(run[name])} steps"
    return text


def _optimizer(run: Mapping[str, Any]) -> str | None:
    betas = run.get("adam_beta1"), run.get("adam_beta2")
    return None if None in betas else f"Adam, betas {shown(betas[0])} and {shown(betas[1])}"


_SPARSITY = ("k", "l1_coefficient", "l0_coefficient", "l1_warm_up_steps", "l0_warm_up_steps", "max_iterations")


def _sparsity(entry: CardEntry) -> str | None:
    settings = entry.training_settings
    parts = [f"{name} {shown(settings[name])}" for name in _SPARSITY if settings.get(name) not in (None, 0)]
    if not parts and entry.metadata.get("converted_from") and entry.metadata.get("sparsity") is not None:
        return f"lambda {shown(entry.metadata['sparsity'])}"
    return ", ".join(parts) or None


def _other_settings(entry: CardEntry) -> dict[str, Any]:
    """What the architecture's training has besides; not what the loaded SAE computes, which its `cfg.json` says."""
    not_of_training = (*entry.cfg, *_SPARSITY, "architecture", *(field.name for field in fields(SAEConfig)))
    return {name: value for name, value in entry.training_settings.items() if name not in not_of_training}


def _source(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get("source") or value.get("name") or value.get("path")
    return value


def training(entries: Sequence[CardEntry]) -> str:
    """What all SAEs share once, then what differs, a row per SAE; "" where nothing is known."""
    recipes = [recipe(each) for each in entries]
    names = _in_order(recipes)
    common = [name for name in names if len({each.get(name) for each in recipes}) == 1]
    rows: tuple[tuple[Cell, ...], ...] = tuple((name, recipes[0][name]) for name in common)
    parts = [Table("recipe", "", "", ("setting", "value"), rows).to_markdown()] if rows else []
    different = [name for name in names if name not in common]
    if different:
        parts.append(f"{'What differs' if rows else 'By SAE'}:\n")
        rows = tuple(
            (shown(entry.sae_id), *(each.get(name) for name in different))
            for entry, each in zip(entries, recipes, strict=True)
        )
        parts.append(Table("different", "", "", ("SAE", *different), rows).to_markdown())
    return "\n".join(parts)


def _in_order(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """Every setting that some SAE has, in the order of `recipe`, which each of them keeps."""
    longest = sorted(recipes, key=len, reverse=True)
    return list(dict.fromkeys(name for each in longest for name in each))


def evaluation(entries: Sequence[CardEntry], figure: str | None) -> str:
    """What was measured, on which tokens, the downstream errors, and the figure; "" where there is none of it."""
    parts: list[str] = []
    measured = [each for each in entries if each.evaluation is not None]
    if measured:
        on = " and ".join(dict.fromkeys(map(_measured_on, measured)))
        parts.append(
            f"Measured with `e2e-sae evaluate` on {on}, with the SAE's output in the place of the activation. In brackets: "
            "95 % bootstrap intervals over sequences.\n"
        )
        parts.append(_metrics(measured, LABELS if len(measured) <= MAX_COLUMNS else MAIN_METRICS, alive=True))
        parts += [f"* {markdown(each.sae_id)}: {markdown(w)}\n" for each in measured for w in _warnings(each)]
        parts += _downstream(measured)
    logged = [each for each in entries if each.evaluation is None and _has_held_out(each)]
    if logged:
        parts.append(
            f"{'The other SAEs: from' if measured else 'From'} the training run's own last evaluation, "
            f"{_held_out_size(logged)} held out from training{': other text than above' if measured else ''}. A small "
            "sample, without intervals; "
            "`e2e-sae evaluate` measures more.\n"
        )
        parts.append(_metrics(logged, tuple(HELD_OUT_NAMES), alive=False))
        parts += _downstream(logged)
    if len({(_measured_on(each), _clean_text(each)) for each in [*measured, *logged]}) > 1:
        parts.append(
            "Not all of these were measured on the same text, as the clean model's CE loss tells: numbers are comparable "
            "only where it is the same.\n"
        )
        parts += _token_differences(measured)
    if figure is not None and parts:
        parts.append(f"![CE loss increase against L0]({quote(figure, safe='/')})\n")
        parts.append("Each point is an SAE; left and down is better. Bars, where there are any, are 95 % intervals.\n")
    return "\n".join(parts)


def _measured_on(entry: CardEntry) -> str:
    """The tokens of the evaluation; "" for those of the run's own."""
    found = entry.evaluation
    if found is None:
        return ""
    of = f" of {markdown(found.text)}" if found.text else ""
    left_out = ", special tokens left out" if found.measured_on is not None and found.measured_on.excluded else ""
    return f"{found.n_tokens:,} tokens in {found.n_sequences:,} sequences{of}{left_out}"


def _token_differences(measured: Sequence[CardEntry]) -> list[str]:
    """In which settings evaluations differ from the first one's, and the flags that make them equal."""
    lines: list[str] = []
    for each in measured[1:]:
        first, other = measured[0].evaluation, each.evaluation
        if first is not None and other is not None and (found := first.differences(other)):
            lines.append(
                f"* {markdown(measured[0].sae_id)} and {markdown(each.sae_id)}: {markdown('; '.join(found))}\n"
            )
    return lines


def _clean_text(entry: CardEntry) -> str | None:
    return None if entry.clean_ce_loss is None else f"{entry.clean_ce_loss:.4f}"


def _has_held_out(entry: CardEntry) -> bool:
    return any(entry.point(name) is not None for name in HELD_OUT_NAMES)


def _warnings(entry: CardEntry) -> Sequence[str]:
    return () if entry.evaluation is None else entry.evaluation.warnings


def _held_out_size(entries: Sequence[CardEntry]) -> str:
    """How many sequences the runs held out, if that is known and the same for all."""
    sizes: set[tuple[int, int] | None] = set()
    for each in entries:
        run = each.run or {}
        values = [run.get(name) for name in ("n_eval_batches", "eval_batch_size_prompts", "context_size")]
        whole = [value for value in values if isinstance(value, int)]
        sizes.add((whole[0] * whole[1], whole[2]) if len(whole) == len(values) else None)
    size = sizes.pop()
    return "on text" if sizes or size is None else f"on {size[0]:,} sequences of {size[1]:,} tokens"


def _metrics(entries: Sequence[CardEntry], names: Sequence[str] | Mapping[str, Any], *, alive: bool) -> str:
    """The metrics that at least one of them has: a column per SAE for few SAEs, else a row."""
    found = {name: [_cell(each, name) for each in entries] for name in names}
    clean: list[Cell] = [_clean_text(each) for each in entries]
    lines: list[tuple[str, list[Cell]]] = [("CE loss of the clean model", clean)] if any(clean) else []
    lines += [
        (LABELS[name][0], list(cells)) for name, cells in found.items() if any(cell is not None for cell in cells)
    ]
    if alive:
        lines.append(("alive features", [f"{each.alive:,}" if each.alive is not None else None for each in entries]))
    return _table([shown(each.sae_id) for each in entries], lines)


def _cell(entry: CardEntry, name: str) -> Cell:
    """The metric in its own format: a column may hold several of them."""
    table = Table("cell", "", "", ("value",), (), {"value": LABELS[name][1]})
    value = entry.measured(name)
    return None if value is None else table.text("value", value)


def _downstream(entries: Sequence[CardEntry]) -> list[str]:
    hooks = list(dict.fromkeys(hook for each in entries for hook in each.downstream_mse))
    if not hooks:
        return []
    names = [shown(each.sae_id) for each in entries]
    lines: list[tuple[str, list[Cell]]] = [
        (
            shown(hook),
            [number_text(each.downstream_mse[hook]) if hook in each.downstream_mse else None for each in entries],
        )
        for hook in hooks
    ]
    return [
        "How far later layers are from the clean model's (squared L2 distance, mean over tokens):\n",
        _table(names, lines),
    ]


def _table(names: Sequence[str], lines: Sequence[tuple[str, list[Cell]]]) -> str:
    """Lines of one value per SAE."""
    if len(names) <= MAX_COLUMNS:
        return Table("", "", "", ("", *names), tuple((label, *cells) for label, cells in lines)).to_markdown()
    columns = ("SAE", *(label for label, _ in lines))
    rows = tuple((name, *(cells[i] for _, cells in lines)) for i, name in enumerate(names))
    return Table("", "", "", columns, rows).to_markdown()
