"""The files of launch/ without their launchers: syntax, linters, and options that must be there."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = [p for p in sorted(LAUNCH.iterdir()) if p.read_text().startswith("#!/bin/bash")]
BIN = Path(sys.executable).parent


def lint(command: str, *arguments: str, text: str) -> str:
    """What a linter of the extra `check` says about a text."""
    found = shutil.which(command, path=str(BIN)) or shutil.which(command)
    if found is None:
        pytest.skip(f"{command} comes with the extra check")
    done = subprocess.run([found, *arguments], input=text, capture_output=True, text=True)
    return done.stdout + done.stderr


# Scripts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(path):
    assert lint("shellcheck", "-", text=path.read_text()) == ""
    assert "SC2086" in lint("shellcheck", "-", text=path.read_text() + "\necho $1\n")


def sbatch_options(text: str) -> list[str]:
    """Slurm ignores the options after the first command."""
    header = re.split(r"^(?!#|$)", text, maxsplit=1, flags=re.MULTILINE)[0]
    assert text.count("\n#SBATCH") == header.count("\n#SBATCH"), "after the first command"
    return re.findall(r"^#SBATCH (\S+)$", header, re.MULTILINE)


def test_options_of_slurm():
    options = sbatch_options((LAUNCH / "slurm.sbatch").read_text())
    needed = "--requeue", "--open-mode=append", "--ntasks-per-node=1", "--signal=TERM@300"
    assert set(needed) <= set(options)
    with pytest.raises(AssertionError, match="after the first command"):
        sbatch_options("#!/bin/bash\nx=1\n#SBATCH --requeue\n")


# Images ------------------------------------------------------------------------------------------

ROOT = LAUNCH.parent
IMAGES = sorted(LAUNCH.glob("Dockerfile.*"))


def check_image(text: str) -> None:
    """Raises an error for what hadolint finds, and for what it does not look at."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and line[0] != "#"]
    values = lambda name: [rest for step, rest in steps if step == name]
    (base,) = values("FROM")
    assert re.fullmatch(r"[\w./-]+:\w+-20\d{6}", base), f"{base} is not an image of a date"
    assert values("USER")[-1].isdigit(), "Kubernetes does not know whether a name is root"
    assert values("USER")[-1] != "0"
    for files in values("COPY"):
        for name in files.split()[:-1]:
            assert (ROOT / name).exists(), f"COPY {name}: no such file"
    (extras,) = re.findall(r"--constraint constraints.txt '\.\[([\w,]+)\]'", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert lint("hadolint", "-", text=text) == ""


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.name)
def test_images(path):
    check_image(path.read_text())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r":noble-\d+", ""),
        (r":noble-\d+", ":latest"),
        (r":noble-\d+", ":noble"),
        ("USER 1001", ""),
        ("USER 1001", "USER 0"),
        ("COPY configs configs", "COPY config configs"),
        (r"\[tpu,gcs\]", "[tpus]"),
        ("--constraint constraints.txt ", ""),
        ("WORKDIR /data", "WORKDIRR /data"),
        (r"\nENTRYPOINT", "\nUSER root\nENTRYPOINT"),
    ],
)
def test_wrong_images_are_found(old, new):
    text, count = re.subn(old, new, (LAUNCH / "Dockerfile.tpu").read_text(), count=1)
    assert count == 1
    with pytest.raises((AssertionError, ValueError, IndexError)):
        check_image(text)
