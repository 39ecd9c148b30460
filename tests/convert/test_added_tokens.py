"""Tokens that transformers added to a tokenizer.model in other files, before tokenizer.json."""

import io
import json

import convert_tools as tools
import pytest
import sentencepiece
from convert_tools import DTYPES, small

from llama_jax.convert.job import convert, open_folder
from llama_jax.data.tokenizer import Tokenizer

NAMES = ("<|im_end|>", "<|im_start|>", "<tool>", "[PAD]")
# Of a text after a token that begins with a space, transformers 5 drops the first space.
TEXT = "<s><|im_start|>user\nthe cat <tool>is <|im_end|>\n"


def model(**options) -> bytes:
    """A small SentencePiece model with LLaMA's settings."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat is a user of the tool"] * 9), model_writer=out,
        vocab_size=300, hard_vocab_limit=False, minloglevel=2, character_coverage=1.0,
        **dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
               remove_extra_whitespaces=False) | options,
    )  # fmt: skip
    return out.getvalue()


def make(tmp_path, kind, legacy, content, rows=None):
    """A Hugging Face folder with a tokenizer.model and added tokens."""
    size = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    ids = {name: size + i for i, name in enumerate(NAMES)}
    tmp_path.mkdir(exist_ok=True)
    cfg = small(vocab_size=rows or size + len(NAMES))
    folder = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    (folder / "tokenizer.model").write_bytes(content)
    settings = {
        "tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>",
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]",
    }  # fmt: skip
    if kind == "added_tokens.json":
        (folder / kind).write_text(json.dumps(ids))
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    else:
        flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False)
        every = ids | {"<unk>": 0, "<s>": 1, "</s>": 2}
        settings["added_tokens_decoder"] = {
            str(i): dict(content=name, special=name != "<tool>", **flags)
            for name, i in every.items()
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, ids


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["added_tokens.json", "added_tokens_decoder"])
def test_ids_are_those_of_transformers(tmp_path, kind, legacy):
    """They were lost: templates wrote them as text, and their ids decoded to nothing."""
    folder, ids = make(tmp_path, kind, legacy, model())
    tokenizer = Tokenizer.load(convert(folder, tmp_path / "ours"))
    assert {name: tokenizer.encode_marked(name)[-1] for name in NAMES} == ids
    assert set(tokenizer.controls) == {"<unk>", "<s>", "</s>", *NAMES} - {"<tool>"}
    assert "".join(tokenizer.decode(tokenizer.encode_marked(TEXT)).split()) == "userthecat<tool>is"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode_marked(TEXT) == theirs(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.encode(" the cat") == tokenizer.encode_marked(" the cat")
    # And from our weights to Hugging Face's format.
    out = convert(tmp_path / "ours", tmp_path / "out", to="hf")
    assert Tokenizer.load(out).encode_marked(TEXT) == tokenizer.encode_marked(TEXT)


def test_added_tokens_without_a_row_or_without_an_equivalent(tmp_path):
    content = model()
    folder, _ = make(tmp_path / "a", "added_tokens.json", True, content, rows=300)
    source = open_folder(folder)
    assert [t.kind for t in source.tokenizers] == ["sentencepiece"]
    assert any("added_tokens.json has" in w for w in source.warnings)
    folder, _ = make(tmp_path / "b", "added_tokens.json", True, model(model_type="unigram"))
    with pytest.raises(ValueError, match=r"adds to tokenizer\.model cannot be used: it is not a B"):
        open_folder(folder)
    folder, _ = make(tmp_path / "c", "added_tokens.json", True, content)
    for wrong in ('{"<pad>": "300"}', '{"<pad>": null, "a": 400}', '{"the": 400, "▁the": 401}'):
        (folder / "added_tokens.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"adds to tokenizer\.model cannot be used"):
            open_folder(folder)


@pytest.mark.parametrize("legacy", [True, False])
def test_spaces_after_control_tokens_survive_a_round_trip(tmp_path, legacy):
    folder, _ = make(tmp_path, "added_tokens.json", legacy, model())
    (folder / "added_tokens.json").unlink()
    ids = Tokenizer.load(folder).encode_marked("<s>the cat</s>is")
    out = convert(convert(folder, tmp_path / "ours"), tmp_path / "out", to="hf")
    assert Tokenizer.load(out).encode_marked("<s>the cat</s>is") == ids
    transformers = pytest.importorskip("transformers")
    for path in (folder, out):
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        assert theirs("<s>the cat</s>is", add_special_tokens=False).input_ids == ids
