"""What a release needs besides building it; `make release-check` and the release workflow run this.

python scripts/release.py check     # nothing uncommitted, a dated section, the tag free, the repository's address known
python scripts/release.py notes     # the changelog's section of this version, its links at the tag
python scripts/release.py tag       # v<version>
python scripts/release.py next      # the commands that follow
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def dated_section(changelog: str, version: str) -> str:
    """What stands under `## [version] - YYYY-MM-DD`.

    Raises:
        ValueError: there is no such heading, or nothing under it.
    """
    parts = re.split(r"^## (.+)$", changelog.split("<!-- --8<-- [end:entries] -->")[0], flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        if re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading.strip()):
            if not body.strip():
                raise ValueError(f"The section of {version} in CHANGELOG.md is empty.")
            return body.strip() + "\n"
    raise ValueError(
        f"CHANGELOG.md has no dated section of the version in pyproject.toml. Expected a heading "
        f"'## [{version}] - YYYY-MM-DD', got {parts[1::2]}."
    )


def release_notes(changelog: str, version: str, repository: str) -> str:
    """`dated_section`, followed by the changelog's link definitions as addresses in the repository at the tag."""
    definitions = re.findall(r"^(\[[^\]]+\]: )(?!https?:)(\S+)$", changelog, flags=re.MULTILINE)
    links = [f"{name}{repository.rstrip('/')}/blob/v{version}/{path}\n" for name, path in definitions]
    return "\n".join([dated_section(changelog, version), "".join(links)])


def problems(root: Path, project: dict[str, Any]) -> list[str]:
    """What stands in the way of tagging `root` as it is; in words, none if nothing does."""
    found: list[str] = []
    version = project["version"]
    if changed := git(root, "status", "--porcelain"):
        found.append(f"There is something uncommitted; commit it or put it away:\n{changed}")
    try:
        dated_section((root / "CHANGELOG.md").read_text(), version)
    except ValueError as error:
        found.append(str(error))
    tagged = git(root, "rev-list", "-n", "1", f"refs/tags/v{version}", "--", fails=True)
    if tagged and tagged != git(root, "rev-parse", "HEAD"):
        found.append(f"The tag v{version} exists, on another commit. Raise the version in pyproject.toml.")
    if "Repository" not in project.get("urls", {}):
        found.append(
            "pyproject.toml has no Repository in [project.urls], so the README's links would lead nowhere on PyPI. Set it "
            "to the repository's address."
        )
    return found


def git(root: Path, *arguments: str, fails: bool = False) -> str:
    """What git prints. Where it may fail (`fails`), nothing if it does."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=not fails)
    return done.stdout.strip() if done.returncode == 0 else ""


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run one of the commands; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "notes", "tag", "next"))
    command = parser.parse_args(arguments).command
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    version = project["version"]
    if command == "tag":
        print(f"v{version}")
    elif command == "notes":
        try:
            print(release_notes((root / "CHANGELOG.md").read_text(), version, project["urls"]["Repository"]), end="")
        except (ValueError, KeyError) as error:
            print(f"No release notes: {error}", file=sys.stderr)
            return 1
    elif command == "next":
        print(
            f"dist/ is ready. What follows, once CI has passed on this commit:\n\n  git tag -a v{version} -m v{version}"
        )
        print(f"  git push origin v{version}    # the release workflow publishes it")
        print("\nBy hand, in the place of the workflow: .venv/bin/twine upload dist/*")
    elif found := problems(root, project):
        print("\n".join(f"- {problem}" for problem in found), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
