"""The SAE alone, forward and backward: SAELens's own code, the same under `torch.compile` (`compile_sae`), and the kernels.

    python benchmarks/sae.py [--d-sae 6144 46080] [--only relu topk] [--tokens 2048] [--rounds 5]

The three take turns on the same activations and weights, so what else the machine does meets all of them; the median of
processor times counts. `relu-sparse` has an encoder bias that leaves some 100 features of a token active.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from e2e_sae_plugin import kernels

D_IN, K, L0 = 768, 40, 100


def build(kind: str, d_sae: int) -> TrainingSAE[Any]:
    sizes: dict[str, Any] = {"d_in": D_IN, "d_sae": d_sae}
    if kind == "topk":
        return TrainingSAE.from_dict(TopKTrainingSAEConfig(**sizes, k=K).to_dict())
    return TrainingSAE.from_dict(StandardTrainingSAEConfig(**sizes, l1_coefficient=1e-3).to_dict())


@torch.no_grad()
def set_l0(sae: Any, sae_in: torch.Tensor) -> None:
    """Lower the encoder's bias by one number, until L0 features of a token are active on average."""
    pre = sae.encode_with_hidden_pre(sae_in)[1]
    sae.b_enc -= pre.flatten().topk(L0 * len(pre), sorted=False).values.min()


def measure(kind: str, d_sae: int, n_tokens: int, n_rounds: int) -> list[str]:
    """Lines of a Markdown table."""
    torch.manual_seed(0)
    sae: Any = build(kind, d_sae)
    sae_in = torch.randn(n_tokens, D_IN)
    if kind == "relu-sparse":
        set_l0(sae, sae_in[:256])
    step_input = TrainStepInput(sae_in, {"l1": 1e-3} if kind != "topk" else {}, None, 0, False)
    d_sae_out = torch.randn(n_tokens, D_IN)
    compiled = torch.compile(sae.training_forward_pass)

    def by_kernels(given: TrainStepInput) -> TrainStepOutput:
        output = kernels.training_forward_pass(sae, given)
        assert output is not None
        return output

    contestants: dict[str, Callable[[TrainStepInput], TrainStepOutput]] = {
        "SAELens": sae.training_forward_pass,
        "compiled": compiled,
        "kernels": by_kernels,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    warm_up: dict[str, float] = {}
    for n_round in range(n_rounds + 1):
        for name, forward in contestants.items():
            sae.zero_grad()
            wall, cpu = time.perf_counter(), time.process_time()
            output = forward(step_input)
            torch.autograd.backward([output.sae_out, output.loss], [d_sae_out, torch.ones(())])
            if n_round:
                seconds[name].append(time.process_time() - cpu)
            else:
                warm_up[name] = time.perf_counter() - wall
            del output
    plain = median(seconds["SAELens"])
    return [
        f"| {kind} | {d_sae:,} | {name} | {1e3 * median(values):,.0f} | {plain / median(values):.2f} | {warm_up[name]:.1f} |"
        for name, values in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[6144, 46080])
    kinds = ["relu", "relu-sparse", "topk"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    print("| SAE | d_sae | code | CPU ms | times faster | first call, s |\n| --- | ---: | --- | ---: | ---: | ---: |")
    for d_sae in args.d_sae:
        for kind in args.only:
            print("\n".join(measure(kind, d_sae, args.tokens, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
