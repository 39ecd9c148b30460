"""Questions per second of multiple choice, beside the model `hf` of lm-evaluation-harness; float32.

    pip install -e '.[check]'
    python -m benchmarks.evaluate MODEL DATA [--rounds 3] [--questions 32]

MODEL is SmolLM2-135M-Instruct in Hugging Face's format. DATA holds hellaswag.jsonl and
mmlu_5shot.jsonl with the keys "query" and "choices". Both sides score the same token ids on the
CPU, in processes that take turns, after one round that is not counted. `hf` runs with the fastest
of several batch sizes. The questions are evenly spaced in the file, so MMLU's five shots are those
of every subject in it.

The floor is the time of the model's matrix products, with every distinct prefix once and without
padding, at the rate of a product of 512 tokens with a matrix of the MLP.

Result: benchmarks/results/evaluate.json.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Worker, environment, spread, take_turns, write

TASKS = ("hellaswag", "mmlu_5shot")
BATCH_SIZES = (1, 8)
TARGETS = {"hellaswag": 1.6, "mmlu_5shot": 3.0}


def requests(model: str, path: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of every choice of evenly spaced questions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = path.read_text().splitlines()
    out = []
    for i in range(min(count, len(lines))):
        question = json.loads(lines[i * len(lines) // count])
        context = tokenizer(question["query"])["input_ids"]
        for choice in question["choices"]:
            ids = tokenizer(f"{question['query']} {choice}")["input_ids"]
            out.append((context, ids[len(context) :]))
    return out


def hf(model: str, todo: list) -> tuple[Callable[[], Any], Callable[[], dict]]:
    """The harness's own model with its fastest batch size."""
    from lm_eval.models.huggingface import HFLM

    lm: Any = HFLM(pretrained=model, device="cpu", dtype="float32")
    pairs = [(("", ""), context, continuation) for context, continuation in todo]

    def run(batch_size: int, part: list) -> list:
        lm.batch_size_per_gpu = batch_size
        return lm._loglikelihood_tokens(part, disable_tqdm=True)

    seconds = {}
    for batch_size in BATCH_SIZES:
        run(batch_size, pairs[:1])
        start = time.process_time()
        run(batch_size, pairs[:16])  # four questions
        seconds[batch_size] = time.process_time() - start
    best = min(seconds, key=lambda x: seconds[x])
    return lambda: [x for x, _ in run(best, pairs)], lambda: {"batch_size": best}


def ours(model: str, todo: list) -> tuple[Callable[[], Any], Callable[[], dict]]:
    """llama_jax, the number of its compiled programs, and the floor."""
    import llama_jax
    from llama_jax.evaluate.likelihood import score_continuations

    engine = llama_jax.load(model, dtype="float32")._engine

    def run() -> list[float]:
        return [x for _, x, _ in sorted(score_continuations(engine, todo))]

    run()
    floor = floor_seconds(engine.cfg, todo)
    return run, lambda: {"programs": len(engine._compiled), "floor_seconds": floor}


def floor_seconds(cfg: Any, todo: list) -> float:
    """Seconds of the matrix products without padding, at the measured rate of one product."""
    import jax
    import jax.numpy as jnp

    inputs = sorted((*context, *continuation[:-1]) for context, continuation in todo)
    shared = 0
    for a, b in itertools.pairwise(inputs):
        shared += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    distinct = sum(map(len, inputs)) - shared
    scored = len({(*c, *y[:i]) for c, y in todo for i in range(len(y))})
    output = cfg.vocab_size * cfg.dim
    flops = 2 * distinct * (cfg.num_params - output) + 2 * scored * output
    x, w = jnp.ones((512, cfg.dim)), jnp.ones((cfg.dim, cfg.ffn_dim))
    product = jax.jit(lambda x, w: x @ w)
    product(x, w).block_until_ready()
    start = time.perf_counter()
    for _ in range(100):
        product(x, w).block_until_ready()
    rate = 100 * 2 * 512 * cfg.dim * cfg.ffn_dim / (time.perf_counter() - start)
    return flops / rate


def worker(side: str, model: str, path: str, count: str) -> None:
    """Score all questions for every second line on standard input, and print the seconds of wall
    time; then those of CPU time."""
    todo = requests(model, Path(path), int(count))
    run, about = {"hf": hf, "llama_jax": ours}[side](model, todo)
    before = about()
    print("ready", json.dumps(before | {"logprobs": run()}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        run()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(wall, flush=True)
        sys.stdin.readline()
        assert about() == before, "a program was compiled after the first round"
        print(cpu, flush=True)


def compare(task: str, model: str, data: Path, rounds: int, count: int) -> dict[str, Any]:
    """Questions per second of both sides, and their ratio in each round."""
    path = data / f"{task}.jsonl"
    count = min(count, len(path.read_text().splitlines()))
    args = (model, str(path), str(count))
    workers = {side: Worker("benchmarks.evaluate", side, *args) for side in ("llama_jax", "hf")}
    ready = {side: w.ready for side, w in workers.items()}
    logprobs = [ready[side].pop("logprobs") for side in workers]
    result: dict[str, Any] = {
        "questions": count,
        "largest_difference_nats": max(abs(a - b) for a, b in zip(*logprobs, strict=True)),
        **{side: ready[side] for side in workers},
    }
    seconds = take_turns(workers, rounds, 2)  # wall time, then CPU time
    for kind, first in (("wall", 0), ("cpu", 1)):
        mine, theirs = (seconds[side][first::2] for side in ("llama_jax", "hf"))
        result[kind] = {
            "llama_jax, questions/s": spread([count / x for x in mine]),
            "hf, questions/s": spread([count / x for x in theirs]),
            "ratio": spread([b / a for a, b in zip(mine, theirs, strict=True)]),
        }
    result["target"] = TARGETS[task]
    print(task, json.dumps(result), flush=True)
    return result


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--worker", nargs=4)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)
    result = environment(("jax", "flax", "torch", "transformers", "lm_eval"))
    result["command"] = (
        f"python -m benchmarks.evaluate MODEL DATA --rounds {arguments.rounds} "
        f"--questions {arguments.questions}"
    )
    for task in arguments.tasks:
        model, count = str(arguments.model), arguments.questions
        result[task] = compare(task, model, arguments.data, arguments.rounds, count)
    write("evaluate", result)


if __name__ == "__main__":
    main()
