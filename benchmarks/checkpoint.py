"""What a checkpoint costs: bytes, seconds to write, to check and to resume from, and its share of the run.

    python benchmarks/checkpoint.py [--repeats 5] [--only demo smollm2-8d smollm2-60d] [--folder DIR]

The disk counts: everything is synced before a checkpoint gets its name. `--folder` says on which disk to measure.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from datasets import Dataset
from sae_lens import LoggingConfig, StandardTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainer, E2ESAETrainingRunner
from e2e_sae_plugin.checkpoint import verify_checkpoint
from e2e_sae_plugin.demo import load_demo_model, load_demo_tokenizer
from e2e_sae_plugin.faults import StepStatistics


def smollm2_shape() -> HookedProxyLM:
    """SmolLM2-135M's shape with random weights."""
    config = transformers.LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return HookedProxyLM(model, load_demo_tokenizer(), hook_names=[])


# name -> (model, hook, d_in, d_sae, vocabulary)
SHAPES: dict[str, tuple[Callable[[], Any], str, int, int, int]] = {
    "demo": (load_demo_model, "blocks.3.hook_resid_pre", 128, 1024, 2048),
    "smollm2-8d": (smollm2_shape, "model.layers.9", 576, 8 * 576, 49_152),
    "smollm2-60d": (smollm2_shape, "model.layers.9", 576, 60 * 576, 49_152),
}
CONTEXT, PROMPTS, STEPS = 128, 8, 3


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def built_trainer(name: str, folder: Path, resume: str | None = None) -> tuple[E2ESAETrainingRunner, E2ESAETrainer]:
    load, hook, d_in, d_sae, vocabulary = SHAPES[name]
    config = E2ESAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=0.1),
        model_name=name, hook_name=hook, dataset_path="random tokens", context_size=CONTEXT,
        training_tokens=100 * PROMPTS * CONTEXT, train_batch_size_tokens=PROMPTS * CONTEXT,
        store_batch_size_prompts=4, n_eval_batches=0, checkpoint_path=str(folder), output_path=None,
        resume_from_checkpoint=resume, logger=LoggingConfig(log_to_wandb=False), verbose=False,
    )  # fmt: skip
    tokens = torch.randint(vocabulary - 1, (1000, CONTEXT), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"tokens": tokens.numpy()})
    runner = E2ESAETrainingRunner(config, override_model=load(), override_dataset=data)
    return runner, runner._build_trainer()


def measure(name: str, folder: Path, repeats: int) -> str:
    checkpoint, step, guard, writes = measure_writing(name, folder, repeats)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    check = median(seconds(lambda: verify_checkpoint(checkpoint)) for _ in range(repeats))
    _, again = built_trainer(name, folder, resume=str(checkpoint))
    load = seconds(lambda: again.load_trainer_state(checkpoint))
    write, interval = median(writes), 60 * (again.runner_cfg.checkpoint_every_minutes or 0)
    return (
        f"| {name} | {size / 1e6:.1f} | {write:.2f} ({min(writes):.2f} to {max(writes):.2f}) | {check:.2f} | {load:.2f} | "
        f"{step:.2f} | {write / (interval + write):.2%} | {guard / step:.2%} |"
    )


def measure_writing(name: str, folder: Path, repeats: int) -> tuple[Path, float, float, list[float]]:
    """A checkpoint, and the seconds of a step, of what a step keeps to be taken back, and of each write."""
    runner, trainer = built_trainer(name, folder)
    step = median([seconds(lambda: trainer.step(next(runner.tokens))) for _ in range(STEPS + 1)][1:])
    trainer.n_training_steps = STEPS
    guard = median(seconds(lambda: (StepStatistics(trainer), runner.tokens.store.position())) for _ in range(20))
    writes = [seconds(lambda i=i: trainer.save_checkpoint(f"{i}", kind="rolling")) for i in range(repeats)]
    assert trainer.checkpointer.last is not None
    return trainer.checkpointer.last, step, guard, writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; default: the temporary folder")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        "| shape | MB | write, s | check, s | load, s | one step, s | share of run time at the default interval "
        "| guard and place, share of a step |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print(measure(name, Path(folder), args.repeats), flush=True)


if __name__ == "__main__":
    main()
