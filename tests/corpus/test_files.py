"""Files from outside: every format by content, damaged parts skipped with their place, no bombs."""

import bz2
import gzip
import io
import lzma
import tarfile
import time
import zipfile

import pytest

zstandard = pytest.importorskip("zstandard")

from llama_jax.corpus import archives, files  # noqa: E402
from llama_jax.corpus.archives import members  # noqa: E402
from llama_jax.corpus.files import Unreadable, lines, open_stream  # noqa: E402

TEXT = b"".join(b"line %d of a text, \xc3\xa9\n" % i for i in range(3000))
COMPRESS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def content(stream):
    """What can be read, and the problems on the way."""
    parts, problems = [], []
    while True:
        try:
            if not (part := stream.read(1000)):
                return b"".join(parts), problems
            parts.append(part)
        except Unreadable as e:
            problems.append((e.place, e.reason))


def listing(path):
    """Name and content of the members, and the problems."""
    found, problems = {}, []
    for member in members(path):
        if isinstance(member, Unreadable):
            problems.append((member.place, member.reason))
        else:
            found[member.name], more = content(member.stream)
            problems += more
    return found, problems


@pytest.fixture
def write(tmp_path):
    def write(data, name="a.bin"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


@pytest.mark.parametrize("kind", COMPRESS)
def test_every_format_by_content(write, kind):
    twice = COMPRESS[kind](TEXT) + COMPRESS[kind](b"end")
    assert content(open_stream(write(twice))) == (TEXT + b"end", [])
    assert list(lines(open_stream(write(COMPRESS[kind](b"a\r\n\nb"))), 10)) == [b"a", b"", b"b"]
    assert content(open_stream(write(b""))) == (b"", [])
    [member] = members(write(twice, "a.xml.gz"))
    assert (member.name, member.place) == ("a.xml", "a.xml.gz")


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd"])
def test_reading_continues_after_a_damaged_member(write, kind):
    first, second, third = (COMPRESS[kind](part) for part in (b"first", TEXT, b"third"))
    damaged = second[:60] + bytes(byte ^ 255 for byte in second[60:90]) + second[90:]
    text, problems = content(open_stream(write(first + damaged + third)))
    assert text.startswith(b"first")
    assert text.endswith(b"third")
    assert problems == [(f"a.bin: byte {len(first)}", f"a damaged {kind} member")]

    text, problems = content(open_stream(write(first + second[:-20] + third)))
    assert text.startswith(b"first" + TEXT[:99] if kind == "gzip" else b"first")
    assert text.endswith(b"third")
    assert [place for place, _ in problems] == [f"a.bin: byte {len(first)}"]

    text, problems = content(open_stream(write(first + second[:-20])))
    assert problems == [(f"a.bin: byte {len(first)}", f"a truncated {kind} member")]
    if kind in ("gzip", "xz"):
        assert TEXT.startswith(text[5:])
        assert len(text) > len(TEXT) - 2000

    text, problems = content(open_stream(write(damaged[5:] + third)))
    assert text == damaged[5:] + third  # without a magic number it is a plain file
    text, problems = content(open_stream(write(first + b"garbage" + third)))
    assert (text, problems) == (
        b"firstthird",
        [(f"a.bin: byte {len(first)}", f"data that is not {kind}")],
    )


def test_a_damaged_first_member_does_not_hide_the_others(write):
    damaged = bytearray(gzip.compress(b"first"))
    damaged[12] ^= 255
    path = write(bytes(damaged) + gzip.compress(b"second\n") + b"\0" * 700)
    found, problems = listing(path)
    assert found["a.bin"].endswith(b"second\n")
    assert problems == [("a.bin: byte 0", "a damaged gzip member")]


def test_long_lines_are_skipped_in_bounded_memory(write):
    data = b"one\n" + b"x" * 300_000 + b"\ntwo\n" + b"y" * 11
    path = write(gzip.compress(data))
    read = list(lines(open_stream(path), 10))
    assert (read[0], read[2]) == (b"one", b"two")
    assert [(e.place, e.reason) for e in (read[1], read[3])] == [
        ("a.bin: line 2", "a line of more than 10 bytes"),
        ("a.bin: line 4", "a line of more than 10 bytes"),
    ]
    assert list(lines(open_stream(write(b"a\n\n")), 10)) == [b"a", b""]


def test_long_lines_take_linear_time():
    stream = files.Stream(iter([b"x" * files.CHUNK] * 512), "x")
    start = time.process_time()
    assert [len(line) for line in lines(stream, 64 << 20)] == [512 * files.CHUNK]
    assert time.process_time() - start < 0.5


def test_decompression_bombs(write, monkeypatch):
    monkeypatch.setattr(files, "FREE_BYTES", 1 << 20)
    for name in ("gzip", "zstd"):
        text, problems = content(open_stream(write(COMPRESS[name](b"a" * (1 << 22)))))
        assert problems == [("a.bin", "expands to more than 250 times its size")]
        assert len(text) < 1 << 22
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"a" * (1 << 22))
        archive.writestr("good", b"text")
    found, problems = listing(write(zipped.getvalue()))
    assert found["good"] == b"text"
    assert problems == [("a.bin: bomb", "expands to more than 250 times its size")]
    with pytest.raises(Unreadable, match=r"larger than 100 bytes"):
        open_stream(write(b"a" * 101)).read_all(100)


def tar_bytes(entries, mode="w"):
    """``entries``: name and content, or name and fields of the header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tarfile.GNU_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                for key, value in data.items():
                    setattr(info, key, value)
                tar.addfile(info)
    return out.getvalue()


HOSTILE = [
    ("../up.tex", b"x"),
    ("/etc/absolute.tex", b"x"),
    ("a/../../up.tex", b"x"),
    ("link.tex", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    ("hard.tex", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
    ("device", {"type": tarfile.CHRTYPE}),
    ("fifo", {"type": tarfile.FIFOTYPE}),
]
REASONS = ["a member name with ..", "an absolute member name", "a member name with .."] + [
    archives.LINK
] * 4


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_tar_with_hostile_members(write, mode):
    folder = ("folder", {"type": tarfile.DIRTYPE})
    data = tar_bytes([folder, ("first.tex", TEXT), *HOSTILE, ("b/last" + "x" * 200, b"z")], mode)
    found, problems = listing(write(data))
    assert found == {"first.tex": TEXT, "b/last" + "x" * 200: b"z"}
    assert problems == [(f"a.bin: {n}", r) for (n, _), r in zip(HOSTILE, REASONS, strict=True)]


def test_nested_archives_and_old_tar_headers(write):
    inner = tar_bytes([("ms.tex", b"text")], "w:gz")
    member = next(members(write(tar_bytes([("0711/0711.0001.gz", inner)]))))
    nested = next(members(member))
    assert (nested.name, nested.place) == ("ms.tex", "a.bin: 0711/0711.0001.gz: ms.tex")
    assert nested.stream.read(99) == b"text"
    header = bytearray(tar_bytes([("old.tex", b"text")]))
    header[257:265] = bytes(8)  # the format of the 1980s has no magic number
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    assert listing(write(bytes(header))) == ({"old.tex": b"text"}, [])


def test_a_tar_that_is_cut_between_members(write):
    whole = tar_bytes([("a", b"1"), ("b", b"2")])
    assert listing(write(whole)) == ({"a": b"1", "b": b"2"}, [])
    problem = ("a.bin: byte 1024", "a tar file that is cut off")
    assert listing(write(whole[:1024])) == ({"a": b"1"}, [problem])


def test_damaged_tar(write):
    good = tar_bytes([("a", b"1"), ("b", b"2"), ("c", b"3")])
    damaged = bytearray(good)
    damaged[1024 + 10] ^= 255  # the header of b
    assert listing(write(bytes(damaged))) == (
        {"a": b"1", "c": b"3"},
        [("a.bin: before member c", "damaged tar headers")],
    )
    found, problems = listing(write(good[: 2 * 1024 + 512]))  # ends before the content of c
    assert {"a": b"1", "b": b"2"}.items() <= found.items()
    assert problems


def test_too_many_members(write, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 2)
    found, problems = listing(write(tar_bytes([("a", b""), ("b", b""), ("c", b"")])))
    assert list(found) == ["a", "b"]
    assert problems == [("a.bin", "more than 2 members; the rest is skipped")]


def test_zip(write):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("pg11.txt", "../up", "C:\\up", "damaged"):
            archive.writestr(name, TEXT)
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("last", b"z")
        at = archive.getinfo("damaged").header_offset + 60
    data = bytearray(out.getvalue())
    data[at : at + 20] = bytes(20)
    found, problems = listing(write(bytes(data)))
    assert (found["pg11.txt"], found["last"]) == (TEXT, b"z")
    assert [p for p, _ in problems] == [
        "a.bin: ../up", "a.bin: C:\\up", "a.bin: damaged", "a.bin: link",
    ]  # fmt: skip
    found, problems = listing(write(bytes(data[:-40])))
    assert (found, len(problems)) == ({}, 1)


@pytest.fixture(scope="module")
def seven_zip():
    py7zr = pytest.importorskip("py7zr")
    out = io.BytesIO()
    with py7zr.SevenZipFile(out, "w") as archive:
        archive.writestr(TEXT * 30, "Posts.xml")
        archive.writestr(b"", "empty")
        archive.writestr(b"tags", "Tags.xml")
    return out.getvalue()


def test_7z(write, seven_zip):
    path = write(seven_zip)
    assert listing(path) == ({"Posts.xml": TEXT * 30, "empty": b"", "Tags.xml": b"tags"}, [])
    reader = members(path)
    assert next(reader).stream.read(4) == b"line"
    reader.close()  # ends the thread
    assert [member.name for member in members(path)] == ["Posts.xml", "empty", "Tags.xml"]


def test_damaged_7z(write, seven_zip):
    damaged = bytearray(seven_zip)
    damaged[100] ^= 255
    found, problems = listing(write(bytes(damaged)))
    assert "Tags.xml" not in found
    assert problems
    assert all(place.startswith("a.bin") for place, _ in problems)
    found, problems = listing(write(seven_zip[:-10]))
    assert (found, len(problems)) == ({}, 1)


def test_missing_and_special_files(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        [problem] = members(path)
        assert isinstance(problem, Unreadable)
