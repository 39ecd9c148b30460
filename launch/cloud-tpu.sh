#!/bin/bash
# Trains a recipe on Cloud TPU slices, which it requests as a queued resource:
#
#   launch/cloud-tpu.sh [RECIPE] [section.key=value ...]
#
# It needs gcloud, and runs until the training has ended: start it in tmux on a machine that stays
# on. A slice that is preempted is requested again. The slices stay when it ends: delete them with
#
#   gcloud compute tpus queued-resources delete NAME --project=PROJECT --zone=ZONE --force
set -euo pipefail

# Edit: two spot slices of 32 v5p chips (64 TensorCores) each.
project=my-project
zone=us-east5-a
name=llama-7b
slices=2
accelerator=v5p-64
runtime=v2-alpha-tpuv5
capacity=(--spot) # (--reserved), or () for on-demand capacity
# A file system that all hosts mount at /data, with tokenizer.model and data/.
nfs=10.0.0.2:/llama
image=us-docker.pkg.dev/my-project/my-repository/llama_jax-tpu:1
train=(llama-7b-tpu "mesh.data=$slices")
max_restarts=100
max_ssh=10 # attempts in a row to reach the hosts

if [ $# -gt 0 ]; then
    train=("$@")
fi
if ! [[ $slices =~ ^[1-9][0-9]*$ ]]; then
    echo "$0: slices=$slices: give a whole number, at least 1" >&2
    exit 2
fi

queued_resource() { # COMMAND [OPTION ...]
    gcloud compute tpus queued-resources "$1" "$name" --project="$project" --zone="$zone" "${@:2}"
}

fail() { # MESSAGE
    echo "$name: $1" >&2
    exit 1
}

permanent() { # ERROR: whether it stays until the values above or the account are changed
    [[ $1 == *PERMISSION_DENIED* || $1 == *INVALID_ARGUMENT* ]] ||
        [[ $1 == *NOT_FOUND*[Pp]roject* && $1 != *queuedResources/* ]]
}

state() { # UNKNOWN if gcloud fails for another reason, such as the network or a login that expired
    local error
    queued_resource describe --format='value(state.state)' 2>/dev/null && return
    error=$(queued_resource describe 2>&1 >/dev/null) || true
    error=${error//$'\n'/ }
    if permanent "$error"; then
        fail "gcloud refuses to say its state: $error"
    fi
    case $error in
    *NOT_FOUND* | *"not found"*) echo MISSING ;;
    *) echo "$name: no answer about its state, asking again: $error" >&2 && echo UNKNOWN ;;
    esac
}

request() { # a new queued resource, in place of one that failed or was preempted
    local found
    found=$(state) # fails if the error is permanent
    if [ "$found" != MISSING ]; then
        queued_resource delete --force --quiet
    fi
    local nodes=(--node-id="$name")
    if [ "$slices" -gt 1 ]; then
        nodes=(--node-count="$slices" --node-prefix="$name")
    fi
    queued_resource create "${nodes[@]}" --accelerator-type="$accelerator" \
        --runtime-version="$runtime" "${capacity[@]}"
}

wait_until_active() {
    local found
    while true; do
        found=$(state)
        case $found in
        ACTIVE) return ;;
        MISSING | FAILED | SUSPENDING | SUSPENDED) request ;;
        esac
        sleep 60
    done
}

codes=$(mktemp -d) # for each slice, the exit codes of its hosts
trap 'rm -rf "$codes"' EXIT

on_all_hosts() { # COMMAND: fails if it fails on a host, or if a connection is lost
    local slice pids=() node=$name failed=0
    for ((slice = 0; slice < slices; slice++)); do
        if [ "$slices" -gt 1 ]; then
            node=$name-$slice
        fi
        gcloud compute tpus tpu-vm ssh "$node" --project="$project" --zone="$zone" \
            --worker=all --command="$1" | sed -u "/: ended with exit code /w $codes/$slice" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    return "$failed"
}

# On each host: exit code 75 (a step did not finish, or a process is missing) and codes over 128 (a
# signal; 143 is SIGTERM) start it again. All hosts end with the same code. Other errors end it.
host_script=$(
    cat <<END
set -u
trap 'echo "\$HOSTNAME: ended with exit code \$?"' EXIT
mountpoint -q /data || {
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update # a new VM may still install updates
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 install --yes nfs-common && sudo mkdir -p /data && sudo mount $nfs /data
} || exit 1
sudo gcloud auth configure-docker --quiet ${image%%/*} || exit 1
for restart in \$(seq 0 $max_restarts); do
    sudo docker rm --force llama >/dev/null 2>&1
    status=0
    sudo docker run --name=llama --privileged --user=0 --network=host --volume=/data:/data \
        $image train $(printf '%q ' "${train[@]}") || status=\$?
    [ \$status -eq 75 ] || [ \$status -gt 128 ] || exit \$status
    echo "exit code \$status: restart \$((restart + 1)) of at most $max_restarts"
done
exit \$status
END
)

lost=0
for ((restart = 0; restart <= max_restarts; restart++)); do
    wait_until_active
    start=$SECONDS
    if on_all_hosts "$host_script"; then
        exit 0
    fi
    sleep 60 # a slice that was preempted is ACTIVE for a while
    found=$(state)
    if [ "$found" != ACTIVE ]; then
        continue
    fi
    if grep --quiet --invert-match 'exit code 0' "$codes"/*; then
        fail "training failed, see the error above"
    fi
    # No host has reported an error: the connection was lost, or could not be made.
    if [ $((SECONDS - start)) -gt 600 ]; then
        lost=0
    fi
    lost=$((lost + 1))
    if [ "$lost" -ge "$max_ssh" ]; then
        fail "no ssh connection to its hosts in $max_ssh attempts, see the errors above"
    fi
    echo "$name: lost the connection to its hosts: attempt $((lost + 1)) of $max_ssh" >&2
done
fail "ended after $max_restarts restarts"
