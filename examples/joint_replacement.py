"""All middle layers of the bundled model replaced by SAEs at once: what it costs, by how the SAEs were trained.

    python examples/joint_replacement.py [--tokens 409600] [--output output/joint]
    python examples/joint_replacement.py --tokens 40960 --held-out 32 --only "each alone, KL" "joint, KL + downstream"

Five TopK SAEs (k = 40, 1,024 features) on the residual stream entering blocks 1 to 5, each way with the same tokens: each by
itself, locally and end to end; one after the other (greedy); all in one pass (joint), also with the features' agreement. All
are then measured together, each reading what the ones before it wrote. No network, no GPU; three quarters of an hour
on two cores, and two minutes for the two ways of the second line. Interrupted, run it again: what is finished stays
finished.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from e2e_sae_plugin import MultiE2ESAERunnerConfig, MultiE2ESAETrainingRunner, load_sae_set
from e2e_sae_plugin.demo import demo_tokens, load_demo_model
from e2e_sae_plugin.demo.run import quiet_host

BLOCKS = range(1, 6)
MIXED = {"kl": 1.0, "mse": 0.005}
"""The squared error, of normalised activations, is some hundred times the KL."""

DOWNSTREAM = {"kl": 1.0, "beta": 1e-4}

WAYS: dict[str, dict[str, Any]] = {
    "each alone, local": {"mode": "independent", "objective": "local"},
    "each alone, KL": {"mode": "independent", "objective": "e2e", "local_first": 0.5},
    "each alone, KL + MSE": {"mode": "independent", "objective": MIXED, "local_first": 0.5},
    "greedy, KL + downstream": {"mode": "greedy", "objective": DOWNSTREAM, "local_first": 0.5},
    "greedy, KL + MSE": {"mode": "greedy", "objective": MIXED, "local_first": 0.5},
    "joint, KL": {"mode": "joint", "objective": "e2e", "local_first": 0.5},
    "joint, KL + MSE": {"mode": "joint", "objective": MIXED, "local_first": 0.5},
    "joint, KL + downstream": {"mode": "joint", "objective": DOWNSTREAM, "local_first": 0.5},
    "joint, KL + downstream + agreement": {
        "mode": "joint", "objective": DOWNSTREAM, "local_first": 0.5, "agreement": 0.01,
    },
    "joint, KL + downstream, 2.5 x the tokens": {
        "mode": "joint", "objective": DOWNSTREAM, "local_first": 0.5, "tokens": 2.5,
    },
}  # fmt: skip
"""`tokens`: how many times the others', for the time that the greedy way takes."""


def config(way: dict[str, Any], tokens: int, folder: Path, seed: int) -> MultiE2ESAERunnerConfig:
    """As `quick_config` trains a single SAE."""
    sae = {
        "architecture": "topk", "d_in": 128, "d_sae": 1024, "k": 40, "rescale_acts_by_decoder_norm": True,
        "normalize_activations": "expected_average_only_in",
    }  # fmt: skip
    settings = {key: value for key, value in way.items() if key != "tokens"}
    tokens = int(tokens * way.get("tokens", 1)) // 512 * 512
    hooks = {f"block{block}": f"blocks.{block}.hook_resid_pre" for block in BLOCKS}
    return MultiE2ESAERunnerConfig(
        saes=dict.fromkeys(hooks, sae),
        hook_names=hooks,
        model_name="e2e-sae-demo",
        dataset_path="e2e-sae-demo",
        context_size=128,
        training_tokens=tokens,
        train_batch_size_tokens=512,
        store_batch_size_prompts=4,
        lr=1e-2,
        lr_scheduler_name="cosineannealing",
        lr_end=1e-4,
        lr_warm_up_steps=tokens // 512 // 20,
        b_dec_init_method="mean",
        n_batches_for_norm_estimate=20,
        n_eval_batches=2,
        seed=seed,
        output_path=folder,
        verbose=False,
        **settings,
    )


def main() -> None:
    """Train what is not there, measure all, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=409_600, help="of each SAE (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the SAEs' initial weights (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/joint"), help="default %(default)s")
    parser.add_argument("--held-out", type=int, default=400, help="sequences to measure on (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), metavar="WAY", help="of: " + "; ".join(WAYS))
    args = parser.parse_args()
    # The held-out files, of which runs take the first sequences for their own evaluation.
    model, tokens = load_demo_model(), demo_tokens("evaluation", 128)[: args.held_out]
    lines = [
        "| five SAEs, trained | CE loss increase | KL | features per token | one SAE alone costs | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for name in args.only or WAYS:
        way = WAYS[name]
        folder = args.output / f"{name.replace(', ', '-').replace(' + ', '-').replace(' ', '-')}-seed{args.seed}"
        seconds = trained_seconds(way, args.tokens, folder, args.seed)
        with quiet_host():
            result = load_sae_set(folder).evaluate(model, tokens)
        alone = [row.ce_loss_increase_alone.value for row in result.rows]
        lines.append(
            f"| {name} | {result.ce_loss_increase} | {result.rows[-1].kl.value:.3f} | {result.l0:.0f} "
            f"| {min(alone):.3f} to {max(alone):.3f} | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)
        (folder / "joint.md").write_text(result.table().to_markdown() + "\n")
    print(f"\nOn {tokens.numel():,} tokens of held-out files.")
    (args.output / f"joint-seed{args.seed}.md").write_text("\n".join(lines) + "\n")


def trained_seconds(way: dict[str, Any], tokens: int, folder: Path, seed: int) -> float:
    """Train unless that is done; how long it took."""
    file = folder / "seconds.json"
    if not file.is_file():
        start = time.perf_counter()
        with quiet_host():
            MultiE2ESAETrainingRunner(config(way, tokens, folder, seed)).run()
        file.write_text(json.dumps(time.perf_counter() - start))
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
