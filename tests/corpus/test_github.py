"""GitHub files: licenses, heuristics, headers, and exact duplicates across tasks."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

from corpus import inline

from llama_jax.corpus import github, github_duplicates
from llama_jax.corpus.github_header import remove_header
from llama_jax.corpus.github_license import is_wanted, license_of_text, licenses_by_folder
from llama_jax.corpus.inputs import FIRST_BYTES

MIT = "Copyright (c) 2020 A\n\nPermission is hereby granted, free of charge, to any person\n"
BSD = "Redistribution and use in source and binary forms, with or without\n"
LGPL = "Most of the code is licensed under the LGPL; parts have an MIT license."
CODE = "def function(argument):\n    return argument + 1\n"


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            "a.py",
            "#!/usr/bin/python\n# Copyright 2020 A\n# more\n\nimport x\n",
            "#!/usr/bin/python\nimport x\n",
        ),
        (
            "a.py",
            "# -*- coding: utf-8 -*-\n# (c) 2020 A\nimport x\n",
            "# -*- coding: utf-8 -*-\nimport x\n",
        ),
        (
            "a.py",
            "# What this file does.\n\n# Licensed under the MIT License\nx\n",
            "# What this file does.\n\nx\n",
        ),
        ("a.py", "# License plates of cars.\nx = 1\n# Copyright\n", None),
        ("a.c", "/* Copyright A\n * B\n */\n\n#include <x.h>\n", "#include <x.h>\n"),
        ("a.c", "#include <copyright.h>\n// Copyright A\n", None),
        ("a.h", "\n// SPDX-License-Identifier: MIT\n// b\n#ifndef A\n", "\n#ifndef A\n"),
        (
            "a.c",
            "/* Explains. */\n/* All rights reserved. */\nint x;\n",
            "/* Explains. */\nint x;\n",
        ),
        ("a.c", "/* Copyright A */ int x;\n", None),
        ("a.c", "/* Copyright A, never closed\n", None),
        ("a.js", "/**\n * @license\n * Foo\n */\n;(function() {\n", ";(function() {\n"),
        ("a.md", "# Copyright law\n\nText.\n", None),
        ("a.md", "<!-- Copyright A -->\n# Title\n", "# Title\n"),
        ("a.html", "<!DOCTYPE html>\n<!-- Copyright A\n-->\n<p>\n", "<!DOCTYPE html>\n<p>\n"),
        ("a.php", "<?php\n/* Copyright A */\necho 1;\n", "<?php\necho 1;\n"),
        ("a.rst", ".. Copyright A\n   more\n\nTitle\n=====\n", "Title\n=====\n"),
        ("a.rst", ".. note:: Copyright\n", None),
        ("a.sql", "-- Copyright A\nselect 1;\n", "select 1;\n"),
        ("a.hs", "{- Copyright A -}\nmodule A\n", "module A\n"),
        ("Makefile", "# Copyright A\nall:\n", "all:\n"),
        ("a.unknown", "# Copyright A\n", None),
        ("a.py", "# Copyright A", ""),
    ],
)
def test_headers(path, text, expected):
    assert remove_header(text, path) == (text if expected is None else expected)


def test_licenses():
    wanted = ("mit", "bsd", "apache")
    for name in ("mit", "MIT License", "Apache-2.0", "The MIT License", "bsd-3-clause", "New BSD",
                 "GPL-2.0 OR MIT", "(MIT AND Apache-2.0)", "OSI Approved :: BSD"):  # fmt: skip
        assert is_wanted(name, wanted), name
    for name in (None, "", "gpl-3.0", "lgpl-2.1", "MIT AND GPL-2.0", "isc", "unknown", "permit"):
        assert not is_wanted(name, wanted), name
    start = time.process_time()
    assert not is_wanted("GPL" + " " * 50_000 + "x\nor\tmine", wanted)
    assert is_wanted("GPL\n  OR\tMIT", wanted)
    assert time.process_time() - start < 0.5
    texts = {MIT: "mit", BSD: "bsd", LGPL: "copyleft", "Apache License\nVersion 2.0": "apache"}
    texts |= {"GNU LESSER GENERAL PUBLIC LICENSE": "copyleft", "Do what you want.": "unknown"}
    assert {text: license_of_text(text) for text in texts} == texts


def test_license_of_a_folder(tmp_path):
    files = {
        "a/LICENSE": MIT,
        "a/vendor/COPYING": "GNU General Public License",
        "b/package.json": '{"license": {"type": "BSD"}}',
        "c/x.egg-info/PKG-INFO": "Name: c\nLicense: MIT\n\nText",
        "d/pyproject.toml": '[project]\nlicense = "Apache-2.0"\n',
        "e/license.py": MIT,
        "f/LICENSE-MIT": MIT,
        "f/LICENSE.txt": "Something else",
    }
    paths = {}
    for i, (name, text) in enumerate(files.items()):
        paths[name] = tmp_path / str(i)
        paths[name].write_text(text)
    assert licenses_by_folder(paths) == {
        "a": "mit", "a/vendor": "copyleft", "b": "BSD", "c/x.egg-info": "MIT", "d": "Apache-2.0",
        "f": "mit",
    }  # fmt: skip


def rows():
    def row(path, content=CODE, license="mit", repo="o/r", **more):
        return {"path": path, "repo_name": repo, "license": license, "content": content, **more}

    return [
        row("a.py", "# Copyright 2020 A\n\n" + CODE),
        row("b.py", CODE),
        row("c.py", CODE),
        row("d.py", CODE, license="gpl-2.0"),
        row("e.txt"),
        row("f.py", " \n"),
        row("g.js", "x" * 1001),
        row("h.js", ("y" * 101 + "\n") * 3),
        row("i.c", "{ } ;\n" * 50 + "int x;"),
        row("j.py", None),
        row("k.py", "\0", binary="true"),
        row("dir/Makefile", "all:\n\tcommand argument\n", repo="o/other", license=["mit"]),
        {"path": "l.py", "content": CODE},
    ]


EXPECTED = {
    "github/o/r/d.py": ("license", "another license"),
    "github/o/r/c.py": ("duplicates", "a copy of an earlier file"),
    "github/o/r/e.txt": ("extension", "extension not in the list"),
    "github/o/r/f.py": ("header", "empty"),
    "github/o/r/g.js": ("heuristics", "a line of more than 1000 characters"),
    "github/o/r/h.js": ("heuristics", "lines of more than 100 characters on average"),
    "github/o/r/i.c": ("heuristics", "less than 25% letters and digits"),
    "github/o/r/j.py": ("read", "binary or without content"),
    "github/o/r/k.py": ("read", "binary or without content"),
}


def reasons(dropped):
    return {record["id"]: (record["step"], record["reason"]) for record in dropped}


def test_rows_of_bigquery(tmp_path):
    first = [json.dumps(row).encode() for row in rows()]
    surrogate = json.dumps({**rows()[3], "path": "\ud800.py"}).encode()
    second = [first[1], b"not JSON", b'{"path": 1}', b"[]", b"\xff", surrogate, first[11]]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"\n".join(first)))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(second))
    documents, dropped, _ = inline.run("github", [tmp_path], tmp_path / "out")
    assert [(d["id"], d["text"]) for d in documents] == [
        ("github/o/other/dir/Makefile", "all:\n\tcommand argument\n"),
        ("github/o/r/a.py", CODE),
        ("github/o/r/b.py", CODE),
    ]
    assert documents[0]["url"] == "https://github.com/o/other/blob/HEAD/dir/Makefile"
    assert documents[1]["metadata"]["programming_language"] == "Python"
    assert documents[1]["metadata"]["license"] == "mit"
    assert "hash" not in documents[1]["metadata"]
    assert reasons(dropped) == EXPECTED | {
        "github/o/other/dir/Makefile": ("duplicates", "a copy of an earlier file"),
        "github/o/r/b.py": ("duplicates", "a copy of an earlier file"),
        "a.json.gz: line 13": ("read", "a row without path or repo_name"),
        "b.jsonl: line 2": ("read", "not JSON in UTF-8"),
        "b.jsonl: line 3": ("read", "a row without path or repo_name"),
        "b.jsonl: line 4": ("read", "not a JSON object"),
        "b.jsonl: line 5": ("read", "not JSON in UTF-8"),
        "github/o/r/?.py": ("license", "another license"),
    }


def test_a_table_that_starts_with_a_long_file(tmp_path):
    long = {"content": CODE * 3000, "license": "mit", "path": "a.py", "repo_name": "o/r"}
    content = "\n".join(json.dumps(row) for row in (long, rows()[1]))
    (tmp_path / "a.json").write_text(content)
    assert github.looks_like(content.encode()[:FIRST_BYTES], "a.json")
    assert not github.looks_like(json.dumps(long).encode()[:1000], "a.json")
    documents, _, _ = inline.run("github", [tmp_path / "a.json"], tmp_path / "out")
    assert [d["id"] for d in documents] == ["github/o/r/a.py", "github/o/r/b.py"]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows()[:3])
    pq.write_table(table, tmp_path / "a.parquet")
    documents, dropped, _ = inline.run("github", [tmp_path], tmp_path / "out")
    assert [d["id"] for d in documents] == ["github/o/r/a.py", "github/o/r/b.py"]
    assert reasons(dropped) == {"github/o/r/c.py": ("duplicates", "a copy of an earlier file")}


def test_letters_per_token(tmp_path):
    row = {
        "path": "a.c",
        "repo_name": "r",
        "license": "mit",
        "content": "int a[] = {1, 2, 3};\n" * 9,
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for limit, kept in ((0, 1), (1.5, 0)):
        settings = [f"min_letters_per_token={limit}"]
        output = tmp_path / f"out{limit}"
        documents, _, _ = inline.run("github", [tmp_path / "a.jsonl"], output, overrides=settings)
        assert len(documents) == kept


def test_checkouts(tmp_path):
    files = {
        "one/LICENSE": MIT,
        "one/src/a.py": CODE,
        "one/src/latin.py": "# é\nx = 1\n",
        "one/third_party/COPYING": LGPL,
        "one/third_party/b.py": CODE + "#",
        "two/a.py": CODE + "##",
    }
    for name, text in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="latin-1")
    documents, dropped, _ = inline.run("github", [tmp_path / "in"], tmp_path / "out")
    assert [d["id"] for d in documents] == ["github/in/one/src/a.py"]
    assert documents[0]["url"] is None
    assert reasons(dropped) == {
        "github/in/one/LICENSE": ("extension", "extension not in the list"),
        "github/in/one/src/latin.py": ("read", "not UTF-8 text"),
        "github/in/one/third_party/COPYING": ("license", "another license"),
        "github/in/one/third_party/b.py": ("license", "another license"),
        "github/in/two/a.py": ("license", "no license found"),
    }


def test_duplicates_are_found_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(github_duplicates, "PART_HASHES", 10)
    values = np.random.default_rng(0).integers(0, 60, 300).astype("<u8")
    for rank, part in enumerate(np.split(values, [0, 100, 250])):
        hashes = np.zeros(len(part), github_duplicates.HASH)
        hashes["high"], hashes["low"] = part // 2, part % 2
        np.save(tmp_path / f"{rank:05d}.npy", hashes)
    github_duplicates.find_duplicates(tmp_path, 4)
    found = [np.load(tmp_path / f"duplicates-{rank:05d}.npy") for rank in range(4)]
    starts = (0, 0, 100, 250)
    positions = np.concatenate([n + start for n, start in zip(found, starts, strict=True)])
    first = np.unique(values, return_index=True)[1]
    assert positions.tolist() == sorted(set(range(300)) - set(first.tolist()))


@pytest.mark.parametrize("text", ["", "a1_ é²\n", "x" * 5, "日本\udc80 ٣"])
def test_counts_of_letters(text):
    letters = github._count(text, github._LETTERS, str.isalpha)
    assert letters == sum(map(str.isalpha, text))
    both = github._count(text, github._LETTERS + github._DIGITS, str.isalnum)
    assert both == sum(map(str.isalnum, text))


def test_looks_like():
    assert github.looks_like(json.dumps(rows()[0]).encode(), "x.json")
    assert github.looks_like(b"import x", "a.py")
    assert github.looks_like(b"<?php", "a.php")
    assert not github.looks_like(b'{"text": "x", "url": "y"}', "c4.json")


PACKAGES = {
    "warcio==1.8.1": 33, "markupsafe==3.0.4": 21, "brotli==1.2.1": 120, "kenlm==0.3.0": 0,
    "lodash@4.18.1": 1029, "underscore@1.13.8": 484,
}  # fmt: skip


@pytest.mark.skipif("LLAMA_JAX_DOWNLOADS" not in os.environ, reason="downloads packages")
@pytest.mark.parametrize("package", PACKAGES)
def test_real_packages(package, tmp_path):
    """Needs package registries; the counts were measured with RedPajama's thresholds."""
    if "@" in package:
        command = ["npm", "pack", "--silent", package]
    else:
        # Build requirements are installed in isolation, as wheels.
        name = package.partition("==")[0]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--no-binary", name, package]
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    archives = [path for path in Path(tmp_path).iterdir() if path.suffix in (".gz", ".tgz")]
    if result.returncode or not archives:
        pytest.skip("the package registry cannot be reached")
    shutil.unpack_archive(archives[0], tmp_path / "in", "gztar", filter="data")
    documents, dropped, _ = inline.run("github", [tmp_path / "in"], tmp_path / "out")
    assert len(documents) == PACKAGES[package], Counter(d["reason"] for d in dropped)
