"""Fine-tuning: LoRA, DPO, and what the run folder keeps."""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_tools import words, write_recipe

import llama_jax
from llama_jax.checkpoint.arrays import open_array
from llama_jax.checkpoint.file_hashes import (
    files_below,
    hash_files,
    record_files,
    weights_sha256,
    write_list,
)
from llama_jax.config import load_recipe
from llama_jax.convert.__main__ import main as convert
from llama_jax.data.batch import Batch
from llama_jax.data.mixture import TrainData
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.lora import num_adapter_params
from llama_jax.model.sharding import mesh_for
from llama_jax.train import loop, step
from llama_jax.train.__main__ import main
from llama_jax.train.frozen import abstract_frozen, load_frozen

F32 = ComputeConfig(jnp.dtype("float32"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, its text, and a finished run of two steps, the base."""
    folder = tmp_path_factory.mktemp("finetune")
    write_recipe(
        folder, data={"packing": "segments"}, mesh={"data": -1, "fsdp": 1},
        train={"steps": 2, "eval_batches": 1}, checkpoint={"dir": str(folder / "base")},
    )  # fmt: skip
    assert main([str(folder / "recipe.toml")]) == 0
    return folder


@pytest.fixture
def run(place, capsys):
    """Run the command from the base; (exit code, standard output, standard error)."""

    def call(name, *overrides):
        more = [f"train.init_from={place}/base", f"checkpoint.dir={place / name}"]
        code = main([str(place / "recipe.toml"), *more, *overrides])
        return code, *capsys.readouterr()

    return call


def contents(folder, step):
    """Every array of a step, as bytes."""
    out = {}
    for item in ("model", "optimizer"):
        root = folder / "steps" / str(step) / item
        for path in sorted(p.parent for p in root.rglob("zarr.json")):
            name = str(path.relative_to(root))
            out[item, name] = open_array(root, name).read().result().tobytes()
    return out


def other_weights(base, other):
    """A copy of a run with another number in its weights, and the hashes of that."""
    shutil.copytree(base, other)
    step = other / "steps/2"
    file = next(p for p in sorted((step / "model/norm").rglob("c/*")) if p.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    names = [name for name in files_below(step) if not name.startswith("checksums.")]
    write_list(step / "checksums.0-of-1.json", {"format": 1, "files": hash_files(step, names)})


def stop_at(monkeypatch, batch):
    """Send SIGTERM when the batch of that number is drawn."""
    draw = TrainData.__next__

    def drawn(self):
        if self.state()["batches"] + 1 == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self)

    monkeypatch.setattr(TrainData, "__next__", drawn)


LORA = ("lora.rank=4", "lora.dropout=0.1", "train.steps=5", "lora.base=int8",
        "train.gradient_accumulation=2", "mesh.data=1", "mesh.fsdp=-1")  # fmt: skip


@pytest.mark.usefixtures("eight_devices")
def test_a_lora_run_saves_adapters_alone_and_continues_exactly(run, place, monkeypatch):
    """With dropout, a quantized base, two microbatches and weights sharded over eight devices."""
    code, out, err = run("lora", *LORA)
    assert code == 0, err
    recipe = load_recipe(place / "lora/recipe.toml")
    count = num_adapter_params(recipe.model, recipe.lora)
    assert f"LoRA: {count:,} trainable parameters, rank 4 on q, k, v, o, gate, up, down" in out
    assert "base in int8" in out
    folder = place / "lora"
    arrays = contents(folder, 5)
    names = {name for item, name in arrays if item == "model"}
    assert "blocks.attention.q.a" in names
    assert len(names) == 14
    assert sum(len(x) for (item, _), x in arrays.items() if item == "model") == 4 * count
    about = json.loads((folder / "model.json").read_text())
    sha = weights_sha256(place / "base", 2)
    base = {"path": str(place / "base"), "sha256": sha}
    assert about["adapter"] == {
        "rank": 4, "alpha": 32.0, "rslora": False, "base": base | {"quantize": "int8"},
        "targets": ["q", "k", "v", "o", "gate", "up", "down"],
    }  # fmt: skip
    assert about["lineage"]["base"] == base
    assert about["lineage"]["data"]["words"]["path"] == f"{place}/text"
    assert len(about["lineage"]["data"]["words"]["sha256"]) == 64

    stop_at(monkeypatch, 3)
    code, out, _ = run("stopped", *LORA)
    assert code == 143
    monkeypatch.undo()
    assert not (place / "stopped/steps/5").exists()
    shutil.copytree(place / "base", place / "moved")
    moved = [f"train.init_from={place}/moved"]  # the same weights may be in another folder
    code, out, err = run("stopped", *LORA, *moved)
    assert code == 0, err
    assert "continuing" in out
    assert contents(place / "stopped", 5) == arrays
    code, _, err = run("stopped", *LORA, "lora.rank=8")
    assert code == 2
    assert "lora.rank: was 4, now 8" in err
    code, _, err = run("next", "train.steps=1", f"train.init_from={folder}")
    assert code == 2
    assert f"{folder} holds an adapter" in err
    assert "llama-jax convert" in err
    other_weights(place / "base", place / "other")
    code, _, err = run("lora", *LORA, "train.steps=6", f"train.init_from={place}/other")
    assert code == 2
    assert f"other does not hold the weights with which {folder} started" in err


BFLOAT16 = 'train.param_dtype="bfloat16"', 'optim.moment_dtype="bfloat16"'


def test_adapters_in_bfloat16(run, place, monkeypatch):
    """Adapters and their moments are saved in two bytes, continue exactly, and can be converted."""
    settings = *LORA[:-2], *BFLOAT16
    code, _, err = run("narrow", *settings)
    assert code == 0, err
    folder = place / "narrow"
    arrays = contents(folder, 5)
    recipe = load_recipe(folder / "recipe.toml")
    count = num_adapter_params(recipe.model, recipe.lora)
    assert sum(len(x) for (item, _), x in arrays.items() if item == "model") == 2 * count
    moments = sum(len(x) for (_, name), x in arrays.items() if "mu." in name or "nu." in name)
    assert moments == 4 * count
    stop_at(monkeypatch, 3)
    assert run("narrow-stopped", *settings)[0] == 143
    monkeypatch.undo()
    code, out, err = run("narrow-stopped", *settings)
    assert code == 0, err
    assert "continuing" in out
    assert contents(place / "narrow-stopped", 5) == arrays
    assert convert([str(folder), str(place / "narrow-peft"), "--to", "peft"]) == 0


# The step ----------------------------------------------------------------------------------------


def pairs(rows=8, T=32):
    """A batch of rows that hold two pairs, one pair, or one pair of which nothing counts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 288, (rows, T + 1), np.int32)
    segments, positions = np.zeros((2, rows, T), np.int32)
    mask = np.zeros((rows, T), np.float32)
    for row in range(rows):
        lengths = [(7, 5, 6, 9), (12, 13)][row % 2]
        start = 0
        for number, length in enumerate(lengths, 1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            if row != 3:  # the last target of a segment belongs to the next one
                mask[row, start + length // 2 : start + length - 1] = 1
            start += length
        segments[row, start:] = len(lengths) + 1
        positions[row, start:] = np.arange(T - start)
    return Batch(ids[:, :-1], ids[:, 1:], mask, segments, positions)


def split(batch, microbatches):
    return jax.tree.map(lambda x: x.reshape(microbatches, -1, x.shape[-1]), batch)


def random_state(recipe):
    """Adapters that are not zero, or weights; and a base."""
    state = jax.jit(functools.partial(step.init_state, recipe, F32))()
    add = lambda x, key: x + 0.1 * jax.random.normal(key, x.shape)
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    params = jax.tree.unflatten(tree, map(add, leaves, keys))
    plain = dataclasses.replace(recipe, lora=None, dpo=None)
    base = jax.jit(functools.partial(step.init_state, plain, F32))().params
    return state._replace(params=params), jax.tree.map(lambda x: 2 * x, base)


def one_device(recipe, state, batch, frozen):
    return jax.jit(step.make_train_step(recipe, F32))(state, batch, frozen)


def on_mesh(recipe, state, batch, frozen):
    recipe, mesh = mesh_for(recipe)
    with jax.set_mesh(mesh):
        compute = step.compute_config(recipe, "cpu")
        put = lambda tree, like: jax.tree.map(
            lambda x, y: jax.device_put(x, y.sharding), tree, like
        )
        state = put(state, step.abstract_state(recipe, compute, mesh))
        frozen = put(frozen, abstract_frozen(recipe, compute, mesh))
        like = loop.abstract_batch(recipe, mesh, compute.rules.activation_without_tensor("BT"))
        return jax.jit(step.make_train_step(recipe, compute))(state, put(batch, like), frozen)


def near(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.linalg.norm(x - y) <= tolerance * max(np.linalg.norm(y), 1e-30)


def recipe_of(place, *overrides):
    settings = [f"train.init_from={place}/base", "train.steps=5", *overrides]
    return load_recipe(place / "recipe.toml", settings)


MESH = ("mesh.preset=tensor_sequence", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2",
        "mesh.context=2")  # fmt: skip


def test_adapters_in_bfloat16_learn_as_those_in_float32(place):
    """A fixed batch: the losses of the two formats stay together."""
    batch, final = split(pairs(), 1), []
    for settings in ((), BFLOAT16):
        recipe = recipe_of(place, "lora.rank=4", "train.steps=40", "optim.peak_lr=3e-2", *settings)
        state, base = random_state(recipe)
        state = jax.tree.map(lambda x, y: x.astype(y.dtype), state, step.init_state(recipe, F32))
        train_step = jax.jit(step.make_train_step(recipe, F32))
        losses = []
        for _ in range(40):
            state, metrics = train_step(state, batch, base)
            losses.append(float(metrics["loss"]))
        final.append(losses[-1])
        assert losses[-1] < losses[0] - 0.3
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert abs(final[1] - final[0]) < 0.2 * (losses[0] - final[0])


def test_lora_on_eight_devices_equals_one(place):
    settings = [
        "lora.rank=4",
        "lora.alpha=4.0",
        "lora.dropout=0.2",
        "train.gradient_accumulation=2",
    ]
    recipe = recipe_of(place, *settings, *MESH)
    state, base = random_state(recipe)
    batch = split(pairs(), 2)
    single, metrics = one_device(recipe, state, batch, base)
    several, metrics_8 = on_mesh(recipe, state, batch, base)
    near(metrics_8, metrics, 1e-5)
    near(several, single, 2e-5)
    # Dropout: another key in each step, none in evaluation.
    other = one_device(recipe, state._replace(optimizer=single.optimizer), batch, base)[1]
    assert other["loss"] != metrics["loss"]
    evaluate = lambda r: jax.jit(step.make_eval_step(r, F32))(state.params, split(pairs(), 1), base)
    assert evaluate(recipe) == evaluate(recipe_of(place, "lora.rank=4", "lora.alpha=4.0"))


def dpo_of_rows_alone(llama_logits, batch, beta):
    """TRL's sigmoid loss and rewards, of each conversation in a row of its own.

    ``llama_logits[name](ids)`` are the logits [T, V] of the policy and of the reference.
    """
    losses, rewards = [], []
    for row in range(len(batch.inputs_BT)):
        segments, mask = batch.segment_ids_BT[row], batch.mask_BT[row]
        for pair in range(1, segments.max() // 2 + 1):
            sums = {}
            for side, number in (("chosen", 2 * pair - 1), ("rejected", 2 * pair)):
                at = np.flatnonzero(segments == number)
                for name, logits in llama_logits.items():
                    x = np.asarray(logits(batch.inputs_BT[row, at]), np.float64)
                    x = x - x.max(-1, keepdims=True)
                    logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
                    picked = logp[np.arange(len(at)), batch.targets_BT[row, at]]
                    sums[side, name] = picked @ mask[at]
            if not mask[(segments == 2 * pair - 1) | (segments == 2 * pair)].any():
                continue
            chosen, rejected = (
                beta * (sums[side, "policy"] - sums[side, "reference"])
                for side in ("chosen", "rejected")
            )
            losses.append(np.log1p(np.exp(-(chosen - rejected))))
            rewards.append((chosen, rejected, chosen > rejected, chosen - rejected))
    return np.mean(losses), np.mean(rewards, axis=0)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_dpo_is_trls_formula(place, kind):
    """On one device and on eight, with one microbatch and with two, and with a chunked loss."""
    lora = ["lora.rank=4", "lora.alpha=4.0"] if kind == "lora" else []
    recipe = recipe_of(place, "dpo.beta=0.3", *lora, *MESH)
    state, base = random_state(recipe)
    batch = pairs()
    policy = state.params
    if kind == "lora":
        policy = step.with_adapters(base, state.params, recipe.lora)
    logits_of = lambda params: jax.jit(
        lambda ids: step.merge(step.structure(recipe.model, F32), params)(ids[None])[0]
    )
    models = {"policy": logits_of(policy), "reference": logits_of(base)}
    loss, rewards = dpo_of_rows_alone(models, batch, 0.3)
    single, metrics = one_device(recipe, state, split(batch, 1), base)
    assert metrics["loss"] == pytest.approx(loss, rel=2e-5)
    assert [metrics[k] for k in step.METRICS] == pytest.approx(rewards.tolist(), rel=1e-4)
    sums = jax.jit(step.make_eval_step(recipe, F32))(state.params, split(batch, 1), base)
    assert sums["pairs"] == 11
    assert sums["loss"] / sums["pairs"] == pytest.approx(loss, rel=2e-5)
    if kind == "full":
        return
    two = ["train.gradient_accumulation=2", "train.loss_chunk=16"]
    other = recipe_of(place, "dpo.beta=0.3", *lora, *MESH, *two)
    several, metrics_8 = on_mesh(other, state, split(batch, 2), base)
    near(metrics_8, metrics, 1e-4)
    near(several, single, 1e-4)


def test_a_batch_without_a_counted_target_is_no_error(place):
    recipe = recipe_of(place, "lora.rank=4", "optim.weight_decay=0")
    state, base = random_state(recipe)
    batch = pairs()._replace(mask_BT=np.zeros((8, 32), np.float32))
    after, metrics = one_device(recipe, state, split(batch, 1), base)
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)
    near(after.params, state.params, 0)


def test_the_frozen_weights_are_never_in_float32(place):
    """A base in bfloat16 or in integers has no float32 matrix, on any mesh."""
    for kind in ("bfloat16", "int8", "int4"):
        recipe, mesh = mesh_for(recipe_of(place, f"lora.base={kind}", "lora.rank=2"))
        with jax.set_mesh(mesh):
            compute = dataclasses.replace(F32, dtype=jnp.dtype("bfloat16"), unroll=kind != "int8")
            like = abstract_frozen(recipe, compute, mesh)
            loaded = load_frozen(recipe, compute, mesh)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), loaded) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), like
        )
        sizes = [x.size for x in jax.tree.leaves(loaded) if x.dtype == np.float32]
        assert all(size <= 2 * 32 for size in sizes)  # scales


def test_flops_of_a_token(place):
    full = recipe_of(place)
    lora = recipe_of(place, "lora.rank=4")
    T, N = 32, full.model.num_params - 288 * 16
    attention = step.flops_per_token(full) - 6 * N
    assert attention == full.model.flops_per_token(T) - 6 * N
    adapters = num_adapter_params(lora.model, lora.lora)
    assert step.flops_per_token(lora) == 4 * N + 6 * adapters + attention
    dpo = recipe_of(place, "lora.rank=4", "dpo.beta=0.1")
    extra = step.flops_per_token(dpo) - step.flops_per_token(lora)
    assert extra == pytest.approx(2 * N + attention / 3)


@pytest.mark.parametrize("section", ["lora.rank=4", "dpo.beta=0.1"])
def test_random_weights_are_no_base(place, section, capsys):
    assert main([str(place / "recipe.toml"), section]) == 2
    assert "needs the weights of a trained model; set train.init_from" in capsys.readouterr().err


# Chat models -------------------------------------------------------------------------------------


def records_of(folder, kind):
    """A file of conversations whose answers are always "the cat sat"."""
    path = folder / f"{kind}.jsonl"
    rng = random.Random(1)
    with path.open("w") as f:
        for _ in range(300):
            prompt = words(rng, 3)
            if kind == "chats":
                record = {"instruction": prompt, "input": "", "output": "the cat sat"}
            else:
                record = {"prompt": prompt, "chosen": "the cat sat", "rejected": "on a mat"}
            f.write(json.dumps(record) + "\n")
    return path


def conversations(place, kind):
    template = place / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + m.content + ':' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    return (
        f"data.sources.words.path={records_of(place, kind)}", f"data.template={template}",
        "data.packing=examples", "data.prepared=", "data.seq_len=64", "train.eval_batches=4",
    )  # fmt: skip


def test_a_model_learns_to_chat_and_stops(run, place):
    """From a base model with another stop id: the run has the template and both stop ids, and
    answers end by themselves."""
    base = place / "chat_base"
    shutil.copytree(place / "base", base)
    about = json.loads((base / "model.json").read_text())
    about["token_ids"]["eos"] = 7
    (base / "model.json").write_text(json.dumps(about))
    record_files(base, "model.json")
    name = "chat"
    more = ["train.steps=40", "optim.peak_lr=2e-2", "train.log_every=40", "train.eval_every=40",
            "checkpoint.save_every=40", f"train.init_from={base}",
            'train.sample_prompts=["the mat"]']  # fmt: skip
    code, out, err = run(name, *conversations(place, "chats"), *more)
    assert code == 0, err
    assert "sample:\n  | the mat\n" in out
    folder = place / name
    template = (place / "template.jinja").read_text()
    assert (folder / "chat_template.jinja").read_text() == template
    about = json.loads((folder / "model.json").read_text())
    assert about["token_ids"]["eos"] == [7, 2]
    llm = llama_jax.load(folder)
    assert llm.eos_ids == (7, 2)
    assert llm.chat_template == template
    assert len(llm.encode(llm.chat().say("the cat on", max_new_tokens=40))) < 40
    assert evaluations(folder)[-1]["loss"] < 1  # nats a token of an answer that is always the same


def nll_by_hand(folder, ids):
    """-log p of each token of ids after the first, in NumPy float64, from the arrays of a run."""
    root = folder / "steps/2/model"
    weights = lambda name: open_array(root, name).read().result().astype(np.float64)
    norm = lambda x, w: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * w
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    T = len(ids) - 1
    angle = np.arange(T)[:, None, None] * 10000.0 ** -(np.arange(0, 8, 2) / 8)
    cos, sin = np.cos(angle), np.sin(angle)

    def rotate(x):
        a, b = np.split(x.reshape(T, -1, 8), 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights("embed")[ids[:-1]]
    for layer in range(2):
        w = lambda name, layer=layer: weights(f"blocks.{name}")[layer]
        y = norm(x, w("attention_norm"))
        q, k = rotate(y @ w("attention.q")), rotate(y @ w("attention.k"))
        v = (y @ w("attention.v")).reshape(T, 2, 8)
        k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(8)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        x = x + np.einsum("hts,shd->thd", softmax(scores), v).reshape(T, -1) @ w("attention.o")
        y = norm(x, w("mlp_norm"))
        gate = y @ w("mlp.gate")
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w("mlp.up"))) @ w("mlp.down")
    p = softmax(norm(x, weights("norm")) @ weights("unembed"))
    return -np.log(p[np.arange(T), ids[1:]])


def test_the_first_loss_is_that_of_the_answer_by_hand(run, place):
    """One Alpaca record in training (and one in validation), from its file to the log."""
    settings = conversations(place, "chats")
    records = [("the cat", "sat on a mat"), ("some animals", "saw")]
    lines = [json.dumps({"instruction": q, "input": "", "output": a}) for q, a in records]
    (place / "chats.jsonl").write_text("\n".join(lines))
    code, _, err = run("by_hand", *settings, "lora.rank=2", "train.steps=1", "optim.peak_lr=1e-9")
    assert code == 0, err
    tokenizer = Tokenizer.load(place / "base/tokenizer.model")
    losses = []
    for question, answer in records:
        prompt = tokenizer.encode(f"{question}:", bos=True)
        answer = tokenizer.encode_array(answer, eos=True, start=False).tolist()
        losses.append(nll_by_hand(place / "base", prompt + answer)[len(prompt) - 1 :].mean())
    lines = map(json.loads, (place / "by_hand/metrics.jsonl").read_text().splitlines())
    logged = {r["kind"]: r["loss"] for r in lines if "loss" in r}
    np.testing.assert_allclose(sorted(logged.values()), sorted(losses), rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def evaluations(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "eval"]


def test_preferences_are_learned(run, place):
    settings = conversations(place, "pairs")
    code, _, err = run("dpo", *settings, "train.steps=1")
    assert code == 2
    assert "source words has pairs of a chosen and a rejected answer: add the section [dpo]" in err
    code, _, err = run("dpo", "train.steps=1", "dpo.beta=0.1")
    assert code == 2
    assert "source words has no pairs of a chosen and a rejected answer" in err
    more = [
        "dpo.beta=0.5",
        "lora.rank=8",
        "train.steps=12",
        "optim.peak_lr=2e-2",
        "train.log_every=12",
        "checkpoint.save_every=12",
    ]
    code, out, err = run("dpo", *settings, *more)
    assert code == 0, err
    assert "DPO: beta 0.5, reference" in out
    assert "margin" in out
    (record,) = evaluations(place / "dpo")
    assert record["rewards/accuracy"] == 1
    assert record["rewards/margin"] > 0.5
    assert record["loss"] < 0.5
    assert record["sources"]["words"]["pairs"] > 5
    # All weights, in bfloat16 with their moments.
    narrow = [setting for setting in more if setting != "lora.rank=8"]
    code, _, err = run("dpo-narrow", *settings, *narrow, *BFLOAT16)
    assert code == 0, err
    (record,) = evaluations(place / "dpo-narrow")
    assert record["rewards/accuracy"] == 1
    assert record["rewards/margin"] > 0.5
