"""`e2e-sae pretrained`."""

from __future__ import annotations

import argparse
import json

from e2e_sae_plugin.hub.published import PUBLISHED_NAME, PretrainedTable, list_pretrained, published


def pretrained_command(args: argparse.Namespace) -> None:
    """Print the published SAEs and how to load one.

    Raises:
        ValueError: there is none such.
    """
    table = list_pretrained(args.layer, args.kind, args.matched)
    text = json.dumps([row.to_dict() for row in table], indent=1) if args.json else f"{table}\n\n{_how_to_load(table)}"
    print(text)


def _how_to_load(table: PretrainedTable) -> str:
    row = table[0]
    return (
        "To load one:\n"
        "  from e2e_sae_plugin import load_pretrained\n"
        f'  sae = load_pretrained("{PUBLISHED_NAME}", layer={row.layer}, kind="{row.kind}", matched="{row.matched}")\n'
        "To measure it:\n"
        f"  e2e-sae evaluate {row.release}:{row.sae_id} --dataset {published()['dataset']} --streaming"
    )
