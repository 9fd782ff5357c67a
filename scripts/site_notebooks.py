"""Notebooks as pages of the site: an MkDocs hook (`hooks:` in mkdocs.yml) that makes a Markdown page of each.

A notebook `docs/notebooks/name.ipynb` becomes the page `notebooks/name.md`, which goes into the navigation, and through the
same Markdown, as any other: links are checked, formulas and code look as elsewhere, and nothing is asked of another host.
The notebook itself stays beside it, to be downloaded. Nothing is run here; `scripts/run_notebooks.py` does that.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"(\]\((?!https?:)[^)\s]*)\.ipynb\b")
EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg"}


def joined(text: str | list[str]) -> str:
    """A notebook's text, which may be stored in lines."""
    return text if isinstance(text, str) else "".join(text)


def fenced(text: str, language: str) -> str:
    """A block of code, whatever is in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


class Page:
    """One notebook as Markdown, and the pictures that it shows."""

    def __init__(self, notebook: dict[str, Any], stem: str):
        self.stem = stem
        self.pictures: dict[str, bytes] = {}
        """Path beside the page -> content."""
        blocks: list[str] = []
        for cell in notebook["cells"]:
            source = joined(cell["source"]).strip("\n")
            if cell["cell_type"] == "markdown":
                blocks.append(LINK.sub(r"\1.md", source))
            elif cell["cell_type"] == "code" and source:
                blocks.append(fenced(source, "python"))
                blocks += [text for output in cell["outputs"] if (text := self._output(output))]
        self.markdown = "\n\n".join(blocks) + "\n"

    def _output(self, output: dict[str, Any]) -> str:
        if output["output_type"] == "stream":
            return fenced(joined(output["text"]), "text")
        data: dict[str, Any] = output.get("data", {})
        for kind, extension in EXTENSIONS.items():
            if kind in data:
                path = f"{self.stem}_files/{len(self.pictures) + 1}.{extension}"
                self.pictures[path] = base64.b64decode(joined(data[kind]))
                alt = str(output["metadata"].get(kind, {}).get("alt", "")).replace("[", "(").replace("]", ")")
                return f"![{alt}]({path})"
        if "text/markdown" in data:
            return joined(data["text/markdown"]).strip("\n")
        if "text/html" in data:
            # One block: an empty line would end it for Markdown.
            return re.sub(r"\n\s*\n", "\n", f"<div>\n{joined(data['text/html']).strip()}\n</div>")
        return fenced(joined(data["text/plain"]), "text") if "text/plain" in data else ""


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, **more: Any) -> str:  # noqa: ARG001
    """Called by mkdocs with a page's Markdown: below a notebook's heading, where it can be run."""
    notebook = Path(page.file.src_uri).with_suffix(".ipynb")
    if not (Path(config.docs_dir) / notebook).is_file():
        return markdown
    links = f"[Download the notebook]({notebook.name}){{ .md-button download }}"
    if config.repo_url:
        path = f"{'/'.join(config.repo_url.rstrip('/').split('/')[-2:])}/blob/main/docs/{notebook.as_posix()}"
        links += f" [Open in Colab](https://colab.research.google.com/github/{path}){{ .md-button }}"
    heading, _, rest = markdown.partition("\n")
    return f"{heading}\n\n{links}\n{rest}"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page, and its pictures, for each notebook."""
    for file in list(files):
        path = Path(file.src_uri)
        if path.suffix != ".ipynb":
            continue
        page = Page(json.loads(file.content_string), path.stem)
        files.append(File.generated(config, path.with_suffix(".md").as_posix(), content=page.markdown))
        for name, content in page.pictures.items():
            files.append(File.generated(config, (path.parent / name).as_posix(), content=content))
    return files
