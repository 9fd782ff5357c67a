"""Share an SAE on the Hugging Face Hub with a model card that has its measurements, and load it back.

    python examples/share.py                                   # what would go up; asks the Hub nothing
    hf auth login && python examples/share.py --push OWNER/NAME    # does it, in a private repository

FOLDER is an SAE of the bundled model; without one a small SAE is trained first (a quarter of a minute). Needs the Hub
with --push alone. Half a minute in all on two cores. Writes evaluation.json into FOLDER, from which the card
takes its numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bundled import trained_sae
from sae_lens import SAE

from e2e_sae_plugin import evaluate, load_pretrained, load_sae, push_to_hub
from e2e_sae_plugin.demo import demo_tokens, load_demo_model

SAE_ID = "e2e-ds"  # in the repository, which may hold many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="an SAE of the bundled model")
    parser.add_argument("--push", metavar="OWNER/NAME", help="push to this repository, which is created if need be")
    parser.add_argument("--public", action="store_true", help="not private, where it is created")
    args = parser.parse_args()

    folder = args.folder or trained_sae()
    sae = load_sae(folder)
    tokens = demo_tokens("evaluation", 128)[:50]
    # An evaluation belongs to the weights that were measured: the push refuses one beside others.
    evaluate(sae, load_demo_model(), tokens, text="Python standard library, held-out files").save(
        folder / "evaluation.json"
    )

    push = push_to_hub(
        folder,
        args.push or "me/bundled-saes",
        sae_id=SAE_ID,
        license="mit",
        private=None if args.public else True,
        dry_run=args.push is None,
    )
    print(push)
    if args.push is None:
        print(f"\nThe model card:\n\n{push.card}")
        return
    assert push.commit is not None
    for name, loaded in {
        "this package": load_pretrained(args.push, SAE_ID, revision=push.commit),
        "plain SAELens": SAE.from_pretrained(args.push, SAE_ID),
    }.items():
        theirs = loaded.state_dict()
        same = all(torch.equal(value, theirs[key]) for key, value in sae.state_dict().items())
        print(f"Loaded with {name}: {'equal to the bit' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
