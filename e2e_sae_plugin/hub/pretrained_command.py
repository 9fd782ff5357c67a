"""`e2e-sae pretrained`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from e2e_sae_plugin.hub.published import PUBLISHED_NAME, PretrainedTable, list_pretrained, published

DESCRIPTION = """List the SAEs that Braun et al. 2024 (arXiv 2405.12241) published of GPT2-small, with the paper's numbers.
"matched": the table that they are in, of similar CE loss increase (ce) or of similar L0 (l0)."""


def pretrained_command(argv: Sequence[str]) -> None:
    """Print the published SAEs and how to load one.

    Raises:
        ValueError: there is none such.
    """
    parser = argparse.ArgumentParser(
        prog="e2e-sae pretrained",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--layer", type=int, help="2, 6 or 10")
    parser.add_argument("--kind", help="local, e2e or e2e+ds")
    parser.add_argument("--matched", help="ce or l0")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    args = parser.parse_args(list(argv))
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
