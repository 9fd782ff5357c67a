"""`push_to_hub`: SAEs, their model card and figures, in one commit."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from e2e_sae_plugin.evaluation.result import Evaluation
from e2e_sae_plugin.hub.calls import HubError, hub_call, pause_before_next_try
from e2e_sae_plugin.hub.card.entry import CardEntry
from e2e_sae_plugin.hub.download import Resolved, fetch
from e2e_sae_plugin.hub.gather import Source, gather
from e2e_sae_plugin.hub.plan import CARD_PATH, Change, Plan, Push
from e2e_sae_plugin.hub.repository import LocalFile, RemoteFile, Target
from e2e_sae_plugin.hub.revision import MAIN
from e2e_sae_plugin.hub.sae_folder import SMALL_FILES, entry_of
from e2e_sae_plugin.hub_names import check_license, check_repo_id, check_revision

logger = logging.getLogger(__name__)

ATTEMPTS_AGAINST_OTHERS = 5
"""How often a push starts over because somebody else has committed meanwhile."""


def push_to_hub(
    saes: Source | Mapping[str, Source],
    repo_id: str,
    *,
    sae_id: str | None = None,
    evaluations: Evaluation | Mapping[str, Evaluation] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    license: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Share SAEs on the Hugging Face Hub, in SAELens's format: `sae_lens.SAE.from_pretrained(repo_id, sae_id)` loads them.

    All SAEs, the model card and its figure go up in one commit, or nothing does. Everything is loaded, checked and hashed
    before the Hub is asked anything. What is there already is not uploaded again, so a push that failed can be repeated
    as it was. Other SAEs of the repository stay and are in the card; what a person wrote in its README stays, beside
    a marked section.

    Args:
        saes: an SAE, in memory or a folder; a folder of several, such as a sweep's; or a mapping from ids to these. SAEs
            in training form are shared in inference form.
        repo_id: `owner/name`. It is created where it is missing, and removed again if the push fails.
        sae_id: the id of a single SAE; default: the name of its hook. SAEs of a folder have their folders' names.
        evaluations: of the single SAE, or by id, for the model card. They win over an `evaluation.json` beside an SAE.
            Without either the card has the last held-out evaluation of the SAE's run.
        private: whether a repository that is created is private. Default: as the Hub does it. True is refused for one
            that is public.
        revision: the branch; default "main". It is created from main where it is missing.
        create_pr: open a pull request instead of committing to the branch.
        overwrite: replace SAEs that the repository has under the same ids. Default False: other weights there are
            refused. (History keeps what is replaced.)
        license: of the SAEs, as the Hub spells it ("mit", "apache-2.0"). Default: what the card says already, or nothing.
        commit_message: default: which SAEs.
        commit_description: what else to say.
        token: default: the one that is logged in.
        dry_run: check everything and say what would go up, without asking the Hub anything.

    Raises:
        ValueError: an SAE or a name cannot be shared; all that is wrong is said, and nothing was sent.
        HubError: the Hub refused or failed. The repository is as it was; repeat the push.
    """
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    if license is not None:
        check_license(license)
    if commit_message is not None and not commit_message.strip():
        raise ValueError("commit_message must not be empty; leave it out for the default.")
    with tempfile.TemporaryDirectory(prefix="e2e-sae-push-") as workspace:
        shared = gather(saes, Path(workspace), sae_id=sae_id, evaluations=evaluations)
        message = commit_message or _message([each.sae_id for each in shared])
        plan = Plan(shared, repo_id, revision or MAIN, license)
        if dry_run:
            files, card = plan.files(None, [])
            changes: dict[str, tuple[Change, int | None]] = {file.path: ("planned", file.size) for file in files}
            return Push(repo_id, plan.revision, Target(repo_id, plan.revision, None).url, None, changes, card)
        if token is None and get_token() is None:
            raise HubError("There is no token to push with. Log in with `hf auth login`, set HF_TOKEN, or give token.")
        target = Target(repo_id, plan.revision, token)
        pusher = _Pusher(plan, target, message, commit_description or "", create_pr, overwrite)
        try:
            target.look_or_make(private)
            return pusher.push()
        except BaseException:
            target.take_back()
            raise


def _message(ids: Sequence[str]) -> str:
    return f"Upload SAE {ids[0]}" if len(ids) == 1 else f"Upload {len(ids)} SAEs"


class _Moved(Exception):
    """The branch has another newest commit than the one that was planned for."""


@dataclass
class _Pusher:
    plan: Plan
    target: Target
    message: str
    description: str
    create_pr: bool
    overwrite: bool

    def push(self) -> Push:
        """Plan for the newest commit, and commit; once more if somebody else was faster."""
        for _ in range(ATTEMPTS_AGAINST_OTHERS):
            try:
                return self._push_onto_head()
            except _Moved:
                logger.warning("Somebody else has committed to %s meanwhile; starting over.", self.target.repo_id)
                self.target.look()
        raise HubError(
            f"Others have committed to {self.target.repo_id} {ATTEMPTS_AGAINST_OTHERS} times while this was pushed. Nothing "
            "of it was committed; repeat it."
        )

    def _push_onto_head(self) -> Push:
        target = self.target
        there = target.files
        self.plan.refuse_what_is_in_the_way(there)
        if not self.overwrite:
            self.plan.refuse_replacing(there)
        files, card = self.plan.files(self._readme(there), self._others(there))
        changed = [file for file in files if file.path not in there or not there[file.path].equals(file)]
        outdated = self.plan.outdated(there)
        changes: dict[str, tuple[Change, int | None]] = {
            file.path: ("unchanged" if file not in changed else "changed" if file.path in there else "new", file.size)
            for file in files
        }
        changes |= dict.fromkeys(outdated, ("removed", None))
        commit, url = target.head, target.url
        if changed or outdated:
            commit, url = self._commit(changed, outdated)
        return Push(target.repo_id, target.revision, url, commit, changes, card)

    def _readme(self, there: Mapping[str, RemoteFile]) -> str | None:
        if CARD_PATH not in there:
            return None
        try:
            return self._fetched(CARD_PATH).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"The README.md of {self.target.repo_id} is not UTF-8 ({error}), so nothing can be added to it. Save it as "
                "UTF-8."
            ) from error

    def _others(self, there: Mapping[str, RemoteFile]) -> list[CardEntry]:
        """The SAEs that the repository has besides these."""
        ours = {each.sae_id for each in self.plan.shared}
        found: list[CardEntry] = []
        for path in sorted(there):
            sae_id, _, name = path.rpartition("/")
            if (
                name != SAE_CFG_FILENAME
                or not sae_id
                or sae_id in ours
                or f"{sae_id}/{SAE_WEIGHTS_FILENAME}" not in there
            ):
                continue
            for small in SMALL_FILES:
                if f"{sae_id}/{small}" in there:
                    self._fetched(f"{sae_id}/{small}")
            try:
                found.append(entry_of(sae_id, self._fetched(path).parent))
            except ValueError as error:
                logger.warning("The model card leaves out %s: %s", sae_id, error)
        return found

    def _fetched(self, path: str) -> Path:
        target = self.target
        return fetch(Resolved(target.repo_id, target.revision, target.head, False), path, token=target.token)

    def _commit(self, changed: Sequence[LocalFile], outdated: Sequence[str]) -> tuple[str, str]:
        """The new commit, and where to look at it.

        Raises:
            _Moved: somebody else has committed.
            HubError: the Hub refused or failed; nothing was committed, unless the message says otherwise.
        """
        target = self.target
        operations = [
            *(CommitOperationAdd(file.path, file.content) for file in changed),
            *(CommitOperationDelete(path) for path in outdated),
        ]
        size = sum(file.size for file in changed)
        logger.info("Uploading %d files, %s bytes, to %s.", len(changed), f"{size:,}", target.url)
        n_tries = 0
        while True:
            n_tries += 1
            try:
                info = hub_call(
                    f"commit to {target.repo_id}",
                    target.api.create_commit,
                    target.repo_id,
                    operations,
                    commit_message=self.message,
                    commit_description=self.description,
                    revision=target.revision,
                    parent_commit=target.head,
                    create_pr=self.create_pr,
                    token=target.token,
                )
                return info.oid, info.pr_url or target.url
            except HubError as error:
                if self.create_pr:
                    raise self._pull_request_unknown(error) from None
                if error.status == 412:
                    raise _Moved from None
                # A refusal is one. Of anything else it is not known whether the commit was made before it went wrong.
                if error.status is not None and not error.may_pass:
                    raise
                if self._has_arrived(changed, error):
                    return target.head, target.url
                if not pause_before_next_try(error, n_tries):
                    raise

    def _has_arrived(self, changed: Sequence[LocalFile], error: HubError) -> bool:
        """Whether the commit was made although the answer says otherwise, or did not come.

        Raises:
            _Moved: another one was made.
            HubError: the Hub does not say.
        """
        parent = self.target.head
        try:
            if not self.target.look() or self.target.head == parent:
                return False
            if self.target.holds(changed):
                return True
        except HubError as silence:
            raise HubError(
                f"{error} Whether the commit was made could not be found out ({silence}) Repeat the push: if it was, there "
                "will be nothing left to do.",
                status=error.status,
                may_pass=True,
            ) from None
        raise _Moved

    def _pull_request_unknown(self, error: HubError) -> HubError:
        if error.status is not None and not error.may_pass:
            return error
        page = f"{self.target.api.endpoint}/{self.target.repo_id}/discussions"
        return HubError(
            f"{error} The pull request may have been opened all the same: look at {page} before you repeat it."
        )
