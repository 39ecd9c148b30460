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
        *tpu-vm\\ ssh*)
            if [ -e lost ] && [ "$(head -n 1 lost)" = yes ]; then next lost >&2; exit 255; fi
            bash -c "${!#/#--command=}" ;;
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
    assert code == 0
    assert sorted(line[-11:] for line in output.splitlines()) == ["exit code 0"] * 3 + [
        "exit code 1"
    ]
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
    *hosts, last = output.splitlines()
    assert last == "llama-7b: training failed, see the error above"
    assert [line.partition(": ")[2] for line in hosts] == ["ended with exit code 1"] * 2
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


@pytest.mark.parametrize(
    "error",
    [
        "PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on resource",
        "INVALID_ARGUMENT: invalid zone",
        "NOT_FOUND: Project 'projects/my-project' was not found",
    ],
)
def test_permanent_errors_of_gcloud_end_it_with_one_line(launch, tmp_path, error):
    gcloud = tmp_path / "bin/gcloud"
    (tmp_path / "error").write_text(f"ERROR: (gcloud) {error}\nmore\n")
    gcloud.write_text("#!/bin/bash\necho ask >> calls; cat error >&2; exit 1\n")
    code, output, calls = launch("", "")
    assert code == 1
    assert output == f"llama-7b: gcloud refuses to say its state: ERROR: (gcloud) {error} more\n"
    assert len(calls) == 2


def test_a_missing_queued_resource_is_no_missing_project(launch, tmp_path):
    gcloud = tmp_path / "bin/gcloud"
    missing = "NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/llama-7b' was not found"
    failing = f"""#!/bin/bash\n{NEXT}
        if [[ $* == *describe* && ! -e made ]]; then echo "ERROR: {missing}" >&2; exit 1; fi
        if [[ $* == *create* ]]; then touch made; fi
    """
    gcloud.write_text(failing + gcloud.read_text().partition(NEXT)[2])
    code, _, calls = launch("ACTIVE", "0 0")
    assert code == 0
    assert len(some(calls, "queued-resources create")) == 1


@pytest.mark.parametrize("attempts", [2, 10])
def test_a_lost_connection_is_tried_again(launch, tmp_path, attempts):
    """ssh ends with 255, and no host has reported that training failed."""
    (tmp_path / "lost").write_text("yes\n" * 2 * attempts)
    code, output, calls = launch("ACTIVE " * 2 * (attempts + 1), "0 0")
    tried = len(some(calls, "tpu-vm ssh"))
    last = output.splitlines()[-1]
    assert "lost the connection to its hosts: attempt 2 of 10" in output
    if attempts == 2:
        assert (code, tried) == (0, 6)
        assert len(some(calls, "docker run")) == 2
    else:
        assert (code, tried) == (1, 20)
        assert last == (
            "llama-7b: no ssh connection to its hosts in 10 attempts, see the errors above"
        )
    assert not some(calls, "create")


@pytest.mark.parametrize("slices", ["0", "two", "''"])
def test_a_wrong_number_of_slices_is_one_line(tmp_path, slices):
    script = tmp_path / "cloud-tpu.sh"
    script.write_text(SCRIPT.read_text().replace("slices=2", f"slices={slices}", 1))
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.endswith(": give a whole number, at least 1\n")
    assert done.stderr.count("\n") == 1
