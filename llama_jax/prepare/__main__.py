"""``python -m llama_jax.prepare``."""

import sys

from llama_jax.prepare.shards import main

if __name__ == "__main__":
    sys.exit(main())
