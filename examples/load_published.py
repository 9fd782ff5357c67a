"""Measure one of the paper's published SAEs of GPT2-small on text of your own, beside what the paper reports.

    python examples/load_published.py my_text/ --layer 6 --kind e2e+ds     # a folder of .txt files, or a dataset of the Hub
    python examples/load_published.py my_text/ --sae OWNER/NAME:SAE_ID     # any other SAE of the Hub

Needs the Hugging Face Hub, for GPT2-small (550 MB) and the SAE (280 MB), which stay in its cache. A few minutes on two
cores for 20,000 tokens. Writes nothing.
"""

from __future__ import annotations

import argparse

from e2e_sae_plugin import evaluate, list_pretrained, load_pretrained
from e2e_sae_plugin.comparison.inputs import TextSettings, evaluation_tokens, load_model_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a folder of text, or a dataset of the Hub")
    parser.add_argument("--layer", type=int, choices=[2, 6, 10], default=6)
    parser.add_argument("--kind", choices=["local", "e2e", "e2e+ds"], default="e2e+ds")
    parser.add_argument("--matched", choices=["ce", "l0"], default="ce", help="similar CE loss increase, or similar L0")
    parser.add_argument("--sae", metavar="OWNER/NAME[@REVISION]:SAE_ID", help="another SAE of the Hub")
    parser.add_argument("--tokens", type=int, default=20_000, help="how much of the text (%(default)s)")
    args = parser.parse_args()

    if args.sae is None:
        rows = list_pretrained(args.layer, args.kind, args.matched)
        print(f"{rows}\n")
        sae = load_pretrained("e2e-sae-gpt2-small", layer=args.layer, kind=args.kind, matched=args.matched)
    else:
        rows = []
        repository, _, sae_id = args.sae.partition(":")
        sae = load_pretrained(repository, sae_id or None)
    # The paper's SAEs are of GPT-2 with centred writing weights; their metadata say so, and the model is loaded that way.
    model = load_model_of(sae)
    tokens, source = evaluation_tokens({"sae": sae}, model, args.tokens, TextSettings(args.text))
    name = args.sae or f"{sae.cfg.metadata.hook_name}, {args.kind}"
    found = evaluate(sae, model, tokens, name=name, source=source, progress=True)
    print(found)
    for row in rows:
        print(
            f"\nThe paper, on OpenWebText: L0 {row.l0:.1f}, CE loss increase {row.ce_loss_increase:+.3f}; on your text: "
            f"L0 {found.value('l0'):.1f}, CE loss increase {found.value('ce_loss_increase'):+.3f}"
        )


if __name__ == "__main__":
    main()
