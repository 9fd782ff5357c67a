"""One optimizer step of each library on the same problem, timed. Imported in the contestant's own process only."""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from shape import Shape
from torch import Tensor

Times = tuple[float, float]
"""Wall-clock and processor seconds."""
Run = Callable[[Shape, int, int], list[Times]]
"""(shape, d_sae, steps) -> times of each step, the first of which is the warm-up."""

L1_COEFFICIENT = 1.5  # the paper's lambda for e2e at layer 6; nothing here depends on it
MAX_GRAD_NORM = 10.0
LEARNING_RATE = 5e-4
SPARSE_RATE = 1e-7  # keeps the L0 where it is set; the time of a step does not depend on it


def random_tokens(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocabulary, (shape.n_prompts, shape.context_size), generator=generator)


def hooked_transformer(shape: Shape) -> Any:
    """A TransformerLens GPT-2 with random weights: what both ReLU contestants run."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            n_heads=shape.n_heads,
            d_head=shape.d_model // shape.n_heads,
            d_mlp=4 * shape.d_model,
            d_vocab=shape.vocabulary,
            n_ctx=shape.n_ctx,
            act_fn="gelu_new",
            normalization_type="LN",
            device="cpu",
            seed=0,
        )
    )


def hugging_face_gpt2(shape: Shape) -> Any:
    """A Hugging Face GPT-2 with random weights: what both TopK contestants run."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=shape.n_layers,
        n_embd=shape.d_model,
        n_head=shape.n_heads,
        vocab_size=shape.vocabulary,
        n_positions=shape.n_ctx,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def now() -> Times:
    return time.perf_counter(), time.process_time()


def between(stamps: list[Times]) -> list[Times]:
    return [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(stamps)]


def timed(step: Callable[[], object], n_steps: int) -> list[Times]:
    stamps = [now()]
    for _ in range(n_steps):
        step()
        stamps.append(now())
    return between(stamps)


def our_trainer(
    shape: Shape, model: Any, hook_name: str, sae_cfg: Any, max_grad_norm: float | None, lr: float = LEARNING_RATE
) -> Any:
    """An `E2ESAETrainer` for the KL, built from the parts that one step touches."""
    from sae_lens import LoggingConfig
    from sae_lens.saes.sae import TrainingSAE

    from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainer, Objective, splice_into
    from e2e_sae_plugin.metrics_log import MetricsLog

    cfg: Any = E2ESAERunnerConfig(
        sae=sae_cfg,
        hook_name=hook_name,
        objective=Objective.e2e(),
        context_size=shape.context_size,
        train_batch_size_tokens=shape.tokens_per_step,
        store_batch_size_prompts=shape.n_prompts // 2,
        training_tokens=100 * shape.tokens_per_step,
        lr=lr,
        max_grad_norm=max_grad_norm,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    spliced = splice_into(model, hook_name, needs_downstream=False)
    spliced.check()
    sae = TrainingSAE.from_dict(sae_cfg.to_dict())
    return E2ESAETrainer(cfg, sae, spliced, iter([]), MetricsLog(None, to_wandb=False))


@torch.no_grad()
def set_l0(model: Any, shape: Shape, W_enc: Tensor, b_enc: Tensor) -> None:
    """Lower an SAE's encoder bias `[d_sae]` by one number, so that `shape.l0` features of a token are active on average.

    Random weights activate half the features; a trained SAE some dozens.

    Args:
        W_enc: `[d_in, d_sae]`.
    """
    _, cache = model.run_with_cache(random_tokens(shape), names_filter=shape.hook_name, stop_at_layer=shape.layer + 1)
    pre = cache[shape.hook_name].flatten(0, 1)[::16] @ W_enc + b_enc
    n_active = shape.l0 * len(pre)
    b_enc -= pre.flatten().topk(n_active, sorted=False).values.min()


def ours_relu(shape: Shape, d_sae: int, n_steps: int, sparse: bool = False) -> list[Times]:
    from sae_lens import StandardTrainingSAEConfig

    sae_cfg = StandardTrainingSAEConfig(
        d_in=shape.d_model,
        d_sae=d_sae,
        l1_coefficient=L1_COEFFICIENT / shape.d_model,
        apply_b_dec_to_input=False,  # as in the authors' SAE
        decoder_init_norm=1.0,
    )
    model = hooked_transformer(shape)
    trainer = our_trainer(
        shape, model, shape.hook_name, sae_cfg, MAX_GRAD_NORM, SPARSE_RATE if sparse else LEARNING_RATE
    )
    if sparse:
        set_l0(model, shape, trainer.sae.W_enc, trainer.sae.b_enc)
    tokens = random_tokens(shape)
    return timed(lambda: trainer.step(tokens), n_steps)


def ours_topk(shape: Shape, d_sae: int, n_steps: int) -> list[Times]:
    from sae_lens import TopKTrainingSAEConfig
    from sae_lens.load_model import HookedProxyLM

    tokenizer: Any = None  # the tokens are given
    model = HookedProxyLM(hugging_face_gpt2(shape), tokenizer, hook_names=[])
    # Not rescaled by decoder norms, as the peer's are not.
    sae_cfg = TopKTrainingSAEConfig(d_in=shape.d_model, d_sae=d_sae, k=shape.k, rescale_acts_by_decoder_norm=False)
    trainer = our_trainer(shape, model, f"transformer.h.{shape.layer - 1}", sae_cfg, None)  # the peer does not clip
    tokens = random_tokens(shape)
    return timed(lambda: trainer.step(tokens), n_steps)


def e2e_sae(shape: Shape, d_sae: int, n_steps: int, sparse: bool = False) -> list[Times]:
    """The authors' training step: both passes, the loss, backward, clipping and Adam, without its logging."""
    authors = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "authors.py"))
    losses, transformers = authors["import_authors"]()
    model = transformers.SAETransformer(
        hooked_transformer(shape), [shape.hook_name], d_sae / shape.d_model, init_decoder_orthogonal=False
    )
    if sparse:
        encoder = next(iter(model.saes.values())).encoder[0]
        set_l0(model.tlens_model, shape, encoder.weight.T, encoder.bias)
    model.saes.train()
    model.tlens_model.requires_grad_(False)
    config = losses.LossConfigs(
        sparsity=losses.SparsityLoss(coeff=L1_COEFFICIENT),
        in_to_orig=None,
        out_to_orig=None,
        out_to_in=None,
        logits_kl=losses.LogitsKLLoss(coeff=1.0),
    )
    optimizer = torch.optim.Adam(model.saes.parameters(), lr=SPARSE_RATE if sparse else LEARNING_RATE)
    tokens = random_tokens(shape)

    # A function, as one pass of their loop: its tensors do not outlive it here, though they do in their loop.
    def step() -> None:
        clean_logits, clean_acts = model.forward_raw(tokens=tokens, run_entire_model=True)
        new_logits, new_acts = model(tokens=tokens, sae_positions=[shape.hook_name])
        loss, _ = losses.calc_loss(clean_acts, new_acts, clean_logits.detach().clone(), new_logits, config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.saes.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, n_steps)


class TimedRows:
    """A dataset that notes when each batch is asked for, which is when a step of `sparsify`'s trainer begins."""

    def __init__(self, tokens: Tensor, n_batches: int):
        self.tokens, self.n_batches = tokens, n_batches
        self.asked_at: list[Times] = []

    def __len__(self) -> int:
        return self.n_batches * len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = index % len(self.tokens)
        if row == 0:
            self.asked_at.append(now())
        return {"input_ids": self.tokens[row]}


def eai_sparsify(shape: Shape, d_sae: int, n_steps: int) -> list[Times]:
    """Its own `Trainer.fit` on a Hugging Face GPT-2, with Adam."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    class TimedTrainer(Trainer):
        def save(self) -> None:  # `fit` calls it after the last step
            self.ended_at = now()

    rows: Any = TimedRows(random_tokens(shape), n_steps)
    config = TrainConfig(
        SparseCoderConfig(num_latents=d_sae, k=shape.k),
        batch_size=shape.n_prompts,
        loss_fn="kl",
        optimizer="adam",
        lr=LEARNING_RATE,
        hookpoints=[f"h.{shape.layer - 1}"],  # a layer's output is the residual stream entering the next one
        log_to_wandb=False,
    )
    trainer = TimedTrainer(config, rows, hugging_face_gpt2(shape))
    trainer.fit()
    return between([*rows.asked_at, trainer.ended_at])


CONTESTANTS: dict[str, Run] = {
    "ours-relu": ours_relu,
    "e2e-sae": e2e_sae,
    "ours-relu-sparse": partial(ours_relu, sparse=True),
    "e2e-sae-sparse": partial(e2e_sae, sparse=True),
    "ours-topk": ours_topk,
    "eai-sparsify": eai_sparsify,
}
