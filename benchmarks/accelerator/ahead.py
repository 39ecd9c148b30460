"""Compiles what the steps run, in full size, for an absent GPU.

    python -m benchmarks.accelerator.ahead [--chip h100] [NAME ...]

It prints compile time and memory of each program, and fails if one does not compile or needs more
memory than the chip has. NAME: only programs whose name contains it.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import SingleDeviceSharding

from benchmarks.accelerator import (
    attention,
    correctness,
    decode_attention,
    generate,
    products,
    train,
)
from benchmarks.accelerator.common import FULL, one_line
from llama_jax import chips
from llama_jax.config import MODELS
from llama_jax.generate import decode as sampling
from llama_jax.generate.sampler import Greedy, settings_of
from llama_jax.model.llama import KVCache
from llama_jax.model.params import structure, unstack_layers
from llama_jax.model.quantize import quantize
from llama_jax.model.sharding import make_mesh
from pallas_kernels import Rope
from pallas_kernels.rotary_attention import _IMPLEMENTATIONS as ATTENTION
from pallas_kernels.rotary_decode_attention import _IMPLEMENTATIONS as DECODE

Programs = Iterator[tuple[str, Callable[[], Any]]]
"""Name of each program, and the function that compiles it"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator.ahead")
    parser.add_argument("names", nargs="*", default=[""], metavar="NAME")
    parser.add_argument("--chip", default="h100")
    args = parser.parse_args()
    device, failed = chips.topology(args.chip)[0], 0
    # XLA compiles cuDNN's attention without cuDNN; JAX looks for library and GPU first.
    fused_attention_stablehlo.check_cudnn_version = lambda: 91000
    fused_attention_stablehlo.check_compute_capability = lambda _: True
    for name, compile_ in programs(device):
        if not any(part in name for part in args.names):
            continue
        start = time.perf_counter()
        try:
            gib = train.peak_gib(compile_().memory_analysis())
            fits = gib < chips.CHIPS[args.chip].memory
            said = f"{gib:6.2f} GiB{'' if fits else ': MORE THAN THE CHIP HAS'}"
        except NotImplementedError as e:
            fits, said = True, f"cannot: {e}"
        except Exception as e:
            fits, said = False, f"FAILED: {one_line(e)}"
        failed += not fits
        print(f"{name:<70} {time.perf_counter() - start:5.1f} s {said}", flush=True)
    sys.exit(1 if failed else 0)


def programs(device: Any) -> Programs:
    """Everything that the steps compile, except references."""
    with chips.compile_for(device):
        place = functools.partial(_place, device)
        yield from _correctness(place)
        yield from _attention(place)
        yield from _decode_attention(place)
        yield from _products(place)
        for model in FULL.models:
            yield from _generate(place, model)
        names = correctness.kernels(ATTENTION)
    for attention_name in names:
        for remat in ("matmuls", "none"):
            yield (
                f"train {FULL.train_model}, remat {remat}, {attention_name}",
                functools.partial(_train, device, remat, attention_name),
            )


def _place(device: Any, tree: Any) -> Any:
    where = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def _compile(function: Any, *arguments: Any, donated: tuple[int, ...] = ()) -> Any:
    return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


def _bfloat16(shapes: Any) -> list:
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def _correctness(place: Any) -> Programs:
    for case, make in correctness.attention_cases(FULL).items():
        arrays, more = jax.eval_shape(lambda make=make: make(0)[:2])
        static = make(0)[2]
        for name in correctness.kernels(ATTENTION):
            call = functools.partial(correctness.attention_program, static, name, None)
            yield (
                f"right: attention {name}, {case}",
                functools.partial(_compile, call, *place((*arrays, more))),
            )
    for case, (T, S, H, lengths) in correctness.decode_cases(FULL).items():
        B, N, K, L = len(lengths), 8, 2, 2
        arrays = _bfloat16([(B, T, N, H), *[(B, T, K, H)] * 2, *[(L, B, K, S, H)] * 2])
        arrays.append(jax.ShapeDtypeStruct((B,), jnp.int32))
        for name in correctness.kernels(DECODE):
            call = functools.partial(correctness.decode_program, name, None)
            yield (
                f"right: decode {name}, {case}",
                functools.partial(_compile, call, *place(arrays), donated=(3, 4)),
            )


def _attention(place: Any) -> Programs:
    s = FULL
    for T in s.lengths:
        positions = jax.ShapeDtypeStruct((s.tokens // T, T), jnp.int32)
        rope = Rope(jax.ShapeDtypeStruct((s.heads[2] // 2,), jnp.float32), 1.0)
        inputs = (
            *place((*_bfloat16(attention.shapes(s, T)), positions)),
            place(rope._replace(scale=jnp.float32(1))),
        )
        for way in attention.WAYS:
            for name, attend, blocks in attention.implementations():

                def compile_(way=way, attend=attend, blocks=blocks, inputs=inputs):
                    with attention.use_blocks(blocks):
                        return _compile(attention.program(way, attend), *inputs)

                yield f"attention T {T}, {way}: {name}", compile_


def _decode_attention(place: Any) -> Programs:
    s = FULL
    for B in s.decode_rows:
        for S in s.decode_lengths:
            lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
            inputs = place((*_bfloat16(decode_attention.shapes(s, B, S)), lengths))
            for name in correctness.kernels(DECODE):
                call = decode_attention.program(s, name, decode_attention.layers(s, B, S))
                yield (
                    f"decode attention B {B}, S {S}: {name}",
                    functools.partial(_compile, call, *inputs, donated=(3, 4)),
                )


def _products(place: Any) -> Programs:
    s = FULL
    for number in s.products_rows:
        for kind in products.KINDS:
            matrices = jax.eval_shape(
                lambda ws, kind=kind: [products.quantizer(kind)(w) for w in ws],
                _bfloat16([s.matrix] * s.num_matrices),
            )
            x = _bfloat16([(s.num_matrices, number, s.matrix[0])])[0]
            yield (
                f"product of {number} rows, {kind}",
                functools.partial(_compile, products.program, *place((x, matrices))),
            )


def _generate(place: Any, model: str) -> Programs:
    cfg, compute = MODELS[model], generate.compute_config("gpu")
    weights = generate.weight_shapes(cfg, compute)
    largest = max(jax.tree.leaves(weights), key=lambda x: x.size).shape
    key = jax.eval_shape(lambda: jax.random.key(0))
    yield (
        f"generate {model}, largest random matrix",
        lambda: _compile(functools.partial(generate.matrix, shape=largest), place(key)),
    )
    structure_of = structure(cfg, compute, unstacked=True)
    for kind in ("bfloat16", "int8"):
        params = jax.eval_shape(
            lambda p, kind=kind: unstack_layers(p if kind == "bfloat16" else quantize(p, kind)),
            weights,
        )
        for batch in FULL.batches:

            def compile_decode(params=params, batch=batch):
                state = jax.eval_shape(lambda: _state(cfg, compute, batch))
                settings = jax.eval_shape(lambda: settings_of(Greedy()))
                scalar = jax.ShapeDtypeStruct
                arguments = place((
                    params, state, settings, scalar((8,), jnp.int32), scalar((), jnp.int32),
                    scalar((), jnp.bool),
                ))  # fmt: skip
                call = functools.partial(sampling.decode, structure_of, num_top=0)
                return _compile(call, *arguments, donated=(1,))

            yield f"generate {model}, {kind}, batch {batch}", compile_decode


def _state(cfg: Any, compute: Any, batch: int) -> Any:
    cache = KVCache.empty(cfg, 1, FULL.prompt + generate.RESERVED, compute.dtype)
    return sampling._empty_state(compute, batch, jnp.zeros(cfg.vocab_size), cache)


def _train(device: Any, remat: str, attention_name: str) -> Any:
    recipe = train.recipe_of(FULL, remat, attention_name)
    mesh = make_mesh(recipe.mesh, [device])
    with jax.set_mesh(mesh):
        return train.program(recipe, "gpu").lower(*train.arguments(recipe, mesh, "gpu")).compile()


if __name__ == "__main__":
    main()
