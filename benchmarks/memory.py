"""Peak memory and processor time of the spliced pass and its backward, with and without `checkpoint_blocks`. Linux only.

    python benchmarks/memory.py [--prompts 8] [--tiny]

The KL of a GPT-2-small with random weights, spliced before block 2, on sequences of 256 tokens, fp32. Each figure comes
from a process of its own: the most that was resident in the second of two passes above what was before it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from shape import GPT2_SMALL, TINY, Shape

SMALL_EARLY = dataclasses.replace(GPT2_SMALL, layer=2)


def resident_mib(which: str) -> float:
    """`VmRSS` (now) or `VmHWM` (the most since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {which}.")


def measure(shape: Shape, family: str, recompute: bool) -> tuple[float, float]:
    """MiB above what was resident before, and seconds of processor time (other programs may run beside it)."""
    import torch
    from contestants import hooked_transformer, hugging_face_gpt2, random_tokens
    from sae_lens.load_model import HookedProxyLM

    from e2e_sae_plugin import splice_into
    from e2e_sae_plugin.spliced_losses import clean_micro_batch, kl_sum, splice

    if family == "hugging_face":
        tokenizer: object = None  # the tokens are given
        model = HookedProxyLM(hugging_face_gpt2(shape), tokenizer, hook_names=[])  # pyright: ignore[reportArgumentType]
        spliced_model = splice_into(model, f"transformer.h.{shape.layer - 1}", needs_downstream=False)
    else:
        spliced_model = splice_into(hooked_transformer(shape), shape.hook_name, needs_downstream=False)
    spliced_model.check()
    if family == "own_code":
        spliced_model.use_native_kernels(False)
    spliced_model.recompute_blocks(recompute)
    micro = clean_micro_batch(spliced_model, random_tokens(shape), hidden=True)
    above = seconds = 0.0
    for _ in range(2):
        sae_out = (micro.sae_in(None) + 0.1).requires_grad_()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed counts as resident until it is given back
        Path("/proc/self/clear_refs").write_text("5")
        before, start = resident_mib("VmRSS"), time.process_time()
        spliced = splice(spliced_model, micro, sae_out, head_index=None, hidden=True)
        torch.autograd.grad(kl_sum(spliced_model, micro, spliced), sae_out)
        above, seconds = resident_mib("VmHWM") - before, time.process_time() - start
        del spliced
    return above, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a shape of a second, to see that it runs")
    parser.add_argument("--prompts", type=int, default=8, help="sequences that go through the model at once")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        shape = dataclasses.replace(TINY if args.tiny else SMALL_EARLY, n_prompts=args.prompts)
        above, seconds = measure(shape, args.child[0], args.child[1] == "recomputed")
        print(f"{above:.0f} {seconds:.2f}")
        return
    print("| model's code | blocks | MiB above the model | processor seconds |\n| --- | --- | --- | --- |")
    for family in ("native", "own_code", "hugging_face"):
        for blocks in ("kept", "recomputed"):
            command = [sys.executable, __file__, "--prompts", str(args.prompts), "--child", family, blocks]
            command += ["--tiny"] * args.tiny
            above, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
            print(f"| {family} | {blocks} | {above} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
