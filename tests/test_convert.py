"""Checkpoints made with the authors' own classes, converted: equal outputs, equal losses, equal gradients."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from authors import HOW_TO_INSTALL, INSTALLED, import_authors
from convert_runs import (
    CONTEXT,
    D_MODEL,
    D_SAE,
    HOOK,
    LATER,
    LOSSES,
    N_LAYERS,
    authors_config,
    authors_loss,
    authors_saes,
    older_dialect,
    tiny_model,
    tiny_tokens,
    write_pair,
    write_run,
)
from rounding import product_bound, sum_bound
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from test_authors_parity import GradientsInsteadOfUpdates, off_the_decoder, relative_error
from torch import Tensor
from transformer_lens import HookedTransformer

from e2e_sae_plugin import E2ESAERunnerConfig, splice_into
from e2e_sae_plugin.comparison.subjects import kind_of
from e2e_sae_plugin.convert import Converted, convert
from e2e_sae_plugin.convert.config import model_kwargs
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.preflight import check_folders
from e2e_sae_plugin.presets import paper_config

pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason=HOW_TO_INSTALL),
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning"),
]

SECOND = "blocks.3.hook_resid_post"
TOLERANCE = 1e-4  # of float32 sums in another order
OTHER = {"tlens_model_name": "a-model-of-five-blocks"}  # gpt2-small, the default, has twelve


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model()


@pytest.fixture
def acts() -> Tensor:
    return torch.randn(7, 3, D_MODEL, generator=torch.Generator().manual_seed(4)) * 2


def assert_same_sae(sae: SAE[Any], theirs: Any, acts: Tensor) -> None:
    with torch.no_grad():
        output, features = theirs(acts)
    assert 0.2 < (features > 0).float().mean() < 0.8, "nothing is compared"
    # Each is normalised by a sum of D_MODEL squares on its own side.
    features_error = sum_bound(D_MODEL) * float(features.max()) + product_bound(acts, sae.W_enc)
    torch.testing.assert_close(sae.encode(acts), features, rtol=0, atol=features_error)
    output_error = features_error * float(sae.W_dec.detach().abs().sum(0).max()) + product_bound(features, sae.W_dec)
    torch.testing.assert_close(sae(acts), output, rtol=0, atol=output_error)


@pytest.mark.parametrize("dialect", ["newest", "older"])
def test_an_sae_of_a_run_has_the_authors_outputs(dialect: str, model: HookedTransformer, acts: Tensor, tmp_path: Path):
    spliced, config = authors_saes(model), authors_config("e2e")
    run = write_run(tmp_path / "run", spliced, older_dialect(config) if dialect == "older" else config)
    (found,) = convert(run)
    norms = spliced.saes["blocks-1-hook_resid_pre"].decoder.weight.norm(dim=0)
    assert norms.max() > 2 * norms.min(), "the decoder is normalised already"
    assert_same_sae(found.sae, spliced.saes["blocks-1-hook_resid_pre"], acts)
    torch.testing.assert_close(found.sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert found.name == f"{HOOK}-samples_600"
    assert found.notes == []


def test_a_published_pair_has_the_authors_outputs(model: HookedTransformer, acts: Tensor, tmp_path: Path):
    spliced = authors_saes(model)
    pair = write_pair(tmp_path, "e2e_similar_ce_layer_1", spliced, older_dialect(authors_config("e2e")))
    (found,) = convert(pair)
    assert_same_sae(found.sae, spliced.saes["blocks-1-hook_resid_pre"], acts)
    assert found.name == "e2e_similar_ce_layer_1"
    assert found.config is not None


def test_the_state_of_the_whole_model_is_read_too(model: HookedTransformer, acts: Tensor, tmp_path: Path):
    spliced = authors_saes(model)
    run = write_run(tmp_path, spliced, authors_config())
    torch.save(spliced.state_dict(), run / "samples_600.pt")
    assert any(key.startswith("tlens_model.") for key in spliced.state_dict())
    (found,) = convert(run)
    assert_same_sae(found.sae, spliced.saes["blocks-1-hook_resid_pre"], acts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_become_fp32(dtype: torch.dtype, model: HookedTransformer, acts: Tensor, tmp_path: Path):
    spliced = authors_saes(model)
    run = write_run(tmp_path, spliced, authors_config())
    torch.save(spliced.saes.to(dtype).state_dict(), run / "samples_600.pt")
    (found,) = convert(run)
    assert found.sae.W_enc.dtype == torch.float32
    assert_same_sae(found.sae, spliced.saes.float()["blocks-1-hook_resid_pre"], acts)


def test_dead_columns_stay_zero_as_the_authors_normalise_them(model: HookedTransformer, acts: Tensor, tmp_path: Path):
    spliced = authors_saes(model)
    sae = spliced.saes["blocks-1-hook_resid_pre"]
    with torch.no_grad():
        sae.decoder.weight[:, 0] = 0
        sae.decoder.weight[:, 1] = 1e-14  # below the eps of F.normalize
    (found,) = convert(write_run(tmp_path, spliced, authors_config()))
    assert_same_sae(found.sae, sae, acts)
    assert found.sae.W_dec[0].norm() == 0
    torch.testing.assert_close(found.sae.W_dec[1], torch.full((D_MODEL,), 0.01))


def place_of(found: Converted) -> str:
    """The key of the authors' SAE."""
    return said(found)["hook_name"].replace(".", "-")


def said(found: Converted) -> dict[str, Any]:
    return found.sae.cfg.metadata.to_dict()


# Losses.


def our_step(model: HookedTransformer, found: Converted, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the converted config, from the converted weights."""
    cfg = found.config
    assert cfg is not None, found.notes
    assert cfg.train_batch_size_tokens == tokens.numel()
    sae = StandardTrainingSAE(cfg.sae)
    sae.load_state_dict(found.sae.state_dict())
    spliced = splice_into(
        model, cfg.hook_name, downstream_hooks=cfg.objective.downstream_hooks, needs_downstream=cfg.objective.beta > 0
    )
    spliced.check()
    trainer = GradientsInsteadOfUpdates(cfg, sae, spliced, iter([tokens]), MetricsLog(None, to_wandb=False))
    return trainer.step(tokens).loss, trainer.gradients


def assert_same_step(model: HookedTransformer, found: Converted, spliced: Any, config: dict[str, Any]) -> None:
    tokens = tiny_tokens()
    spliced.zero_grad()
    theirs = authors_loss(spliced, tokens, config)
    ours, gradients = our_step(model, found, tokens)
    assert relative_error(ours, theirs) < TOLERANCE
    sae = spliced.saes[place_of(found)]
    weights = {"W_dec": found.sae.W_dec.detach()}
    # Theirs is of the columns before they are normalised, so it is shorter by their norms.
    decoder = (sae.decoder.weight.grad * sae.decoder.weight.detach().norm(dim=0)).T
    expected = {
        "W_enc": (gradients["W_enc"], sae.encoder[0].weight.grad.T),
        "b_enc": (gradients["b_enc"], sae.encoder[0].bias.grad),
        "W_dec": (off_the_decoder(gradients["W_dec"], weights), decoder),
        "b_dec": (gradients["b_dec"], sae.decoder.bias.grad),
    }
    for name, (ours, theirs) in expected.items():
        assert float(theirs.abs().max()) > 1e-6, f"nothing is compared: {name} has no gradient"
        assert relative_error(ours, theirs) < TOLERANCE, name


def of_hooks(*hooks: str) -> dict[str, Any]:
    return {"logits_kl": {"coeff": 0.5}, "in_to_orig": {"total_coeff": 2.5, "hook_positions": list(hooks)}}


MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (HOOK, loss) for kind, loss in LOSSES.items()},
    "all terms": (HOOK, {**LOSSES["e2e+ds"], "out_to_in": {"coeff": 0.7}}),
    "out_to_orig": (HOOK, {"logits_kl": {"coeff": 1.0}, "out_to_in": {"coeff": 0.4}, "out_to_orig": {"coeff": 0.5}}),
    "out_to_orig, local": (HOOK, {"out_to_orig": {"coeff": 2.0}}),
    "hooks in another order": (HOOK, of_hooks(*reversed(LATER))),
    "some hooks": (HOOK, of_hooks("blocks.2.hook_resid_pre", "blocks.3.hook_mlp_out")),
    "same block": (HOOK, of_hooks("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out")),
    "its own input and earlier hooks": (HOOK, of_hooks(HOOK, "blocks.0.hook_resid_post", *LATER)),
    "an earlier hook and a later one": (HOOK, of_hooks("blocks.0.hook_mlp_out", "blocks.3.hook_mlp_out")),
    "only earlier hooks": (HOOK, of_hooks(HOOK, "blocks.0.hook_mlp_out")),
    "after a block": (SECOND, of_hooks("blocks.4.hook_resid_post")),
    "inside a block": ("blocks.2.hook_mlp_out", of_hooks("blocks.3.hook_resid_pre", "blocks.4.hook_resid_pre")),
    "of another width": ("blocks.2.mlp.hook_post", {"logits_kl": {"coeff": 1.0}}),
}


@pytest.mark.parametrize("dialect", ["newest", "older"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_loss_and_gradients_of_the_config_are_the_authors(
    mixture: str, dialect: str, model: HookedTransformer, tmp_path: Path
):
    hook, loss = MIXTURES[mixture]
    spliced, config = authors_saes(model, [hook]), authors_config(loss, [hook], **OTHER)
    run = write_run(tmp_path, spliced, older_dialect(config) if dialect == "older" else config)
    (found,) = convert(run, n_layers=N_LAYERS)
    assert_same_step(model, found, spliced, config)


@pytest.mark.parametrize("p_norm", [0.0, 0.5, 0.9, 1.0, 2.0, 3.5])
def test_norms_of_the_sparsity_other_than_l1_are_the_authors(p_norm: float, model: HookedTransformer, tmp_path: Path):
    sparsity = {"coeff": 3.0, "p_norm": p_norm}
    spliced, config = authors_saes(model), authors_config("e2e", loss__sparsity=sparsity)
    with torch.no_grad():
        spliced.saes["blocks-1-hook_resid_pre"].encoder[0].bias[:20] = -100.0  # features that are 0 everywhere
    (found,) = convert(write_run(tmp_path / "run", spliced, config), tmp_path / "out")
    assert found.notes == []
    assert_same_step(model, found, spliced, config)
    assert found.folder is not None
    saved = json.loads((found.folder / "e2e_runner_cfg.json").read_text())
    assert E2ESAERunnerConfig.from_dict(saved).sae.lp_norm == p_norm  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("p_norm", [0.5, 1.0, 2.0, 3.5])
def test_saelens_penalises_as_the_authors_do(p_norm: float, acts: Tensor):
    """SAELens's norm of the features is theirs, bit for bit, with a decoder of norm 1; also of tokens without features."""
    losses, _ = import_authors()
    features = torch.nn.functional.relu(torch.cat([acts, torch.zeros(1, 3, D_MODEL)]))
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=D_MODEL, l1_coefficient=0.125, lp_norm=p_norm)
    )
    sae.load_state_dict({**sae.state_dict(), "W_dec": torch.eye(D_MODEL)})
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    step = TrainStepInput(features, {"l1": 1.0}, None, 0, False)
    loss = sae.calculate_aux_loss(step, ours, ours, features)["l1_loss"] / D_MODEL
    expected = losses.SparsityLoss(coeff=1.0, p_norm=p_norm).calc_loss(theirs, dense_dim=D_MODEL)
    loss.backward()
    expected.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(loss, expected)
    assert torch.equal(ours.grad, theirs.grad)
    assert bool(ours.grad.any())
    assert bool(ours.grad.isfinite().all())


def test_all_later_blocks_are_the_default_and_other_hooks_are_named(model: HookedTransformer, tmp_path: Path):
    spliced = authors_saes(model)
    for name, expected in (
        ("hooks in another order", None),
        ("its own input and earlier hooks", None),
        ("some hooks", ("blocks.2.hook_resid_pre", "blocks.3.hook_mlp_out")),
    ):
        (found,) = convert(write_run(tmp_path, spliced, authors_config(MIXTURES[name][1], **OTHER)), n_layers=N_LAYERS)
        assert found.config is not None
        assert found.config.objective.downstream_hooks == expected


def test_coefficients_worked_by_hand(model: HookedTransformer, tmp_path: Path):
    (found,) = convert(write_run(tmp_path, authors_saes(model), authors_config("e2e+ds", **OTHER)), n_layers=N_LAYERS)
    assert found.config is not None
    objective = found.config.objective
    # beta = total (L - l) / (n_hooks d) = 2.5 * 4 / (3 * 24); the sparsity coefficient is 3 / 24
    assert (objective.kl, objective.mse) == (0.5, 0.0)
    assert objective.beta == pytest.approx(10 / 72)
    assert found.config.sae.l1_coefficient == 0.125  # pyright: ignore[reportAttributeAccessIssue]


def test_local_saes_of_one_run_are_runs_of_their_own(model: HookedTransformer, acts: Tensor, tmp_path: Path):
    """Their loss is a sum over the SAEs, none of which sees another."""
    spliced, config = authors_saes(model, [HOOK, SECOND]), authors_config("local", ["hook_resid_pre", SECOND])
    found = convert(write_run(tmp_path, spliced, config))
    assert [each.name for each in found] == [f"{HOOK}-samples_600", f"{SECOND}-samples_600"]
    alone = []
    for each, hook in zip(found, (HOOK, SECOND), strict=True):
        assert each.sae.cfg.metadata.hook_name == hook
        assert_same_sae(each.sae, spliced.saes[hook.replace(".", "-")], acts)
        assert_same_step_of_sum(model, each, spliced, config)
        alone.append(our_step(model, each, tiny_tokens())[0])
    assert relative_error(sum(alone, torch.zeros(())), authors_loss(spliced, tiny_tokens(), config)) < TOLERANCE


def assert_same_step_of_sum(model: HookedTransformer, found: Converted, spliced: Any, config: dict[str, Any]) -> None:
    spliced.zero_grad()
    authors_loss(spliced, tiny_tokens(), config)
    gradients = our_step(model, found, tiny_tokens())[1]
    sae = spliced.saes[place_of(found)]
    assert relative_error(gradients["W_enc"], sae.encoder[0].weight.grad.T) < TOLERANCE


@pytest.mark.parametrize("loss", ["e2e", "e2e+ds", "kl of weight 0"])
def test_saes_trained_through_each_other_are_converted_without_a_config(
    loss: str, model: HookedTransformer, acts: Tensor, tmp_path: Path
):
    terms = LOSSES.get(loss, {"logits_kl": {"coeff": 0.0}, "out_to_in": {"coeff": 1.0}})
    spliced = authors_saes(model, [HOOK, SECOND])
    found = convert(write_run(tmp_path, spliced, authors_config(terms, [HOOK, SECOND], **OTHER)))
    assert len(found) == 2
    for each in found:
        assert_same_sae(each.sae, spliced.saes[place_of(each)], acts)
        assert each.config is None
        assert "trained 2 SAEs in one pass of the model (loss.logits_kl" in each.notes[-1]
        assert each.sae.cfg.metadata.objective is None
        expected = "local" if terms["logits_kl"]["coeff"] == 0 else f"joint {loss}"
        assert kind_of(each.sae) == expected


# The run.


def test_the_run_is_the_authors(model: HookedTransformer, tmp_path: Path):
    (found,) = convert(write_run(tmp_path, authors_saes(model), authors_config("e2e")))
    cfg = found.config
    assert cfg is not None
    assert (cfg.model_name, cfg.hook_name, cfg.seed, cfg.context_size) == ("gpt2-small", HOOK, 3, CONTEXT)
    assert cfg.model_from_pretrained_kwargs == {"center_writing_weights": True}
    assert cfg.dataset_path == "apollo-research/Skylion007-openwebtext-tokenizer-gpt2"
    assert (cfg.streaming, cfg.is_dataset_tokenized, cfg.prepend_bos) == (True, True, False)
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.apply_b_dec_to_input) == (D_MODEL, D_SAE, False)
    # 600 samples in steps of 6, in the model 2 at a time; 60 of them warm up
    assert (cfg.total_training_steps, cfg.step_size_prompts, cfg.micro_batch_size_prompts) == (100, 6, 2)
    assert (cfg.lr, cfg.lr_scheduler_name, cfg.lr_warm_up_steps) == (5e-4, "cosineannealing", 10)
    assert cfg.lr_end == pytest.approx(5e-5)
    assert (cfg.max_grad_norm, cfg.adam_beta1, cfg.adam_beta2) == (10.0, 0.9, 0.999)
    assert (tuple(cfg.seqpos_slice), cfg.exclude_special_tokens, cfg.logger.log_to_wandb) == ((None,), False, False)


def test_the_papers_run_is_the_presets(tmp_path: Path):
    """Their published recipe, converted, is what `paper_config` gives (with a smaller dictionary, to be quick)."""
    later = [f"blocks.{k}.hook_resid_pre" for k in range(7, 12)]
    loss = {"logits_kl": {"coeff": 0.5}, "in_to_orig": {"total_coeff": 2.5, "hook_positions": later}}
    recipe = authors_config(
        loss, ["blocks.6.hook_resid_pre"], seed=42, n_samples=400_000, batch_size=8, effective_batch_size=16,
        warmup_samples=20_000, train_data__n_ctx=1024, saes__dict_size_to_input_ratio=1.0, loss__sparsity={"coeff": 50.0},
    )  # fmt: skip
    state = {
        "blocks-6-hook_resid_pre.encoder.0.weight": torch.ones(768, 768),
        "blocks-6-hook_resid_pre.encoder.0.bias": torch.ones(768),
        "blocks-6-hook_resid_pre.decoder.weight": torch.ones(768, 768),
        "blocks-6-hook_resid_pre.decoder.bias": torch.ones(768),
    }
    (tmp_path / "final_config.yaml").write_text(yaml.dump(recipe))
    torch.save(state, tmp_path / "samples_400000.pt")
    (found,) = convert(tmp_path)
    assert found.config is not None
    ours, theirs = found.config.to_dict(), paper_config(6, "e2e+ds", "ce", prepend_bos=False).to_dict()
    assert theirs["sae"].pop("d_sae") == 60 * ours["sae"].pop("d_sae")
    # The one ends in a random name, the other has the size of the dictionary in its name.
    assert {name for name in ours if ours[name] != theirs[name]} == {"checkpoint_path", "logger"}


LINEAR = {"lr_schedule": "linear", "cooldown_samples": 120}


@pytest.mark.parametrize(
    ("changes", "expected", "note"),
    [
        (LINEAR | {"min_lr_factor": 0.0}, {"lr_scheduler_name": "constant", "lr_decay_steps": 20}, None),
        (LINEAR, {"lr_decay_steps": 20, "lr_warm_up_steps": 10}, "falls to 0.1 of itself"),
        (LINEAR | {"cooldown_samples": 0}, {"lr_scheduler_name": "constant", "lr_decay_steps": 0}, None),
        ({"lr_schedule": None}, {"lr_scheduler_name": "cosineannealing"}, "names no lr_schedule; read as cosine"),
        (
            {"lr_schedule": None, "min_lr_factor": None, "adam_beta1": 0.0, "cooldown_samples": 60},
            {"lr_scheduler_name": "constant", "lr_decay_steps": 10, "adam_beta1": 0.0}, "read as linear",
        ),
        ({"effective_batch_size": None}, {"train_batch_size_tokens": 2 * CONTEXT, "lr_warm_up_steps": 30}, None),
        ({"lr": "5e-4", "max_grad_norm": None}, {"lr": 5e-4, "max_grad_norm": None}, None),
        ({"n_samples": None}, {"training_tokens": 600 * CONTEXT}, "n_samples is null"),
        ({"train_data__split": "validation"}, {}, "the split 'validation'"),
        (
            {"train_data__is_tokenized": False, "train_data__streaming": False, "train_data__dataset_name": "a/b"},
            {"is_dataset_tokenized": False, "streaming": False, "prepend_bos": True, "sequence_separator_token": "eos",
             "dataset_path": "a/b"}, None,
        ),
        ({"saes__pretrained_sae_paths": ["/x/y.pt"], "saes__retrain_saes": True}, {}, "from other SAEs .* trained on"),
        ({"n_widgets": 3, "saes__widget": 1}, {}, r"Not known, and kept in the metadata: n_widgets, saes\.widget"),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_runs_may_have(
    changes: dict[str, Any], expected: dict[str, Any], note: str | None, model: HookedTransformer, tmp_path: Path
):
    (found,) = convert(write_run(tmp_path, authors_saes(model), authors_config("e2e", **changes)))
    assert found.config is not None, found.notes
    assert {name: getattr(found.config, name) for name in expected} == expected
    assert len(found.notes) == (note is not None), found.notes
    assert note is None or re.search(note, found.notes[0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss__sparsity": {"coeff": 1.0, "p_norm": -1}}, r"loss\.sparsity\.p_norm=-1 is negative"),
        ({"tlens_model_name": None, "tlens_model_path": "/x/model.pt"}, "tlens_model_path names a model of their own"),
        ({"loss__sparsity": None}, "no sparsity term"),
        ({"loss__inp_to_out": {"coeff": 1.0}}, r"loss\.inp_to_out is no term of the loss in their library"),
        ({"loss__logits_kl": {"coeff": 1.0, "top_k": 5}}, r"loss\.logits_kl\.top_k is not known"),
        ({"loss__logits_kl": None}, "kl, beta and mse all 0"),
        ({"loss": None}, "no section 'loss'"),
        ({"loss__in_to_orig": {"total_coeff": 1.0, "hook_positions": ["blocks.2.mlp.hook_post"]}}, "whose width may differ"),
        ({"loss__in_to_orig": {"total_coeff": 1.0, "hook_positions": []}}, r"must be a list of hooks, got \[\]"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"batch_size": 0, "effective_batch_size": None}, "must be at least 1"),
        ({"lr_schedule": "step"}, "lr_schedule='step' is not known"),
        ({"warmup_samples": 6000}, "do not fit into the run"),
        ({"train_data__column_name": "ids"}, "column_name='ids'"),
        ({"train_data__dataset_name": None}, "dataset_name must be a name"),
        ({"train_data__streaming": "yes"}, "streaming must be true or false"),
        ({"train_data": None}, "n_ctx must be a number"),
    ],
    ids=range(19),
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name_and_the_sae_converted(
    changes: dict[str, Any], reason: str, model: HookedTransformer, acts: Tensor, tmp_path: Path
):
    spliced = authors_saes(model)
    (found,) = convert(write_run(tmp_path, spliced, authors_config("e2e", **changes)))
    assert_same_sae(found.sae, spliced.saes["blocks-1-hook_resid_pre"], acts)
    assert found.config is None
    assert re.search(reason, found.notes[-1]), found.notes
    assert found.notes[-1].startswith("The run has no config here: ")
    assert found.sae.cfg.metadata.conversion_notes == found.notes


def test_an_sae_shared_by_heads_has_no_config(model: HookedTransformer, tmp_path: Path):
    hook = "blocks.1.attn.hook_z"
    spliced = authors_saes(model, [hook])
    (found,) = convert(write_run(tmp_path, spliced, authors_config("e2e", [hook])))
    heads = torch.randn(2, 5, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(found.sae(heads), spliced.saes["blocks-1-attn-hook_z"](heads)[0])
    assert found.config is None
    assert "one for all heads" in found.notes[0]
    kwargs = found.sae.cfg.metadata.model_from_pretrained_kwargs
    assert kwargs == {"center_writing_weights": True, "fold_ln": True, "fold_value_biases": True}


def test_the_number_of_blocks_is_asked_for_where_it_is_needed(model: HookedTransformer, tmp_path: Path):
    spliced = authors_saes(model)
    run = write_run(tmp_path / "ds", spliced, authors_config("e2e+ds", **OTHER))
    with pytest.raises(ValueError, match=r"blocks of a-model-of-five-blocks is needed .* \(--layers\)"):
        convert(run)
    assert convert(write_run(tmp_path / "e2e", spliced, authors_config("e2e", **OTHER)))[0].config is not None
    gpt2 = write_run(tmp_path / "gpt2", spliced, authors_config("e2e+ds"))
    with pytest.raises(ValueError, match=r"n_layers=5 \(--layers\) does not fit the model: gpt2-small has 12 blocks"):
        convert(gpt2, n_layers=N_LAYERS)
    (found,) = convert(gpt2)
    assert found.config is not None
    assert found.config.objective.beta == pytest.approx(2.5 * 11 / (3 * D_MODEL))
    assert found.config.objective.downstream_hooks == tuple(LATER)  # not all of gpt2-small's
    with pytest.raises(ValueError, match="lies beyond the 1 blocks"):
        convert(run, n_layers=1)


# Metadata and folders.


def test_the_models_arguments_give_the_activations_of_the_authors_model():
    """At every hook of a block, and in the distribution: the authors load models with TransformerLens's processing."""

    def activations(**processing: bool) -> dict[str, Tensor]:
        processed = tiny_model()
        arguments = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
        processed.load_and_process_state_dict(processed.state_dict(), **(arguments | processing))
        with torch.no_grad():
            logits, cache = processed.run_with_cache(tiny_tokens(), return_cache_object=False)
        return {**cache, "distribution": logits.log_softmax(-1)}  # pyright: ignore[reportAttributeAccessIssue]

    def difference(name: str, ours: dict[str, Tensor]) -> float:
        return float(
            (ours[name] - theirs[name]).nan_to_num().abs().max() / theirs[name].nan_to_num(0, 0, 0).abs().max()
        )

    theirs = activations(fold_ln=True, center_writing_weights=True, center_unembed=True, fold_value_biases=True)
    raw = activations()
    assert difference("blocks.1.hook_resid_pre", raw) > 0.01, "processing makes no difference"
    by_arguments = {}
    for name in (name for name in theirs if not name.startswith("unembed.")):  # no SAE is there
        arguments = model_kwargs(name)
        key = tuple(arguments)
        if key not in by_arguments:
            by_arguments[key] = activations(**arguments)
        assert difference(name, by_arguments[key]) < 1e-4, name
    assert len(by_arguments) == 3


def test_metadata_say_where_it_is_from_and_how_it_is_used(model: HookedTransformer, tmp_path: Path):
    config = authors_config("e2e+ds", **OTHER)
    run = write_run(tmp_path / "my_run", authors_saes(model), config)
    (found,) = convert(run, n_layers=N_LAYERS)
    metadata = found.sae.cfg.metadata
    assert (metadata.model_class_name, metadata.hook_name) == ("HookedTransformer", HOOK)
    assert metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    assert (metadata.context_size, metadata.sparsity, metadata.seed, metadata.kind) == (CONTEXT, 3.0, 3, "e2e+ds")
    assert found.config is not None
    assert metadata.objective == found.config.objective.to_dict()
    assert said(found)["converted_from"]["source"] == "my_run/samples_600.pt"
    assert said(found)["converted_from"]["samples"] == 600
    assert len(said(found)["converted_from"]["sha256"]) == 64
    assert metadata.authors_config == {**config, "save_dir": "out"}  # no path of anybody's machine
    assert str(tmp_path) not in str(found.sae.cfg.to_dict())


@pytest.mark.parametrize("n", range(3))
def test_kinds(n: int, model: HookedTransformer, tmp_path: Path):
    loss = list(LOSSES)[n]
    (found,) = convert(write_run(tmp_path, authors_saes(model), authors_config(loss, **OTHER)), n_layers=N_LAYERS)
    assert kind_of(found.sae) == found.sae.cfg.metadata.kind == loss


def test_folders_are_loaded_by_plain_saelens_and_the_config_read_back(
    model: HookedTransformer, acts: Tensor, tmp_path: Path
):
    spliced = authors_saes(model)
    (found,) = convert(write_run(tmp_path / "run", spliced, authors_config("e2e")), tmp_path / "out")
    folder = tmp_path / "out" / f"{HOOK}-samples_600"
    assert found.folder == folder
    assert sorted(file.name for file in folder.iterdir()) == [
        "cfg.json", "e2e_runner_cfg.json", "runner_cfg.json", "sae_weights.safetensors",
    ]  # fmt: skip
    loaded = SAE.load_from_disk(folder)
    assert type(loaded).__name__ == "StandardSAE"
    assert_same_sae(loaded, spliced.saes["blocks-1-hook_resid_pre"], acts)
    assert loaded.cfg.metadata.authors_config["loss"]["logits_kl"] == {"coeff": 1.0}
    read = E2ESAERunnerConfig.from_dict(json.loads((folder / "e2e_runner_cfg.json").read_text()))
    assert read.objective == replace(read.objective, kl=1.0, beta=0.0, mse=0.0)


def test_without_a_config_the_folder_has_none(model: HookedTransformer, tmp_path: Path):
    run = write_run(
        tmp_path / "run", authors_saes(model), authors_config("e2e", loss__sparsity={"coeff": 1, "p_norm": -2})
    )
    (found,) = convert(run, tmp_path / "out")
    assert found.folder is not None
    assert sorted(file.name for file in found.folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_converting_again_leaves_what_is_there_and_never_overwrites(model: HookedTransformer, tmp_path: Path):
    spliced, out = authors_saes(model), tmp_path / "out"
    run = write_run(tmp_path / "run", spliced, authors_config("e2e"))
    (found,) = convert(run, out)
    assert found.folder is not None
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in found.folder.iterdir()}
    convert(run, out)
    with torch.no_grad():
        spliced.saes["blocks-1-hook_resid_pre"].decoder.bias += 1
    write_run(run, spliced, authors_config("e2e"))
    with pytest.raises(ValueError, match=r"samples_600' holds something else, which would be overwritten"):
        convert(run, out)
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in found.folder.iterdir()} == before
    assert [file.name for file in out.iterdir()] == [f"{HOOK}-samples_600"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        convert(run, tmp_path / "file")


def test_a_run_into_a_converted_folder_is_refused(model: HookedTransformer, tmp_path: Path):
    """To a run with its config the folder is a finished one; to others it is taken."""
    run = write_run(tmp_path / "run", authors_saes(model), authors_config("e2e"))
    (found,) = convert(run, tmp_path / "out")
    assert found.folder is not None
    assert found.config is not None
    settings = {**found.config.to_dict(), "output_path": str(found.folder), "checkpoint_path": None}
    for seed, message in ((3, "the finished SAE of this very run"), (4, "another run, which would be overwritten")):
        cfg = E2ESAERunnerConfig.from_dict({**settings, "seed": seed})
        with pytest.raises(ValueError, match=message):
            check_folders(cfg, StandardTrainingSAE(cfg.sae), None, None)
