"""Shapes, our implementations and other public kernels for the kernel benchmark."""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Rope, rotary_attention, rotary_decode_attention
from pallas_kernels.rotary_attention import rotate

TOKENS = 16384
MODELS = {"7B": (32, 32, 128), "8B": (32, 8, 128), "70B": (64, 8, 128)}  # N, K, H
LENGTHS = (2048, 4096, 8192, 16384)
CACHES = ((16, 4096), (16, 16384), (2, 131072))  # B, S for decoding, with the heads of the 8B


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of both timing and compiling."""
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, help="heads of these models"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), help="sequence lengths"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder of results"
    )
    return parser


def keep(args, machine: str, rows: list[dict[str, Any]]) -> None:
    """Writes the rows with machine and versions to a results file."""
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("libtpu"):
        versions["libtpu"] = importlib.metadata.version("libtpu")
    kept = {
        "machine": machine, **versions, "command": "python -m benchmarks.kernels",
        "models": args.models, "rows": rows,
    }  # fmt: skip
    name = "kernels-" + re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".json"
    path = args.results / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{machine}, {', '.join(f'{k} {v}' for k, v in versions.items())}: {path}\n")


def cases(args) -> Iterator[tuple[str, int, bool]]:
    """(model, T, documents) for every model and length; the 8B also with packed documents."""
    for model in args.models:
        for T in args.lengths:
            yield model, T, False
            if model == "8B":
                yield model, T, True


def shapes(model: str, T: int) -> dict[str, tuple[int, ...]]:
    N, K, H = MODELS[model]
    B = max(1, TOKENS // T)
    return dict(q=(B, T, N, H), k=(B, T, K, H), v=(B, T, K, H), d_out=(B, T, N, H))


def rope_of(H: int) -> Rope:
    return Rope(jnp.asarray(5e5 ** (-np.arange(0, H, 2) / H), jnp.float32), 1.0)


def candidates(op: str, where: str, others: bool = True) -> dict[str, Callable[..., Any]]:
    """name -> function(q, k, v, positions, rope, ids): ours for the platform, then public ones."""
    table = importlib.import_module(f"pallas_kernels.{op}")._IMPLEMENTATIONS
    ours = [name for name, (platforms, _) in table.items() if where in platforms]
    found: dict[str, Callable[..., Any]] = {
        name: functools.partial(_ours, name) for name in ours if name != "xla" or len(ours) == 1
    }
    if others and op == "rotary_attention":
        if where == "tpu":
            found["splash"] = _splash
        if importlib.util.find_spec("tokamax"):
            found["tokamax"] = _tokamax
    return found


def _ours(implementation, q, k, v, positions, rope, ids):
    return rotary_attention(
        q, k, v, positions, rope, segment_ids_BT=ids, implementation=implementation
    )


def _tokamax(q, k, v, positions, rope, ids):
    if ids is not None:
        raise NotImplementedError("documents are not benchmarked with tokamax")
    q, k = rotate(q, positions, rope), rotate(k, positions, rope)
    return importlib.import_module("tokamax").dot_product_attention(q, k, v, is_causal=True)


def _splash(q, k, v, positions, rope, ids):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, H = q.shape[1:]
    q, k = rotate(q, positions, rope) * H**-0.5, rotate(k, positions, rope)
    block = min(1024, T)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(256, T), block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=min(256, T), block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    by_head = lambda x: x.swapaxes(1, 2)
    ids = None if ids is None else splash.SegmentIds(ids, ids)
    return by_head(jax.vmap(kernel)(by_head(q), by_head(k), by_head(v), ids))


def both_ways(attend, q, k, v, d_out, *rest):
    """(out, d_q, d_k, d_v)."""
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
    return out, *pull(d_out)


def decode(implementation, q, k, v, cache_k, cache_v, lengths, rope):
    return rotary_decode_attention(
        q, k, v, cache_k, cache_v, 0, lengths, rope, implementation=implementation
    )
