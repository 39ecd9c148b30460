"""Grammars: the tokens that are allowed spell exactly the language, for every kind of tokenizer."""

import json
import re
import threading

import numpy as np
import pytest
import tiktoken_tools

from llama_jax.data.tokenizer import JsonTokenizer, Tokenizer
from llama_jax.prepare.tokenizer import train_tokenizer

pytest.importorskip("llguidance", reason="needs the extra serve")

from llama_jax.serve.grammar import GrammarFactory, literal

PADDING = 40
"""Rows of the embedding beyond the tokenizer's ids."""
WORDS = [
    "yes",
    " yes",
    "no",
    "the other",
    "the others",
    "l'été",
    "漢字 12",
    '{"a": 1}',
    "a\nb\t/",
    "😀",
]


def with_byte_fallback(tmp_path):
    """Llama 2's kind as Hugging Face writes it: "▁" for spaces, names for bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁yesnoth"]
    pieces += ["▁y", "ye", "▁ye", "▁yes", "th", "the", "no"]
    merges = [
        ["▁", "y"],
        ["y", "e"],
        ["▁y", "e"],
        ["▁ye", "s"],
        ["t", "h"],
        ["th", "e"],
        ["n", "o"],
    ]
    added = [
        {"id": i, "content": c, "special": True} for i, c in enumerate(("<unk>", "<s>", "</s>"))
    ]
    no = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)}, "merges": merges}
    tree = {
        "version": "1.0", "added_tokens": [a | no for a in added], "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, space]},
        "post_processor": None, "decoder": {"type": "Sequence", "decoders": back},
        "model": model | {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True},
    }  # fmt: skip
    return JsonTokenizer(json.dumps(tree), tmp_path / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [f"the others say yes, no, {i} times: {{}}" for i in range(50)]
    (folder / "llama3.model").write_bytes(tiktoken_tools.content())
    return {
        "sentencepiece": train_tokenizer(texts, 300, folder / "tokenizer.model"),
        "tiktoken": Tokenizer.load(folder / "llama3.model"),
        "byte_fallback": with_byte_fallback(folder),
    }


@pytest.fixture(params=["sentencepiece", "tiktoken", "byte_fallback"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def factory_of(tokenizer, eos=True):
    eos_ids = [tokenizer.eos_id] if eos else []
    return GrammarFactory(tokenizer, eos_ids, tokenizer.vocab_size + PADDING)


def allowed(grammar, tokenizer):
    """Ids that may come next."""
    mask_W = np.full(-(-(tokenizer.vocab_size + PADDING) // 32), 77, np.int32)
    grammar.fill(mask_W)
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little")).tolist()


def text_of(tokenizer, ids):
    """The text of new ids behind a prompt."""
    prompt = tokenizer.encode("x")
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


def random_answer(grammar, tokenizer, rng, limit=400):
    """Text from uniformly random allowed tokens; None if it did not end."""
    ids: list[int] = []
    while not grammar.complete and len(ids) < limit:
        token = int(rng.choice(allowed(grammar, tokenizer)))
        if token == tokenizer.eos_id:
            return text_of(tokenizer, ids)
        ids.append(token)
        grammar.accept(token)
    return text_of(tokenizer, ids) if grammar.complete else None


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer):
    rng = np.random.default_rng(0)
    ids = [i for i, b in enumerate(tokenizer.token_bytes) if b]
    assert len(ids) > 256
    for _ in range(200):
        drawn = rng.choice(ids, 12).tolist()
        text = b"".join(tokenizer.token_bytes[i] for i in drawn).decode(errors="replace")
        if "\ufffd" not in text:
            assert text_of(tokenizer, drawn) == text
    for text in WORDS:
        spelled = b"".join(
            tokenizer.token_bytes[i] for i in tokenizer.encode_array(text, start=False)
        )
        assert spelled == text.encode()
    for control in tokenizer.controls.values():
        assert tokenizer.token_bytes[control] == b""


@pytest.mark.parametrize("eos", [True, False])
def test_every_choice_can_be_answered_and_nothing_else(tokenizer, eos):
    factory = factory_of(tokenizer, eos)
    whole = factory.make("choice", WORDS)
    for word in WORDS:  # as the tokenizer spells it
        grammar = whole.copy()
        for token in tokenizer.encode_array(word, start=False).tolist():
            assert token in allowed(grammar, tokenizer)
            grammar.accept(token)
        ends = allowed(grammar, tokenizer)
        if word in ("the other",):  # may go on
            assert not grammar.complete
            assert not eos or tokenizer.eos_id in ends
        else:
            assert (grammar.complete, ends) == (True, [tokenizer.eos_id] * eos)
    rng = np.random.default_rng(1)
    drawn = {random_answer(whole.copy(), tokenizer, rng) for _ in range(100)}
    assert drawn - {None} <= set(WORDS)
    assert len(drawn) >= 8


def test_the_mask_against_all_texts_of_the_language(tokenizer):
    """Every token whose bytes begin the rest of a text is allowed, and no other."""
    texts = [a + b for a in ("", " ") for b in ("yes", "no", "non", "the", "yy", "ét", "e")]
    grammar = factory_of(tokenizer).make("regex", " ?(yes|non?|the|yy|ét|e)")
    every = [t.encode() for t in texts]
    rng = np.random.default_rng(2)
    for _ in range(60):
        state, done = grammar.copy(), b""
        while not state.complete:
            rest = [t[len(done) :] for t in every if t.startswith(done)]
            begins = {
                i
                for i, b in enumerate(tokenizer.token_bytes)
                if b and any(r.startswith(b) for r in rest)
            }
            if b"" in rest:
                begins.add(tokenizer.eos_id)
            found = set(allowed(state, tokenizer))
            if len({r[:1] for r in rest}) == 1 and found != begins:  # only one byte may follow
                assert len(found & begins) == len(found) == 1
            else:
                assert found == begins
            token = int(rng.choice(sorted(found)))
            if token == tokenizer.eos_id:
                break
            state.accept(token)
            done += tokenizer.token_bytes[token]
        assert done in every


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é", None]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_answers_satisfy_a_schema(tokenizer):
    rng = np.random.default_rng(3)
    whole = factory_of(tokenizer).make("json", SCHEMA)
    answers = [random_answer(whole.copy(), tokenizer, rng) for _ in range(12)]
    for answer in filter(None, answers):
        value = json.loads(answer)
        assert list(value) == ["name", "age", "tags"]
        assert len(value["name"]) <= 8
        assert value["age"] in range(121)
        assert set(value["tags"]) <= {"a", "é", None}
        assert len(value["tags"]) <= 2
    assert sum(a is not None for a in answers) > 6
    state = whole.copy()  # a schema as text is the same
    assert allowed(state, tokenizer) == allowed(
        factory_of(tokenizer).make("json", json.dumps(SCHEMA)), tokenizer
    )


def test_white_space_ends(tokenizers):
    """A model that prefers white space cannot write it forever."""
    tokenizer = tokenizers["tiktoken"]
    grammar = factory_of(tokenizer).make("json_object", None)
    grammar.accept(tokenizer.encode("{")[0])
    written = 0
    is_blank = lambda i: tokenizer.token_bytes[i].isspace()
    while blank := list(filter(is_blank, allowed(grammar, tokenizer))):
        grammar.accept(blank[0])
        written += 1
        assert written <= 42
    assert written > 1


@pytest.mark.parametrize(
    ("kind", "value", "accepted", "refused"),
    [
        ("regex", "^[a-c]+/\\d$", ["abc/1"], ["abd/1", "abc/1 "]),
        ("regex", "a\\$", ["a$"], ["a"]),
        ("regex", "x|y+", ["x", "yyy"], ["xy"]),
        ("grammar", 'start: "a" b+\nb: "(" b ")" | "x"', ["ax", "a((x))x"], ["a", "a(x"]),
        ("json_object", None, ['{"a": [1, {"b": null}]}', "{}"], ["[1]", "3", "{} "]),
        ("json", True, ["[1]", '"x"', "-1.5e3"], ["x", ""]),
        ("choice", [".*", "a|b", "(", "\\d"], [".*", "a|b", "(", "\\d"], ["aa", "b", "1"]),
    ],
)
def test_kinds(tokenizers, kind, value, accepted, refused):
    tokenizer = tokenizers["tiktoken"]
    whole = factory_of(tokenizer).make(kind, value)
    for text in accepted + refused:
        grammar, matches = whole.copy(), True
        for token in tokenizer.encode(text):
            matches = token in allowed(grammar, tokenizer)
            if not matches:
                break
            grammar.accept(token)
        assert (matches and tokenizer.eos_id in allowed(grammar, tokenizer)) == (text in accepted)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("json", {"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ("json", {"type": "nope"}, "Invalid type: nope"),
        ("json", {"$ref": "#/nothing"}, "does not exist"),
        ("json", {"$ref": "file:///etc/passwd"}, "does not fetch"),
        ("json", {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ("json", {"$ref": "#"}, "no text satisfies it"),
        ("json", "{", "Expecting property name"),
        ("json", "[1]", "a JSON schema is an object"),
        ("json", False, "a JSON schema is an object"),
        ("json", {"enum": ["x" * 70_000]}, "too large; at most 65,536"),
        (
            "json",
            {
                "type": "object",
                "properties": {f"p{i}": {"pattern": f"^[a-z]+{i}$"} for i in range(900)},
            },
            "complex",
        ),
        ("regex", "(a", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", "(" * 5000 + ")" * 5000, "nest"),
        ("choice", ["a" * 70_000], "too large"),
        ("grammar", "no rule", "Expected"),
        ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000, "nested"),
        ("grammar", "", "Empty grammar"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tokenizers, kind, value, words):
    with pytest.raises(ValueError, match=re.escape(words)) as e:
        factory_of(tokenizers["tiktoken"]).make(kind, value)
    message = str(e.value)
    assert len(message) < 320
    assert not re.search("\n|backtrace|whitespace_pattern", message)


def test_schemas_that_are_nested_too_deeply(tokenizers):
    factory = factory_of(tokenizers["tiktoken"])
    schema = {"type": "string"}
    for depth in range(3000):
        schema = {"items": schema}
        if depth in (200, 2999):
            with pytest.raises(ValueError, match=r"deep|recursion"):
                factory.make("json", schema)


def chain(length, wrap):
    """A schema of references to references."""
    links = {f"{i}": wrap({"$ref": f"#/$defs/{i + 1}"}) for i in range(length)}
    return {"$defs": links | {f"{length}": {"type": "string"}}, "$ref": "#/$defs/0"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("grammar", "start: a0\na5000: 'x'\n" + "\n".join(f"a{i}:a{i + 1}" for i in range(5000))),
        ("grammar", "start: A0\nA5000: 'x'\n" + "\n".join(f"A{i}:A{i + 1}" for i in range(5000))),
        ("json", chain(1400, lambda link: {"items": link})),
        ("json", chain(1400, lambda link: {"allOf": [link]})),
    ],
)
def test_long_chains_of_rules_do_not_overflow_the_stack(tokenizers, kind, value):
    """The process would end."""
    if kind == "grammar":
        value = value.replace("'", '"')
    grammar = factory_of(tokenizers["tiktoken"]).make(kind, value).copy()
    for _ in range(2):
        token = allowed(grammar, tokenizers["tiktoken"])[0]
        grammar.accept(token)
        if grammar.complete:
            break


def test_a_token_that_is_not_allowed(tokenizers):
    tokenizer = tokenizers["tiktoken"]
    grammar = factory_of(tokenizer).make("regex", "ab")
    with pytest.raises(ValueError, match="doesn't satisfy the grammar") as e:
        grammar.accept(tokenizer.encode("b")[0])
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="satisfy"):
        allowed(grammar, tokenizer)


def test_made_in_one_thread_and_used_in_another(tokenizers):
    tokenizer = tokenizers["tiktoken"]
    factory, made = factory_of(tokenizer), []
    makers = [
        threading.Thread(target=lambda i=i: made.append((i, factory.make("choice", [f"the {i}"]))))
        for i in range(6)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(made) == 6
    rng = np.random.default_rng(4)
    for i, grammar in made:
        assert random_answer(grammar, tokenizer, rng) == f"the {i}"


def test_a_model_with_fewer_ids_than_the_tokenizer(tokenizers):
    """Ids that the model cannot draw are never the only ones allowed."""
    tokenizer = tokenizers["tiktoken"]
    factory = GrammarFactory(tokenizer, [], 256)
    grammar = factory.make("choice", ["the other"])
    mask_W, text = np.zeros(8, np.int32), b""
    while not grammar.complete:
        grammar.fill(mask_W)
        token = int(np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))[0])
        grammar.accept(token)
        text += tokenizer.token_bytes[token]
    assert text == b"the other"


def test_literal():
    assert literal("a.é") == "/a\\x{2E}\\x{E9}/"
