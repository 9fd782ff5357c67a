"""The notebooks as they are committed, the tool that runs them, and the hook that makes pages of the site of them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
committed = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool, pages = load_script("run_notebooks"), load_script("site_notebooks")


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["compare_kinds", "finetune_and_share", "train_and_look"]


@committed
def test_committed_notebooks_are_executed_in_order_and_show_no_errors_noise_or_paths(path):
    assert tool.look_at(path) == []
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert sum(bool(cell.get("outputs")) for cell in notebook.cells) >= 5
    for folder in ("/home/", "/tmp/", "/Users/", "site-packages"):
        assert folder not in path.read_text()


@committed
def test_notebooks_are_written_as_the_tool_writes_them(path):
    notebook = nbformat.read(path, as_version=4)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert nbformat.writes(tool.cleaned(notebook)).rstrip("\n") + "\n" == path.read_text()


@committed
def test_notebooks_install_only_what_is_missing(path):
    """So that they run offline here, and from nothing on Colab."""
    first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert 'if importlib.util.find_spec("e2e_sae_plugin") is None:' in first.source
    assert "%pip install --quiet e2e-sae-plugin" in first.source


@committed
def test_links_of_notebooks_lead_somewhere(path):
    prose = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)]+)\)", prose)
    assert targets
    for target in targets:
        if not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).is_file(), target


def a_notebook(*code: Any, prose: str = "# Title") -> Any:
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
    return new_notebook(cells=[new_markdown_cell(prose), *code])


def printed(text: str, name: str = "stdout") -> Any:
    return new_code_cell("x = 1", outputs=[new_output("stream", name=name, text=text)])


def shown(data: dict[str, str], metadata: dict[str, Any] | None = None) -> Any:
    return new_code_cell("x", outputs=[new_output("display_data", data=data, metadata=metadata or {})])


def test_a_good_notebook_has_no_problems():
    picture = shown({"image/png": "aaaa"}, {"image/png": {"alt": "a chart"}})
    text = "# Title\n\n## Part\n\n```\n# no heading\n```\n\n[a link](https://example.org)"
    assert tool.problems_of(a_notebook(printed("a/b/c 1/2\n"), picture, prose=text)) == []


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        (printed("Downloading", name="stderr"), "a message on stderr"),
        (printed("saved in /home/me/output"), "a path of a machine"),
        (printed("/tmp/tmpabc/cfg.json"), "a path of a machine"),
        (printed("100%|####| 10/10 [00:01<00:00, 9.2it/s]"), "a progress bar"),
        (printed("UserWarning: old"), "a warning"),
        (printed("\x1b[31mred"), "terminal colours"),
        (printed("<Axes at 0x7f3c2a10>"), "the address of an object"),
        (shown({"image/png": "aaaa"}), "an image without a description"),
        (shown({"application/vnd.jupyter.widget-view+json": "{}"}), "a widget"),
        (shown({"text/html": "<p>/home/x</p>"}), "a path of a machine"),
        (
            new_code_cell("1 / 0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])]),
            "an error, ZeroDivisionError",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_should_not_be_committed_is_found(cell, problem):
    (found,) = tool.problems_of(a_notebook(cell))
    assert problem in found


def test_cells_that_were_not_run_or_out_of_order_are_found():
    notebook = a_notebook(new_code_cell("a = 1"), new_code_cell("b = 2"), new_code_cell("c = 3"))
    notebook.cells[2].execution_count, notebook.cells[3].execution_count = None, 7
    assert [each.partition(") ")[2] for each in tool.problems_of(notebook)] == [
        "has not been run",
        "was run out of order, as number 7",
    ]


@pytest.mark.parametrize(
    ("prose", "problem"),
    [
        ("no title", "one heading of the first level"),
        ("# One\n\n# Two", "one heading of the first level"),
        ("## Part\n\n# Title", "one heading of the first level"),
        ("# One\n\n### Deep", "the heading 'Deep' skips a level"),
        ("# One\n\n[](https://example.org)", "an empty link"),
        ("# One\n\n[text]()", "an empty link"),
        ("# One\n\n![](picture.png)", "a picture without a description"),
    ],
)
def test_prose_that_is_hard_to_get_about_in_is_found(prose, problem):
    (found,) = tool.problems_of(a_notebook(new_code_cell("x = 1"), prose=prose))
    assert problem in found


def test_a_notebook_that_is_too_large_is_found():
    (found,) = tool.problems_of(a_notebook(new_code_cell("x = 1")), tool.MAX_BYTES + 1)
    assert "more than 500,000" in found


TABLE = "| kind | KL |\n| --- | ---: |\n| local | 0.1 |\n| e2e | 0.2 |\n"


def test_other_numbers_are_no_difference_but_other_tables_and_kinds_are():
    old = a_notebook(shown({"text/markdown": TABLE}))
    assert tool.differences(old, a_notebook(shown({"text/markdown": TABLE.replace("0.2", "0.3")}))) == []
    for other in (
        shown({"text/markdown": TABLE + "| e2e+ds | 0.3 |\n"}),
        shown({"text/markdown": TABLE.replace("KL", "CE")}),
        shown({"text/html": TABLE}),
        printed("text"),
        new_code_cell("x"),
    ):
        assert len(tool.differences(old, a_notebook(other))) == 1


def test_times_and_versions_are_taken_out():
    cell = shown({"image/png": "aaaa"}, {"image/png": {"alt": "a chart"}, "started": "12:00"})
    cell.metadata = nbformat.from_dict({"execution": {"iopub.execute_input": "12:00"}, "tags": ["long"]})
    notebook = a_notebook(cell)
    notebook.metadata = nbformat.from_dict({"language_info": {"name": "python", "version": "3.11.2"}})
    cleaned = tool.cleaned(notebook)
    assert cleaned.metadata == tool.METADATA
    assert cleaned.cells[1].metadata == {"tags": ["long"]}
    assert cleaned.cells[1].outputs[0].metadata == {"image/png": {"alt": "a chart"}}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's libraries, which are not ours
def test_notebooks_are_run_compared_and_renewed(tmp_path, capsys):
    path = tmp_path / "small.ipynb"
    source = "from pathlib import Path\n\nPath('left.txt').touch()\n1 + 1"
    path.write_text(nbformat.writes(new_notebook(cells=[new_markdown_cell("# Small"), new_code_cell(source)])))
    before = path.read_text()

    assert tool.main([str(path)]) == 1
    told = capsys.readouterr().out
    assert "has not been run" in told
    assert "has other outputs than those committed" in told
    assert path.read_text() == before

    assert tool.main(["--write", str(path)]) == 0
    assert json.loads(path.read_text())["cells"][1]["outputs"][0]["data"]["text/plain"] == ["2"]
    assert not (tmp_path / "left.txt").exists()

    written = path.read_text()
    assert tool.main(["--check", str(path)]) == 0
    path.write_text(written.replace("1 + 1", "1 / 0"))
    assert tool.main([str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_flags_that_contradict_each_other_and_missing_files_are_refused(tmp_path, capsys):
    for arguments in (["--write", "--check"], [str(tmp_path / "none.ipynb")]):
        with pytest.raises(SystemExit) as stopped:
            tool.main(arguments)
        assert stopped.value.code == 2
    assert "there is no notebook" in capsys.readouterr().err


# Pages of the site.


def as_page(notebook: Any, stem: str = "small") -> Any:
    return pages.Page(json.loads(nbformat.writes(notebook)), stem)


def test_a_page_has_the_prose_the_code_and_the_outputs_in_order():
    picture = shown({"image/png": "aGVsbG8=", "text/plain": "<Figure>"}, {"image/png": {"alt": "a [log] chart"}})
    page = as_page(
        a_notebook(printed("1 2\n"), picture, prose="# Title\n\n[next](other.ipynb#part), [far](https://a.b/c.ipynb)")
    )
    assert page.markdown == (
        "# Title\n\n[next](other.md#part), [far](https://a.b/c.ipynb)\n\n"
        "```python\nx = 1\n```\n\n```text\n1 2\n```\n\n"
        "```python\nx\n```\n\n![a (log) chart](small_files/1.png)\n"
    )
    assert page.pictures == {"small_files/1.png": b"hello"}


def test_outputs_that_hold_markdown_fences_or_empty_lines_stay_whole():
    html = shown({"text/html": "<p>a</p>\n\n<p>b</p>", "text/plain": "<HTML>"})
    page = as_page(a_notebook(printed("a\n```\nb"), shown({"text/markdown": TABLE}), html))
    assert "````text\na\n```\nb\n````" in page.markdown
    assert f"```\n\n{TABLE}" in page.markdown
    assert page.markdown.endswith("<div>\n<p>a</p>\n<p>b</p>\n</div>\n")


@committed
def test_committed_notebooks_make_pages_without_leftovers(path):
    page = pages.Page(json.loads(path.read_text()), path.stem)
    assert page.markdown.startswith("# ")
    assert ".ipynb)" not in page.markdown
    assert len(page.pictures) >= 1
    for name, content in page.pictures.items():
        assert f"]({name})" in page.markdown
        assert content.startswith(b"\x89PNG")
    assert "<Figure" not in page.markdown


def test_a_page_says_where_its_notebook_can_be_run():
    def page_with(repo_url: str) -> str:
        config = SimpleNamespace(docs_dir=str(ROOT / "docs"), repo_url=repo_url)
        page = SimpleNamespace(file=SimpleNamespace(src_uri="notebooks/train_and_look.md"))
        return pages.on_page_markdown("# Heading\n\nText.\n", page=page, config=config)

    assert page_with("").startswith("# Heading\n\n[Download the notebook](train_and_look.ipynb)")
    assert "colab" not in page_with("")
    address = "https://colab.research.google.com/github/some/where/blob/main/docs/notebooks/train_and_look.ipynb"
    assert f"[Open in Colab]({address})" in page_with("https://github.com/some/where/")
