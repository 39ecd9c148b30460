"""The command llama-jax serve: errors before a model is loaded."""

import socket
import sys

import pytest

from llama_jax.__main__ import main

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")


@pytest.mark.parametrize(("args", "status", "words"), [
    (["--port", "70000"], 2, "70000"),
    (["--slots", "0"], 2, "'0'"),
    (["--timeout", "0"], 2, "more than 0"),
    (["--timeout", "nan"], 2, "more than 0"),
    (["--timeout", "ever"], 2, "more than 0"),
    (["--prefix-cache", "2 apples"], 2, "2 apples"),
    (["--adapter", "poet"], 2, "NAME=FOLDER"),
    (["--adapter", "a=x", "--adapter", "a=y"], 2, "two models named a"),
    (["--api-key-file", "{tmp}/none"], 2, "none"),
    (["--api-key-file", "{tmp}/empty"], 2, "no API key"),
    (["--api-key-file", "{tmp}/bad"], 2, "key 2"),
    (["--api-key-file", "{tmp}/binary"], 2, "binary is not UTF-8"),
    (["--port", "{port}"], 1, "; another --port may be free"),
    (["--host", "203.0.113.1"], 1, "cannot listen on 203.0.113.1"),
])  # fmt: skip
def test_errors(args, status, words, tmp_path, capsys):
    (tmp_path / "empty").write_text("# none\n\n")
    (tmp_path / "bad").write_text("good\nnot good\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fill = lambda text: text.format(tmp=tmp_path, port=port)
        try:
            found = main(["serve", "no-such-model", "--port", "0", *map(fill, args)])
        except SystemExit as e:
            found = e.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert found == status, error
    assert error.startswith("error: ")
    assert fill(words) in error


def test_a_warning_if_everyone_may_ask(tmp_path, capsys):
    assert main(["serve", "no-such-model", "--port", "0", "--host", "0.0.0.0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: everyone who reaches 0.0.0.0")
    (tmp_path / "keys").write_text("a-key\n")
    keys = ["--api-key-file", str(tmp_path / "keys")]
    main(["serve", "no-such-model", "--port", "0", "--host", "0.0.0.0", *keys])
    assert "warning" not in capsys.readouterr().err


def test_the_extra_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "no-such-model"]) == 2
    assert "pip install 'llama_jax[serve]'" in capsys.readouterr().err


def test_keys_of_a_file(tmp_path):
    from llama_jax.serve.access import read_keys

    path = tmp_path / "keys"
    path.write_text("# mine\n one \n\ntwo\n")
    assert read_keys(path) == ["one", "two"]
