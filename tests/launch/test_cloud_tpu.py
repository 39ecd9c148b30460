"""launch/cloud-tpu.sh with stand-ins for gcloud and docker: requests, hosts, and restarts."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/cloud-tpu.sh"
# Each stand-in adds its arguments to the file `calls`. A line of the file `states` is the answer to
# one question about the queued resource, a line of `codes` the exit code of one training process.
STAND_INS = {
    "gcloud": """
        echo "gcloud ${*%%$'\\n'*}" >> calls
        case "$*" in
        *queued-resources\\ describe*) next states ;;
        *tpu-vm\\ ssh*) bash -c "${!#/#--command=}" ;;
        esac
    """,
    "sudo": """
        echo "sudo $*" >> calls
        case "$*" in docker\\ run*) exit "$(next codes)" ;; esac
    """,
    "mountpoint": "true",
    "sleep": "true",
}
NEXT = """
next() { # FILE: its first line, which is removed
    exec 9> lock; flock 9
    head -n 1 "$1"; sed -i 1d "$1"
}
"""


@pytest.fixture
def launch(tmp_path):
    """Run the script; returns its exit code, its output and the calls of gcloud and sudo."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{NEXT}{text}")
        path.chmod(0o755)

    def run(states: str, codes: str, *arguments: str):
        (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
        env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        done = subprocess.run(
            [SCRIPT, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        return done.returncode, done.stdout + done.stderr, calls

    return run


def some(calls: list[str], *words: str) -> list[str]:
    return [call for call in calls if all(word in call for word in words)]


def test_a_preempted_slice_is_requested_again(launch):
    """The second of two slices disappears while it trains; exit code 137 of its host."""
    states = "MISSING MISSING WAITING_FOR_RESOURCES ACTIVE SUSPENDED SUSPENDED SUSPENDED ACTIVE"
    codes = "0 1 0 0"
    code, output, calls = launch(states, codes)
    assert (code, output) == (0, "")
    made = some(calls, "queued-resources create llama-7b", "--accelerator-type=v5p-64", "--spot")
    assert len(some(made, "--node-count=2 --node-prefix=llama-7b")) == 2
    assert len(some(calls, "queued-resources delete llama-7b", "--force --quiet")) == 1
    for node in ("llama-7b-0", "llama-7b-1"):
        assert len(some(calls, f"tpu-vm ssh {node}", "--worker=all")) == 2
    assert len(some(calls, "docker run", "--privileged", "train llama-7b-tpu mesh.data=2")) == 4


def test_hosts_start_again_after_75_and_signals(launch):
    prompts = "train.sample_prompts=['a b']"
    code, output, calls = launch("ACTIVE", "75 75 143 143 0 0", "tiny", prompts)
    assert code == 0
    runs = some(calls, "docker run")
    assert len(runs) == 6
    assert all(call.endswith(f"train tiny {prompts}") for call in runs)
    assert output.count("exit code 75: restart ") == 2
    assert output.count("exit code 143: restart ") == 2


def test_errors_do_not_start_hosts_again(launch):
    code, output, calls = launch("ACTIVE ACTIVE", "1 1")
    assert code == 1
    assert output == "llama-7b: training failed, see the error above\n"
    assert len(some(calls, "docker run")) == 2
    assert not some(calls, "queued-resources create")


def test_a_lost_network_does_not_request_slices(launch, tmp_path):
    """gcloud fails without saying that the queued resource does not exist."""
    gcloud = tmp_path / "bin/gcloud"
    failing = (
        f"#!/bin/bash\n{NEXT}\n"
        + """
        if [[ $* == *--format* && $(head -n 1 states) == LOST ]]; then next states >lost; exit 1; fi
        if [[ $* == *describe* && $* != *--format* ]]; then echo 'ERROR: no network' >&2; exit 1; fi
    """
    )
    gcloud.write_text(failing + gcloud.read_text().partition(NEXT)[2])
    code, output, calls = launch("LOST LOST ACTIVE", "0 0")
    assert code == 0
    assert output.count("no answer about its state, asking again: ERROR: no network") == 2
    assert not some(calls, "create")
    assert not some(calls, "delete")
