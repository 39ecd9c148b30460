"""Greedy generation on the CPU against Hugging Face `generate` and llama.cpp, float32.

    pip install -e '.[check]' llama-cpp-python gguf && python -m benchmarks.generate [--rounds 5]

All three run the same random weights with 15M and 110M parameters: a prompt of 16 tokens, 256 new
tokens, batch 1 and 8, each in its own process with the same allocator settings and all cores. They
take turns: a round is one generation including the prompt, after one warm-up. llama.cpp is called
through its C interface, with a float32 cache; numpy takes the argmax. Printed: median tokens/s over
the rounds, their range, the median of the rounds' ratios, and the fraction of ids equal to
llama_jax's. Result: benchmarks/results/generate.json.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import Worker, environment, take_turns, write
from llama_jax.config import MODELS

SHAPES, BATCHES, SIDES = ("stories15m", "stories110m"), (1, 8), ("jax", "torch", "llama.cpp")
PROMPT, NEW, CONTEXT = 16, 256, 512


def random_weights(cfg) -> dict:
    """The same weights in every process, {"embed", "q", ...}, layers stacked."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32) * np.float32(0.02)
    letters = dict(embed="VD", q="LDQ", k="LDE", v="LDE", o="LQD", gate="LDF", up="LDF", down="LFD")
    return {name: normal(*cfg.shape(shape)) for name, shape in letters.items()}


def prompts(cfg, batch: int) -> np.ndarray:
    """Random ids [batch, PROMPT]."""
    return np.random.default_rng(1).integers(1, cfg.vocab_size, (batch, PROMPT))


def jax_generate(cfg, batch: int):
    """llama_jax as `LLM.generate` runs it, without detokenization."""
    import jax
    import jax.numpy as jnp

    from llama_jax.generate.decode import DECODE_STEPS_PER_CALL, Request
    from llama_jax.generate.llm import LLM
    from llama_jax.generate.sampler import Greedy, check_options
    from llama_jax.model.llama import ComputeConfig
    from llama_jax.model.params import unstack_layers

    w, ones = random_weights(cfg), lambda *shape: np.ones(cfg.shape(*shape), np.float32)
    block = dict(
        attention={n: w[n] for n in "qkvo"}, mlp={n: w[n] for n in ("gate", "up", "down")},
        attention_norm=ones("LD"), mlp_norm=ones("LD"),
    )  # fmt: skip
    params = jax.tree.map(jnp.asarray, dict(embed=w["embed"], blocks=block, norm=ones("D")))
    params = unstack_layers(params)  # as llama_jax.load does
    compute = ComputeConfig(jnp.dtype("float32"), unroll=True)
    llm = LLM(cfg, params, None, compute, eos_ids=())
    requests = [Request(ids, 0) for ids in prompts(cfg, batch).tolist()]
    options = check_options(NEW, Greedy(), 0)

    def generate():
        rows = [Ids(ids) for ids, _ in requests]
        for _ in llm._decode(requests, rows, options, DECODE_STEPS_PER_CALL):
            pass
        return np.array([row.made for row in rows])

    return generate


class Ids:
    """A sequence without its text."""

    def __init__(self, prompt: list[int]):
        self.prompt, self.made, self.finish = prompt, [], None

    def append(self, ids, logprobs, stop_ids, max_tokens, top_logprobs) -> None:
        """New tokens."""
        self.made += ids.tolist()


def torch_generate(cfg, batch: int):
    """transformers' `generate` with its default cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.ffn_dim,
            num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_kv_heads, max_position_embeddings=cfg.context,
            rms_norm_eps=cfg.norm_eps, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    w, names = random_weights(cfg), dict(q="self_attn.q", k="self_attn.k", v="self_attn.v")
    names |= dict(o="self_attn.o", gate="mlp.gate", up="mlp.up", down="mlp.down")
    state = {"model.embed_tokens.weight": w["embed"], "lm_head.weight": w["embed"]}
    for i in range(cfg.num_layers):
        for short, name in names.items():
            state[f"model.layers.{i}.{name}_proj.weight"] = w[short][i].T.copy()
    missing, extra = model.load_state_dict(
        {k: torch.from_numpy(x) for k, x in state.items()}, strict=False
    )
    assert not extra, extra
    assert all("norm" in name for name in missing), missing
    ids = torch.from_numpy(prompts(cfg, batch))

    @torch.no_grad()
    def generate():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
            min_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[:, PROMPT:].numpy()

    return generate


def _write_gguf(path: Path, cfg) -> None:
    import gguf

    file, w, H = gguf.GGUFWriter(str(path), "llama"), random_weights(cfg), cfg.head_dim
    file.add_context_length(cfg.context)
    file.add_embedding_length(cfg.dim)
    file.add_block_count(cfg.num_layers)
    file.add_feed_forward_length(cfg.ffn_dim)
    file.add_head_count(cfg.num_heads)
    file.add_head_count_kv(cfg.num_kv_heads)
    file.add_layer_norm_rms_eps(cfg.norm_eps)
    file.add_rope_dimension_count(H)
    file.add_rope_freq_base(cfg.rope.theta)
    file.add_vocab_size(cfg.vocab_size)
    file.add_tokenizer_model("none")
    file.add_tensor("token_embd.weight", w["embed"])
    file.add_tensor("output_norm.weight", np.ones(cfg.dim, np.float32))
    names = dict(q="attn_q", k="attn_k", v="attn_v", o="attn_output")
    names |= dict(gate="ffn_gate", up="ffn_up", down="ffn_down")
    for i in range(cfg.num_layers):
        for short, name in names.items():
            x = w[short][i].T
            if short in "qk":  # pairs (i, i + H/2) become adjacent
                x = x.reshape(-1, 2, H // 2, cfg.dim).swapaxes(1, 2).reshape(x.shape)
            file.add_tensor(f"blk.{i}.{name}.weight", np.ascontiguousarray(x))
        for name in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{i}.{name}.weight", np.ones(cfg.dim, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def cpp_generate(cfg, batch: int):
    """llama.cpp, all sequences in one batch per step."""
    import llama_cpp as cpp

    cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        _write_gguf(path, cfg)
        settings = cpp.llama_model_default_params()
        settings.use_mmap = False
        model = cpp.llama_model_load_from_file(str(path).encode(), settings)
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = batch * CONTEXT, batch
    settings.n_batch = settings.n_ubatch = max(batch * PROMPT, 64)
    settings.n_threads = settings.n_threads_batch = os.cpu_count()
    settings.type_k = settings.type_v = cpp.GGML_TYPE_F32
    context = cpp.llama_init_from_model(model, settings)
    batch_of = cpp.llama_batch_init(batch * PROMPT, 0, 1)
    first = prompts(cfg, batch)

    def step(ids_BT, start):
        """The argmax of each sequence's next-token logits."""
        B, T = ids_BT.shape
        batch_of.n_tokens = B * T
        for i, (b, t) in enumerate(np.ndindex(B, T)):
            batch_of.token[i], batch_of.pos[i] = int(ids_BT[b, t]), start + t
            batch_of.n_seq_id[i], batch_of.seq_id[i][0] = 1, b
            batch_of.logits[i] = t == T - 1
        if cpp.llama_decode(context, batch_of):
            raise RuntimeError("llama_decode failed")
        logits = [cpp.llama_get_logits_ith(context, b * T + T - 1) for b in range(B)]
        return [np.ctypeslib.as_array(x, (cfg.vocab_size,)).argmax() for x in logits]

    def generate():
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        out = [step(first, 0)]
        for i in range(NEW - 1):
            out.append(step(np.array(out[-1])[:, None], PROMPT + i))
        return np.stack(out, axis=1)

    return generate


def worker(side: str, shape: str, batch: str) -> None:
    """Generate once per line on standard input and print the seconds; the ids come first."""
    make = {"jax": jax_generate, "torch": torch_generate, "llama.cpp": cpp_generate}[side]
    # The 15M model's own context is too short for prompt and new tokens.
    generate = make(dataclasses.replace(MODELS[shape], context=CONTEXT), int(batch))
    print("ready", json.dumps(np.asarray(generate()).tolist()), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        generate()
        print(time.perf_counter() - start, flush=True)


def compare(shape: str, batch: int, sides: list[str], rounds: int) -> dict:
    """Tokens/s of each side, round by round; prints a line per side."""
    workers = {side: Worker("benchmarks.generate", side, shape, str(batch)) for side in sides}
    ids = {side: np.array(worker.ready) for side, worker in workers.items()}
    rates = {
        side: [batch * NEW / seconds for seconds in values]
        for side, values in take_turns(workers, rounds).items()
    }
    result = {}
    for side, values in rates.items():
        same = float((ids[side] == ids["jax"]).mean())
        ratios = [j / x for j, x in zip(rates["jax"], values, strict=True)]
        ratio = statistics.median(ratios)
        result[side] = {"tokens_per_second": values, "jax_over_it": ratios, "same_ids": same}
        print(
            f"{shape:11} batch {batch}  {side:9} {statistics.median(values):7.0f} tokens/s "
            f"({min(values):.0f}-{max(values):.0f}); llama_jax is {ratio:.2f} x "
            f"({min(ratios):.2f}-{max(ratios):.2f}); same ids {same:.0%}",
            flush=True,
        )
    return result


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--worker", nargs=3)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)
    packages = ["jax", "flax", "torch", "transformers"]
    packages += ["llama-cpp-python"] if "llama.cpp" in arguments.sides else []
    result = environment(tuple(packages))
    for shape in SHAPES:
        for batch in BATCHES:
            cases = compare(shape, batch, arguments.sides, arguments.rounds)
            result[f"{shape}, batch {batch}"] = cases
    write("generate", result)


if __name__ == "__main__":
    main()
