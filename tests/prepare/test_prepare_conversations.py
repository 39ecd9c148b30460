"""Conversations: kinds of files, masks in shards, templates, samples, and error messages."""

import gzip
import hashlib
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from test_prepare import Killed, contents, documents, manifest, texts

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data.chat_template import ChatTemplate
from llama_jax.data.conversations import read_example
from llama_jax.data.manifest import verify
from llama_jax.data.mixture import open_mixture, val_stats
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare import records, shards
from llama_jax.prepare import source as source_module
from llama_jax.prepare.__main__ import main
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.prepare.records import BadLine, read_json
from llama_jax.prepare.show import show
from llama_jax.prepare.text import find_files, read_documents
from llama_jax.prepare.tokenizer import train_tokenizer

TEMPLATE = """\
{{ bos_token }}{% for m in messages %}{% if m.role == "assistant" %}A:{% generation %} {{ m.content }}\
{{ eos_token }}{% endgeneration %}{% else %}{{ m.role[0] | upper }}: {{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a checkpoint with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    train_tokenizer(
        [*texts(100), "ABCDEFGHIJKLMNOPQRSTUVWXYZ: .!?"], 400, folder / "tokenizer.model"
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def config(model: str, path: Any, **changes: Any) -> DataConfig:
    source = SourceConfig(path=str(path), format=changes.pop("format", "auto"))
    settings = {"tokenizer": model, "val_fraction": 0.2, "workers": 2, "packing": "examples"}
    settings["seq_len"] = 64
    return DataConfig(sources={"a": source}, **settings | changes)


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different questions and answers."""
    return [(t.split("\n")[0], t.split("\n")[2]) for t in texts(count, seed)]


def alpaca(count: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"instruction": q, "input": "", "output": a} for q, a in pairs(count, seed)]


def lines(path: Path, found: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in found))
    return path


def masks(folder: Path, split: str) -> list[list[int]]:
    """The mask of every document, read without code of llama_jax."""
    found: list[list[int]] = []
    for shard in manifest(folder)["splits"][split]["shards"]:
        mask = np.fromfile(folder / f"{shard['name']}.mask", np.uint8)
        starts = np.fromfile(folder / f"{shard['name']}.starts", "<u8")
        ends = [*starts[1:], len(mask)]
        found += [mask[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    return found


def everything(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of all documents, sorted."""
    splits = ("train", "holdout")
    pairs = [zip(documents(folder, s), masks(folder, s), strict=True) for s in splits]
    return sorted(pair for split in pairs for pair in split)


def user_and_answer(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def every_format(folder: Path, found: list[tuple[str, str]]) -> list[Path]:
    """The same conversations in every format and kind of file."""
    folder.mkdir()
    sharegpt = [
        {"id": i, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for i, (q, a) in enumerate(found)
    ]
    messages = [{"messages": user_and_answer(q, a)} for q, a in found]
    instructions = [{"instruction": q, "input": "", "output": a} for q, a in found]
    (folder / "alpaca.json").write_text(json.dumps(instructions, indent=2))
    (folder / "bom.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(instructions).encode())
    lines(folder / "alpaca_lines.json", instructions)
    (folder / "array.jsonl").write_text(json.dumps(sharegpt))
    lines(folder / "sharegpt.jsonl", sharegpt)
    prompts = lines(folder / "gpt4all.jsonl", [{"prompt": q, "response": a} for q, a in found])
    (folder / "gpt4all.jsonl.gz").write_bytes(gzip.compress(prompts.read_bytes()))
    plain = lines(folder / "messages.jsonl", messages).read_bytes()
    with pyarrow.CompressedOutputStream(str(folder / "messages.jsonl.zst"), "zstd") as f:
        f.write(plain)
    for name, rows in (("messages", messages), ("alpaca", instructions)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    parts = folder / "parts"
    parts.mkdir()
    (parts / "1.json").write_text(json.dumps(sharegpt[:20]))
    lines(parts / "2.jsonl", sharegpt[20:])
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_documents(tmp_path, model):
    """Ids and mask are those of the template; equal records are in equal splits."""
    found = pairs(50)
    tokenizer = Tokenizer.load(model)
    template = ChatTemplate(TEMPLATE)
    encoded = [template.encode_example(user_and_answer(q, a), tokenizer) for q, a in found]
    expected = sorted((ids, [int(m) for m in mask]) for ids, mask in encoded)
    paths = every_format(tmp_path / "in", found)
    assert len(paths) == 12
    sources = {re.sub(r"\W", "_", p.name): SourceConfig(path=str(p)) for p in paths}
    data = DataConfig(
        sources=sources, tokenizer=model, seq_len=64, packing="examples", val_fraction=0.2
    )
    out = prepare_mixture(data, 400, tmp_path / "out")
    held_out = sorted(documents(out / "alpaca_json", "holdout"))
    assert 2 <= len(held_out) <= 20
    for name in sources:
        assert everything(out / name) == expected, name
        assert sorted(documents(out / name, "holdout")) == held_out, name
    assert verify(out) == []
    assert open_mixture(out).chat_template.read_text() == TEMPLATE


def test_manifest_of_conversations(tmp_path, model):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(alpaca(40)))
    out = prepare_mixture(config(model, path), 400, tmp_path / "out")
    m = manifest(out / "a")
    sha = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    about = m["conversations"]
    assert (about["format"], about["template_sha256"], about["loss"]) == ("alpaca", sha, "answers")
    assert (out / "a" / "chat_template.jinja").read_text() == TEMPLATE
    for split, content in m["splits"].items():
        assert content["counted"] == sum(map(sum, masks(out / "a", split)))
        for shard in content["shards"]:
            mask = (out / "a" / f"{shard['name']}.mask").read_bytes()
            assert hashlib.sha256(mask).hexdigest() == shard["mask_sha256"]
            assert len(mask) == shard["tokens"]
    # Text is unchanged: no mask, no template, nothing new in the manifest.
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "b.json").write_text(json.dumps(alpaca(3)))
    lines(tmp_path / "text" / "a.jsonl", [{"text": t} for t in texts(40)])
    out = prepare_mixture(config(model, tmp_path / "text", template="x"), 400, tmp_path / "out2")
    assert "conversations" not in manifest(out / "a")
    assert manifest(out / "a")["skipped"] == {".json": 1}
    assert {p.name.split(".")[-1] for p in (out / "a").iterdir()} == {
        "tokens", "starts", "json", "model",
    }  # fmt: skip


def test_a_preference_pair_is_two_documents(tmp_path, model, capsys):
    found = [{"prompt": q, "chosen": a, "rejected": f"no {a}"} for q, a in pairs(40)]
    out = prepare_mixture(config(model, lines(tmp_path / "a.jsonl", found)), 400, tmp_path / "out")
    tokenizer, template = Tokenizer.load(model), ChatTemplate(TEMPLATE)
    ids = lambda q, a: template.encode_example(user_and_answer(q, a), tokenizer)[0]
    expected = [[ids(q, a), ids(q, f"no {a}")] for q, a in pairs(40)]
    docs = [documents(out / "a", split) for split in ("train", "holdout")]
    assert sorted([list(p) for d in docs for p in zip(d[::2], d[1::2], strict=True)]) == sorted(
        expected
    )
    assert open_mixture(out).sources["a"].manifest["conversations"]["format"] == "preference"
    show(out / "a", 1)
    assert re.findall(r"training document (.*?):", capsys.readouterr().out) == [
        "1, chosen", "1, rejected",
    ]  # fmt: skip


def test_loss_on_all_tokens(tmp_path, model):
    path = lines(tmp_path / "a.jsonl", alpaca(40))
    out = prepare_mixture(config(model, path, loss="all"), 400, tmp_path / "out")
    assert {m for mask in masks(out / "a", "train") for m in mask} == {1}
    # Bits/byte are of the text that the template writes, without the names of control tokens.
    tokenizer = Tokenizer.load(model)
    text = [tokenizer.decode(ids) for ids in documents(out / "a", "holdout")]
    long = config(model, path, loss="all", seq_len=512)
    stats = val_stats(open_mixture(out), long, 2, 100, "a")
    assert stats.text_bytes == sum(len(t.encode()) for t in text)
    assert stats.tokens == sum(len(ids) - 1 for ids in documents(out / "a", "holdout"))


def test_what_prepares_conversations_again(tmp_path, model, caplog):
    """A new template, loss or format; not another name of the same template."""
    path = lines(tmp_path / "a.jsonl", alpaca(40))
    out = tmp_path / "out"
    first = contents(prepare_mixture(config(model, path), 400, out))
    same = tmp_path / "same.jinja"
    same.write_text(TEMPLATE)
    assert contents(prepare_mixture(config(model, path, template=str(same)), 400, out)) == first
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE.replace("A:", "Answer:"))
    with caplog.at_level("INFO"):
        prepare_mixture(config(model, path, template=str(other)), 400, out)
        assert "source a is prepared again: template changed" in caplog.text
        assert (out / "a" / "chat_template.jinja").read_text() == other.read_text()
        prepare_mixture(config(model, path, template=str(other), loss="all"), 400, out)
        assert "source a is prepared again: loss changed" in caplog.text
    # The split does not depend on the template.
    count = manifest(out / "a")["splits"]["holdout"]["documents"]
    assert prepare_mixture(config(model, path), 400, out) == out
    assert manifest(out / "a")["splits"]["holdout"]["documents"] == count
    assert contents(out) == first
    (out / "a" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"chat_template.jinja is missing"):
        open_mixture(out)
    assert contents(prepare_mixture(config(model, path), 400, out)) == first


def test_interrupted_and_continued(tmp_path, model, monkeypatch):
    """Killed again and again, with any number of threads: the same bytes, and the same counts of
    records left out while reading and by the template."""
    monkeypatch.setattr(shards, "CHUNK_BYTES", 500)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1500)
    monkeypatch.setattr(shards, "PROGRESS_BYTES", 1)
    monkeypatch.setattr(source_module, "UNIT_BYTES", 5000)
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text(
        "{% if 'text 3' in messages[0].content %}{{ raise_exception('no 3') }}{% endif %}"
        + TEMPLATE
    )
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        found: list[Any] = alpaca(40, i)
        found[7] = {"instruction": "no answer"}
        lines(folder / f"{i}.jsonl", found)
    settings: dict[str, Any] = {"template": str(refusing), "skip_bad_lines": True}
    whole = contents(prepare_mixture(config(model, folder, **settings), 400, tmp_path / "whole"))
    bad = manifest(tmp_path / "whole" / "a")["bad_lines"]
    assert bad == {"bad record": 3, "refused by the template": 33}
    assert len([n for n in whole if n.endswith(".mask")]) > 3
    one = config(model, folder, workers=1, **settings)
    assert contents(prepare_mixture(one, 400, tmp_path / "one")) == whole
    rng, out, kills, done = np.random.default_rng(0), tmp_path / "killed", 0, False
    while not done:
        left = int(rng.integers(3, 12))
        add = shards.ShardWriter.add

        def counted(self: Any, encoded: Any, add: Any = add) -> None:
            nonlocal left
            left -= 1
            if left > 0:
                return add(self, encoded)
            for f in self._files:
                f.write(b"torn")
                f.flush()
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(shards.ShardWriter, "add", counted)
            try:
                prepare_mixture(config(model, folder, **settings), 400, out)
                done = True
            except Killed:
                kills += 1
    assert kills > 2
    assert contents(out) == whole


def test_fields_that_a_row_of_parquet_does_not_have(tmp_path):
    """All structs of a column have the same fields, null where JSON has none; dates are text."""
    call = lambda name, **arguments: {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    tool = lambda name, **properties: {"name": name, "parameters": {"properties": properties}}
    found = [
        {"messages": [{"role": "user", "content": "a"}, call("f", x=1)],
         "tools": [tool("f", x={"type": "int"})]},
        {"messages": [{"role": "user", "content": "b"}, call("g", y="z", on=date(2020, 1, 2))],
         "tools": [tool("g", y={"type": "string"}, on={"format": "date"})]},
        {"messages": user_and_answer("c", "d"), "tools": None},
    ]  # fmt: skip
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(found), path)
    source = find_files("a", str(path))
    read = [d.example for d in read_documents(source, source.files)]
    as_json = json.loads(json.dumps(found, default=str))
    assert read == [read_example(record, "messages") for record in as_json]


GOOD = alpaca(30)


# ruff: noqa: E501
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", [{"q": "x", "a": "y"}], r'{path} record 1 \(index 0\) .*unknown format: the record is {"q": "x", "a": "y"}; known formats: .*alpaca.*sharegpt'),
        ("a.jsonl", [{"q": "x", "a": "y"}], '{path} line 1 .*unknown format: the record is .*"q".*alpaca'),
        ("a.json", [*GOOD, {"instruction": "x"}], r"{path} record 31 \(index 30\): .*'output' is missing"),
        ("a.json", [*GOOD, 5], r"{path} record 31 \(index 30\): .*must be a JSON object"),
        ("a.jsonl", [*GOOD, {"instruction": "x", "output": ""}], "{path} line 31: .*empty"),
        ("a.jsonl", [*GOOD, {"instruction": "\ud800", "output": "x"}], "{path} line 31: .*not valid Unicode"),
        ("a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 2, "{path} line 1: .*no answer"),
        ("a.json", json.dumps(GOOD)[:-40].encode(), r"{path} record 30 \(index 29\) is not JSON, or the file is truncated"),
        ("a.json", json.dumps(GOOD)[:-1].encode(), r"{path} record 30 .*the file ends after it"),
        ("a.json", json.dumps(GOOD).encode() + b"{}", "{path} has text after the end of its array of 30 records"),
        ("a.json", json.dumps(GOOD).replace("}, {", "} {", 1).encode(), "{path} record 1 .*'{' follows it"),
        ("a.json", b"[1, 2]", '{path} line 1 has no "text" field that is a string, only a list'),
        ("a.json", b'[{"instruction": "\xe9"}]', "{path} is not UTF-8 text"),
        ("a.json", b"", "{path} is empty"),
        ("a.json", b"[]", "{path} is an empty array; give one with records"),
        ("a.json", b"not JSON", "{path} line 1 is not JSON.*; a .json file must be an array"),
        ("a.json", b'[{"a": ' + b"[" * 10**5, "{path} record 1 .*nested too deeply"),
        ("a.jsonl", [{"messages": user_and_answer("x", "y"), "tools": "[" * 10**5}] * 2, "{path} line 1: nested too deeply"),
        ("a.jsonl", json.dumps(GOOD[0]).encode() + b"\n{", "{path} line 2 is not JSON"),
        ("a.parquet", [{"q": "x"}], 'row 1 has no "text" column, only q: unknown format'),
        ("a.parquet", [*GOOD, {"instruction": "x"}], "{path} row 31: .*'output' is missing"),
    ],
)  # fmt: skip
def test_bad_conversations(tmp_path, model, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif name == "a.json":
        path.write_text(json.dumps(content))
    else:
        lines(path, content)
    with pytest.raises(ValueError, match="(?s)" + message.replace("{path}", str(path))):
        prepare_mixture(config(model, path), 400, tmp_path / "out")
    assert not list(tmp_path.glob("out/a*"))


def test_bad_settings_of_conversations(tmp_path, model, monkeypatch):
    path, out = lines(tmp_path / "a.jsonl", alpaca(40)), tmp_path / "out"
    with pytest.raises(
        ValueError, match=r'source a has conversations, .*packing="examples", not "concat"'
    ):
        prepare_mixture(config(model, path, packing="concat"), 400, out)
    with pytest.raises(
        ValueError, match=r"need a chat template; set data.template \(--template\) to alpaca"
    ):
        prepare_mixture(config(f"{model}/tokenizer.model", path), 400, out)
    with pytest.raises(ValueError, match=r"there is no chat template 'poem'"):
        prepare_mixture(config(model, path, template="poem"), 400, out)
    with pytest.raises(ValueError, match=r"a.jsonl line 1: a record of format messages must have"):
        prepare_mixture(config(model, path, format="messages"), 400, out)
    with monkeypatch.context() as patch:
        encode = ChatTemplate.encode_example

        def uncounted(*args: Any, **more: Any) -> Any:
            ids, mask = encode(*args, **more)
            return ids, [False] * len(mask)

        patch.setattr(ChatTemplate, "encode_example", uncounted)
        with pytest.raises(
            ValueError, match=r"source a: none of the [\d,]+ tokens for training cou"
        ):
            prepare_mixture(config(model, path), 400, out)
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{% if messages %}{{ raise_exception('not today') }}{% endif %}")
    with pytest.raises(
        ValueError, match=r"a.jsonl line \d+: .*not today; correct it, or the template, or leave"
    ):
        prepare_mixture(config(model, path, template=str(refusing)), 400, out)
    with pytest.raises(
        ValueError,
        match=r"no document is left for training, because bad lines were left out \(40 refused",
    ):
        prepare_mixture(config(model, path, template=str(refusing), skip_bad_lines=True), 400, out)
    assert not list(out.glob("a*"))


def test_the_first_record_decides(tmp_path, model, caplog):
    """A record with a text is text, also with the fields of a conversation; a name decides."""
    both = [r | {"text": f"text {i}"} for i, r in enumerate(alpaca(40))]
    path = lines(tmp_path / "a.jsonl", both)
    assert find_files("a", str(path)).format == "text"
    assert (
        "it is read as text; to read it as a conversation, name the format: alpaca" in caplog.text
    )
    assert find_files("a", str(path), format="alpaca").format == "alpaca"
    lines(path, ["bad", *alpaca(3)])
    assert find_files("a", str(path), skip_bad_lines=True).format == "alpaca"
    only_text = tmp_path / "b.json"
    only_text.write_text(json.dumps([{"text": t} for t in texts(5)]))
    source = find_files("b", str(only_text))
    assert [d.text for d in read_documents(source, source.files)] == texts(5)


def test_arrays_are_read_in_parts(tmp_path, monkeypatch):
    """Any division of the file into blocks gives the same records."""
    found = [{"a": [1.5, {"é": None}], "b": '日本 \\ " ]},['}, {"c": 12345}, {}, {"d": "x" * 50}]
    path = tmp_path / "a.json"
    for text in (json.dumps(found, ensure_ascii=False), json.dumps(found, indent=3)):
        path.write_text(f"\n{text} \n")
        for size in range(1, 40):
            monkeypatch.setattr(records, "_BLOCK_CHARS", size)
            read = list(read_json(path))
            assert not any(isinstance(r, BadLine) for r in read)
            assert [r.value for r in read] == found
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 70)
    monkeypatch.setattr(records, "_BLOCK_CHARS", 8)
    path.write_text(json.dumps([*found[:3], {"d": "x" * 200}]))
    with pytest.raises(ValueError, match=r"record 4 \(index 3\) is not JSON, or is longer than 70"):
        list(read_json(path))


def test_copies_of_a_record_are_in_one_split(tmp_path, model):
    path = lines(tmp_path / "a.jsonl", alpaca(40) * 3)
    out = prepare_mixture(config(model, path), 400, tmp_path / "out")
    train, val = ({tuple(d) for d in documents(out / "a", s)} for s in ("train", "holdout"))
    assert not train & val
    assert len(train | val) == 40


def test_instructions_of_python(tmp_path, model):
    """Questions about Python; all of a module are in one split with its code."""
    source = find_files("a", "python:instructions")
    assert source.format == "messages"
    found = list(read_documents(source, source.files))
    assert 2000 < len(found) < 20_000
    texts = [d.example.messages for d in found if d.example]
    assert [m["role"] for m in texts[0]] == ["user", "assistant"]
    question = "What does `textwrap.dedent(text)` do in Python?"
    answers = [t[1]["content"] for t in texts if t[0]["content"] == question]
    assert answers == ["Remove any common leading whitespace from every line in `text`."]
    code = find_files("b", "python:code")
    keys = {d.key for d in read_documents(code, code.files)}
    assert {d.key for d in found} <= keys
    assert len({d.key for d in found}) > 100


def test_show(tmp_path, model, capsys, monkeypatch):
    """Samples with the tokens that count in brackets, or in color in a terminal."""
    path = lines(tmp_path / "a.jsonl", [{"prompt": q, "response": a} for q, a in pairs(40)])
    command = [str(tmp_path / "out"), "--source", f"a={path}", "--tokenizer", model, "--show", "2"]
    main(command)
    out = capsys.readouterr().out
    sample = re.search(r"<s>U: text \d+ of 0\nA:\[\[ (.*?)</s>\]\]\n", out)
    assert sample
    assert sample[1] in [a for _, a in pairs(40)]
    assert out.count("[[") == 2
    splits = manifest(tmp_path / "out" / "a")["splits"]["train"]
    longest = max(map(len, documents(tmp_path / "out" / "a", "train")))
    assert (
        f"a: {splits['documents']} training documents, {splits['tokens']:,} tokens, "
        f"{splits['counted']:,} count in the loss" in out
    )
    assert f"the longest has {longest}; longer than 512: 0, than 1024: 0" in out
    assert "bytes/token" not in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        main(command)
        out = capsys.readouterr().out
        assert ("[[" in out) == bool(no_color)
        assert (f"A:\033[1;32m {sample[1]}</s>\033[0m" in out) == (not no_color)
    main([str(tmp_path / "b"), "--source", f"b={tmp_path / 'out' / 'a'}", *command[3:]])
    assert f"A:[[ {sample[1]}</s>]]" in capsys.readouterr().out  # of a prepared folder
    main([*command[:-2], "--loss", "all", "--template", "vicuna", "--show", "1"])
    assert "[[<s>A chat between" in capsys.readouterr().out
    lines(path, [{"prompt": "a\033[2Jb", "response": f"x{i}"} for i in range(40)])
    main(command)
    assert "U: a\\x1b[2Jb" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*line 1: a record of format alpaca must have"):
        main([*command, "--format", "alpaca"])
