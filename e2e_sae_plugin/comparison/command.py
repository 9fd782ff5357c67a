"""`e2e-sae evaluate` and `e2e-sae compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from e2e_sae_plugin.command_line.sae_flags import DATA_FLAGS
from e2e_sae_plugin.comparison.compare import compare
from e2e_sae_plugin.comparison.inputs import TextSettings, evaluation_tokens, load_model_of
from e2e_sae_plugin.comparison.report import report_in, sae_tables, write_report_of
from e2e_sae_plugin.comparison.subjects import Subject, check_finite, check_same_model, load_subjects
from e2e_sae_plugin.evaluation.evaluate import evaluate
from e2e_sae_plugin.evaluation.place import check_recorded_model, common_place, model_name_of
from e2e_sae_plugin.evaluation.tokens import MeasuredTokens
from e2e_sae_plugin.joint import SAESet
from e2e_sae_plugin.preflight import device_or_default


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure one SAE and print it."""
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"--output {str(args.output)!r} is a folder. Name a file in it.")
    if args.joint:
        _evaluate_joint(args)
        return
    subjects, model, tokens, source = _inputs(args, [args.sae])
    if len(subjects) > 1:
        raise ValueError(
            f"{args.sae!r} holds {len(subjects)} SAEs. Name one of them, use e2e-sae compare, or, where they sit at several "
            "hooks, --joint."
        )
    found = evaluate(
        subjects[0].sae, model, tokens, name=subjects[0].name, hook_name=args.hook, source=source, **_place(args),
        batch_size_prompts=args.batch_prompts, progress=True,
    )  # fmt: skip
    print(found)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        found.save(args.output)


def _evaluate_joint(args: argparse.Namespace) -> None:
    if args.hook is not None:
        raise ValueError(
            "--hook names one place, and has no meaning with --joint: the metadata say where each SAE sits."
        )
    subjects, model, tokens, source = _inputs(args, [args.sae], one_place=False)
    saes = {each.name: each.sae for each in subjects}
    found = SAESet(saes).evaluate(model, tokens, batch_size_prompts=args.batch_prompts, **_place(args))
    print(f"{len(saes)} SAEs of {model_name_of(model)}, on {tokens.numel():,} tokens of {source}")
    print(f"{found.table().to_markdown()}\n{found.table().caption}")
    for name, sae in saes.items():
        if (warning := check_recorded_model(sae, model)) is not None:
            print(f"Warning: {name}: {warning}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(found.table().to_csv())


def compare_command(args: argparse.Namespace) -> None:
    """Compare SAEs and write a report."""
    if args.cards < 0 or args.exact < 0:
        raise ValueError(f"--cards and --exact take whole numbers from 0 on, got {args.cards} and {args.exact}.")
    if args.exact and not args.cards:
        raise ValueError("--exact has no effect without cards: importance is measured for the SAEs that get cards.")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {str(args.output)!r} is a file. Name a folder.")
    subjects, model, tokens, source = _inputs(args, args.saes)
    if (replaced := report_in(args.output)) is not None:
        print(f"Replaces the report {replaced} in {args.output}.")
    found = compare(
        subjects, model, tokens, cache=args.output, n_cards=args.cards, n_exact=args.exact, hook_name=args.hook,
        source=source, **_place(args), batch_size_prompts=args.batch_prompts, progress=True,
    )  # fmt: skip
    written = write_report_of(found, args.output, args.title)
    print(sae_tables(found)[0].to_text())
    for each in found.findings:
        if each.verdict != "cannot be told":
            print(f"{each.title} (the paper's claim): {each.verdict}")
    for text in found.warnings:
        print(f"Warning: {text}")
    importance = " and importance/" if args.cards else ""
    print(f"The report is {written['report.html']}; beside it report.md, tables/, figures/{importance}.")


def _place(args: argparse.Namespace) -> dict[str, Any]:
    """Which tokens are measured, instead of what the SAEs' records say."""
    return {"exclude_special_tokens": args.exclude_special_tokens, "seqpos_slice": args.seqpos_slice}


def _inputs(
    args: argparse.Namespace, sources: Sequence[str], *, one_place: bool = True
) -> tuple[list[Subject], Any, Tensor, MeasuredTokens]:
    """Refuses what can be refused before the model is loaded."""
    device = device_or_default("--device", args.device)
    subjects = load_subjects(sources, device)
    check_same_model(subjects)
    check_finite(subjects)
    first = subjects[0].sae
    model = load_model_of(
        first, model_name=args.model, model_class_name=args.model_class, device=device, dtype=args.model_dtype
    )
    saes = {each.name: each.sae for each in subjects}
    if one_place:
        common_place(saes, model, args.hook, **_place(args))
    flags = {name: getattr(args, name) for name in (*DATA_FLAGS, "context_size", "prepend_bos")}
    tokens, source = evaluation_tokens(saes, model, args.tokens, TextSettings(dataset_path=args.dataset, **flags))
    return subjects, model, tokens, source
