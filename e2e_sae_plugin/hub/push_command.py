"""`e2e-sae push`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from e2e_sae_plugin.hub.gather import Source
from e2e_sae_plugin.hub.upload import push_to_hub

DESCRIPTION = """Share SAEs on the Hugging Face Hub, in SAELens's format, with a model card: all of it in one commit, or
nothing. Everything is checked and hashed first; what is there already does not go up again, so a push that failed can
be repeated as it was. Log in with `hf auth login`, or set HF_TOKEN."""

EXAMPLES = """\
examples:
  e2e-sae push me/gpt2-e2e run_output --dry-run             what would go up; asks the Hub nothing
  e2e-sae push me/gpt2-e2e run_output --private
  e2e-sae push me/gpt2-e2e sweep                            all SAEs of a sweep
  e2e-sae push me/gpt2-e2e layer_6=a/output layer_8=b/output
  e2e-sae evaluate run_output --output run_output/evaluation.json     before it: the card then has these numbers

Anyone loads them with sae_lens.SAE.from_pretrained("me/gpt2-e2e", SAE_ID)."""


def push_command(argv: Sequence[str]) -> None:
    """Push SAEs from folders, and print what went up."""
    args = _parser().parse_args(list(argv))
    push = push_to_hub(
        _sources(args.saes),
        args.repository,
        private=True if args.private else None,
        revision=args.revision,
        create_pr=args.create_pr,
        overwrite=args.overwrite,
        license=args.license,
        commit_message=args.message,
        dry_run=args.dry_run,
    )
    print(push)
    if args.dry_run:
        print(f"\nIts model card, for a repository that is new:\n\n{push.card}")


def _sources(texts: Sequence[str]) -> Source | dict[str, Source]:
    """One folder, which may hold several SAEs, or folders of one SAE each, with their ids before them where wanted."""
    if len(texts) == 1 and (Path(texts[0]).exists() or "=" not in texts[0]):
        return texts[0]
    named: dict[str, Source] = {}
    for text in texts:
        sae_id, sign, folder = text.partition("=")
        if not sign or Path(text).exists():  # a folder may be called lr=0.1
            sae_id, folder = Path(text).resolve().name, text
        if not Path(folder).exists():
            raise ValueError(f"There is no folder {folder!r}. Expected FOLDER or SAE_ID=FOLDER.")
        if sae_id in named:
            raise ValueError(f"Two SAEs have the id {sae_id!r}. Say what each is called: SAE_ID=FOLDER.")
        named[sae_id] = folder
    return named


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="e2e-sae push",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("repository", metavar="OWNER/NAME", help="created where it is missing")
    add(
        "saes",
        nargs="+",
        metavar="[SAE_ID=]FOLDER",
        help="an SAE's folder, a checkpoint's, or one of several SAEs. Default id: of one SAE its hook's name, of several "
        "their folders' names",
    )
    add("--private", action="store_true", help="a repository that is created is private; refused for a public one")
    add("--revision", metavar="BRANCH", help="default: main; created from it where it is missing")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--overwrite", action="store_true", help="replace other SAEs that the repository has under the same ids")
    add(
        "--license",
        metavar="ID",
        help='of the SAEs, as the Hub spells it, such as "mit" (default: what the card says already)',
    )
    add("--message", metavar="TEXT", help="of the commit")
    add("--dry-run", action="store_true", help="check everything and print what would go up, asking the Hub nothing")
    return parser
