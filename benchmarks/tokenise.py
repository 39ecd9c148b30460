"""How fast is prepare, against SentencePiece alone in one process?

The whole of ``prepare_mixture`` on a file (read, hash, encode on every core,
write, sync) against encoding the same texts, held in memory, one after the other in one thread:
ratio = speed of prepare / (cores x speed of SentencePiece). Both in one run, in turns. On a
machine that others use as well the ratio is lower; the ratio of CPU times shows by how much.

    python -m benchmarks.tokenise      writes benchmarks/results/tokenise.json
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.prepare.text import find_files, read_documents
from llama_jax.prepare.tokenizer import train_tokenizer

RESULTS = Path(__file__).parent / "results"
VOCAB_SIZE = 8192
COPIES = 3
REPEATS = 7


def main() -> None:
    """Measure and write the result."""
    source = find_files("code", "python:code")
    texts = [d.text for d in read_documents(source, source.files)]
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder, "code.jsonl"), Path(folder, "tokenizer.model")
        texts = [f"# {copy}\n{text}" for copy in range(COPIES) for text in texts]
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        tokenizer = train_tokenizer(texts[: len(texts) // COPIES], VOCAB_SIZE, model)
        runs = [measure(path, texts, tokenizer, Path(folder, str(i)), i) for i in range(REPEATS)]
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    sentencepiece = [megabytes / r["sentencepiece"][0] for r in runs]
    prepare = [megabytes / r["prepare"][0] for r in runs]
    ratios = [b / a / cores for a, b in zip(sentencepiece, prepare, strict=True)]
    result = {
        "question": "prepare (end to end) / (cores x SentencePiece in one process), bytes a second",
        "ratio": spread(ratios),
        "cpu_time_ratio": spread([r["sentencepiece"][1] / r["prepare"][1] for r in runs]),
        "prepare_MB_s": spread(prepare),
        "sentencepiece_one_process_MB_s": spread(sentencepiece),
        "cores": cores,
        "text": f"standard library x {COPIES}, {megabytes:.1f} MB, {len(texts)} documents",
        "pieces": VOCAB_SIZE,
        **machine(),
    }
    write("tokenise", result)


def measure(
    path: Path, texts: list[str], tokenizer: Tokenizer, out: Path, turn: int
) -> dict[str, tuple[float, float]]:
    """Seconds on the clock and of CPU of SentencePiece in one thread and of prepare, in turns."""
    sources = {"code": SourceConfig(path=str(path))}
    cfg = DataConfig(sources=sources, tokenizer=str(tokenizer.path), seq_len=1)
    seconds = {}
    for what in ("sentencepiece", "prepare") if turn % 2 else ("prepare", "sentencepiece"):
        start, cpu = time.perf_counter(), time.process_time()
        if what == "prepare":
            prepare_mixture(cfg, VOCAB_SIZE, out)
        else:
            for text in texts:
                tokenizer._processor.encode(text, add_bos=True, add_eos=True)
        seconds[what] = time.perf_counter() - start, time.process_time() - cpu
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes, three digits."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {k: float(f"{v:.3g}") for k, v in figures.items()} | {"runs": len(values)}


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), model)
    packages = ("sentencepiece", "numpy", "grain", "jax")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "cpu": model,
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "load_before": [round(x, 2) for x in LOAD],
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


LOAD = os.getloadavg()


def write(name: str, result: dict[str, Any]) -> None:
    """Print the result and keep it."""
    text = json.dumps(result, indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
