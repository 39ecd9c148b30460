"""Damaged recipes and odd values: a ConfigError of bounded length, or a recipe that can be kept.

HYPOTHESIS_PROFILE=long python -m pytest tests/config/test_config_fuzz.py  # minutes
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_config import MINIMAL
from test_fuzz_data import VALUES, mutated

from llama_jax import config

NAMES = [s.name.replace("NAME", "a") for s in config.settings()]
SHARED_FILE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
# Values that a person or a program that writes TOML may use.
WRITTEN = VALUES.map(lambda v: json.dumps(v, ensure_ascii=False)) | st.text(max_size=30)
WRITTEN |= st.sampled_from(["nan", "-inf", "1e999", "1979-05-27", "[" * 2000, "'", '"\\uD800"'])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe") / "recipe.toml"


def read(file, content: bytes, *overrides):
    """Read a recipe; an accepted recipe is unchanged after writing and reading it."""
    file.write_bytes(content)
    try:
        recipe = config.load_recipe(file, overrides)
    except config.ConfigError as e:
        message = str(e)
    else:
        message = ""
        file.write_bytes(config.to_toml(recipe).encode())
        assert config.load_recipe(file) == recipe
    assert len(message) < 20_000


@given(content=mutated(MINIMAL.encode()))
@SHARED_FILE
def test_damaged_recipes(file, content):
    read(file, content)


@given(name=st.sampled_from(NAMES) | st.text(max_size=20), value=WRITTEN)
@SHARED_FILE
def test_odd_settings(file, name, value):
    read(file, MINIMAL.encode(), f"{name}={value}")
