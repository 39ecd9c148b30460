"""launch/skypilot.yaml: its fields against SkyPilot's schema, and its command with a stand-in."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import load_recipe
from llama_jax.train.distributed import Job, find_job

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
TASK = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())


def test_the_processes_find_each_other(tmp_path, monkeypatch):
    """The variables of SkyPilot become those of JAX."""
    command = tmp_path / "llama_jax/bin/llama-jax"
    command.parent.mkdir(parents=True)
    command.write_text(f"#!/bin/sh\n'{sys.executable}' -c '{SHOW}' \"$@\"\n")
    command.chmod(0o755)
    nodes = {"NODE_IPS": "10.0.0.7\n10.0.0.8", "NUM_NODES": "2", "NODE_RANK": "1"}
    env = os.environ | {f"SKYPILOT_{name}": value for name, value in nodes.items()}
    text = TASK["run"].replace("cd /inputs", f"cd {tmp_path}")
    done = subprocess.run(
        ["bash", "-euc", text], env=env | TASK["envs"] | {"HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["arguments"] == [
        "train", "llama-7b-gpu", "checkpoint.dir=gs://my-bucket/runs/llama-7b-gpu"
    ]  # fmt: skip
    for name, value in seen["jax"].items():
        monkeypatch.setenv(name, value)
    assert find_job() == Job("JAX variables", "10.0.0.7:1234", 2, 1)


SHOW = """
import json, os, sys
names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
print(json.dumps({"arguments": sys.argv[1:], "jax": {name: os.environ[name] for name in names}}))
"""


def test_the_recipe_and_the_extras_exist():
    assert load_recipe(TASK["envs"]["RECIPE"]).train.hang_factor > 0
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", TASK["setup"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    codes = TASK["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert {75, 143} <= set(codes)
    assert not {1, 2} & set(codes)


# SkyPilot's schema, without its dependencies (460 MB) and without the part for its server.
SCHEMA = """
import json, sys, types
from unittest import mock
sky = types.ModuleType("sky")
sky.__path__, sky.__version__, sky.__commit__ = [sys.argv[1] + "/sky"], "0", ""
sys.modules |= {"sky": sky, "sky.skylet.autostop_lib": mock.MagicMock()}
from sky.utils import schemas
schemas._task_config_schema = dict
schemas._allow_additional_properties = lambda: False  # as on its server
task, resources = schemas.get_task_schema(), schemas.get_resources_schema()
task["properties"]["resources"] = resources
print(json.dumps(task, default=lambda _: []))
"""


@pytest.fixture(scope="module")
def schema(tmp_path_factory) -> dict[str, Any]:
    if os.environ.get("LLAMA_JAX_DOWNLOADS") != "1":
        pytest.skip("downloads SkyPilot; set LLAMA_JAX_DOWNLOADS=1")
    folder = str(tmp_path_factory.mktemp("sky"))
    install = ["pip", "install", "-q", "--no-deps", "--no-compile", "--target", folder]
    subprocess.run([sys.executable, "-m", *install, "skypilot==0.14.1"], check=True)
    done = subprocess.run([sys.executable, "-c", SCHEMA, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_skypilot_accepts_the_fields(schema):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(TASK))
    planted = [
        {"num_node": 8},
        {"num_nodes": "8"},
        {"resources": {"use_spots": True}},
        {"resources": {"use_spot": "yes"}},
        {"resources": {"job_recovery": {"recover_on_exit_code": [75]}}},
        {"resources": {"job_recovery": {"recover_on_exit_codes": [750]}}},
    ]
    for change in planted:
        assert list(validator.iter_errors(TASK | change)), change
