"""Files are written whole, read within limits, and locked by one process."""

import json
import os
import subprocess
import sys

import pytest

import llama_jax
from llama_jax import __main__ as command
from llama_jax import io


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    io.atomic_write(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # data must reach the disk before the rename
    with pytest.raises(OSError, match="No space"):
        io.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1', "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[1]", "holds a list"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_damaged_json_is_one_line_with_the_file(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as e:
        io.read_json(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_only_regular_files_within_the_limit_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        io.read_limited(tmp_path / "pipe", 10)
    with pytest.raises(ValueError, match="not a regular file"):
        io.read_limited(tmp_path, 10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="11 bytes; at most 10"):
        io.read_limited(tmp_path / "large", 10)
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert io.read_json(tmp_path / "a.json") == {"a": 1}


def test_a_folder_has_one_owner_and_a_dead_process_holds_nothing(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from llama_jax.io import folder_lock\n"
        f"with folder_lock(Path({str(tmp_path)!r}), 'training'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=rf"training \(process {process.pid} "),
            io.folder_lock(tmp_path, "training"),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    with io.folder_lock(tmp_path, "training"):
        pass


def test_the_command_names_its_verbs_and_refuses_others(capsys):
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in command.VERBS)
    assert command.main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
    assert command.main(["--version"]) == 0
    assert f"llama_jax {llama_jax.__version__}, " in capsys.readouterr().out


def test_ctrl_c_while_a_command_is_imported_is_no_traceback():
    program = (
        "import importlib, os, signal, sys\n"
        "from llama_jax.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "importlib.import_module = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['llama-jax', 'verify', 'x']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_a_figure_is_written_whole_in_the_format_of_its_suffix(tmp_path):
    class Figure:
        def savefig(self, file, format, dpi):
            file.write(format.encode())

    for suffix in ("png", "pdf"):
        io.save_figure(Figure(), tmp_path / f"loss.{suffix}")
        assert (tmp_path / f"loss.{suffix}").read_bytes() == suffix.encode()
    assert len(list(tmp_path.iterdir())) == 2
