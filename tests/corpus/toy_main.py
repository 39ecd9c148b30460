"""``llama-jax corpus`` with the toy source, as a process: toy_main.py FOLDER ARGUMENT..."""

import sys
from pathlib import Path

import pytest
from corpus_tools import use_toy_source

if __name__ == "__main__":
    from llama_jax.corpus.__main__ import main

    use_toy_source(pytest.MonkeyPatch(), Path(sys.argv[1]) / "configs")
    sys.exit(main(sys.argv[2:]))
