"""Choose beta and the sparsity coefficient on a model that nobody has published coefficients for: the bundled one.

    python examples/choose_objective.py [--tokens 25000] [--target-l0 40]

1. A short run with the KL alone: the KL and the downstream errors that it logs tell at which beta the terms weigh the same.
2. The same at that beta, 3 and 10 times it: up while the downstream errors fall by more than the CE loss increase rises.
3. For a ReLU SAE the L1 coefficient: up by factors of 5 until L0 is below the target, then back to where it meets it.

TopK SAEs (steps 1 and 2) have their L0 fixed, so beta is searched first. No network, no GPU; about a minute on two cores.
Writes output/choose_objective.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from bundled import settings, topk
from sae_lens import StandardTrainingSAEConfig, TrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective

OUTPUT = Path("output/choose_objective")
LAYERS_AFTER = 3  # L - l: 6 blocks, and an SAE entering block 3
DOWNSTREAM = "metrics/held_out_downstream_mse/"


def held_out(
    name: str, objective: Objective, sae: TrainingSAEConfig, tokens: int, local_first: float = 0
) -> dict[str, float]:
    """Train and return the last held-out evaluation, with the sum of the downstream errors; prints a line."""
    cfg = settings(OUTPUT / name, tokens, objective=objective, sae=sae, local_first=local_first)
    runner = E2ESAETrainingRunner(E2ESAERunnerConfig(**cfg))
    runner.run()
    found = dict(runner.last_evaluation)
    found["downstream"] = sum(value for key, value in found.items() if key.startswith(DOWNSTREAM))
    print(
        f"  {name:<16} CE loss increase {found['metrics/ce_loss_increase']:+.4f}   KL {found['metrics/held_out_kl']:.4f}   "
        f"L0 {found['metrics/held_out_l0']:6.1f}   downstream errors {found['downstream']:9.0f}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=25_000, help="of each run (%(default)s)")
    parser.add_argument("--target-l0", type=float, default=40, help="of the ReLU SAE (%(default)s)")
    args = parser.parse_args()

    print("1. The KL alone, at L0 = 40:")
    last = held_out("kl", Objective.e2e(), topk(), args.tokens, local_first=0.5)
    first_guess = last["metrics/held_out_kl"] * LAYERS_AFTER / last["downstream"]
    print(f"  KL and downstream terms weigh the same at beta = KL * (L - l) / downstream errors = {first_guess:.2g}")

    print("\n2. Up from there:")
    beta = 0.0
    for factor in (1, 3, 10):
        candidate = float(f"{factor * first_guess:.2g}")
        objective = Objective.e2e_downstream(beta=candidate)
        found = held_out(f"beta {candidate:g}", objective, topk(), args.tokens, local_first=0.5)
        gain = math.log(last["downstream"] / found["downstream"])
        price = math.log(found["metrics/ce_loss_increase"] / last["metrics/ce_loss_increase"])
        if gain <= max(price, 0):
            print(f"  stop: downstream errors {math.expm1(-gain):+.0%}, CE loss increase {math.expm1(price):+.0%}")
            break
        beta, last = candidate, found
    print(f"  taken: beta = {beta:g}")

    print(f"\n3. The L1 coefficient of a ReLU SAE for L0 = {args.target_l0:g}, with that beta:")
    points: list[tuple[float, float]] = []  # logarithms of coefficient and L0

    def l0_at(coefficient: float) -> float:
        sae = StandardTrainingSAEConfig(
            d_in=128, d_sae=1024, l1_coefficient=coefficient, normalize_activations="expected_average_only_in"
        )
        name = f"l1 {coefficient:.3g}"
        l0 = held_out(name, Objective.e2e_downstream(beta=beta), sae, args.tokens)["metrics/held_out_l0"]
        points.append((math.log(coefficient), math.log(max(l0, 0.1))))
        return l0

    coefficient = 0.2
    while l0_at(coefficient) > args.target_l0:
        coefficient *= 5
    if len(points) > 1:  # between the last two, by a straight line in logarithms
        (x1, y1), (x2, y2) = points[-2:]
        coefficient = math.exp(x1 + (math.log(args.target_l0) - y1) * (x2 - x1) / (y2 - y1))
        l0_at(coefficient)
    print(f"\nobjective: {{kl: 1, beta: {beta:g}}}")
    print(f"sae: {{architecture: standard, l1_coefficient: {coefficient:.3g}}}")


if __name__ == "__main__":
    main()
