"""The flags of a run: SAELens's config, its SAEs and the objective, by simple-parsing, as in SAELens's own runner."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import make_dataclass
from functools import partial
from typing import Any

import simple_parsing
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from simple_parsing import subgroups
from simple_parsing.help_formatter import SimpleHelpFormatter

from e2e_sae_plugin.command_line.parser import CommandParser
from e2e_sae_plugin.command_line.run_flags import add_estimate_flags, add_file_flags
from e2e_sae_plugin.config import MODEL_CLASSES, E2ESAERunnerConfig
from e2e_sae_plugin.config_fields import FIELDS_REFUSED, FIELDS_WITHOUT_EFFECT
from e2e_sae_plugin.objective import Objective

DESCRIPTION = """\
Train an SAE end to end. All settings come from --config FILE, or from flags; --resume goes on from a checkpoint, with
either. A file with `saes` trains several SAEs in one run.

Where to begin: the flags below under "begin with these"; the others have defaults that work. --architecture decides which
flags of the SAE there are: see `e2e-sae train --architecture topk --help`. Without flags of the objective, most of the run
trains on reconstruction, and the rest on KL and squared error in equal parts; with any of them the objective is what they
say. Weights & Biases is on unless --log_to_wandb false is given, as in SAELens. `e2e-sae estimate` takes the same flags and
says what the run will cost."""

EXAMPLES = """\
examples:
  e2e-sae train --config run.yaml
  e2e-sae train --config run.yaml --resume auto
  e2e-sae train --model_name e2e-sae-demo --dataset_path e2e-sae-demo --hook_name blocks.3.hook_resid_pre \\
      --architecture topk --d_in 128 --d_sae 1024 --k 32 --normalize_activations expected_average_only_in \\
      --n_batches_for_norm_estimate 10 --training_tokens 200_000 --train_batch_size_tokens 512 \\
      --store_batch_size_prompts 4 --lr 0.005 --output_path first_sae --log_to_wandb false
      an SAE of the bundled model: no network, a few minutes

A file has the same names, with the SAE's below `sae` and the objective's below `objective`; e2e_runner_cfg.json in a run's
output folder is one."""

# What a first run sets, in this order.
FIRST = (
    "--config", "--resume", "--model_name", "--hook_name", "--dataset_path", "--context_size", "--architecture", "--d_in",
    "--d_sae", "--k", "--l1_coefficient", "--l0_coefficient", "--normalize_activations", "--kl", "--beta", "--mse",
    "--training_tokens", "--train_batch_size_tokens", "--store_batch_size_prompts", "--lr", "--device", "--output_path",
    "--log_to_wandb",
)  # fmt: skip
TITLES = {"E2ESAERunnerConfig": "the run", "LoggingConfig": "logging", "Objective": "the objective"}

FIELD_HELP = {
    "hook_name": "A TransformerLens hook, or a module path such as model.layers.9 for AutoModelForCausalLM.",
    "model_class_name": f"One of {', '.join(MODEL_CLASSES)}.",
    "model_name": "A model of TransformerLens or Hugging Face, or e2e-sae-demo, the bundled one.",
    "dataset_path": "Text or tokens: a dataset of the Hugging Face Hub, a file (.txt, .jsonl, .csv, .parquet, .arrow; .bin "
    "of uint16 tokens), a folder of them, or one that save_to_disk wrote; or e2e-sae-demo, the bundled text.",
    "store_batch_size_prompts": "The most sequences in the model at once: the micro-batch, which changes memory alone.",
    "seqpos_slice": "Positions that are trained on: first and last + 1, such as 4 128.",
    "d_in": "Dimensions of the activation at hook_name; the default fits few models.",
    "d_sae": "Features of the SAE.",
    "k": "Active features per token.",
    "l1_coefficient": "Weight of the sparsity term: higher is sparser.",
    "l0_coefficient": "Weight of the sparsity term: higher is sparser.",
    "l1_warm_up_steps": "Steps over which l1_coefficient grows from 0.",
    "l0_warm_up_steps": "Steps over which l0_coefficient grows from 0.",
    "lp_norm": "The p of the sparsity term.",
    "apply_b_dec_to_input": "Subtract b_dec from the SAE's input.",
    "normalize_activations": "How the SAE's input is scaled before training; folded into its weights at the end.",
    "reshape_activations": "Leave it: the finished SAE of all heads of a hook_z has hook_z.",
    "metadata": "Set by the run itself.",
    "sae_lens_version": "Set by SAELens itself.",
    "sae_lens_training_version": "Set by SAELens itself.",
    "log_to_wandb": "Log to Weights & Biases; metrics.jsonl is written either way.",
    "log_weights_to_wandb": "Upload the SAE's weights there too.",
    "wandb_project": "The project there.",
    "wandb_id": "The run's id there, to go on with.",
    "run_name": "The run's name there.",
    "wandb_entity": "The user or team there.",
    "wandb_log_frequency": "Steps from one line of metrics to the next, there and in metrics.jsonl.",
    "eval_every_n_wandb_logs": "Evaluate on held-out tokens at every so-many-th of these.",
    **{name: f"Refused unless left at its default: {reason}." for name, reason in FIELDS_REFUSED.items()},
    **dict.fromkeys(FIELDS_WITHOUT_EFFECT, "No effect in end-to-end training."),
}


def config_from_flags(flags: Sequence[str], command: str = "train") -> E2ESAERunnerConfig:
    """The config that a run's flags make.

    Args:
        flags: without --config and --resume.
        command: whose flags they are: "estimate" has some more, which are not among them.
    """
    config: E2ESAERunnerConfig = TrainParser(command, flags).parse_args(list(flags)).cfg
    return config


class TrainParser(CommandParser, simple_parsing.ArgumentParser):  # type: ignore[override]
    """Takes the flags' help from docstrings, not from comments near the fields (as SAELens's own parser does), and says
    which of the host's fields are read otherwise here.

    Args:
        command: `train`, or `estimate`, which takes the same.
        flags: What will be parsed. Where none of them is of the objective, that is the config's default.
    """

    def __init__(self, command: str = "train", flags: Sequence[str] = ()):
        super().__init__(
            command,
            description=DESCRIPTION,
            examples=EXAMPLES,
            usage=f"e2e-sae {command} --config FILE [--resume DIR]\n       e2e-sae {command} FLAG VALUE ... [--resume DIR]",
            formatter_class=SimpleHelpFormatter,
        )
        architectures: dict[str, Any] = {
            name: partial(config_class, d_in=512, d_sae=1024)
            for name, (_, config_class) in SAE_TRAINING_CLASS_REGISTRY.items()
        }
        own_fields: list[Any] = [
            ("sae", TrainingSAEConfig, subgroups(architectures, default="standard", alias="--architecture"))
        ]
        options = {f"--{name}" for name in _field_names(Objective)}
        if any(flag.partition("=")[0] in options for flag in flags):
            own_fields.append(("objective", Objective, dataclasses.field(default_factory=Objective)))
        command_line_class = make_dataclass(E2ESAERunnerConfig.__name__, own_fields, bases=(E2ESAERunnerConfig,))
        command_line_class.__doc__ = ""
        self.add_arguments(command_line_class, dest="cfg")
        add_file_flags(self)
        if command == "estimate":
            add_estimate_flags(self)

    def known_options(self, args: Sequence[str]) -> list[str]:
        """With those of the architecture that is chosen among the arguments."""
        self._preprocessing(list(args))
        return super().known_options(args)

    def explain_unknown(self, name: str, known: Iterable[str]) -> str:
        """An option of another architecture is no spelling mistake."""
        field = name.lstrip("-")
        others = sorted(a for a, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items() if field in _field_names(config))
        if others:
            return f"{name} is an option of other architectures. Give --architecture {' or '.join(others)}."
        return super().explain_unknown(name, known)

    def _preprocessing(self, args: Sequence[str] = (), namespace: Any = None) -> None:
        done = self._preprocessing_done
        super()._preprocessing(args, namespace)
        if not done:
            _arrange(self)

    def _resolve_subgroups(self, wrappers: Any, args: Any, namespace: Any = None) -> Any:
        # By a parser of its own, which would speak in another name and suggest nothing.
        chooser = CommandParser(self.prog.partition(" ")[2], add_help=False)
        chooser.add_argument("--architecture", "--sae", choices=list(SAE_TRAINING_CLASS_REGISTRY))
        chooser.parse_known_args(list(args))
        resolved, chosen = super()._resolve_subgroups(wrappers, args, namespace)
        for root in resolved:
            for wrapper in [root, *root.descendants]:
                for field in wrapper.fields:
                    text = field._docstring
                    # A `#` comment is not help; a string below a field is, in our own classes alone.
                    below = text.docstring_below if wrapper.dataclass is Objective else ""
                    override = FIELD_HELP.get(field.name)
                    field._docstring = dataclasses.replace(
                        text,
                        comment_above="",
                        comment_inline="",
                        docstring_below="" if override else below,
                        desc_from_cls_docstring=override or text.desc_from_cls_docstring,
                    )
        return resolved, chosen


def _field_names(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _arrange(parser: argparse.ArgumentParser) -> None:
    """Put what a first run sets before all other options, and give the groups titles for readers."""
    architecture = parser._option_string_actions["--architecture"]
    architecture.metavar = "NAME"
    architecture.help = f"The architecture of the SAE: {', '.join(SAE_TRAINING_CLASS_REGISTRY)}."
    first = parser.add_argument_group("begin with these")
    chosen: list[argparse.Action] = []
    for name in FIRST:
        action = parser._option_string_actions.get(name)
        if action is not None and action not in chosen:
            chosen.append(action)
    for group in parser._action_groups:
        title, _, destination = (group.title or "").partition(" [")
        if destination.startswith("'cfg"):
            group.title = "the SAE" if "cfg.sae" in destination else TITLES.get(title, title)
            if "cfg.objective" not in destination:
                group.description = None  # of a dataclass without a docstring, its signature
        group._group_actions[:] = [action for action in group._group_actions if action not in chosen]
    first._group_actions[:] = chosen
    parser._action_groups.remove(first)
    parser._action_groups.insert(2, first)  # after argparse's own two: positional arguments and -h
