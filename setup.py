"""The parts of the build that pyproject.toml cannot state; everything else is there."""

from pathlib import Path

from setuptools import find_packages, setup

# What stands above "# Tests" in requirements.txt is needed at run time.
runtime, _, _ = Path("requirements.txt").read_text(encoding="utf-8").partition("\n# Tests\n")
setup(
    install_requires=[line for line in runtime.splitlines() if line and line[0] not in "#-"],
    packages=[*find_packages(include=["llama_jax*", "pallas_kernels*"]), "llama_jax.configs"],
    package_dir={"llama_jax.configs": "configs"},  # the wheel carries the recipes
    package_data={
        "": ["py.typed"],
        "llama_jax.configs": ["*.toml", "corpus/*.toml"],
        "llama_jax.data": ["templates/*.jinja"],
        "llama_jax.evaluate": ["published.toml"],
        "llama_jax.serve": ["page/*"],
    },
)
