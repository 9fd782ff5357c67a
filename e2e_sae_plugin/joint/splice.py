"""The passes of a joint splice: the clean one for all places, and the one in which each SAE reads what others wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from e2e_sae_plugin.joint.spliced_sae import SplicedSAE
from e2e_sae_plugin.splice import CleanPass, SplicedModel, SplicedPass
from e2e_sae_plugin.splice.activations import insert_sae_out, select_sae_in, trained_tokens
from e2e_sae_plugin.splice.base import HookFunction, clean_passes
from e2e_sae_plugin.splice.joint import in_execution_order
from e2e_sae_plugin.spliced_losses import MicroBatch


@dataclass(frozen=True)
class JointPlace:
    """Where an SAE sits."""

    model: SplicedModel
    head_index: int | None = None


@dataclass
class JointMicroBatch:
    """Sequences that went through the clean model at once."""

    places: dict[str, MicroBatch]
    """By SAE, in the model's order; all with the same tokens and mask."""

    @property
    def first(self) -> MicroBatch:
        """Of the place where the spliced pass starts."""
        return next(iter(self.places.values()))

    @property
    def n_tokens(self) -> int:
        """That are trained on or measured."""
        return self.first.n_tokens


@dataclass
class JointOutput:
    """What a joint pass gave."""

    spliced: SplicedPass
    sae_in: dict[str, Tensor]
    """What each SAE read, `[tokens, d_in]` in the model's own space; of the first, the clean activation."""


class JointSplice:
    """Places of SAEs in one frozen model, in the order in which the model reaches them.

    Args:
        places: by the SAE's name.

    Raises:
        ValueError: as `in_execution_order`.
    """

    def __init__(self, places: Mapping[str, JointPlace]):
        order = in_execution_order({name: place.model for name, place in places.items()})
        self.places = {name: places[name] for name in order}

    @property
    def first(self) -> SplicedModel:
        """The splice of the first place: its downstream hooks are the pass's."""
        return next(iter(self.places.values())).model

    def clean(
        self,
        tokens: Tensor,
        *,
        hidden: bool = True,
        downstream: bool = True,
        seqpos_slice: Sequence[int | None] = (None,),
        excluded: Tensor | None = None,
    ) -> JointMicroBatch:
        """One clean pass over `tokens [batch, pos]` for all places; arguments as in `clean_micro_batch`."""
        tokens = tokens.to(self.first.token_device)
        models = [place.model for place in self.places.values()]
        passes = clean_passes(models, tokens, hidden=hidden, downstream=downstream)
        mask = trained_tokens(tokens, seqpos_slice, excluded)
        n_tokens = tokens.numel() if mask is None else int(mask.sum())
        return JointMicroBatch(
            {name: _micro_batch(tokens, one, mask, n_tokens) for name, one in zip(self.places, passes, strict=True)}
        )

    def run(self, micro: JointMicroBatch, saes: Mapping[str, SplicedSAE], *, hidden: bool = True) -> JointOutput:
        """The pass with these SAEs in it, or with some of the places' alone.

        Tokens that are not trained on are left as they arrive. The pass starts at the first of the SAEs that are given.
        """
        names = [name for name in self.places if name in saes]
        sae_in: dict[str, Tensor] = {}
        first, later = names[0], names[1:]
        start = self._replace(micro, first, saes[first], sae_in, micro.places[first].clean.activation)
        functions: dict[str, HookFunction] = {
            self.places[name].model.position.hook_name: self._function(micro, name, saes[name], sae_in)
            for name in later
        }
        model = self.places[first].model
        return JointOutput(model.spliced_pass(micro.places[first].clean, start, hidden=hidden, later=functions), sae_in)

    def clean_sae_in(self, micro: JointMicroBatch, name: str) -> Tensor:
        """What an SAE would read in the clean model, `[tokens, d_in]`."""
        return micro.places[name].sae_in(self.places[name].head_index)

    def _function(
        self, micro: JointMicroBatch, name: str, sae: SplicedSAE, sae_in: dict[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        return lambda activation: self._replace(micro, name, sae, sae_in, activation)

    def _replace(
        self, micro: JointMicroBatch, name: str, sae: SplicedSAE, sae_in: dict[str, Tensor], activation: Tensor
    ) -> Tensor:
        head, mask = self.places[name].head_index, micro.places[name].mask
        sae_in[name] = select_sae_in(activation, mask, head)
        return insert_sae_out(activation, sae.reconstruct(sae_in[name]), mask, head)


def _micro_batch(tokens: Tensor, clean: CleanPass, mask: Tensor | None, n_tokens: int) -> MicroBatch:
    return MicroBatch(tokens, clean, None if mask is None else mask.to(clean.activation.device), n_tokens)


def squared_change(features: Tensor, clean: Tensor) -> Tensor:
    """`||f(a_hat) - f(a)||^2` of each token, `[tokens]`, in fp32."""
    return (features.float() - clean.float()).pow(2).sum(1)
