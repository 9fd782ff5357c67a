"""The model card: what it says, what huggingface_hub reads from it, and what of a person's README it keeps."""

from __future__ import annotations

import ast
import dataclasses
import io
import logging
import re
from collections.abc import Mapping
from typing import Any

import matplotlib.image
import pytest
import sae_lens
import torch
import yaml
from hub_server import HubServer
from hub_server import hub_fixture as hub_fixture
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import get_session
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from e2e_sae_plugin.demo import load_demo_model
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.result import Evaluation, LayerMetrics
from e2e_sae_plugin.hub.card import CardEntry, model_card, pareto_figure
from e2e_sae_plugin.hub.card.card import BEGIN, END
from e2e_sae_plugin.hub.card.text import hub_id, hub_model, python_literal, shown
from e2e_sae_plugin.objective import Objective

REPO = "me/my-saes"
HOOK = "blocks.6.hook_resid_pre"


def metadata(objective: Objective | None = None, **changes: Any) -> dict[str, Any]:
    said: dict[str, Any] = {
        "model_name": "gpt2-small", "hook_name": HOOK, "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {"center_writing_weights": True}, "dataset_path": "Skylion007/openwebtext",
        "context_size": 128, "prepend_bos": True, "exclude_special_tokens": False, "seqpos_slice": [None], "seed": 7,
        "training_architecture": "standard", "training_architecture_details": {"l1_coefficient": 0.25, "lp_norm": 1.0},
        "e2e_sae_plugin_version": "0.1.0", "sae_lens_version": "6.54.12",
    }  # fmt: skip
    if objective is not None:
        said["objective"] = objective.to_dict()
    return {**said, **changes}


def entry(sae_id: str = "e2e", objective: Objective | None = None, **fields: Any) -> CardEntry:
    """An SAE that was trained end to end; `fields` are those of the entry, or of the metadata."""
    own = {name: fields.pop(name) for name in ("run", "evaluation", "held_out") if name in fields}
    cfg = {"architecture": "standard", "d_in": 4, "d_sae": 6, "dtype": "float32", **fields.pop("cfg", {})}
    return CardEntry(sae_id, {**cfg, "metadata": metadata(objective or Objective.e2e(), **fields)}, **own)


def evaluation(l0: float = 20.5, increase: float = 0.125, **metrics: Estimate | None) -> Evaluation:
    def around(value: float) -> Estimate:
        return Estimate(value, 0.75 * value, 1.25 * value)

    later = LayerMetrics(around(3.0), around(0.5), around(0.5), around(0.5), around(0.5))
    values: dict[str, Estimate | None] = {
        "ce_loss_increase": around(increase), "kl": around(0.5), "l0": around(l0), "top1_agreement": around(0.75),
        "ce_loss_recovered_zero": None, "explained_variance": Estimate(float("nan"), float("nan"), float("nan")),
    }  # fmt: skip
    return Evaluation(
        "name on disk", HOOK, "standard", 4, 6, 2048, 16, {**values, **metrics},
        {HOOK: later, "blocks.7.hook_resid_pre": later},
        torch.tensor([0, 16]), torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64), ((2048, 5),), {},
    )  # fmt: skip


HELD_OUT = {
    "metrics/ce_loss_increase": 0.25, "metrics/held_out_kl": 0.375, "metrics/held_out_l0": 12.0,
    "metrics/held_out_mse": 7.0, "metrics/ce_loss_without_sae": 3.5,
    "metrics/held_out_downstream_mse/blocks.7.hook_resid_pre": 5.0,
}  # fmt: skip
RUN = {
    "sae": {"architecture": "standard", "l1_coefficient": 0.25, "normalize_activations": "none", "device": "cuda"},
    "training_tokens": 1_000_000, "train_batch_size_tokens": 4096, "lr": 3e-4, "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 100, "lr_end": 3e-5, "lr_decay_steps": 0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "max_grad_norm": 10.0, "n_eval_batches": 2, "eval_batch_size_prompts": 8, "context_size": 128,
    "output_path": "/home/me/runs/1",
}  # fmt: skip

LONG_RUN = {"training_tokens": 5000, "train_batch_size_tokens": 10, "dead_feature_window": 100}


def front_matter(card: str) -> dict[str, Any]:
    match = REGEX_YAML_BLOCK.search(card)
    assert match is not None
    return yaml.safe_load(match[2])


def code_blocks(card: str, language: str = "python") -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return [text for found, text in fenced if found == language]


def section(card: str, heading: str) -> str:
    return re.split(r"^## ", card.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]


# What it says.


def test_a_small_card_word_by_word():
    said = entry("layer6/e2e", held_out=HELD_OUT, run=RUN)
    assert model_card(REPO, [said], license="mit", pareto_figure="figures/pareto.png") == GOLDEN


GOLDEN = """\
---
base_model: openai-community/gpt2
datasets:
- Skylion007/openwebtext
library_name: saelens
license: mit
tags:
- saelens
- sparse-autoencoder
- mechanistic-interpretability
- e2e-sae-plugin
- end-to-end
- standard
model-index:
- name: my-saes/layer6/e2e
  results:
  - task:
      type: text-generation
      name: Next-token prediction with the SAE in place
    dataset:
      name: Skylion007/openwebtext, held out from training
      type: Skylion007/openwebtext
      split: held-out
    metrics:
    - type: ce_loss_increase
      value: 0.25
      name: CE loss increase (layer6/e2e)
    - type: kl
      value: 0.375
      name: KL to the clean model (layer6/e2e)
    - type: l0
      value: 12.0
      name: L0 (layer6/e2e)
    - type: mse
      value: 7.0
      name: MSE at the SAE (layer6/e2e)
---

<!-- e2e-sae-plugin: begin -->
<!-- Written by e2e-sae-plugin: a later upload replaces what is between these marks and nothing else. -->

# my-saes

A sparse autoencoder of [gpt2-small](https://huggingface.co/openai-community/gpt2), trained end to end ([Braun et al. 2024](https://arxiv.org/abs/2405.12241)) with e2e-sae-plugin. End to end: in training, the SAE's output takes the place of the activation in the frozen model, and what is minimised is how much that changes the model's predictions. It loads in plain [SAELens](https://github.com/decoderesearch/SAELens).

| SAE | hook | architecture | features | objective | L0 | CE loss increase | KL | alive |
| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |
| layer6/e2e | blocks.6.hook_resid_pre | standard | 6 | e2e | 12.0 | +0.2500 | 0.3750 | — |

L0: active features per token. CE loss increase and KL: what the SAE in place of the activation costs the model, in nats per token. The numbers are from the training run's own held-out evaluation.

## How to load

```python
from sae_lens import SAE

sae = SAE.from_pretrained("me/my-saes", "layer6/e2e")
```

In its place in the model, which is loaded as it was in training:

```python
import torch
from sae_lens import SAE, HookedSAETransformer

sae = SAE.from_pretrained("me/my-saes", "layer6/e2e")
# The SAE needs centred writing weights: on a model that is loaded otherwise its output is wrong.
model = HookedSAETransformer.from_pretrained_no_processing("gpt2-small", center_writing_weights=True)
tokens = model.to_tokens("The quick brown fox jumps over the lazy dog.", prepend_bos=True)

with torch.no_grad():
    loss = model(tokens, return_type="loss")
    loss_with_sae = model.run_with_saes(tokens, saes=[sae], return_type="loss")
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
feature_acts = cache[sae.cfg.metadata.hook_name + ".hook_sae_acts_post"]  # [batch, pos, d_sae]
```

## Objective

```
loss = 1 * KL(y || y_hat)
     + 0.25 * sum_i f_i ||d_i||
```

`a`: the activation that the SAE reads; `y`: the model's distribution over next tokens; `y_hat`, `a_hat`: the same in the model that has `SAE(a)` in the place of `a`; `f`: the feature activations; `d_i`: the decoder direction of feature `i`. Squared norms are summed over dimensions, and all terms are averaged over the tokens that are trained on. The model is frozen. See [Braun et al. 2024](https://arxiv.org/abs/2405.12241), section 2.

## Training

| setting | value |
| --- | --- |
| model | gpt2-small |
| model class | HookedTransformer |
| model loaded with | center_writing_weights=True |
| hook | blocks.6.hook_resid_pre |
| dataset | Skylion007/openwebtext |
| context (tokens) | 128 |
| training tokens | 1,000,000 |
| tokens per step | 4,096 |
| learning rate | 0.0003, cosineannealing to 3e-05, warm-up 100 steps |
| optimizer | Adam, betas 0.9 and 0.999 |
| gradient norm clipped at | 10 |
| sparsity | l1_coefficient 0.25 |
| other SAE settings | lp_norm=1 |
| special tokens left out | no |
| seed | 7 |
| e2e-sae-plugin | 0.1.0 |
| SAELens | 6.54.12 |

## Evaluation

From the training run's own last evaluation, on 16 sequences of 128 tokens held out from training. A small sample, without intervals; `e2e-sae evaluate` measures more.

|  | layer6/e2e |
| --- | --- |
| CE loss of the clean model | 3.5000 |
| CE loss increase | +0.2500 |
| KL to the clean model | 0.3750 |
| L0 | 12.00 |
| MSE at the SAE | 7 |

How far later layers are from the clean model's (squared L2 distance, mean over tokens):

|  | layer6/e2e |
| --- | --- |
| blocks.7.hook_resid_pre | 5 |

![CE loss increase against L0](figures/pareto.png)

Each point is an SAE; left and down is better. Bars, where there are any, are 95 % intervals.

## Citation

```bibtex
@inproceedings{braun2024identifying,
  title = {Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning},
  author = {Braun, Dan and Taylor, Jordan and Goldowsky-Dill, Nicholas and Sharkey, Lee},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2405.12241},
  archivePrefix = {arXiv},
}
```

<!-- e2e-sae-plugin: end -->
"""  # noqa: E501


def test_of_several_saes_each_has_a_row_with_its_numbers_and_where_they_are_from():
    entries = [
        entry("measured", evaluation=evaluation()),
        entry(
            "logged",
            Objective.local(),
            held_out=HELD_OUT,
            run=LONG_RUN,
            num_dead_features=2,
            hook_name="blocks.2.hook_mlp_out",
        ),
        entry("neither", cfg={"architecture": "jumprelu"}, training_architecture="batchtopk", kind="my kind"),
    ]
    card = model_card(REPO, entries)
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert f"| measured | {HOOK} | standard | 6 | e2e | 20.5 | +0.1250 [+0.0938, +0.1562] | 0.5000 | 5 |" in rows
    assert (
        "| logged | blocks.2.hook\\_mlp\\_out | standard | 6 | local | 12.0 | +0.2500 | 0.3750 | 4 |".replace(
            "\\_", "_"
        )
        in rows
    )
    assert f"| neither | {HOOK} | jumprelu (trained as batchtopk) | 6 | my kind | — | — | — | — |" in rows
    assert (
        "Without brackets: from the training run's own held-out evaluation, on other text: not comparable with" in card
    )
    measured = section(card, "Evaluation")
    assert "on 2,048 tokens in 16 sequences" in measured
    assert "| CE loss increase | +0.1250 [+0.0938, +0.1562] |" in measured
    assert "| explained variance (ratio of means) | n/a |" in measured  # it is no number there
    assert "recovered" not in measured
    assert "| blocks.7.hook_resid_pre | 3 |" in measured
    assert "The other SAEs: from the training run's own last evaluation, on text held out" in measured


def on_text(text: str | None, clean: float, **changes: Any) -> Evaluation:
    found = evaluation(ce_loss_without_sae=Estimate(clean, clean - 1, clean + 1))
    return dataclasses.replace(found, text=text, **changes)


NOT_COMPARABLE = "Not all of these were measured on the same text"


def test_the_text_that_was_measured_on_and_the_clean_models_loss_are_said():
    card = model_card(REPO, [entry("a", evaluation=on_text("owner/some_words", 3.25))])
    measured = section(card, "Evaluation")
    assert "on 2,048 tokens in 16 sequences of owner/some_words, with" in measured
    assert "| CE loss of the clean model | 3.2500 |" in measured
    assert NOT_COMPARABLE not in measured
    dataset = front_matter(card)["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"name": "owner/some_words, 2,048 tokens", "type": "owner/some_words"}
    assert "of the clean model" not in str(front_matter(card)["model-index"])  # it is no result of the SAE
    unknown = model_card(REPO, [entry("a", evaluation=evaluation())])
    assert "on 2,048 tokens in 16 sequences, with" in section(unknown, "Evaluation")
    assert "of the clean model" not in unknown
    dataset = front_matter(unknown)["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"name": "Text, 2,048 tokens", "type": "text"}
    local = model_card(REPO, [entry("a", evaluation=on_text("/home/me/words", 3.25))])
    assert "sequences of words, with" in local
    assert "/home/me" not in local


def test_numbers_of_different_text_are_called_not_comparable():
    logged = entry("b", held_out=HELD_OUT)
    card = model_card(REPO, [entry("a", evaluation=on_text("words", 3.25)), logged])
    measured = section(card, "Evaluation")
    assert "| CE loss of the clean model | 3.2500 |" in measured
    assert "| CE loss of the clean model | 3.5000 |" in measured
    assert "held out from training: other text than above." in measured
    assert NOT_COMPARABLE in measured
    one = entry("a", evaluation=on_text("words", 3.25))
    for other, differs in (
        (on_text("words", 3.25), False), (on_text("prose", 3.25), True), (on_text("words", 3.5), True),
        (on_text("words", 3.25, n_tokens=1024), True),
    ):  # fmt: skip
        card = model_card(REPO, [one, entry("b", evaluation=other)])
        assert (NOT_COMPARABLE in card) == differs
    assert NOT_COMPARABLE not in model_card(REPO, [logged, entry("c", held_out=HELD_OUT)])
    elsewhere = entry("c", held_out={**HELD_OUT, "metrics/ce_loss_without_sae": 4.0})
    assert NOT_COMPARABLE in model_card(REPO, [logged, elsewhere])
    many = section(model_card(REPO, [logged, elsewhere, one, entry("d"), entry("e", held_out=HELD_OUT)]), "Evaluation")
    assert "| CE loss of the clean model | 3.5000 | 4.0000 | 3.5000 |" in many


@pytest.mark.parametrize(
    ("changes", "alive"),
    [
        ({}, 4), ({"dead_feature_window": 499}, 4), ({"dead_feature_window": 500}, None),
        ({"dead_feature_window": 1000}, None), ({"dead_feature_window": None}, None), ({"training_tokens": None}, None),
        ({"train_batch_size_tokens": 0}, None), ({"patience_evaluations": 2}, None),
    ],
)  # fmt: skip
def test_features_are_only_called_alive_after_long_enough_a_run(changes: dict[str, Any], alive: int | None):
    assert entry(num_dead_features=2, run={**LONG_RUN, **changes}).alive == alive
    assert entry(num_dead_features=2).alive is None  # SAELens's, or a run that nothing is known of
    assert entry(run={**LONG_RUN, **changes}).alive is None


@pytest.mark.parametrize(("step", "alive"), [(100, None), (101, 4), (900, 4)])
def test_a_run_that_stopped_early_is_as_long_as_its_last_evaluation_says(step: int, alive: int | None):
    run = {**LONG_RUN, "patience_evaluations": 2}
    assert entry(num_dead_features=2, run=run, held_out={**HELD_OUT, "step": step}).alive == alive


def test_many_saes_get_a_row_each_in_the_evaluation():
    entries = [entry(f"sae{i}", evaluation=evaluation(l0=10.0 + i)) for i in range(4)]
    measured = section(model_card(REPO, entries), "Evaluation")
    assert "| SAE | CE loss increase | KL to the clean model | top-1 agreement | L0 |" in measured
    assert "| sae3 | +0.1250 [+0.0938, +0.1562] | 0.5000 [0.3750, 0.6250] |" in measured
    assert "| sae3 | 3 |" in measured  # downstream


def test_settings_that_all_share_are_written_once_and_the_others_by_sae():
    card = model_card(REPO, [entry("a", run=RUN), entry("b", run={**RUN, "lr": 1e-3}, seed=8), entry("c")])
    shared, different = section(card, "Training").split("What differs:")
    assert "| hook | blocks.6.hook_resid_pre |" in shared
    assert "| model loaded with | center_writing_weights=True |" in shared
    assert "| SAE | training tokens | tokens per step | learning rate | optimizer |" in different
    rows = {line.split(" | ")[0][2:]: line for line in different.splitlines() if line.startswith("| ")}
    assert (
        "| 1,000,000 | 4,096 | 0.0003, cosineannealing to 3e-05, warm-up 100 steps | Adam, betas 0.9 and 0.999 | 10 |"
        in rows["a"]
    )
    assert "| 0.001, cosineannealing" in rows["b"]
    assert rows["b"].endswith("| 8 |")
    assert rows["c"].startswith("| c | — | — | — |")


@pytest.mark.parametrize(
    ("objective", "changes", "formula"),
    [
        (Objective.local(), {}, "1 * ||a - SAE(a)||^2\n     + 0.25 * sum_i f_i ||d_i||"),
        (Objective.e2e(), {}, "1 * KL(y || y_hat)\n     + 0.25 * sum_i f_i ||d_i||"),
        (
            Objective.e2e_downstream(kl=0.5, beta=0.00390625),
            {"downstream_hooks": [f"blocks.{k}.hook_resid_pre" for k in range(7, 12)]},
            "0.5 * KL(y || y_hat)\n     + 0.00390625 / 6 * sum_k ||a_hat^(k) - a^(k)||^2\n     + 0.25 * sum_i f_i ||d_i||",
        ),
        (
            Objective.e2e_downstream(beta=2e-4, downstream_hooks=("blocks.9.hook_resid_pre",)),
            {"downstream_hooks": ["blocks.9.hook_resid_pre"]},
            "1 * KL(y || y_hat)\n     + 0.0002 / (L - l) * sum_k ||a_hat^(k) - a^(k)||^2\n     + 0.25 * sum_i f_i ||d_i||",
        ),
        (
            Objective.finetune(),
            {"training_architecture": "topk"},
            "0.5 * alpha * KL(y || y_hat)\n     + 0.5 * ||a - SAE(a)||^2\n     + 1 * auxiliary reconstruction loss",
        ),
        (
            Objective(kl=1.0, mse=1e-3),
            {"training_architecture": "jumprelu", "training_architecture_details": {"l0_coefficient": 3}},
            "1 * KL(y || y_hat)\n     + 0.001 * ||a - SAE(a)||^2\n     + 3 * sparsity penalty of JumpReLU",
        ),
        (
            Objective.e2e(),
            {"training_architecture": "gated", "training_architecture_details": {}},
            "1 * KL(y || y_hat)\n     + auxiliary reconstruction loss, scaled to 0.1 of the terms above\n"
            "     + l1_coefficient * ||f_gate||_1",
        ),
        (
            Objective.e2e(),
            {"converted_from": "samples_1.pt", "training_architecture_details": None, "sparsity": 1.5},
            "1 * KL(y || y_hat)\n     + 1.5 / 4 * ||f||_1",
        ),
        (
            Objective.e2e(),
            {"training_architecture": "of my own"},
            "1 * KL(y || y_hat)\n     + sparsity, as the architecture defines it",
        ),
    ],
    ids=["local", "e2e", "e2e+ds", "explicit hooks", "finetune", "mixed", "gated", "converted", "unknown"],
)
def test_the_formula_has_the_weights(objective: Objective, changes: dict[str, Any], formula: str):
    card = model_card(REPO, [entry("x", objective, **changes)])
    assert code_blocks(card, "") == [f"loss = {formula}\n"]
    assert ("2405.12241" in card) == objective.needs_spliced_pass
    assert ("Local: nothing of the model's output" in card) == (not objective.needs_spliced_pass)
    assert ("2503.17272" in card) == objective.balance_kl
    assert ("karvonen2025" in card) == objective.balance_kl
    assert ("## Citation" in card) == ("braun2024" in card) == objective.needs_spliced_pass
    assert ("end-to-end" in front_matter(card)["tags"]) == objective.needs_spliced_pass


def test_saes_that_share_an_objective_share_its_formula():
    weak: dict[str, Any] = {"training_architecture_details": {"l1_coefficient": 0.5}}
    card = model_card(
        REPO, [entry("a"), entry("b", **weak), entry("c", Objective.local()), entry("d", local_first=0.6)]
    )
    assert [block.splitlines()[0] for block in code_blocks(card, "")] == [
        "loss = 1 * KL(y || y_hat)", "loss = 1 * ||a - SAE(a)||^2", "loss = 1 * KL(y || y_hat)",
    ]  # fmt: skip
    assert "**e2e** (a, b)\n" in card
    assert "+ l1_coefficient * sum_i" in code_blocks(card, "")[0]
    assert "The first 60 % of the tokens" in card
    assert "| b | l1_coefficient 0.5 |" in card.replace(" | — |", " |")


def test_an_sae_of_saelens_itself_is_not_called_end_to_end():
    said = {name: value for name, value in metadata().items() if name != "e2e_sae_plugin_version"}
    card = model_card(REPO, [CardEntry("x", {"architecture": "standard", "d_in": 4, "d_sae": 6, "metadata": said})])
    body = card.split("---", 2)[2]
    assert "end to end" not in body.lower()
    assert "## Objective" not in card
    assert "Braun" not in card
    assert "with e2e-sae-plugin." not in card
    assert f"| x | {HOOK} | standard | 6 | — | — | — | — | — |" in card


def test_an_sae_of_which_nothing_is_known_still_has_a_card():
    card = model_card(REPO, [CardEntry("x", {})])
    assert 'SAE.from_pretrained("me/my-saes", "x")' in card
    assert "base_model" not in front_matter(card)


# Snippets.


def strings(source: str) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_the_snippets_load_the_sae_and_the_model_as_it_was():
    first, second = code_blocks(model_card(REPO, [entry("a/b"), entry("other")]))
    assert first == 'from sae_lens import SAE\n\nsae = SAE.from_pretrained("me/my-saes", "a/b")\n'
    assert {REPO, "a/b", "gpt2-small"} <= strings(second)
    assert 'HookedSAETransformer.from_pretrained_no_processing("gpt2-small", center_writing_weights=True)' in second
    first, second = code_blocks(model_card(REPO, [entry("a")], revision="v1"))
    assert (
        first
        == 'from e2e_sae_plugin import load_pretrained\n\nsae = load_pretrained("me/my-saes", "a", revision="v1")\n'
    )
    assert 'load_pretrained("me/my-saes", "a", revision="v1")' in second
    assert "load_pretrained" not in model_card(REPO, [entry()], revision="main")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"exclude_special_tokens": True}, ["run_with_saes", "exclude_special_tokens=True"]),
        ({"exclude_special_tokens": [0, 2]}, ["exclude_special_tokens=[0, 2]"]),
        ({"hook_head_index": 3, "hook_name": "blocks.6.attn.hook_z"}, ["activation[:, :, 3] = sae(", "run_with_hooks"]),
        ({"seqpos_slice": [1, None]}, ["trained[:, slice(1, None)] = True", "activation[trained] = sae("]),
        (
            {"model_from_pretrained_kwargs": {"dtype": "bfloat16"}},
            ['dtype="bfloat16")', ".to(activation.dtype)", "run_with_hooks"],
        ),
        ({"model_from_pretrained_kwargs": {"not a name": None}}, ['"gpt2-small", **{"not a name": None})']),
        ({"model_class_name": "TransformerBridge"}, ['boot_transformers("gpt2-small")', "enable_compatibility_mode()"]),
        (
            {"model_class_name": "AutoModelForCausalLM", "model_from_pretrained_kwargs": {"dtype": "bfloat16"}},
            ['AutoModelForCausalLM.from_pretrained("gpt2-small", dtype="bfloat16")', "register_forward_hook"],
        ),
        (
            {"model_class_name": "AutoModelForCausalLM", "exclude_special_tokens": True, "prepend_bos": False},
            ["get_special_token_ids(tokenizer)", 'return_tensors="pt"'],
        ),
        ({"model_name": "/home/me/gpt"}, ["# The model was a folder", 'processing("gpt", center']),
        (
            {"model_from_pretrained_kwargs": {"cache_dir": "/x", "token": "hf_x", "a": "/home/me"}},
            ['processing("gpt2-small")'],
        ),
    ],
)  # fmt: skip
def test_the_model_is_loaded_and_spliced_as_the_metadata_say(changes: dict[str, Any], expected: list[str]):
    snippet = code_blocks(model_card(REPO, [entry(**changes)]))[1]
    ast.parse(snippet)
    for each in expected:
        assert each in snippet


@pytest.mark.parametrize(
    "changes",
    [{"model_name": None}, {"hook_name": ""}, {"model_class_name": "HookedMamba"}, {"hook_name_out": "other"}],
)
def test_there_is_no_snippet_for_what_is_not_known(changes: dict[str, Any]):
    assert len(code_blocks(model_card(REPO, [entry(**changes)]))) == 1


def test_saes_of_two_models_get_a_snippet_each():
    snippets = code_blocks(model_card(REPO, [entry("a"), entry("b"), entry("c", model_name="pythia-70m")]))
    assert [('"a"' in each, '"c"' in each) for each in snippets] == [(True, False), (True, False), (False, True)]


@pytest.mark.parametrize("changes", [{}, {"exclude_special_tokens": True, "seqpos_slice": [2, None]}, {"head": 1}])
def test_the_snippet_of_the_bundled_model_runs(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    hook = "blocks.3.attn.hook_z" if "head" in changes else "blocks.3.hook_resid_pre"
    model = load_demo_model()
    d_in = int(model.cfg.d_head if "head" in changes else model.cfg.d_model)
    said = {"hook_head_index": 1} if "head" in changes else changes
    of_model = {"model_name": "e2e-sae-demo", "hook_name": hook, **said}
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8, metadata=SAEMetadata(**of_model)))
    asked: list[tuple[str, str]] = []

    def from_pretrained(release: str, sae_id: str) -> SAE[Any]:
        asked.append((release, sae_id))
        return sae

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    found: dict[str, Any] = {}
    for snippet in code_blocks(model_card(REPO, [entry("a", **of_model)])):
        exec(snippet, found)
    assert asked == [(REPO, "a")] * 2
    tokens = found["tokens"]

    def replace(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        new = activation.clone()
        if "head" in changes:
            new[:, :, 1] = sae(activation[:, :, 1])
        else:
            start = 2 if changes else 0  # the BOS, the only special token, is before it
            new[:, start:] = sae(activation[:, start:])
        return new

    with torch.no_grad():
        expected = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(hook, replace)])
    assert torch.allclose(found["loss_with_sae"], expected, rtol=1e-5)
    assert abs(float(found["loss"]) - float(expected)) > 1e-3


def test_the_snippet_of_run_with_saes_runs(monkeypatch: pytest.MonkeyPatch):
    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=8, metadata=SAEMetadata(hook_name="blocks.3.hook_resid_pre")))
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *_: sae)

    def load(name: str, **settings: Any) -> Any:
        assert (name, settings) == ("gpt2-small", {"center_writing_weights": True})
        demo = load_demo_model()
        model = sae_lens.HookedSAETransformer(demo.cfg, tokenizer=demo.tokenizer)
        model.load_state_dict(demo.state_dict(), strict=False)
        return model

    monkeypatch.setattr(sae_lens.HookedSAETransformer, "from_pretrained_no_processing", load)
    snippet = code_blocks(model_card(REPO, [entry(hook_name="blocks.3.hook_resid_pre", exclude_special_tokens=True)]))[
        1
    ]
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert found["feature_acts"].shape[-1] == 8
    assert float(found["loss_with_sae"]) > float(found["loss"])


# What the Hub reads.


def test_the_metadata_are_those_of_the_saes():
    entries = [
        entry("a"),
        entry("b", model_name="EleutherAI/pythia-70m-deduped", dataset_path="monology/pile-uncopyrighted"),
        entry("c", model_name="/home/me/model", dataset_path="/data/tokens", cfg={"architecture": "topk"}),
        entry("d", model_name="e2e-sae-demo", dataset_path="json"),
    ]
    data = ModelCard(model_card(REPO, entries, license="apache-2.0")).data
    assert isinstance(data, ModelCardData)
    assert data.library_name == "saelens"
    assert data.license == "apache-2.0"
    assert data.base_model == ["openai-community/gpt2", "EleutherAI/pythia-70m-deduped"]
    assert data.datasets == ["Skylion007/openwebtext", "monology/pile-uncopyrighted"]
    assert data.tags == [
        "saelens", "sparse-autoencoder", "mechanistic-interpretability", "e2e-sae-plugin", "end-to-end", "standard", "topk",
    ]  # fmt: skip
    assert data.get("license") == "apache-2.0"
    alone = front_matter(model_card(REPO, [entry("c", model_name="./local", dataset_path="~/x")]))
    assert set(alone) == {"library_name", "tags"}


def results(card: str) -> dict[str, dict[str, Any]]:
    """Metric name -> type, value, data set, of every result that huggingface_hub reads."""
    _, found = model_index_to_eval_results(front_matter(card)["model-index"])
    return {
        str(each.metric_name): {"type": each.metric_type, "value": each.metric_value, "dataset": each.dataset_type}
        for each in found
    }


def test_results_survive_the_model_index_also_when_huggingface_hub_writes_the_card_anew():
    entries = [entry("a", evaluation=evaluation()), entry("b", held_out=HELD_OUT), entry("c")]
    card = model_card(REPO, entries)
    assert [each["name"] for each in front_matter(card)["model-index"]] == ["my-saes/a", "my-saes/b"]
    found = results(card)
    assert found["CE loss increase (a)"] == {"type": "ce_loss_increase", "value": 0.125, "dataset": "text"}
    assert found["L0 (a)"]["value"] == 20.5
    assert found["CE loss increase (b)"] == {
        "type": "ce_loss_increase",
        "value": 0.25,
        "dataset": "Skylion007/openwebtext",
    }
    assert len(found) == 4 + 4  # what is no number has no result
    parsed = ModelCard(card)
    assert isinstance(parsed.data, ModelCardData)
    read = parsed.data.eval_results
    assert read is not None
    assert {str(each.metric_name): each.metric_value for each in read} == {n: r["value"] for n, r in found.items()}
    assert results(str(parsed)) == found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", "openai-community/gpt2"), ("gpt2", "openai-community/gpt2"), ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"), ("pythia-70m", "EleutherAI/pythia-70m"),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-it"), ("e2e-sae-demo", None), ("/models/x", None), ("../a", None),
        ("C:\\models\\x", None), ("llama-7b-hf", None), ("a/b/c", None), ("a--b/c", None), ("", None), (None, None),
        (3, None),
    ],
)  # fmt: skip
def test_names_of_models_on_the_hub(name: Any, expected: str | None):
    assert hub_model(name) == expected


def test_names_of_datasets_on_the_hub():
    assert hub_id("a/b") == "a/b"
    assert [hub_id(name) for name in ("json", "a/b/c", "/a/b", "/ab", "a b/c", "owner/", None)] == [None] * 7


# Hostile metadata.

HOSTILE = (
    "a | b", "x\n---\ninjected: true", "<script>alert(1)</script>", "```\n# heading", f"{END}\n{BEGIN}",
    "`code`", "\x00\x1b[0m",
    "\u202egnp.exe", "\u2028", "\ud800", '"; import os; "', "'\\\"", "![x](http://h)", "[a]: http://h",
    "{{x}}", "*a* $b$ _c_", "é🙂",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_metadata_break_nothing(text: str, caplog: pytest.LogCaptureFixture):
    names = (
        "model_name", "hook_name", "dataset_path", "kind", "training_architecture", "converted_from", "finetuned_from",
        "e2e_sae_plugin_version", "downstream_hooks", "local_first",
    )  # fmt: skip
    objective = Objective.e2e_downstream(beta=1.0, downstream_hooks=(text,))
    run = {**RUN, "lr_scheduler_name": text, "sae": {"architecture": text, text: text}}
    cfg = {"architecture": text, "d_sae": text}
    hostile = entry(
        f"a{text}", objective, cfg=cfg, run=run, held_out=HELD_OUT, model_from_pretrained_kwargs={text: text, "n": [text]},
        **dict.fromkeys(names, text),
    )  # fmt: skip
    honest = entry("honest", held_out=HELD_OUT)
    card = model_card(
        REPO,
        [
            honest,
            hostile,
            entry("measured", evaluation=dataclasses.replace(evaluation(), text=text)),
            CardEntry("list", {"metadata": {**metadata(kind=[text], hook_name={text: text}), "objective": text}}),
        ],
    )
    card.encode()
    plain = model_card(REPO, [entry("honest"), entry("other", held_out=HELD_OUT)])
    assert set(front_matter(card)) == set(front_matter(plain))
    assert results(card)["L0 (honest)"]["value"] == 12.0
    assert [line for line in card.splitlines() if line in (BEGIN, END)] == [BEGIN, END]
    assert re.findall(r"^---", card, re.MULTILINE) == ["---"] * 2
    body = re.sub(r"^```.*?^```$", "", card[card.index("\n---\n") :], flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^#+ .*$", body, re.MULTILINE) == [
        "# my-saes", "## How to load", "## Objective", "## Training", "## Evaluation", "## Citation",
    ]  # fmt: skip
    assert re.findall(r"<(?!!-- (?:e2e-sae-plugin: |Written by ))", body) == []
    assert not re.search(r"(?<!\\)\]\(http://h\)", body)
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    for snippet in code_blocks(card):
        assert not any(isinstance(node, ast.Attribute) and node.attr == "os" for node in ast.walk(ast.parse(snippet)))
    loads = [node for node in ast.walk(ast.parse(code_blocks(card)[-1])) if isinstance(node, ast.Call)]
    ids = [
        ast.literal_eval(call.args[1])
        for call in loads
        if getattr(call.func, "attr", "") == "from_pretrained" and call.args[1:]
    ]
    assert f"a{text}" in ids
    assert model_card(REPO, [hostile, honest], existing=card).count(f"\n{BEGIN}\n") == 1
    assert not caplog.records


@pytest.mark.parametrize(
    "path", ["/home/me/secret/data", "~/secret/data", "C:\\secret\\data", "file:///secret/data", "../secret/data"]
)
def test_paths_of_a_machine_are_shown_by_their_last_part(path: str):
    names = ("model_name", "dataset_path", "converted_from", "kind", "hook_name")
    run = {**RUN, "from_pretrained_path": path, "sae": {**RUN["sae"], "somewhere": path}}
    lineage = {"finetuned_from": {"source": path}, "finetuning": {"dataset_path": path}}
    settings = {"model_from_pretrained_kwargs": {"local": path, "cache_dir": path}}
    fields: dict[str, Any] = {**dict.fromkeys(names, path), **lineage, **settings, "run": run, "held_out": HELD_OUT}
    card = model_card(REPO, [entry(**fields)])
    assert "secret" not in card
    assert "/runs" not in card
    assert "cuda" not in card
    assert "| dataset | data |" in card


def test_python_literals_read_back():
    for value in (*HOSTILE, True, None, 1, -2.5, [1, "a"], {"a": {"b": [None]}}):
        assert ast.literal_eval(python_literal(value)) == value
        assert python_literal(value).isprintable()
    assert python_literal("it's") == '"it\'s"'
    assert shown({"a": [1, 2.5], "b": None}) == "a=1, 2.5, b=none"


# A README that is there.

PERSON = "# My own title\n\nText with trailing space \n\n| a | b |\n| - | - |\n\nNo end of line"
FRONT = "---\n# a comment\nlicense: cc-by-4.0\nlanguage: no   # Norwegian\ntags: [mine, saelens]\ncustom: {a: 1}\n---\n"


def outside(card: str) -> tuple[str, str]:
    """A person's text before and after our section, without front matter."""
    text = card.split("\n---", 1)[1].split("\n", 1)[1]
    before, rest = text.rsplit(BEGIN, 1) if text.count(BEGIN) == 1 else text.split(BEGIN, 1)
    return before, rest.split(END, 1)[1]


@pytest.mark.parametrize(
    "text", [PERSON, PERSON + "\n", PERSON + "\n\n\n", "\n\n  x", "---\n", "\ufeff# Title\n", "# a\rb\n"]
)
@pytest.mark.parametrize("front", [FRONT, ""])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_persons_readme_is_kept_byte_for_byte(text: str, front: str, line_break: str):
    text = text.removeprefix("\ufeff") if front else text
    existing = (front + text).replace("\n", line_break)
    card = model_card(REPO, [entry()], existing=existing)
    kept = text.removeprefix("\ufeff").replace("\n", line_break)
    assert f"{line_break}{line_break}{BEGIN}" in card  # a blank line between
    assert card[card.index(f"---{line_break}", 4) :].removeprefix(f"---{line_break}").startswith(kept)
    assert card.endswith(f"{END}{line_break}")
    assert f"## The SAEs{line_break}" in card
    if "\r" not in text:
        assert card.count("\n") == card.count(line_break)
    assert model_card(REPO, [entry()], existing=card) == card
    other = model_card(REPO, [entry("another")], existing=card)
    assert kept in other
    assert '"another"' in other
    assert model_card(REPO, [entry()], existing=other) == card


def test_a_persons_metadata_win_and_keep_their_lines():
    card = model_card(REPO, [entry()], existing=FRONT + PERSON)
    start = "---\n# a comment\nlicense: cc-by-4.0\nlanguage: no   # Norwegian\ntags:\n- mine\n- saelens\n"
    assert card.startswith(start)
    found = front_matter(card)
    assert list(found)[:4] == ["license", "language", "tags", "custom"]
    assert found["custom"] == {"a": 1}
    assert found["library_name"] == "saelens"
    assert front_matter(model_card(REPO, [entry()], existing=FRONT, license="mit"))["license"] == "mit"
    theirs = "---\nbase_model: me/mine\ndatasets: me/data\nlibrary_name: other\nlicense:\n---\n"
    found = front_matter(model_card(REPO, [entry()], existing=theirs, license="mit"))
    assert (found["base_model"], found["library_name"], found["license"]) == ("me/mine", "other", "mit")
    assert found["datasets"] == ["me/data", "Skylion007/openwebtext"]


@pytest.mark.parametrize(
    "front", ["{license: mit, tags: [a]}", "tags: &t [a]\nother: *t", "? license\n: mit", "# nothing", "'license': mit"]
)
def test_unusual_yaml_is_kept_by_what_it_says(front: str):
    card = model_card(REPO, [entry()], existing=f"---\n{front}\n---\ntext\n")
    found, before = front_matter(card), yaml.safe_load(front) or {}
    assert {**found, **{n: v for n, v in before.items() if n != "tags"}} == found
    assert set(before.get("tags", [])) < set(found["tags"])
    assert model_card(REPO, [entry()], existing=card) == card


def test_results_of_other_models_stay_and_ours_are_replaced_in_place():
    first = model_card(REPO, [entry("a", held_out=HELD_OUT), entry("b", held_out=HELD_OUT)])
    result = {"task": {"type": "t"}, "dataset": {"type": "d", "name": "D"}, "metrics": [{"type": "m", "value": 3}]}
    theirs = [{"name": "theirs", "results": [result]}]
    data = front_matter(first)
    text = (
        "---\n"
        + yaml.safe_dump({**data, "model-index": [*data["model-index"], *theirs]})
        + "---"
        + first.split("---", 2)[2]
    )
    better = {**HELD_OUT, "metrics/ce_loss_increase": 0.0625}
    index = front_matter(model_card(REPO, [entry("a", held_out=better), entry("c", held_out=better)], existing=text))[
        "model-index"
    ]
    assert [each["name"] for each in index] == ["my-saes/a", "my-saes/b", "theirs", "my-saes/c"]
    values = [each["results"][0]["metrics"][0]["value"] for each in index]
    assert values == [0.0625, 0.25, 3, 0.0625]


@pytest.mark.parametrize(
    "entries",
    [[entry("a", held_out=HELD_OUT)], [entry("a", evaluation=evaluation()), entry("b", run=RUN)]],
    ids=["one", "two"],
)
def test_the_card_of_a_card_is_that_card(entries: list[CardEntry]):
    card = model_card(REPO, entries, license="mit")
    assert model_card(REPO, entries, existing=card) == card
    assert model_card(REPO, entries) == model_card(REPO, entries)
    written_into = card.replace(BEGIN, f"Mine, before.\n\n{BEGIN}").replace(END, f"{END}\n\nMine, after.\n")
    again = model_card(REPO, entries, existing=written_into)
    assert outside(again) == outside(written_into)
    assert model_card(REPO, entries, existing=again) == again


@pytest.mark.parametrize(
    "text",
    [
        f"mine\n{BEGIN}\nstill mine\n",
        f"mine\n{END}\nstill mine\n",
        f"{END}\nmine\n{BEGIN}\nmore\n",
        f"In a line: {BEGIN} and {END}.\n",
        f"> {BEGIN}\n> x\n> {END}\n",
    ],
    ids=["begin", "end", "wrong order", "in a line", "quoted"],
)
def test_marks_without_their_partner_destroy_nothing(text: str):
    card = model_card(REPO, [entry()], existing=text)
    assert text in card
    assert card.count("## How to load") == 1
    assert model_card(REPO, [entry()], existing=card) == card
    assert text in model_card(REPO, [entry("another")], existing=card)


def test_of_two_sections_the_last_is_replaced():
    text = f"{BEGIN}\nfirst\n{END}\nmine\n{BEGIN}\nsecond\n{END}\n"
    card = model_card(REPO, [entry()], existing=text)
    assert f"{BEGIN}\nfirst\n{END}\nmine\n" in card
    assert "second" not in card
    assert model_card(REPO, [entry()], existing=card) == card


# What is refused.


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("a: [", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("day: 2024-13-45", "not valid YAML"),
        ("\x07: a", "not valid YAML"),
        ("- a", "must be a YAML mapping, got list"),
        ("text", "must be a YAML mapping, got str"),
        ("model-index: 3", "model-index that the Hub cannot read"),
        ("model-index: [{name: a}]", "model-index that the Hub cannot read"),
        ("model-index: [a]", "model-index that the Hub cannot read"),
    ],
)
def test_front_matter_that_cannot_be_read_is_refused(front: str, message: str):
    with pytest.raises(ValueError, match=message):
        model_card(REPO, [entry(held_out=HELD_OUT)], existing=f"---\n{front}\n---\ntext\n")


@pytest.mark.parametrize(
    ("repo_id", "entries", "settings", "message"),
    [
        ("alone", [entry()], {}, "has no owner"),
        ("a/b/c", [entry()], {}, "must be in the form"),
        (REPO, [], {}, "no SAE to describe"),
        (REPO, [entry("a"), entry("a")], {}, "Two entries have the id 'a'"),
        (REPO, [entry()], {"pareto_figure": "/home/me/x.png"}, "must be a path in the repository"),
        (REPO, [entry()], {"pareto_figure": "a/../../x.png"}, "must be a path in the repository"),
        (REPO, [entry()], {"pareto_figure": ""}, "must be a path in the repository"),
    ],
)
def test_what_no_card_can_be_made_of_is_refused(
    repo_id: str, entries: list[CardEntry], settings: Mapping[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        model_card(repo_id, entries, **settings)


# The figure.


def test_the_figure_is_an_image_and_the_same_each_time():
    entries = [
        entry("a", evaluation=evaluation(10.0, 0.5)), entry("b", evaluation=evaluation(20.0, 0.25)),
        entry("beaten", evaluation=evaluation(30.0, 0.5)), entry("c", Objective.local(), held_out=HELD_OUT),
        entry("hostile", kind="$x$ \ud800", held_out=HELD_OUT), entry("not measured"),
    ]  # fmt: skip
    png = pareto_figure(entries)
    assert png is not None
    assert png == pareto_figure(entries)
    assert b"Software" not in png
    assert b"tEXt" not in png
    image = matplotlib.image.imread(io.BytesIO(png))
    assert image.shape[0] > 400
    assert len(set(map(tuple, image.reshape(-1, image.shape[2]).tolist()))) > 10  # something is drawn
    assert pareto_figure(entries[:1]) != png
    assert pareto_figure([entry("a", evaluation=evaluation(0.0, -0.5))]) is not None  # no logarithm


def test_without_both_numbers_there_is_no_figure():
    assert pareto_figure([]) is None
    assert pareto_figure([entry(), entry(held_out={"metrics/held_out_l0": 3.0})]) is None
    assert pareto_figure([entry(held_out={**HELD_OUT, "metrics/ce_loss_increase": float("nan")})]) is None


def test_the_card_shows_the_figure():
    card = model_card(REPO, [entry(held_out=HELD_OUT)], pareto_figure="figures/a b(1).png")
    assert "![CE loss increase against L0](figures/a%20b%281%29.png)" in card


# The Hub's own validation.


def test_the_hub_finds_the_cards_valid(hub: HubServer):
    entries = [entry("a", evaluation=evaluation()), entry("b", held_out=HELD_OUT), entry("c")]
    for existing in (None, FRONT.replace("language: no", "language: en") + PERSON):
        card = model_card(REPO, entries, existing=existing, license="mit")
        ModelCard(card).validate()  # sends what ModelCard makes of the card; below: the card itself
        answer = get_session().post(f"{hub.url}/api/validate-yaml", json={"repoType": "model", "content": card})
        assert answer.status_code == 200
        assert answer.json()["errors"] == []
    assert hub.count("validate_yaml") == 4


def test_making_a_card_logs_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        model_card(REPO, [entry()], existing="text")
    assert not [record for record in caplog.records if record.name.startswith(("huggingface_hub", "e2e_sae_plugin"))]
