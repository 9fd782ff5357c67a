"""`e2e-sae push`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from e2e_sae_plugin.hub.gather import Source
from e2e_sae_plugin.hub.upload import push_to_hub


def push_command(args: argparse.Namespace) -> None:
    """Push SAEs from folders, and print what went up."""
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
    if args.dry_run:  # the list last: the card is some two hundred lines
        print(f"The model card, for a repository that is new:\n\n{push.card}\n")
    print(push)


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
