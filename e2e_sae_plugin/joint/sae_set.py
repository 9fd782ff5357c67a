"""`SAESet`: the SAEs of a joint replacement as one thing, saved, loaded and put into a model at once."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor
from transformer_lens import HookedTransformer

from e2e_sae_plugin.checkpoint.folder import write_whole
from e2e_sae_plugin.evaluation.place import Place, check_width, places_of, reads_all_heads
from e2e_sae_plugin.finetune.start import load_quietly
from e2e_sae_plugin.hub.load import load_pretrained, pretrained_ids
from e2e_sae_plugin.joint.evaluate import JointEvaluation, measure_joint
from e2e_sae_plugin.joint.splice import JointPlace, JointSplice
from e2e_sae_plugin.joint.spliced_sae import FrozenSAE
from e2e_sae_plugin.splice import splice_into

logger = logging.getLogger(__name__)

MANIFEST_FILENAME = "sae_set.json"
FORMAT = 1


HOOKS_WITH_HEADS = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_result")
"""Of TransformerLens, besides `hook_z`, the only one whose heads SAELens flattens."""


@dataclass(frozen=True, eq=False)
class SAESet(Mapping[str, SAE[Any]]):
    """SAEs that were trained together, or are to be used together: a mapping from their names, in the model's order.

    ```python
    saes = load_sae_set("output/joint")          # or a Hub repository
    print({name: sae.cfg.d_sae for name, sae in saes.items()})
    model = saes.attach(HookedSAETransformer.from_pretrained("gpt2-small"))
    model.generate("The", max_new_tokens=20)     # runs through all of them
    ```
    """

    saes: dict[str, SAE[Any]]
    """By name, in the model's order."""
    training: dict[str, Any] = field(default_factory=dict)
    """How they were trained: the mode and what it says of it; empty where that is not known."""

    def __getitem__(self, name: str) -> SAE[Any]:
        return self.saes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.saes)

    def __len__(self) -> int:
        return len(self.saes)

    def attach(self, model: Any, use_error_term: bool | None = None) -> Any:
        """Put all SAEs into `model`, and return it; `model.reset_saes()` takes them out again.

        Args:
            model: a `HookedSAETransformer` or `SAETransformerBridge` of SAELens.
            use_error_term: as in SAELens's `add_sae`: True adds what each SAE leaves out, so that the output is the clean
                model's.

        Special tokens that an SAE leaves out (its metadata say so) it leaves out here too, in a `HookedSAETransformer`.
        SAELens has nothing for positions (`seqpos_slice`), nor a bridge for tokens: a warning says which SAEs then apply
        everywhere. In a `HookedSAETransformer` an SAE of a `hook_z` starts to reshape heads if it did not
        (`reshape_activations`).

        Raises:
            ValueError: If `model` is of another kind or lacks a hook, if an SAE is of one head, which SAELens would apply to
                all heads, or if it reads all heads of another hook than `hook_z`. Nothing is attached then.
        """
        if not callable(getattr(model, "add_sae", None)):
            raise ValueError(
                f"SAEs can be put into a HookedSAETransformer or a SAETransformerBridge of SAELens; got a "
                f"{type(model).__name__}."
            )
        for name, sae in self.saes.items():
            _check_attachable(name, sae, model)
        for name, sae in self.saes.items():
            if _must_reshape(sae, model):
                sae.turn_on_forward_pass_hook_z_reshaping()
            model.add_sae(sae, use_error_term=use_error_term, **_left_out(name, sae, model))
        return model

    def evaluate(
        self, model: Any, tokens: Tensor, batch_size_prompts: int = 8, **tokens_measured: Any
    ) -> JointEvaluation:
        """What the SAEs cost `model` as they are added one after the other, and each alone.

        Args:
            model: as in `splice_into`: a `HookedTransformer`, a `TransformerBridge` or a `HookedProxyLM`.
            tokens: token ids `[n_prompts, pos]`.
            batch_size_prompts: sequences that go through the model at once.
            **tokens_measured: `exclude_special_tokens` and `seqpos_slice`, as in `evaluate_many`.

        Raises:
            ValueError: an SAE does not fit the model, two sit at one place, or they leave out different tokens.
        """
        splice, frozen, place = parts_of(self.saes, model, **tokens_measured)
        return measure_joint(
            splice,
            frozen,
            tokens,
            batch_size_prompts=batch_size_prompts,
            seqpos_slice=place.seqpos_slice,
            excluded=place.excluded_tensor(),
        )


def _check_attachable(name: str, sae: SAE[Any], model: Any) -> None:
    hook, head = str(sae.cfg.metadata.hook_name), sae.cfg.metadata.hook_head_index
    resolve = getattr(model, "_resolve_hook_name", str)  # of a bridge, whose `hook_dict` has no aliases
    # Where an SAE is attached already, the model knows the hook by that.
    if hook not in model.acts_to_saes and resolve(hook) not in model.hook_dict:
        raise ValueError(f"The model has no hook {hook!r}, where the SAE {name!r} sits.")
    if head is not None:
        raise ValueError(
            f"The SAE {name!r} is of head {head} alone, and SAELens would apply it to all heads of the model. Use evaluate, "
            "which applies it to its head, or hooks of your own."
        )
    if hook.endswith(HOOKS_WITH_HEADS) and _passes_heads(model) and sae.cfg.d_in != model.cfg.d_head:
        raise ValueError(
            f"The SAE {name!r} reads all heads of {hook!r}, which SAELens flattens for no hook but hook_z. Use evaluate, or "
            "hooks of your own."
        )


def _passes_heads(model: Any) -> bool:
    """Return True for a `HookedSAETransformer`; a bridge passes SAEs flattened heads."""
    return isinstance(model, HookedTransformer)


def _must_reshape(sae: SAE[Any], model: Any) -> bool:
    """Return True for an SAE of flattened heads that was saved without saying so, or is in training form."""
    is_shared_by_heads = sae.cfg.d_in == getattr(model.cfg, "d_head", None)
    return _passes_heads(model) and reads_all_heads(sae) and not (sae.hook_z_reshaping_mode or is_shared_by_heads)


def _left_out(name: str, sae: SAE[Any], model: Any) -> dict[str, Any]:
    """What `add_sae` is told of tokens that the SAE leaves out; a warning about what it cannot be told."""
    metadata, said = sae.cfg.metadata, {}
    special = metadata.exclude_special_tokens
    if special and "exclude_special_tokens" in inspect.signature(model.add_sae).parameters:
        said["exclude_special_tokens"] = special
    elif special:
        logger.warning(
            "%s was trained without special tokens, but a %s applies it to them.", name, type(model).__name__
        )
    if tuple(metadata.seqpos_slice or (None,)) not in ((None,), (None, None), (0, None)):
        logger.warning("%s was trained on the positions %s, but is applied to all.", name, tuple(metadata.seqpos_slice))
    return said


def parts_of(
    saes: Mapping[str, SAE[Any]], model: Any, **tokens_measured: Any
) -> tuple[JointSplice, dict[str, FrozenSAE], Place]:
    """Finished SAEs as the parts of a joint pass, and what they have in common: positions and tokens left out.

    Raises:
        ValueError: as `SAESet.evaluate`.
    """
    if not saes:
        raise ValueError("There is no SAE in the set.")
    places = places_of(saes, model, **tokens_measured)
    first_name, first = next(iter(places.items()))
    spliced: dict[str, JointPlace] = {}
    frozen: dict[str, FrozenSAE] = {}
    for name, place in places.items():
        if (place.seqpos_slice, place.excluded) != (first.seqpos_slice, first.excluded):
            raise ValueError(
                f"The SAEs {first_name!r} and {name!r} leave out different tokens (seqpos_slice {first.seqpos_slice} and "
                f"{place.seqpos_slice}, excluded {first.excluded} and {place.excluded}), so they cannot be in one pass. "
                "Give exclude_special_tokens and seqpos_slice for all of them (--exclude-special-tokens, --seqpos-slice)."
            )
        one = splice_into(model, place.hook_name, needs_downstream=False)
        check_width(one, saes[name], f"The SAE {name!r}", place.head_index)
        spliced[name] = JointPlace(one, place.head_index)
        frozen[name] = FrozenSAE(saes[name], activation_shape(one, place.head_index))
    return JointSplice(spliced), frozen, first


def activation_shape(model: Any, head_index: int | None) -> tuple[int, ...]:
    """Trailing shape of what an SAE reads at a place, after its `check`."""
    shape = tuple(model.check().shape[2:])
    return shape if head_index is None else shape[1:]


# On disk.


def write_manifest(
    folder: Path, names: Sequence[str], hook_names: Mapping[str, str], training: Mapping[str, Any]
) -> None:
    """Name the SAEs in `folder/<name>`, in the model's order.

    Raises:
        OSError: it cannot be written.
    """
    saes = [{"name": name, "hook_name": hook_names[name], "folder": name} for name in names]
    manifest = {"format": FORMAT, "saes": saes, "training": dict(training)}
    write_whole(folder / MANIFEST_FILENAME, json.dumps(manifest, indent=2) + "\n")


def load_sae_set(
    source: str | Path,
    *,
    names: Sequence[str] | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    token: str | bool | None = None,
) -> SAESet:
    """A set of SAEs from a folder with a `sae_set.json`, or from the Hub repository that such a folder was pushed to.

    Args:
        source: the folder, or `owner/name`.
        names: only these; all by default.
        revision: of the repository; see `load_pretrained`.
        device: where to put them.
        token: of the Hub; default: the one logged in with.

    Raises:
        ValueError: a folder without a manifest or with one that cannot be read, a `revision` or `token` beside a folder, an
            SAE that is not there, or a name that the set does not have.
        HubError: as `load_pretrained`.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None or token is not None:
            raise ValueError(f"revision and token have no meaning for the folder {str(source)!r}: leave them out.")
        there, training = _read_manifest(folder)
        wanted = _wanted(names, list(there), str(source))
        return SAESet({name: load_quietly(folder / there[name], device=str(device)) for name in wanted}, training)
    ids = pretrained_ids(str(source), revision, token)
    if not ids:
        raise ValueError(f"{source} holds no SAE in SAELens's format.")
    some = load_pretrained(str(source), ids[0], revision=revision, device=device, token=token)
    of_set = getattr(some.cfg.metadata, "sae_set", None)
    if not of_set:
        raise ValueError(
            f"The SAEs of {source} do not say that they belong together: {ids[0]!r} has no sae_set in its metadata. Load "
            "them one by one with load_pretrained, and make a set: SAESet({name: sae, ...})."
        )
    wanted = _wanted(names, list(of_set["names"]), str(source))
    loaded = {name: some if name == ids[0] else None for name in wanted}
    for name in wanted:
        if loaded[name] is None:
            loaded[name] = load_pretrained(str(source), name, revision=revision, device=device, token=token)
    return SAESet({name: sae for name, sae in loaded.items() if sae is not None}, dict(of_set.get("training") or {}))


def _read_manifest(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """By name the folder, and how they were trained."""
    path = folder / MANIFEST_FILENAME
    if not path.is_file():
        raise ValueError(
            f"The folder {str(folder)!r} has no {MANIFEST_FILENAME}, which a run of several SAEs writes when it is "
            "finished. Give that run's output_path; load_sae loads a single SAE."
        )
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] > FORMAT:
            raise ValueError(f"it has format {manifest['format']}, and this version reads up to {FORMAT}")
        return {entry["name"]: _inside(entry["folder"]) for entry in manifest["saes"]}, dict(
            manifest.get("training") or {}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}.") from error


def _inside(folder: str) -> str:
    """A manifest from elsewhere names folders beside itself alone."""
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ValueError(f"the folder {folder!r} leads out of it")
    return folder


def _wanted(names: Sequence[str] | None, there: list[str], where: str) -> list[str]:
    if names is None:
        return there
    if isinstance(names, str) or not names or not set(names) <= set(there):
        raise ValueError(f"names={names!r}: the set of {where} has {there}. Give a list of some of them.")
    return [name for name in there if name in names]
