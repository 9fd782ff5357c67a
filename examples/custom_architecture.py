"""An SAE architecture of your own, trained end to end, with downstream hooks of your own.

    python examples/custom_architecture.py [--tokens 50000]

A ReLU SAE whose sparsity penalty saturates: tanh(f) in the place of f, so that features which fire strongly are not shrunk
for it (Jermyn et al. 2024). It is registered with SAELens; all else, the second pass, checkpoints and evaluation,
takes it as it is. It is saved as the architecture that it computes, so that plain SAELens loads it. The downstream terms
are on the outputs of two later MLPs instead of the residual stream. No network, no GPU; half a minute on two cores.
Writes output/custom_architecture.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from bundled import settings
from sae_lens import SAE, StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from torch import Tensor

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective, evaluate
from e2e_sae_plugin.demo import demo_tokens, load_demo_model

DOWNSTREAM_HOOKS = ("blocks.3.hook_mlp_out", "blocks.5.hook_mlp_out")


@dataclass
class TanhTrainingSAEConfig(StandardTrainingSAEConfig):
    """`l1_coefficient` weighs the penalty."""

    @classmethod
    def architecture(cls) -> str:
        return "tanh"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig  # trained differently, computed alike


class TanhTrainingSAE(StandardTrainingSAE):
    """A standard SAE but for its penalty."""

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,  # noqa: ARG002
        sae_out: Tensor,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        penalty = torch.tanh(feature_acts * self.W_dec.norm(dim=1)).sum(-1)
        # A mean over tokens, so that micro-batches and ranks add up; by a name of its own, under which it is logged.
        return {"tanh_loss": (step_input.coefficients["l1"] * penalty).mean()}


register_sae_training_class("tanh", TanhTrainingSAE, TanhTrainingSAEConfig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000, help="of each SAE (%(default)s)")
    args = parser.parse_args()
    shared: dict[str, Any] = {"d_in": 128, "d_sae": 1024, "normalize_activations": "expected_average_only_in"}
    model, held_out = load_demo_model(), demo_tokens("evaluation", 128)[:64]
    saes = {
        "tanh": TanhTrainingSAEConfig(l1_coefficient=0.1, **shared),
        "standard": StandardTrainingSAEConfig(l1_coefficient=0.1, **shared),
    }
    print("penalty   architecture in the file      L0   CE loss increase            alive")
    for name, sae in saes.items():
        cfg = settings(
            f"output/custom_architecture/{name}",
            args.tokens,
            sae=sae,
            objective=Objective(kl=1.0, beta=1e-3, downstream_hooks=DOWNSTREAM_HOOKS),
        )
        E2ESAETrainingRunner(E2ESAERunnerConfig(**cfg)).run()
        loaded = SAE.load_from_disk(cfg["output_path"])  # knows nothing of the class above
        found = evaluate(loaded, model, held_out)
        print(
            f"{name:<9} {loaded.cfg.architecture():<24} {found.value('l0'):>6.1f}   {found.metrics['ce_loss_increase']}"
            f"   {found.n_alive:>5}",
            flush=True,
        )


if __name__ == "__main__":
    main()
