"""Which ids of a conversation count in the loss: the answers and their end-of-turn tokens."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken_tools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.data import template_process, template_worker, tiktoken_text
from llama_jax.data.chat_template import BUILT_IN, ChatTemplate, load_template
from llama_jax.data.conversations import detect_format, read_example
from llama_jax.data.tokenizer import BREAK, JsonTokenizer, Tokenizer
from llama_jax.data.tokenizer_files import hf_json, recognize
from llama_jax.prepare.tokenizer import train_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/chat_masks.json").read_text("utf-8"))
SHARED = Path(__file__).parents[3] / "shared" / "data"

# That of SmolLM2-Instruct: ChatML with a default system message.
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# An early template of Llama 3: it writes the start of an answer also after the last answer.
ALWAYS_PROMPT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "assistant\n{% endif %}"
)
# Newer models drop the reasoning of earlier answers.
REASONS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' and "
    "m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a mat"},
    {"role": "user", "content": "others"}, {"role": "assistant", "content": "\nbreathe "},
]  # fmt: skip


def json_tokenizer(path: Path, ranks: dict[bytes, int], more: list[str]) -> JsonTokenizer:
    """Llama 3's kind of tokenizer.json with further control tokens."""
    tree = tiktoken_text.to_json(ranks, newer=True)
    last = tree["added_tokens"][-1]
    tree["added_tokens"] += [
        last | {"id": last["id"] + i, "content": name} for i, name in enumerate(more, 1)
    ]
    path.write_text(json.dumps(tree))
    return JsonTokenizer(path.read_text(), path)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    chatml = ["<|im_start|>", "<|im_end|>", "<|tool_end|>"]
    every_byte = {bytes([b]): b for b in range(256)}
    text = "".join(s for case in GOLDEN["cases"].values() for s, _ in case["segments"])
    characters = sorted({c for c in text if c not in "▁\n"})
    pieces = train_tokenizer(characters, 3 + 256 + 1 + len(characters), folder / "tokenizer.model")
    words = train_tokenizer(
        ["the cat sat on a mat, USER: others"] * 50, 300, folder / "words.model"
    )
    merges = tiktoken_tools.ranks() | {b"\n\n": len(tiktoken_tools.ranks())}
    return {
        "pieces": pieces,
        "bytes": json_tokenizer(folder / "bytes.json", every_byte, chatml),
        "words": words,
        "merges": json_tokenizer(folder / "merges.json", merges, chatml),
    }


def template_of(name: str) -> ChatTemplate:
    return load_template(name, None) if name in BUILT_IN else ChatTemplate(SMOLLM2)


def ids_of(segment: str, tokenizer: Tokenizer, kind: str) -> list[int]:
    """Ids of a segment of a golden mask: a control token, or one id per character or byte."""
    if segment in tokenizer.controls:
        return [tokenizer.controls[segment]]
    if kind == "bytes":
        return list(segment.encode())
    known = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    return [known[c if c in known else f"<0x{ord(c):02X}>"] for c in segment]


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_masks_written_by_hand(name, tokenizers):
    case = GOLDEN["cases"][name]
    tokenizer = tokenizers[case["tokenizer"]]
    template = template_of(case["template"])
    example = read_example(case["record"], detect_format(case["record"]))
    segments = [
        (i, counts)
        for text, counts in case["segments"]
        for i in ids_of(text, tokenizer, case["tokenizer"])
    ]
    ids, counted = template.encode_example(example.messages, tokenizer)
    assert list(zip(ids, counted, strict=True)) == segments
    check_prompts(template, example.messages, tokenizer)
    end = case["segments"][-1] if case["segments"][-1][1] else case["segments"][-2]
    assert template.stop_ids(tokenizer) == (tokenizer.controls[end[0]],)


def check_prompts(template, messages, tokenizer, tools=None) -> list[list[int]]:
    """The ids before each answer are those that the model gets when it answers; returns the ids
    of each answer."""
    ids, counted = template.encode_example(messages, tokenizer, tools=tools)
    starts = [i for i, c in enumerate(counted) if c and not (i and counted[i - 1])]
    answers = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    found = []
    for start, k in zip(starts, answers, strict=True):
        assert template.encode(messages[:k], tokenizer, tools=tools) == ids[:start]
        end = next((i for i in range(start, len(ids)) if not counted[i]), len(ids))
        found.append(ids[start:end])
    assert not any(counted[: starts[0]])
    return found


def is_answer(ids: list[int], answer: str, tokenizer: Tokenizer) -> bool:
    """Whether the ids are the answer, without spaces around it, and one control token."""
    controls = [i for i in ids if i in tokenizer.controls.values()]
    return controls == ids[-1:] and tokenizer.decode(ids).strip() == answer.strip()


TEXT = st.lists(
    st.sampled_from([
        "the", " ", "\n", "cat", "é", "漢", "<|im_end|>", "</s>", "<s>", "<|eot_id|>", "[INST]",
        "user", "assistant", "USER:", "### Response:", "<", "|im_", "end|>", "\\", "{{", "0",
    ]) | st.text(max_size=3),
    min_size=1, max_size=6,
).map("".join)  # fmt: skip
ANSWER = TEXT.filter(lambda text: text.strip() != "")


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3), st.none() | TEXT)
def test_any_conversation(tokenizers, turns, system):
    """The prompt is a prefix, and what counts is the answers, whatever the messages say."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    pairs = [(load_template(n, None), "words") for n in ("alpaca", "vicuna", "gpt4all", "llama2")]
    pairs += [(load_template(n, None), "merges") for n in ("chatml", "llama3")]
    pairs += [(ChatTemplate(s), "merges") for s in (SMOLLM2, ALWAYS_PROMPT, GENERATION)]
    for template, name in pairs:
        found = check_prompts(template, messages, tokenizers[name])
        for ids, (_, answer) in zip(found, turns, strict=True):
            assert is_answer(ids, answer, tokenizers[name]), template.name


def test_no_token_is_in_a_prompt_and_in_an_answer(tokenizers):
    """Also in the prompts of later turns, where the earlier answers are text of the template."""
    talk = [TALK[0], TALK[3], TALK[2], TALK[3]]
    assert len(tokenizers["merges"].encode("\n\n")) == 1
    for template in (ChatTemplate(SMOLLM2), ChatTemplate(GENERATION)):
        check_prompts(template, talk, tokenizers["merges"])


def test_a_template_with_generation_blocks(tokenizers):
    """The blocks decide what counts, and equal masks as without blocks where they mean the same."""
    tokenizer = tokenizers["merges"]
    with_blocks, without = ChatTemplate(GENERATION), load_template("chatml", None)
    assert with_blocks.encode_example(TALK, tokenizer) == without.encode_example(TALK, tokenizer)
    whole = re.sub(r"{%-? (end)?generation %}", "", GENERATION)
    whole = whole.replace("<|im_start|>{{ m.role", "{% generation %}<|im_start|>{{ m.role", 1)
    whole = whole.replace("{% endfor %}", "{% endgeneration %}{% endfor %}", 1)
    ids, counted = ChatTemplate(whole).encode_example(TALK, tokenizer)
    assert all(counted)
    assert ids == without.encode_example(TALK, tokenizer)[0]
    only_text = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    ids, counted = ChatTemplate(only_text).encode_example(TALK, tokenizer)
    assert [i for i, c in zip(ids, counted, strict=True) if c] == tokenizer.encode(
        "a mat"
    ) + tokenizer.encode("\nbreathe ")
    end = tokenizer.controls["<|im_end|>"]
    for source in (GENERATION, only_text, whole):
        assert ChatTemplate(source).stop_ids(tokenizer) == (end,)
    never = "{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"writes no {% generation %} block"):
        ChatTemplate(never).encode_example(TALK, tokenizer)


def test_masks_are_those_of_transformers(tokenizers):
    """The same ids and mask for a template with {% generation %}; the same text without."""
    transformers = pytest.importorskip("transformers")
    for name, talk in (("bytes", TALK), ("merges", TALK[:2])):
        tokenizer = tokenizers[name]
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer.path), bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
        )  # fmt: skip
        for source in (GENERATION, SMOLLM2, ALWAYS_PROMPT, load_template("llama3", None).source):
            has_mask = source == GENERATION
            want = theirs.apply_chat_template(
                talk, chat_template=source, return_dict=True, return_assistant_tokens_mask=has_mask
            )
            ids, counted = ChatTemplate(source).encode_example(talk, tokenizer)
            assert theirs.decode(ids) == theirs.decode(want["input_ids"])
            if name == "bytes":
                assert ids == want["input_ids"]
            if has_mask:
                assert ids == want["input_ids"]
                assert list(map(int, counted)) == want["assistant_masks"]


def test_ends_of_turns(tokenizers):
    """Templates that write further control tokens after an answer, or none."""
    tokenizer = tokenizers["bytes"]
    im_end, tool_end = (tokenizer.controls[n] for n in ("<|im_end|>", "<|tool_end|>"))
    call = {"id": "123456789", "function": {"name": "add", "arguments": {"a": [1, "the"]}}}
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    calls = SMOLLM2.replace(
        "+ '<|im_end|>' +",
        "}}{% for c in message.tool_calls or [] %}{{ c.function | tojson }}"
        "{{ raise_exception('id') if c.id | length != 9 }}<|tool_end|>{% endfor %}"
        "{{ '<|im_end|>' +",
    )
    ids, counted = ChatTemplate(calls).encode_example(talk, tokenizer, tools=[{"name": "add"}])
    want = '{"name": "add", "arguments": {"a": [1, "the"]}}'
    want = [*tokenizer.encode(want), tool_end, im_end]
    assert [i for i, c in zip(ids, counted, strict=True) if c] == want
    # EOS after the last turn only: the end of each turn is another token.
    ids, counted = ChatTemplate(
        SMOLLM2 + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    ).encode_example(TALK, tokenizer)
    counted_controls = [i for i, c in zip(ids, counted, strict=True) if c and i > 255]
    assert counted_controls == [im_end, im_end]
    assert (ids[-1], counted[-1]) == (tokenizer.eos_id, False)
    # Turns that end with text alone; the BOS token starts each turn.
    plain = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    prompted = plain + "{% if add_generation_prompt %}### assistant:{% endif %}"
    ids, counted = ChatTemplate(prompted).encode_example(TALK[:2], tokenizer)
    assert ids == tokenizer.encode("### user: the cat\n### assistant: a mat\n")
    assert [i for i, c in zip(ids, counted, strict=True) if c] == tokenizer.encode(" a mat")
    assert ChatTemplate(prompted).stop_ids(tokenizer) == ()
    bos = "{% for m in messages %}{{ '\n' if m.role == 'user' else 'A:' }}{{ m.content }}"
    bos += "{{ eos_token + bos_token if m.role != 'user' }}{% endfor %}"
    bos += "{% if add_generation_prompt %}A:{% endif %}"
    ids, counted = ChatTemplate(bos).encode_example(TALK, tokenizer)
    assert [i for i, c in zip(ids, counted, strict=True) if c and i > 255] == [tokenizer.eos_id] * 2
    # The start of an answer, also after the last one.
    ids, counted = ChatTemplate(ALWAYS_PROMPT).encode_example(TALK, tokenizer)
    end = tokenizer.controls["<|eot_id|>"]
    assert [i for i, c in zip(ids, counted, strict=True) if c and i > 255] == [end, end]


def test_a_call_that_the_template_leaves_out(tokenizers):
    """Otherwise the model would be trained to answer nothing."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [*TALK[:3], {"role": "assistant", "content": "", "tool_calls": [call]}]
    for source in (SMOLLM2, GENERATION):
        with pytest.raises(ValueError, match="the template x leaves out the call of add in answer"):
            ChatTemplate(source, "the template x").encode_example(talk, tokenizers["bytes"])


def test_templates_whose_answers_are_not_found(tokenizers):
    """Refused in training with the way out; a chat goes on."""
    tokenizer = tokenizers["bytes"]
    reasoned = [dict(m, reasoning_content="so") if m["role"] == "assistant" else m for m in TALK]
    for source, why in (
        (REASONS, "answer 1 is: its text changes when messages follow"),
        ("{{ messages | length }}" + SMOLLM2, "answer 1 is: its turn does not start with the"),
        ("{% if messages | length > 3 %}!{% endif %}" + SMOLLM2, "answer 1 is: the text before it"),
        (SMOLLM2.replace("assistant\n", "assistant:\n"), "its turn does not start with the prompt"),
        (SMOLLM2.replace("['content']", "['content'][2:]"), "answer 1 is: the template changes or"),
        ("{% if messages | length == 2 %}{{ 1 // 0 }}{% endif %}" + SMOLLM2, "fails for the mess"),
    ):  # fmt: skip
        template = ChatTemplate(source, "the template x")
        with pytest.raises(ValueError, match=rf"the template x does not show where .*{why}.*") as e:
            template.encode_example(reasoned, tokenizer)
        assert "{% generation %}" in str(e.value)
        assert template.encode(reasoned[:3], tokenizer)
    one = ChatTemplate(REASONS).encode_example(reasoned[:2], tokenizer)
    assert tokenizer.decode([i for i, c in zip(*one, strict=True) if c]) == "<think>so</think>a mat"
    marked = REASONS.replace("<think>", "{% generation %}<think>").replace("{{ m.content }}", "")
    marked = marked.replace("</think>", "</think>{{ m.content }}{% endgeneration %}")
    ids, counted = ChatTemplate(marked).encode_example(reasoned, tokenizer)
    last = [i for i, c in zip(ids, counted, strict=True) if c]
    assert tokenizer.decode(last) == "<think>so</think>\nbreathe "
    with pytest.raises(ValueError, match="has no answer that counts"):
        ChatTemplate(SMOLLM2).encode_example(TALK[:1], tokenizer)


def test_answers_of_weight_zero(tokenizers):
    """As in OpenAI's format: part of the conversation that does not count."""
    tokenizer = tokenizers["merges"]
    talk = [*TALK[:1], TALK[1] | {"weight": 0}, TALK[2], TALK[3] | {"weight": 1}]
    for template in (ChatTemplate(SMOLLM2), ChatTemplate(GENERATION)):
        all_ids, all_counted = template.encode_example(TALK, tokenizer)
        ids, counted = template.encode_example(talk, tokenizer)
        second = len(template.encode(TALK[:3], tokenizer))
        assert ids == all_ids
        assert counted == [False] * second + all_counted[second:]
        with pytest.raises(ValueError, match="answer that counts"):
            template.encode_example(talk[:2], tokenizer)


def test_control_tokens_that_the_tokenizer_lacks(tokenizers):
    path = re.escape(str(tokenizers["words"].path))
    for name, token in (("chatml", "im_start"), ("llama3", "start_header_id")):
        message = rf"template {name} writes .* token <\|{token}\|>, which the tokenizer {path} does"
        with pytest.raises(ValueError, match=message):
            load_template(name, None).encode_example(TALK, tokenizers["words"])
    for token in ("<｜User｜>", "<start_of_turn>", "<|user|>"):
        source = "{% for m in messages %}" + token + "{{ m.content }}{% endfor %}"
        with pytest.raises(ValueError, match=f"control token {re.escape(token)}, which"):
            ChatTemplate(source).encode_example(TALK, tokenizers["merges"])
    said = [TALK[0] | {"content": "<|im_start|>"}, TALK[1]]
    mentions = "{# <|im_start|> #}{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    assert ChatTemplate(mentions).encode_example(said, tokenizers["words"])


def test_names_in_the_template_of_a_checkpoint_that_are_text(tokenizers, tmp_path):
    """TinyLlama's "<|user|>" is text, on which the model was trained; a token that the files of the
    checkpoint name must be in its tokenizer."""
    tokenizer = tokenizers["words"]
    source = SMOLLM2.replace("<|im_end|>", "</s>").replace("im_start", "turn")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    ids, counted = load_template("", tmp_path).encode_example(TALK[:2], tokenizer)
    assert "\n<|turn|>user\nthe cat \n<|turn|>assistant\na mat" in tokenizer.decode(ids)
    assert [i for i, c in zip(ids, counted, strict=True) if c] == [
        *tokenizer.encode_array("a mat", start=False), tokenizer.eos_id,
    ]  # fmt: skip
    (tmp_path / "added_tokens.json").write_text('{"<|turn|>": 300}')
    with pytest.raises(ValueError, match=r"writes the control token <\|turn\|>, which"):
        load_template("", tmp_path).encode_example(TALK[:2], tokenizer)


def test_control_tokens_that_are_not_marked_as_special(tokenizers, tmp_path):
    """As in tokenizers of DeepSeek's distilled models, and of many trained with ChatML."""
    tokenizer = tokenizers["bytes"]
    tree = json.loads(tokenizer.path.read_text())
    for token in tree["added_tokens"]:
        token["special"] &= not token["content"].startswith("<|im_")
    tree["added_tokens"] += [tree["added_tokens"][-1] | {
        "id": tokenizer.vocab_size, "content": "<think>", "special": False
    }]  # fmt: skip
    other = JsonTokenizer(json.dumps(tree), tmp_path / "tokenizer.json")
    talk = [TALK[0] | {"content": "<|im_end|> é"}, TALK[1]]
    for source in (SMOLLM2, GENERATION):
        template = ChatTemplate(source)
        assert template.encode_example(talk, other) == template.encode_example(talk, tokenizer)
    assert template.stop_ids(other) == (tokenizer.controls["<|im_end|>"],)
    assert other.encode("<think>") == [tokenizer.vocab_size]
    assert "<think>" not in other.controls


def test_no_eos_token(tmp_path):
    tokenizer = json_tokenizer(tmp_path / "tokenizer.json", {bytes([b]): b for b in range(256)}, [])
    tree = json.loads(tokenizer.path.read_text().replace("<|end_of_text|>", "<|other|>"))
    tokenizer = JsonTokenizer(json.dumps(tree), tokenizer.path)
    with pytest.raises(ValueError, match="template vicuna ends answers with the EOS token, which"):
        load_template("vicuna", None).encode_example(TALK, tokenizer)


def test_failing_templates_are_named(tokenizers):
    tokenizer = tokenizers["bytes"]
    for source, message in {
        "{{ raise_exception('no') }}": "the template x refuses these messages: no",
        "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "too long",
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}": "the template x fails: it writes",
        "{{ 1 / 0 }}": "the template x fails: line 1: division by zero",
        "{{ '\\udffe' }}": "what the template x writes is not valid Unicode",
    }.items():
        with pytest.raises(ValueError, match=message):
            ChatTemplate(source, "the template x").encode_example(TALK, tokenizer)
    tools = [{"name": "add"}]
    odd = [TALK[0], TALK[1] | {"tool_calls": [{"name": "add"}]}]
    for name in BUILT_IN:
        for arguments in (
            (TALK, tools),
            (odd, None),
            ([*TALK[:2], {"role": "tool", "content": "x"}], None),
        ):
            with pytest.raises(
                ValueError, match=f"template {name} refuses these messages: {name} has no"
            ):
                load_template(name, None).encode_example(
                    arguments[0], tokenizer, tools=arguments[1]
                )


def test_the_time_for_all_answers_of_a_prompt_is_limited(tokenizers, tmp_path, monkeypatch):
    folder = Path(template_process.__file__).parent
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import sys\nsys.path.insert(0, {str(folder)!r})\nimport template_worker as worker\n"
        "worker.PROMPT_SECONDS = 1\nworker.main()\n"
    )
    monkeypatch.setattr(template_process, "_WORKER", worker)
    process = template_process.Process()
    monkeypatch.setattr(template_process, "process", process)
    # A rendering takes about 0.02 s.
    slow = "{% for i in range(99999) %}{% endfor %}{{ messages[-1].content }}"
    template, talk = ChatTemplate(slow), TALK[:2] * 300
    try:
        with pytest.raises(ValueError, match="too long"):
            template.encode(talk, tokenizers["bytes"])
        assert template.encode(talk[:5], tokenizers["bytes"])
    finally:
        process.close()


@pytest.fixture
def worker(monkeypatch):
    """The worker's module in this process, without its limits and with an empty memory."""
    monkeypatch.setattr(template_worker, "_limit_time", lambda end=0: None)
    monkeypatch.setattr(template_worker, "_remembered", template_worker.Turns())
    return template_worker


def render_request(source, messages, **more):
    variables = dict(messages=messages, tools=None, add_generation_prompt=True, bos_token="<s>")
    names = ["<|im_start|>", "<|im_end|>"]
    return {"template": source, "variables": variables | more, "names": names, "mark": "\udfff"}


COUNTED = "{% if messages | length > 5 %}!{% endif %}" + SMOLLM2
FAILS = "{% if messages | length == 2 %}{{ 1 // 0 }}{% endif %}" + SMOLLM2


@pytest.mark.parametrize("source", [SMOLLM2, GENERATION, REASONS, COUNTED, FAILS])
def test_remembered_turns_are_those_of_a_new_process(source, worker, monkeypatch):
    """Conversations that grow, part, change in the middle, and have other variables."""
    talk = [m | {"reasoning_content": "so"} for m in TALK * 3]
    other = [*talk[:4], {"role": "user", "content": "no"}, *talk[5:]]
    requests = [render_request(source, talk[:k]) for k in (3, 5, 12, 7, 3)]
    requests += [render_request(source, other[:k]) for k in (5, 9)]
    requests += [render_request(source, talk[:5], bos_token="<b>", tools=[{"name": "add"}])]
    made = [worker.answer(copy.deepcopy(r)) for r in requests]
    for request, found in zip(requests, made, strict=True):
        monkeypatch.setattr(worker, "_remembered", worker.Turns())
        assert worker.answer(copy.deepcopy(request)) == found
    assert len({json.dumps(m) for m in made}) > 5


def test_turns_of_a_long_conversation_are_rendered_once(worker, monkeypatch):
    counted, render = [], worker._render
    monkeypatch.setattr(worker, "_render", lambda *args: counted.append(1) or render(*args))
    numbers = []
    for k in range(1, 80, 2):
        counted.clear()
        talk = [m | {"content": f"{i}"} for i, m in enumerate((TALK * 20)[:k])]
        assert len(worker.answer(render_request(SMOLLM2, talk))["turns"]) == k // 2
        numbers.append(len(counted))
    assert max(numbers) <= 5
    # A turn of yesterday's text is not one of today's.
    for day in ("Monday", "Tuesday"):
        now = SimpleNamespace(strftime=lambda form, day=day: day)
        clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda now=now: now))
        monkeypatch.setattr(worker, "datetime", clock)
        made = worker.answer(render_request("{{ strftime_now('%A') }}" + SMOLLM2, TALK[:3]))
        ((start, _),) = made["turns"]
        assert made["text"].startswith(day)
        assert made["text"][start:].startswith("a mat")
    # The memory is bounded.
    monkeypatch.setattr(worker, "REMEMBERED", 3000)
    for k in range(30):
        worker.answer(render_request(SMOLLM2, [TALK[0] | {"content": f"{k}"}, *TALK[1:3]]))
    assert len(worker._remembered._turns) <= 6


def test_another_try_continues_where_the_time_was_over(worker, monkeypatch):
    count = [0]  # renderings; each takes a second
    render = worker._render
    monkeypatch.setattr(worker, "_render", lambda *args: (count.append(1), render(*args))[1])
    monkeypatch.setattr(worker, "_cpu_time", lambda: float(len(count)))
    request = render_request(SMOLLM2, [m | {"content": f"{i}"} for i, m in enumerate(TALK * 8)])
    found = [worker.answer(copy.deepcopy(request)) for _ in range(6)]
    assert "too long (10 s for all" in found[0]["error"]
    assert "error" not in found[-1]
    assert len(found[-1]["turns"]) == 16
    assert len(count) < 80


def test_the_memory_for_all_answers_of_an_example_is_that_of_a_few(
    tokenizers, tmp_path, monkeypatch
):
    """The two renderings for each answer were all kept: 400 MB here, and over 1 GiB for an agent's
    1,000 answers, which were refused."""
    folder = Path(template_process.__file__).parent
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import sys\nsys.path.insert(0, {str(folder)!r})\nimport template_worker as worker\n"
        "worker.BYTES = 256 << 20\nworker.main()\n"
    )
    monkeypatch.setattr(template_process, "_WORKER", worker)
    process = template_process.Process()
    monkeypatch.setattr(template_process, "process", process)
    talk = [m | {"content": f"{i}" + "x" * 2500} for i in range(200) for m in TALK[:2]]
    try:
        _, counted = ChatTemplate(SMOLLM2).encode_example(talk, tokenizers["bytes"])
    finally:
        process.close()
    assert sum(counted) == sum(len(m["content"]) + 1 for m in talk[1::2])


def test_load_template(tmp_path):
    with pytest.raises(
        ValueError, match=r"set data\.template .*to alpaca, vicuna, .* or the path of"
    ):
        load_template("", None)
    with pytest.raises(ValueError, match=r"has no chat template; set data\.template .*to alpaca"):
        load_template("", tmp_path)
    own = tmp_path / "chat_template.jinja"
    own.write_text(SMOLLM2)
    for template in (load_template("", tmp_path), load_template(str(own), None)):
        assert template.source == SMOLLM2
        assert str(tmp_path) in template.name
    with pytest.raises(ValueError, match="there is no chat template 'alpacca'; it must be alpaca,"):
        load_template("alpacca", tmp_path)
    own.write_text("{% if %}")
    with pytest.raises(ValueError, match=rf"{re.escape(str(own))} fails: line 1"):
        load_template(str(own), None)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_any_name_is_that_of_transformers(name, tokenizers):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.utils.chat_template_utils, "_alias_reasoning_fields"):
        pytest.skip("a release of transformers that passes the fields on as they are")
    tokenizer = tokenizers["bytes"]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
    talk = [TALK[0], TALK[1] | {name: "so"}, TALK[2], TALK[3] | {name: None}]
    for read in ("reasoning_content", "thinking"):
        source = SMOLLM2.replace("message['content']", f"(message.{read} or '') + message.content")
        want = theirs.apply_chat_template(talk, chat_template=source, return_dict=False)
        assert ChatTemplate(source).encode_example(talk, tokenizer)[0] == want


def test_the_template_for_tools(tokenizers, tmp_path):
    """Of a tokenizer_config.json with several templates, as in transformers: byte for byte."""
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers["bytes"]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
    body = "{% for m in messages %}{{ m.content }}\n  {% endfor %}"
    named = {"default": f"\n{body}  \n", "tool_use": f"\n\nB{{{{ tools[0].name }}}}{body}  \n\n"}
    theirs.chat_template = named
    several = [{"name": name, "template": text} for name, text in named.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    template = load_template("", tmp_path)
    for tools in (None, [{"name": "add"}]):
        want = theirs.apply_chat_template(TALK[:3], tools=tools, tokenize=False)
        text = template._render(TALK[:3], tokenizer, tools, False).text
        assert text.replace(BREAK, "") == want


def test_text_continues_without_a_space(tokenizers, tmp_path):
    """In a tokenizer.json of LLaMA's kind as in SentencePiece."""
    model = tokenizers["words"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(hf_json(recognize(model.path), newer=True)))
    same = JsonTokenizer(path.read_text(), path)
    texts = ["<s>the cat:", " a mat", "mat</s>", "the", "</s>", " the\n", "cat"]
    assert same.encode_consecutive(texts) == model.encode_consecutive(texts)
    first, second = same.encode_consecutive(["the", "cat"])
    assert [first[0], second[0]] == [
        model.encode("the")[0],
        model.encode_array("cat", start=False)[0],
    ]
    assert second != model.encode("cat")


ALPACA = {"instruction": "Name the cat.", "input": "a mat", "output": "the mat: others sat"}
VICUNA = [("human", "the cat"), ("gpt", "sat, on a mat"), ("human", "others"), ("gpt", "the USER")]


def test_records_of_alpaca_and_vicuna(tokenizers):
    """The answers count, and a conversation has the ids of the same text encoded whole."""
    records = {
        "alpaca": [ALPACA],
        "vicuna": [{"conversations": [{"from": a, "value": b} for a, b in VICUNA]}],
    }
    tokenizer = tokenizers["words"]
    if SHARED.is_dir():  # real records
        tokenizer = Tokenizer.load(SHARED / "llama_tokenizer/tokenizer.model")
        files = ("alpaca/alpaca_en_demo.json", "vicuna/dummy_conversation.json")
        for name, file in zip(records, files, strict=True):
            records[name] += json.loads((SHARED / file).read_text("utf-8"))[::8]
    for name, some in records.items():
        template = load_template(name, None)
        for record in some:
            messages = read_example(record, detect_format(record)).messages
            answers = [m["content"] for m in messages if m["role"] == "assistant"]
            found = check_prompts(template, messages, tokenizer)
            for ids, answer in zip(found, answers, strict=True):
                assert is_answer(ids, answer, tokenizer)
            if name == "vicuna":
                questions = [m["content"] for m in messages if m["role"] == "user"]
                turns = zip(questions, answers, strict=True)
                texts = [f"USER: {question} ASSISTANT: {answer}" for question, answer in turns]
                texts[0] = (
                    "A chat between a curious user and an artificial intelligence assistant. "
                    "The assistant gives helpful, detailed, and polite answers to the user's "
                    "questions. "
                ) + texts[0]
                whole = [i for text in texts for i in tokenizer.encode(text, eos=True)]
                assert template.encode_example(messages, tokenizer)[0] == [tokenizer.bos_id, *whole]


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_token_names_of_tokenizer_config(eos, tokenizers, tmp_path):
    """A template gets the eos_token of tokenizer_config.json, which is not that of documents."""
    text = "\n{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    text += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = tokenizers["bytes"]
    end = tokenizer.controls["<|im_end|>"]
    assert tokenizer.eos_id != end
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": eos, "chat_template": text})
    )
    template = load_template("", tmp_path)
    ids, counted = template.encode_example(TALK[:2], tokenizer)
    expected = [*b"\nuser: the cat", end, *b"assistant: a mat", end]
    assert ids == expected
    assert [i for i, c in zip(ids, counted, strict=True) if c] == [*b"a mat", end]
    assert template.stop_ids(tokenizer) == (end,)
    without_eos = copy.copy(tokenizer)
    without_eos.eos_id = None
    assert template.encode_example(TALK[:2], without_eos)[0] == expected
    # The copy in a run folder, beside the same settings, is not changed again.
    (tmp_path / "chat_template.jinja").write_text(template.source)
    assert load_template("", tmp_path).source == template.source
    # Blanks before the first statement, at the start of a line, are dropped as in transformers.
    (tmp_path / "chat_template.jinja").write_text("  {% if true %}a{% endif %}{{ eos_token }}")
    assert load_template("", tmp_path).text([], tokenizer) == "a<|im_end|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 3}')
    (tmp_path / "chat_template.jinja").write_text(text)
    with pytest.raises(ValueError, match="eos_token must be text, not 3"):
        load_template("", tmp_path)
