"""The plans behind ``python -m llama_jax.plan``; each prints text and returns the values."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from llama_jax.config import ConfigError, Recipe, load_recipe
from llama_jax.plan import inference
from llama_jax.plan.machines import Machine, PlanError, parse_machine


def plan_inference(
    name: str, on: str, dtype: str, context: int | None, batch: int, cache: str = "bfloat16"
) -> dict[str, Any]:
    """Plan generation with a known model.

    Args:
      name: of the model.
      on: name of the machine.
      dtype: of the weights.
      context: positions per sequence; None: the model's, at most 4096.
      batch: sequences at a time.
      cache: dtype of keys and values, "bfloat16" or "int8".

    Raises:
      PlanError: no such model or machine, or one does not fit the other.
    """
    cfg, machine = inference.model_config(name), parse_machine(on, inference=True)
    f = inference.plan(cfg, machine, dtype, context or min(cfg.context, 4096), batch, cache)
    print(inference.to_text(f, f"inference with {name} on {machine.name}: {machine.rates()}"))
    return {"model": name} | f


def plan_training(
    path: str,
    overrides: list[str],
    on: str,
    search: bool = False,
    watts: float | None = None,
    price: float | None = None,
) -> tuple[dict[str, Any], Recipe]:
    """Compile a recipe's train step for a machine and report what it costs.

    Args:
      path: the recipe.
      overrides: settings as section.key=value.
      on: name of the machine.
      search: compile several meshes and numbers of microbatches; report the fastest that fits.
      watts: power of a chip; None: the table's.
      price: price per chip-hour.

    Returns:
      (values of the plan, the recipe as compiled: adapted to the machine, or found by the search).

    Raises:
      PlanError: no such machine, or its compiler is not installed or fails.
      ConfigError: the recipe is invalid, or does not match the machine.
    """
    recipe, machine = load_recipe(path, overrides), parse_machine(on)
    prepare_jax(machine.chips if machine.chip.platform == "cpu" else 1)
    with quiet():
        from llama_jax.model.lora import num_adapter_params
        from llama_jax.model.sharding import changed_settings
        from llama_jax.plan.compile import compile_step
        from llama_jax.plan.report import metrics, to_text

        if search:
            compiled = _search(recipe, machine, path)
        else:
            print(f"compiling {path} for {machine.name} ...", file=sys.stderr, flush=True)
            compiled = compile_step(recipe, machine)
        changes = changed_settings(recipe, compiled.recipe)
    if compiled.recipe.train.remat != recipe.train.remat:
        remat = compiled.recipe.train.remat
        changes["train.remat"] = remat if isinstance(remat, str) else _list(remat)
    recipe, train = compiled.recipe, compiled.recipe.train
    sizes = " x ".join(f"{a} {n}" for a, n in compiled.mesh.items() if n > 1) or "one device"
    count = recipe.model.num_params
    size = f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
    adapters = ""
    if recipe.lora:
        trained = num_adapter_params(recipe.model, recipe.lora)
        adapters = f" and {trained / 1e6:.3g}M of adapters"
    title = (
        f"{path} on {machine.name}: {machine.chips} x {machine.chip.title}\n"
        f"{size} parameters{adapters}, mesh {sizes} ({recipe.mesh.preset}), "
        f"{train.batch_size} sequences of {recipe.data.seq_len} tokens per step, "
        f"{train.gradient_accumulation} microbatch(es)"
    )
    if changes:
        source = "found by the search" if search else "adapted to the machine, as training does"
        title += f"\n{source}: " + " ".join(f"{k}={v}" for k, v in changes.items())
    f = metrics(compiled, watts, price)
    print(to_text(f, title, machine.rates()))
    return {"recipe": path, "overrides": overrides} | f, recipe


def _list(names: tuple[str, ...]) -> str:
    return json.dumps(names, separators=(",", ":"))


def _search(recipe: Recipe, machine: Machine, path: str) -> Any:
    """The fastest plan that fits; if none does, the one with the lowest peak memory."""
    from llama_jax.plan.search import search

    fitting, nearest = search(recipe, machine, lambda text: tqdm.write(text, file=sys.stderr))
    if fitting:
        print(f"the fastest of {len(fitting)} that fit:\n")
        return fitting[0]
    if nearest is None:
        raise PlanError(
            f"{path} on {machine.name}: no mesh of {machine.devices} devices divides the batch of "
            f"{recipe.train.batch_size} and the width of {recipe.model.dim}"
        )
    print(f"nothing fits on {machine.name}; the lowest peak memory:\n")
    return nearest


def prepare_jax(cpus: int) -> None:
    """Configure JAX, before it starts, for a process that only compiles.

    It uses no TPU or GPU, queries no metadata server, and shares libtpu with other processes.
    """
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_ACCELERATOR_TYPE": "",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    import jax

    with contextlib.suppress(RuntimeError):  # JAX has started already
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpus)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the compilers' libraries write to file descriptor 2; `sys.stderr` still works.

    The hidden text is printed if an unexpected exception ends the block.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        stderr, sys.stderr = sys.stderr, os.fdopen(os.dup(terminal), "w", buffering=1)
        try:
            yield
        except (ConfigError, PlanError, KeyboardInterrupt):
            raise
        except BaseException:
            hidden.seek(0)
            os.write(terminal, hidden.read()[-20_000:])
            raise
        finally:
            sys.stderr.close()
            sys.stderr = stderr
            os.dup2(terminal, 2)
            os.close(terminal)
