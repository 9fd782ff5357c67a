"""SAEs of a `hook_z` read flattened heads; SAELens's models pass them heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    D_HEAD,
    N_HEADS,
    runner_config,
    tiny_bridge,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_tokenizer,
    token_batch,
    token_dataset,
    training_sae,
)
from marks import slow_except
from sae_lens import SAE, HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from e2e_sae_plugin import (
    E2ESAETrainingRunner,
    FinetuneRunner,
    MultiE2ESAERunnerConfig,
    MultiE2ESAETrainingRunner,
    SAESet,
    SweepConfig,
    SweepRunner,
    finetune_config,
    load_sae,
    load_sae_set,
)
from e2e_sae_plugin.checkpoint.finished import finished_sae

HOOK, LATER = "blocks.1.attn.hook_z", "blocks.2.attn.hook_z"
TOKENS = token_batch(n_prompts=3, seed=5)
SHARED: dict[str, Any] = {
    "model_name": "tiny", "dataset_path": "tiny", "context_size": 8, "train_batch_size_tokens": 32,
    "store_batch_size_prompts": 4, "training_tokens": 64, "lr": 1e-3, "n_eval_batches": 1, "verbose": False,
    "logger": {"wandb_log_frequency": 1, "log_to_wandb": False},
}  # fmt: skip
TOPK = {"architecture": "topk", "d_in": N_HEADS * D_HEAD, "d_sae": 32, "k": 4}


def train(folder: Path, **settings: Any) -> SAE[Any]:
    sae = {"d_in": D_HEAD} if "hook_head_index" in settings else {}
    settings = {"hook_name": HOOK, "output_path": str(folder / "out"), **settings}
    config = runner_config("topk", sae=sae, **settings)
    E2ESAETrainingRunner(config, token_dataset(), tiny_hooked_transformer()).run()
    return SAE.load_from_disk(str(folder / "out"))


def train_sweep(folder: Path) -> SAE[Any]:
    base = {**SHARED, "hook_name": HOOK, "sae": {key: value for key, value in TOPK.items() if key != "k"}}
    cfg = SweepConfig.from_dict(
        {"base": base, "kinds": {"e2e": {"objective": "e2e", "sparsities": [4]}}, "output_path": str(folder / "out")}
    )
    SweepRunner(cfg, tiny_hooked_transformer(), token_dataset()).run()
    return load_sae(folder / "out/e2e-4-seed42")


def train_set(folder: Path) -> SAESet:
    cfg = MultiE2ESAERunnerConfig(
        saes={"one": TOPK, "two": TOPK}, hook_names={"one": HOOK, "two": LATER}, output_path=folder / "out", **SHARED
    )
    return MultiE2ESAETrainingRunner(cfg, tiny_hooked_transformer(), token_dataset()).run()


def finetuned(folder: Path, original: SAE[Any]) -> SAE[Any]:
    settings = {key: SHARED[key] for key in ("training_tokens", "train_batch_size_tokens", "lr", "verbose")}
    cfg = finetune_config(
        original, **settings, store_batch_size_prompts=4, evaluation_tokens=64, checkpoint_path=None,
        output_path=str(folder / "tuned"), exclude_special_tokens=[1, 2, 3],
    )  # fmt: skip
    return FinetuneRunner(
        cfg, original, override_dataset=token_dataset(), override_model=tiny_hooked_transformer()
    ).run()


def finetuned_flat(folder: Path) -> SAE[Any]:
    """Of an SAE that was saved before the setting was set, as SAELens saves one by default."""
    original = train(folder)
    original.cfg.reshape_activations = "none"
    original.turn_off_forward_pass_hook_z_reshaping()
    finetuned(folder, original)
    return load_sae(folder / "tuned")


def of_checkpoint(folder: Path) -> SAE[Any]:
    train(folder, checkpoint_path=str(folder / "checkpoints"), n_checkpoints=1)
    weights = next((folder / "checkpoints").rglob("sae_weights.safetensors"))
    finished_sae(weights.parent).save_inference_model(str(folder / "finished"))
    return load_sae(folder / "finished")


def saelens_model() -> HookedSAETransformer:
    plain = tiny_hooked_transformer()
    model = HookedSAETransformer(plain.cfg)
    model.load_state_dict(plain.state_dict())
    return model


def expected_logits(saes: dict[str, SAE[Any]], model: Any = None) -> Tensor:
    """By hooks that flatten the heads themselves."""

    def put_in(sae: SAE[Any]) -> Any:
        return lambda z, hook: sae.decode(sae.encode(z.flatten(-2))).unflatten(-1, z.shape[-2:])  # noqa: ARG005

    flat = {hook: load_flat(sae) for hook, sae in saes.items()}
    hooks: list[Any] = [(hook, put_in(sae)) for hook, sae in flat.items()]
    model = tiny_hooked_transformer() if model is None else model
    with torch.no_grad():
        return model.run_with_hooks(TOKENS, fwd_hooks=hooks, prepend_bos=False)


def load_flat(sae: SAE[Any]) -> SAE[Any]:
    """The same weights, reading `[..., n_heads * d_head]`."""
    copy: SAE[Any] = SAE.from_dict({**sae.cfg.to_dict(), "reshape_activations": "none"})
    copy.load_state_dict(sae.state_dict())
    return copy


@pytest.mark.parametrize(
    "made_by", slow_except([train, train_sweep, finetuned_flat, of_checkpoint], train, of_checkpoint)
)
def test_a_finished_sae_is_put_into_a_model_of_saelens(made_by: Any, tmp_path: Path):
    sae, model = made_by(tmp_path), saelens_model()
    expected = expected_logits({HOOK: sae})
    with torch.no_grad():
        found = model.run_with_saes(TOKENS, saes=[sae], prepend_bos=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, model(TOKENS, prepend_bos=False), atol=1e-2)  # it replaces something


@pytest.mark.slow
def test_a_run_of_several_is_put_into_a_model_of_saelens(tmp_path: Path):
    saes, model = train_set(tmp_path), saelens_model()
    expected = expected_logits({HOOK: saes["one"], LATER: saes["two"]})
    for each in (saes, load_sae_set(tmp_path / "out")):
        with torch.no_grad():
            torch.testing.assert_close(each.attach(model)(TOKENS, prepend_bos=False), expected, rtol=1e-4, atol=1e-4)
        model.reset_saes()


def test_a_set_turns_reshaping_on_where_the_saved_sae_lacks_it(tmp_path: Path):
    flat = load_flat(train(tmp_path))
    model = SAESet({"z": flat}).attach(saelens_model())
    with torch.no_grad():
        found = model(TOKENS, prepend_bos=False)
    torch.testing.assert_close(found, expected_logits({HOOK: flat}), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.hook_resid_pre"])
def test_a_set_is_put_into_a_bridge_by_the_names_of_transformer_lens(hook_name: str, tmp_path: Path):
    sae = train(tmp_path, hook_name=hook_name)
    bridge = SAETransformerBridge.boot_transformers(
        "gpt2", hf_model=tiny_gpt2_model().eval(), tokenizer=tiny_tokenizer(), device="cpu"
    )
    plain = tiny_bridge().eval()
    with torch.no_grad():
        found = SAESet({"one": sae}).attach(bridge)(TOKENS, prepend_bos=False)
        if hook_name == HOOK:
            expected = expected_logits({HOOK: sae}, plain)
        else:
            hooks: list[Any] = [(hook_name, lambda x, hook: sae(x))]  # noqa: ARG005
            expected = plain.run_with_hooks(TOKENS, fwd_hooks=hooks, prepend_bos=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_sae_of_one_head_reads_it_as_it_is(tmp_path: Path):
    sae = train(tmp_path, hook_head_index=1)
    assert sae.cfg.reshape_activations == "none"
    assert sae(torch.randn(3, D_HEAD)).shape == (3, D_HEAD)


def test_an_sae_shared_by_heads_is_applied_to_each(tmp_path: Path):
    sae = training_sae(runner_config("topk", sae={"d_in": D_HEAD}))
    sae.cfg.metadata.hook_name = HOOK
    sae.save_inference_model(str(tmp_path))
    shared = SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        found = SAESet({"shared": shared}).attach(saelens_model())(TOKENS, prepend_bos=False)
        hooks: list[Any] = [(HOOK, lambda z, hook: shared(z))]  # noqa: ARG005
        expected = tiny_hooked_transformer().run_with_hooks(TOKENS, fwd_hooks=hooks, prepend_bos=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_saelens_flattens_heads_of_no_other_hook(tmp_path: Path):
    sae = train(tmp_path, hook_name="blocks.1.attn.hook_v")
    model = saelens_model()
    with pytest.raises(
        ValueError, match=r"'v' reads all heads of 'blocks.1.attn.hook_v', which SAELens flattens for no"
    ):
        SAESet({"v": sae}).attach(model)
    assert not model.acts_to_saes


def test_the_sae_in_training_reads_flattened_heads(tmp_path: Path):
    config = runner_config("topk", hook_name=HOOK)
    sae = E2ESAETrainingRunner(config, token_dataset(), tiny_hooked_transformer()).run()
    assert isinstance(sae, TrainingSAE)
    assert sae.encode(torch.randn(3, N_HEADS * D_HEAD)).shape == (3, 32)
    expected = expected_logits({HOOK: SAE.load_from_disk(_saved(sae, tmp_path))})
    with torch.no_grad():
        found = SAESet({"z": sae}).attach(saelens_model())(TOKENS, prepend_bos=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _saved(sae: TrainingSAE[Any], folder: Path) -> str:
    sae.save_inference_model(str(folder))
    return str(folder)


@pytest.mark.parametrize("place", [{"hook_name": "blocks.1.hook_resid_pre"}, {"hook_name": HOOK, "hook_head_index": 0}])
def test_reshaping_is_refused_where_saelens_could_not_load_the_sae(place: dict[str, Any]):
    with pytest.raises(ValueError, match=r"sae.reshape_activations='hook_z' does not fit hook_name="):
        runner_config(sae={"reshape_activations": "hook_z"}, **place)
