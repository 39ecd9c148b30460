"""Recipes that extend others, recipes by name, and the help text of the settings."""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_config import MINIMAL

from llama_jax.config import (
    ConfigError,
    SettingsHelp,
    help_text,
    load_recipe,
    recipe_names,
    settings,
    to_toml,
)
from llama_jax.config.help import COMMON, SECTIONS
from llama_jax.train.__main__ import main as train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    """Writes a recipe and returns its path; `minimal.toml` exists."""

    def run(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    run("minimal.toml", MINIMAL)
    return run


def error_of(path, *overrides):
    with pytest.raises(ConfigError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def test_a_recipe_extends_another(write):
    base = load_recipe(write("base.toml", MINIMAL + "[optim]\nb1 = 0.5\nb2 = 0.6\n"))
    path = write("recipe.toml", 'extends = "base.toml"\ntrain.steps = 20\noptim.b1 = 0.7\n')
    recipe = load_recipe(path, ["optim.eps=1e-7"])
    assert (recipe.train.steps, recipe.train.batch_size) == (20, base.train.batch_size)
    assert (recipe.optim.b1, recipe.optim.b2, recipe.optim.eps) == (0.7, 0.6, 1e-7)
    assert (recipe.model, recipe.data) == (base.model, base.data)


def test_extends_is_relative_to_the_recipe_and_can_be_chained(write, monkeypatch):
    write("sub/middle.toml", 'extends = "../minimal.toml"\ntrain.steps = 20\ntrain.seed = 1\n')
    path = write("top.toml", 'extends = "sub/middle.toml"\ntrain.seed = 2\n')
    monkeypatch.chdir("/")
    assert load_recipe(path).train.steps == 20
    assert load_recipe(path).train.seed == 2


def test_sources_replace_the_whole_mixture(write):
    path = write("a.toml", 'extends = "minimal.toml"\n[data.sources.b]\npath = "other"\n')
    assert list(load_recipe(path).data.sources) == ["b"]
    # An override adds a source, or changes one.
    assert list(load_recipe(path, ["data.sources.c.path=c"]).data.sources) == ["b", "c"]
    # The error for a source that was replaced does not name the recipe that had it.
    assert error_of(path, "data.sources.a.weight=2").startswith(f"{path}: ")


def test_a_resolved_recipe_is_complete(write, tmp_path):
    path = write("a.toml", 'extends = "minimal.toml"\ntrain.steps = 20\n')
    text = to_toml(load_recipe(path))
    assert "extends" not in tomllib.loads(text)
    assert load_recipe(write("elsewhere/b.toml", text)) == load_recipe(path)


def test_errors_name_the_file_that_has_the_setting(write):
    base = write("base.toml", MINIMAL + "[optim]\nb1 = 2.0\nlr = 1.0\n")
    path = write("a.toml", 'extends = "base.toml"\ntrain.stepz = 20\n')
    lines = error_of(path, "mesh.preset=x").splitlines()
    assert len(lines) == 4
    assert any(line.startswith(f"{base}: optim.b1=2.0") for line in lines)
    assert any(line.startswith(f"{base}: unknown setting optim.lr") for line in lines)
    assert any(line.startswith(f"{path}: unknown setting train.stepz") for line in lines)
    assert any(line.startswith("command line: mesh.preset='x'") for line in lines)
    line = error_of(path, "optim={b1=3.0}").splitlines()[0]
    assert line.startswith("command line: optim.b1=3.0")
    assert "command line: extends is a setting of a file" in error_of(path, "extends=tiny")
    assert error_of(path, "model.name=x").startswith("command line: model.name='x'")
    write("base.toml", MINIMAL.replace('"tiny"', '"tinny"'))
    assert error_of(path).startswith(f"{base}: model.name='tinny'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "none.toml"', "a.toml: extends='none.toml': recipe .*none.toml does not exist"),
        ('extends = ""', "a.toml: extends='': recipe .* is not a regular file"),
        ('extends = "a.toml"', "a.toml extends itself"),
        ('extends = "back.toml"', "back.toml: extends='a.toml': .*a.toml extends itself"),
        ("extends = 3", "a.toml: extends=3 is not the path of a recipe"),
        ('extends = "bad.toml"', "extends='bad.toml': recipe .*bad.toml cannot be read"),
        ('extends = "a\\u0000b"', "cannot be read: embedded null byte"),
        ('extends = "minimal.toml"\ntrain = 3', "a.toml: train=3"),
        ('extend = "minimal.toml"', "unknown setting extend; did you mean extends?"),
        (f'extends = "minimal.toml"\n{"a." * 5000}b = 1', "a.toml: nested too deeply"),
    ],
)
def test_bad_extends(write, text, message):
    write("bad.toml", "[train\n")
    write("back.toml", 'extends = "a.toml"')
    assert re.search(message, error_of(write("a.toml", text)))


def test_shipped_recipes_have_names(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {path.stem for path in ROOT.glob("configs/*.toml")}
    assert set(recipe_names()) == files - {"corpus-small"}
    assert load_recipe("llama-7b-tpu") == load_recipe(ROOT / "configs/llama-7b-tpu.toml")
    path = write("a.toml", 'extends = "tiny"\ntrain.steps = 7\n')
    assert load_recipe(path).model == load_recipe("tiny").model
    (tmp_path / "tiny").mkdir()  # a folder is not a recipe
    assert load_recipe("tiny").train.steps == 400
    (tmp_path / "tiny").rmdir()
    write("tiny", MINIMAL)  # a file is preferred
    assert load_recipe("tiny").train.steps == 10


def test_the_base_recipe_says_what_is_missing():
    message = error_of("llama")
    assert 'setting model is missing (or give model.name, for example "tiny")' in message
    for name in ("train.steps", "checkpoint.dir"):
        assert f"setting {name} is missing" in message


# Help --------------------------------------------------------------------------------------------


def test_the_common_settings_exist_and_come_first():
    text = help_text("", 100)
    assert set(COMMON) <= {setting.name for setting in settings()}
    assert all(f"\n  {name} " in text for name in COMMON)
    assert "train.profile_steps" not in text
    assert all(f"\n  {section} " in text for section in SECTIONS)


def test_sections_list_every_setting_once():
    listed = re.findall(r"^  (\S+\.\S+) ", help_text("all", 100), re.MULTILINE)
    assert sorted(listed) == sorted(setting.name for setting in settings())
    assert "  optim.b1 " in help_text("optim", 100)
    assert "  train." not in help_text("optim", 100)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_help_fits_the_terminal(width):
    lines = help_text("all", width).splitlines() + help_text("", width).splitlines()
    assert max(map(len, lines)) <= width


def test_help_takes_a_section(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    parser = argparse.ArgumentParser(add_help=False, description="Trains.")
    parser.add_argument("-h", "--help", action=SettingsHelp)
    for arguments, shown in [([], "Trains."), (["mesh"], "mesh.preset"), (["all"], "optim.b1")]:
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(["--help", *arguments])
        assert stopped.value.code == 0
        assert shown in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--help", "trian"])
    assert stopped.value.code == 2
    assert "no such section; give one of model, model.rope, data" in capsys.readouterr().err


def test_the_command_says_how_a_setting_is_written(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        train(["tiny", "--steps", "3"])
    message = "error: unrecognized arguments: --steps 3; a setting has no dashes: section.key=value"
    assert capsys.readouterr().err.startswith(message)
    for columns in range(40, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            train(["--help"])
        text = capsys.readouterr().out
        assert all(name in text for name in recipe_names())


def test_help_into_a_closed_pipe_is_no_error():
    """As `--help all | head`."""
    code = (
        "import argparse; from llama_jax.config import SettingsHelp\n"
        "parser = argparse.ArgumentParser(add_help=False)\n"
        "parser.add_argument('--help', action=SettingsHelp)\n"
        "parser.parse_args(['--help', 'all'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
