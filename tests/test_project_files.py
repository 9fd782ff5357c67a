"""Workflows, forms, citation, changelog and contributors' pages: valid, and they name what there is."""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml"))
RELEASE = runpy.run_path(str(ROOT / "scripts/release.py"))
OTHER_PYTHONS = runpy.run_path(str(ROOT / "scripts/other_pythons.py"))
absolute_links = runpy.run_path(str(ROOT / "hatch_build.py"))["absolute_links"]


def steps_of(workflow: str) -> list[dict[str, Any]]:
    jobs = yaml.safe_load((ROOT / ".github/workflows" / workflow).read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def commands_of(workflow: str) -> list[str]:
    return [step["run"].strip() for step in steps_of(workflow) if "run" in step]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [ROOT / ".github/ISSUE_TEMPLATE/config.yml"]),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_that_others_read_have_their_format(schema: str, files: list[Path]):
    assert files
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*check, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_of_formats_can_fail(tmp_path: Path):
    (tmp_path / "broken.yml").write_text((ROOT / ".github/workflows/ci.yml").read_text().replace("runs-on", "runs-in"))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    assert subprocess.run([*check, str(tmp_path / "broken.yml")], capture_output=True).returncode == 1


def test_ci_runs_what_the_repository_runs():
    assert commands_of("ci.yml") == [".ci/run"]
    run = (ROOT / ".ci/run").read_text().splitlines()
    assert run[-2:] == ["make test", "make check"]
    assert "make newest" in commands_of("newest.yml")
    assert "make docs" in commands_of("docs.yml")
    assert "make release-check" in commands_of("release.yml")


def test_the_same_versions_of_python_everywhere():
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    versions = ci["strategy"]["matrix"]["python"]
    assert versions == OTHER_PYTHONS["supported_versions"]()  # the classifiers
    minors = [int(version.split(".")[1]) for version in versions]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    makefile = (ROOT / "Makefile").read_text()
    assert f"(3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]})" in makefile
    named = {line.split("$(PYTHON) ")[1].split(";")[0] for line in makefile.splitlines() if "in $(PYTHON)" in line}
    assert named == {" ".join(["python3", *(f"python3.{minor}" for minor in reversed(minors))])}
    for workflow in WORKFLOWS:  # the one that is set up is the one that the Makefile is told to take
        text = workflow.read_text()
        for told in re.findall(r"PYTHON: python(3\.\d+)", text):
            assert f'python-version: "{told}"' in text, workflow.name
            assert told in versions


def test_other_pythons_are_found_on_the_path_and_among_pyenvs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    find = OTHER_PYTHONS["interpreter"]
    assert find(here) is None
    shim = tmp_path / f"python{here}"  # of a version that pyenv has and does not start
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert find(here) is None
    inside = tmp_path / f"pyenv/versions/{here}.0/bin"
    inside.mkdir(parents=True)
    (inside / "python").symlink_to(sys.executable)
    assert find(here) == str(inside / "python")
    assert find("3.99") is None


def test_other_pythons_run_tests_that_there_are():
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in OTHER_PYTHONS["TESTS"])
    assert re.fullmatch(r"torch==[\d.]+(\+cpu)?", OTHER_PYTHONS["cpu_torch"]())


def test_make_check_runs_every_test_once():
    """Whatever marks a test has, the expression of one of the targets selects it."""
    makefile = (ROOT / "Makefile").read_text()
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    marks = [each.partition(":")[0] for each in options["markers"]]
    selections = dict(
        re.findall(r"^([a-z]+|\$\(SLOW_TESTED\)): .*\n\t\$\(BIN\)/pytest -m '?([a-z ]+)'?$", makefile, re.M)
    )
    assert selections.keys() == {"$(SLOW_TESTED)", "faults", "pages"}
    (by_default,) = re.findall("-m '([^']+)'", options["addopts"])
    (check,) = re.findall("^check: (.*?)  ##", makefile, re.M)
    assert {"tested", "slow", "faults", "pages"} <= set(check.split())
    for values in itertools.product([False, True], repeat=len(marks)):
        marked = dict(zip(marks, values, strict=True))
        chosen = [expression for expression in (by_default, *selections.values()) if eval(expression, {}, marked)]
        assert len(chosen) == max(1, marked["exhaustive"] + marked["documentation"]), marked


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named: set[str] = set()
    for page in (*WORKFLOWS, ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text()
        # In code: `make x`, a line of a block, a step of a workflow.
        found = set(re.findall(r"(?:`|^\s*|run: )make ([a-z][a-z-]*)", text, re.MULTILINE))
        if page.suffix == ".md":  # a sentence may begin a line with the verb
            found -= {word for word in found if f"make {word}" not in code_of(text)}
        assert found <= targets, (page, found - targets)
        named |= found
    assert {"test", "check", "newest", "docs", "release-check"} <= named


def code_of(page: str) -> str:
    """Code blocks and spans of a Markdown page."""
    blocks = re.findall(r"^```.*?^```", page, re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`[^`\n]+`", page)])


def test_what_the_contributors_page_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sources = {
        path: path.read_text() for folder in ("e2e_sae_plugin", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
    }
    everything = "\n".join(sources.values())
    spans = set(re.findall(r"`([^`\n]+)`", text))
    for name in {span for span in spans if re.fullmatch(r"test_\w+", span)}:
        assert f"def {name}(" in everything, name
    for name in {span for span in spans if re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", span)} - {"PIP_EXTRA_INDEX_URL"}:
        assert re.search(rf"\b{name}\b", everything), name
    paths = {span for span in spans if re.fullmatch(r"[\w./-]+\.(py|md|yml|toml|cff|txt)|[\w./-]+/", span)}
    for name in paths - {"run.yaml"}:
        places = [ROOT, ROOT / "e2e_sae_plugin", ROOT / "tests", ROOT / "benchmarks", ROOT / ".github/workflows"]
        inside = [ROOT / "e2e_sae_plugin/splice"]
        assert name == "dist/" or any((place / name).exists() for place in places + inside), name
    for module, attribute in re.findall(r"`(\w+)\.(_?[a-z]\w+)`", text):
        path = next((path for path in sources if path.stem == module), None)
        if path is not None and attribute not in ("py", "txt", "md", "yml", "yaml", "json", "toml"):
            assert re.search(rf"\bdef {attribute}\b", sources[path]), (module, attribute)


def test_the_command_of_the_bug_report_prints_versions_and_device():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())
    (text,) = [part["attributes"]["description"] for part in form["body"] if part["id"] == "versions"]
    code = re.fullmatch(r"python -c '([^']+)'", text.split("```")[1].strip())
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    expected = ["python", "e2e-sae-plugin", "sae-lens", "transformer-lens", "torch", "transformers", "device"]
    assert [line.split()[0] for line in lines] == expected
    assert all(len(line.split()) >= 2 for line in lines)


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert f"version = {{{PROJECT['version']}}}" in (ROOT / "docs/citation.md").read_text()


# The changelog, on the site and in a release.


def test_links_of_the_changelog_lead_somewhere_here_and_on_the_site():
    """Reference links, which each page defines for itself."""
    here, site = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "docs/changelog.md").read_text()
    assert not re.findall(r"\]\((?!https?:)[^)]*\)", here), "an inline link leads nowhere on the site"
    definition = re.compile(r"^\[([^\]]+)\]: (\S+)$", re.MULTILINE)
    ours, theirs = dict(definition.findall(here)), dict(definition.findall(site))
    assert ours == {name: f"docs/{path}" for name, path in theirs.items()}
    assert ours
    for name, path in ours.items():
        assert (ROOT / path).exists()
        assert f"[{name}]" in here.split("[end:entries]")[0]


CHANGELOG = """# Changelog

<!-- --8<-- [start:entries] -->

## [Unreleased]

- Not yet.

## [1.2.0] - 2026-01-31

### Added

- Something ([Speed]).

## [1.1.0]

- No date.

<!-- --8<-- [end:entries] -->

[Speed]: docs/speed.md
"""


def test_release_notes_are_the_section_with_links_at_the_tag():
    notes = RELEASE["release_notes"](CHANGELOG, "1.2.0", "https://example.org/a/b/")
    assert notes == (
        "### Added\n\n- Something ([Speed]).\n\n[Speed]: https://example.org/a/b/blob/v1.2.0/docs/speed.md\n"
    )


@pytest.mark.parametrize("version", ["1.1.0", "1.2", "1.2.0rc1", "Unreleased"])
def test_a_version_without_a_dated_section_has_no_notes(version: str):
    with pytest.raises(ValueError, match=f"no dated section .* '## .{re.escape(version)}. - YYYY-MM-DD'"):
        RELEASE["dated_section"](CHANGELOG, version)


def a_repository(
    folder: Path, changelog: str = CHANGELOG, urls: str = 'Repository = "https://example.org/a/b"'
) -> Path:
    folder.mkdir()
    (folder / "CHANGELOG.md").write_text(changelog)
    (folder / "pyproject.toml").write_text(f'[project]\nname = "x"\nversion = "1.2.0"\n[project.urls]\n{urls}\n')
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        git(folder, *command)
    return folder


def git(folder: Path, *command: str) -> None:
    who = [
        "-c",
        "user.name=x",
        "-c",
        "user.email=x@example.org",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "tag.gpgsign=false",
    ]
    subprocess.run(["git", *who, *command], cwd=folder, check=True)


def test_a_release_that_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = a_repository(tmp_path / "ready")
    assert RELEASE["main"](["check"], folder) == 0
    git(folder, "tag", "v1.2.0")  # in the release workflow the tag is there, on the commit that is built
    assert RELEASE["main"](["check"], folder) == 0
    assert RELEASE["main"](["tag"], folder) == 0
    assert RELEASE["main"](["notes"], folder) == 0
    assert RELEASE["main"](["next"], folder) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("v1.2.0\n### Added\n")
    assert "git tag -a v1.2.0 -m v1.2.0\n  git push origin v1.2.0" in shown


def test_what_stands_in_the_way_of_a_release_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = a_repository(tmp_path / "unready", CHANGELOG.replace(" - 2026-01-31", ""), urls='Paper = "x"')
    git(folder, "tag", "v1.2.0")
    (folder / "new.txt").write_text("")
    git(folder, "commit", "-q", "--allow-empty", "-m", "second")
    assert RELEASE["main"](["check"], folder) == 1
    complaints = capsys.readouterr().err
    assert "uncommitted; commit it or put it away:\n?? new.txt" in complaints
    assert "no dated section" in complaints
    assert "The tag v1.2.0 exists, on another commit" in complaints
    assert "no Repository in [project.urls]" in complaints


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/x.md#y)", "[a](R/blob/v1/docs/x.md#y)"),
        ("![a](docs/x.svg)", "![a](R/raw/v1/docs/x.svg)"),
        ("[![a](docs/x.svg)](docs/x.md)", "[![a](R/raw/v1/docs/x.svg)](R/blob/v1/docs/x.md)"),
        ('<img src="docs/x.png"> <a href="LICENSE">', '<img src="R/raw/v1/docs/x.png"> <a href="R/blob/v1/LICENSE">'),
        ("[a](https://x.org/y) [b](#c) [d](mailto:x@y)", "[a](https://x.org/y) [b](#c) [d](mailto:x@y)"),
    ],
)
def test_links_of_the_readme_on_pypi(text: str, expected: str):
    assert absolute_links(text, "https://r.org/", "v1") == expected.replace("R/", "https://r.org/")
