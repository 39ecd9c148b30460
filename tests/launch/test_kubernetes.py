"""The manifests of launch/ against the schemas of Kubernetes and JobSet, and against our code."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
validator = pytest.importorskip("kubernetes_validate", reason="comes with the extra check")
pytest.importorskip("kubeflow_trainer_api", reason="comes with the extra check")

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet  # noqa: E402

from llama_jax.config import load_recipe  # noqa: E402
from llama_jax.train.distributed import Job, find_job  # noqa: E402
from llama_jax.train.watchdog import EXIT_CODE  # noqa: E402

LAUNCH = Path(__file__).parents[2] / "launch"
FILES = ["gke-tpu.yaml", "gke-gpu.yaml"]
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


class Loader(yaml.SafeLoader):
    """Refuses keys that occur twice, as the API server does."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a key occurs twice: {keys}")
        return super().construct_mapping(node, deep)


def read(name: str) -> dict[str, Any]:
    return yaml.load((LAUNCH / name).read_text(), Loader)


def check(manifest: dict[str, Any]) -> None:
    """Raises an error for each field that Kubernetes, JobSet or a registry would refuse."""
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # The models of JobSet's fields drop what they do not know.
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    policy = manifest["spec"]["failurePolicy"]
    assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate")
    assert all(rule["action"] in ACTIONS for rule in policy["rules"])
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        validator.validate(job | replicated["template"], "1.37", strict=True)
        spec = replicated["template"]["spec"]
        pod = spec["template"]["spec"]
        names = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            _, _, tag = container["image"].rpartition("/")[2].partition(":")
            assert tag, "an image without a tag"
            assert tag != "latest"
            assert names == {mount["name"] for mount in container["volumeMounts"]}
        rules = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"]]
        assert {r["containerName"] for r in rules} <= {c["name"] for c in pod["containers"]}
        codes = {code for rule in rules for code in rule["values"]}
        assert codes == {1, 2}
        assert not codes & {EXIT_CODE, 143}
        # Kubernetes accepts a policy for failed pods only if it does not restart their containers.
        assert pod["restartPolicy"] == "Never"
        assert spec["parallelism"] == spec["completions"]


@pytest.mark.parametrize("name", FILES)
def test_manifests_are_valid(name):
    check(read(name))


def replicated(manifest: dict[str, Any]) -> dict[str, Any]:
    (job,) = manifest["spec"]["replicatedJobs"]
    return job


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return replicated(manifest)["template"]["spec"]["template"]["spec"]


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(manifest)["containers"]
    return container


@pytest.mark.parametrize(
    "plant",
    [
        lambda m: m["spec"].update(failurePolcy={}),
        lambda m: m["spec"]["failurePolicy"].update(maxRestarts="100"),
        lambda m: m["spec"]["failurePolicy"].update(restartStrategy="Recreated"),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="FailJob"),
        lambda m: m["spec"].update(network={"subDomain": "llama"}),
        lambda m: replicated(m).update(replica=2),
        lambda m: replicated(m)["template"]["spec"].update(paralelism=2),
        lambda m: replicated(m)["template"]["spec"].update(completions=3),
        lambda m: pod_of(m).update(nodeselector={}),
        lambda m: pod_of(m).update(restartPolicy="OnFailure"),
        lambda m: pod_of(m)["volumes"][0].update(name="other"),
        lambda m: container_of(m).update(image="us-docker.pkg.dev:443/project/llama_jax"),
        lambda m: container_of(m).update(image="llama_jax:latest"),
        lambda m: container_of(m).update(args="train llama-7b-tpu"),
        lambda m: container_of(m)["resources"].update(limit={}),
        lambda m: container_of(m).update(name="other"),
    ],
)
def test_wrong_fields_are_found(plant):
    manifest = copy.deepcopy(read("gke-tpu.yaml"))
    plant(manifest)
    with pytest.raises((AssertionError, ValueError, validator.ValidationError)):
        check(manifest)


def test_a_key_that_occurs_twice_is_found():
    with pytest.raises(ValueError, match="occurs twice"):
        yaml.load("a: {b: 1, b: 2}", Loader)


@pytest.mark.parametrize("name", FILES)
def test_the_command_is_valid(name):
    command, recipe, *overrides = container_of(read(name))["args"]
    assert command == "train"
    recipe = load_recipe(recipe, overrides)
    assert recipe.train.hang_factor > 0
    assert isinstance(recipe.checkpoint.save_every, str)  # by time


# What `xpk workload create --dry-run --skip-validation --tpu-type=v5p-64 --num-slices=2` of xpk
# 1.16.0 prints: the fields that decide whether pods are scheduled, connected and started again.
XPK = {
    "exclusive-topology": "cloud.google.com/gke-nodepool",
    "rules": [("FailJobSet", ["PodFailurePolicy"])],
    "slices": (2, 8, 8, 0),
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x4x4",
    },
    "network": (True, "ClusterFirstWithHostNet"),
    "toleration": ("google.com/tpu", "Exists"),
    "limits": {"google.com/tpu": 4},
    "privileged": True,
    "restartPolicy": "Never",
    "/dev/shm": {"medium": "Memory"},
}


def test_the_tpu_manifest_agrees_with_xpk():
    manifest = read("gke-tpu.yaml")
    job, pod, container = replicated(manifest), pod_of(manifest), container_of(manifest)
    spec = job["template"]["spec"]
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    ((key, topology),) = manifest["metadata"]["annotations"].items()
    rules = manifest["spec"]["failurePolicy"]["rules"]
    counts = (job["replicas"], *(spec[n] for n in ("parallelism", "completions", "backoffLimit")))
    assert key == "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert {
        "exclusive-topology": topology,
        "rules": [(rule["action"], rule["onJobFailureReasons"]) for rule in rules],
        "slices": counts,
        "nodeSelector": pod["nodeSelector"],
        "network": (pod["hostNetwork"], pod["dnsPolicy"]),
        "toleration": tuple(pod["tolerations"][0][n] for n in ("key", "operator")),
        "limits": container["resources"]["limits"],
        "privileged": container["securityContext"]["privileged"],
        "restartPolicy": pod["restartPolicy"],
        "/dev/shm": volumes[mounts["/dev/shm"]]["emptyDir"],
    } == XPK


def test_the_slices_of_a_tpu_job_are_complete():
    """Hosts x chips of a host = chips of the topology; each slice has a copy of the model."""
    manifest = read("gke-tpu.yaml")
    topology = pod_of(manifest)["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container_of(manifest)["resources"]["limits"]["google.com/tpu"]
    hosts = replicated(manifest)["template"]["spec"]["parallelism"]
    assert math.prod(map(int, topology.split("x"))) == chips * hosts
    assert f"mesh.data={replicated(manifest)['replicas']}" in container_of(manifest)["args"]


def test_pods_with_gpus_find_each_other(monkeypatch):
    """Their environment is what train/distributed.py reads; pod 0 has the coordinator's name."""
    manifest = read("gke-gpu.yaml")
    job, name = replicated(manifest), manifest["metadata"]["name"]
    for variable in container_of(manifest)["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    address = f"{name}-{job['name']}-0-0.{manifest['spec']['network']['subdomain']}:1234"
    pods = job["template"]["spec"]["completions"]
    assert find_job() == Job("JAX variables", address, pods, 3)
    assert manifest["spec"]["network"]["enableDNSHostnames"]
    assert job["replicas"] == 1
