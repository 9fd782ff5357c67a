"""Train the bundled language model and write it into `e2e_sae_plugin/demo/model/`.

    python scripts/train_demo_model.py --minutes 60
    python scripts/train_demo_model.py --optimizer adamw --output output/adamw_model      # as language models usually are

Reads the running interpreter's standard library (tests included where they are installed), learns a byte-level BPE on
the training files and trains a small rotary transformer in plain PyTorch: Muon for the matrices of the blocks, AdamW
for the rest. Plain PyTorch because Muon wants 2-D matrices and fused attention is twice as fast on a CPU; the result is
exported as a `HookedTransformer` state dict, and held-out bits per byte are measured on that, as users load it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from e2e_sae_plugin.demo.corpus import stdlib_texts
from e2e_sae_plugin.demo.model import BOS_TOKEN, MODEL_DIRECTORY, bits_per_byte, load_demo_model, load_demo_tokenizer

MODEL_CONFIG = {
    "n_layers": 6,
    "d_model": 128,
    "n_ctx": 256,
    "d_head": 32,
    "n_heads": 4,
    "d_mlp": 512,
    "d_vocab": 2048,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "positional_embedding_type": "rotary",
    "rotary_dim": 32,
    "rotary_base": 10000,
}


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))],
    )
    return tokenizer


class Attention(nn.Module):
    def __init__(self, d_model: int, n_heads: int, d_head: int):
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_head
        self.qkv = nn.Linear(d_model, 3 * n_heads * d_head)
        self.out = nn.Linear(n_heads * d_head, d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, pos, _ = x.shape
        q, k, v = self.qkv(x).view(batch, pos, 3, self.n_heads, self.d_head).permute(2, 0, 3, 1, 4)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).reshape(batch, pos, -1))


def rotate_half(x: Tensor) -> Tensor:
    """Half-split rotary pairs, the convention of TransformerLens with `rotary_adjacent_pairs=False`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int, d_head: int, d_mlp: int):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn = Attention(d_model, n_heads, d_head)
        self.mlp_in, self.mlp_out = nn.Linear(d_model, d_mlp), nn.Linear(d_mlp, d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), cos, sin)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.ln2(x))))


class Transformer(nn.Module):
    """The architecture of `MODEL_CONFIG`, for training only."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: dict):
        super().__init__()
        self.cfg = cfg
        d_model = cfg["d_model"]
        self.embed = nn.Embedding(cfg["d_vocab"], d_model)
        self.blocks = nn.ModuleList(
            Block(d_model, cfg["n_heads"], cfg["d_head"], cfg["d_mlp"]) for _ in range(cfg["n_layers"])
        )
        self.ln_final = nn.LayerNorm(d_model)
        self.unembed = nn.Linear(d_model, cfg["d_vocab"], bias=False)
        frequencies = cfg["rotary_base"] ** (-torch.arange(0, cfg["d_head"], 2) / cfg["d_head"])
        angles = (torch.arange(cfg["n_ctx"])[:, None] * frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attn.out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.cfg["n_layers"]) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats of `tokens [batch, pos]`."""
        x = self.embed(tokens[:, :-1])
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.unembed(self.ln_final(x))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def hooked_state_dict(self) -> dict[str, Tensor]:
        """The weights under TransformerLens's names and shapes."""
        cfg, state = self.cfg, {}
        n_heads, d_head, d_model = cfg["n_heads"], cfg["d_head"], cfg["d_model"]
        state["embed.W_E"] = self.embed.weight
        blocks: list[Any] = list(self.blocks)
        for i, block in enumerate(blocks):
            prefix = f"blocks.{i}."
            for ln in ("ln1", "ln2"):
                state[f"{prefix}{ln}.w"], state[f"{prefix}{ln}.b"] = getattr(block, ln).weight, getattr(block, ln).bias
            weights = block.attn.qkv.weight.view(3, n_heads, d_head, d_model).transpose(-1, -2)
            biases = block.attn.qkv.bias.view(3, n_heads, d_head)
            for j, letter in enumerate("QKV"):
                state[f"{prefix}attn.W_{letter}"], state[f"{prefix}attn.b_{letter}"] = weights[j], biases[j]
            state[f"{prefix}attn.W_O"] = block.attn.out.weight.T.reshape(n_heads, d_head, d_model)
            state[f"{prefix}attn.b_O"] = block.attn.out.bias
            state[f"{prefix}mlp.W_in"], state[f"{prefix}mlp.b_in"] = block.mlp_in.weight.T, block.mlp_in.bias
            state[f"{prefix}mlp.W_out"], state[f"{prefix}mlp.b_out"] = block.mlp_out.weight.T, block.mlp_out.bias
        state["ln_final.w"], state["ln_final.b"] = self.ln_final.weight, self.ln_final.bias
        state["unembed.W_U"] = self.unembed.weight.T
        state["unembed.b_U"] = torch.zeros(cfg["d_vocab"])
        return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}


def learning_rate_factor(progress: float, warm_up: float = 0.02, flat: float = 0.4) -> float:
    """Linear warm-up, flat, then linear to zero, as a function of the share of the run that is done."""
    if progress < warm_up:
        return progress / warm_up
    return 1.0 if progress < flat else max(0.0, (1.0 - progress) / (1.0 - flat))


def train(model: Transformer, stream: Tensor, args: argparse.Namespace, bos: int) -> tuple[int, float]:
    """Train for `args.minutes`; returns the tokens seen and the last smoothed training loss."""
    optimizers: list[torch.optim.Optimizer]
    if args.optimizer == "muon":
        matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
        in_blocks = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in in_blocks]
        optimizers = [
            torch.optim.Muon(matrices, lr=args.lr_muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=args.lr_adam, betas=(0.9, 0.95), weight_decay=0.0),
        ]
    else:
        decayed = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizers = [torch.optim.AdamW(groups, lr=args.lr_adam, betas=(0.9, 0.95))]
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    loss_fn = torch.compile(model.loss) if args.compile else model.loss
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(model.cfg["n_ctx"])
    start, steps, smoothed = time.monotonic(), 0, float("nan")
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(progress)
        starts = torch.randint(len(stream) - len(offsets), (args.batch_sequences, 1), generator=generator)
        tokens = F.pad(stream[starts + offsets].long(), (1, 0), value=bos)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_fn(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smoothed = loss.item() if steps == 0 else 0.98 * smoothed + 0.02 * loss.item()
        steps += 1
        if steps % args.log_every == 0:
            seen = steps * args.batch_sequences * len(offsets)
            print(
                f"{progress:6.1%}  step {steps}  {seen / 1e6:.1f}M tokens  "
                f"{time.monotonic() - start:.0f} s  loss {smoothed:.4f}",
                flush=True,
            )
    return steps * args.batch_sequences * len(offsets), smoothed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock training time")
    parser.add_argument("--batch-sequences", type=int, default=16, help="sequences of n_ctx tokens a step")
    parser.add_argument(
        "--optimizer",
        choices=["muon", "adamw"],
        default="muon",
        help="muon for the matrices of the blocks, or AdamW for all, with a weight decay of 0.1 for matrices",
    )
    parser.add_argument("--lr-muon", type=float, default=0.01)
    parser.add_argument("--lr-adam", type=float, default=0.004)
    parser.add_argument("--log-every", type=int, default=100, help="steps between two lines of progress")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast the training pass")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training pass")
    parser.add_argument("--output", type=Path, default=MODEL_DIRECTORY)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    texts = stdlib_texts("train", include_tests=True)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, MODEL_CONFIG["d_vocab"])
    tokenizer.save(str(args.output / "tokenizer.json"))
    bos = tokenizer.token_to_id(BOS_TOKEN)
    assert bos is not None
    ids = [
        torch.tensor(encoding.ids, dtype=torch.int16) for encoding in tokenizer.encode_batch(texts)
    ]  # BOS, then the file
    stream = torch.cat(ids)
    size = sum(len(text.encode()) for text in texts)
    print(
        f"{len(texts)} files, {size / 1e6:.1f} MB, {len(stream) / 1e6:.2f}M tokens, {size / len(stream):.2f} bytes a token"
    )

    model = Transformer(MODEL_CONFIG)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    tokens_seen, train_loss = train(model, stream, args, bos)

    (args.output / "config.json").write_text(json.dumps(MODEL_CONFIG, indent=2) + "\n")
    save_file(model.hooked_state_dict(), args.output / "model.safetensors")
    hooked, fast_tokenizer = load_demo_model(args.output), load_demo_tokenizer(args.output)
    report = {
        "python": platform.python_version(),
        "optimizer": args.optimizer,
        "training_minutes": args.minutes,
        "training_tokens": tokens_seen,
        "final_training_loss_nats": round(train_loss, 4),
        "bits_per_byte": {
            "evaluation": bits_per_byte(hooked, fast_tokenizer, stdlib_texts("evaluation")),
            "evaluation_with_tests": bits_per_byte(
                hooked, fast_tokenizer, stdlib_texts("evaluation", include_tests=True)
            ),
        },
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
