"""Compare the logits of a converted model with transformers', far past the first positions.

In comes a finished conversion, out comes a sentence. A wrong rotary permutation, frequency or
scaling keeps every bit and still makes another model; this notices. The model is cut to its first
layers, tokens and feed-forward units, to fit the bound on memory. Needs torch and transformers.

    python -m llama_jax.convert SOURCE DESTINATION --verify
"""

import importlib.util
import json
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert import foreign, formats
from llama_jax.convert.layouts import Found, changed
from llama_jax.convert.tensors import TorchWeights, Unit, rows_per_chunk, units
from llama_jax.convert.transfer import ConvertError, human

_TOKENS = 96
_VOCAB = 512
_FFN = 2048
_PROGRAMS = 600 << 20
"""bytes of torch, transformers and JAX themselves"""


Dtypes = dict[str, np.dtype]


def compare_logits(source: Found, result: Found, dtypes: Dtypes, max_memory: int) -> str:
    """What was compared; raises ConvertError when the logits of the two sides differ.

    transformers computes the side that is a Hugging Face folder, from its files as they are (or the
    source, put under its names); our model computes the other. Both in float32, of weights rounded
    to `dtypes` (of each row of the table), the result's.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return "logits not compared: torch and transformers are not installed"
    theirs, ours = (result, source) if result.kind == "hf" else (source, result)
    cfg = theirs.cfg
    if cfg.dim % cfg.num_heads:
        return "logits not compared: transformers refuses a dim that is no multiple of the heads"
    for layers in (2, 1):
        less = dict(num_layers=min(layers, cfg.num_layers), vocab_size=min(_VOCAB, cfg.vocab_size))
        less["ffn_dim"] = min(_FFN, cfg.ffn_dim)
        cut = changed(cfg, **less)
        if (need := 8 * cut.num_params + _PROGRAMS) <= max_memory:  # two models of float32
            break
    else:
        return f"logits not compared: they take {human(need)}, more than --max-memory"
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cut.vocab_size, (1, _TOKENS))
    # Past 2,048 in any case, and distances as well as positions; beyond 32,768 the rounding of an
    # angle to float32 is no longer small.
    last = min(max(cfg.context, 4096), 32768) - 1
    positions = np.linspace(0, last, _TOKENS).astype(np.int64)[None]
    one = _their_logits(theirs, cut, dtypes, tokens, positions)
    other = _our_logits(ours, changed(ours.cfg, **less), dtypes, tokens, positions)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return "logits not compared: they are not finite"
    error, size = np.abs(one - other).max(), np.abs(one).max()
    what = f"logits at {_TOKENS} positions up to {positions.max()}, {cut.num_layers} layer(s)"
    if error > 1e-3 * size:
        raise ConvertError(
            f"verify: {what} differ from transformers' by {error:.2g} (they reach {size:.2g}): "
            "the tensors are equal, so the settings or the rotary layout are wrong"
        )
    return f"{what}: within {error:.1e} of transformers' (they reach {size:.2g})"


def _tensors(found: Found, cut: ModelConfig, dtypes: Dtypes) -> dict[str, np.ndarray]:
    """{unit name: matrix in our layout} of the cut model, float32; read in pieces."""
    out = {}
    for unit in units(cut):
        rows = unit.shape(found.cfg)[0]
        keep_rows, keep = unit.shape(cut)
        step = rows_per_chunk(unit, found.cfg, found.weights.dtype(unit))
        pieces = [
            _rounded(found.weights.read(unit, i, min(i + step, rows))[:, :keep], unit, dtypes)
            for i in range(0, min(rows, keep_rows), step)
        ]
        out[unit.name] = np.concatenate(pieces)[:keep_rows]
    return out


def _rounded(piece: np.ndarray, unit: Unit, dtypes: Dtypes) -> np.ndarray:
    return piece.astype(dtypes[unit.row.path]).astype(np.float32)


def _our_logits(found: Found, cut: ModelConfig, dtypes: Dtypes, tokens, positions) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    from llama_jax.model.llama import ComputeConfig
    from llama_jax.model.params import merge, structure

    tensors = _tensors(found, cut, dtypes)
    tree: dict[str, Any] = {}
    for row in {u.row: 0 for u in units(cut)}:
        *parents, name = row.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        shape = cut.shape(row.letters)
        if row.stacked:
            layers = [tensors.pop(f"{row.path}/{i}") for i in range(cut.num_layers)]
            node[name] = jnp.asarray(np.stack(layers).reshape(cut.num_layers, *shape))
        else:
            node[name] = jnp.asarray(tensors.pop(row.path).reshape(shape))
    compute = ComputeConfig(jnp.dtype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        llama = merge(structure(cut, compute), tree)
        arguments = jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)
        return np.asarray(llama(arguments[0], positions_BT=arguments[1]))


def _their_logits(found: Found, cut: ModelConfig, dtypes: Dtypes, tokens, positions) -> np.ndarray:
    import torch
    import transformers

    if found.kind == "hf":
        settings = json.loads((found.path / "config.json").read_text())
    else:
        settings = foreign.hf_from_model(found.cfg, "float32", {})
    settings |= dict(num_hidden_layers=cut.num_layers, vocab_size=cut.vocab_size)
    settings |= dict(intermediate_size=cut.ffn_dim)
    settings |= dict(torch_dtype="float32", dtype="float32", attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    rotary = model.model.rotary_emb  # its buffers are no weights: made anew
    model.model.rotary_emb = type(rotary)(config=model.config)
    state = {n: torch.from_numpy(w) for n, w in _their_state(found, cut, dtypes).items()}
    if cut.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        # The mask says that the spread positions are one sequence and not many packed ones.
        mask = torch.ones(tokens.shape, dtype=torch.long)
        ids, where = torch.from_numpy(tokens), torch.from_numpy(positions)
        return model.eval()(input_ids=ids, position_ids=where, attention_mask=mask).logits.numpy()


def _their_state(found: Found, cut: ModelConfig, dtypes: Dtypes) -> dict[str, np.ndarray]:
    """Hugging Face's names, torch's [out, in]; from its own files as they are."""
    if found.kind != "hf":
        matrices = _tensors(found, cut, dtypes)
        return {
            u.torch_name(False): np.ascontiguousarray(
                matrices[u.name].reshape(-1) if u.row.letters == "D"
                else matrices[u.name] if u.row.path == "embed" else matrices[u.name].T
            )
            for u in units(cut)
        }  # fmt: skip
    assert isinstance(found.weights, TorchWeights)
    state = {}
    for unit in units(cut):
        region = found.weights.parts[unit.name][0].region
        whole = formats.view(region, formats.map_file(region.path))
        name = unit.torch_name(False)
        state[name] = _rounded(whole[tuple(map(slice, unit.torch_shape(cut)))], unit, dtypes)
    return state
