"""Llama 3's tokenizers: ids of tiktoken, lossless encoding, control tokens that text cannot
write."""

import json
import shutil
import threading
import time

import convert_tools as tools
import numpy as np
import pytest
import tiktoken_tools
from convert_tools import DTYPES, small

import llama_jax
from llama_jax.config import DataConfig, SourceConfig
from llama_jax.convert.job import convert
from llama_jax.data import tiktoken_text
from llama_jax.data import tokenizer as tokenizer_module
from llama_jax.data.tokenizer import JsonTokenizer, Tokenizer
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.prepare.tokenizer import train_tokenizer

N = len(tiktoken_tools.ranks())
AS_JSON = json.dumps(tiktoken_text.to_json(tiktoken_tools.ranks(), newer=True))
TEXTS = [
    "",
    "the",
    " the  theatre\n\n\n then\t!",
    "12345 l'été, 漢字 they're",
    "emoji 😀👩‍👩‍👧‍👦 zero \x00 \ufeff",
    "<|eot_id|> <|begin_of_text|> <s>",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_tools.content())
    return tmp_path


@pytest.fixture(params=["tiktoken", "json"])
def tokenizer(request, folder) -> Tokenizer:
    if request.param == "json":
        (folder / "tokenizer.json").write_text(AS_JSON)
    loaded = Tokenizer.load(folder)
    assert isinstance(loaded, JsonTokenizer)
    assert loaded.path.suffix == {"tiktoken": ".model", "json": ".json"}[request.param]
    return loaded


def test_ids_follow_tiktokens_rule(tokenizer):
    ids = tiktoken_tools.ids()
    assert tokenizer.encode(tiktoken_tools.TEXT) == ids
    assert tokenizer.encode(tiktoken_tools.TEXT, bos=True, eos=True) == [N, *ids, N + 1]
    assert tokenizer.encode_array("the", bos=True).dtype == np.int32


def test_encoding_is_lossless_and_bytes_add_up(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.prefix_bytes) == (N + 256, 0)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_of_id_V[ids].sum() == len(text.encode())
        # Encoding a text never gives a control id.
        assert max(ids[1:-1], default=0) < N
    assert tokenizer.decode(tokenizer.encode("語")[:-1]) == "\ufffd"
    assert tokenizer.decode([N + 256, *tokenizer.encode("the"), 10**9]) == "the"


def test_templates_write_controls(tokenizer):
    assert (tokenizer.mark(N), tokenizer.mark(N + 9)) == ("<|begin_of_text|>", "<|eot_id|>")
    text = "<|begin_of_text|><|start_header_id|>the<|end_header_id|>\n\nthen<|eot_id|>"
    words = [tokenizer.encode(w) for w in ("the", "\n\nthen")]
    assert tokenizer.encode_marked(text) == [N, N + 6, *words[0], N + 7, *words[1], N + 9]


def test_ids_are_those_of_transformers(tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    path = folder / "tokenizer.json"
    path.write_text(AS_JSON)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in TEXTS[:5]:
        assert tokenizer.encode(text, bos=True) == theirs(text)["input_ids"]
    marked = "<|start_header_id|>user<|end_header_id|>\n\nthe theatre<|eot_id|>"
    assert tokenizer.encode_marked(marked) == theirs(marked, add_special_tokens=False)["input_ids"]


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer):
    encoded = threading.Event()
    text = "a" * 300_000  # one word
    thread = threading.Thread(target=lambda: (tokenizer.encode(text), encoded.set()))
    thread.start()
    longest, last = 0.0, (start := time.monotonic())
    while not encoded.wait(0.001):
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert longest < max(0.1, (time.monotonic() - start) / 2)
    thread.join()


def test_pieces_of_a_long_text_have_the_ids_of_the_whole(tokenizer, monkeypatch):
    rng = np.random.default_rng(0)
    alphabet = [*"the 12'\n\t!é漢 \u0301\r", "'re", "then", "  ", "\n\n"]
    texts = ["".join(rng.choice(alphabet, 600)) for _ in range(40)]
    for text in [*texts, "漢字" * 300, " " * 500, "a \n b" * 99, tiktoken_tools.TEXT * 20]:
        whole = tokenizer.encode(text)
        monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 40)
        assert tokenizer.encode(text) == whole
        monkeypatch.undo()
    assert tokenizer._cut("the theatre", 1) == 3
    # GPT-2's own words end there too; what is joined across words is encoded whole.
    for change, splits in (
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
          | {"use_regex": True}}, True),
        ({"pre_tokenizer": None}, False),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"added_tokens": [{"id": 0, "content": "e t", "special": False, "normalized": False}
          | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)]}, False),
    ):  # fmt: skip
        other = JsonTokenizer(json.dumps(json.loads(AS_JSON) | change), tokenizer.path)
        assert other._splits_words == splits


def test_other_tokenizers_of_hugging_face(tmp_path):
    """Llama 2's as Hugging Face writes it: a space before the text, <s> and </s>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4, "a": 5, "b": 6, "▁a": 7}
    added = [
        {"id": i, "content": c, "special": True, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for i, c in enumerate(["<unk>", "<s>", "</s>"])
    ]
    space = {"String": " "}
    normal = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": space, "content": "▁"},
    ]
    back = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"]], "unk_token": "<unk>"}
    tree = {
        "version": "1.0", "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normal}, "pre_tokenizer": None,
        "post_processor": None, "decoder": {"type": "Sequence", "decoders": back},
        "model": model | {"byte_fallback": True, "fuse_unk": True},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix_bytes) == (1, 2, 1)
    assert tokenizer.encode("a b\n", bos=True) == [1, 7, 4, 6, 3]
    assert tokenizer.decode([1, 7, 4, 6, 3, 2]) == "a b\n"
    assert tokenizer.bytes_of_id_V.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert tokenizer._cut("a b" * 99, 3) == 297  # not known to be exact: encoded whole


def test_the_larger_tokenizer_of_a_folder_is_read(tmp_path):
    """Added tokens are only in tokenizer.json, as control tokens."""
    model = train_tokenizer(["the theatre then thawed there\n"] * 40, 280, tmp_path / "t.model")
    (tmp_path / "t.model").rename(tmp_path / "tokenizer.model")
    vocab = {model.piece(i): i for i in range(280)}
    controls = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    ids = [0, 1, 2, 280, 281]
    tree = json.loads(AS_JSON) | {
        "added_tokens": [
            {"id": i, "content": c, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, c in zip(ids, controls, strict=True)
        ],
        "model": {"type": "BPE", "vocab": vocab, "merges": []}, "post_processor": None,
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    fuller = Tokenizer.load(tmp_path)
    assert (fuller.vocab_size, fuller.path) == (282, path)
    assert fuller.encode_marked("<|im_start|>")[0] == 280
    # Without more ids: tokenizer.model is read. With another vocabulary: an error.
    few = {"added_tokens": tree["added_tokens"][:3]}
    path.write_text(json.dumps(tree | few))
    assert Tokenizer.load(tmp_path).path.name == "tokenizer.model"
    # A piece that was renamed to a control token.
    start = tree["added_tokens"][3] | {"id": 279}
    names = {k: v for k, v in vocab.items() if v != 279} | {start["content"]: 279}
    renamed = {
        "added_tokens": [*few["added_tokens"], start],
        "model": tree["model"] | {"vocab": names},
    }
    path.write_text(json.dumps(tree | renamed))
    assert Tokenizer.load(tmp_path).controls["<|im_start|>"] == 279
    swapped = vocab | {model.piece(270): 271, model.piece(271): 270}
    tree["model"]["vocab"] = swapped
    for more in ({}, few):
        path.write_text(json.dumps(tree | more))
        with pytest.raises(ValueError, match=r"are different tokenizers: id 270 is '.+' in one"):
            Tokenizer.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(
        ValueError, match=r"tokenizer.json is JSON, but not a usable tokenizer.json"
    ):
        Tokenizer.load(tmp_path)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def test_a_converted_llama_3_generates(folder):
    cfg = small(vocab_size=N + 256)
    state = tools.meta_state(cfg, DTYPES["bfloat16"], make=tools.random_values)
    source = tools.make_meta(folder / "meta", state, cfg)
    shutil.copy(folder / "tokenizer.model", source)
    made = convert(source, folder / "made")
    (made / "chat_template.jinja").write_text(TEMPLATE)
    llm = llama_jax.load(made)
    assert llm.eos_ids == (N + 1, N + 8, N + 9)
    prompt = "the theatre 漢字"
    (alone,) = llm.generate([prompt], max_new_tokens=12, logprobs=True)
    ids = llm.tokenizer.encode(prompt, bos=True)
    assert llm.tokenizer.decode([*ids, *alone.ids]) == prompt + alone.text
    assert "".join(llm.stream(prompt, max_new_tokens=12)) == alone.text
    assert llm.generate([prompt, "then"], max_new_tokens=12)[0] == alone.text
    chat = llm.chat()
    chat.say("the theatre", max_new_tokens=2)
    assert chat._ids[:3] == [N, N + 6, llm.tokenizer.encode("user")[0]]


def test_text_is_prepared_with_it(folder):
    documents = [f"the theatre then {i} thawed\n\n漢字" for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    sources = {"a": SourceConfig(path=str(folder / "text.jsonl"))}
    data = DataConfig(
        sources=sources, tokenizer=str(folder / "tokenizer.model"), seq_len=8, val_fraction=0.1
    )
    out = prepare_mixture(data, N + 256, folder / "out")
    found = []
    for path in (out / "a").glob("*.tokens"):
        starts = np.fromfile(path.with_suffix(".starts"), "<u8")
        found += np.split(np.fromfile(path, "<u2"), starts[1:])
    tokenizer = Tokenizer.load(out)
    want = [tokenizer.encode(t, bos=True, eos=True) for t in documents]
    assert sorted(map(list, found)) == sorted(want)
