"""What the metadata of a fine-tuned SAE say: where it comes from, what was done, how it is used."""

from __future__ import annotations

from sae_lens.saes.sae import SAEMetadata

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.data.rows import RECORD

PLACE = ("model_name", "hook_name", "hook_head_index", "model_class_name")
HOW = ("train_batch_size_tokens", "context_size", "adapter", "adapter_rank", "keep_decoder_norms", "seed")
USE = ("context_size", "seqpos_slice", "prepend_bos", "exclude_special_tokens")
# True of the original alone. (Neuronpedia's dashboards show the original's features.)
OF_THE_ORIGINAL = (
    "neuronpedia_id", "finetuned_from", "finetuning", "objective", "kind", "local_first", "l0", "num_dead_features",
    "loaded_from",
)  # fmt: skip
# What a run of this package says of any SAE that it trains.
OF_THE_RUN = (
    "objective", "downstream_hooks", "run_identity", "tokenizer_sha256", "e2e_sae_plugin_version", RECORD,
)  # fmt: skip


def finetuned_metadata(
    original: SAEMetadata,
    run: SAEMetadata,
    cfg: E2ESAERunnerConfig,
    *,
    source: str | None,
    weights_sha256: str | None,
    training_tokens: int,
    trained_parameters: list[str],
) -> SAEMetadata:
    """Metadata of the fine-tuned SAE: the original's, less what is no longer true, with `finetuned_from` and `finetuning`.

    Args:
        original: of the SAE that was fine-tuned.
        run: of the training SAE, as the run has filled them.
        cfg: of the run.
        source: where the original came from.
        weights_sha256: fingerprint of the original's weights.
        training_tokens: that the fine-tune took.
        trained_parameters: names of what was trained.
    """
    lineage = {
        "source": source,
        "weights_sha256": weights_sha256,
        **{name: original[name] for name in (*PLACE, "dataset_path", *OF_THE_ORIGINAL)},
    }
    said = {
        **{name: value for name, value in original.to_dict().items() if name not in OF_THE_ORIGINAL},
        **{name: getattr(cfg, name) for name in (*PLACE, *USE)},
        **{name: run[name] for name in OF_THE_RUN},
        "finetuned_from": {name: value for name, value in lineage.items() if value is not None},
        "finetuning": {
            "training_tokens": training_tokens,
            "planned_tokens": cfg.training_tokens,
            "dataset_path": cfg.dataset_path,
            "lr": cfg.lr,
            "trained_parameters": trained_parameters,
            **{name: getattr(cfg, name) for name in HOW},
        },
    }
    return SAEMetadata(**{name: value for name, value in said.items() if value is not None})
