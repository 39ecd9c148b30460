"""Eight simulated CPU devices for all tests; a test that sets no mesh uses the first.

The devices come from jax.config and not from XLA_FLAGS, so that a program started by a test has
one device.
"""

import os

import hypothesis
import jax
import pytest

if jax.config.jax_platforms in (None, "", "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)

# HYPOTHESIS_PROFILE=long takes minutes per test; the default runs the same few examples every time.
hypothesis.settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=20_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "quick")

# The slowest files run first, so that both workers finish at about the same time.
FIRST = (
    "test_resume",
    "test_convert",
    "test_rotary_decode_attention",
    "test_rotary_attention",
    "test_rotary_attention_tpu",
    "test_accelerator",
    "test_train",
    "test_golden_run",
    "test_training_promises",
    "test_sharding",
    "test_model",
    "test_quantized_matmul",
    "test_generate",
    "test_plan",
    "test_convert_inputs",
    "test_convert_logits",
    "test_convert_settings",
)

# Files that spend most of their time compiling programs that then run once, for milliseconds.
RUN_ONCE = (
    "test_rotary_attention",
    "test_rotary_attention_gpu",
    "test_rotary_attention_tpu",
    "test_rotary_decode_attention",
    "test_kernels",
    "test_quantized_matmul",
    "test_add_rms_norm",
    "test_train",
    "test_train_evaluate",
    "test_golden_run",
    "test_stopping",
    "test_finetune",
    "test_training_promises",
    "test_sharding",
    "test_model",
    "test_lora",
    "test_adapters",
    "test_layers",
    "test_generate",
    "test_load",
    "test_scores",
    "test_likelihood",
    "test_chat",
    "test_chat_command",
    "test_plan",
    "test_hlo",
    "test_quantize",
    "test_convert_quantized",
    "test_peft",
    "test_peft_parity",
    "test_sampling",
    "test_tokenizer_llama3",
)


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Disables most XLA optimizations in the files of `RUN_ONCE`; others compile as users do."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", request.path.stem in RUN_ONCE)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
