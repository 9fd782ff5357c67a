"""A run of SAEs that are spliced together: a sweep whose SAEs make their steps at once."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainStepOutput
from tqdm.auto import tqdm

from e2e_sae_plugin.build import check_model_and_sae
from e2e_sae_plugin.checkpoint.folder import write_whole
from e2e_sae_plugin.checkpoint.identity import fingerprint
from e2e_sae_plugin.evaluation.place import Place, check_width, place_of
from e2e_sae_plugin.finetune.start import load_quietly
from e2e_sae_plugin.hub.foreign import sae_folders
from e2e_sae_plugin.joint.config import MultiE2ESAERunnerConfig
from e2e_sae_plugin.joint.evaluate import JointEvaluation, measure_joint
from e2e_sae_plugin.joint.member import JointMemberRunner
from e2e_sae_plugin.joint.sae_set import activation_shape, write_manifest
from e2e_sae_plugin.joint.splice import JointPlace, JointSplice
from e2e_sae_plugin.joint.spliced_sae import FrozenSAE
from e2e_sae_plugin.joint.step import JointStep
from e2e_sae_plugin.kernels.saved_threshold import as_saved
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.splice import splice_into
from e2e_sae_plugin.sweep.config import SweepMember
from e2e_sae_plugin.sweep.member import MemberRunner
from e2e_sae_plugin.sweep.runner import SweepRunner
from e2e_sae_plugin.sweep.stream import SharedBatches
from e2e_sae_plugin.trainer import E2ESAETrainer, Stopped

logger = logging.getLogger(__name__)

TABLE_FILENAME = "joint.csv"


class JointRun(SweepRunner):
    """Trains the SAEs of `cfg.saes` in one pass with each other and with `cfg.frozen`.

    Args:
        cfg: of mode "joint".
        override_model: as in `E2ESAETrainingRunner`.
        override_dataset: as in `E2ESAETrainingRunner`.
        on_begin: called once all is built and checked, before the first step.
        stage: its number in a greedy run, from 1; 0 for a run of its own.
    """

    cfg: MultiE2ESAERunnerConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    member_class = JointMemberRunner
    called = "joint run"

    def __init__(
        self,
        cfg: MultiE2ESAERunnerConfig,
        override_model: Any = None,
        override_dataset: Any = None,
        on_begin: Callable[[], None] | None = None,
        stage: int = 0,
    ):
        super().__init__(cfg, override_model, override_dataset)
        self.on_begin, self.stage = on_begin, stage
        self.frozen_saes = {name: load_frozen(name, source) for name, source in cfg.frozen.items()}
        self.model: Any = None
        """The language model, once it is loaded."""
        self.dataset: Any = None
        self.joint_step: JointStep | None = None
        self.evaluation: JointEvaluation | None = None
        """The last one."""
        self._runners: dict[str, JointMemberRunner] = {}
        self._log: MetricsLog | None = None

    # What a sweep does for each SAE by itself.

    def _waiting(self) -> dict[str, SweepMember]:
        """All of them, unless all are finished: a run that was stopped while it saved saves them anew."""
        finished = [name for name, member in self.members.items() if self._is_finished(member)]
        if len(finished) == len(self.members):
            return {}
        for name, member in self.members.items():
            if name not in finished:
                self._refuse_another_run(name, member)
        self.statuses = dict.fromkeys(self.members, "waiting")
        return dict(self.members)

    def _build(
        self, waiting: dict[str, SweepMember], resumed: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, MemberRunner], SharedBatches]:
        runners, batches = super()._build(waiting, resumed)
        self._runners = {name: runner for name, runner in runners.items() if isinstance(runner, JointMemberRunner)}
        first = next(iter(self._runners.values()))
        self.model, self.dataset = first.model, first.data
        self._splice = self._joint_splice()
        self._log = self._open_log(first, resumed)
        told = {"names": list(self._splice.places), "training": self._training()}
        for runner in self._runners.values():
            runner.set_metadata = {"sae_set": told, "downstream_hooks": list(self._splice.first.downstream_hooks)}
        return runners, batches

    def _open_log(self, some: JointMemberRunner, resumed: Mapping[str, dict[str, Any]]) -> MetricsLog:
        """The log of all SAEs together: after what earlier stages wrote, and this one before its checkpoint."""
        samples = max((int(entry["checkpoint"]) for entry in resumed.values()), default=0)
        step = samples // (some.cfg.step_size_prompts * some.cfg.training_context_size)
        log = MetricsLog(Path(self.cfg.output_path), to_wandb=False, resume=step > 0 or self.stage > 0)
        log.keep_lines(lambda line: line.get("stage", 0) < self.stage or line["step"] < step)
        return log

    def _write_log(self, metrics: dict[str, Any], step: int, n_training_samples: int) -> None:
        assert self._log is not None
        stage = {"stage": self.stage} if self.stage else {}
        self._log.log({**metrics, **stage}, step, n_training_samples)

    def _joint_splice(self) -> JointSplice:
        places = {
            name: JointPlace(runner.spliced_model, runner.cfg.hook_head_index) for name, runner in self._runners.items()
        }
        self.frozen: dict[str, FrozenSAE] = {}
        some = next(iter(self._runners.values()))
        excluded = some.activations_store.exclude_special_tokens
        ours = (tuple(some.cfg.seqpos_slice), () if excluded is None else tuple(sorted(excluded.tolist())))
        for name, sae in self.frozen_saes.items():
            has_record = sae.cfg.metadata.exclude_special_tokens is not None
            special = None if has_record else some.cfg.exclude_special_tokens
            place = place_of(sae, some.model, exclude_special_tokens=special)
            _check_same_tokens(name, place, ours)
            spliced = splice_into(some.model, place.hook_name, needs_downstream=False)
            check_width(spliced, sae, f"frozen.{name}", place.head_index)
            places[name] = JointPlace(spliced, place.head_index)
            self.frozen[name] = FrozenSAE(sae.requires_grad_(False).eval(), activation_shape(spliced, place.head_index))
        splice = JointSplice(places)
        if self.cfg.objective.beta > 0:  # measured from the first SAE in the pass on
            first = next(iter(splice.places))
            model = splice_into(
                some.model,
                splice.first.position.hook_name,
                downstream_hooks=self.cfg.objective.downstream_hooks,
            )
            if first in self._runners:
                check_model_and_sae(model, self._runners[first].sae, self._runners[first].cfg)
            else:
                check_width(model, self.frozen_saes[first], f"frozen.{first}", splice.places[first].head_index)
            splice.places[first] = JointPlace(model, splice.places[first].head_index)
        return splice

    def _training(self) -> dict[str, Any]:
        """How the set was trained, for its metadata."""
        return {
            "mode": "joint" if len(self.members) > 1 else "one among frozen",
            "objective": self.cfg.objective.to_dict(),
            "agreement": self.cfg.agreement,
            "frozen": {name: fingerprint(sae) for name, sae in self.frozen_saes.items()},
        }

    # The steps.

    def _attempt(self, batches: SharedBatches, training: dict[str, MemberRunner], name: str, what: str) -> None:
        """Where one fails all do: none of them is what it is without the others."""
        trainer = training[name].trainer
        assert trainer is not None
        try:
            getattr(trainer, what)()
        except Stopped:  # during the estimates before the first step
            return
        if name == list(training)[-1]:
            self._begin(batches, training)

    def _begin(self, batches: SharedBatches, training: dict[str, MemberRunner]) -> None:
        trainers = {key: runner.trainer for key, runner in training.items() if runner.trainer is not None}
        self.joint_step = JointStep(self._splice, trainers, self.frozen, self.cfg.objective, self.cfg.agreement)
        if self.cfg.agreement > 0 and not self.joint_step.readers and not self.stage:
            raise ValueError(
                f"agreement={self.cfg.agreement!r} has no effect: no SAE reads what a trained one writes, as the trained "
                "ones are last in the model. Set it to 0."
            )
        if self.on_begin is not None:
            self.on_begin()
        if self._is_done(training):  # stopped after its last step, while it saved
            self._finish(batches, training)

    def _advance(self, batches: SharedBatches, training: dict[str, MemberRunner], place: int) -> None:
        assert self.joint_step is not None
        trainers = self.joint_step.trainers
        local = {name: each for name, each in training.items() if not trainers[name].objective.needs_spliced_pass}
        if local:
            self._advance_locally(local)
            return
        leader = next(iter(trainers.values()))
        logs, evaluates = leader._is_logging_step(), leader._is_evaluation_step()
        for name, trainer in trainers.items():
            trainer._log(trainer.maybe_reset_sparsity())
            reader = training[name].reader
            assert reader is not None
            reader.place = place + 1
        try:
            outputs = self.joint_step(batches.batch(place))
        except BaseException:
            for runner in training.values():  # the step was taken back: its batch comes again
                assert runner.reader is not None
                runner.reader.place = place
            raise
        self._count_and_log(trainers, outputs, logs)
        if self._is_done(training):
            for name, trainer in trainers.items():
                trainer.settle_threshold(outputs[name].sae_in)
        if evaluates:
            self._evaluate(leader.n_training_steps - 1)
        if self._is_done(training):
            self._finish(batches, training)

    def _advance_locally(self, local: Mapping[str, MemberRunner]) -> None:
        """A step of each SAE that is still in the local part of its run (`local_first`), alone on the clean model."""
        place = min(runner.place for runner in local.values())
        for runner in local.values():
            trainer, reader = runner.trainer, runner.reader
            assert trainer is not None
            assert reader is not None
            if runner.place != place:
                continue
            try:
                trainer.advance()
            except BaseException:
                reader.place = place if trainer._batch_is_pending else reader.place  # its step was taken back
                raise

    def _count_and_log(
        self, trainers: Mapping[str, E2ESAETrainer], outputs: Mapping[str, TrainStepOutput], logs: bool
    ) -> None:
        for trainer in trainers.values():
            trainer.n_training_steps += 1
        if not logs:
            return
        for name, trainer in trainers.items():
            trainer._log(trainer._step_metrics(outputs[name]), trainer.n_training_steps - 1)
        assert self.joint_step is not None
        assert self.joint_step.loss is not None
        leader = next(iter(trainers.values()))
        terms = {f"losses/{name}": float(value) for name, value in self.joint_step.terms.items()}
        l0 = {f"{name}/metrics/l0": float(trainer.l0) for name, trainer in trainers.items()}
        metrics = {"losses/overall_loss": float(self.joint_step.loss), **terms, **l0}
        self._write_log(metrics, leader.n_training_steps - 1, leader.n_training_samples)

    @torch.no_grad()
    def _evaluate(self, step: int) -> JointEvaluation | None:
        """The held-out evaluation of all SAEs in the pass, logged."""
        first = next(iter(self._runners.values()))
        if first.evaluation_tokens is None:
            return None
        assert self.joint_step is not None
        saes = dict(self.frozen)
        for name, trainer in self.joint_step.trainers.items():
            trainer.sae.eval()
            place = self._splice.places[name]
            shape = activation_shape(place.model, place.head_index)
            saes[name] = FrozenSAE(trainer.sae, shape, trainer.activation_scaler)
        with first.trainer.model_autocast() if first.trainer is not None else torch.no_grad():
            self.evaluation = measure_joint(
                self._splice,
                saes,
                first.evaluation_tokens,
                batch_size_prompts=first.cfg.eval_batch_size_prompts or first.cfg.store_batch_size_prompts,
                seqpos_slice=first.cfg.seqpos_slice,
                excluded=first.activations_store.exclude_special_tokens,
            )
        for trainer in self.joint_step.trainers.values():
            trainer.sae.train()
        leader = next(iter(self.joint_step.trainers.values()))
        self._write_log(self.evaluation.to_log(), step, leader.n_training_samples)
        return self.evaluation

    def _is_done(self, training: Mapping[str, MemberRunner]) -> bool:
        return all(runner.trainer is not None and runner.trainer.is_done for runner in training.values())

    def _finish(self, batches: SharedBatches, training: dict[str, MemberRunner]) -> None:
        """Measure all in the pass, then save each."""
        leader = next(runner.trainer for runner in training.values() if runner.trainer is not None)
        with contextlib.ExitStack() as saved_forms:
            for runner in self._runners.values():
                saved_forms.enter_context(as_saved(runner.sae))
            evaluation = self._evaluate(leader.n_training_steps)
        # Saving takes a while for several SAEs: stopped meanwhile, the run goes on from here.
        self.round_number += 1
        self._save(batches, training)
        for name, runner in list(training.items()):
            assert runner.trainer is not None
            assert runner.reader is not None
            runner.finish(runner.trainer)
            self.statuses[name] = runner.status
            batches.leave(runner.reader)
            del training[name]
        self._keep_frozen()
        hooks = {name: place.model.position.hook_name for name, place in self._splice.places.items()}
        output = Path(self.cfg.output_path)
        if evaluation is not None:
            write_whole(output / TABLE_FILENAME, evaluation.table().to_csv())
        write_manifest(output, list(hooks), hooks, self._training())
        if evaluation is not None and self.cfg.verbose:
            tqdm.write(f"\n{evaluation.table().to_markdown()}\n{evaluation.table().caption}")
        if self.cfg.verbose and not self.stage:
            tqdm.write(f"Saved in {output} (load_sae_set reads it, and each SAE's folder sae_lens.SAE.load_from_disk).")

    def _keep_frozen(self) -> None:
        """The set is whole in its folder: SAEs that came from elsewhere are copied into it."""
        for name, source in self.cfg.frozen.items():
            target = Path(self.cfg.output_path) / name
            if Path(source).is_dir() and Path(source).resolve() == target.resolve():
                continue
            if (Path(source) / SAE_WEIGHTS_FILENAME).is_file():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                self.frozen_saes[name].save_model(str(target))

    def _write_summary(self) -> None:
        """The table of the set is written when it is finished."""


def load_frozen(name: str, source: str) -> SAE[Any]:
    """An SAE of `frozen`: a folder, or `owner/name:id`.

    Raises:
        ValueError: names the SAE and what is wrong with it.
    """
    folders = sae_folders(Path(source))
    inside = [path.name for path in folders]
    if folders and folders != [Path(source)]:
        raise ValueError(
            f"frozen.{name}: {source!r} holds several SAEs, {', '.join(inside)}. Name the folder of one of them."
        )
    repository, sign, sae_id = source.partition(":")
    try:
        return load_quietly(source) if Path(source).is_dir() or not sign else load_quietly(repository, sae_id)
    except ValueError as error:
        raise ValueError(f"frozen.{name}: {error}") from error


def _check_same_tokens(name: str, place: Place, ours: tuple[Any, Any]) -> None:
    theirs = (place.seqpos_slice, place.excluded)
    if theirs != ours:
        raise ValueError(
            f"frozen.{name} leaves out other tokens than this run (seqpos_slice and excluded tokens: {theirs}, here "
            f"{ours}), so they cannot be in one pass. Set seqpos_slice and exclude_special_tokens as it has them."
        )
