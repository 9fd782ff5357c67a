"""What SAEs on 7B and 70B models need: memory by device, communication and speed, predicted from the model of cost.

    python benchmarks/plan.py                        # the tables of docs/scaling.md; no weights, a minute on one core
    python benchmarks/plan.py --check                # the same predictions beside measurements, at sizes that fit here
    python benchmarks/plan.py --check --smollm2 output/smollm2-135m      # and of SmolLM2-135M, see examples/train_smollm2.py

Models are made on torch's "meta" device, which holds no numbers. What autograd keeps of a block is measured on small blocks
and fitted to their widths. The hardware's figures are assumptions (`Hardware`); so is the share of them that is reached.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from transformers import LlamaConfig, LlamaForCausalLM

from e2e_sae_plugin import E2ESAERunnerConfig, Objective, splice_into
from e2e_sae_plugin.build import build_sae, check_model_and_sae, load_language_model
from e2e_sae_plugin.cost.flops import SPLICED, optimizer_bytes, step_flops, total_flops
from e2e_sae_plugin.cost.measure import RunParts, measure_steps
from e2e_sae_plugin.cost.memory import saved_by_spliced_pass
from e2e_sae_plugin.cost.placement import placements
from e2e_sae_plugin.cost.ranks import ranks_of
from e2e_sae_plugin.cost.workload import ModelSizes, SAESizes, SavedBytes, Workload, model_bytes, multiplied_weights

K, CONTEXT = 64, 1024
BF16, FOUR_BITS = 2.0, 0.5 + 4 / 64  # bytes of a weight; 4-bit ones have an fp32 scale for each 64
GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """Assumptions: an H100 SXM's data sheet, without sparsity."""

    bf16_flops: float = 989e12
    fp32_flops: float = 67e12
    """Of the SAE's products, which are fp32 where neither TF32 nor `autocast` is on."""
    memory_bytes_per_second: float = 3.35e12
    memory_bytes: float = 80e9
    node_bytes_per_second: float = 450e9
    """NVLink, one direction, of each GPU."""
    network_bytes_per_second: float = 50e9
    """Between nodes, of each GPU: one 400 Gbit/s adapter."""


@dataclass(frozen=True)
class Scale:
    """A Llama-style model."""

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        """Hugging Face's config of it."""
        return LlamaConfig(
            num_hidden_layers=self.n_layers, hidden_size=self.d_model, num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads, intermediate_size=self.d_mlp, vocab_size=self.vocabulary,
            max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        )  # fmt: skip

    @property
    def widths(self) -> list[int]:
        """What a block's activations are proportional to."""
        return [self.d_model, self.n_kv_heads * self.d_model // self.n_heads, self.d_mlp, self.n_heads]


SCALES = (
    Scale("7B (32k tokens)", 32, 4096, 32, 32, 11008, 32_000),
    Scale("8B (128k tokens)", 32, 4096, 32, 8, 14336, 128_256),
    Scale("70B (128k tokens)", 80, 8192, 64, 8, 28672, 128_256),
)
SMALL = (
    Scale("", 4, 64, 4, 4, 128, 256), Scale("", 4, 128, 4, 4, 256, 256), Scale("", 4, 128, 8, 2, 512, 256),
    Scale("", 4, 256, 8, 4, 512, 256), Scale("", 4, 192, 4, 2, 640, 256), Scale("", 4, 256, 4, 1, 384, 256),
)  # fmt: skip
UNSEEN = Scale("", 4, 384, 12, 3, 1024, 256)
"""Not fitted to: what the fit says of it is compared with what is measured."""


def measured_saved(scale: Scale) -> SavedBytes:
    """What autograd keeps of a block in bf16, per token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(scale.config()).bfloat16()
    spliced = splice_into(HookedProxyLM(model, None, hook_names=[]), "model.layers.1", needs_downstream=False)  # pyright: ignore[reportArgumentType]
    spliced.check()
    return saved_by_spliced_pass(spliced, 96)


def saved_fit() -> np.ndarray:
    """Bytes per token and block for each unit of `Scale.widths`, by least squares."""
    rows = np.array([scale.widths for scale in SMALL], dtype=float)
    values = np.array([measured_saved(scale).fixed for scale in SMALL])
    weights = 1 / values  # relative errors
    return np.linalg.lstsq(rows * weights[:, None], values * weights, rcond=None)[0]


def sizes(scale: Scale, weight_bytes: float) -> ModelSizes:
    """Counted on the meta device; `weight_bytes` of each number of the blocks' matrices, the rest is in bf16."""
    with torch.device("meta"):
        model = LlamaForCausalLM(scale.config()).bfloat16()
    blocks = tuple(multiplied_weights(block, model.config) for block in model.model.layers)
    largest = max(p.numel() for p in model.model.layers[0].parameters())
    total = model_bytes(model)
    return ModelSizes(
        block_weights=blocks,
        score_width=scale.d_model,
        d_model=scale.d_model,
        vocabulary=scale.vocabulary,
        weight_bytes=round(total + (weight_bytes - BF16) * sum(blocks)),
        element_bytes=int(BF16),
        dequantised_bytes=0 if weight_bytes == BF16 else int(BF16) * largest,
    )


def workload(scale: Scale, weight_bytes: float, multiple: int, prompts: int, micro_prompts: int) -> Workload:
    """One rank's step: TopK SAE in fp32 on the middle layer's output, KL."""
    d_sae = multiple * scale.d_model
    n_bytes = 4 * (2 * scale.d_model * d_sae + d_sae + scale.d_model)
    return Workload(
        model=sizes(scale, weight_bytes),
        sae=SAESizes("topk", scale.d_model, d_sae, n_bytes, n_bytes, n_bytes, active=float(K)),
        start_block=scale.n_layers // 2,
        clean_blocks=scale.n_layers,
        spliced_end=scale.n_layers,
        has_kl=True,
        context_size=CONTEXT,
        trained_positions=CONTEXT,
        step_prompts=prompts,
        micro_prompts=micro_prompts,
        separable=False,
        recomputes_blocks=True,
    )


@dataclass(frozen=True)
class Speed:
    """Predicted seconds of one rank's step."""

    model: float
    sae: float
    update: float
    reduce_node: float
    reduce_network: float


def predicted_speed(work: Workload, n_ranks: int, share: float, hardware: Hardware) -> Speed:
    """The step's time, part after part: nothing overlaps."""
    parts = step_flops(work)
    in_sae = sum(flops for part, flops in parts.items() if part.startswith("SAE"))
    in_model = total_flops(parts) - in_sae
    # Blocks that are recomputed run forward once more.
    in_model += sum(flops for part, flops in parts.items() if part.startswith(SPLICED) and "unembedding" not in part)
    sent = ranks_of(work, n_ranks).sent_bytes
    return Speed(
        model=work.tokens_per_step * in_model / (share * hardware.bf16_flops),
        sae=work.tokens_per_step * in_sae / (share * hardware.fp32_flops),
        update=optimizer_bytes(work) / hardware.memory_bytes_per_second,
        reduce_node=sent / hardware.node_bytes_per_second,
        reduce_network=sent / hardware.network_bytes_per_second,
    )


def plan_rows(share: float, n_ranks: int = 8) -> Iterator[list[str]]:
    """Lines of the documentation's tables."""
    fit, hardware = saved_fit(), Hardware()
    for scale in SCALES:
        saved = SavedBytes(float(fit @ np.array(scale.widths, dtype=float)), 0.0)
        for bits, weight_bytes in (("bf16", BF16), ("4 bits", FOUR_BITS)):
            for multiple in (16, 60):
                work = workload(scale, weight_bytes, multiple, prompts=8, micro_prompts=2)
                (both,) = placements(work, saved, "cuda:0", "cuda:0", {})
                model, sae = placements(work, saved, "cuda:1", "cuda:0", {})
                ranks = ranks_of(work, n_ranks)
                speed = predicted_speed(work, n_ranks, share, hardware)
                compute = speed.model + speed.sae + speed.update
                tokens = n_ranks * work.tokens_per_step
                activations = model.memory.peak_bytes - work.model.weight_bytes
                yield [
                    scale.name, bits, f"{multiple} d", f"{work.model.weight_bytes / GB:.0f}", f"{activations / GB:.1f}",
                    f"{sae.memory.peak_bytes / GB:.0f}", f"{both.memory.peak_bytes / GB:.0f}",
                    f"{ranks.reduced_bytes / GB:.1f}", f"{ranks.sent_bytes / GB:.1f}",
                    f"{tokens / (compute + speed.reduce_node):,.0f}", f"{tokens / (compute + speed.reduce_network):,.0f}",
                ]  # fmt: skip


HEADER = [
    "model", "weights", "SAE", "model weights, GB", "its activations, GB", "device with the SAE, GB",
    "all on one device, GB",
    "summed per step, GB", "sent by a rank, GB", "tokens/s, one node of 8", "tokens/s, one GPU a node",
]  # fmt: skip


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def measured_parts(folder: str, hook: str, d_in: int, dtype: str, micro: int, d_sae: int) -> RunParts:
    """A run of a saved model, checked as a run is."""
    cfg = E2ESAERunnerConfig(
        model_name=folder, model_class_name="AutoModelForCausalLM", hook_name=hook, dataset_path="none",
        model_from_pretrained_kwargs={"dtype": dtype}, objective=Objective.e2e(), context_size=128,
        sae=TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=K), train_batch_size_tokens=4 * 128,
        store_batch_size_prompts=micro, training_tokens=4 * 128, n_eval_batches=0, verbose=False,
        checkpoint_path=None, output_path=None, checkpoint_blocks=True, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    model = load_language_model("AutoModelForCausalLM", folder, "cpu", {"dtype": dtype})
    sae = build_sae(cfg)
    spliced = splice_into(model, hook, needs_downstream=False)
    check_model_and_sae(spliced, sae, cfg)
    return RunParts(cfg, spliced, sae)


def check(smollm2: Path | None, steps: int) -> None:
    """Predictions beside measurements."""
    from e2e_sae_plugin.cost.workload import workload_of

    fit, unseen = saved_fit(), measured_saved(UNSEEN)
    said = float(fit @ np.array(UNSEEN.widths, dtype=float))
    print("kept by autograd, per token and block, of a size not fitted to:")
    print(f"  {said:,.0f} B predicted, {unseen.fixed:,.0f} B measured")
    share = None
    with TemporaryDirectory() as folder:
        small = replace(UNSEEN, n_layers=6, vocabulary=8192)
        LlamaForCausalLM(small.config()).save_pretrained(folder)
        _fake_tokenizer(small.vocabulary).save_pretrained(folder)
        cases = [("6 blocks of 384", folder, "model.layers.2", small.d_model)]
        if smollm2 is not None:
            cases.append(("SmolLM2-135M", str(smollm2), "model.layers.14", 576))
        for name, where, hook, d_in in cases:
            parts = measured_parts(where, hook, d_in, "float32", micro=2, d_sae=16 * d_in)
            work = workload_of(parts.cfg, parts.spliced, parts.sae)
            (place,) = placements(work, saved_by_spliced_pass(parts.spliced, 128), "cpu", "cpu", {})
            measured = measure_steps(parts, steps)
            flops = total_flops(step_flops(work))
            reached = measured.main.tokens_per_second * flops / measured.matmul_flops_per_second
            speed = measured.main.tokens_per_second
            line = f"{name}: {speed:,.0f} tokens/s measured, {reached:.0%} of a matrix product's speed"
            if share is not None:
                line += (
                    f", {share * measured.matmul_flops_per_second / flops:,.0f} predicted with the share of the first"
                )
            print(line)
            peak = measured.peak_bytes or 0
            print(
                f"  peak of the process: {place.memory.peak_bytes / GB:.2f} GB predicted, {peak / GB:.2f} GB measured"
            )
            share = share or reached


def _fake_tokenizer(vocabulary: int) -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocabulary)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="t1", eos_token="t2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with measurements at sizes that fit here")
    parser.add_argument("--smollm2", type=Path, help="the folder of SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of --check")
    parser.add_argument("--share", type=float, default=0.4, help="of the hardware's FLOP/s that is reached")
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check:
        check(args.smollm2, args.steps)
    else:
        print(table(HEADER, list(plan_rows(args.share, args.ranks))))


if __name__ == "__main__":
    main()
