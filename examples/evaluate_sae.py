"""What an SAE costs the model, and which of its features matter: numbers with intervals, and the text that features fire on.

    python examples/evaluate_sae.py [FOLDER] [--tokens 12800] [--features 5]

FOLDER is any SAE of the bundled model, such as output/train/e2e; without one a small SAE is trained first (a
quarter of a minute). The importance of a feature is the KL that ablating it causes: an estimate for all of them at once,
and the ablation itself for the first few. For SAEs of other models see load_published.py, or `e2e-sae evaluate`.
No network, no GPU; half a minute more on two cores. Writes evaluation.json, which a model card on the Hub takes its
numbers from, and importance.csv into FOLDER.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bundled import trained_sae

from e2e_sae_plugin import evaluate, feature_importance, load_sae, splice_into
from e2e_sae_plugin.demo import demo_tokens, load_demo_model, load_demo_tokenizer
from e2e_sae_plugin.evaluation import feature_cards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="an SAE of the bundled model")
    parser.add_argument("--tokens", type=int, default=12_800, help="held-out tokens to measure on (%(default)s)")
    parser.add_argument("--features", type=int, default=5, help="the most important ones to look at (%(default)s)")
    args = parser.parse_args()

    folder = args.folder or trained_sae()
    sae = load_sae(folder)
    model, tokens = load_demo_model(), demo_tokens("evaluation", 128)[: args.tokens // 128]
    found = evaluate(sae, model, tokens, name=str(folder), text="Python standard library, held-out files")
    print(found)
    found.save(folder / "evaluation.json")

    importance = feature_importance(sae, model, tokens, exact=args.features)
    importance.write_csv(folder / "importance.csv")
    spliced_model = splice_into(model, found.hook_name)
    spliced_model.check()
    top = importance.ranked(args.features)
    cards = feature_cards(sae, spliced_model, tokens, top, importance, tokenizer=load_demo_tokenizer(), n_contexts=2)
    print(f"\nThe {args.features} features whose ablation changes the model most:")
    for card in cards:
        raised = " ".join(repr(token) for token, _ in card.top_logits[:4])
        print(
            f"\n  {card.feature}: KL {card.importance:.2e} nats (estimate {float(importance.kl[card.feature]):.2e}), "
            f"fires on {card.density:.1%} of tokens, raises {raised}"
        )
        for context in card.contexts:
            # The token that it fires on most stands between marks.
            marked = [f">>{token}<<" if i == context.peak else token for i, token in enumerate(context.tokens)]
            print(f"    {''.join(marked)!r}")


if __name__ == "__main__":
    main()
