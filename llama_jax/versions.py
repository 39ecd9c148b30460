"""The version of this package's source."""

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path


def source_version(package: Path = Path(__file__).parent) -> str:
    """The commit of this package's own source checkout; the version of an installed package.

    A repository that merely encloses the package (a virtual environment inside a project) does not
    count: its commit says nothing about this code.
    """
    root = package.parent
    git = lambda *args: subprocess.run(
        ["git", "-C", root, *args], capture_output=True, text=True
    ).stdout.strip()
    with contextlib.suppress(OSError):  # git is not installed
        tracked = git("ls-files", f"{package.name}/versions.py", "pyproject.toml").splitlines()
        if len(tracked) == 2 and Path(git("rev-parse", "--show-toplevel")).samefile(root):
            changed = "+changes" if git("status", "--porcelain", "-uno") else ""
            return f"commit {git('rev-parse', '--short=12', 'HEAD')}{changed}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("llama-jax")
    return "of an unknown version"
