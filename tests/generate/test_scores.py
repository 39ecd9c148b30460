"""Likelihoods of texts: against the whole forward pass and transformers; linear in the text."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest
import tiktoken_tools
from flax import nnx
from model_tools import F32, hf_model, random_weights, small, tree_of

from llama_jax.data import tiktoken_text
from llama_jax.data.tokenizer import JsonTokenizer, Tokenizer
from llama_jax.generate import scores
from llama_jax.generate.detokenize import Detokenizer, OutputSequence
from llama_jax.generate.llm import LLM
from llama_jax.generate.scores import pieces, windows
from llama_jax.model.llama import Llama
from llama_jax.model.params import merge, params_of, structure
from llama_jax.prepare.tokenizer import train_tokenizer

TEXT = ["the cat sat on a mat", "some animals saw 12 cats", "日本 and é", "def main(argv):"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([t for t in TEXT for _ in range(50)], 300, path)


@pytest.fixture(scope="module")
def llm(tokenizer):
    cfg = small(vocab_size=300, context=400)
    return LLM(cfg, params_of(Llama(cfg, F32, nnx.Rngs(0), 0.3)), tokenizer, F32)


def reference(llm, ids):
    """Log p of each id after the first and the entropy there, by a whole forward pass."""
    logits = merge(structure(llm.cfg, F32), llm.params)(np.asarray([ids]))[0]
    logp_TV = np.asarray(jax.nn.log_softmax(logits, axis=-1))[:-1]
    return logp_TV[np.arange(len(ids) - 1), ids[1:]], -(np.exp(logp_TV) * logp_TV).sum(-1)


def test_scores(llm):
    scored = llm.score("the 日本 cat")
    assert "".join(scored.pieces) == "the 日本 cat"
    assert len(scored.ids) == len(scored.logprobs) == len(scored.entropies)
    assert "perplexity" in scored._repr_html_()
    assert "<script" not in llm.score("<script>")._repr_html_()
    assert scored.plot().get_ylabel() == "nats"
    assert abs(llm.perplexity(["the 日本 cat"]) / scored.perplexity - 1) < 1e-6
    (made,) = llm.generate(["the"], max_new_tokens=4, logprobs=True)
    want, _ = reference(llm, [*llm.encode("the"), *made.ids])
    np.testing.assert_allclose(made.logprobs, want[-len(made.ids) :], atol=1e-4)
    assert llm.score("").ids == ()
    with pytest.raises(ValueError, match="at least one token"):
        llm.perplexity([""])


def test_windows_of_a_long_text(llm, monkeypatch):
    """Three windows, logits of 16 positions at a time; the host receives numbers per token only."""
    monkeypatch.setattr(scores, "LOGITS_PER_CHUNK", 16 * llm.cfg.vocab_size)
    fresh = LLM(llm.cfg, llm.params, llm.tokenizer, F32)
    sizes, run = [], fresh._engine.run

    def watch(*args):
        out = run(*args)
        sizes.extend(x.shape for x in out)
        return out

    monkeypatch.setattr(fresh._engine, "run", watch)
    text = "the cat saw 12 mats and 日本 é " * 45
    scored = fresh.score(text)
    ids = list(scored.ids)
    assert len(ids) > 2 * llm.cfg.context
    assert set(sizes) == {(4, 512), (4, 512, 0)}  # three windows, one call
    want = [[], []]
    for inputs, targets in windows(ids, 1, llm.cfg.context):
        for out, numbers in zip(want, reference(llm, [*inputs, targets[-1]]), strict=True):
            out += numbers[-len(targets) :].tolist()
    np.testing.assert_allclose(scored.logprobs, want[0], atol=1e-4)
    np.testing.assert_allclose(scored.entropies, want[1], atol=1e-4)
    mean = -np.mean(want[0])
    assert abs(np.log(llm.perplexity([text, text])) - mean) < 1e-4


def test_a_list_of_texts_is_scored_in_one_call(llm, monkeypatch):
    """With the same results as one text at a time."""
    texts = ["the cat", "", "some animals saw 12 cats", "日本", "def main("]
    alone = [llm.score(text) for text in texts]
    calls, run = [], llm._engine.run
    watch = lambda name, *args: calls.append(name) or run(name, *args)
    monkeypatch.setattr(llm._engine, "run", watch)
    together = llm.score(texts)
    assert calls == ["score"]
    for one, scored in zip(alone, together, strict=True):
        assert (one.ids, one.pieces) == (scored.ids, scored.pieces)
        np.testing.assert_allclose(one.logprobs, scored.logprobs, atol=1e-4)
        np.testing.assert_allclose(one.entropies, scored.entropies, atol=1e-4)
    calls.clear()
    many = llm.score(["the cat"] * 70 + ["a " * 80])
    assert calls == ["score"] * 4  # 32 + 32 + 6 short ones, and a longer one
    assert {s.ids for s in many[:70]} == {alone[0].ids}
    assert llm.score([]) == []


def test_ids_are_scored_as_their_text(llm):
    want = llm.score("the cat")
    ids = llm.tokenizer.encode("the cat")
    assert llm.score(ids) == want
    bos, cat = llm.score([[llm.tokenizer.bos_id, *ids], ids])
    assert bos.ids == cat.ids == tuple(ids)
    assert "".join(bos.pieces) == "the cat"
    np.testing.assert_allclose(bos.logprobs, want.logprobs, atol=1e-4)
    assert abs(llm.perplexity(ids) / want.perplexity - 1) < 1e-6
    with pytest.raises(ValueError, match=r"texts\[1\] has token id 300; those of the model"):
        llm.score([[5], [300]])
    with pytest.raises(ValueError, match="the text must be text or token ids, not NoneType"):
        llm.score(None)


def test_without_an_id_that_starts_a_document(llm, tokenizer, monkeypatch):
    """The first token has no context and is not scored."""
    whole = llm.score("the cat saw")
    monkeypatch.setattr(type(tokenizer), "bos_id", None)
    scored = LLM(llm.cfg, llm.params, tokenizer, F32).score("the cat saw")
    assert scored.ids == whole.ids[1:]
    want, _ = reference(llm, whole.ids)
    np.testing.assert_allclose(scored.logprobs, want, atol=1e-4)
    assert "perplexity" in scored._repr_html_()


def test_top_logprobs_of_a_text(llm):
    text = "the cat saw 12 mats"
    scored = llm.score(text, top_logprobs=4)
    ids = [1, *scored.ids]
    logits = merge(structure(llm.cfg, F32), llm.params)(np.asarray([ids]))[0]
    want = np.asarray(jax.nn.log_softmax(logits, axis=-1))[:-1]
    assert len(scored.top_logprobs) == len(scored.ids)
    for logp_V, top in zip(want, scored.top_logprobs, strict=True):
        best = np.argsort(-logp_V)[:4]
        assert list(top) == best.tolist()
        np.testing.assert_allclose(list(top.values()), logp_V[best], atol=1e-4)
    assert scored.logprobs == llm.score(text).logprobs
    assert llm.score(text).top_logprobs == ()
    with pytest.raises(ValueError, match="top_logprobs=21 must be at most 20"):
        llm.score(text, top_logprobs=21)


def test_each_token_is_a_target_once():
    assert windows([5, 6, 7], 1, 8) == [([1, 5, 6], [5, 6, 7])]
    assert windows([5, 6, 7, 8, 9], 1, 3) == [([1, 5, 6], [5, 6, 7]), ([6, 7, 8], [8, 9])]


@pytest.fixture(scope="module")
def dynamic(tokenizer):
    """Beyond 96 positions, the rotary frequencies follow the length of the text."""
    cfg = small({"type": "dynamic", "factor": 4.0}, vocab_size=300, context=96, head_dim=8)
    return LLM(cfg, tree_of(random_weights(cfg)), tokenizer, F32)


def test_padding_does_not_change_dynamic_rope(dynamic):
    """96 tokens are padded to 128: more than the context that the frequencies are made for."""
    text = "1" * 94
    ids = [1, *dynamic.tokenizer.encode(text)]
    assert 64 < len(ids) - 1 <= 96
    logprobs, entropies = reference(dynamic, ids[:-1])
    scored = dynamic.score(text)
    np.testing.assert_allclose(scored.logprobs[:-1], logprobs, atol=1e-4)
    np.testing.assert_allclose(scored.entropies[:-1], entropies, atol=1e-4)


def test_a_prompt_in_chunks_has_the_frequencies_of_its_length(dynamic):
    """Read 256 tokens at a time, far beyond the original context, it equals one pass."""
    rope = dataclasses.replace(dynamic.cfg.rope, original_context=96)
    cfg = dataclasses.replace(dynamic.cfg, context=512, rope=rope)
    llm = LLM(cfg, dynamic.params, dynamic.tokenizer, F32)
    ids = np.random.default_rng(0).integers(3, 300, 300).tolist()
    logits_V, _ = llm._engine.prefill(ids, llm._engine.empty_cache(600))
    whole = merge(structure(cfg, F32), llm.params)(np.asarray([ids]))[0, -1]
    np.testing.assert_allclose(logits_V, whole, atol=1e-5 * float(np.ptp(whole)))


def test_dynamic_rope_equals_transformers(dynamic):
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    pytest.importorskip("transformers")
    theirs = hf_model(dynamic.cfg, random_weights(dynamic.cfg))
    ids = [1, *dynamic.tokenizer.encode("1" * 94)]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids[:-1]])).logits[0]
    want = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    np.testing.assert_allclose(dynamic.score("1" * 94).logprobs, want.numpy(), atol=2e-4)


def bytes_of_a_run_together() -> str:
    """A tokenizer.json of LLaMA's kind; its decoder replaces a run of bytes as a whole."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ("▁", "a", "b", "▁a"):
        vocab[piece] = len(vocab)
    special = dict(special=True, normalized=False, single_word=False, lstrip=False, rstrip=False)
    added = [{"id": i, "content": c} | special for i, c in enumerate(["<unk>", "<s>", "</s>"])]
    space = {"String": " "}
    before = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": space, "content": "▁"},
    ]
    back = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"]], "unk_token": "<unk>"}
    tree = {
        "version": "1.0", "added_tokens": added, "pre_tokenizer": None, "post_processor": None,
        "normalizer": {"type": "Sequence", "normalizers": before},
        "decoder": {"type": "Sequence", "decoders": back},
        "model": model | {"byte_fallback": True, "fuse_unk": True},
    }  # fmt: skip
    return json.dumps(tree)


@pytest.fixture(params=["sentencepiece", "bytes", "byte fallback"])
def any_tokenizer(request, tokenizer, tmp_path):
    if request.param == "sentencepiece":
        return tokenizer
    if request.param == "byte fallback":
        return JsonTokenizer(bytes_of_a_run_together(), tmp_path / "x")
    content = json.dumps(tiktoken_text.to_json(tiktoken_tools.ranks(), newer=True))
    return JsonTokenizer(content, tmp_path / "x")


def test_pieces_join_to_the_text(any_tokenizer, monkeypatch):
    """Characters are not split; the time is linear in the length of any text."""
    rng = np.random.default_rng(0)
    texts = ["", " a", "the 日本 cat\n\n  é", "日本日本語é" * 9, "a b\ufffd\ufffdc\ufffd", "  a  "]
    for text in texts:
        ids = any_tokenizer.encode(text)
        made = pieces(any_tokenizer, ids)
        assert "".join(made) == any_tokenizer.decode(ids) == text
        assert len(made) == len(ids)
        for n in range(len(ids)):  # at a character boundary, all of the text has been returned
            text_so_far = any_tokenizer.decode(ids[: n + 1])
            if not text_so_far.endswith("\ufffd"):
                assert "".join(made[: n + 1]) == text_so_far
        half = len(ids) // 2
        before, streamed = any_tokenizer.decode(ids[:half]), ""
        if "\ufffd" not in text + before:  # otherwise the ids end inside a character
            row = OutputSequence(any_tokenizer, ids[:half], ())
            for i in ids[half:]:
                row.append([i], [0.0], (), 10**6)
                assert row.stable_text().startswith(streamed)
                streamed = row.stable_text()
            assert before + row.result().text == text
    decoded = []
    decode = type(any_tokenizer).decode
    monkeypatch.setattr(
        type(any_tokenizer),
        "decode",
        lambda self, ids: decoded.append(len(ids)) or decode(self, ids),
    )
    size = any_tokenizer.vocab_size
    low = rng.integers(0, min(size, 260), 3000)  # mostly bytes that are no UTF-8
    for ids in (low, rng.integers(0, size, 3000), np.full(3000, 3 + 0xC3), np.full(3000, 1)):
        decoded.clear()
        assert "".join(pieces(any_tokenizer, ids.tolist())) == decode(any_tokenizer, ids)
        assert sum(decoded) < 12 * len(ids)


class Letters(Tokenizer):
    """The ids 0 and 1 are a and b."""

    vocab_size = 2

    def _decode(self, ids):
        return "".join("ab"[i] for i in ids)


def test_text_that_may_begin_a_stop_string_is_held_back():
    rng = np.random.default_rng(2)
    for _ in range(200):
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 9))) for _ in range(2)]
        row, text = OutputSequence(Letters(), [], stops), ""
        while not row.finish:
            token = int(rng.integers(2))
            row.append([token], [0.0], (), 60)
            text += "ab"[token]
            begun = [s[:k] for s in stops for k in range(1, len(s)) if text.endswith(s[:k])]
            if not row.finish:
                assert not any(s in text for s in stops)
                assert row.stable_text() == text[: len(text) - max(map(len, begun), default=0)]
    row = OutputSequence(Letters(), [], ["a" * 10**6, "ab" * 10**6 + "c"])
    start = time.process_time()
    for n in range(300):
        row.append([n % 2], [0.0], (), 10**6)
        assert row.stable_text() == ""
    assert time.process_time() - start < 2


def test_text_continues_in_the_middle_of_a_run_of_bytes(tmp_path):
    """A prompt that ends in characters made of bytes, which are decoded as a whole."""
    tokenizer = JsonTokenizer(bytes_of_a_run_together(), tmp_path / "x")
    ids = tokenizer.encode("a 日本語日本語")
    for cut in (8, 11, 14):  # after whole characters
        detokenizer = Detokenizer(tokenizer, ids[:cut])
        before = tokenizer.decode(ids[:cut])
        made = "".join(detokenizer.push(i) for i in ids[cut:]) + detokenizer.rest()
        assert before + made == "a 日本語日本語"
