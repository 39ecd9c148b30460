"""Time until a new process prints its first token, on this machine's CPU.

    pip install -e '.[check]' && python -m benchmarks.first_token [--rounds 7]

The model has the 30 layers of SmolLM2-135M, random weights and a tokenizer of 32,000 pieces
(SmolLM2 has 49,152) trained on Python's library, as our checkpoint and converted to the Hugging
Face format. Measured: the wall time of a whole process that generates one token from a short
prompt. `python -m llama_jax.generate` with an empty compilation cache and with a filled one take
turns with transformers' `generate`. The files have just been written, so they are in the page
cache. Result: benchmarks/results/first_token.json.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from benchmarks.common import environment, write
from llama_jax.checkpoint.checkpoints import Checkpoints
from llama_jax.checkpoint.model_json import write_model_files
from llama_jax.config import MODELS, ModelConfig
from llama_jax.model.llama import ComputeConfig, Llama
from llama_jax.model.params import params_of
from llama_jax.prepare.tokenizer import train_tokenizer

PROMPT = "def main("
PEER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0]))
"""


def model() -> ModelConfig:
    """SmolLM2-135M with a smaller vocabulary."""
    sizes = dict(dim=576, num_layers=30, num_heads=9, num_kv_heads=3, ffn_dim=1536)
    return dataclasses.replace(MODELS["stories110m"], **sizes)


def make(folder: Path) -> Path:
    """Write a checkpoint with random weights."""
    cfg = model()
    folder.mkdir()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    tokenizer = train_tokenizer(texts, cfg.vocab_size, folder / "tokenizer.model")
    params = params_of(Llama(cfg, ComputeConfig(jnp.dtype("float32")), nnx.Rngs(0)))
    saver = Checkpoints(folder, keep=1)
    saver.save(0, params, {"count": jnp.zeros(())}, {})
    saver.close()
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    write_model_files(folder, cfg, tokenizer.path, ids)
    return folder


def seconds(command: list[str], env: dict[str, str]) -> float:
    """Wall time of a Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        ours = make(here / "ours")
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(here / "cache")}
        theirs = here / "theirs"
        subprocess.run(
            [sys.executable, "-m", "llama_jax.convert", str(ours), str(theirs), "--to", "hf"],
            check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        jax_command = ["-m", "llama_jax.generate", str(ours), PROMPT, "--max-new-tokens", "1"]
        cold, warm, peer = [], [], []
        for i in range(rounds):
            empty = env | {"XDG_CACHE_HOME": str(here / f"cache{i}")}
            cold.append(seconds(jax_command, empty))
            warm.append(seconds(jax_command, empty))
            peer.append(seconds(["-c", PEER, str(theirs), PROMPT], env))
    for name, times in (("cold", cold), ("warm", warm), ("transformers", peer)):
        print(f"{name:13} {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})")
    question = (
        f"seconds of a process that prints one new token, {model().num_params / 1e6:.0f}M "
        "parameters in 30 layers, float32"
    )
    result = {"cold": cold, "warm": warm, "transformers": peer}
    write("first_token", {"question": question, **result, **environment()})


if __name__ == "__main__":
    main()
