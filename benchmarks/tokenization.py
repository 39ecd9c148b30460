"""Tokenization speed of `llama_jax.prepare` against SentencePiece in one thread.

`prepare_mixture` does everything on a file (read, hash, encode on all cores, write, fsync);
SentencePiece encodes the same documents from memory, one after the other in one thread.
ratio = speed of prepare / (cores x speed of SentencePiece). Both take turns in one process. Other
load on the machine lowers the ratio; the ratio of CPU times shows by how much.

    python -m benchmarks.tokenization      writes benchmarks/results/tokenization.json
"""

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.common import environment, spread, write
from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.prepare.text import find_files, read_documents
from llama_jax.prepare.tokenizer import train_tokenizer

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
        "question": "prepare (end to end) / (cores x SentencePiece in one thread), bytes/s",
        "ratio": spread(ratios),
        "cpu_time_ratio": spread([r["sentencepiece"][1] / r["prepare"][1] for r in runs]),
        "prepare_MB_s": spread(prepare),
        "sentencepiece_one_process_MB_s": spread(sentencepiece),
        "cores": cores,
        "text": f"standard library x {COPIES}, {megabytes:.1f} MB, {len(texts)} documents",
        "pieces": VOCAB_SIZE,
        **environment(),
    }
    print(json.dumps(result, indent=1))
    write("tokenization", result)


def measure(
    path: Path, texts: list[str], tokenizer: Tokenizer, out: Path, turn: int
) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of SentencePiece and of prepare; which comes first alternates."""
    sources = {"code": SourceConfig(path=str(path))}
    cfg = DataConfig(sources=sources, tokenizer=str(tokenizer.path), seq_len=1)
    seconds = {}
    for name in ("sentencepiece", "prepare") if turn % 2 else ("prepare", "sentencepiece"):
        start, cpu = time.perf_counter(), time.process_time()
        if name == "prepare":
            prepare_mixture(cfg, VOCAB_SIZE, out)
        else:
            for text in texts:
                tokenizer._processor.encode(text, add_bos=True, add_eos=True)
        seconds[name] = time.perf_counter() - start, time.process_time() - cpu
    return seconds


if __name__ == "__main__":
    main()
