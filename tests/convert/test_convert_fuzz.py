"""Reading any file gives weights, a ValueError or an OSError.

FUZZ_EXAMPLES=20000 runs each test for minutes.
"""

import contextlib
import copy
import json
import os
import pickle
import zipfile
from pathlib import Path

import convert_tools as tools
import pytest
from convert_tools import DTYPES, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.convert import formats, torch_files
from llama_jax.convert.job import open_folder
from llama_jax.convert.torch_pickle import dump_pickle
from llama_jax.data import tokenizer_files
from llama_jax.prepare.tokenizer import train_tokenizer

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Meta and a Hugging Face folder with all the small files that may be beside weights."""
    root = tmp_path_factory.mktemp("fuzz")
    cfg = small()
    state = tools.meta_state(cfg, DTYPES["float16"], make=tools.random_values)
    made = {"meta": tools.make_meta(root / "meta", state, cfg)}
    made["hf"] = tools.make_hf(root / "hf", state, cfg, files=2)
    write = lambda name, tree: (made["hf"] / name).write_text(json.dumps(tree))
    write("generation_config.json", {"eos_token_id": [2, 3], "bos_token_id": 1})
    write("tokenizer_config.json", {"chat_template": "{{ x }}", "added_tokens_decoder": {}})
    write("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 5}]})
    (made["hf"] / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}")
    return made


def only_our_errors():
    return contextlib.suppress(ValueError, OSError)


@contextlib.contextmanager
def replaced(path: Path, content: bytes):
    """Replace the content of a file temporarily."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before) if before is not None else path.unlink()


@st.composite
def damaged(draw, content: bytes):
    """A file with some bytes changed, removed, repeated or inserted."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 20))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * draw(st.integers(1, 3))
            case 3:
                data[at:at] = draw(st.binary(max_size=12))
    return bytes(data)


WEIRD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([-1, 0, 1, 2, 2**31, 2**63, 10**30, "F16", "llama", [1, 2], [0, 2]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)  # fmt: skip


@st.composite
def changed(draw, tree):
    """A JSON tree, some of whose values are replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while isinstance(node, dict) and node:
            key = draw(st.sampled_from([*node, "new"]))
            inner = node.get(key)
            if isinstance(inner, dict) and inner and draw(st.booleans()):
                node = inner
                continue
            if draw(st.integers(0, 4)) == 0:
                node.pop(key, None)
            else:
                node[key] = draw(WEIRD)
            break
    return tree


# Parts of pickles that torch writes, and all the instructions there are.
OPCODES = [bytes([i]) for i in range(256)]
PARTS = [
    b"\x80\x02", b"}", b"(", b"q\x00", b"h\x00", b"h\x01", b"\x85", b"\x86", b"\x87", b"R", b"Q",
    b"tQ", b"u", b"s", b"t", b"K\x01", b"K\x10", b"K\x00", b"J\xff\xff\xff\xff", b"\x89", b"N",
    b"ctorch\nHalfStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n", b".",
    b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n", b")", b"]", b"e", b"a",
    b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"X\x03\x00\x00\x00cpu", b"\x93", b"\x94",
    b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00", b"X\xff\xff\xff\x7f", b"\x82\x01", b"l", b"d", b"0", b"b",
]  # fmt: skip


@fuzz
@given(
    data=st.lists(st.sampled_from(PARTS) | st.sampled_from(OPCODES), max_size=60).map(b"".join)
    | damaged(dump_pickle({"a": ((2, 3), DTYPES["float16"])}))
    | WEIRD.map(pickle.dumps)
    | st.binary()
)
def test_any_pickle(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", bytes(12))
    with only_our_errors():
        for region in torch_files.read(path).values():
            assert formats.view(region, formats.map_file(path)).tobytes().strip(b"\0") == b""


@fuzz
@given(data=st.data())
def test_any_zip(folders, data):
    path = folders["meta"] / "consolidated.00.pth"
    whole = path.read_bytes()
    start, end = whole[:1500], whole[-3000:]  # the headers and the directory, not the numbers
    middle = whole[1500:-3000]
    content = data.draw(damaged(start)) + middle + data.draw(damaged(end))
    with replaced(path, content), only_our_errors():
        open_folder(folders["meta"])


@fuzz
@given(data=st.data())
def test_any_safetensors_header(folders, data):
    path = folders["hf"] / "model-00001-of-00002.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text = whole[8 : 8 + length]
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(changed(json.loads(text)))).encode()
        head = len(text).to_bytes(8, "little")
    else:
        text = data.draw(damaged(text) | st.binary())
        head = data.draw(st.just(len(text).to_bytes(8, "little")) | st.binary(max_size=9))
    with replaced(path, head + text + whole[8 + length :]), only_our_errors():
        for region in formats.read_safetensors(path).values():
            formats.view(region, formats.map_file(path)).tobytes()
        open_folder(folders["hf"])


MANIFEST = b'{"rotary_layout": "half", "tensors": {"embed": {"sha256": ["0"]}}, "model": {}}'
JSON_FILES = [
    ("meta", "params.json"), ("meta", "manifest.json"), ("hf", "config.json"),
    ("hf", "generation_config.json"), ("hf", "model.safetensors.index.json"),
    ("hf", "manifest.json"), ("hf", "tokenizer_config.json"), ("hf", "tokenizer.json"),
]  # fmt: skip


@fuzz
@given(data=st.data())
def test_any_settings(folders, data):
    layout, name = data.draw(st.sampled_from(JSON_FILES))
    path = folders[layout] / name
    content = path.read_bytes() if path.exists() else MANIFEST
    if data.draw(st.integers(0, 3)):
        tree = data.draw(changed(json.loads(content)) | WEIRD)
        content = json.dumps(tree).encode()
    else:
        content = data.draw(damaged(content) | st.binary())
    with replaced(path, content), only_our_errors():
        open_folder(folders[layout])


@fuzz
@given(content=st.binary() | st.text().map(str.encode) | damaged(b"{% for m in messages %}"))
def test_any_template(folders, content):
    with replaced(folders["hf"] / "chat_template.jinja", content), only_our_errors():
        open_folder(folders["hf"])


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    train_tokenizer(["the cat sat on 12 mats", "日本 é"] * 20, 290, path)
    return path.read_bytes()


TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"


@fuzz
@given(data=st.data())
def test_any_tokenizer(tmp_path_factory, sentencepiece_model, data):
    path = tmp_path_factory.getbasetemp() / "tokenizer.model"
    content = data.draw(damaged(sentencepiece_model) | damaged(TIKTOKEN) | st.binary())
    path.write_bytes(content)
    with only_our_errors():
        found = tokenizer_files.recognize(path)
        if found.kind != "tokenizer.json":
            tokenizer_files.hf_settings(found, 64, True)
            tokenizer_files.hf_json(found, True)


def test_the_folders_are_good(folders):
    """Otherwise the tests above would pass without testing anything."""
    assert open_folder(folders["hf"]).tokenizers[0].size == 6
    assert open_folder(folders["meta"]).cfg.num_layers == 2
