"""What a push consists of, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sae_lens.constants import SAE_WEIGHTS_FILENAME

from e2e_sae_plugin.hub.card import model_card, pareto_figure
from e2e_sae_plugin.hub.card.entry import CardEntry
from e2e_sae_plugin.hub.gather import SharedSAE
from e2e_sae_plugin.hub.repository import LocalFile, RemoteFile
from e2e_sae_plugin.hub.revision import MAIN
from e2e_sae_plugin.hub.sae_folder import SHARED_FILES

CARD_PATH = "README.md"
FIGURE_PATH = "figures/pareto.png"
Change = Literal["new", "changed", "unchanged", "removed", "planned"]


@dataclass(frozen=True)
class Push:
    """What a push has done, or would do."""

    repo_id: str
    revision: str
    url: str
    """Of the repository's page, or of the pull request."""
    commit: str | None
    """The commit that holds the SAEs; None of a dry run."""
    files: dict[str, tuple[Change, int | None]]
    """Path -> what became of it, and its size in bytes (None of what was removed)."""
    card: str
    """The model card."""

    @property
    def is_new_commit(self) -> bool:
        """False where everything was there already, and of a dry run."""
        return self.commit is not None and any(change != "unchanged" for change, _ in self.files.values())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002
        """What a notebook shows."""
        printer.text(str(self))

    def __str__(self) -> str:
        width = max(len(path) for path in self.files)
        lines = [
            f"  {path:<{width}}  {'' if size is None else f'{size:,} B':>17}  {change}"
            for path, (change, size) in self.files.items()
        ]
        total = sum(size or 0 for change, size in self.files.values() if change in ("new", "changed", "planned"))
        where = self.repo_id if self.revision == MAIN else f"{self.repo_id} ({self.revision})"
        if self.commit is None:
            head = (
                f"Would push {total:,} bytes in one commit to {where}; files that are there already do not go up again:"
            )
        elif self.is_new_commit:
            head = f"Pushed {total:,} bytes in one commit, {self.commit[:12]}, to {self.url}:"
        else:
            head = f"There was nothing to do: {self.url} holds all of it, at {self.commit[:12]}:"
        return "\n".join([head, *lines])


@dataclass(frozen=True)
class Plan:
    """What has to be in the repository afterwards."""

    shared: list[SharedSAE]
    repo_id: str
    revision: str
    license: str | None

    def files(self, readme: str | None, others: Sequence[CardEntry]) -> tuple[list[LocalFile], str]:
        """The files and the model card, for a repository with this README and these other SAEs."""
        entries = sorted([*others, *(each.entry for each in self.shared)], key=lambda entry: entry.sae_id)
        figure = pareto_figure(entries)
        card = model_card(
            self.repo_id,
            entries,
            existing=readme,
            license=self.license,
            revision=None if self.revision == MAIN or self.revision.startswith("refs/pr/") else self.revision,
            pareto_figure=None if figure is None else FIGURE_PATH,
        )
        files = [
            LocalFile(f"{each.sae_id}/{name}", each.folder / name, (each.folder / name).stat().st_size, digest)
            for each in self.shared
            for name, digest in each.sums.items()
        ]
        files.append(LocalFile.of_bytes(CARD_PATH, card.encode()))
        if figure is not None:
            files.append(LocalFile.of_bytes(FIGURE_PATH, figure))
        return files, card

    def outdated(self, there: Mapping[str, RemoteFile]) -> list[str]:
        """Files of earlier versions of these SAEs that the new ones do not have."""
        return [
            path
            for each in self.shared
            for name in SHARED_FILES
            if name not in each.sums and (path := f"{each.sae_id}/{name}") in there
        ]

    def refuse_what_is_in_the_way(self, there: Mapping[str, RemoteFile]) -> None:
        """Raise ValueError where a file of the repository has the place of an SAE's folder."""
        for each in self.shared:
            parts = each.sae_id.split("/")
            for depth in range(1, len(parts) + 1):
                if (path := "/".join(parts[:depth])) in there:
                    raise ValueError(
                        f"{self.repo_id} has a file {path!r} where the folder of the SAE {each.sae_id!r} would be. Give it "
                        "another id. Nothing was sent."
                    )

    def refuse_replacing(self, there: Mapping[str, RemoteFile]) -> None:
        """Raise ValueError where the repository has other weights under an id of these."""
        replaced = [
            each.sae_id
            for each in self.shared
            if (weights := there.get(f"{each.sae_id}/{SAE_WEIGHTS_FILENAME}")) is not None
            and not weights.equals(_weights(each))
        ]
        if replaced:
            raise ValueError(
                f"{self.repo_id} has other SAEs with the ids {replaced}. Give yours other ids (sae_id, or a mapping from "
                "ids), or set overwrite=True (--overwrite) to replace them. Nothing was sent."
            )


def _weights(each: SharedSAE) -> LocalFile:
    path = each.folder / SAE_WEIGHTS_FILENAME
    return LocalFile(path.name, path, path.stat().st_size, each.sums[SAE_WEIGHTS_FILENAME])
