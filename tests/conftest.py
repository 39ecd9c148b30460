"""Eight simulated CPU devices for all tests; a test that sets no mesh uses the first.

The devices come from jax.config and not from XLA_FLAGS, so that a program started by a test has
one device.
"""

import gc
import os

import hypothesis
import jax
import pytest
import quick_options
from jax._src import compiler

if jax.config.jax_platforms in (None, "", "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)

# HYPOTHESIS_PROFILE=long takes minutes per test; the default runs the same few examples every time.
hypothesis.settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=20_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "quick")

# The slowest files run first, so that both workers finish at about the same time.
FIRST = (
    "test_resume",
    "test_finetune",
    "test_rotary_decode_attention",
    "test_train",
    "test_convert",
    "test_rotary_attention",
    "test_model",
    "test_generate",
    "test_sharding",
    "test_rotary_attention_tpu",
    "test_jobs",
    "test_optimizers",
    "test_accelerator",
    "test_prepare",
    "test_training_promises",
    "test_load",
    "test_convert_hostile",
    "test_golden_run",
    "test_quantized_matmul",
    "test_quantize",
    "test_likelihood",
    "test_adapters",
    "test_paged_attention",
    "test_plan",
    "test_old_version",
    "test_sandbox",
    "test_lora",
)

# Files that spend most of their time compiling programs that then run once, for milliseconds.
RUN_ONCE = (
    "test_rotary_attention",
    "test_rotary_attention_gpu",
    "test_rotary_attention_tpu",
    "test_rotary_decode_attention",
    "test_paged_attention",
    "test_paged_cache",
    "test_kernels",
    "test_quantized_matmul",
    "test_add_rms_norm",
    "test_train",
    "test_storage",
    "test_optimizers",
    "test_supervision",
    "test_trackers",
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
    "test_notebook",
    "test_api_engine",
    "test_api_harness",
    "test_plan",
    "test_hlo",
    "test_quantize",
    "test_convert_quantized",
    "test_peft",
    "test_peft_parity",
    "test_sampling",
    "test_sampling_rows",
    "test_engine_faults",
    "test_tokenizer_llama3",
    "test_attention_tpu_model",
    "test_old_version",
    "test_convert_logits",
    "test_bench",
)


# Python's collector scans the millions of long-lived objects of JAX and pytest repeatedly, which
# takes a tenth of the tests' time.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))


@pytest.fixture(autouse=True, scope="session")
def user_cache(tmp_path_factory):
    """The user's cache is a new folder, shared by all processes of this run of the tests: what one
    of them has compiled or converted, the others read."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache/llama_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_sync():
    """Files of tests need not survive a power cut. Tests of the order of synchronization replace
    this function too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


get_compile_options = compiler.get_compile_options


def get_quick_options(*args, backend, env_options_overrides, **kwargs):
    """JAX's compiler options with `quick_options.OPTIONS`, for which JAX has no setting."""
    if backend.platform == "cpu":
        env_options_overrides = quick_options.OPTIONS | env_options_overrides
    return get_compile_options(
        *args, backend=backend, env_options_overrides=env_options_overrides, **kwargs
    )


@pytest.fixture
def users_compilation(monkeypatch):
    """Compiles one test of a file of `RUN_ONCE` without `quick_options`."""
    monkeypatch.setattr(compiler, "get_compile_options", get_compile_options)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Disables most XLA optimizations in the files of `RUN_ONCE`; others compile as users do."""
    quick = request.path.stem in RUN_ONCE
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", quick)
    with pytest.MonkeyPatch.context() as patch:
        if quick:
            patch.setattr(compiler, "get_compile_options", get_quick_options)
        yield
    jax.config.update("jax_disable_most_optimizations", before)
