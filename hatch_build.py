"""The package's long description: README.md, its links to files of the repository made absolute.

PyPI shows the README on a page of its own, where `docs/guides/training.md` leads nowhere. With `Repository` in
[project.urls] the links go to the repository at the version's tag; without it they are left as they are.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = r"(?![a-z]+:|#|/)"
# (what precedes the address, how the repository serves it: images as files, the rest as pages), images first.
LINKS = ((r"(!\[[^\]]*\]\()", "raw"), (r"(\]\()", "blob"), (r"(\b(?:src|srcset)=\")", "raw"), (r"(\bhref=\")", "blob"))


def absolute_links(text: str, repository: str, tag: str) -> str:
    """`text` with its relative addresses, of Markdown and HTML, below `repository` at `tag`."""
    for before, served_as in LINKS:
        text = re.sub(before + RELATIVE, rf"\1{repository.rstrip('/')}/{served_as}/{tag}/", text)
    return text


class ReadmeHook(MetadataHookInterface):
    """Fills in `readme`, which pyproject.toml declares dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository := metadata.get("urls", {}).get("Repository"):
            text = absolute_links(text, repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
