"""What a fine-tune gains on the bundled model, by what is trained, and by a control.

    python benchmarks/finetune.py --architecture topk
    python benchmarks/finetune.py --architecture jumprelu --tokens 1500000
    python benchmarks/finetune.py --architecture standard --tokens 1000000

Trains a local SAE (unless its folder is there already), then fine-tunes it for a tenth of its tokens in each way, on
KL + MSE; the control trains the squared error alone for as many tokens, at the same rate. `--mixed` also trains one from
scratch, the last tenth of its tokens on KL + MSE. Each row is measured on the same held-out files.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from sae_lens import SAE, JumpReLUTrainingSAEConfig, LoggingConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, FinetuneRunner, Objective, finetune_config
from e2e_sae_plugin.demo import demo_dataset, demo_tokens, load_demo_model
from e2e_sae_plugin.demo.run import quiet_host
from e2e_sae_plugin.evaluation import SpliceMetrics

CONTEXT_SIZE, STEP_PROMPTS, N_HELD_OUT = 128, 4, 400
SHARED: dict[str, Any] = {
    "train_batch_size_tokens": STEP_PROMPTS * CONTEXT_SIZE, "store_batch_size_prompts": STEP_PROMPTS,
    "checkpoint_path": None, "overwrite_output": True, "verbose": False, "dataset_path": "Python standard library",
}  # fmt: skip
SIZE: dict[str, Any] = {"d_in": 128, "d_sae": 1024, "normalize_activations": "expected_average_only_in"}
SAES: dict[str, tuple[Any, float]] = {
    "topk": (TopKTrainingSAEConfig(k=40, **SIZE), 1e-2),
    "jumprelu": (
        JumpReLUTrainingSAEConfig(l0_coefficient=0.1, jumprelu_init_threshold=0.1, l0_warm_up_steps=500, **SIZE),
        2e-3,
    ),
    "standard": (StandardTrainingSAEConfig(l1_coefficient=0.3, l1_warm_up_steps=200, **SIZE), 2e-3),
}


# For activations as they are: the base's coefficient over the scale of its normalisation, which is folded into its weights.
# (A fine-tune with the metadata's own 0.3 is refused, and the message names this one within a few per cent.)
SAE_SETTINGS: dict[str, dict[str, float]] = {"standard": {"l1_coefficient": 11.69}}


class Bench:
    """The model, its data, and where SAEs go."""

    def __init__(self, output: Path):
        self.output, self.model = output, load_demo_model()
        self.dataset = demo_dataset("train", CONTEXT_SIZE)
        self.held_out = demo_tokens("evaluation", CONTEXT_SIZE)[:N_HELD_OUT]

    def train(self, architecture: str, tokens: int, objective: Objective, local_first: float) -> Path:
        sae, lr = SAES[architecture]
        folder = self.output / f"{architecture}-{'mixed' if local_first else 'base'}"
        if (folder / "cfg.json").exists():
            return folder
        cfg = E2ESAERunnerConfig(
            sae=dataclasses.replace(sae),
            objective=objective,
            local_first=local_first,
            model_name="e2e-sae-demo",
            hook_name="blocks.3.hook_resid_pre",
            context_size=CONTEXT_SIZE,
            training_tokens=tokens,
            b_dec_init_method="mean",
            exclude_special_tokens=True,
            lr=lr,
            lr_end=lr / 100,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=100,
            adam_beta2=0.99,
            n_batches_for_norm_estimate=20,
            n_eval_batches=0,
            output_path=str(folder),
            logger=LoggingConfig(log_to_wandb=False),
            **SHARED,
        )
        E2ESAETrainingRunner(cfg, override_model=self.model, override_dataset=self.dataset).run()
        return folder

    def finetune(self, base: Path, name: str, tokens: int, **settings: Any) -> FinetuneRunner:
        sae = SAE.load_from_disk(str(base))
        cfg = finetune_config(
            sae, sae_settings=SAE_SETTINGS.get(sae.cfg.architecture()), training_tokens=tokens,
            output_path=str(self.output / f"{base.name}-{name}"), exclude_special_tokens=True, **SHARED, **settings,
        )  # fmt: skip
        given: dict[str, Any] = {"override_model": self.model, "override_dataset": self.dataset}
        runner = FinetuneRunner(cfg, sae, source=str(base), override_evaluation_tokens=self.held_out, **given)
        runner.run()
        return runner


WAYS: dict[str, dict[str, Any]] = {
    "all": {"lr": 1e-3},
    "all, lr 3e-4": {"lr": 3e-4},
    "decoder": {"trained": "decoder", "lr": 1e-3},
    "scale_and_bias": {"trained": "scale_and_bias", "lr": 3e-3},
    "lora": {"trained": "lora", "lr": 1e-3},
    "control: local": {"lr": 1e-3, "objective": Objective.local()},
}


def row(name: str, metrics: SpliceMetrics, closed: str = "", features: str = "") -> str:
    """One line of the table."""
    numbers = f"{metrics.kl:.4f} | {metrics.l0:.1f} | {metrics.explained_variance:.4f}"
    return f"| {name} | {metrics.ce_loss_increase:+.4f} | {closed} | {numbers} | {features} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=list(SAES), default="topk")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="of the local SAE (%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--mixed", action="store_true", help="also one run from scratch, its last tenth on KL + MSE")
    parser.add_argument("--output", type=Path, default=Path("output/finetune-benchmark"))
    args = parser.parse_args()
    bench = Bench(args.output)
    with quiet_host():
        base = bench.train(args.architecture, args.tokens, Objective.local(), 0)
        print("| trained | CE loss increase | gap closed | KL | L0 | explained variance | same, changed |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for index, name in enumerate(args.ways):
            report = bench.finetune(base, re.sub(r"\W+", "-", name), args.tokens // 10, **WAYS[name]).report
            assert report is not None
            if index == 0:
                print(row("nothing", report.before))
            closed, counts = report.estimates()["gap_closed"]["change"], report.labels.counts()
            share = f"{closed['value']:.1%} [{closed['low']:.1%}, {closed['high']:.1%}]"
            print(row(name, report.after, share, f"{counts['same']}, {counts['changed']}"), flush=True)
        if args.mixed:
            folder = bench.train(args.architecture, args.tokens, Objective.finetune(), 0.9)
            runner = bench.finetune(folder, "measured", 512, lr=1e-9)
            print(row("mixed", runner.before))


if __name__ == "__main__":
    main()
