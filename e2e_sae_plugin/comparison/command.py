"""`e2e-sae evaluate` and `e2e-sae compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e2e_sae_plugin.comparison.compare import compare
from e2e_sae_plugin.comparison.inputs import dataset_of, evaluation_tokens, load_model_of, text_name
from e2e_sae_plugin.comparison.report import write_report_of
from e2e_sae_plugin.comparison.subjects import Subject, check_finite, check_same_model, load_subjects
from e2e_sae_plugin.config import MODEL_CLASSES
from e2e_sae_plugin.evaluation.evaluate import common_place, evaluate
from e2e_sae_plugin.finetune.command import number_of_tokens
from e2e_sae_plugin.joint import SAESet
from e2e_sae_plugin.preflight import check_device_name

SOURCES = """\
An SAE is a folder, RELEASE:SAE_ID for one of SAELens's releases, or OWNER/REPO:SAE_ID (OWNER/REPO@REVISION:SAE_ID) for one
of a Hub repository. A folder of several SAEs, such as a sweep's, stands for all of them. LABEL=SAE gives it a name and a
kind of its own. Model, hook and data come from the metadata of the first SAE; flags win over them."""

EVALUATE = """Measure one SAE: what it costs the model, how sparse it is, what becomes of later layers. Prints a table with
95 % intervals."""

COMPARE = """Compare SAEs of one hook on the same tokens. Writes a page (report.html, which needs no network), the same as
Markdown, tables as CSV, figures as SVG and PNG, and every feature's importance. Interrupted, run it again: what was
measured stays."""

EVALUATE_EXAMPLES = """\
examples:
  e2e-sae evaluate demo_output/e2e
  e2e-sae evaluate output/several --joint                     all SAEs of a folder in one pass
  e2e-sae evaluate gpt2-small-res_sce-ajt:blocks.6.hook_resid_pre --dataset Skylion007/openwebtext --streaming"""

COMPARE_EXAMPLES = """\
examples:
  e2e-sae compare demo_output/local demo_output/e2e demo_output/e2e_ds --output compared
  e2e-sae compare sweep --output compared --cards 3           all SAEs of a sweep
  e2e-sae compare before=my_sae after=tuned --dataset my_text/ --tokens 50k"""


def evaluate_command(argv: Sequence[str]) -> None:
    """Measure one SAE and print it."""
    parser = _parser("evaluate", EVALUATE, EVALUATE_EXAMPLES)
    parser.add_argument("sae", metavar="SAE", help="what to measure")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write everything as JSON (CSV with --joint)")
    parser.add_argument(
        "--joint", action="store_true",
        help="splice all SAEs of the folder together, and measure what they cost as they are added and each alone",
    )  # fmt: skip
    args = parser.parse_args(list(argv))
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"--output {str(args.output)!r} is a folder. Name a file in it.")
    if args.joint:
        _evaluate_joint(args)
        return
    subjects, model, tokens = _inputs(args, [args.sae])
    if len(subjects) > 1:
        raise ValueError(
            f"{args.sae!r} holds {len(subjects)} SAEs. Name one of them, use e2e-sae compare, or, where they sit at several "
            "hooks, --joint."
        )
    found = evaluate(
        subjects[0].sae, model, tokens, name=subjects[0].name, hook_name=args.hook, text=_text(args, subjects),
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
    subjects, model, tokens = _inputs(args, [args.sae], one_place=False)
    saes = {each.name: each.sae for each in subjects}
    found = SAESet(saes).evaluate(model, tokens, batch_size_prompts=args.batch_prompts)
    print(f"{found.table().to_markdown()}\n{found.table().caption}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(found.table().to_csv())


def compare_command(argv: Sequence[str]) -> None:
    """Compare SAEs and write a report."""
    parser = _parser("compare", COMPARE, COMPARE_EXAMPLES)
    parser.add_argument("saes", metavar="SAE", nargs="+", help="what to compare")
    parser.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--cards", type=int, default=6, metavar="N", help="feature cards per SAE (default 6; 0: none)")
    parser.add_argument(
        "--exact", type=int, default=0, metavar="N",
        help="measure the importance of so many features per SAE by ablating each, instead of estimating it",
    )  # fmt: skip
    parser.add_argument("--title", default="SAEs compared")
    args = parser.parse_args(list(argv))
    if args.cards < 0 or args.exact < 0:
        raise ValueError(f"--cards and --exact take whole numbers from 0 on, got {args.cards} and {args.exact}.")
    if args.exact and not args.cards:
        raise ValueError("--exact has no effect without cards: importance is measured for the SAEs that get cards.")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {str(args.output)!r} is a file. Name a folder.")
    subjects, model, tokens = _inputs(args, args.saes)
    found = compare(
        subjects, model, tokens, cache=args.output, n_cards=args.cards, n_exact=args.exact, hook_name=args.hook,
        text=_text(args, subjects), batch_size_prompts=args.batch_prompts, progress=True,
    )  # fmt: skip
    written = write_report_of(found, args.output, args.title)
    for each in found.findings:
        if each.verdict != "cannot be told":
            print(f"{each.title} (the paper's claim): {each.verdict}")
    for text in found.warnings:
        print(f"Warning: {text}")
    importance = " and importance/" if args.cards else ""
    print(f"The report is {written['report.html']}; beside it report.md, tables/, figures/{importance}.")


def _parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"e2e-sae {name}",
        description=f"{description}\n\n{SOURCES}",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tokens", type=number_of_tokens, default=100_000, help="how many to measure on (default 100k)")
    add("--dataset", help="text or tokens that the SAEs were not trained on: of the Hub, or a folder")
    add("--streaming", action="store_true", help="stream the dataset instead of fetching it")
    add("--context-size", type=int, help="default: the metadata's, or 128")
    add("--model", help="default: the metadata's")
    add("--model-class", choices=MODEL_CLASSES)
    add("--model-dtype", help="of the language model, for instance bfloat16")
    add("--hook", help="where to splice, for SAEs whose metadata name no hook or another")
    add("--batch-prompts", type=int, default=8, help="sequences in the model at once (default 8)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    return parser


def _inputs(
    args: argparse.Namespace, sources: Sequence[str], *, one_place: bool = True
) -> tuple[list[Subject], Any, Tensor]:
    """Refuses what can be refused before the model is loaded."""
    check_device_name("--device", args.device)
    subjects = load_subjects(sources, args.device)
    check_same_model(subjects)
    check_finite(subjects)
    first = subjects[0].sae
    model = load_model_of(
        first, model_name=args.model, model_class_name=args.model_class, device=args.device, dtype=args.model_dtype
    )
    if one_place:
        common_place({each.name: each.sae for each in subjects}, model, args.hook)
    tokens = evaluation_tokens(
        first, model, args.tokens, dataset=args.dataset, context_size=args.context_size, streaming=args.streaming
    )
    return subjects, model, tokens


def _text(args: argparse.Namespace, subjects: Sequence[Subject]) -> str | None:
    """What `_inputs` took the tokens from."""
    return text_name(dataset_of(subjects[0].sae, args.dataset))
