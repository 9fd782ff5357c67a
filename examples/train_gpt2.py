"""A SAELens training script with its two lines changed: the config class and the runner class.

    python examples/train_gpt2.py --device cuda

Needs the Hugging Face Hub for GPT2-small and the tokenised OpenWebText of the paper's authors. `--paper` trains the
paper's own run for layer 6 instead (400k sequences: hours on a GPU).
"""

from __future__ import annotations

import argparse

from sae_lens import LoggingConfig, StandardTrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective, paper_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--paper", action="store_true", help="the paper's run at layer 6, e2e + downstream")
    args = parser.parse_args()
    if args.paper:
        cfg = paper_config(6, "e2e+ds", device=args.device, logger=LoggingConfig(log_to_wandb=False))
    else:
        cfg = E2ESAERunnerConfig(  # was LanguageModelSAERunnerConfig
            model_name="gpt2-small",
            hook_name="blocks.6.hook_resid_pre",
            dataset_path="apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
            context_size=1024,
            sae=StandardTrainingSAEConfig(d_in=768, d_sae=8 * 768, l1_coefficient=3 / 768),
            objective=Objective.e2e(),
            lr=5e-4,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=500,
            train_batch_size_tokens=8 * 1024,
            store_batch_size_prompts=8,
            training_tokens=50_000_000,
            device=args.device,
            logger=LoggingConfig(log_to_wandb=False),
        )
    E2ESAETrainingRunner(cfg).run()  # was LanguageModelSAETrainingRunner


if __name__ == "__main__":
    main()
