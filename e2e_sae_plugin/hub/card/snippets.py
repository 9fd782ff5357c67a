"""Python to copy from a model card: how an SAE is loaded, and how it is put into its model. Each works as it stands."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.hub.card.entry import CardEntry
from e2e_sae_plugin.hub.card.text import is_local_path, python_literal, without_path

SENTENCE = '"The quick brown fox jumps over the lazy dog."'


def load_snippet(repo_id: str, entry: CardEntry, revision: str | None = None) -> str:
    """Load the SAE with SAELens alone or, from another revision than main, which SAELens cannot, with this package."""
    imported, load = _load(repo_id, entry, revision)
    return f"{imported}\n\n{load}\n"


def _load(repo_id: str, entry: CardEntry, revision: str | None) -> tuple[str, str]:
    arguments = f"{python_literal(repo_id)}, {python_literal(entry.sae_id)}"
    if revision in (None, "main"):
        return "from sae_lens import SAE", f"sae = SAE.from_pretrained({arguments})"
    return (
        "from e2e_sae_plugin import load_pretrained",
        f"sae = load_pretrained({arguments}, revision={python_literal(revision)})",
    )


def model_key(entry: CardEntry) -> str:
    """Equal for SAEs that are put into their models by the same lines."""
    names = (
        "model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_head_index", "seqpos_slice",
        "exclude_special_tokens", "prepend_bos",
    )  # fmt: skip
    return repr([entry.metadata.get(name) for name in names])


def splice_snippet(repo_id: str, entry: CardEntry, revision: str | None = None) -> str | None:
    """Load the SAE, and the model as the SAE needs it, and run the model with the SAE in place.

    Returns:
        None for an SAE whose model, hook or kind of model is not known, or which writes elsewhere than it reads.
    """
    said = entry.metadata
    name, hook = said.get("model_name"), said.get("hook_name")
    if not (isinstance(name, str) and name and isinstance(hook, str) and hook):
        return None
    if said.get("hook_name_out") not in (None, hook) or "d_out" in entry.cfg:
        return None
    settings = entry.model_settings
    model_class = BUNDLED if name == BUNDLED else said.get("model_class_name") or "HookedTransformer"
    run, tokens = _with_hook(entry), _tokens(entry)
    if model_class == BUNDLED:
        imported, load = "from e2e_sae_plugin.demo import load_demo_model", "model = load_demo_model()\n"
    elif model_class == "HookedTransformer":
        used, imported = "HookedTransformer", "from transformer_lens import HookedTransformer"
        if _fits_run_with_saes(entry):
            used, imported, run = "HookedSAETransformer", "from sae_lens import HookedSAETransformer", _with_saes(entry)
        load = f"model = {used}.from_pretrained_no_processing({_arguments(name, settings)})\n"
    elif model_class == "TransformerBridge":
        imported = "from transformer_lens.model_bridge import TransformerBridge"
        others = {key: value for key, value in settings.items() if key != "center_writing_weights"}
        load = f"model = TransformerBridge.boot_transformers({_arguments(name, others)})\n"
        if settings.get("center_writing_weights"):
            load += "model.enable_compatibility_mode()\n"
    elif model_class == "AutoModelForCausalLM":
        imported = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        load = f"model = AutoModelForCausalLM.from_pretrained({_arguments(name, settings)})\n"
        load += f"tokenizer = AutoTokenizer.from_pretrained({python_literal(without_path(name))})\n"
        run, tokens = _with_module_hook(entry), _hugging_face_tokens(entry)
    else:
        return None
    sae_import, sae_load = _load(repo_id, entry, revision)
    if sae_import.startswith("from sae_lens") and imported.startswith("from sae_lens"):
        sae_import, imported = f"from sae_lens import SAE, {imported.rpartition(' ')[2]}", ""
    imports = ["import torch", *sorted(line for line in (sae_import, imported, _mask_import(run)) if line)]
    return "\n".join(imports) + f"\n\n{sae_load}\n{_comment(name, settings)}{load}{tokens}{run}"


def _arguments(name: str, settings: Mapping[str, Any]) -> str:
    parts = [python_literal(without_path(name))]
    parts += [f"{key}={python_literal(value)}" for key, value in settings.items() if key.isidentifier()]
    others = {key: value for key, value in settings.items() if not key.isidentifier()}
    return ", ".join([*parts, *([f"**{python_literal(others)}"] if others else [])])


def _comment(name: str, settings: Mapping[str, Any]) -> str:
    lines = ""
    if is_local_path(name):
        lines += "# The model was a folder of the machine that trained: give the path of your copy.\n"
    if settings.get("center_writing_weights"):
        lines += "# The SAE needs centred writing weights: on a model that is loaded otherwise its output is wrong.\n"
    return lines


def _fits_run_with_saes(entry: CardEntry) -> bool:
    """SAELens puts an SAE's output at every head and position, in the SAE's dtype."""
    is_other_dtype = any(entry.model_settings.get(key) not in (None, "float32") for key in ("dtype", "torch_dtype"))
    return entry.metadata.get("hook_head_index") is None and _slice(entry) is None and not is_other_dtype


def _slice(entry: CardEntry) -> str | None:
    """The positions that the SAE was trained on, as source; None for all."""
    said = entry.metadata.get("seqpos_slice")
    if not isinstance(said, list | tuple) or not 1 <= len(said) <= 3 or all(each is None for each in said):
        return None
    return f"slice({', '.join(map(python_literal, said))})"


def _excluded(entry: CardEntry) -> bool | list[int]:
    """What SAELens takes for `exclude_special_tokens`."""
    said = entry.metadata.get("exclude_special_tokens")
    return [each for each in said if isinstance(each, int)] if isinstance(said, list | tuple) else said is True


def _tokens(entry: CardEntry) -> str:
    prepend = entry.metadata.get("prepend_bos")
    argument = f", prepend_bos={prepend}" if isinstance(prepend, bool) else ""
    return f"tokens = model.to_tokens({SENTENCE}{argument})\n"


def _hugging_face_tokens(entry: CardEntry) -> str:
    if entry.metadata.get("prepend_bos") is not True:
        return f'tokens = tokenizer({SENTENCE}, return_tensors="pt").input_ids\n'
    return (
        f"ids = tokenizer({SENTENCE}, add_special_tokens=False).input_ids\n"
        "tokens = torch.tensor([[tokenizer.bos_token_id, *ids]])  # BOS first, as in training\n"
    )


def _needs_mask(entry: CardEntry) -> bool:
    return bool(_excluded(entry)) or _slice(entry) is not None


def _mask_import(run: str) -> str:
    return "from sae_lens.util import get_special_token_ids" if "get_special_token_ids" in run else ""


def _mask(entry: CardEntry, tokenizer: str) -> str:
    """Lines that set `trained`: the tokens whose activations the SAE replaces."""
    if not _needs_mask(entry):
        return ""
    excluded, positions = _excluded(entry), _slice(entry)
    if positions is None:
        lines = "trained = torch.ones_like(tokens, dtype=torch.bool)\n"
    else:
        lines = "trained = torch.zeros_like(tokens, dtype=torch.bool)\n"
        lines += f"trained[:, {positions}] = True  # the positions that the SAE was trained on\n"
    if excluded:
        ids = f"get_special_token_ids({tokenizer})" if excluded is True else python_literal(excluded)
        lines += f"trained &= ~torch.isin(tokens, torch.tensor({ids}))  # special tokens stay\n"
    return lines


def _replacement(entry: CardEntry) -> str:
    """Lines that put the SAE's output into `activation`."""
    head = entry.metadata.get("hook_head_index")
    if not (_needs_mask(entry) or isinstance(head, int)):
        return "activation = sae(activation.to(sae.dtype)).to(activation.dtype)\n"
    index = "trained" if _needs_mask(entry) else ":, :"
    if isinstance(head, int):
        index += f", {head}"
    return (
        "activation = activation.clone()\n"
        f"activation[{index}] = sae(activation[{index}].to(sae.dtype)).to(activation.dtype)\n"
    )


def _with_saes(entry: CardEntry) -> str:
    excluded = _excluded(entry)
    argument = f", exclude_special_tokens={python_literal(excluded)}" if excluded else ""
    return f"""
with torch.no_grad():
    loss = model(tokens, return_type="loss")
    loss_with_sae = model.run_with_saes(tokens, saes=[sae], return_type="loss"{argument})
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae]{argument})
feature_acts = cache[sae.cfg.metadata.hook_name + ".hook_sae_acts_post"]  # [batch, pos, d_sae]
"""


def _with_hook(entry: CardEntry) -> str:
    return f"""{_mask(entry, "model.tokenizer")}
def splice(activation, hook):
{textwrap.indent(_replacement(entry), "    ")}    return activation

with torch.no_grad():
    loss = model(tokens, return_type="loss")
    hooks = [(sae.cfg.metadata.hook_name, splice)]
    loss_with_sae = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)
"""


def _with_module_hook(entry: CardEntry) -> str:
    replacement = textwrap.indent(_replacement(entry), "    ")
    return f"""{_mask(entry, "tokenizer")}
def splice(module, args, output):
    activation = output[0] if isinstance(output, tuple) else output
{replacement}    return (activation, *output[1:]) if isinstance(output, tuple) else activation

with torch.no_grad():
    loss = model(tokens, labels=tokens).loss
    handle = model.get_submodule(sae.cfg.metadata.hook_name).register_forward_hook(splice)
    loss_with_sae = model(tokens, labels=tokens).loss
    handle.remove()
"""
