"""Every kind of bad input gives a clear error and leaves no folder that looks complete."""

import collections
import errno
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import convert_tools as tools
import numpy as np
import pytest
from convert_tools import ANY, DTYPES, small

from llama_jax.checkpoint import file_hashes
from llama_jax.convert import job as convert_module
from llama_jax.convert import tensors as weights
from llama_jax.convert import torch_files, torch_pickle
from llama_jax.convert.__main__ import main
from llama_jax.convert.formats import ConvertError
from llama_jax.convert.job import convert, open_folder

F16 = DTYPES["float16"]


@pytest.fixture
def cfg():
    return small()


@pytest.fixture
def state(cfg):
    return tools.meta_state(cfg, F16, make=tools.random_values)


def refused(source: Path, *expected: str) -> None:
    """The conversion fails, its message contains every text, and no folder is created."""
    target = source.parent / "target"
    with pytest.raises((ValueError, OSError)) as caught:
        convert(source, target)
    for text in expected:
        assert text in str(caught.value), str(caught.value)
    assert not target.exists()
    assert not (source.parent / "target.partial").exists()


def test_long_errors_are_cut():
    message = str(ConvertError(*(f"{i}: {'x' * 10_000}" for i in range(25))))
    assert len(message) < 12_000
    assert message.startswith("0: xxx")
    assert message.endswith("...\nand 5 more problems")


# Meta


def test_folders_without_weights(tmp_path):
    refused(tmp_path / "nothing", "nothing does not exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("hello")
    refused(empty, "is not a folder of weights", "consolidated.*.pth", "found notes.txt")
    refused(empty / "notes.txt", "is a file; give the folder")


def test_missing_shard(tmp_path, cfg, state):
    source = tools.make_meta(tmp_path / "meta", state, cfg, 4)
    (source / "consolidated.01.pth").unlink()
    refused(source, "consolidated.01.pth is missing")
    (source / "consolidated.00.pth").rename(source / "consolidated.pth")
    refused(source, "consolidated.00.pth is missing")


def test_missing_last_shard(tmp_path, cfg, state):
    source = tools.make_meta(tmp_path / "meta", state, cfg, 4)
    (source / "consolidated.03.pth").unlink()
    refused(source, "layers.0.attention.wq.weight has shape [8, 32]", "is a shard missing?")


def test_missing_or_broken_params(tmp_path, cfg, state):
    source = tools.make_meta(tmp_path / "meta", state, cfg)
    (source / "params.json").write_text("{oops")
    refused(source, "params.json is damaged: not JSON")
    (source / "params.json").write_text("[1]")
    refused(source, "params.json is damaged: it holds a list")
    (source / "params.json").unlink()
    refused(source, "params.json is missing")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dim", 64, ["has shape"]),
        ("n_layers", 3, ["layers.2.attention.wq.weight is missing", "layers.2.ffn_norm.weight is"]),
        ("n_layers", 1, ["layers.1.attention.wq.weight is not a tensor of this model"]),
        ("n_heads", 16, ["wk.weight has shape [16, 32], params.json makes it [8, 32]"]),
        ("multiple_of", 7, ["w1.weight has shape [48, 32]", "w2.weight has shape [32, 48]"]),
        ("vocab_size", 25, ["vocab_size=25, but the embedding has 24 rows"]),
        ("n_kv_heads", 3, ["num_heads=8 must be a multiple of num_kv_heads=3"]),
        ("dim", None, ["dim is missing"]),
        ("norm_eps", "small", ["norm_eps='small' is not a positive number"]),
        ("quantization_args", {"group_size": 32}, ["quantization_args is not supported"]),
        ("vision_chunk_size", 448, ["vision_chunk_size is not supported"]),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_params(tmp_path, cfg, state, key, value, expected):
    source = tools.make_meta(tmp_path / "meta", state, cfg)
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps(params | {key: value}))
    refused(source, *expected)


def test_missing_and_extra_tensors_are_listed_at_once(tmp_path, cfg, state):
    for name in ("norm.weight", "layers.1.attention.wv.weight"):
        del state[name]
    state["layers.0.attention.wq.bias"] = np.zeros(4, F16)
    state["adapter"] = np.zeros(4, F16)
    source = tools.make_meta(tmp_path / "meta", state, cfg)
    refused(
        source, "norm.weight is missing", "layers.1.attention.wv.weight is missing",
        "layers.0.attention.wq.bias is not a tensor of this model", "adapter is not",
    )  # fmt: skip


def test_norms_that_differ_between_shards(tmp_path, cfg, state):
    source = tools.make_meta(tmp_path / "meta", state, cfg, 2)
    shard = tools.meta_shards(state, 2)[1]
    shard["layers.1.ffn_norm.weight"] = shard["layers.1.ffn_norm.weight"] + F16.type(1)
    shard["norm.weight"] = shard["norm.weight"] + F16.type(1)
    tools.save_torch(source / "consolidated.01.pth", shard)
    refused(
        source, "layers.1.ffn_norm.weight differs between shards 00 and 01", "norm.weight differs"
    )


def test_dtypes_that_differ_or_are_not_weights(tmp_path, cfg, state):
    source = tools.make_meta(tmp_path / "meta", state, cfg)
    name = "layers.1.attention.wq.weight"
    tools.save_torch(source / "consolidated.00.pth", state | {name: state[name].astype(np.float32)})
    refused(source, "layers or shards differ in dtype", "blocks/attention/q/1 is float32")
    tools.save_torch(source / "consolidated.00.pth", state | {"norm.weight": np.ones(32, np.int8)})
    refused(source, "norm is int8: only float16, bfloat16 and float32")


def test_both_layouts_in_one_folder(tmp_path, cfg, state):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    shutil.copy(tools.make_meta(tmp_path / "meta", state, cfg) / "consolidated.00.pth", source)
    refused(source, "holds both consolidated.00.pth and model.safetensors")


# torch files


def test_truncated_pth(tmp_path, cfg, state):
    source = tools.make_meta(tmp_path / "meta", state, cfg)
    path = source / "consolidated.00.pth"
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 100, len(whole) // 2, 40, 3, 0):
        path.write_bytes(whole[:cut])
        refused(source, "consolidated.00.pth")


def test_wrong_magic_and_legacy_files(tmp_path, cfg, state):
    source = tools.make_meta(tmp_path / "meta", state, cfg)
    path = source / "consolidated.00.pth"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)
    refused(source, "consolidated.00.pth is a Git LFS pointer", "git lfs pull")
    path.write_bytes(b"hello" * 9)
    refused(source, "not a torch file: it starts with b'hellohel'")
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    refused(source, "written by torch before 1.6")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(source, "a zip, but not of torch")


def test_legacy_files_of_torch_itself(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.pth: written by torch before 1.6"):
        torch_files.read(path)


def with_pickle(path: Path, data: bytes, records: dict | None = None, compress=0) -> Path:
    """A torch zip with this pickle."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("x/data.pkl", data)
        for name, content in (records or {"x/data/0": bytes(64)}).items():
            archive.writestr(name, content)
    return path


def one_tensor(
    offset=0, size="K\x04", stride="K\x01", storage="FloatStorage", key="0", count="K\x10"
):
    """A pickle of {"a": tensor}, its numbers as opcodes."""
    return (
        "\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        f"ctorch\n{storage}\nX\x01\x00\x00\x00{key}X\x03\x00\x00\x00cpu{count}tQ"
        f"K{chr(offset)}({size}t({stride}t\x89ccollections\nOrderedDict\n)RtRs."
    ).encode("latin1")


def test_the_hand_written_pickle_is_good(tmp_path):
    """Otherwise the tests of refused files below would pass without testing anything."""
    region = torch_files.read(with_pickle(tmp_path / "x.pth", one_tensor()))["a"]
    assert region.shape == (4,)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(offset=13), "reaches element 17 of a storage that holds 16"),
        (dict(size="K\x11"), "reaches element 17 of a storage that holds 16"),
        (dict(count="K\x04", size="K\x08"), "reaches element 8 of a storage that holds 4"),
        (dict(stride="K\x06"), "reaches element 19"),
        (dict(count="K\x7f", size="K\x20"), "reaches element 32 of a storage that holds 16"),
        (dict(size="J\xff\xff\xff\xff"), "shape (-1,)"),
        (dict(stride="J\xff\xff\xff\xff"), "strides (-1,)"),
        (dict(size="\x88"), "shape (True,)"),
        (dict(stride=""), "strides ()"),
        (dict(key="7"), "is stored in x/data/7, which the file does not contain"),
        (dict(storage="QInt8Storage"), "asks for torch.QInt8Storage"),
    ],
)
def test_a_storage_outside_the_file(tmp_path, changes, expected):
    with pytest.raises(ValueError, match=r"x\.pth") as caught:
        torch_files.read(with_pickle(tmp_path / "x.pth", one_tensor(**changes)))
    assert expected in str(caught.value)


class Bomb:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, "system"), (eval, ".eval"), (exec, ".exec"), (getattr, "getattr"),
     (__import__, ".__import__"), (collections.Counter, "collections.Counter")],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_by_name(tmp_path, function, named, protocol):
    trace = tmp_path / "trace"
    bomb = Bomb(function, f"touch {trace}") if function is os.system else Bomb(function, "1")
    for where in (bomb, {"model": bomb}, collections.OrderedDict(a=[bomb]), {bomb.call[1]: bomb}):
        path = with_pickle(tmp_path / "x.pth", pickle.dumps(where, protocol))
        with pytest.raises(ValueError, match=r"x\.pth: its pickle asks for") as caught:
            torch_files.read(path)
        assert named in str(caught.value)
        assert "refused" in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80", b".", b"garbage", b"\x80\x02}.", b"\x80\x02N.", b"\x80\x02]q\x00h\x00a.",
        b"\x80\x63.", b"\x80\x02X\xff\xff\xff\x7fabc", b"(" * 10000 + b".",
        b"\x80\x02}(K\x01K\x02u.",
        b"\x80\x02ctorch\nFloatStorage\n.", b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__call__K\x01s\x86b.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00)))t\x89tR.",
        b"\x80\x02X\x01\x00\x00\x00aQ.", b"\x80\x02K\x01Q.", b"\x82\x01.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ],
)  # fmt: skip
def test_damaged_pickles_raise_value_errors(tmp_path, data):
    with pytest.raises(ValueError, match=r"x\.pth"):
        torch_files.read(with_pickle(tmp_path / "x.pth", data))


def test_a_pickle_cannot_change_what_the_next_file_means(tmp_path):
    names = dict(torch_pickle._NAMES)
    for slot in (b"}X\x07\x00\x00\x00__doc__K\x01sb", b"N}X\x05\x00\x00\x00dtypeK\x01s\x86b"):
        for name in (
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch\nFloatStorage\n",
            b"ccollections\nOrderedDict\n",
        ):
            with pytest.raises(ValueError, match=r"x\.pth"):
                torch_files.read(with_pickle(tmp_path / "x.pth", b"\x80\x02" + name + slot + b"."))
    assert names == torch_pickle._NAMES
    region = torch_files.read(with_pickle(tmp_path / "x.pth", one_tensor()))["a"]
    assert region.dtype == np.float32


def test_zips_that_torch_does_not_write(tmp_path):
    packed = with_pickle(tmp_path / "x.pth", one_tensor(), compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        torch_files.read(packed)
    big = with_pickle(
        tmp_path / "y.pth", one_tensor(), {"x/data/0": bytes(64), "x/byteorder": b"big"}
    )
    with pytest.raises(ValueError, match="big-endian"):
        torch_files.read(big)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(big, "a") as archive:
        archive.writestr("x/data/0", bytes(64))
    with pytest.raises(ValueError, match=r"names x/data/0 twice"):
        torch_files.read(big)


def test_a_zip_record_outside_the_file(tmp_path):
    path = with_pickle(tmp_path / "x.pth", one_tensor())
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\1\2")  # the directory's entry of x/data/0
    data[at + 20 : at + 28] = struct.pack("<II", 1 << 20, 1 << 20)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x/data/0 ends at byte 10.*outside the file"):
        torch_files.read(path)


# Hugging Face


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(path: Path, header: dict, body: bytes | None = None) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(header).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + (data[start:] if body is None else body)
    )


def test_truncated_and_foreign_safetensors(tmp_path, cfg, state):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    path = source / "model.safetensors"
    whole = path.read_bytes()
    for data, expected in [
        (whole[:-1], "is cut off"), (whole + b"\0", "has bytes after the last tensor"),
        (whole[:9], "cut off"),
        (b"", "not a safetensors file"), (b"<!DOCTYPE html><html>", "not a safetensors file"),
        (b"\x08\0\0\0\0\0\0\0[1, 2, 3", "header cannot be read"),
        (b"\x02\0\0\0\0\0\0\0{}", "is missing"),
    ]:  # fmt: skip
        path.write_bytes(data)
        refused(source, expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(dtype="F8_E4M3"), "has dtype 'F8_E4M3': quantized"),
        (dict(dtype="I8", data_offsets=[0, 768]), "is int8: only float16"),
        (dict(shape=[24, 31]), "does not fit in 1536 bytes"),
        (dict(shape=[-24, -32]), "has shape [-24, -32]"),
        (dict(shape=[24, 32.0]), "has shape [24, 32.0]"),
        (dict(data_offsets=[2, 1538]), "overlap or leave a gap"),
        (dict(data_offsets=[0]), "header cannot be read"),
        (dict(dtype=None), "has dtype None"),
    ],
)
def test_wrong_safetensors_headers(tmp_path, cfg, state, change, expected):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    path = source / "model.safetensors"
    header = header_of(path)
    name = "model.embed_tokens.weight"
    assert header[name]["data_offsets"][0] == 0
    with_header(path, header | {name: header[name] | change})
    if change.get("dtype") == "I8":  # keep the file consistent, so that only the dtype is wrong
        hf = tools.hf_state(state, cfg)
        tools.save_safetensors(path, hf | {name: np.zeros((24, 32), np.int8)})
    refused(source, expected)


def test_index_and_files_must_agree(tmp_path, cfg, state):
    source = tools.make_hf(tmp_path / "hf", state, cfg, files=3)
    index_path = source / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())["weight_map"]
    second = "model-00002-of-00003.safetensors"
    write = lambda tree: index_path.write_text(json.dumps({"weight_map": tree}))
    some = next(n for n, f in index.items() if f == second)
    write({n: f for n, f in index.items() if n != some})
    refused(source, f"{second}: {some} is not listed by the index")
    write(index | {"model.layers.0.extra": second, "more": second})
    refused(
        source, f"{second}: model.layers.0.extra is missing, listed by the index", "more is missing"
    )
    for name in (
        "../secret.safetensors",
        "/etc/passwd",
        "..",
        "a/b.safetensors",
        "a\\b.safetensors",
        "",
    ):
        write(index | {some: name})
        refused(source, f"names {name!r}, which is outside the folder")
    write(5)
    refused(source, "has no weight_map")
    write(index)
    (source / second).unlink()
    refused(source, f"{second} is missing, named by model.safetensors.index.json")
    index_path.unlink()
    refused(source, "holds no model.safetensors, pytorch_model.bin, or index")


def test_missing_extra_and_wrong_shapes_in_hugging_face_files(tmp_path, cfg, state):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    hf = tools.hf_state(state, cfg)
    name = "model.layers.0.self_attn.q_proj"
    bad = {k: v for k, v in hf.items() if k != "model.norm.weight"}
    bad |= {f"{name}.bias": np.zeros(32, F16), "lm_head.weight": np.zeros((23, 32), F16)}
    tools.save_safetensors(source / "model.safetensors", bad)
    refused(
        source, "model.norm.weight is missing", f"{name}.bias is not a tensor of this model",
        "lm_head.weight has shape [23, 32], config.json makes it [24, 32]",
    )  # fmt: skip
    tools.save_safetensors(
        source / "model.safetensors", hf | {f"{name[:-7]}.rotary_emb.inv_freq": np.ones(2, F16)}
    )
    convert(source, tmp_path / "fine")


def test_tied_weights_that_differ_or_are_missing(tmp_path, cfg, state):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(source, "config.json ties the embeddings, but lm_head.weight differs")
    hf = tools.hf_state(state, cfg)
    equal = hf | {"lm_head.weight": hf["model.embed_tokens.weight"]}
    tools.save_safetensors(source / "model.safetensors", equal)
    found = open_folder(source)
    assert found.cfg.tie_embeddings
    assert "lm_head.weight equals the embedding: tied" in found.warnings
    del hf["lm_head.weight"]
    tools.save_safetensors(source / "model.safetensors", hf)
    (source / "config.json").write_text(json.dumps(config))
    refused(source, "lm_head.weight is missing")


# Orbax


def test_checkpoints_that_are_not_whole(tmp_path, cfg, state):
    made = convert(tools.make_hf(tmp_path / "hf", state, cfg), tmp_path / "made")
    settings = json.loads((made / "model.json").read_text())

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(made, folder)
        change(folder)
        return folder

    put = lambda tree: lambda p: (p / "model.json").write_text(json.dumps(settings | tree))
    model = settings["model"]
    array = lambda p: shutil.rmtree(p / "steps/0/model/embed")
    refused(broken("a", put({"format": 2})), "format=2")
    refused(broken("b", put({"rotary_layout": "interleaved"})), "rotary_layout='interleaved'")
    refused(
        broken("c", put({"model": model | {"ffn_dim": 50}})),
        "mlp/gate has shape [2, 32, 48], model.json makes it",
    )
    refused(
        broken("d", put({"model": model | {"tie_embeddings": True}})),
        "unembed is not a tensor of this model",
    )
    refused(broken("e", put({"model": model | {"depth": 3}})), "unknown setting depth")
    refused(broken("f", lambda p: shutil.rmtree(p / "steps")), "holds no finished step")
    refused(broken("g", lambda p: (p / "steps/0/model/_METADATA").unlink()), "_METADATA is missing")
    refused(broken("h", array), "holds no readable array embed")
    refused(
        made / "steps/7" if (made / "steps/7").mkdir() is None else made, "_METADATA is missing"
    )


# The destination, the disk, permissions


def test_a_destination_that_exists(tmp_path, cfg, state, capsys):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(ValueError, match="full exists; remove it or choose another name"):
        convert(source, tmp_path / "full")
    assert (tmp_path / "full/file").read_text() == "mine"
    with pytest.raises(ValueError, match="nowhere does not exist; create it first"):
        convert(source, tmp_path / "nowhere/out")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial/file").write_text("mine")
    with pytest.raises(ValueError, match="is not an unfinished conversion; rename or"):
        convert(source, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert open_folder(tmp_path / "empty").format == "orbax"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(to="onnx"), "to='onnx' must be 'meta', 'hf', 'orbax' or 'gguf'"),
        (dict(dtype="float64"), "dtype='float64' must be one of 'keep', 'float16', 'bfloat16', 'f"),
        (dict(quantize="int2"), "quantize='int2' must be 'int8' or 'int4'"),
    ],
)
def test_unknown_options_are_refused(tmp_path, cfg, state, options, expected):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    with pytest.raises(ValueError, match=expected):
        convert(source, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_too_little_disk_before_the_start(tmp_path, cfg, state, monkeypatch):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    refused(source, "has 1.0 MB free, 16.8 MB are needed")


@pytest.mark.parametrize("to", ["hf", "meta", "orbax"])
def test_a_disk_that_fills_up(tmp_path, cfg, state, monkeypatch, capsys, to):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    written = []

    def full(*args):
        written.append(args)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    kind = weights.TorchWeights
    if to == "orbax":
        from llama_jax.convert.orbax import OrbaxWeights as kind
    real = kind.write
    monkeypatch.setattr(kind, "write", full)
    command = [str(source), str(tmp_path / "out"), "--to", to, *ANY]
    assert main(command) == 1
    assert "No space left on device; the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="partial"):
        open_folder(tmp_path / "out.partial")
    monkeypatch.setattr(kind, "write", real)
    assert main([*command, "--verify"]) == 0


def test_no_read_permission(tmp_path, cfg, state, capsys):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    (source / "model.safetensors").chmod(0)
    root = os.geteuid() == 0  # who may read everything
    if root:
        for path in (*tmp_path.parents, tmp_path):
            if path.owner() == "root" and path.stat().st_mode & 0o077 == 0:
                path.chmod(0o711)
        tmp_path.chmod(0o777)
        os.seteuid(65534)
    try:
        status = main([str(source), str(tmp_path / "out"), *ANY])
    finally:
        if root:
            os.seteuid(0)
    assert status == 1
    assert "model.safetensors: Permission denied" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_a_source_that_changes_meanwhile(tmp_path, cfg, state, monkeypatch):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    write = convert_module._write_small_files

    def change(plan, sums):
        os.utime(source / "model.safetensors", ns=(1, 1))
        write(plan, sums)

    monkeypatch.setattr(convert_module, "_write_small_files", change)
    with pytest.raises(ValueError, match="hf changed during the conversion"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shard_counts_that_do_not_divide(tmp_path, cfg, state):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    for to, shards, expected in [
        ("meta", 3, "does not divide n_heads=8, n_kv_heads=4, dim=32; this model can be"),
        ("meta", 8, "does not divide n_kv_heads=4"),
        ("hf", 100, "the model has only 21 tensors"),
        ("orbax", 2, "--shards is for Meta and Hugging Face"),
        ("hf", 0, "--shards 0 must be at least 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="shards") as caught:
            convert(source, tmp_path / "out", to=to, shards=shards)
        assert expected in str(caught.value)
        assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match="--context is for Meta folders"):
        convert(source, tmp_path / "out", context=5)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p.symlink_to(p.with_name("real")), "out is a link to"),
        (lambda p: p.symlink_to("nowhere"), "out is a link to nowhere"),
        (lambda p: p.with_name("out.partial").symlink_to("real"), "not an unfinished conversion"),
        (lambda p: p.with_name("out.partial").write_text("mine"), "not an unfinished conversion"),
    ],
)
def test_destinations_that_cannot_be_renamed_to(tmp_path, cfg, state, make, expected):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    (tmp_path / "real").mkdir()
    make(tmp_path / "out")
    with pytest.raises(ValueError, match=expected):
        convert(source, tmp_path / "out")
    for name in (".", "..", "/", str(tmp_path / "real/..")):
        with pytest.raises(ValueError, match="give the name of a folder to create"):
            convert(source, Path(name))
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize("record", [b'{"epoch": 1}\n', b"not JSON\n", b"[[[[", b"\xff" * 9])
def test_partial_folder_of_another_program_is_kept(tmp_path, cfg, state, record):
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "progress.jsonl").write_bytes(record)
    (theirs / "results.csv").write_text("of a week")
    with pytest.raises(ValueError, match=r"partial exists and is not an unfinished conversion"):
        convert(source, tmp_path / "out")
    assert (theirs / "progress.jsonl").read_bytes() == record
    assert (theirs / "results.csv").read_text() == "of a week"


@pytest.mark.parametrize("to", ["hf", "orbax", "meta"])
def test_small_files_cut_off_by_a_full_disk_are_written_again(
    tmp_path, cfg, state, monkeypatch, to
):
    """The disk fills up while a small file is written, and older versions left truncated files."""
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    (source / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    whole = convert(source, tmp_path / "whole", to=to)
    write_list = file_hashes.write_list

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_hashes, "write_list", full)
    with pytest.raises(OSError, match=r"No space left on device: .*out\.partial"):
        convert(source, tmp_path / "out", to=to)
    partial = tmp_path / "out.partial"
    for path in whole.glob("*.json"):
        (partial / path.name).write_bytes(path.read_bytes()[:7])
    (partial / "generation_config.json.1234.partial").write_text("{")
    monkeypatch.setattr(file_hashes, "write_list", write_list)
    out = convert(source, tmp_path / "out", to=to)
    trees = lambda folder: {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")}
    for tree in (made := trees(out)), (expected := trees(whole)):
        # Not the hashes of files: Orbax writes the time into its own.
        tree["manifest.json"] = tree["manifest.json"]["tensors"]
    assert made == expected


@pytest.mark.parametrize("start", ["orbax", "hf", "meta"])
def test_a_damaged_source_is_refused_by_its_manifest(tmp_path, cfg, state, capsys, start):
    """One changed bit of a tensor stops conversion to every format."""
    made = convert(tools.make_hf(tmp_path / "hf", state, cfg), tmp_path / "made", to=start)
    if start == "orbax":
        chunks = made / "steps/0/model/blocks.mlp.up/c/1"
        path = next(p for p in chunks.rglob("*") if p.is_file())
        offset = 3
    else:
        part = open_folder(made).weights.shards["blocks/mlp/up/1"][0]
        path, offset = part.slice.path, part.slice.offset
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)
        f.seek(offset)
        f.write(bytes([byte[0] ^ 1]))
    num_shards: list[dict] = [dict(to="hf"), dict(to="meta"), dict(to="orbax")]
    num_shards += [dict(dtype="float32", to="hf"), dict(quantize="int8", to="orbax")]
    num_shards += [dict(quantize="int4", to="orbax")]
    for way in num_shards:
        with pytest.raises(
            ValueError, match=r"blocks/mlp/up/1 differs from manifest.json|blocks.mlp.up/c/1/"
        ):
            convert(made, tmp_path / "out", verify=True, **way)
        assert "verified" not in capsys.readouterr().out
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
    if start != "orbax":
        (made / "manifest.json").unlink()
        convert(made, tmp_path / "out")
