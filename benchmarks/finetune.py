"""LoRA on the CPU against PEFT with PyTorch, float32: speed, learning, and answers that end.

    pip install -e '.[check]'
    python -m benchmarks.finetune MODEL DATA [--parts speed torch ours stop] [--steps 24]

MODEL is SmolLM2-135M-Instruct in Hugging Face's format, DATA the 999 records alpaca_en_demo.json.
Both sides train adapters of rank 16 beside all seven matrices, with the model's own chat template
and the loss on answers, on the same packed batches of 2 x 512 tokens (whole examples, attention
inside each), in the same order, with AdamW, clipping and the same learning rates.

speed: tokens (without padding) per second of wall time and of CPU time. The sides take turns in
processes of their own; a round is one step. PyTorch reads the packed batches with a block-diagonal
mask, and in a second comparison examples sorted by length and padded to the longest of their batch,
as a Trainer groups them.
torch, ours: loss on answers of 16 validation sequences before and after training; ours is a run of
`llama_jax.train`. stop: the tuned model answers 50 validation prompts, greedy and sampled at
temperature 1 (its own distribution), with at most 512 tokens, the length of a training sequence.

Result after each part: benchmarks/results/finetune.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, ROOT, Worker, environment, spread, take_turns, write

B, T, RANK, ALPHA = 2, 512, 16, 32
VAL_BATCHES = 8
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


# The run and its data -----------------------------------------------------------------------------


def prepare(model: Path, data: Path, work: Path, steps: int) -> Path:
    """Convert the model, write the recipe and prepare its data; returns the recipe."""
    import tomli_w

    from llama_jax.checkpoint.model_json import read_metadata
    from llama_jax.config import load_recipe, to_dict
    from llama_jax.convert.job import convert
    from llama_jax.train import inputs

    work.mkdir(parents=True, exist_ok=True)
    base = work / "base"
    if not base.exists():
        convert(model, base)
    drop_none = lambda tree: {
        k: drop_none(v) if isinstance(v, dict) else v for k, v in tree.items() if v is not None
    }
    recipe = {
        "model": drop_none(to_dict(read_metadata(base)[0])),
        "data": {
            "sources": {"alpaca": {"path": str(data)}}, "seq_len": T, "packing": "examples",
            "val_fraction": 0.1, "prepared": str(work / "data"),
        },
        "lora": {"rank": RANK, "alpha": float(ALPHA)},
        "optim": {"peak_lr": 5e-4, "warmup_steps": 3, "b2": 0.999, "weight_decay": 0.0},
        "train": {
            "steps": steps, "batch_size": B, "init_from": str(base), "unroll": True, "log_every": 4,
            "eval_batches": VAL_BATCHES,
        },
        "checkpoint": {"dir": str(work / "run")},
    }  # fmt: skip
    path = work / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    checked = load_recipe(path, [])
    inputs.prepare_data(checked, inputs.open_pretrained(checked))
    return path


def batches(recipe: Any) -> Iterator[Any]:
    """The packed training batches in the order of the run, [B, T]."""
    from llama_jax.data.mixture import TrainData, open_mixture

    return TrainData(open_mixture(recipe.data.prepared), recipe.data, B)


def val_batches(recipe: Any, count: int = VAL_BATCHES) -> list[Any]:
    """Validation batches, spread evenly over the split."""
    from llama_jax.data.mixture import eval_batches, open_mixture

    mixture = open_mixture(recipe.data.prepared)
    return list(eval_batches(mixture, recipe.data, B, count, "alpaca"))


def examples(batch: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs, targets and mask of each example; padding counts no target."""
    out = []
    for row in range(B):
        for segment in np.unique(batch.segment_ids_BT[row]):
            here = batch.segment_ids_BT[row] == segment
            arrays = batch.inputs_BT, batch.targets_BT, batch.mask_BT
            example = tuple(x[row, here] for x in arrays)
            if example[2].any():
                out.append(example)
    return out


def num_tokens(batch: Any) -> int:
    """Tokens that are not padding."""
    return sum(len(inputs) for inputs, _, _ in examples(batch))


# Ours ---------------------------------------------------------------------------------------------


def jax_steps(recipe_path: str) -> tuple[Callable[[Any], float], Iterator[Any]]:
    """A function that trains on one batch as `llama_jax.train` does, and the batches."""
    import jax

    from llama_jax import chips
    from llama_jax.config import load_recipe
    from llama_jax.model.sharding import make_mesh
    from llama_jax.train.frozen import load_frozen
    from llama_jax.train.step import compute_config, init_state, make_train_step

    recipe = load_recipe(recipe_path, [])
    mesh = make_mesh(recipe.mesh)
    jax.set_mesh(mesh)
    compute = compute_config(recipe, "cpu")
    base = load_frozen(recipe, compute, mesh)
    state = jax.jit(lambda: init_state(recipe, compute))()
    options = chips.compiler_options("cpu")
    step = jax.jit(make_train_step(recipe, compute), donate_argnums=0, compiler_options=options)

    def train(batch: Any) -> float:
        nonlocal state
        state, metrics = step(state, jax.tree.map(lambda x: x[None], batch), base)
        return float(metrics["loss"])

    return train, batches(recipe)


def jax_val_losses(recipe_path: Path) -> dict[str, float]:
    """Validation loss of the base and of the trained adapter."""
    import jax

    from llama_jax.config import load_recipe
    from llama_jax.convert.adapters import MATRICES, open_adapter
    from llama_jax.model.sharding import make_mesh
    from llama_jax.train.frozen import load_frozen
    from llama_jax.train.step import compute_config, make_eval_step

    recipe = load_recipe(recipe_path, [])
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        compute = compute_config(recipe, "cpu")
        base = load_frozen(recipe, compute, mesh)
        evaluate = jax.jit(make_eval_step(recipe, compute))
        tree: dict[str, Any] = {}
        for target, pair in open_adapter(Path(recipe.checkpoint.dir)).pairs.items():
            module = MATRICES[target].path.split("/")[1]
            tree.setdefault(module, {})[target] = {"a": pair.a_LIr, "b": pair.b_LrO}
        after = jax.tree.map(jax.numpy.asarray, {"blocks": tree})
        before = jax.tree.map(jax.numpy.zeros_like, after)
        total, counted = dict.fromkeys(("before", "after"), 0.0), 0.0
        for batch in progress(val_batches(recipe), "validation, ours"):
            one = jax.tree.map(lambda x: x[None], batch)
            total["before"] += float(evaluate(before, one, base))
            total["after"] += float(evaluate(after, one, base))
            counted += float(batch.mask_BT.sum())
    return {name: x / counted for name, x in total.items()}


# PEFT and PyTorch ---------------------------------------------------------------------------------


def torch_model(model: str) -> Any:
    """The model with new adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = [f"{name}_proj" for name in NAMES]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def packed_loss(model: Any, batch: Any) -> Any:
    """Sum of -log p over the counted targets of a packed batch."""
    import torch

    segments = torch.from_numpy(batch.segment_ids_BT)
    mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    inputs, targets, counted, positions = (
        torch.from_numpy(x)
        for x in (batch.inputs_BT, batch.targets_BT, batch.mask_BT, batch.positions_BT)
    )
    logits = model(
        input_ids=inputs.long(), attention_mask=mask, position_ids=positions.long(), use_cache=False
    ).logits
    return _nll(logits, targets.long(), counted)


def padded_loss(model: Any, batch: list[Any]) -> Any:
    """The same for examples in rows of their own."""
    import torch

    longest = max(len(inputs) for inputs, _, _ in batch)
    pad = lambda x: np.pad(x, (0, longest - len(x)))
    inputs, targets, counted, real = (
        torch.from_numpy(np.stack([pad(x) for x in rows]))
        for rows in zip(*[(*e, np.ones(len(e[0]), np.int64)) for e in batch], strict=True)
    )
    logits = model(input_ids=inputs.long(), attention_mask=real, use_cache=False).logits
    return _nll(logits, targets.long(), counted)


def _nll(logits: Any, targets: Any, counted: Any) -> Any:
    import torch

    labels = torch.where(counted > 0, targets, -100)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def padded_batches(packed: Iterator[Any]) -> Iterator[list[Any]]:
    """Examples sorted by length, in batches of about B T tokens with their padding.

    As a Trainer does it: a group of many examples is sorted, and its batches are shuffled.
    """
    group = sorted((e for _ in range(24) for e in examples(next(packed))), key=lambda e: len(e[0]))
    out: list[list[Any]] = [[]]
    for example in group:
        if (len(out[-1]) + 1) * len(example[0]) > B * T:
            out.append([])
        out[-1].append(example)
    for i in np.random.default_rng(0).permutation(len(out)):
        yield out[i]


def torch_steps(
    recipe_path: str, model: str, padded: bool = False
) -> tuple[Callable[[Any], float], Iterator[Any], Any]:
    """A function that trains on one batch with PEFT and PyTorch, the batches, and the model."""
    import torch

    from llama_jax.config import load_recipe
    from llama_jax.train.optim import make_schedule

    recipe = load_recipe(recipe_path, [])
    optim, peft_model = recipe.optim, torch_model(model)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        trained, betas=(optim.b1, optim.b2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    schedule, number = make_schedule(optim, recipe.train.steps), 0
    loss_sum = padded_loss if padded else packed_loss

    def train(batch: Any) -> float:
        nonlocal number
        counted = sum(float(e[2].sum()) for e in batch) if padded else float(batch.mask_BT.sum())
        loss = loss_sum(peft_model, batch) / counted
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        adamw.param_groups[0]["lr"] = float(schedule(number))
        adamw.step()
        number += 1
        return loss.item()

    packed = batches(recipe)
    return train, padded_batches(packed) if padded else packed, peft_model


def torch_val_loss(model: Any, recipe: Any, title: str) -> float:
    """Validation loss of PEFT's model."""
    import torch

    total = counted = 0.0
    with torch.no_grad():
        for batch in progress(val_batches(recipe), title):
            total += packed_loss(model, batch).item()
            counted += float(batch.mask_BT.sum())
    return total / counted


# The parts ----------------------------------------------------------------------------------------


def worker(side: str, recipe: str, model: str) -> None:
    """Train one step per line on standard input; print its tokens per second of wall time, and per
    second of CPU time after every second line."""
    if side == "jax":
        train, data = jax_steps(recipe)
    else:
        train, data, _ = torch_steps(recipe, model, side == "padded")
    train(next(data))
    print("ready null", flush=True)
    for _ in sys.stdin:
        batch = next(data)
        tokens = sum(len(e[0]) for e in batch) if side == "padded" else num_tokens(batch)
        start, cpu = time.perf_counter(), time.process_time()
        train(batch)
        print(tokens / (time.perf_counter() - start), flush=True)
        sys.stdin.readline()
        print(tokens / (time.process_time() - cpu), flush=True)


def measure_speed(recipe: Path, model: Path, rounds: int) -> dict[str, Any]:
    """Tokens per second of both sides, and the ratio of each round."""
    out: dict[str, Any] = {}
    for other in ("packed", "padded"):
        names = {"jax": "jax", f"torch {other}": other}
        workers = {
            name: Worker("benchmarks.finetune", side, str(recipe), str(model))
            for name, side in names.items()
        }
        # A worker answers with wall time, then with CPU time of the same step.
        values = take_turns(workers, rounds, 2)
        for kind, first in (("wall", 0), ("cpu", 1)):
            speeds = {name: v[first::2] for name, v in values.items()}
            ours, theirs = speeds.values()
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            result = {name: spread(v) for name, v in speeds.items()} | {"ratio": spread(ratios)}
            out[f"{other}, {kind}"] = result | {"rounds": speeds}
            print(f"tokens per second of {kind} time, {other}:", json.dumps(result), flush=True)
    return out


def learn_torch(recipe_path: Path, model: Path) -> dict[str, Any]:
    """Validation loss on answers before and after training with PEFT and PyTorch."""
    from llama_jax.config import load_recipe

    recipe = load_recipe(recipe_path, [])
    train, data, peft_model = torch_steps(str(recipe_path), str(model))
    before = torch_val_loss(peft_model, recipe, "validation, torch")
    start, steps = time.perf_counter(), recipe.train.steps
    losses = [train(next(data)) for _ in progress(range(steps), "training, torch")]
    seconds = time.perf_counter() - start
    after = torch_val_loss(peft_model, recipe, "validation, torch")
    print(f"torch: loss on answers {before:.4f} -> {after:.4f}", flush=True)
    return {"before": before, "after": after, "seconds": seconds, "train_losses": losses}


def learn_ours(recipe_path: Path) -> dict[str, Any]:
    """The same of a run of `llama_jax.train`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llama_jax.train", str(recipe_path)], check=True)
    losses = jax_val_losses(recipe_path) | {"seconds": time.perf_counter() - start}
    print(f"ours: loss on answers {losses['before']:.4f} -> {losses['after']:.4f}", flush=True)
    return losses


def stop(recipe_path: Path, count: int = 50, max_new_tokens: int = T) -> dict[str, Any]:
    """How many answers of the tuned model to validation prompts end by themselves."""
    import llama_jax
    from llama_jax.config import load_recipe

    recipe = load_recipe(recipe_path, [])
    held_out = [e for batch in val_batches(recipe, 10_000) for e in examples(batch)][:count]
    # The prompt ends before the first target that counts.
    prompts = [inputs[: int(mask.argmax()) + 1].tolist() for inputs, _, mask in held_out]
    llm = llama_jax.load(recipe.checkpoint.dir)
    out: dict[str, Any] = {"prompts": count, "max_new_tokens": max_new_tokens}
    samplings = {"greedy": llama_jax.Greedy(), "temperature 1": llama_jax.Sample(temperature=1.0)}
    for name, sampling in samplings.items():
        answers = [
            answer
            for i in progress(range(0, count, 25), f"answers, {name}")
            for answer in llm.generate(
                prompts[i : i + 25], max_new_tokens=max_new_tokens, sampling=sampling, logprobs=True
            )
        ]
        stopped = sum(answer.finish == "end" for answer in answers)
        print(f"answers that end by themselves, {name}: {stopped} of {count}", flush=True)
        out[name] = {"stopped": stopped, "first": [answer.text for answer in answers[:3]]}
    return out


def progress(items: Any, title: str) -> Any:
    """A progress bar over these items."""
    from tqdm import tqdm

    return tqdm(items, desc=title, disable=None)


def main() -> None:
    """Measure the parts and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, default=ROOT / "checkpoints/finetune-benchmark")
    parser.add_argument("--parts", nargs="+", default=["speed", "torch", "ours", "stop"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=3)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(arguments.work / "compiled"))
    recipe = prepare(arguments.model, arguments.data, arguments.work, arguments.steps)
    path = RESULTS / "finetune.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    versions = ("jax", "flax", "optax", "torch", "transformers", "peft")
    for part in arguments.parts:
        run = {
            "speed": lambda: measure_speed(recipe, arguments.model, arguments.rounds),
            "torch": lambda: learn_torch(recipe, arguments.model),
            "ours": lambda: learn_ours(recipe),
            "stop": lambda: stop(recipe),
        }[part]
        result[part] = environment(versions) | run()
        result[part]["steps"] = arguments.steps
        result.pop("ours_over_torch", None)
        sides = [result[side] for side in ("ours", "torch") if side in result]
        if len(sides) == 2 and sides[0]["steps"] == sides[1]["steps"]:
            result["ours_over_torch"] = result["ours"]["after"] / result["torch"]["after"]
            print(f"loss after training, ours / torch: {result['ours_over_torch']:.4f}")
        write("finetune", result)


if __name__ == "__main__":
    main()
