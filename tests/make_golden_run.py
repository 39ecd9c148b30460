"""A reference training run computed without llama_jax: tests/golden/run/values.npz.

The reference (:func:`reference`) uses torch in float64 and numpy, and no code of llama_jax. It has
its own parser of token shards, builds batches, segments, positions and masks, has its own forward
pass, and uses torch's autograd and AdamW.

Two inputs come from random generators of JAX and Grain and are recorded, not recomputed: the
initial weights and the order of the sequences. :func:`record` wrote them once, with the prepared
data. The script checks the standard deviations of the weights, the fraction of each source, and
that every epoch contains each sequence once.

    PYTHONPATH=. python tests/make_golden_run.py            # from the recorded inputs
    PYTHONPATH=. python tests/make_golden_run.py --record   # data, weights and order as well
"""

import json
import math
import sys
import tomllib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden" / "run"
VALUES = FOLDER / "values.npz"
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def settings() -> dict:
    """The recipe as nested dicts."""
    return tomllib.loads((FOLDER / "recipe.toml").read_text(encoding="utf-8"))


# Data --------------------------------------------------------------------------------------------


def read_split(source: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All token ids of a split, and whether each starts a document."""
    folder = FOLDER / source
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    ids, starts = [], []
    for shard in manifest["splits"][split]["shards"]:
        ids.append(np.fromfile(folder / f"{shard['name']}.tokens", "<u2").astype(np.int64))
        is_start = np.zeros(len(ids[-1]), bool)
        is_start[np.fromfile(folder / f"{shard['name']}.starts", "<u8").astype(np.int64)] = True
        starts.append(is_start)
    return np.concatenate(ids), np.concatenate(starts)


def sequence(ids: np.ndarray, is_start: np.ndarray, index: int, T: int) -> dict[str, np.ndarray]:
    """Sequence ``index``, token by token: tokens [index T, index T + T], padded with 0."""
    row: dict[str, list] = {k: [] for k in ("inputs", "targets", "segments", "positions", "mask")}
    segment, position = 0, 0
    for t in range(index * T, index * T + T):
        inside, next_inside = t < len(ids), t + 1 < len(ids)
        if t == index * T or (inside and is_start[t]):
            segment, position = segment + 1, 0
        row["inputs"].append(ids[t] if inside else 0)
        row["targets"].append(ids[t + 1] if next_inside else 0)
        row["segments"].append(segment)
        row["positions"].append(position)
        row["mask"].append(float(next_inside and not is_start[t + 1]))
        position += 1
    return {k: np.array(v) for k, v in row.items()}


def training_batches(recipe: dict, order: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Batch by batch, the sequences that ``order`` [places, 2] names as (source, index)."""
    names = list(recipe["data"]["sources"])
    T, B = recipe["data"]["seq_len"], recipe["train"]["batch_size"]
    splits = [read_split(name, "train") for name in names]
    check_order(recipe, order, [(len(ids) - 1) // T for ids, _ in splits])
    rows = [sequence(*splits[source], index, T) for source, index in order]
    return [stack(rows[i : i + B]) for i in range(0, len(rows), B)]


def check_order(recipe: dict, order: np.ndarray, lengths: list[int]) -> None:
    """Each source has its share of every prefix, and each of its epochs every sequence once."""
    weights = np.array([s["weight"] for s in recipe["data"]["sources"].values()])
    places = np.arange(1, len(order) + 1)
    for source, length in enumerate(lengths):
        drawn = order[:, 0] == source
        wanted = places * weights[source] / weights.sum()
        assert np.abs(np.cumsum(drawn) - wanted).max() < len(weights)
        indices = order[drawn, 1]
        assert len(indices) > length, "the run is to go beyond one epoch of each source"
        for first in range(0, len(indices), length):
            epoch = indices[first : first + length]
            assert len(set(epoch.tolist())) == len(epoch)
            assert 0 <= epoch.min() <= epoch.max() < length


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


# Model -------------------------------------------------------------------------------------------


def forward(torch, weights: dict, batch: dict, model: dict):
    """-log p of every target, [B, T]; float64."""
    N, K, H = model["num_heads"], model["num_kv_heads"], model["head_dim"]
    eps, L = model["norm_eps"], model["num_layers"]
    batch = {key: torch.tensor(value) for key, value in batch.items()}
    B, T = batch["inputs"].shape
    causal = torch.tril(torch.ones(T, T, dtype=torch.bool))
    same = batch["segments"][:, :, None] == batch["segments"][:, None, :]
    allowed = (causal & same)[:, None]  # [B, 1, T, S]
    frequencies = model["rope"]["theta"] ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)
    angles = batch["positions"][:, :, None, None].double() * frequencies  # [B, T, 1, H / 2]

    def norm(x, scale):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * scale

    def rotate(x):  # pairs (i, i + H / 2)
        a, b = x[..., : H // 2], x[..., H // 2 :]
        cos, sin = torch.cos(angles), torch.sin(angles)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["embed"][batch["inputs"]]
    for i in range(L):
        w = {key: value[i] for key, value in weights.items() if value.ndim > 1 and key in LAYER}
        h = norm(x, w["attention_norm"])
        q = rotate((h @ w["q"]).view(B, T, N, H))
        k = rotate((h @ w["k"]).view(B, T, K, H)).repeat_interleave(N // K, dim=2)
        v = (h @ w["v"]).view(B, T, K, H).repeat_interleave(N // K, dim=2)
        scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)
        shares = torch.softmax(scores.masked_fill(~allowed, -math.inf), -1)
        x = x + torch.einsum("bnts,bsnh->btnh", shares, v).reshape(B, T, N * H) @ w["o"]
        h = norm(x, w["mlp_norm"])
        x = x + (torch.nn.functional.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
    logits = norm(x, weights["norm"]) @ weights["unembed"]
    log_p = torch.log_softmax(logits, -1)
    return -log_p.gather(-1, batch["targets"][..., None])[..., 0]


LAYER = ("attention_norm", "mlp_norm", *MATRICES)


def check_initial(weights: dict, recipe: dict) -> None:
    """Normal matrices of the promised standard deviations, norms of ones."""
    std, L = recipe["train"]["init_std"], recipe["model"]["num_layers"]
    for name, value in weights.items():
        if "norm" in name:
            assert (value == 1).all()
            continue
        want = std / math.sqrt(2 * L) if name in ("o", "down") else std
        # The deviation of n normal numbers is known to 1 / sqrt(2 n) of itself; five times that.
        assert abs(value.std() / want - 1) < 5 / math.sqrt(2 * value.size), name
        assert abs(value.mean()) < 5 * want / math.sqrt(value.size), name


# Training ----------------------------------------------------------------------------------------


def learning_rate(update: int, optim: dict, steps: int) -> float:
    """Rate of an update counted from 0: linear warm-up, then a cosine to a part of the peak."""
    peak, warmup, last = optim["peak_lr"], optim["warmup_steps"], optim["final_fraction"]
    if update < warmup:
        return peak * (update + 1) / warmup
    turn = math.cos(math.pi * (update - warmup) / (steps - warmup))
    return peak * (last + (1 - last) * (1 + turn) / 2)


def reference(order: np.ndarray, initial: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All reference values, from the order of the sequences and the initial weights."""
    import torch

    recipe = settings()
    optim, train, steps = recipe["optim"], recipe["train"], recipe["train"]["steps"]
    check_initial(initial, recipe)
    weights = {
        k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in initial.items()
    }
    decayed = [w for name, w in weights.items() if "norm" not in name]
    others = [w for name, w in weights.items() if "norm" in name]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(optim["b1"], optim["b2"]),
        eps=optim["eps"],
    )
    losses, norms, rates = [], [], []
    val_metrics: dict[str, list] = {}
    for update, batch in enumerate(training_batches(recipe, order)):
        adamw.zero_grad()
        # One pass over the whole batch: accumulating its parts must give the same.
        nll = forward(torch, weights, batch, recipe["model"])
        mask = torch.tensor(batch["mask"])
        loss = (nll * mask).sum() / mask.sum()
        loss.backward()
        norm = math.sqrt(sum((w.grad**2).sum().item() for w in weights.values()))
        if norm > optim["max_grad_norm"]:
            for w in weights.values():
                w.grad *= optim["max_grad_norm"] / norm
        rates.append(learning_rate(update, optim, steps))
        for group in adamw.param_groups:
            group["lr"] = rates[-1]
        adamw.step()
        losses.append(loss.item())
        norms.append(norm)
        if (update + 1) % train["eval_every"] == 0 or update + 1 == steps:
            for name, value in evaluate(torch, weights, recipe).items():
                val_metrics.setdefault(f"eval/{name}", []).append(value)
    clipped = sum(n > optim["max_grad_norm"] for n in norms)
    assert 3 <= clipped <= steps - 3, norms
    out = {"loss": losses, "grad_norm": norms, "learning_rate": rates, **val_metrics}
    final = {f"final/{k}": w.detach().numpy().astype(np.float32) for k, w in weights.items()}
    return {k: np.array(v, np.float64) for k, v in out.items()} | final


def evaluate(torch, weights: dict, recipe: dict) -> dict[str, float]:
    """Validation losses of each source, and their mean by the sources' weights."""
    train, T = recipe["train"], recipe["data"]["seq_len"]
    rows = train["batch_size"] // train["gradient_accumulation"]
    out: dict[str, float] = {}
    shares = {n: s["weight"] for n, s in recipe["data"]["sources"].items()}
    for name in shares:
        ids, is_start = read_split(name, "holdout")
        total = math.ceil((len(ids) - 1) / T)
        wanted = min(total, train["eval_batches"] * rows)  # spread evenly over the split
        chosen = [i * total // wanted for i in range(wanted)]
        batch = stack([sequence(ids, is_start, i, T) for i in chosen])
        with torch.no_grad():
            nll = forward(torch, weights, batch, recipe["model"]).numpy()
        counted = batch["mask"] > 0
        text = text_bytes(name, batch["inputs"][counted], batch["targets"][counted])
        if wanted == total:  # every document whole: bytes of the text itself
            assert text == whole_text_bytes(name, ids, is_start)
        _, counts = np.unique(batch["targets"][counted], return_counts=True)
        p = counts / counts.sum()
        out[f"{name}/loss"] = nll[counted].sum() / counted.sum()
        out[f"{name}/bits_per_byte"] = nll[counted].sum() / math.log(2) / text
        out[f"{name}/unigram_entropy"] = -(p * np.log(p)).sum()
        out[f"{name}/tokens"] = counted.sum()
    for key in ("loss", "bits_per_byte", "unigram_entropy"):
        total = sum(shares[n] * out[f"{n}/{key}"] for n in shares)
        out[key] = total / sum(shares.values())
    return out


def text_bytes(source: str, inputs: np.ndarray, targets: np.ndarray) -> int:
    """UTF-8 bytes that targets stand for, from the pieces of the tokenizer."""
    pieces = sentencepiece(source)

    def size(i: int) -> int:
        if pieces.is_control(i) or pieces.is_unknown(i):
            return 0
        if pieces.is_byte(i):
            return 1
        return len(pieces.id_to_piece(i).replace("▁", " ").encode())

    # The tokenizer puts a space before a text; the first token after BOS stands for it too.
    first = int((inputs == pieces.bos_id()).sum())
    return sum(size(int(i)) for i in targets) - first


def whole_text_bytes(source: str, ids: np.ndarray, is_start: np.ndarray) -> int:
    pieces = sentencepiece(source)
    documents = np.split(ids, np.flatnonzero(is_start)[1:])
    return sum(len(pieces.decode(d.tolist()).encode()) for d in documents)


def sentencepiece(source: str):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / source / "tokenizer.model"))


# What is recorded from llama_jax -----------------------------------------------------------------


def record() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Prepare the data, and return the order of its sequences and the initial weights."""
    import contextlib
    import shutil
    import tempfile

    from llama_jax.prepare import shards
    from llama_jax.prepare.__main__ import main as prepare

    recipe = settings()
    names = list(recipe["data"]["sources"])
    shards.SHARD_TOKENS = 900  # several shards, and sequences that lie in two
    shards.CHUNK_BYTES = 400
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        for name in names:
            lines = [json.dumps({"text": text}) for text in texts(name)]
            Path(f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        sources = [f"--source={name}={name}.jsonl" for name in names]
        vocabulary = f"--vocab-size={recipe['model']['vocab_size']}"
        prepare(["out", *sources, vocabulary, "--val-fraction=0.2", "--workers=1"])
        for name in names:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            shutil.copytree(Path("out") / name, FOLDER / name)
    return recorded_order(), recorded_weights()


def texts(source: str) -> list[str]:
    """Short documents: a first-order chain over words, so that there is something to learn."""
    rng = np.random.default_rng(len(source) + 1)
    text = {
        "letters": "the cat sat on a mat and saw some small animals in été",
        "numbers": "12 + 7 = 19 ; 3 x 5 15 日 - 2",
    }
    words = text[source].split()
    out = []
    for _ in range({"letters": 70, "numbers": 34}[source]):
        at, drawn = int(rng.integers(len(words))), []
        for _ in range(int(rng.integers(1, 25))):
            drawn.append(words[at])
            at = (at * 3 + int(rng.integers(1, 4))) % len(words)
        out.append(" ".join(drawn))
    return out


def loaded():
    """The recipe as llama_jax reads it, with the data where they are."""
    from llama_jax.config import load_recipe

    paths = [f"data.sources.{n}.path={FOLDER / n}" for n in settings()["data"]["sources"]]
    return load_recipe(FOLDER / "recipe.toml", paths)


def recorded_order() -> np.ndarray:
    """(source, sequence) of every place of the run, found by the tokens of the batches."""
    import tempfile

    from llama_jax.data.mixture import TrainData, open_mixture
    from llama_jax.prepare.mixture import prepare_mixture

    recipe = loaded()
    T = recipe.data.seq_len
    where: dict[bytes, tuple[int, int]] = {}
    for source, name in enumerate(recipe.data.sources):
        ids, _ = read_split(name, "train")
        for index in range((len(ids) - 1) // T):
            key = ids[index * T : index * T + T + 1].astype(np.int32).tobytes()
            assert key not in where, "two equal sequences"
            where[key] = source, index
    with tempfile.TemporaryDirectory() as out:
        mixture = open_mixture(prepare_mixture(recipe.data, recipe.model.vocab_size, out))
        data = TrainData(mixture, recipe.data, recipe.train.batch_size)
        order = []
        for _ in range(recipe.train.steps):
            batch = next(data)
            rows = np.concatenate([batch.inputs_BT, batch.targets_BT[:, -1:]], axis=1)
            order += [where[row.astype(np.int32).tobytes()] for row in rows]
        data.close()
    return np.array(order, np.int16)


def recorded_weights() -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    from llama_jax.model.llama import ComputeConfig
    from llama_jax.train.step import init_state

    params = init_state(loaded(), ComputeConfig(jnp.dtype("float32"))).params
    return {
        path[-1].key: np.asarray(value)
        for path, value in jax.tree_util.tree_leaves_with_path(params)
    }


def inputs_of(values) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The recorded inputs in the file of reference values."""
    return values["order"], {
        k.removeprefix("initial/"): values[k] for k in values if k.startswith("initial/")
    }


def main(arguments: list[str]) -> None:
    """Write the reference values; with --record, also their inputs."""
    if arguments == ["--record"]:
        order, initial = record()
    else:
        order, initial = inputs_of(np.load(VALUES))
    out = {"order": order, **{f"initial/{k}": v for k, v in initial.items()}}
    out |= reference(order, initial)
    np.savez_compressed(VALUES, **out)
    for name, value in out.items():
        if value.ndim == 1 and not name.endswith("norm"):
            print(name, value)
    print("grad_norm", out["grad_norm"])


if __name__ == "__main__":
    main(sys.argv[1:])
