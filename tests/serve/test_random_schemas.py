"""300 random JSON schemas and random tokens: every answer is JSON that the schema describes."""

import json

import numpy as np
import pytest
import tiktoken_tools
from schema_tools import PATTERNS, random_schema, satisfies

from llama_jax.data.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs the extra serve")

from llama_jax.serve.grammar import GrammarFactory


def test_the_check_itself():
    number = {"type": "number", "minimum": 0, "exclusiveMaximum": 2}
    assert satisfies(1.5, number)
    assert not satisfies(2, number)
    assert not satisfies(True, number)
    assert satisfies(2.0, {"type": "integer", "minimum": 0, "maximum": 2})
    assert not satisfies("abx", {"type": "string", "pattern": PATTERNS[0]})
    thing = {"type": "object", "properties": {"x": number}, "required": ["x"]}
    assert satisfies({"x": 1, "y": 0}, thing | {"additionalProperties": number})
    assert not satisfies({"x": 1, "y": 9}, thing | {"additionalProperties": number})
    assert not satisfies({"x": 1, "y": 0}, thing | {"additionalProperties": False})
    assert not satisfies({}, thing | {"additionalProperties": False})
    assert not satisfies(1, {"enum": [True, "1"]})


def answer(grammar, tokenizer, rng):
    """Random tokens, of which those with punctuation are likelier; None if they do not end."""
    marks = np.array([any(c in b'"}],' for c in b) for b in tokenizer.token_bytes])
    mask_W = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    ids = []
    while not grammar.complete and len(ids) < 300:
        grammar.fill(mask_W)
        bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: tokenizer.vocab_size])
        ending = allowed[marks[allowed]]
        token = int(rng.choice(ending if len(ending) and rng.random() < 0.4 else allowed))
        if token == tokenizer.eos_id:
            return tokenizer.decode(ids)
        ids.append(token)
        grammar.accept(token)
    return tokenizer.decode(ids) if grammar.complete else None


def test_answers_satisfy_random_schemas(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiktoken_tools.content())
    tokenizer = Tokenizer.load(path)
    factory = GrammarFactory(tokenizer, [tokenizer.eos_id], tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    finished = 0
    for _ in range(300):
        schema = random_schema(rng)
        try:
            grammar = factory.make("json", schema)
        except ValueError as e:  # the types of an anyOf may exclude each other
            pytest.fail(f"{e}: {schema}")
        text = answer(grammar, tokenizer, rng)
        if text is not None:
            finished += 1
            assert satisfies(json.loads(text), schema), (schema, text)
    assert finished > 270
