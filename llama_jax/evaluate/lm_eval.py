"""The harness's own command line with this package's models: ``--model llama_jax``.

Releases of the harness after 0.4.13 find the model by its entry point, and plain ``lm_eval`` works:

    python -m llama_jax.evaluate.lm_eval --model llama_jax --model_args checkpoint=PATH --tasks ...
"""

import os
import sys

from llama_jax.generate.__main__ import command_errors

NAME = "llama_jax"


def main() -> int:
    """Command line of ``lm_eval``; returns the exit status."""
    with command_errors() as status:
        register()
        # Its processes for bootstrap are forks, which may hang with the threads of jax.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    return status.code


def register() -> None:
    """Make ``lm_eval`` find the model by its name."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="llama_jax.evaluate.harness_model:HarnessModel")


if __name__ == "__main__":
    sys.exit(main())
