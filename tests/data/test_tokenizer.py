"""Tokenizer: known ids, lossless encoding, training, and files that are not tokenizers."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_jax.data import sentencepiece_json
from llama_jax.data import tokenizer as tokenizer_module
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare.tokenizer import first_change, train_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"

TEXTS = [
    "",
    "plain words",
    " leading, trailing ",
    "two  three   four    spaces",
    "\n",
    "\n\n\tdef f():\n\t\treturn 1\n",
    "   \n \n",
    "\r\nwindows\r\n",
    "1234567890, 3.14159",
    "naïve café, Ελληνικά, кириллица, 日本語, עברית",
    "emoji 😀👩‍👩‍👧‍👦🇨🇭 and maths ∑∫√",
    "zero \x00 byte, \x7f, \ufeff",
    "<s> </s> <unk> <0x0A> [INST]",
    "e\u0301 is not \u00e9",
    "a" * 5000,
]


def english(count: int) -> list[str]:
    """Deterministic text of few words and some numbers."""
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "mats",
        "while",
        "12",
        "dogs",
        "ran",
        "home",
        "and",
        "nobody",
    ]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, 30)) + "\n" for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(english(200), 330, path)


def tokenizers(trained: Tokenizer) -> list[Tokenizer]:
    """The trained one, and LLaMA's and a small published one if the files are present."""
    shared = [SHARED / "llama_tokenizer", SHARED / "stories260k"]
    return [trained] + [Tokenizer.load(path) for path in shared if path.is_dir()]


def piece_id(tokenizer: Tokenizer, piece: str) -> int:
    ids = range(tokenizer.vocab_size)
    return [tokenizer._processor.id_to_piece(i) for i in ids].index(piece)


def test_encoding_is_lossless(trained):
    rng = np.random.default_rng(1)
    alphabet = [c for text in TEXTS for c in text] + list("  \n\t09aé😀")
    drawn = ["".join(rng.choice(alphabet, rng.integers(1, 60))) for _ in range(200)]
    for tokenizer in tokenizers(trained):
        for text in TEXTS + drawn:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
            expected = len(text.encode()) + (tokenizer.prefix_bytes if ids else 0)
            assert tokenizer.bytes_of_id_V[ids].sum() == expected


def test_order_of_ids_is_llamas(trained):
    for tokenizer in tokenizers(trained):
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        newline, snowman = 3 + ord("\n"), [3 + b for b in "☃".encode()]
        assert tokenizer.encode("☃\n", bos=True, eos=True)[-5:] == [*snowman, newline, 2]
        assert tokenizer.encode("", bos=True, eos=True) == [1, 2]
        assert tokenizer.bytes_of_id_V.shape == (tokenizer.vocab_size,)
        assert tokenizer.bytes_of_id_V[:259].tolist() == [0] * 3 + [1] * 256
        assert tokenizer.encode_array("a b").dtype == np.int32


def test_known_ids(trained):
    known = {trained: ("the cat", [piece_id(trained, "▁the"), piece_id(trained, "▁cat")])}
    if SHARED.is_dir():
        llama = Tokenizer.load(SHARED / "llama_tokenizer" / "tokenizer.model")
        ids = [15043, 3186, 13, 259, 29896, 353, 29871, 29906, 29941]
        known[llama] = ("Hello world\n  1 = 23", ids)
        golden = json.loads((SHARED / "stories260k" / "golden.json").read_text())
        stories = Tokenizer.load(SHARED / "stories260k")
        known[stories] = (golden["prompt"], golden["prompt_ids"][1:])
        assert stories.decode(golden["greedy_ids_from_bos"]) == golden["greedy_text_200_steps"]
        text = (SHARED / "tinyshakespeare" / "input.txt").read_text()[:3000]
        assert len(stories.encode(text)) == golden["rolling"]["n_tokens"]
    for tokenizer, (text, ids) in known.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *ids]


def test_training_has_llamas_settings(trained):
    assert trained.vocab_size == 330
    pieces = [trained._processor.id_to_piece(i) for i in range(330)]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:259] == [f"<0x{b:02X}>" for b in range(256)]
    assert "▁cat" in pieces
    # Numbers are split into digits: no piece has two.
    assert not [p for p in pieces[259:] if sum(c.isdigit() for c in p) > 1]
    assert trained.encode("12")[-2:] == [trained.encode(d)[-1] for d in "12"]
    assert all(len(p) <= 16 for p in pieces[259:])
    assert trained.prefix_bytes == 1


def test_training_is_deterministic_and_keeps_long_lines(tmp_path, trained):
    again = train_tokenizer(iter(english(200)), 330, tmp_path / "again.model")
    assert again.path.read_bytes() == trained.path.read_bytes()
    # One line of 100 kB: SentencePiece alone would drop it and find no text.
    long = train_tokenizer([" ".join(english(700)).replace("\n", " ")], 300, tmp_path / "l.model")
    assert long.vocab_size == 300


def test_whitespace_pieces(tmp_path):
    code = ["def f(x):\n        return x\n        if y:\n            z = 1\n"] * 50
    tokenizer = train_tokenizer(code, 281, tmp_path / "code.model")
    assert len(tokenizer.encode(" " * 16)) == 2


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (english(50), 5000, r"5000 is more than the text supports, the largest possible is (\d+)"),
        (english(50), 100, r"100 is too small .* at least (\d+)"),
        ([], 300, "no text"),
        (["", "\n"], 300, "no text"),
    ],
)
def test_training_problems(tmp_path, texts, vocab_size, message):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match=message) as e:
        train_tokenizer(texts, vocab_size, path)
    assert not list(tmp_path.iterdir())
    found = re.search(message, str(e.value))
    if found and (limit := found.groups()):
        assert train_tokenizer(texts, int(limit[0]), path).vocab_size == int(limit[0])


RANKS = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RANKS[:-9], "tiktoken.* damaged"),
        (b'{"version": "1.0", "model": {}}', "not a usable tokenizer.json"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (bytes(range(256)) * 4, "not a SentencePiece model"),
        (b"some words of text\n", "not a SentencePiece model"),
        (b"\x08\x01", "not a SentencePiece model"),
        (b"[" * 100_000, "not a usable tokenizer.json"),
        (b'{"version": ' + b"[" * 100_000, "not a usable tokenizer.json"),
        (b"QQ== 0\n" + b"QQ" * 700 + b"== 1\n", "tiktoken.* damaged"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    for given in (path, tmp_path):
        with pytest.raises(ValueError, match=message) as e:
            Tokenizer.load(given)
        assert str(path) in str(e.value)


def test_a_damaged_model_is_an_error(tmp_path, trained):
    """Cut short anywhere, also between two pieces; too large; and not a regular file."""
    path = tmp_path / "tokenizer.model"
    content = trained.path.read_bytes()
    # A piece: a tag, its size, the rest; this cut leaves 200 whole pieces.
    at = 0
    for _ in range(200):
        at += 2 + content[at + 1]
    assert content[at] == 0x0A
    for end in (1000, at, len(content) - 1, len(content) - 30):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"tokenizer.model is not a SentencePiece .* damaged"):
            Tokenizer.load(path)
    path.write_bytes(b"")
    os.truncate(path, 6_000_000_000)
    with pytest.raises(ValueError, match=r"tokenizer.model has 6,000,000,000 bytes; at most"):
        Tokenizer.load(path)
    path.unlink()
    os.mkfifo(path)
    for given in (path, tmp_path):
        with pytest.raises(ValueError, match=r"tokenizer.model is not a regular file"):
            Tokenizer.load(given)


def test_missing_file_lists_what_is_there(tmp_path):
    (tmp_path / "tokenizer.bin").write_text("{}")
    with pytest.raises(ValueError, match=r"does not exist \(the folder has tokenizer.bin\)"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"nothing.model does not exist; give"):
        Tokenizer.load(tmp_path / "no" / "nothing.model")


def test_ids_without_text(trained):
    """Ids beyond the vocabulary, which a larger embedding can produce, decode to nothing."""
    ids = trained.encode("the cat")
    assert trained.decode([ids[0], 330, *ids[1:], 10**6]) == trained.decode(ids) == "the cat"
    with pytest.raises(ValueError, match="token id -1 is negative"):
        trained.decode([5, -1])


ADVERSARIAL = [
    "the cat sat on mats while 12 dogs ran home and nobody" * 40,
    "thecatsatonmats" * 100,  # no space: cut between letters that no piece joins, or nowhere
    "a" * 3000, " " * 3000, "\n" * 3000, "\n \n" * 800, "▁ ▁" * 500, "  the  cat" * 200,
    "é☃日本語 café\n" * 120,
    "\x00\ufeff e\u0301 \ud7ff" * 150, "😀👩‍👩‍👧‍👦" * 150, "1234567890 " * 200,
]  # fmt: skip


def test_pieces_of_a_long_text_have_the_ids_of_the_whole(trained, tmp_path, monkeypatch):
    """Split every 50 characters; also without byte fallback, where unknown characters join."""
    import sentencepiece

    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english(50)), model_prefix=str(tmp_path / "no_bytes"), vocab_size=60,
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=3,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    mixed = ["".join(rng.choice(list("the cat▁ \n☃é12"), 800)) for _ in range(20)]
    real = Path(json.__file__).read_text() + Path(tokenizer_module.__file__).read_text()
    if SHARED.is_dir():
        real += (SHARED / "tinyshakespeare" / "input.txt").read_text()[:50_000]
    for tokenizer in [*tokenizers(trained), Tokenizer.load(tmp_path / "no_bytes.model")]:
        sizes: list[int] = []
        encode = tokenizer._encode

        def counted(text, start=True, encode=encode, sizes=sizes):
            sizes.append(len(text))
            return encode(text, start)

        monkeypatch.setattr(tokenizer, "_encode", counted)
        for text in [real, *ADVERSARIAL, *mixed]:
            whole = tokenizer._encode(text)
            sizes.clear()
            assert tokenizer.encode_array(text).tolist() == whole.tolist()
            assert text != real or max(sizes) < 200


def test_a_tokenizer_that_normalizes_is_not_cut(tmp_path, monkeypatch):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english(50)), model_prefix=str(tmp_path / "t"), vocab_size=30,
        minloglevel=3,
    )  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 50)
    text = " ".join(english(20))
    assert tokenizer._cut(text, 50) == len(text)
    assert tokenizer.encode(text) == tokenizer._processor.encode(text)
    # It also loses text: case and accents stay, but runs of spaces do not.
    assert "'the  cat' becomes 'the cat'" in first_change(tokenizer, "the  cat")
    assert "☃" in first_change(tokenizer, "the ☃ cat")
    assert first_change(tokenizer, "the cat") == ""


def test_a_space_character_that_text_has_itself_is_no_loss(trained):
    assert first_change(trained, "the▁cat  sat ☃") == ""


def test_a_model_without_bos(tmp_path):
    import sentencepiece

    prefix = tmp_path / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english(50)), model_prefix=str(prefix), vocab_size=30,
        bos_id=-1, eos_id=-1, minloglevel=3,
    )  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_id is None
    assert tokenizer.eos_id is None
    with pytest.raises(ValueError, match="has no eos id"):
        tokenizer.encode("the cat", eos=True)


def test_control_pieces_of_a_model(trained, tmp_path):
    """Those of chat models, such as Yi's: also pieces that are only user-defined."""
    proto = sentencepiece_json.parse(trained.path.read_bytes())
    size = len(proto.pieces)
    for name, kind in (("<|im_start|>", 4), ("<|im_end|>", 3), ("<think>", 4)):
        proto.pieces.add(piece=name, type=kind)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.controls == trained.controls | {"<|im_start|>": size, "<|im_end|>": size + 1}
    assert tokenizer.encode_marked("<|im_start|>def<|im_end|>") == [
        size, *trained.encode("def"), size + 1,
    ]  # fmt: skip
    text = "<|im_start|>def<|im_end|>"
    assert tokenizer.encode(text) == trained.encode(text)
    assert tokenizer.decode([size, *trained.encode("def"), size + 1]) == "def"
    assert size + 2 in tokenizer.encode("a <think> b")


def test_no_noise_in_the_terminal(tmp_path):
    code = f"""
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare.tokenizer import train_tokenizer
t = train_tokenizer(["some words and some more words"] * 20, 275, r"{tmp_path}/t.model")
t.encode("words", bos=True), t.decode([1, 5, 2]), t.bytes_of_id_V
for content in (b"junk" * 9, b"\\x08\\x01", b"\\n\\x00"):
    open(r"{tmp_path}/j.model", "wb").write(content)
    try:
        Tokenizer.load(r"{tmp_path}/j.model")
    except ValueError:
        pass
    else:
        raise SystemExit("no error")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_longest_control_name_counts():
    """A name may begin with another name, in any order of the tokenizer's list."""

    class Two(Tokenizer):
        controls = {"<|end|>": 7, "<|end|>!": 8}  # noqa: RUF012

        def encode_array(self, text, bos=False, eos=False, start=True):
            return np.array([1 if start else 2] * len(text))

    assert Two().encode_marked("a<|end|>!b<|end|>c") == [1, 8, 1, 7, 1]
    pieces = Two().encode_consecutive(["a", "b<|end|>", "c", "d"])
    assert pieces == [[1], [2, 7], [1], [2]]
