"""A training loop of your own, with a loss of your own on the spliced pass, out of this package's pieces.

    python examples/own_loop.py [--steps 150] [--weight 0.5]

The paper compares later layers by squared error, which the largest directions dominate, while the layers behind read the
residual stream through a LayerNorm. Here the term is 1 - cosine of the clean and the spliced residual stream at the last
block: without a scale, so that its weight needs no search. `splice_into` freezes the model and runs it twice, the second
time from the SAE's block on with whatever tensor it is given; gradients flow back to that tensor. No network, no GPU; half a
minute on two cores. Writes output/own_loop, an SAE that plain SAELens loads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from bundled import HOOK_NAME
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from e2e_sae_plugin import SplicedModel, evaluate, load_sae, splice_into
from e2e_sae_plugin.demo import demo_tokens, load_demo_model
from e2e_sae_plugin.losses import kl_per_token

LAST = "blocks.5.hook_resid_pre"
D_SAE, K, PROMPTS = 1024, 40, 4


def starting_sae(spliced_model: SplicedModel, tokens: torch.Tensor) -> tuple[TopKTrainingSAE, float]:
    """An SAE whose bias is the mean activation, and the factor that brings activations to norm sqrt(d)."""
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=128, d_sae=D_SAE, k=K))
    activations = spliced_model.clean_pass(tokens, hidden=False).activation.flatten(0, 1)
    scale = 128**0.5 / float(activations.norm(dim=-1).mean())
    with torch.no_grad():
        sae.b_dec.copy_(activations.mean(0) * scale)
    return sae, scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of 512 tokens (%(default)s)")
    parser.add_argument("--weight", type=float, default=0.5, help="of the term of one's own (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/own_loop"))
    args = parser.parse_args()

    torch.manual_seed(0)
    spliced_model = splice_into(load_demo_model(), HOOK_NAME, downstream_hooks=[LAST])
    spliced_model.check()  # runs a few tokens: is the hook there, is the last block really downstream of it?
    data = demo_tokens("train", 128)
    sae, scale = starting_sae(spliced_model, data[-64:])
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps, eta_min=1e-4)

    for step in range(args.steps):
        clean = spliced_model.clean_pass(data[step * PROMPTS : (step + 1) * PROMPTS])
        assert clean.hidden is not None
        x = clean.activation.flatten(0, 1) * scale
        output = sae.training_forward_pass(TrainStepInput(x, {}, None, step, is_logging_step=False))
        mse = output.losses["mse_loss"]
        terms = {"mse": mse}
        loss = mse
        if step >= args.steps // 2:  # local first: the KL takes over from features that exist
            spliced = spliced_model.spliced_pass(clean, (output.sae_out / scale).view_as(clean.activation))
            assert spliced.hidden is not None
            clean_logits, logits = (spliced_model.logits(each.flatten(0, 1)) for each in (clean.hidden, spliced.hidden))
            terms["kl"] = kl_per_token(clean_logits, logits).mean()
            terms["angle"] = (1 - F.cosine_similarity(clean.downstream[LAST], spliced.downstream[LAST], dim=-1)).mean()
            loss = terms["kl"] + args.weight * terms["angle"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 10) == 0 or step == args.steps - 1:
            print(
                f"step {step:4d}  " + "  ".join(f"{name} {value.item():8.4f}" for name, value in terms.items()),
                flush=True,
            )

    sae.fold_activation_norm_scaling_factor(scale)  # into the weights: users give it the model's own activations
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "e2e-sae-demo", HOOK_NAME
    sae.save_inference_model(args.output)
    print(f"\n{evaluate(load_sae(args.output), spliced_model.model, demo_tokens('evaluation', 128)[:64])}")


if __name__ == "__main__":
    main()
