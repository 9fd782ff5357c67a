"""The model card of a Hub repository of SAEs: a function of what is known of them, without network, files or clock."""

from __future__ import annotations

import re
from collections.abc import Sequence

from huggingface_hub.utils import validate_repo_id

from e2e_sae_plugin.hub.card.entry import CardEntry as CardEntry
from e2e_sae_plugin.hub.card.figure import pareto_figure as pareto_figure
from e2e_sae_plugin.hub.card.metadata import card_metadata, merged_front_matter, split_front_matter
from e2e_sae_plugin.hub.card.sections import citation, how_to_load, introduction, list_of_saes, objectives
from e2e_sae_plugin.hub.card.tables import evaluation, training
from e2e_sae_plugin.hub.card.text import is_local_path, markdown

BEGIN = "<!-- e2e-sae-plugin: begin -->"
END = "<!-- e2e-sae-plugin: end -->"
NOTICE = "<!-- Written by e2e-sae-plugin: a later upload replaces what is between these marks and nothing else. -->"
# Our section, where it stands on lines of its own and holds no other mark: of several, the last.
SECTION = re.compile(
    rf"^{re.escape(BEGIN)}[ \t]*\r?$(?:(?!^{re.escape(BEGIN)}|^{re.escape(END)})[\s\S])*^{re.escape(END)}(?=[ \t]*\r?$)",
    re.MULTILINE,
)


def model_card(
    repo_id: str,
    entries: Sequence[CardEntry],
    *,
    existing: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    pareto_figure: str | None = None,
) -> str:
    """The whole README.md of a repository of SAEs, metadata included.

    With an existing README, ours is the section between two marks: it takes the place of an earlier one (the last, where
    there are several), or is added at the end. All text outside of it stays as it is. So do the metadata that are there;
    ours fill gaps, join the lists of tags and data sets, and replace results of the same name in the model index. With the
    same entries, the card of a card is that card.

    Args:
        repo_id: `owner/name`.
        entries: the SAEs, in the order in which they are listed; the first is that of the examples.
        existing: the README that is there.
        license: an identifier of the Hub's, for instance "mit"; by default the existing one stays.
        revision: the branch, tag or commit that holds the SAEs, if it is not main.
        pareto_figure: path in the repository of what `pareto_figure()` drew.

    Raises:
        ValueError: `repo_id` is not legal, there is no SAE or two have one id, the figure's path is not inside the
            repository, or the existing front matter is not valid.
    """
    _check(repo_id, entries, pareto_figure)
    existing = (existing or "").removeprefix("\ufeff")
    existing = existing if existing.strip() else ""
    line_break = "\r\n" if 2 * existing.count("\r\n") > existing.count("\n") else "\n"
    front_matter, text = split_front_matter(existing)
    front_matter = merged_front_matter(front_matter, card_metadata(repo_id, entries, license), license, line_break)
    found = list(SECTION.finditer(text))
    if found:
        before, after = text[: found[-1].start()], text[found[-1].end() :]
    else:
        before, after = text + _gap(text, line_break), line_break
    section = _section(repo_id, entries, revision, pareto_figure, titled=not before.strip())
    return front_matter + before + section.replace("\n", line_break) + after


def _check(repo_id: str, entries: Sequence[CardEntry], figure: str | None) -> None:
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} has no owner. Expected 'owner/name'.")
    if not entries:
        raise ValueError("There is no SAE to describe: entries is empty.")
    ids = [each.sae_id for each in entries]
    if twice := sorted({each for each in ids if ids.count(each) > 1}):
        raise ValueError(f"Two entries have the id {twice[0]!r}. Each SAE of a repository needs one of its own.")
    if figure is not None and (not figure or is_local_path(figure) or ".." in figure.split("/")):
        raise ValueError(f"pareto_figure={figure!r} must be a path in the repository, for instance 'pareto_l0.png'.")


def _gap(text: str, line_break: str) -> str:
    """What makes a blank line between `text` and what follows."""
    if not text:
        return line_break
    breaks = len(text) - len(text.rstrip("\r\n"))
    ends = text[len(text) - breaks :].count("\n")
    return line_break * max(0, 2 - ends)


def _section(
    repo_id: str, entries: Sequence[CardEntry], revision: str | None, figure: str | None, *, titled: bool
) -> str:
    """Ours, from mark to mark; under a heading of the second level where a person's text comes first."""
    title = f"# {markdown(repo_id.rpartition('/')[2])}" if titled else "## The SAEs"
    sections = {
        "How to load": how_to_load(repo_id, entries, revision),
        "Objective": objectives(entries),
        "Training": training(entries),
        "Evaluation": evaluation(entries, figure),
        "Citation": citation(entries),
    }
    body = f"{title}\n\n{introduction(entries)}\n\n{list_of_saes(entries)}"
    body += "".join(f"\n## {heading}\n\n{text}" for heading, text in sections.items() if text)
    return f"{BEGIN}\n{NOTICE}\n\n{body}\n{END}"
