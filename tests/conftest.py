"""Eight simulated CPU devices for the whole session; a test that sets no mesh runs on the first.

Through the config and not XLA_FLAGS: a program that a test starts keeps its one device.
"""

import os

import hypothesis
import jax
import pytest

if jax.config.jax_platforms in (None, "", "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)

# HYPOTHESIS_PROFILE=long: minutes by hand. Without it the same few examples in every run.
hypothesis.settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=20_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "quick")

# Files that take longest come first, so that no worker is left with one at the end.
FIRST = (
    "test_resume",
    "test_convert",
    "test_rotary_decode_attention",
    "test_rotary_attention",
    "test_train",
    "test_golden_run",
    "test_training_promises",
    "test_sharding",
    "test_model",
    "test_generate",
    "test_plan",
    "test_convert_inputs",
    "test_convert_logits",
    "test_convert_settings",
)

# Most of the time of these goes into compiling programs that run once, for milliseconds.
RUN_ONCE = (
    "test_rotary_attention",
    "test_rotary_attention_gpu",
    "test_rotary_attention_tpu",
    "test_rotary_decode_attention",
    "test_kernels",
    "test_train",
    "test_golden_run",
    "test_training_promises",
    "test_sharding",
    "test_model",
    "test_layers",
    "test_generate",
    "test_scores",
    "test_chat",
    "test_plan",
    "test_quantize",
    "test_convert_quantised",
    "test_sampling",
    "test_tokenizer_llama3",
)


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """XLA's own cheap passes where a program runs once; elsewhere what users get."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", request.path.stem in RUN_ONCE)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
