"""The parts of a model card that say what the SAEs are: the list of them, how to load them, what they minimised."""

from __future__ import annotations

from collections.abc import Sequence

from e2e_sae_plugin.architectures import FIXED_L0, WITH_AUXILIARY, auxiliary_share
from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.hub.card.entry import CardEntry
from e2e_sae_plugin.hub.card.snippets import load_snippet, model_key, splice_snippet
from e2e_sae_plugin.hub.card.text import hub_model, markdown, shown, weight
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.report.table import Table
from e2e_sae_plugin.report.text import is_finite

PAPER = "[Braun et al. 2024](https://arxiv.org/abs/2405.12241)"
FINETUNING_PAPER = "[Karvonen 2025](https://arxiv.org/abs/2503.17272)"
SAELENS = "[SAELens](https://github.com/decoderesearch/SAELens)"
FORMATS = {"L0": "{:.1f}", "CE loss increase": "{:+.4f}", "KL": "{:.4f}"}

_BRAUN = """@inproceedings{braun2024identifying,
  title = {Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning},
  author = {Braun, Dan and Taylor, Jordan and Goldowsky-Dill, Nicholas and Sharkey, Lee},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2405.12241},
  archivePrefix = {arXiv},
}
"""
_KARVONEN = """@misc{karvonen2025revisiting,
  title = {Revisiting End-To-End Sparse Autoencoder Training: A Short Finetune Is All You Need},
  author = {Karvonen, Adam},
  year = {2025},
  eprint = {2503.17272},
  archivePrefix = {arXiv},
}
"""


def code_block(text: str, language: str = "") -> str:
    """A fenced block. No line of `text` may begin with a fence."""
    return f"```{language}\n{text.rstrip()}\n```"


def introduction(entries: Sequence[CardEntry]) -> str:
    """One paragraph: what these are."""
    models = list(dict.fromkeys(_model_text(each) for each in entries if each.metadata.get("model_name")))
    of = f" of {' and '.join(models)}" if models else ""
    text = f"A sparse autoencoder{of}" if len(entries) == 1 else f"{len(entries)} sparse autoencoders{of}"
    balanced = {_is_balanced(each) for each in entries if each.is_end_to_end}
    papers = "; ".join([PAPER] * (False in balanced) + [FINETUNING_PAPER] * (True in balanced))
    ours = all(each.metadata.get("e2e_sae_plugin_version") for each in entries)
    if all(each.is_end_to_end for each in entries):
        text += f", trained end to end ({papers})"
    elif any(each.is_end_to_end for each in entries):
        text += f", some of them trained end to end ({papers})"
    elif ours:
        text += ", trained"
    text += " with e2e-sae-plugin" * ours + "."
    if any(each.is_end_to_end for each in entries):
        text += (
            " End to end: in training, the SAE's output takes the place of the activation in the frozen model, and what is "
            "minimised is how much that changes the model's predictions."
        )
    return f"{text} {'It loads' if len(entries) == 1 else 'They load'} in plain {SAELENS}."


def _model_text(entry: CardEntry) -> str:
    name = entry.metadata.get("model_name")
    if name == BUNDLED:
        return f"{BUNDLED} (the small model that e2e-sae-plugin brings along)"
    known = hub_model(name)
    return f"[{markdown(name)}](https://huggingface.co/{known})" if known else markdown(name)


def list_of_saes(entries: Sequence[CardEntry]) -> str:
    """A row per SAE, and where its numbers come from."""
    rows = tuple(
        (
            shown(each.sae_id),
            _hook_text(each),
            _architecture_text(each),
            _whole(each.cfg.get("d_sae")),
            None if each.kind is None else shown(each.kind),
            each.point("l0"),
            each.measured("ce_loss_increase"),
            each.point("kl"),
            each.alive,
        )
        for each in entries
    )
    columns = ("SAE", "hook", "architecture", "features", "objective", "L0", "CE loss increase", "KL", "alive")
    table = Table("saes", "", "", columns, rows, FORMATS).to_markdown()
    notes: list[str] = []
    if any(each.point("ce_loss_increase") is not None for each in entries):
        notes.append(
            "L0: active features per token. CE loss increase and KL: what the SAE in place of the activation costs the "
            "model, in nats per token."
        )
    if any(each.evaluation for each in entries):
        notes.append("In brackets: 95 % bootstrap intervals; see [Evaluation](#evaluation).")
    if any(each.evaluation is None and each.held_out for each in entries):
        start, end = "The numbers are", "."
        if any(each.evaluation for each in entries):
            start, end = "Without brackets:", ", on other text: not comparable with those in brackets."
        notes.append(f"{start} from the training run's own held-out evaluation{end}")
    if any(each.evaluation is None and each.alive is not None for each in entries):
        notes.append("Alive: at the end of training.")
    return table + (f"\n{' '.join(notes)}\n" if notes else "")


def _whole(value: object) -> int | str | None:
    return value if value is None or (isinstance(value, int) and not isinstance(value, bool)) else shown(value)


def _hook_text(entry: CardEntry) -> str | None:
    hook, head = entry.metadata.get("hook_name"), entry.metadata.get("hook_head_index")
    return None if hook is None else shown(hook) + (f", head {shown(head)}" if head is not None else "")


def _architecture_text(entry: CardEntry) -> str:
    trained = entry.training_architecture
    return shown(entry.architecture) + (f" (trained as {shown(trained)})" if trained != entry.architecture else "")


def how_to_load(repo_id: str, entries: Sequence[CardEntry], revision: str | None) -> str:
    """The snippets: for the first SAE, and for the first of each other model."""
    first = entries[0]
    text = code_block(load_snippet(repo_id, first, revision), "python")
    if len(entries) > 1:
        text += "\n\nThe other SAEs load by their names in the table."
    if revision not in (None, "main"):
        text += "\n\n(`SAE.from_pretrained` of SAELens reads the main branch alone.)"
    models: dict[str, CardEntry] = {}
    for each in entries:
        models.setdefault(model_key(each), each)
    for entry in models.values():
        snippet = splice_snippet(repo_id, entry, revision)
        which = "" if entry is first else f" (here {markdown(entry.sae_id)})"
        if snippet is not None:
            text += f"\n\nIn its place in the model{which}, which is loaded as it was in training:\n\n"
            text += code_block(snippet, "python")
    return text + "\n"


def objectives(entries: Sequence[CardEntry]) -> str:
    """The formula of each objective with its weights, and which SAEs have it; "" where none is known."""
    groups: dict[str, list[CardEntry]] = {}
    for each in entries:
        if each.objective is not None:
            key = (each.objective, each.training_architecture, _n_downstream(each), each.metadata.get("local_first"))
            groups.setdefault(repr(key), []).append(each)
    if not groups:
        return ""
    known = [each for members in groups.values() for each in members]
    parts: list[str] = []
    formulas: list[str] = []
    for members in groups.values():
        objective = members[0].objective
        assert objective is not None
        if len(groups) > 1 or len(known) < len(entries):
            names = ", ".join(markdown(each.sae_id) for each in members)
            parts.append(f"**{markdown(members[0].kind)}** ({names})")
        formulas.append(formula(members))
        parts.append(code_block(formulas[-1]))
        parts.append(_about(objective, members[0]))
    end_to_end = any(each.is_end_to_end for each in known)
    legend = ["`a`: the activation that the SAE reads"]
    if end_to_end:
        legend.append("`y`: the model's distribution over next tokens")
        legend.append("`y_hat`, `a_hat`: the same in the model that has `SAE(a)` in the place of `a`")
    if any("a^(k)" in each for each in formulas):
        legend.append("`a^(k)`: the activation at a later place `k`")
        legend.append("`l`, `L`: the SAE's block, and the number of blocks")
    if any("f_i" in each or "||f" in each for each in formulas):
        legend.append("`f`: the feature activations")
    if any("d_i" in each for each in formulas):
        legend.append("`d_i`: the decoder direction of feature `i`")
    about = "Squared norms are summed over dimensions, and all terms are averaged over the tokens that are trained on."
    if end_to_end:
        about += f" The model is frozen. See {PAPER}, section 2."
    parts.append(f"{'; '.join(legend)}. {about}")
    return "\n\n".join(part for part in parts if part) + "\n"


def formula(members: Sequence[CardEntry]) -> str:
    """The objective of SAEs that share it, as text with the weights filled in; a sparsity coefficient only where it is
    the same for all of them."""
    entry = members[0]
    objective = entry.objective
    assert objective is not None
    terms: list[str] = []
    if objective.kl:
        scale = "alpha * " if objective.balance_kl else ""
        terms.append(f"{weight(objective.kl)} * {scale}KL(y || y_hat)")
    if objective.beta:
        n = _n_downstream(entry)
        span = "(L - l)" if n is None else str(n + 1)
        terms.append(f"{weight(objective.beta)} / {span} * sum_k ||a_hat^(k) - a^(k)||^2")
    if objective.mse:
        terms.append(f"{weight(objective.mse)} * ||a - SAE(a)||^2")
    terms += _auxiliary(objective, entry.training_architecture)
    terms += _sparsity(members)
    return "loss = " + "\n     + ".join(terms)


def _n_downstream(entry: CardEntry) -> int | None:
    """Later blocks whose inputs are compared, where they are the method's default: `L - l - 1`."""
    hooks = entry.metadata.get("downstream_hooks")
    is_default = entry.objective is not None and entry.objective.beta > 0 and entry.objective.downstream_hooks is None
    return len(hooks) if is_default and isinstance(hooks, list | tuple) and hooks else None


def _auxiliary(objective: Objective, architecture: str) -> list[str]:
    if architecture not in WITH_AUXILIARY:
        return []
    chosen = objective.auxiliary if objective.auxiliary is not None else 1.0 if objective.balance_kl else objective.mse
    if objective.auxiliary is None and not chosen:
        return [f"auxiliary reconstruction loss, scaled to {weight(auxiliary_share(architecture))} of the terms above"]
    return [f"{weight(chosen)} * auxiliary reconstruction loss"] if chosen else []


def _sparsity(members: Sequence[CardEntry]) -> list[str]:
    entry = members[0]
    architecture = entry.training_architecture
    if architecture in FIXED_L0:
        return []
    if entry.metadata.get("converted_from") and "l1_coefficient" not in entry.training_settings:
        scales = {repr((each.metadata.get("sparsity"), each.cfg.get("d_in"))) for each in members}
        penalty, d_in = entry.metadata.get("sparsity"), entry.cfg.get("d_in")
        norms = {repr(each.authors_norm) for each in members}
        norm = f"||f||_{weight(entry.authors_norm)}" if len(norms) == 1 else "||f||_p"
        if len(scales) == 1 and is_finite(penalty) and isinstance(d_in, int):
            return [f"{weight(penalty)} / {d_in} * {norm}"]
        return [f"lambda / d * {norm}"]
    known = {"standard": ("l1_coefficient", "sum_i f_i ||d_i||"), "gated": ("l1_coefficient", "||f_gate||_1")}
    known["jumprelu"] = ("l0_coefficient", "sparsity penalty of JumpReLU")
    if architecture not in known:
        return ["sparsity, as the architecture defines it"]
    name, term = known[architecture]
    p = entry.training_settings.get("lp_norm", 1.0)
    if architecture == "standard" and p != 1:
        norm = weight(p) if is_finite(p) else "p"
        term = f"(sum_i (f_i ||d_i||)^{norm})^(1/{norm})"
    values = {value if is_finite(value) else None for value in (each.training_settings.get(name) for each in members)}
    value = values.pop()
    return [f"{name if values or value is None else weight(value)} * {term}"]


def _about(objective: Objective, entry: CardEntry) -> str:
    said: list[str] = []
    if not objective.needs_spliced_pass:
        said.append("Local: nothing of the model's output is in it.")
    if objective.balance_kl:
        said.append(
            f"`alpha = MSE / KL`, without gradient, at every step, as in the short fine-tune of {FINETUNING_PAPER}: the KL "
            "weighs as much as the squared error."
        )
    said += [f"Approximated in training: {each}." for each in objective.approximations]
    if objective.mse and entry.training_normalisation is not None:
        said.append(f"The squared error is that of normalised activations ({markdown(entry.training_normalisation)}).")
    if objective.beta and objective.downstream_hooks is not None:
        said.append(f"Downstream terms at {markdown(list(objective.downstream_hooks))}.")
    elif objective.beta and (n := _n_downstream(entry)) is not None:
        said.append(f"`L - l` is {n + 1}; the downstream terms are at {markdown(entry.metadata['downstream_hooks'])}.")
    if entry.training_architecture in FIXED_L0:
        k = entry.training_settings.get("k")
        said.append("The architecture sets L0" + (f" (k = {markdown(k)})." if k is not None else "."))
    if "matryoshka" in entry.training_architecture and objective.needs_spliced_pass:
        said.append(
            f"Inner Matryoshka levels get the objective too ({markdown(objective.matryoshka_levels)} at each step)."
        )
    share = entry.metadata.get("local_first")
    if is_finite(share) and 0 < share < 1:
        said.append(
            f"The first {100 * share:.3g} % of the tokens were trained on the local reconstruction error alone."
        )
    return " ".join(said)


def citation(entries: Sequence[CardEntry]) -> str:
    """BibTeX of what the SAEs' objectives come from; "" where none of them is end to end."""
    if not any(each.is_end_to_end for each in entries):
        return ""
    balanced = any(map(_is_balanced, entries))
    return code_block(_BRAUN + ("\n" + _KARVONEN if balanced else ""), "bibtex") + "\n"


def _is_balanced(entry: CardEntry) -> bool:
    return entry.objective is not None and entry.objective.balance_kl
