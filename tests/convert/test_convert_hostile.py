"""Hostile and malformed sources give one clear message each, quickly, in little memory.

The table runs in one process of its own, whose memory is capped at 300 MB above what it has after a
whole conversion.
"""

import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import convert_tools as tools
import jax
from convert_tools import DTYPES, small
from forked import Forked

from llama_jax.convert import formats, torch_files
from llama_jax.convert.__main__ import main
from llama_jax.convert.job import convert

SECONDS, MEMORY = 5, 300 << 20
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
DEEP = "[" * 100_000 + "]" * 100_000


def nested(depth: int) -> bytes:
    """Instructions for nested tuples that each hold the previous one twice: 2**depth leaves."""
    return b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth))


def pickled(data: bytes):
    """A case: this data.pkl in a Meta folder."""

    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
            archive.writestr("x/data.pkl", data)
            archive.writestr("x/data/0", bytes(64))

    return "meta", make


def put(layout: str, name: str, content: bytes | str):
    """A case: a file with this content."""
    data = content.encode() if isinstance(content, str) else content
    return layout, lambda folder: (folder / name).write_bytes(data)


def settings(layout: str, **changes):
    """A case: config.json, params.json or model.json with other values."""
    name = {"hf": "config.json", "meta": "params.json", "orbax": "model.json"}[layout]

    def make(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        if layout == "orbax" and "model" not in changes and "token_ids" not in changes:
            tree["model"] |= changes
        else:
            tree |= changes
        (folder / name).write_text(json.dumps(tree))

    return layout, make


def pipe(layout: str, name: str):
    """A case: a pipe without a writer."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return layout, make


def sparse(layout: str, name: str, start: bytes = b"", end: bytes = b""):
    """A case: a sparse file of 6 GB."""

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as f:
            f.write(start)
            f.truncate(6 << 30)
            f.seek(0, os.SEEK_END)
            f.write(end)

    return layout, make


def header(tree: dict):
    """A case: this header of model.safetensors."""
    text = json.dumps(tree).encode()
    return put("hf", "model.safetensors", len(text).to_bytes(8, "little") + text + bytes(64))


def many_tensors(folder: Path) -> None:
    entry = '"%d":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(1_000_000)) + "}").encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def overlapping(folder: Path) -> None:
    """A tensor of 2**60 elements that all share one storage element."""
    data = (
        b"\x80\x02}X\x15\x00\x00\x00tok_embeddings.weightctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        b"K\x10tQK\x00(\x8a\x04\x00\x00\x00\x40\x8a\x04\x00\x00\x00\x40t(K\x00K\x00t"
        b"\x89ccollections\nOrderedDict\n)RtRs."
    )
    pickled(data)[1](folder)


def renamed(folder: Path) -> None:
    (folder / "consolidated.00.pth").rename(folder / "consolidated.3000000000.pth")


def wide_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {str(i): f"{i}.safetensors" for i in range(200_000)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# name: (layout, change), arguments, what the message says
EOCD = b"PK\5\6\0\0\0\0\xff\xff\xff\xff" + (3 << 30).to_bytes(4, "little") + bytes(6)
NUMBERS = {"dtype": "F16", "shape": [1] * 200_000, "data_offsets": [0, 2]}
LONG = {"a" * 5_000_000: {"dtype": "no", "shape": [], "data_offsets": [0, 0]}}
CASES = {
    "tuple as key": (pickled(b"\x80\x02}" + nested(100)[2:] + b"K\x01s."), {}, "the key ((("),
    "tuple formatted": (pickled(nested(100) + b"Q."), {}, "refers to ((("),
    "tuple as storage": (
        pickled(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + nested(100)[2:]
                + b"K\x00))\x89)tR."), {}, "is not a storage",
    ),
    "tuple as name": (pickled(nested(100) + b"h\x00\x93."), {}, "which is not a name"),
    "memo of 2**28": (pickled(b"\x80\x02}r\x00\x00\x00\x10."), {}, "holds no tensors"),
    "memo read of 2**31": (pickled(b"\x80\x02j\xff\xff\xff\x7f."), {}, "cannot be read"),
    "number of 3 MB": (
        pickled(b"\x80\x02\x8b" + (3 << 20).to_bytes(4, "little") + b"\x7f" * (3 << 20) + b"."),
        {}, "more than 62 bits",
    ),
    "long pickle": (pickled(b"\x80\x02" + b")" * (5 << 20) + b"."), {}, "are read"),
    "many instructions": (pickled(b"\x80\x02" + b")" * (2 << 20) + b"."), {}, "instructions"),
    "deep list": (pickled(b"\x80\x02" + b"]" + b"]" * 900_000 + b"a" * 900_000 + b"."), {}, "over"),
    "overlapping": (("meta", overlapping), {}, "overlap in a storage of 16"),
    "zip directory of 3 GB": (
        sparse("meta", "consolidated.00.pth", b"PK\3\4", EOCD), {}, "table of contents",
    ),
    "3 billion shards": (("meta", renamed), {}, "consolidated.00.pth is missing"),
    "shard is a pipe": (pipe("meta", "consolidated.00.pth"), {}, "is not a regular file"),
    "shard is LFS": (put("meta", "consolidated.00.pth", LFS), {}, "is a Git LFS pointer"),
    "weights are a pipe": (pipe("hf", "model.safetensors"), {}, "is not a regular file"),
    "weights are LFS": (put("hf", "model.safetensors", LFS), {}, "is a Git LFS pointer"),
    "weights are sparse": (sparse("hf", "model.safetensors"), {}, "not a safetensors file"),
    "header of 4 GB": (
        sparse("hf", "model.safetensors", (4 << 30).to_bytes(8, "little")), {}, "a header of 4,",
    ),
    "shape of 200k": (header({"a": NUMBERS}), {}, "a has shape [1, 1,"),
    "1M tensors": (("hf", many_tensors), {}, "at most 8,388,608 are read"),
    "name of 5 MB": (header(LONG), {}, "model.safetensors: aaaa"),
    "deep header": (
        put("hf", "model.safetensors", len(DEEP).to_bytes(8, "little") + DEEP.encode()),
        {}, "header cannot be read",
    ),
    "index of 200k files": (("hf", wide_index), {}, "and 199,980 more problems"),
    "1e8 layers, hf": (settings("hf", num_hidden_layers=10**8), {}, "num_layers=100000000"),
    "1e8 layers, meta": (settings("meta", n_layers=10**8), {}, "num_layers=100000000"),
    "1e8 layers, ours": (settings("orbax", num_layers=10**8), {}, "num_layers=100000000"),
    "no model": (settings("orbax", model=5), {}, "model.json is damaged: it has no model"),
    "deep model": (settings("orbax", rope=json.loads("[" * 500 + "]" * 500)), {}, "rope"),
    "100k settings": (settings("orbax", **{f"k{i}": 1 for i in range(50_000)}), {}, "more problem"),
    "ids a list": (settings("orbax", token_ids=[1]), {}, "token_ids must be an object, not [1]"),
    "ids a string": (settings("orbax", token_ids={"eos": "2"}), {}, "eos token id is '2'"),
    "metadata a list": (put("orbax", "steps/0/model/_METADATA", "[]"), {}, "it holds a list"),
    "metadata odd": (
        put("orbax", "steps/0/model/_METADATA", '{"tree_metadata": {"a": []}}'), {}, "lists no arr",
    ),
    "metadata a pipe": (pipe("orbax", "steps/0/model/_METADATA"), {}, "is not a regular file"),
    "manifest deep": (put("orbax", "manifest.json", DEEP), {}, "manifest.json is damaged"),
    "manifest short": (
        put("orbax", "manifest.json", '{"rotary_layout": "half", "tensors": {}}'), {},
        "it has no SHA-256 of embed",
    ),
    "model.json a pipe": (pipe("orbax", "model.json"), {}, "is not a regular file"),
    "eos a string": (settings("hf", eos_token_id="</s>"), {}, "the eos token id is '</s>'"),
    "eos true": (settings("hf", eos_token_id=True), {}, "the eos token id is True"),
    "eos 1.5": (settings("hf", eos_token_id=[1.5]), {}, "the eos token id is [1.5]"),
    "eos -7": (settings("hf", eos_token_id=-7), {}, "the eos token id is -7"),
    "eos nested": (settings("hf", eos_token_id=[[1]]), {}, "the eos token id is [[1]]"),
    "eos outside": (settings("hf", eos_token_id=24), {}, "but the embedding has 24 rows"),
    "bos a list": (settings("hf", bos_token_id=[1]), {}, "the bos token id is [1]"),
    "9 eos ids": (settings("hf", eos_token_id=[*range(9)]), {}, "an id or at most 8"),
    "tied as a word": (settings("hf", tie_word_embeddings="no"), {}, "neither true nor false"),
    "scaled as a word": (settings("meta", use_scaled_rope="no"), {}, "neither true nor false"),
    "long value": (settings("hf", hidden_act="x" * 900_000), {}, "hidden_act='xxx"),
    "context -5": (settings("meta"), {"context": -5}, "--context -5 must be at least 1"),
    "moe": (settings("meta", moe_args={}), {}, "moe_args is not supported"),
}  # fmt: skip
for _name in ("config.json", "generation_config.json", "tokenizer_config.json"):
    CASES |= {
        f"{_name} deep": (put("hf", _name, DEEP), {}, f"{_name} is damaged: nested too deeply"),
        f"{_name} a list": (put("hf", _name, "[1]"), {}, f"{_name} is damaged: it holds a list"),
        f"{_name} a pipe": (pipe("hf", _name), {}, f"{_name} is not a regular file"),
        f"{_name} sparse": (sparse("hf", _name), {}, "are read"),
        f"{_name} LFS": (put("hf", _name, LFS), {}, "is a Git LFS pointer"),
        f"{_name} of values": (put("hf", _name, "[{" * 450_000), {}, "damaged"),
    }
for _name in ("tokenizer.model", "tokenizer.json"):
    CASES |= {
        f"{_name} deep": (put("hf", _name, DEEP), {}, "not a usable tokenizer.json, or is damaged"),
        f"{_name} a pipe": (pipe("hf", _name), {}, f"{_name} is not a regular file"),
        f"{_name} sparse": (sparse("hf", _name), {}, "at most 67,108,864 are read"),
        f"{_name} LFS": (put("hf", _name, LFS), {}, "is a Git LFS pointer"),
        f"{_name} random": (put("hf", _name, bytes(range(256)) * 40), {}, "or is damaged"),
        f"{_name} empty": (put("hf", _name, b""), {}, f"{_name} is empty: it is damaged"),
        f"{_name} of lines": (put("hf", _name, b"\n" * (40 << 20)), {}, "or is damaged"),
        f"{_name} of values": (put("hf", _name, b"[{}," * (10 << 20)), {}, "too many"),
        f"{_name} odd ids": (
            put("hf", _name, '{"model": {"vocab": {"a": "b"}}}'), {}, "or is damaged",
        ),
    }  # fmt: skip
CASES["template not UTF-8"] = (put("hf", "chat_template.jinja", b"\xff"), {}, "not UTF-8 text")
CASES["template LFS"] = (put("hf", "chat_template.jinja", LFS), {}, "is a Git LFS pointer")
CASES["template sparse"] = (sparse("hf", "chat_template.jinja"), {}, "at most 4,194,304 are read")
# What changes the computation, with a value that does and, below, values that do not.
CHANGES = {
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22, "attention_multiplier": 0.01, "logits_scaling": 8.0,
    "no_rope_layers": [1, 0], "layer_types": ["sliding_attention", "full_attention"],
    "compression_config": {"bits": 8}, "quantization_config": {"bits": 4}, "attention_bias": True,
    "mlp_bias": True, "sliding_window": 4096, "partial_rotary_factor": 0.5, "scale_depth": 1.4,
    "num_local_experts": 8, "qk_layernorm": True,
}  # fmt: skip
CASES |= {
    f"{key} changes": (settings("hf", **{key: value}), {}, f"{key}=")
    for key, value in CHANGES.items()
}


def run(root: Path) -> dict[str, list]:
    """Every case: [exit code, message, CPU seconds, files left]."""
    cfg = small()
    state = tools.meta_state(cfg, DTYPES["float16"], make=tools.random_values)
    made = {"hf": tools.make_hf(root / "hf", state, cfg)}
    made["meta"] = tools.make_meta(root / "meta", state, cfg)
    made["orbax"] = convert(made["hf"], root / "orbax")
    convert(made["orbax"], root / "back", to="hf")
    status = Path("/proc/self/status").read_text()
    limit = (int(re.search(r"VmData:\s+(\d+)", status)[1]) << 10) + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    results = {}
    for name, ((layout, change), arguments, _) in CASES.items():
        folder = root / "case"
        shutil.copytree(made[layout], folder / "source")
        change(folder / "source")
        command = [str(folder / "source"), str(folder / "out"), "--max-memory", "64GiB"]
        command += [x for k, v in arguments.items() for x in (f"--{k}", str(v))]
        errors, sys.stderr = sys.stderr, io.StringIO()
        signal.alarm(30)
        start = time.process_time()  # other processes may be busy; a wait ends with the alarm
        try:
            code = main(command)
            message = sys.stderr.getvalue()
        except BaseException as e:
            code, message = 99, repr(e)[:500]
        finally:
            seconds, sys.stderr = time.process_time() - start, errors
            signal.alarm(0)
        left = sorted(p.name for p in folder.iterdir())
        results[name] = [code, message, seconds, left]
        shutil.rmtree(folder)
    return results


def write_results(root: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    (root / "results.json").write_text(json.dumps(run(root)))


def test_hostile_sources_are_refused_quickly_in_little_memory(tmp_path):
    process = Forked(write_results, tmp_path)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == set(CASES)
    wrong = [
        (name, *result)
        for name, result in results.items()
        if result[0] != 1
        or not result[1].startswith("error: ")
        or CASES[name][2] not in result[1]
        or len(result[1]) > 12_000
        or result[2] > SECONDS
        or result[3] != ["source"]
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_neutral_values_are_accepted():
    from llama_jax.convert import huggingface

    cfg = small()
    same = {
        "attn_logit_softcapping": None, "embedding_multiplier": 1, "residual_multiplier": 1.0,
        "attention_multiplier": cfg.head_dim**-0.5, "logits_scaling": 1.0, "no_rope_layers": [1, 1],
        "layer_types": ["full_attention"] * 2, "sliding_window": None, "mlp_bias": False,
        "use_sliding_window": False, "query_pre_attn_scalar": 4, "partial_rotary_factor": 1.0,
        "num_local_experts": 0, "attention_dropout": 0.1, "temperature": 0.7, "dim_model_base": 32,
    }  # fmt: skip
    read, warnings = huggingface.parse_config(tools.config_of(cfg) | same, "config.json")
    assert (read, warnings) == (cfg, [])
    many = {f"k{i}": 1 for i in range(40)}
    _, warnings = huggingface.parse_config(tools.config_of(cfg) | many, "config.json")
    assert warnings[0].endswith("and 30 more")


def test_reading_stays_within_what_torch_writes(tmp_path):
    """The largest Llama model in one file is far below every limit."""
    cfg = small(num_layers=126)
    state = tools.meta_state(cfg, DTYPES["float16"])
    tools.save_torch(tmp_path / "a.pth", state)
    tools.save_safetensors(tmp_path / "a.safetensors", state)
    assert len(torch_files.read(tmp_path / "a.pth")) == len(state) == 126 * 9 + 3
    assert len(formats.read_safetensors(tmp_path / "a.safetensors")) == len(state)
    plan = torch_files.plan(tmp_path / "a.pth", {k: (w.shape, w.dtype) for k, w in state.items()})
    assert 8 * len(plan.small["a/data.pkl"]) < torch_files._MAX_PICKLE_BYTES
