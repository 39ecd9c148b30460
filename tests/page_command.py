"""``llama-jax`` for the commands of the documentation's pages: `test_docs.py`.

The standard library, the text of the example recipes, is one package of it: to prepare all of it
takes ten seconds per run.
"""

import sys
import sysconfig
from pathlib import Path

from llama_jax.__main__ import main
from llama_jax.prepare import python_library

python_library.root = lambda: Path(sysconfig.get_path("stdlib")) / "asyncio"

if __name__ == "__main__":
    sys.exit(main())
