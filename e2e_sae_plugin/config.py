"""`E2ESAERunnerConfig`: SAELens's runner config plus what end-to-end training adds.

No postponed annotations here: the command line is built from this class (simple-parsing reads the types).
"""

import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from sae_lens.config import T_TRAINING_SAE_CONFIG, LanguageModelSAERunnerConfig, LoggingConfig, SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig

from e2e_sae_plugin.adapters import AdapterKind
from e2e_sae_plugin.architectures import check_dtype, check_normalisation
from e2e_sae_plugin.config_checks import check_schedule, check_shards, check_sharing, check_start, check_values
from e2e_sae_plugin.config_fields import FIELDS_REFUSED, FIELDS_WITHOUT_EFFECT, host_defaults
from e2e_sae_plugin.config_reading import names_of, read_numbers, read_yaml, require_known_keys
from e2e_sae_plugin.config_values import read_fields, require_writable
from e2e_sae_plugin.data.settings import DataSettings
from e2e_sae_plugin.model_settings import check_model_settings
from e2e_sae_plugin.objective import Objective

logger = logging.getLogger(__name__)

RECIPE_LOCAL_FIRST = 0.8
"""Measured on the bundled model with TopK, BatchTopK, ReLU and JumpReLU SAEs (docs/guides/objectives.md)."""
RECIPE_MIN_STEPS = 10
MODEL_CLASSES = ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM")


def recipe_decay_steps(n_steps: int) -> int:
    """Return how many steps the default recipe has after its local part, in which the learning rate falls."""
    return n_steps - math.ceil(RECIPE_LOCAL_FIRST * n_steps)


@dataclass
class E2ESAERunnerConfig(LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG]):
    """SAELens's runner config, for end-to-end training. An existing SAELens config runs with this class instead.
    Generic in the class of `sae`, as in SAELens: `E2ESAERunnerConfig[TopKTrainingSAEConfig](sae=...)`.

    Fields of the host keep their meaning, with these readings: one optimizer step is `train_batch_size_tokens` divided by
    the positions of a sequence that are trained on, in whole sequences; `store_batch_size_prompts` is the most sequences
    that go through the model at once (the micro-batch is the largest divisor of the step not above it); special tokens
    that are excluded drop out of every average, while step counts and `training_tokens` count them; `n_eval_batches`
    batches of `eval_batch_size_prompts` sequences are taken from the head of the dataset, never trained on, and
    evaluated every `logger.wandb_log_frequency * logger.eval_every_n_wandb_logs` steps, with Weights & Biases or not.

    Args:
        objective (Objective): what is minimized besides the SAE's own sparsity terms. Default: `Objective.finetune()`, KL
            and squared error in equal parts, so that learning rates and sparsity coefficients keep the meaning that they
            have in SAELens.
        max_grad_norm (float, optional): the norm that all the SAE's gradients are clipped to. Default 1.0, which is
            fixed in SAELens; the paper used 10. None disables clipping.
        local_first (float): share of `training_tokens`, in [0, 1), that is trained with `Objective.local()` before
            `objective` takes over. Local steps cost a fraction of end-to-end ones, and the rest of the run starts from
            features that exist. Default: 0.8 with `Objective.finetune()` and a new SAE, and a constant learning rate without
            decay then decays to 0 over the rest of the run; else 0. Needs an architecture that fixes L0 by itself (TopK's
            family, matching pursuit) or `objective.mse` > 0: an L1 or L0 coefficient that balances a squared error does not
            balance a KL.
        b_dec_init_method (str): where `b_dec` starts: "mean", the mean of the activations (normalized as the SAE trains on
            them) over about 32,768 tokens, or "zeros" as in SAELens. Default "auto": the mean for a new SAE; for one with
            weights already (`from_pretrained_path`, `override_sae`), the `b_dec` that it has. From zeros, features are spent
            on the mean, which in real models is most of an activation's norm: on SmolLM2-135M at layer 14 an SAE ended with
            16 of 512 features alive, and with 477 from the mean.
        frozen_parameters (tuple of str): names of the SAE's parameters that are not trained, for instance `("threshold",)`;
            default none.
        keep_decoder_norms (bool): hold the norm of every row of `W_dec` where it is at the start: the gradient along a row
            is left out, and each step ends with the rows scaled back. Default False.
        adapter (str): train few numbers in the place of weights: "low_rank" (LoRA) for those of `W_enc` and `W_dec` that are
            not frozen; "scale", one factor per row of `W_dec`. Default "none". For an SAE that exists.
        adapter_rank (int, optional): the rank of "low_rank"; None for 8.
        patience_evaluations (int, optional): stop when the held-out KL has not fallen below its lowest value for so many
            evaluations in a row (the start's is the first), and end with the weights that had the lowest. Default None: the
            run goes to its end, and ends with its last weights.
        checkpoint_every_minutes (float, optional): write a checkpoint when so many minutes have passed since the last one.
            Default 15; None for none. Beside them come the `n_checkpoints` of SAELens, spread over the run, and one when
            the run is interrupted or fails. All go to a folder of the run's own below `checkpoint_path`.
        keep_checkpoints (int): how many of those by the clock are kept, the newest ones; default 2. The `n_checkpoints` of
            SAELens all stay.
        checkpoint_blocks (bool): activation checkpointing. Of the blocks that run after the SAE, only the inputs are kept
            for backward, which computes the rest anew, block by block: one more forward pass over these blocks, and
            memory for one of them in the place of all. The numbers are the same, and a run may be resumed with it or
            without. A hook of your own in these blocks is called in backward again. Default False.
        shard_dictionary (bool): under `torchrun`, divide the SAE's features between the processes instead of giving each of
            them all: for dictionaries that are too wide for one device. The result is the same, and so are checkpoints and
            the finished SAE. For architectures standard, topk, batchtopk and jumprelu; d_sae has to divide by the number
            of processes. Default False.
        max_skipped_steps (int): steps in a row with a loss or gradient that is not finite, all of them skipped, after
            which the run stops. Default 10.
        overwrite_output (bool): replace another run that `output_path` holds. Default False: it is refused.
        split (str, optional): the dataset's split; None for "train", or the only one there is.
        text_column (str, optional): the dataset's column of texts or of token ids; None to find it by name and type.
        shuffle_seed (int, optional): shuffle the dataset's rows with this seed, before any are left out. Default None: they
            stay in order. A streamed dataset is shuffled in a buffer, and resuming reads it again from its beginning.
        skip_examples (int): rows left out at the beginning of the dataset. Default 0.
        max_examples (int, optional): the most rows that are read in an epoch. Default None: all.
        push_to_hub (str, optional): the Hugging Face Hub repository, `owner/name`, that the finished SAE is uploaded to. A
            failing upload does not fail the run: the log says how to repeat it. Default None.
        hub_private (bool): a repository that is created for it is private. Default False.
        hub_revision (str, optional): the branch; None for main.
        hub_sae_id (str, optional): the SAE's id there; None for the name of its hook.
        hub_checkpoints (bool): also upload the SAEs of the `n_checkpoints`, as `<id>/checkpoints/<tokens>`. Default False.

    `resume_from_checkpoint` takes a checkpoint's folder, or "auto": the newest whole checkpoint of this run below
    `checkpoint_path`, if there is one. The run goes on as if it had not stopped.

    Raises:
        ValueError: a setting cannot work or would have no effect; the message names the field, what it got, what it
            expected and what to do.
    """

    objective: Objective = field(default_factory=Objective.finetune)
    max_grad_norm: float | None = 1.0
    local_first: float = None  # pyright: ignore[reportAssignmentType] (until `__post_init__`, which fills it in)
    b_dec_init_method: Literal["auto", "mean", "zeros"] = "auto"
    frozen_parameters: tuple[str, ...] = ()
    keep_decoder_norms: bool = False
    adapter: AdapterKind = "none"
    adapter_rank: int | None = None
    patience_evaluations: int | None = None
    checkpoint_every_minutes: float | None = 15.0
    keep_checkpoints: int = 2
    checkpoint_blocks: bool = False
    shard_dictionary: bool = False
    max_skipped_steps: int = 10
    overwrite_output: bool = False
    split: str | None = None
    text_column: str | None = None
    shuffle_seed: int | None = None
    skip_examples: int = 0
    max_examples: int | None = None
    push_to_hub: str | None = None
    hub_private: bool = False
    hub_revision: str | None = None
    hub_sae_id: str | None = None
    hub_checkpoints: bool = False

    def __post_init__(self) -> None:
        read_fields(self)
        for name in ("output_path", "checkpoint_path", "resume_from_checkpoint", "from_pretrained_path"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must name a folder, or be None; got an empty string.")
            if str(getattr(self, name)).lower() in ("none", "null"):  # as a flag can only say it
                setattr(self, name, None)
        for name, wanted in (("sae", TrainingSAEConfig), ("logger", LoggingConfig)):
            if not isinstance(getattr(self, name), wanted):
                raise ValueError(
                    f"{name} must be a {wanted.__name__} of SAELens, got {getattr(self, name)!r}. "
                    "E2ESAERunnerConfig.from_dict takes mappings, as in a file."
                )
            read_fields(getattr(self, name), f"{name}.")
        if not 1 <= len(self.seqpos_slice) <= 3:
            raise ValueError(
                "seqpos_slice must be (start, stop) or (start, stop, step) of whole numbers or None, got "
                f"{self.seqpos_slice!r}."
            )
        check_values(self)
        self._check_fields()
        check_model_settings(
            self.model_class_name, self.model_from_pretrained_kwargs, str(self.device), self.llm_device
        )
        self._choose_local_first()
        verbose, self.verbose = self.verbose, False  # what the host prints is about its activation buffer
        super().__post_init__()
        self.verbose = verbose
        check_normalisation(self.sae.architecture(), self.sae.normalize_activations, self.objective.auxiliary)
        check_dtype(self.sae.architecture(), self.sae.dtype, bool(self.autocast))
        check_start(self)
        check_shards(self)
        check_sharing(self)
        self._check_batch()
        check_schedule(self)
        self._check_writable()

    def _check_fields(self) -> None:
        if self.model_class_name not in MODEL_CLASSES:
            raise ValueError(
                f"model_class_name={self.model_class_name!r} is not supported. Expected one of {list(MODEL_CLASSES)}"
                + (": a state-space model has no blocks to start from." if "Mamba" in self.model_class_name else ".")
            )
        if isinstance(self.objective, Mapping | str):
            self.objective = Objective.from_dict(self.objective)
        if not isinstance(self.objective, Objective):
            raise ValueError(f"objective must be an Objective, got {self.objective!r}.")
        DataSettings.of(self)  # which checks them
        if self.max_grad_norm is not None and not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ValueError(
                f"max_grad_norm must be a positive finite number, or None for no clipping, got {self.max_grad_norm!r}."
            )
        defaults = host_defaults()
        for name, reason in FIELDS_REFUSED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is refused: {reason}. Leave it at {defaults[name]!r}."
                )
        # A saved config names the store's device, which the host resolves to the SAE's.
        defaults["act_store_device"] = self.act_store_device if self.act_store_device == self.device else None
        idle = [name for name in sorted(FIELDS_WITHOUT_EFFECT) if getattr(self, name) != defaults[name]]
        if idle and self.verbose:
            logger.warning(
                "No effect in end-to-end training: %s.", ", ".join(f"{n}={getattr(self, n)!r}" for n in idle)
            )
        for name in ("training_tokens", "train_batch_size_tokens", "store_batch_size_prompts", "context_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}.")

    def _check_writable(self) -> None:
        parts = ("sae", "logger", "objective")
        require_writable({each.name: getattr(self, each.name) for each in fields(self) if each.name not in parts})
        sae = self.sae.to_dict()
        metadata = sae.pop("metadata")
        require_writable(sae, "sae.")
        require_writable(metadata, "sae.metadata.")

    def _choose_local_first(self) -> None:
        """Fill in what `local_first=None` stands for, and the decay that belongs to it."""
        if self.local_first is not None:
            return
        self.local_first = 0.0
        n_steps = self.training_tokens // max(self.train_batch_size_tokens, 1)
        is_recipe = self.objective.balance_kl and self.objective.mse > 0
        if not is_recipe or self.from_pretrained_path is not None or n_steps < RECIPE_MIN_STEPS:
            return
        self.local_first = RECIPE_LOCAL_FIRST
        n_decay = recipe_decay_steps(n_steps)
        has_schedule = self.lr_scheduler_name != "constant" or self.lr_decay_steps > 0
        if not has_schedule and self.lr_warm_up_steps + n_decay <= n_steps:
            self.lr_decay_steps = n_decay

    def _check_batch(self) -> None:
        per_sequence, batch = self.training_context_size, self.train_batch_size_tokens
        if batch % per_sequence:
            below = max(batch // per_sequence, 1) * per_sequence
            nearest = f"{below} or {below + per_sequence}" if batch > per_sequence else f"{per_sequence}"
            at_once = per_sequence * self.store_batch_size_prompts
            if batch > at_once and (whole := round(batch / at_once) * at_once) not in (below, below + per_sequence):
                nearest += f"; {whole} in micro-batches of store_batch_size_prompts={self.store_batch_size_prompts}"
            raise ValueError(
                f"train_batch_size_tokens={batch} is not a whole number of sequences: context_size={self.context_size} "
                f"and seqpos_slice={tuple(self.seqpos_slice)} leave {per_sequence} tokens of each sequence to train on. "
                f"Nearest usable: {nearest}."
            )
        if self.training_tokens < batch:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one step of train_batch_size_tokens={batch}. "
                "Raise the former or lower the latter."
            )

    @property
    def training_context_size(self) -> int:
        """Positions of a sequence that are trained on: `context_size` through `seqpos_slice`."""
        return len(range(self.context_size)[slice(*self.seqpos_slice)])

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the run; the host's `total_training_steps` leaves out a last one that is begun."""
        return -(-self.training_tokens // self.train_batch_size_tokens)

    @property
    def step_size_prompts(self) -> int:
        """Sequences in one optimizer step."""
        return self.train_batch_size_tokens // self.training_context_size

    @property
    def micro_batch_size_prompts(self) -> int:
        """Sequences that go through the model at once: the largest divisor of the step within `store_batch_size_prompts`."""
        return self.micro_batch_of(self.step_size_prompts)

    def micro_batch_of(self, n_prompts: int) -> int:
        """The same of one rank's part of a step."""
        return max(n for n in range(1, min(n_prompts, self.store_batch_size_prompts) + 1) if n_prompts % n == 0)

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-ready; `from_dict` reads it back. Its host part alone is `host_dict`."""
        lists = {"seqpos_slice": list(self.seqpos_slice), "frozen_parameters": list(self.frozen_parameters)}
        return {**super().to_dict(), "objective": self.objective.to_dict(), **lists}

    def host_dict(self) -> dict[str, Any]:
        """The fields that SAELens's own `LanguageModelSAERunnerConfig.from_dict` accepts (it fails on any other)."""
        host = {f.name for f in fields(LanguageModelSAERunnerConfig)}
        return {key: value for key, value in self.to_dict().items() if key in host}

    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """Asked for by SAELens's runner, which knows no objective and would train locally without a word.

        Raises:
            ValueError: always; this package's trainer asks for `host_trainer_config`.
        """
        raise ValueError(
            f"This is an {type(self).__name__} in a runner of SAELens, which would leave the objective out. Use "
            "E2ESAETrainingRunner(cfg).run(); for SAELens's own runner, LanguageModelSAERunnerConfig."
        )

    def host_trainer_config(self) -> SAETrainerConfig:
        """What SAELens's trainer, on which this package's builds, takes of the config."""
        return super().to_sae_trainer_config()

    @classmethod
    def load(cls, path: Path | str, **overrides: Any) -> "E2ESAERunnerConfig[Any]":
        """Read a YAML (or JSON) file such as `run.yaml`, or a run's `e2e_runner_cfg.json`.

        Args:
            path: of the file; what it leaves out takes the default.
            **overrides: fields that win over the file's.

        Raises:
            ValueError: there is no such file, it is no mapping, it names several SAEs, or `from_dict` refuses it.
        """
        content = read_yaml(Path(path))
        if "saes" in content:
            raise ValueError(
                f"{str(path)!r} names several SAEs (saes), and this is for a run with one. e2e-sae train takes such a file; "
                "in Python, MultiE2ESAERunnerConfig.load does."
            )
        return cls.from_dict({**content, **overrides})

    @classmethod
    def from_dict(cls, cfg_dict: dict[str, Any]) -> "E2ESAERunnerConfig[Any]":
        """Read `to_dict`'s output, a host `runner_cfg.json`, or a hand-written mapping that leaves out defaults.

        Raises:
            ValueError: an unknown key anywhere (near matches are suggested), or a value that the class refuses.
        """
        cfg_dict = dict(cfg_dict)
        if not cfg_dict.get("sae"):
            raise ValueError(
                "The config has no sae. Expected for instance sae: {architecture: topk, d_in: 768, d_sae: 12288, k: 32}."
            )
        sae = dict(cfg_dict["sae"])
        architecture = sae.get("architecture")
        if architecture not in SAE_TRAINING_CLASS_REGISTRY:
            close = difflib.get_close_matches(str(architecture), SAE_TRAINING_CLASS_REGISTRY, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"sae.architecture must be one of {sorted(SAE_TRAINING_CLASS_REGISTRY)}, got {architecture!r}.{hint}"
            )
        sae_class = get_sae_training_class(architecture)[1]
        parts = {"sae": sae_class, "logger": LoggingConfig, "objective": Objective}
        for key in cfg_dict:
            for part, part_class in parts.items():
                if key not in names_of(cls) and key in names_of(part_class):
                    raise ValueError(f"Unknown key {key!r} in config. It belongs below {part!r}.")
        require_known_keys(cfg_dict, names_of(cls), "config")
        require_known_keys(sae, {f.name for f in fields(sae_class)} | {"architecture"}, "sae")
        cfg_dict = {**cfg_dict, **read_numbers(cfg_dict, cls, "config")}
        cfg_dict["sae"] = sae_class.from_dict(read_numbers(sae, sae_class, "sae"))
        logging_dict = dict(cfg_dict.get("logger") or {})
        require_known_keys(logging_dict, {f.name for f in fields(LoggingConfig)}, "logger")
        cfg_dict["logger"] = LoggingConfig(**logging_dict)
        objective = cfg_dict.get("objective")
        if isinstance(objective, Mapping):
            objective = read_numbers(objective, Objective, "objective")
        if isinstance(objective, Mapping | str):
            cfg_dict["objective"] = Objective.from_dict(objective)
        for name in ("seqpos_slice", "frozen_parameters"):
            if name in cfg_dict:
                cfg_dict[name] = tuple(cfg_dict[name])
        for name, value in cfg_dict.items():
            if name.endswith("_device") and value == "None":  # the host writes str(None)
                cfg_dict[name] = None
        config = cls(**cfg_dict)
        if "checkpoint_path" in cfg_dict and "sae_lens_version" in cfg_dict:
            # A saved config already carries the run's id, which __post_init__ appends to the path again.
            config.checkpoint_path = cfg_dict["checkpoint_path"]
        return config
