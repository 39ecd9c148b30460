"""``python -m llama_jax.convert``."""

import sys

from llama_jax.convert.job import main

if __name__ == "__main__":
    sys.exit(main())
