"""LoRA computes what PEFT computes: logits in both directions, training steps, merged weights."""

import functools
import itertools
from pathlib import Path

import convert_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_tools import DTYPES, small
from peft_tools import make_peft

from llama_jax import config as cf
from llama_jax.checkpoint.weights import load_weights
from llama_jax.convert.adapters import MATRICES, Adapter, open_adapter
from llama_jax.convert.job import convert
from llama_jax.data.batch import Batch
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.lora import with_adapters
from llama_jax.model.params import abstract_params, merge, structure
from llama_jax.train.loss import nll_sum
from llama_jax.train.optim import make_optimizer, make_schedule
from llama_jax.train.step import TrainState, make_train_step

CFG = small(vocab_size=64, dim=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=96)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
COMPUTE = ComputeConfig(jnp.dtype(jnp.float32))
IDS = np.random.default_rng(1).integers(0, CFG.vocab_size, (2, 40))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Random weights, large enough for attention to matter, in Hugging Face's format and ours."""
    folder = tmp_path_factory.mktemp("base")
    make = lambda *args: tools.random_values(*args) * np.float32(2)
    tools.make_hf(folder / "hf", tools.meta_state(CFG, DTYPES["float32"], make=make), CFG)
    convert(folder / "hf", folder / "ours", log=None)
    return folder


def our_params(folder: Path) -> dict:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    return load_weights(folder, jax.tree.map(place, abstract_params(CFG, COMPUTE)))


def tree_of(adapter: Adapter) -> dict:
    """The arrays of an adapter as training has them."""
    blocks: dict = {}
    for target, pair in adapter.pairs.items():
        module = MATRICES[target].path.split("/")[1]
        a, b = map(jnp.asarray, pair)
        blocks.setdefault(module, {})[target] = {"a": a, "b": b}
    return {"blocks": blocks}


@jax.jit
def _logits(params, ids):
    return merge(structure(CFG, COMPUTE), params)(ids)


def our_logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    params = our_params(base)
    if adapter is not None:
        opened = open_adapter(adapter)
        params = with_adapters(params, tree_of(opened), opened.lora)
    return np.asarray(_logits(params, jnp.asarray(IDS, jnp.int32)))


def torch_model(base: Path, adapter: Path | None = None, train=False):
    """transformers' model in float32, with an adapter that PEFT loads."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    if adapter is None:
        return model
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=train)


def torch_logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return torch_model(base, adapter)(torch.from_numpy(IDS)).logits.numpy()


def assert_equal_logits(one, other, tolerance=1e-5):
    assert np.abs(one - other).max() <= tolerance * np.ptp(other)


ADAPTERS = {
    "LoRA": {},
    "rsLoRA": dict(use_rslora=True),
    "q and v": dict(target_modules=["q_proj", "v_proj"]),
    "patterns": dict(
        target_modules=["q_proj", "up_proj", "down_proj"],
        rank_pattern={"model.layers.0.self_attn.q_proj": 8, "up_proj": 2},
        alpha_pattern={r"layers\.1\..*": 5},
        exclude_modules=r".*\.1\.mlp\.down_proj",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_equal_pefts_after_import_and_export(tmp_path, base, name):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    settings = dict(r=4, lora_alpha=8, target_modules="all-linear") | ADAPTERS[name]
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = peft.get_peft_model(torch_model(base / "hf"), config)
    model.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        theirs = model(torch.from_numpy(IDS)).logits.numpy()
    plain = our_logits(base / "ours")
    assert np.abs(plain - theirs).max() > 0.05 * np.ptp(theirs)  # the adapter matters
    convert(tmp_path / "peft", tmp_path / "ours", base=base / "ours", log=None)
    assert_equal_logits(our_logits(base / "ours", tmp_path / "ours"), theirs)
    convert(tmp_path / "ours", tmp_path / "back", to="peft", base=base / "hf", log=None)
    assert_equal_logits(torch_logits(base / "hf", tmp_path / "back"), theirs)
    # The base is found by the name in the settings as well.
    if name == "LoRA":
        auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "back", dtype="float32")
        with torch.no_grad():
            assert_equal_logits(auto(torch.from_numpy(IDS)).logits.numpy(), theirs)
    for to in ("hf", "orbax") if name != "q and v" else ():
        convert(tmp_path / "ours", tmp_path / to, to=to, merge=True, log=None)
    if name != "q and v":
        assert_equal_logits(torch_logits(tmp_path / "hf"), theirs)
        assert_equal_logits(our_logits(tmp_path / "orbax"), theirs)


# Training -----------------------------------------------------------------------------------------

LENGTHS = [[9, 7, 6], [20], [11, 12]]
T = 24


def packed_batch(seed: int) -> Batch:
    """Rows of whole examples with segments, positions and a mask of the answers; then padding."""
    rng = np.random.default_rng(seed)
    shape = (len(LENGTHS), T)
    inputs, targets = rng.integers(0, CFG.vocab_size, (2, *shape))
    mask, positions = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, n in enumerate([*lengths, T - sum(lengths)], 1):
            span = slice(at, at + n)
            positions[row, span], segments[row, span] = np.arange(n), number
            if number <= len(lengths):
                mask[row, at + n // 3 : at + n] = 1
            at += n
    arrays = inputs.astype(np.int32), targets.astype(np.int32), mask, segments, positions
    return Batch(*map(jnp.asarray, arrays))


def rows_alone(batch: Batch) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs, targets and mask of each example of a packed batch."""
    out = []
    for row, lengths in enumerate(LENGTHS):
        for start, stop in itertools.pairwise(np.cumsum([0, *lengths])):
            arrays = batch.inputs_BT, batch.targets_BT, batch.mask_BT
            out.append(tuple(np.asarray(x[row, start:stop]) for x in arrays))
    return out


@functools.partial(jax.jit, static_argnames="lora")
def loss_and_grads(adapters, params, batch, lora):
    """Mean of -log p over the counted targets, and its gradient."""

    def loss(adapters):
        model = merge(structure(CFG, COMPUTE), with_adapters(params, adapters, lora))
        return nll_sum(model, batch, 0) / jnp.sum(batch.mask_BT)

    return jax.value_and_grad(loss)(adapters)


def torch_loss(model, batch: Batch):
    """The same loss by transformers, with one padded row for each example."""
    import torch

    examples = rows_alone(batch)
    longest = max(len(x) for x, _, _ in examples)
    pad = lambda x: np.pad(x, (0, longest - len(x)))
    inputs, targets, mask = (
        torch.from_numpy(np.stack([pad(e[i]) for e in examples])) for i in range(3)
    )
    real = torch.from_numpy(np.stack([pad(np.ones(len(e[0]), np.int64)) for e in examples]))
    logits = model(input_ids=inputs.long(), attention_mask=real).logits
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.long().flatten(), reduction="none"
    )
    return (nll * mask.flatten()).sum() / mask.sum()


def under_pefts_names(tree: dict) -> dict[str, np.ndarray]:
    """Arrays of adapters as PEFT names and lays them out."""
    out = {}
    for module in tree["blocks"].values():
        for target, pair in module.items():
            for i in range(CFG.num_layers):
                name = f"base_model.model.model.layers.{i}.{MATRICES[target].hf}"
                out[f"{name}.lora_A.default.weight"] = np.asarray(pair["a"][i]).T
                out[f"{name}.lora_B.default.weight"] = np.asarray(pair["b"][i]).T
    return out


def assert_close(ours: dict, theirs: dict, what: str):
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        error = np.abs(ours[name] - x).max() / np.abs(x).max()
        assert error < 1e-4, f"{what} of {name} differs by {error:.1e}"


def test_five_training_steps_equal_peft_and_torch(tmp_path, base):
    torch = pytest.importorskip("torch")
    source = make_peft(tmp_path / "peft", CFG, lora_alpha=8, lora_dropout=0.0)
    convert(source, tmp_path / "ours", base=base / "ours", log=None)
    adapter, steps = open_adapter(tmp_path / "ours"), 5
    # The norm of the gradients is about 0.2, so that every step is clipped.
    optim = cf.OptimConfig(peak_lr=1e-2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.05)
    params, adapters = our_params(base / "ours"), tree_of(adapter)
    recipe = cf.Recipe(
        model=CFG, lora=adapter.lora, optim=optim, checkpoint=cf.CheckpointConfig(dir="run"),
        data=cf.DataConfig(sources={"x": cf.SourceConfig(path="x")}, seq_len=T, packing="segments"),
        train=cf.TrainConfig(steps=steps, batch_size=len(LENGTHS), init_from="base"),
    )  # fmt: skip
    state = TrainState(adapters, make_optimizer(optim, steps).init(adapters))
    train_step, schedule = jax.jit(make_train_step(recipe, COMPUTE)), make_schedule(optim, steps)

    theirs = torch_model(base / "hf", source, train=True)
    weights = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(
        weights.values(), betas=(optim.b1, optim.b2), eps=optim.eps, weight_decay=0.1
    )
    norms = []
    for step in range(steps):
        batch = packed_batch(step)
        _, grads = loss_and_grads(state.params, params, batch, adapter.lora)
        state, metrics = train_step(state, jax.tree.map(lambda x: x[None], batch), params)
        adamw.zero_grad()
        their_loss = torch_loss(theirs, batch)
        their_loss.backward()
        assert float(metrics["loss"]) == pytest.approx(their_loss.item(), rel=1e-4)
        their_grads = {n: p.grad.numpy().copy() for n, p in weights.items()}
        assert_close(under_pefts_names(grads), their_grads, f"gradient {step}")
        adamw.param_groups[0]["lr"] = float(schedule(step))
        assert float(metrics["learning_rate"]) == pytest.approx(adamw.param_groups[0]["lr"])
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), optim.max_grad_norm)))
        assert float(metrics["grad_norm"]) == pytest.approx(norms[-1], rel=1e-4)
        adamw.step()
        their_values = {n: p.detach().numpy() for n, p in weights.items()}
        assert_close(under_pefts_names(state.params), their_values, f"step {step}")
    assert min(norms) > 2 * optim.max_grad_norm


def test_a_packed_batch_equals_its_rows_alone(tmp_path, base):
    source = make_peft(tmp_path / "peft", CFG, lora_alpha=8)
    convert(source, tmp_path / "ours", base=base / "ours", log=None)
    adapter, params = open_adapter(tmp_path / "ours"), our_params(base / "ours")

    batch, adapters = packed_batch(0), tree_of(adapter)
    packed = loss_and_grads(adapters, params, batch, adapter.lora)
    counted, rows = float(jnp.sum(batch.mask_BT)), []
    for example in rows_alone(batch):
        # In a batch of the same shape, so that one program computes all of them.
        arrays = np.zeros((3, len(LENGTHS), T), np.float32)
        arrays[:, 0, : len(example[0])] = example
        inputs, targets, mask = jnp.asarray(arrays)
        ones = jnp.ones_like(batch.segment_ids_BT)
        alone = Batch(
            inputs.astype(jnp.int32), targets.astype(jnp.int32), mask, ones,
            jnp.broadcast_to(jnp.arange(T), ones.shape),
        )  # fmt: skip
        share = float(jnp.sum(mask)) / counted
        parts = loss_and_grads(adapters, params, alone, adapter.lora)
        rows.append(jax.tree.map(lambda x, share=share: x * share, parts))
    total = jax.tree.map(lambda *x: sum(x), *rows)
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(total), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
