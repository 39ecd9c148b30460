"""`generate --chat`: messages from the command line or the terminal; where answers end."""

import io
import sys

import pytest
from flax import nnx
from model_tools import F32, small

from llama_jax.generate.__main__ import main
from llama_jax.generate.llm import LLM
from llama_jax.model.llama import Llama
from llama_jax.model.params import params_of
from llama_jax.prepare.tokenizer import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}ask {{ m.content }} say"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer = train_tokenizer(["the cat sat on a mat, ask and say"] * 50, 300, path)
    cfg = small(vocab_size=300, context=400)
    params = params_of(Llama(cfg, F32, nnx.Rngs(0), 0.3))
    return LLM(cfg, params, tokenizer, F32, eos_ids=(), chat_template=TEMPLATE)


@pytest.fixture
def command(llm, monkeypatch, capsys):
    """Runs the command with a model; returns status, stdout and stderr."""
    monkeypatch.setattr("llama_jax.generate.__main__.load", lambda *_, **__: llm)

    def run(*words):
        return main(["x", "--chat", *words, "--max-new-tokens", "12"]), *capsys.readouterr()

    return run


def answers(llm, *messages):
    chat = llm.chat()
    return "".join(chat.say(message, max_new_tokens=12) + "\n" for message in messages)


def test_one_message(command, llm):
    assert command("the cat") == (0, answers(llm, "the cat"), "")


def test_messages_of_a_terminal(command, llm, monkeypatch):
    """A conversation of several turns, which Ctrl-D ends; empty lines are no messages."""
    want = answers(llm, "the cat", "a mat")
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\n  \na mat\n"))
    assert command() == (0, want, "")
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\na mat\n"))
    assert command("-") == (0, want, "")
    monkeypatch.setattr("sys.stdin", io.StringIO("cat " * 400 + "\n"))
    status, _, err = command()
    assert status == 2
    assert "error: the prompt has" in err

    typed = iter(["the cat", "", "cat " * 400, "a mat"])
    prompts = []

    def type_line(prompt):
        prompts.append(prompt)
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("builtins.input", type_line)
    status, out, err = command()
    first, second = want.splitlines(keepends=True)
    assert (status, out) == (0, f"{first}\n{second}\n")  # after an error, the chat continues
    assert prompts == ["> "] * 5
    assert err.startswith("Type a message; Ctrl-D ends the chat.\nerror: the prompt has")
    assert "readline" in sys.modules


def test_an_answer_ends_at_the_token_of_the_template(llm):
    """Also where it is not among the EOS ids of the model; those end an answer too."""
    message = [{"role": "user", "content": "the cat"}]
    prompt = llm.chat()._template.encode(message, llm.tokenizer)
    whole = llm.generate(prompt, max_new_tokens=12, logprobs=True)
    assert llm.eos_ids == ()
    assert llm.chat()._llm.eos_ids == (2,)
    other = LLM(
        llm.cfg, llm.params, llm.tokenizer, F32, eos_ids=(whole.ids[3],), chat_template=TEMPLATE
    )
    chat = other.chat()
    assert set(chat._llm.eos_ids) == {2, whole.ids[3]}
    first = whole.ids.index(whole.ids[3])
    assert chat.say("the cat") == llm.tokenizer.decode(list(whole.ids[:first])).strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x"], "give a PROMPT to continue, or --chat"),
        (["x", "--chat", "--json"], "--chat prints one answer as text"),
        (["x", "--chat", "--n", "2"], "--chat prints one answer as text"),
        (["x", "--chat", "--max-new-tokens", "0"], "max_new_tokens=0"),
    ],
)
def test_invalid_arguments(words, message, monkeypatch, capsys):
    fail = lambda *_, **__: pytest.fail("weights read")
    monkeypatch.setattr("llama_jax.generate.__main__.load", fail)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_base_model(llm, monkeypatch, capsys):
    base = LLM(llm.cfg, llm.params, llm.tokenizer, F32)
    monkeypatch.setattr("llama_jax.generate.__main__.load", lambda *_, **__: base)
    assert main(["x", "--chat", "hello"]) == 2
    assert "this checkpoint has no chat template" in capsys.readouterr().err
