"""Without the extra ``corpus``: help is shown, other commands name the extra."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import sys
for name in ("datatrove", "zstandard", "mwparserfromhell", "py7zr", "kenlm", "fasttext", "warcio"):
    sys.modules[name] = None
from llama_jax.corpus.__main__ import main
print(main(["wikipedia", "x", "--output", "y"]), main(["models", "x"]), main(["report", "x"]))
main([])
"""


def test_help_is_shown_and_other_commands_name_the_extra():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 1 1\nusage: llama-jax corpus SOURCE ")
    *errors, last = done.stderr.split("\n")
    assert (len(errors), last) == (3, "")
    for error in errors:
        assert error.endswith(" is not installed: pip install 'llama_jax[corpus]'")
