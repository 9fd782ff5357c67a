"""Run the quick tests on every other Python that the package supports and this machine has; `make pythons` does.

python scripts/other_pythons.py                      # each in an environment of its own, in build/python3.X
python scripts/other_pythons.py --torch torch        # with any build of torch, such as CUDA's: gigabytes
python scripts/other_pythons.py --versions 3.13      # not those of pyproject.toml

A Python is looked for on the PATH and among pyenv's. One that is missing, or for which pip finds no CPU build of torch, is
skipped with a message.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "hatchling", "check-jsonschema"]
# What the versions of Python differ in: command line, annotations and dataclasses of the configs, forked processes.
TESTS = [
    "command_line",
    "config",
    "objective",
    "losses",
    "splice",
    "project_files",
    "checkpoint_folder",
    "interruption",
]
TESTED, SKIPPED, FAILED = "passed", "skipped", "failed"


def supported_versions() -> list[str]:
    """Return the versions among the package's classifiers, such as "3.11"."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    return [each.rpartition(" ")[2] for each in classifiers if "Python :: 3." in each]


def interpreter(version: str) -> str | None:
    """Return a Python of this version that runs and can make environments; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    found = [*([on_path] if on_path else []), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    code = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    # A name on the PATH may be a shim of pyenv's that starts nothing.
    runs = (each for each in found if subprocess.run([each, "-c", code], capture_output=True).returncode == 0)
    return next(runs, None)


def cpu_torch() -> str:
    """Return the requirement of the pinned torch as a CPU build; macOS has no other, and no name for it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (pin,) = [line for line in lines if line.startswith("torch==")]
    return pin if sys.platform == "darwin" else f"{pin}+cpu"


def install(python: Path, *arguments: str, tell: bool = True) -> bool:
    """Install with pip; `tell` shows what it complains about.

    Returns:
        True if everything was found and installed.
    """
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    errors = None if tell else subprocess.DEVNULL
    return subprocess.run(command, cwd=ROOT, check=False, stderr=errors).returncode == 0


def check(version: str, torch: str) -> str:
    """Make the environment of a version and run the quick tests in it.

    Args:
        version: Such as "3.13".
        torch: Requirement of torch.

    Returns:
        `TESTED`, `SKIPPED` or `FAILED`.
    """
    python = interpreter(version)
    if python is None:
        sys.stdout.write(f"Python {version}: skipped, it is not installed.\n")
        return SKIPPED
    folder = ROOT / f"build/python{version}"
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    inside = folder / "bin/python"
    if not install(inside, "--constraint", "constraints.txt", torch, tell=False):
        sys.stdout.write(f"Python {version}: skipped, pip finds no {torch}, and another build may be of gigabytes.\n")
        return SKIPPED
    if not install(inside, "--constraint", "constraints.txt", "--editable", ".", *TOOLS):
        return FAILED
    files = [f"tests/test_{name}.py" for name in TESTS]
    passed = subprocess.run([inside, "-m", "pytest", *files], cwd=ROOT, check=False).returncode == 0
    return TESTED if passed else FAILED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    others = [version for version in supported_versions() if version != here]
    parser.add_argument("--versions", nargs="+", default=others, help="default: %(default)s")
    parser.add_argument("--torch", default=cpu_torch(), help="requirement of torch (default: %(default)s)")
    arguments = parser.parse_args()
    results = {version: check(version, arguments.torch) for version in arguments.versions}
    sys.stdout.write("".join(f"Python {version}: {result}\n" for version, result in results.items()))
    return FAILED in results.values()


if __name__ == "__main__":
    sys.exit(main())
