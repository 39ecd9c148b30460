"""Compare the logits of a converted model with transformers' at positions over the whole context.

A wrong rotary permutation, frequency or scaling changes the model but no bit of the weights; this
test finds it. The model is reduced to its first layers, tokens and feed-forward
units to fit the memory limit. Needs torch and transformers.
"""

import importlib.util
import json

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert import formats, huggingface, sources
from llama_jax.convert.copy import format_bytes
from llama_jax.convert.formats import ConvertError
from llama_jax.convert.sources import SourceCheckpoint
from llama_jax.convert.tensors import LayerTensor, TorchWeights, layer_tensors, rows_per_chunk

_TOKENS = 96
_VOCAB = 512
_FFN = 2048
_LIBRARIES = 600 << 20
"""bytes of memory that torch, transformers and JAX need"""

Dtypes = dict[str, np.dtype]


def compare_logits(
    source: SourceCheckpoint, result: SourceCheckpoint, dtypes: Dtypes, max_memory: int
) -> str:
    """Compare the logits of two equal models, one computed by transformers and one by our model.

    transformers computes the side that is a Hugging Face folder from its files, or otherwise the
    source under Hugging Face's names.

    Args:
      source: the weights before conversion.
      result: the weights after conversion.
      dtypes: dtype of each line of the table, to which the weights are rounded; both models then
        compute in float32.
      max_memory: limit on the memory of this process, in bytes.

    Returns:
      What was compared, or why nothing was.

    Raises:
      ConvertError: the logits differ.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return "logits not compared: torch and transformers are not installed"
    theirs, ours = (result, source) if result.format == "hf" else (source, result)
    cfg = theirs.cfg
    if cfg.dim % cfg.num_heads:
        return "logits not compared: transformers needs a dim that is a multiple of the heads"
    for layers in (2, 1):
        less = dict(num_layers=min(layers, cfg.num_layers), vocab_size=min(_VOCAB, cfg.vocab_size))
        less["ffn_dim"] = min(_FFN, cfg.ffn_dim)
        reduced = sources.replace(cfg, **less)
        if (need := 8 * reduced.num_params + _LIBRARIES) <= max_memory:  # two models in float32
            break
    else:
        return f"logits not compared: they take {format_bytes(need)}, more than --max-memory"
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, reduced.vocab_size, (1, _TOKENS))
    # At least up to 4,095, with varying distances. Beyond 32,768 the rounding of an angle to
    # float32 is no longer small.
    last = min(max(cfg.context, 4096), 32768) - 1
    positions = np.linspace(0, last, _TOKENS).astype(np.int64)[None]
    one = _hf_logits(theirs, reduced, dtypes, tokens, positions)
    other = _our_logits(ours, sources.replace(ours.cfg, **less), dtypes, tokens, positions)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return "logits not compared: they are not finite"
    error, size = np.abs(one - other).max(), np.abs(one).max()
    what = f"logits at {_TOKENS} positions up to {positions.max()}, {reduced.num_layers} layer(s)"
    if error > 1e-3 * size:
        raise ConvertError(
            f"verify: {what} differ from transformers' by {error:.2g} (they reach {size:.2g}): "
            "the tensors are equal, so the settings or the rotary layout are wrong"
        )
    return f"{what}: within {error:.1e} of transformers' (they reach {size:.2g})"


def _read_reduced(
    source: SourceCheckpoint, reduced: ModelConfig, dtypes: Dtypes
) -> dict[str, np.ndarray]:
    """{tensor name: matrix in our layout} of the reduced model in float32, read by row blocks."""
    out = {}
    for tensor in layer_tensors(reduced):
        rows = tensor.shape(source.cfg)[0]
        keep_rows, keep = tensor.shape(reduced)
        step = rows_per_chunk(tensor, source.cfg, source.weights.dtype(tensor))
        blocks = []
        for i in range(0, min(rows, keep_rows), step):
            block = source.weights.read(tensor, i, min(i + step, rows))
            blocks.append(_rounded(block[:, :keep], tensor, dtypes))
        out[tensor.name] = np.concatenate(blocks)[:keep_rows]
    return out


def _rounded(block: np.ndarray, tensor: LayerTensor, dtypes: Dtypes) -> np.ndarray:
    return block.astype(dtypes[tensor.spec.path]).astype(np.float32)


def _our_logits(
    source: SourceCheckpoint, reduced: ModelConfig, dtypes: Dtypes, tokens, positions
) -> np.ndarray:
    import jax
    import jax.numpy as jnp
    from flax import traverse_util

    from llama_jax.model.llama import ComputeConfig
    from llama_jax.model.params import merge, structure

    tensors = _read_reduced(source, reduced, dtypes)
    arrays = {}
    for spec in dict.fromkeys(t.spec for t in layer_tensors(reduced)):
        shape = reduced.shape(spec.letters)
        if spec.stacked:
            layers = [tensors.pop(f"{spec.path}/{i}") for i in range(reduced.num_layers)]
            array = np.stack(layers).reshape(reduced.num_layers, *shape)
        else:
            array = tensors.pop(spec.path).reshape(shape)
        arrays[spec.path] = jnp.asarray(array)
    compute = ComputeConfig(jnp.dtype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        params = traverse_util.unflatten_dict(arrays, sep="/")
        llama = merge(structure(reduced, compute), params)
        ids, positions = jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)
        return np.asarray(llama(ids, positions_BT=positions))


def _hf_logits(
    source: SourceCheckpoint, reduced: ModelConfig, dtypes: Dtypes, tokens, positions
) -> np.ndarray:
    import torch
    import transformers

    if source.format == "hf":
        settings = json.loads((source.path / "config.json").read_text())
    else:
        settings = huggingface.make_config(source.cfg, "float32", {})
    settings |= dict(num_hidden_layers=reduced.num_layers, vocab_size=reduced.vocab_size)
    settings |= dict(intermediate_size=reduced.ffn_dim)
    settings |= dict(torch_dtype="float32", dtype="float32", attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    rotary = model.model.rotary_emb  # its buffers are not weights and must be computed
    model.model.rotary_emb = type(rotary)(config=model.config)
    state = {n: torch.from_numpy(w) for n, w in _hf_state(source, reduced, dtypes).items()}
    if reduced.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        # With a mask, transformers treats distant positions as one sequence, not as packed ones.
        mask = torch.ones(tokens.shape, dtype=torch.long)
        ids, where = torch.from_numpy(tokens), torch.from_numpy(positions)
        return model.eval()(input_ids=ids, position_ids=where, attention_mask=mask).logits.numpy()


def _hf_state(
    source: SourceCheckpoint, reduced: ModelConfig, dtypes: Dtypes
) -> dict[str, np.ndarray]:
    """The reduced model under Hugging Face's names in torch's [out, in], directly from the files of
    a Hugging Face folder."""
    state = {}
    if source.format == "hf" and isinstance(source.weights, TorchWeights):  # not merged
        for tensor in layer_tensors(reduced):
            location = source.weights.shards[tensor.name][0].slice
            whole = formats.view(location, formats.map_file(location.path))
            part = whole[tuple(map(slice, tensor.torch_shape(reduced)))]
            state[tensor.hf_name] = _rounded(part, tensor, dtypes)
        return state
    matrices = _read_reduced(source, reduced, dtypes)
    for tensor in layer_tensors(reduced):
        matrix = matrices[tensor.name]
        matrix = matrix.T if tensor.transposed else matrix
        state[tensor.hf_name] = matrix.reshape(tensor.torch_shape(reduced))
    return state
