"""``python -m llama_jax.train``."""

import sys

from llama_jax.train import interrupt


def main(argv: list[str] | None = None) -> int:
    """The command, see :func:`llama_jax.train.loop.main`."""
    from llama_jax.train import loop

    return loop.main(argv)


if __name__ == "__main__":
    interrupt.start_command()  # before the imports of the loop, which take seconds
    sys.exit(main())
