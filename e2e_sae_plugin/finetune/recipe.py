"""The published recipe as a config: what to train, how, and what the SAE's metadata decide.

Sources: Karvonen 2025 (arXiv 2503.17272) for the objective, the clipping, the decoder's norms and the number of tokens;
`iarcuschin/gemma-scope-2-12b-it-res-l12-e2e` on the Hugging Face Hub (2026) for the learning rate and its decay, the frozen
thresholds, the context and the special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, get_args

from sae_lens import SAE
from sae_lens.config import LoggingConfig

from e2e_sae_plugin.architectures import AUXILIARY_FOR_DEAD_FEATURES, RUN_TIME_NORMALISATIONS
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.config_reading import read_numbers, require_known_keys
from e2e_sae_plugin.config_values import plain
from e2e_sae_plugin.data import DataSettings
from e2e_sae_plugin.data.rows import ROW_ORDER, trained_rows
from e2e_sae_plugin.finetune.checks import check_same_place
from e2e_sae_plugin.finetune.start import training_config
from e2e_sae_plugin.objective import Objective

Trained = Literal["all", "decoder", "scale_and_bias", "lora"]

TRAINING_TOKENS = 25_000_000
DTYPES = ("float32", "bfloat16", "float16")
CONTEXT_SIZE = 1024  # where the metadata do not say
STEP_PROMPTS = 8
EVALUATION_TOKENS = 131_072
ROOM = 1.1  # rows differ in length
N_EVALUATIONS = 20
PATIENCE = 5  # a quarter of the run: Adam's first steps cost more than they gain, and the last, small ones gain most
# The published rate for whole weights; an adapter's numbers have to move further (docs/guides/finetuning.md).
LEARNING_RATE: dict[Trained, float] = {"all": 5e-5, "decoder": 5e-5, "scale_and_bias": 1e-3, "lora": 2e-4}

# Of the metadata, what says how the SAE is used; fields of the runner's config by the same names.
FROM_METADATA = (
    "model_name", "hook_name", "model_class_name", "hook_head_index", "context_size", "seqpos_slice", "prepend_bos",
    "sequence_separator_token", "disable_concat_sequences", "dataset_path", "model_from_pretrained_kwargs",
)  # fmt: skip


def finetune_config(
    sae: SAE[Any],
    *,
    training_tokens: int = TRAINING_TOKENS,
    trained: Trained = "all",
    train_thresholds: bool = False,
    lora_rank: int | None = None,
    sae_settings: Mapping[str, Any] | None = None,
    evaluation_tokens: int = EVALUATION_TOKENS,
    model_dtype: str | None = None,
    force: bool = False,
    **overrides: Any,
) -> E2ESAERunnerConfig:
    """The config of a fine-tune of `sae`, for `FinetuneRunner`.

    Args:
        sae: the finished SAE; model, hook, context, BOS, masked positions and data come from its metadata.
        training_tokens: default 25M.
        trained: "all" of the weights and biases; the "decoder" with its bias; "scale_and_bias", one factor per feature and
            `b_dec`, which leaves every direction where it is; "lora", low-rank changes of encoder and decoder, and the
            biases.
        train_thresholds: train a JumpReLU SAE's thresholds too; needs a sparsity coefficient. Default: they are frozen.
        lora_rank: with "lora"; default 8.
        sae_settings: fields of SAELens's training config of the architecture, for instance `{"l1_coefficient": 5.0}`.
        evaluation_tokens: held out, for the table of before and after, at least one sequence; default 131,072.
        model_dtype: of the language model, for instance "bfloat16"; default: bfloat16 on CUDA, else what the metadata's
            `model_from_pretrained_kwargs` say. The SAE is trained in fp32.
        force: accept a `model_name` or `hook_name` other than the metadata's.
        **overrides: any field of `E2ESAERunnerConfig`; they win over recipe and metadata.

    Raises:
        ValueError: the metadata lack what is needed and `overrides` do not give it, they say otherwise than `overrides`,
            or a setting is refused.
    """
    known = {field.name for field in fields(E2ESAERunnerConfig)} - {"sae", "training_tokens"}
    require_known_keys(overrides, known, "the overrides of finetune_config")
    overrides = read_numbers(plain(overrides), E2ESAERunnerConfig, "the overrides")
    lengths = plain({"training_tokens": training_tokens, "evaluation_tokens": evaluation_tokens})
    overrides = _read_lengths({**lengths, **overrides})
    training_tokens, evaluation_tokens = overrides.pop("training_tokens"), overrides.pop("evaluation_tokens")
    model_dtype, sae_settings, lora_rank = plain((model_dtype, sae_settings, lora_rank))
    if model_dtype not in (None, *DTYPES):
        raise ValueError(f"model_dtype must be one of {list(DTYPES)}, or None for the default, got {model_dtype!r}.")
    if trained not in get_args(Trained):
        raise ValueError(f"trained must be one of {list(get_args(Trained))}, got {trained!r}.")
    _check_thresholds(sae, trained, train_thresholds)
    config = training_config(sae, sae_settings, thresholds_are_frozen=not train_thresholds)
    settings = _place(sae, overrides)
    if not force:
        check_same_place(sae, settings["model_name"], settings["hook_name"], settings.get("hook_head_index"))
    settings["model_from_pretrained_kwargs"] = _model_kwargs(settings, overrides, model_dtype)
    settings |= {
        "sae": config,
        "training_tokens": training_tokens,
        "objective": _objective(config),
        "local_first": 0.0,
        "lr": LEARNING_RATE[trained],
        "max_grad_norm": 1.0,
        **_trained(sae, trained, train_thresholds, lora_rank),
    }
    # As in evaluation: an SAE whose record says nothing leaves them clean, as those who use it do.
    recorded = sae.cfg.metadata.exclude_special_tokens
    settings["exclude_special_tokens"] = True if recorded is None else recorded
    if "W_dec" in overrides.get("frozen_parameters", ()):
        settings["keep_decoder_norms"] = False
    settings = {**settings, **overrides}
    settings |= _lengths(settings, evaluation_tokens)
    settings |= _rows(sae, settings, training_tokens + evaluation_tokens)
    # SAELens tells about its buffer while it makes a verbose config, which means nothing here.
    cfg = E2ESAERunnerConfig(**{**settings, "verbose": False})
    cfg.verbose = settings.get("verbose", True)
    return cfg


def _read_lengths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What lengths are computed from, whole and positive."""
    read = dict(settings)
    for name in (
        "training_tokens", "evaluation_tokens", "context_size", "train_batch_size_tokens", "store_batch_size_prompts",
        "eval_batch_size_prompts",
    ):  # fmt: skip
        value = settings.get(name, 1)
        if value is None and name == "eval_batch_size_prompts":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}.")
        if name in read:
            read[name] = int(value)
    return read


def _place(sae: SAE[Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    metadata = sae.cfg.metadata
    settings = {name: metadata[name] for name in FROM_METADATA if metadata[name] is not None}
    settings = {"context_size": CONTEXT_SIZE, **settings, **{k: v for k, v in overrides.items() if k in FROM_METADATA}}
    if settings.get("seqpos_slice") is not None:
        settings["seqpos_slice"] = tuple(settings["seqpos_slice"])
    for name in ("model_name", "hook_name"):
        if not settings.get(name):
            raise ValueError(f"The SAE's metadata do not say its {name}: give {name}=... (as in SAELens's config).")
    if not settings.get("dataset_path"):
        raise ValueError(
            "The SAE's metadata name no dataset: give dataset_path=..., text or tokens of the Hub or a folder."
        )
    return settings


def _rows(sae: SAE[Any], settings: Mapping[str, Any], n_tokens: int) -> dict[str, Any]:
    """The order of the rows that the SAE's record is of, and the first row after those that it was trained on, if there
    are so many tokens after it."""
    names = {field.name for field in fields(DataSettings)}
    data = DataSettings(**{name: value for name, value in settings.items() if name in names})
    records = [each for each in trained_rows(sae) if each.is_of(data)]
    if not records:
        return {}
    order = {name: getattr(records[-1], name) for name in ROW_ORDER if name not in settings}
    data = replace(data, **order)
    known = [each for each in records if each.counts_as(data, settings["context_size"])]
    if "skip_examples" in settings or len(known) < len(records) or any(each.epochs > 1 for each in known):
        return order
    first = max(each.last_row for each in known) + 1
    tokens_per_row = min(each.training_tokens / (each.last_row - each.first_row + 1) for each in known)
    n_rows = min((each.n_rows for each in known if each.n_rows is not None), default=None)
    has_enough = n_rows is None or (n_rows - first) * tokens_per_row >= ROOM * n_tokens
    return {**order, "skip_examples": first} if has_enough else order


def _model_kwargs(settings: dict[str, Any], overrides: Mapping[str, Any], dtype: str | None) -> dict[str, Any] | None:
    """With the model's dtype, by the name that all three families' loaders know."""
    kwargs = settings.get("model_from_pretrained_kwargs")
    if dtype is None and "model_from_pretrained_kwargs" not in overrides:
        device = overrides.get("llm_device") or overrides.get("device") or ""
        dtype = "bfloat16" if str(device).startswith("cuda") else None
    if dtype is None:
        return kwargs
    default = (
        {"center_writing_weights": False} if settings.get("model_class_name") in (None, "HookedTransformer") else {}
    )
    return {**(default if kwargs is None else kwargs), "dtype": dtype}


def _objective(config: Any) -> Objective:
    """SAELens cannot compute TopK's auxiliary loss under the normalisations at run time; it is for dead features alone."""
    at_run_time = config.normalize_activations in RUN_TIME_NORMALISATIONS
    if at_run_time and config.architecture() in AUXILIARY_FOR_DEAD_FEATURES:
        return Objective.finetune(auxiliary=0.0)
    return Objective.finetune()


def _check_thresholds(sae: SAE[Any], trained: Trained, train_thresholds: bool) -> None:
    if not train_thresholds:
        return
    if sae.cfg.architecture() != "jumprelu":
        raise ValueError(
            f"train_thresholds=True has no effect: an SAE of architecture {sae.cfg.architecture()!r} has no thresholds."
        )
    if trained in ("decoder", "scale_and_bias"):
        raise ValueError(
            f"train_thresholds=True does not go with trained={trained!r}, which leaves the encoder as it is."
        )


def _trained(sae: SAE[Any], trained: Trained, train_thresholds: bool, lora_rank: int | None) -> dict[str, Any]:
    names = [name for name, _ in sae.named_parameters()]
    if trained in ("all", "lora"):
        frozen = [] if train_thresholds else [name for name in names if name == "threshold"]
    else:
        frozen = [name for name in names if name not in ("W_dec", "b_dec")]
    if lora_rank is not None and trained != "lora":
        raise ValueError(f"lora_rank={lora_rank!r} has no effect with trained={trained!r}: leave it out.")
    settings: dict[str, Any] = {"frozen_parameters": tuple(frozen), "keep_decoder_norms": trained != "scale_and_bias"}
    if trained == "lora":
        settings |= {"adapter": "low_rank", "adapter_rank": lora_rank}
    elif trained == "scale_and_bias":
        settings |= {"adapter": "scale"}
    return settings


def _lengths(settings: dict[str, Any], evaluation_tokens: int) -> dict[str, Any]:
    """Steps, schedule, evaluations: what depends on other settings and is not given itself."""
    context = len(range(settings["context_size"])[slice(*settings.get("seqpos_slice", (None,)))])
    chosen: dict[str, Any] = {}
    batch = chosen["train_batch_size_tokens"] = settings.get("train_batch_size_tokens", STEP_PROMPTS * context)
    prompts = chosen["store_batch_size_prompts"] = settings.get("store_batch_size_prompts", STEP_PROMPTS)
    n_steps = settings["training_tokens"] // batch
    if "lr_scheduler_name" not in settings and "lr_decay_steps" not in settings:
        n_decay = max(n_steps - settings.get("lr_warm_up_steps", 0), 0)
        chosen |= {"lr_scheduler_name": "constant", "lr_decay_steps": n_decay}
    per_batch = settings.get("eval_batch_size_prompts") or prompts
    if "n_eval_batches" not in settings:
        chosen["n_eval_batches"] = max(1, round(evaluation_tokens / (per_batch * settings["context_size"])))
    if "logger" not in settings:
        every = max(1, min(10, n_steps // N_EVALUATIONS))
        per_evaluation = max(1, -(-n_steps // (N_EVALUATIONS * every)))
        chosen["logger"] = LoggingConfig(
            log_to_wandb=False, wandb_log_frequency=every, eval_every_n_wandb_logs=per_evaluation
        )
        n_evaluations = 0 if settings.get("n_eval_batches") == 0 else n_steps // (every * per_evaluation)
        if "patience_evaluations" not in settings and n_evaluations > PATIENCE:
            chosen["patience_evaluations"] = PATIENCE
    return chosen
