"""`SweepRunner`: trains the SAEs of a sweep side by side."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import SAE
from tqdm.auto import tqdm

from e2e_sae_plugin.checkpoint.checkpointer import WRITE_ERRORS
from e2e_sae_plugin.checkpoint.identity import run_identity
from e2e_sae_plugin.checkpoint.lock import locked
from e2e_sae_plugin.finetune.start import load_quietly
from e2e_sae_plugin.interruption import StopRequest, run_interrupted, stop_on_signals
from e2e_sae_plugin.output_folder import holds_another_run, is_finished, output_is_finished
from e2e_sae_plugin.rank_checks import check_alone
from e2e_sae_plugin.seekable_store import RowPosition
from e2e_sae_plugin.splice.shared import SharedCleanPasses
from e2e_sae_plugin.sweep.checkpoints import SweepCheckpoints
from e2e_sae_plugin.sweep.config import SideBySide, SweepMember
from e2e_sae_plugin.sweep.member import FAILURE_FILENAME, MemberRunner
from e2e_sae_plugin.sweep.stream import SharedBatches
from e2e_sae_plugin.sweep.summary import write_summary
from e2e_sae_plugin.torch_state import own_torch_state
from e2e_sae_plugin.trainer import E2ESAETrainer, Stopped

logger = logging.getLogger(__name__)


class SweepFailed(RuntimeError):
    """Every SAE of a sweep has failed."""


class SweepRunner:
    """Trains the SAEs of a sweep in step with each other: one batch, one clean pass, and each SAE its own spliced pass.

    What is finished stays finished, and a sweep that was interrupted goes on where it stood when the same sweep is run
    again. An SAE that fails (numbers that are not finite) is left out from there on; `failed.json` in its folder says
    why. Run again, it is tried once more.

    Args:
        cfg: the sweep.
        override_model: as in `E2ESAETrainingRunner`.
        override_dataset: as in `E2ESAETrainingRunner`.
        part: `(i, n)`: train only every n-th SAE, from the i-th (from 1) on. Processes with the same sweep and different
            parts share its folder: one per GPU, or one per core where the model is small.

    Raises:
        ValueError: `part` is out of range, or another run lies where an SAE would go.
    """

    member_class: type[MemberRunner] = MemberRunner
    called = "sweep"
    """What messages call it."""

    @own_torch_state()
    def __init__(
        self,
        cfg: SideBySide,
        override_model: Any = None,
        override_dataset: Any = None,
        part: tuple[int, int] = (1, 1),
    ):
        check_alone("A sweep", "Start it once; each GPU can train a part of it: e2e-sae sweep --part I/N.")
        index, n = part
        if not 1 <= index <= n:
            raise ValueError(f"part={part!r} must be (i, n) with 1 <= i <= n.")
        for name, folder in (("output_path", cfg.output_path), ("checkpoint_path", cfg.checkpoint_path)):
            if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
                raise ValueError(f"{name} of the {self.called}, {str(folder)!r}, is a file. Name a folder.")
        self.cfg, self.part = cfg, part
        everyone = cfg.members()
        if n > len(everyone):
            raise ValueError(f"part={part!r}: the sweep has only {len(everyone)} SAEs.")
        self.members: dict[str, SweepMember] = dict(list(everyone.items())[index - 1 :: n])
        self.statuses: dict[str, str] = dict.fromkeys(self.members, "waiting")
        self._model, self._dataset = override_model, override_dataset
        self.round_number = 0
        path = cfg.checkpoint_path
        self.checkpoints = None if path is None else SweepCheckpoints(Path(path), "" if n == 1 else f"-{index}-of-{n}")

    @own_torch_state()
    def run(self) -> dict[str, SAE[Any] | None]:
        """Train what is not finished; returns the SAEs by name, on the CPU, None for one that failed.

        Raises:
            ValueError: the first SAE's config does not fit model or data, or the data has changed since the checkpoint.
            SweepFailed: all of them failed.
            RunInterrupted: a signal came; the sweep was saved first.
        """
        waiting = self._waiting()
        if waiting:
            folders = [Path(str(member.config.output_path)) for member in waiting.values()]
            if self.checkpoints is not None:
                folders.append(self.checkpoints.own.path)
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            with locked(*folders), stop_on_signals() as stop_request:
                self._train(waiting, stop_request)
            if stop_request.signal_number is not None:  # it came when the last step was done
                self._write_summary()
                logger.warning("The %s had ended when the signal came; there is nothing to resume.", self.called)
                raise run_interrupted(stop_request.signal_number, None)
        self._write_summary()
        if all(status == "failed" for status in self.statuses.values()):
            raise SweepFailed(
                f"All {len(self.members)} SAEs of the {self.called} failed: {self._failure(next(iter(self.members)))}"
            )
        return {
            name: load_quietly(str(member.config.output_path), device="cpu")  # all of them may be too many for a GPU
            if self.statuses[name] == "finished"
            else None
            for name, member in self.members.items()
        }

    # Which of them are to be trained.

    def _waiting(self) -> dict[str, SweepMember]:
        """Those that are not finished, none of whose folders holds another run."""
        waiting = {name: member for name, member in self.members.items() if not self._is_finished(member)}
        for name, member in waiting.items():
            self._refuse_another_run(name, member)
        return waiting

    def _is_finished(self, member: SweepMember) -> bool:
        cfg = member.config
        identity = run_identity(self._model, None)
        if not cfg.overwrite_output and output_is_finished(cfg, identity):
            self.statuses[member.name] = "finished"
            return True
        return False

    def _refuse_another_run(self, name: str, member: SweepMember) -> None:
        folder = Path(str(member.config.output_path))
        if member.config.overwrite_output or not folder.is_dir():
            return
        other = holds_another_run(member.config, folder)
        if other is None and is_finished(folder):
            other = "an SAE that was trained with other weights of the language model."
        if other is not None:
            raise ValueError(
                f"The folder {str(folder)!r} of {name} holds {other}\nUse another output_path, or set "
                "base.overwrite_output to replace what is there."
            )

    def _train(self, waiting: dict[str, SweepMember], stop_request: StopRequest) -> None:
        checkpoint, resumed = self._find_checkpoint(waiting)
        runners, batches = self._build(waiting, resumed)
        if checkpoint is not None and self.checkpoints is not None:
            self.round_number = self.checkpoints.round_number(checkpoint)
            beginning = batches.state()
            self.checkpoints.resume_stream(checkpoint, batches)  # which refuses other data
            anew = ""
            if len(resumed) < len(runners):  # those ahead of the ones that start anew wait for them
                batches.resume(*beginning)
                anew = f" for {len(resumed)} SAEs; the others start at the beginning"
            self._say(f"Going on from {checkpoint}{anew}.")
        for name, runner in runners.items():
            folder = None if self.checkpoints is None else self.checkpoints.of(name)
            runner.start(batches.reader(resumed[name]["place"] if name in resumed else 0), folder, stop_request)
        shared = SharedCleanPasses(
            [runner.spliced_model for runner in runners.values()],
            hidden=any(runner.cfg.objective.kl > 0 for runner in runners.values()),
        )
        training = dict(runners)
        for name in list(training):
            self._attempt(batches, training, name, "begin")
        if stop_request.signal_number is not None and training:
            # Nothing is trained that is not in the checkpoint, and estimates may be half made.
            logger.warning("The %s was stopped before its first step.", self.called)
            raise run_interrupted(stop_request.signal_number, checkpoint)
        self._in_rounds(runners, training, batches, shared, stop_request)

    def _find_checkpoint(self, waiting: dict[str, SweepMember]) -> tuple[Path | None, dict[str, dict[str, Any]]]:
        """The checkpoint to go on from, and what it holds of those that wait. One that failed before an interruption is
        not tried again while others go on: it would hold them up and fail once more."""
        if self.checkpoints is None or self._starts_anew:
            return None, {}
        checkpoint = self.checkpoints.newest(waiting)
        members = {} if checkpoint is None else self.checkpoints.members(checkpoint)
        resumed = {name: entry for name, entry in members.items() if name in waiting}
        if resumed:
            for name in [name for name in waiting if name not in resumed and self._failure(name)]:
                self.statuses[name] = "failed"
                del waiting[name]
        anew = [name for name in waiting if name not in resumed and not self._failure(name)]
        other = self.checkpoints.of_another_part(anew)
        if other is not None:
            logger.warning(
                "%s was written by another part of the sweep, which had SAEs that start anew here. To go on with them, run "
                "the sweep with the same SAEs and the same division into parts.",
                other,
            )
        return (checkpoint if resumed else None), resumed

    @property
    def _starts_anew(self) -> bool:
        return any(member.config.overwrite_output for member in self.members.values())

    def _build(
        self, waiting: dict[str, SweepMember], resumed: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, MemberRunner], SharedBatches]:
        """The first one loads model and data; the others take them from it, and the stream is the first one's."""
        runners: dict[str, MemberRunner] = {}
        first: MemberRunner | None = None
        position = RowPosition()
        for name, member in waiting.items():
            checkpoint = None
            if self.checkpoints is not None and name in resumed:
                checkpoint = self.checkpoints.of(name).path / resumed[name]["checkpoint"]
            try:
                if first is None:
                    runners[name] = first = self.member_class(member, self._model, self._dataset, None, checkpoint)
                    self._model, position = first.model, first.tokens.store.position()
                else:
                    runners[name] = self.member_class(
                        member, first.model, first.data, first.evaluation_tokens, checkpoint
                    )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        assert first is not None
        if position.rows_state is not None:
            # `datasets` keeps a stream's state once for all who read it, and the others have looked at the first row.
            first.tokens.store.seek(position)
        return runners, SharedBatches(first.tokens, first.spliced_model.token_device)

    # The rounds.

    def _in_rounds(
        self,
        runners: dict[str, MemberRunner],
        training: dict[str, MemberRunner],
        batches: SharedBatches,
        shared: SharedCleanPasses,
        stop_request: StopRequest,
    ) -> None:
        last_saved = time.monotonic()
        every = self.cfg.checkpoint_every_minutes
        total = sum(member.config.training_tokens for member in self.members.values())
        hidden: dict[str, Any] = {} if self.cfg.verbose else {"disable": True}  # or TQDM_DISABLE would not be heard
        bar = tqdm(
            total=total,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            desc=self.called.capitalize(),
            **hidden,
        )
        with bar, self._saved_if_it_fails(batches, training):
            while training:
                place = min(runner.place for runner in training.values())
                batch = batches.batch(place)
                with shared.over(batch):
                    self._advance(batches, training, place)
                batches.forget_what_all_have_read()
                self.round_number += 1
                self._show(bar, runners, training)
                if stop_request and training:
                    self._stop(batches, training, stop_request)
                if every is not None and time.monotonic() - last_saved >= 60 * every:
                    self._save(batches, training)
                    last_saved = time.monotonic()

    def _advance(self, batches: SharedBatches, training: dict[str, MemberRunner], place: int) -> None:
        """A step of each SAE that is at this place of the stream."""
        for name in [name for name, runner in training.items() if runner.place == place]:
            self._attempt(batches, training, name, "advance")

    def _attempt(self, batches: SharedBatches, training: dict[str, MemberRunner], name: str, what: str) -> None:
        """Begin or advance one SAE, and finish it where that was its last step."""
        runner = training[name]

        def act(trainer: E2ESAETrainer) -> None:
            getattr(trainer, what)()
            if trainer.is_done:
                runner.finish(trainer)

        try:
            error = runner.attempt(act)
        except Stopped:  # during the estimates before the first step
            return
        if error is not None:
            logger.warning("%s has failed and is left out from here on: %s", name, error)
        if runner.status != "training":
            self.statuses[name] = runner.status
            assert runner.reader is not None
            batches.leave(runner.reader)
            del training[name]
            self._write_summary()

    def _show(self, bar: Any, runners: dict[str, MemberRunner], training: dict[str, MemberRunner]) -> None:
        done = sum(
            runner.cfg.training_tokens if runner.trainer is None else runner.trainer.n_training_samples
            for runner in runners.values()
        )
        done += sum(m.config.training_tokens for n, m in self.members.items() if n not in runners)
        bar.set_postfix({"training": len(training), "of": len(self.members)}, refresh=False)
        bar.update(done - bar.n)

    # Checkpoints.

    def _save(self, batches: SharedBatches, training: dict[str, MemberRunner]) -> Path | None:
        if self.checkpoints is None or not training:
            return None
        try:
            return self.checkpoints.write(batches, training, self.round_number)
        except WRITE_ERRORS as error:
            logger.error("The %s's checkpoint could not be written (%s); training goes on.", self.called, error)
            return None

    @contextmanager
    def _saved_if_it_fails(self, batches: SharedBatches, training: dict[str, MemberRunner]) -> Iterator[None]:
        """What is no failure of one SAE (no room for saving it, the data): the sweep stops, and can go on from there."""
        try:
            yield
        except Exception as error:
            checkpoint = self._save(batches, training)
            if checkpoint is not None:
                logger.warning(
                    "%s. Saved %s: run the %s again to go on.", type(error).__name__, checkpoint, self.called
                )
            raise

    def _stop(self, batches: SharedBatches, training: dict[str, MemberRunner], request: StopRequest) -> None:
        checkpoint = self._save(batches, training)
        again = f"Run the {self.called} again to go on"
        how = "Nothing could be saved" if checkpoint is None else f"Saved {checkpoint}. {again}"
        logger.warning("The %s was stopped with %d SAEs to train. %s.", self.called, len(training), how)
        assert request.signal_number is not None
        raise run_interrupted(request.signal_number, checkpoint)

    # What is left behind.

    def _write_summary(self) -> None:
        """What is known of all SAEs so far, beside their folders."""
        write_summary(self.cfg)

    def _failure(self, name: str) -> str:
        path = Path(str(self.members[name].config.output_path)) / FAILURE_FILENAME
        return json.loads(path.read_text())["error"] if path.exists() else ""

    def _say(self, text: str) -> None:
        if self.cfg.verbose:
            tqdm.write(text)
        else:
            logger.info("%s", text)
