"""What decides the cost of a training step, read from a config and the real model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens.saes.sae import TrainingSAE
from torch import Tensor, nn

from e2e_sae_plugin.architectures import TOKEN_SEPARABLE
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.kernels import takes_less_at_once
from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.splice import SplicedModel

K_SPARSE = frozenset({"topk", "abstopk", "batchtopk", "matryoshka_batchtopk"})
"""Architectures whose decoder and gradients touch `k` features of a token, whatever the weights."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a decoder-only language model."""

    block_weights: tuple[int, ...]
    """For each block, the weights that a token is multiplied with (of a mixture of experts, those of its experts)."""
    score_width: int
    """Query heads times head dimension: a token's attention scores cost `2 * score_width` FLOPs for each position."""
    d_model: int
    vocabulary: int
    weight_bytes: int
    """Of all parameters and buffers."""
    element_bytes: int
    """Of one number in the model's dtype."""
    dequantised_bytes: int = 0
    """Of the largest quantised weight once it is in the model's dtype, which it is while a token is multiplied with it."""
    has_linear_head: bool = True
    """Whether the KL runs in buffers that its chunks share (`kernels.kl.LinearHead`)."""


@dataclass(frozen=True)
class SAESizes:
    """Sizes of an SAE."""

    architecture: str
    d_in: int
    d_sae: int
    weight_bytes: int
    trained_bytes: int
    """Of the parameters that are not frozen, which get a gradient."""
    optimized_bytes: int
    """Of what the optimizer moves: the same, less what an adapter stands for."""
    active: float | None = None
    """Features per token that the decoder and the gradients touch; None for all of them (dense)."""
    encoder_products: int = 1
    """Products of a token with the whole encoder: matching pursuit has one for each iteration."""
    has_gate: bool = False
    """A gated SAE decodes its gates too."""


@dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps of a spliced pass, per token and block: `fixed + per_position * context_size`."""

    fixed: float
    per_position: float

    def at(self, context_size: int) -> float:
        """Bytes per token and block."""
        return self.fixed + self.per_position * context_size


@dataclass(frozen=True)
class Workload:
    """One optimizer step."""

    model: ModelSizes
    sae: SAESizes
    start_block: int
    """First block of the spliced pass."""
    clean_blocks: int
    """Blocks that the clean pass runs."""
    spliced_end: int
    """Block before which the spliced pass ends; `start_block` where there is none."""
    has_kl: bool
    context_size: int
    trained_positions: int
    """Of a sequence: `context_size` through `seqpos_slice`."""
    step_prompts: int
    """Sequences of an optimizer step."""
    micro_prompts: int
    """Sequences that go through the model at once."""
    n_reconstructions: int = 1
    """Spliced passes: Matryoshka has one for each level."""
    n_downstream: int = 0
    separable: bool = True
    """Whether the SAE too runs on one micro-batch at a time."""
    clips: bool = True
    recomputes_blocks: bool = False
    """Of a block, the spliced pass keeps its input alone (`checkpoint_blocks`)."""
    autocasts_sae: bool = False
    """SAELens's own code trains the SAE (`autocast`)."""

    @property
    def tokens_per_step(self) -> int:
        """Trained tokens of an optimizer step."""
        return self.step_prompts * self.trained_positions

    @property
    def spliced_blocks(self) -> int:
        """Blocks that each spliced pass runs, forward and backward."""
        return self.spliced_end - self.start_block

    @property
    def has_spliced_pass(self) -> bool:
        """Whether the model is run a second time."""
        return self.has_kl or self.n_downstream > 0

    @property
    def has_kernels(self) -> bool:
        """Whether this package's kernels may train the SAE."""
        return self.has_spliced_pass and not self.autocasts_sae

    @property
    def sae_prompts(self) -> int:
        """Sequences that the SAE runs on at once."""
        further_tokens = (self.step_prompts - self.micro_prompts) * self.context_size
        at_once = self.has_kernels and self.sae.architecture == "standard"
        at_once = at_once and takes_less_at_once(further_tokens, self.sae.d_in)
        return self.micro_prompts if self.separable and self.has_spliced_pass and not at_once else self.step_prompts


def workload_of(
    cfg: E2ESAERunnerConfig, spliced: SplicedModel, sae: TrainingSAE[Any], objective: Objective | None = None
) -> Workload:
    """The step that `cfg` trains with.

    Args:
        spliced: the model with the SAE's place in it, after its `check`.
        objective: another than `cfg.objective`, such as that of a run's local part.
    """
    objective = cfg.objective if objective is None else objective
    hooks = spliced.downstream_hooks if objective.beta > 0 else ()
    position = spliced.position
    inside = 0 if position.enters_block else 1  # a hook within a block is reached before the block's end
    last_downstream = max((_blocks_before(spliced, hook) for hook in hooks), default=position.start_block + inside)
    end = position.n_layers if objective.kl > 0 else last_downstream
    return Workload(
        model=model_sizes(spliced),
        sae=sae_sizes(cfg, sae),
        start_block=position.start_block,
        clean_blocks=end,
        spliced_end=end if objective.needs_spliced_pass else position.start_block,
        has_kl=objective.kl > 0,
        context_size=cfg.context_size,
        trained_positions=cfg.training_context_size,
        step_prompts=cfg.step_size_prompts,
        micro_prompts=cfg.micro_batch_size_prompts,
        n_reconstructions=_n_reconstructions(sae, objective),
        n_downstream=len(hooks),
        separable=sae.cfg.architecture() in TOKEN_SEPARABLE and not objective.balance_kl,
        clips=cfg.max_grad_norm is not None,
        recomputes_blocks=cfg.checkpoint_blocks,
        autocasts_sae=bool(cfg.autocast),
    )


def _blocks_before(spliced: SplicedModel, hook: str) -> int:
    """Blocks that have run, at least in part, when `hook` is reached."""
    position = spliced._find_position(hook)
    return position.start_block + (0 if position.enters_block else 1)


def _n_reconstructions(sae: TrainingSAE[Any], objective: Objective) -> int:
    if sae.cfg.architecture() != "matryoshka_batchtopk":
        return 1
    inner = len(sae.cfg.matryoshka_widths) - 1
    return 1 + (min(inner, 1) if objective.matryoshka_levels == "sampled" else inner)


def sae_sizes(cfg: E2ESAERunnerConfig, sae: TrainingSAE[Any]) -> SAESizes:
    """Sizes of the SAE that `cfg` trains."""
    architecture = sae.cfg.architecture()
    trained = {name: p for name, p in sae.named_parameters() if name not in cfg.frozen_parameters}
    adapted = () if cfg.adapter == "none" else ("W_enc", "W_dec")
    active, encoder_products = None, 1
    if architecture in K_SPARSE:
        active = float(sae.cfg.k)
    elif architecture == "matching_pursuit":
        encoder_products = int(getattr(sae.cfg, "max_iterations", None) or sae.cfg.d_in)
        active = float(encoder_products)
    return SAESizes(
        architecture=architecture,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        weight_bytes=_nbytes(sae.state_dict().values()),
        trained_bytes=_nbytes(trained.values()),
        optimized_bytes=_nbytes(p for name, p in trained.items() if name not in adapted),
        active=active,
        encoder_products=encoder_products,
        has_gate=architecture == "gated",
    )


def model_sizes(spliced: SplicedModel) -> ModelSizes:
    """Sizes of the model that `spliced` runs, counted module by module.

    Raises:
        ValueError: the model's config does not say how wide its attention is.
    """
    blocks, config = _blocks_and_config(spliced)
    # Quantised weights are integers; activations are in the dtype of what is not quantised.
    reference = next(p for p in blocks[0].parameters() if p.is_floating_point())
    quantised = [m for m in spliced.model.modules() if is_quantised(m)]
    return ModelSizes(
        block_weights=tuple(multiplied_weights(block, config) for block in blocks),
        score_width=_score_width(config),
        d_model=_first(config, "d_model", "hidden_size", "n_embd"),
        vocabulary=spliced.vocabulary,
        weight_bytes=model_bytes(spliced.model),
        element_bytes=reference.element_size(),
        dequantised_bytes=max((_shape_elements(m) * reference.element_size() for m in quantised), default=0),
        has_linear_head=isinstance(spliced.unembed, LinearHead),
    )


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear module's weight is kept as integers."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def _shape_elements(module: nn.Module) -> int:
    return int(getattr(module, "in_features", 0)) * int(getattr(module, "out_features", 0))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers where it runs, with the scales of quantised ones; what accelerate has
    offloaded is not there."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes keeps the scales of 4-bit weights beside them
        if state is not None:
            tensors += [value for value in state.as_dict().values() if isinstance(value, Tensor)]
        if isinstance(scales := getattr(parameter, "SCB", None), Tensor):
            tensors.append(scales)
    here = [tensor for tensor in tensors if not tensor.is_meta]
    return _nbytes(here or tensors)  # all on torch's "meta" device: a model of which nothing but the shape is wanted


def multiplied_weights(block: nn.Module, config: Any = None) -> int:
    """Weights of a block that a token is multiplied with: its matrices, not its biases, norms and buffers.

    Args:
        config: the model's; of a mixture of experts, the share of the experts that a token sees is in it.
    """
    total = 0.0
    for path, module in block.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = path.split(".")
        # TransformerBridge keeps the joint projection of some models beside the three that it splits it into.
        split_up = "qkv" in names and _has_split_projections(block, names)
        if not own or split_up or isinstance(module, nn.Embedding):
            continue
        in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(in_features, int) and isinstance(out_features, int):  # quantised weights have another shape
            elements = in_features * out_features
        else:
            elements = sum(parameter.numel() for name, parameter in own.items() if _is_matrix(name, parameter))
        total += elements * (_expert_share(config) if "experts" in names else 1)
    return round(total)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    is_bias = name.lstrip("_").startswith("b_") or "bias" in name
    return parameter.ndim >= 2 and not is_bias


def _has_split_projections(block: nn.Module, names: list[str]) -> bool:
    parent = block.get_submodule(".".join(names[: names.index("qkv")]))
    return all(name in dict(parent.named_children()) for name in ("q", "k", "v"))


def _expert_share(config: Any) -> float:
    n_experts = _optional(config, "num_experts", "num_local_experts", "n_routed_experts")
    per_token = _optional(config, "experts_per_token", "num_experts_per_tok", "num_experts_per_token")
    return per_token / n_experts if n_experts and per_token else 1.0


def _blocks_and_config(spliced: SplicedModel) -> tuple[list[nn.Module], Any]:
    model, swap = spliced.model, getattr(spliced, "_swap", None)
    if swap is None:  # HookedTransformer
        return list(model.blocks), model.cfg  # pyright: ignore[reportArgumentType, reportCallIssue]
    config: Any = swap.model.config
    return list(swap.layers), config.get_text_config()


def _score_width(config: Any) -> int:
    heads = _first(config, "n_heads", "num_attention_heads", "n_head")
    head_width = _optional(config, "d_head", "head_dim")
    return heads * int(head_width) if head_width else _first(config, "d_model", "hidden_size", "n_embd")


def _first(config: Any, *names: str) -> int:
    value = _optional(config, *names)
    if value is None:
        raise ValueError(
            f"The model's config ({type(config).__name__}) has none of {', '.join(names)}, so its cost cannot be counted. "
            "Please report the model class."
        )
    return int(value)


def _optional(config: Any, *names: str) -> float | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
    return None


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct memory: tied weights are there once."""
    held: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        if tensor.is_meta:  # there only in shape: counted as if it were made
            held["meta", id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            held[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def changed(work: Workload, *, sae: Mapping[str, Any] | None = None, **settings: Any) -> Workload:
    """The workload with other numbers; those of the SAE as `sae={...}`."""
    if sae is not None:
        settings["sae"] = dataclasses.replace(work.sae, **sae)
    return dataclasses.replace(work, **settings)
