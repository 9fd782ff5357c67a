"""The same SAE trained on its squared error alone and end to end, on the bundled model: what does each cost the model?

    python examples/train.py [--tokens 120000]

`E2ESAERunnerConfig` and `E2ESAETrainingRunner` stand where a SAELens script has `LanguageModelSAERunnerConfig` and
`LanguageModelSAETrainingRunner`; all other lines are SAELens's. No network, no GPU; about a minute on two cores.
Writes output/train/local and output/train/e2e, which plain SAELens loads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import bundled  # noqa: F401  # keeps SAELens quiet about data that are given as an object
from sae_lens import SAE, LoggingConfig, TopKTrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective


def train(objective: Objective, local_first: float, tokens: int, output: Path) -> dict[str, float]:
    """One run; returns its last held-out evaluation."""
    cfg = E2ESAERunnerConfig(  # was LanguageModelSAERunnerConfig
        model_name="e2e-sae-demo",  # the bundled model, and Python's standard library as its text
        dataset_path="e2e-sae-demo",
        hook_name="blocks.3.hook_resid_pre",
        context_size=128,
        sae=TopKTrainingSAEConfig(d_in=128, d_sae=1024, k=40, normalize_activations="expected_average_only_in"),
        objective=objective,  # what is minimised besides the SAE's own sparsity: new
        local_first=local_first,  # this share of the tokens on the squared error, before the objective takes over: new
        b_dec_init_method="mean",
        training_tokens=tokens // 512 * 512,
        train_batch_size_tokens=512,  # one optimizer step; there is no activation buffer
        store_batch_size_prompts=4,
        lr=1e-2,
        lr_scheduler_name="cosineannealing",
        lr_end=1e-4,
        lr_warm_up_steps=tokens // 512 // 20,
        n_batches_for_norm_estimate=10,
        n_eval_batches=6,  # held out: the first 6 x 16 sequences, never trained on
        eval_batch_size_prompts=16,
        output_path=str(output),
        overwrite_output=True,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    E2ESAETrainingRunner(cfg).run()  # was LanguageModelSAETrainingRunner
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=120_000, help="of each SAE (%(default)s)")
    args = parser.parse_args()
    runs = {"local": (Objective.local(), 0.0), "e2e": (Objective.e2e_downstream(beta=1e-4), 0.6)}
    folders = {name: Path("output/train") / name for name in runs}
    found = {name: train(*run, args.tokens, folders[name]) for name, run in runs.items()}
    print("\ntrained     CE loss increase      KL     L0   explained variance")
    for name, metrics in found.items():
        print(
            f"{name:<8} {metrics['metrics/ce_loss_increase']:>+19.4f} {metrics['metrics/held_out_kl']:>7.4f} "
            f"{metrics['metrics/held_out_l0']:>6.1f} {metrics['metrics/held_out_explained_variance']:>20.3f}"
        )
    sae = SAE.load_from_disk(str(folders["e2e"]))
    print(f"\nPlain SAELens loads it: a {sae.cfg.architecture()} SAE on {sae.cfg.metadata.hook_name}.")


if __name__ == "__main__":
    main()
