"""Runs of the authors' library as it leaves them on disk, made with its own classes, and one step of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from authors import import_authors
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

N_LAYERS, D_MODEL, CONTEXT, N_PROMPTS, VOCABULARY = 5, 24, 16, 6, 61
RATIO = 2.5
D_SAE = 60
HOOK = "blocks.1.hook_resid_pre"
LATER = [f"blocks.{k}.hook_resid_pre" for k in range(2, N_LAYERS)]
NO_LOSS: dict[str, Any] = {"in_to_orig": None, "out_to_orig": None, "out_to_in": None, "logits_kl": None}
LOSSES: dict[str, dict[str, Any]] = {
    "local": {"out_to_in": {"coeff": 1.0}},
    "e2e": {"logits_kl": {"coeff": 1.0}, "out_to_in": {"coeff": 0.0}},
    "e2e+ds": {"logits_kl": {"coeff": 0.5}, "in_to_orig": {"total_coeff": 2.5, "hook_positions": LATER}},
}


def tiny_model() -> HookedTransformer:
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=N_LAYERS, d_model=D_MODEL, n_ctx=CONTEXT, n_heads=3, d_head=8, d_mlp=4 * D_MODEL,
            d_vocab=VOCABULARY, act_fn="gelu_new", normalization_type="LN", device="cpu", seed=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.unembed.W_U *= 8
    return model


def tiny_tokens() -> Tensor:
    return torch.randint(VOCABULARY, (N_PROMPTS, CONTEXT), generator=torch.Generator().manual_seed(1))


def authors_config(loss: str | dict[str, Any] = "local", positions: Any = (HOOK,), /, **changes: Any) -> dict[str, Any]:
    """A `final_config.yaml` as the newest version dumps it; `changes` may name keys of sections, as `saes__k`."""
    terms = LOSSES[loss] if isinstance(loss, str) else loss
    config: dict[str, Any] = {
        "wandb_project": "sparsify", "wandb_run_name": None, "wandb_run_name_prefix": "", "seed": 3,
        "tlens_model_name": "gpt2-small", "tlens_model_path": None, "save_dir": "/mnt/somebody/out",
        "n_samples": 600, "save_every_n_samples": None, "eval_every_n_samples": 40, "eval_n_samples": 5,
        "batch_size": 2, "effective_batch_size": 6, "lr": 0.0005, "lr_schedule": "cosine", "min_lr_factor": 0.1,
        "warmup_samples": 60, "cooldown_samples": 0, "max_grad_norm": 10.0, "log_every_n_grad_steps": 20,
        "collect_act_frequency_every_n_samples": 40, "act_frequency_n_tokens": 50,
        "loss": {"sparsity": {"p_norm": 1.0, "coeff": 3.0}, **NO_LOSS, **copy.deepcopy(terms)},
        "train_data": {
            "dataset_name": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2", "is_tokenized": True,
            "tokenizer_name": "gpt2", "streaming": True, "split": "train", "n_ctx": CONTEXT, "seed": None,
            "column_name": "input_ids",
        },
        "eval_data": None,
        "saes": {
            "dict_size_to_input_ratio": RATIO, "pretrained_sae_paths": None, "retrain_saes": False,
            "sae_positions": list(positions),
        },
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[key] = value
    return config


def older_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """The same run as the versions wrote it that the published SAEs are from."""
    config = copy.deepcopy(config)
    positions = config["saes"]["sae_positions"]
    config["saes"]["sae_positions"] = positions[0] if len(positions) == 1 else positions
    config["saes"] |= {"type_of_sparsifier": "sae", "k": None}
    del config["loss"]["sparsity"]["p_norm"]
    config["collect_output_metrics_every_n_samples"] = 0
    return config


def authors_saes(model: HookedTransformer, positions: Any = (HOOK,)) -> Any:
    """Their `SAETransformer` with weights as training leaves them: decoder columns of any norm."""
    _, transformers = import_authors()
    spliced = transformers.SAETransformer(model, list(positions), RATIO, init_decoder_orthogonal=False)
    spliced.tlens_model.requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in spliced.saes.named_parameters():
            scale = 0.1 if name.endswith("bias") else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if name.endswith("decoder.weight"):
                parameter *= torch.rand(parameter.shape[1], generator=generator) * 3 + 0.1
    return spliced


def write_run(folder: Path, spliced: Any, config: dict[str, Any], *samples: int) -> Path:
    """`samples_N.pt` and `final_config.yaml`, as their script saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "final_config.yaml").write_text(yaml.dump(config))
    for n in samples or (600,):
        torch.save(spliced.saes.state_dict(), folder / f"samples_{n}.pt")
    return folder


def write_pair(folder: Path, name: str, spliced: Any, config: dict[str, Any]) -> Path:
    """One SAE as they published it: normalised dictionary, no hook in its keys."""
    folder.mkdir(parents=True, exist_ok=True)
    sae = next(iter(spliced.saes.values()))
    state = sae.state_dict()
    published = {
        "encoder.weight": state["encoder.0.weight"],
        "encoder.bias": state["encoder.0.bias"],
        "decoder.weight": sae.dict_elements,
        "decoder.bias": state["decoder.bias"],
    }
    torch.save(published, folder / f"{name}.pt")
    (folder / f"{name}.yaml").write_text(yaml.dump(config))
    return folder / f"{name}.pt"


def authors_loss(spliced: Any, tokens: Tensor, config: dict[str, Any]) -> Tensor:
    """The loss of one batch, by the steps of their training script; gradients are left in the SAEs."""
    losses, _ = import_authors()
    loss_configs = losses.LossConfigs(**config["loss"])
    at = spliced.raw_sae_positions
    wanted = loss_configs.in_to_orig
    cached = None if wanted is None else [hook for hook in wanted.hook_positions if hook not in at]
    local = loss_configs.logits_kl is None and cached is None
    clean_logits, clean = spliced.forward_raw(tokens, run_entire_model=True, cache_positions=cached)
    logits, acts = spliced(tokens, sae_positions=at, cache_positions=cached, orig_acts=clean if local else None)
    loss, _ = losses.calc_loss(clean, acts, None if logits is None else clean_logits, logits, loss_configs)
    loss.backward()
    return loss.detach().squeeze()
