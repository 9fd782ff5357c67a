"""Turn a checkpoint of the paper's authors' library into a SAELens SAE and a config with the same loss.

    python examples/convert_checkpoint.py RUN_FOLDER       # or a .pt, a folder of pairs, hf:OWNER/REPO, wandb:...
    python examples/convert_checkpoint.py                  # makes a small one of the bundled model first

As `e2e-sae convert`, from Python, with a check that the outputs are those of the authors' forward pass (relu encoder,
dictionary normalised at every pass), written out here. The authors' library is not needed. No network unless the source
needs it, no GPU; seconds on two cores, a quarter of a minute more without a source. Writes output/converted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from bundled import HOOK_NAME, settings
from sae_lens import StandardTrainingSAEConfig
from torch import Tensor
from transformer_lens import HookedTransformer

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective, evaluate, load_sae
from e2e_sae_plugin.convert import convert
from e2e_sae_plugin.demo import demo_tokens, load_demo_model

OUTPUT = Path("output/converted")


def centred_model() -> HookedTransformer:
    """The bundled model as the authors load theirs: TransformerLens centres what is written to the residual stream."""
    model = load_demo_model()
    model.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    return model


def small_run(folder: Path) -> Path:
    """A trained SAE of the bundled model as the authors' script leaves a run on disk: samples_N.pt and final_config.yaml."""
    if (folder / "final_config.yaml").is_file():
        return folder
    sae_config = StandardTrainingSAEConfig(
        d_in=128,
        d_sae=512,
        l1_coefficient=0.01,
        apply_b_dec_to_input=False,
        normalize_activations="expected_average_only_in",  # folded into the weights at the end
    )
    cfg = settings(None, 30_000, sae=sae_config, objective=Objective.e2e())
    sae = E2ESAETrainingRunner(E2ESAERunnerConfig(**cfg), override_model=centred_model()).run()
    folder.mkdir(parents=True, exist_ok=True)
    norms = torch.rand(512, 1, generator=torch.Generator().manual_seed(0)) + 0.5  # theirs are of any length
    of_hook = HOOK_NAME.replace(".", "-")  # a ModuleDict has no dots in its keys
    rows = sae.W_dec.norm(dim=1)
    torch.save(
        {
            f"{of_hook}.encoder.0.weight": (sae.W_enc * rows).T.contiguous(),
            f"{of_hook}.encoder.0.bias": sae.b_enc * rows,  # pyright: ignore[reportOperatorIssue]
            f"{of_hook}.decoder.weight": (sae.W_dec * norms).T.contiguous(),
            f"{of_hook}.decoder.bias": sae.b_dec,
        },
        folder / "samples_234.pt",
    )
    loss = {"sparsity": {"p_norm": 1.0, "coeff": 1.28}, "logits_kl": {"coeff": 1.0}}
    config = {
        "seed": 0, "tlens_model_name": "e2e-sae-demo", "tlens_model_path": None, "n_samples": 234,
        "batch_size": 4, "effective_batch_size": 4, "lr": 1e-2, "lr_schedule": "cosine", "min_lr_factor": 0.01,
        "warmup_samples": 12, "cooldown_samples": 0, "max_grad_norm": 10.0,
        "loss": {**loss, "in_to_orig": None, "out_to_orig": None, "out_to_in": None},
        "train_data": {"dataset_name": "e2e-sae-demo", "is_tokenized": True, "n_ctx": 128, "column_name": "tokens"},
        "saes": {"dict_size_to_input_ratio": 4.0, "sae_positions": [HOOK_NAME]},
    }  # fmt: skip
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def authors_output(checkpoint: Path, x: Tensor) -> Tensor:
    """Their SAE's forward pass, from the tensors of a run with one SAE."""
    state = {name.split(".", 1)[1]: value for name, value in torch.load(checkpoint, weights_only=True).items()}
    features = F.relu(F.linear(x, state["encoder.0.weight"], state["encoder.0.bias"]))
    return F.linear(features, F.normalize(state["decoder.weight"], dim=0), state["decoder.bias"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="what to convert")
    parser.add_argument("--layers", type=int, help="blocks of the model, where it is none of the authors'")
    args = parser.parse_args()
    source = args.source or small_run(OUTPUT / "authors-run")
    # The number of blocks divides the downstream term; for the models of the paper it is known.
    for found in convert(source, OUTPUT, n_layers=args.layers or (None if args.source else 6)):
        print(f"{found.folder}: {found.sae.cfg.d_in} x {found.sae.cfg.d_sae} on {found.sae.cfg.metadata.hook_name}")
        if found.config is not None:
            print(
                f"  objective: {found.config.objective}   l1_coefficient: {found.config.sae.to_dict()['l1_coefficient']:g}"
            )
        for note in found.notes:
            print(f"  note: {note}")
        if args.source is None and found.folder is not None:
            sae = load_sae(found.folder)
            model, tokens = centred_model(), demo_tokens("evaluation", 128)[:32]
            _, cache = model.run_with_cache(tokens, names_filter=HOOK_NAME)
            x = cache[HOOK_NAME].flatten(0, 1)
            expected = authors_output(OUTPUT / "authors-run" / "samples_234.pt", x)
            with torch.no_grad():
                difference = float((sae(x) - expected).norm() / expected.norm())
            print(f"  relative difference from the authors' forward pass: {difference:.1e}")
            print(f"  CE loss increase {evaluate(sae, model, tokens).metrics['ce_loss_increase']}")


if __name__ == "__main__":
    main()
