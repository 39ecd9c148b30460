"""The process that sends a run's records to one experiment tracker; see :mod:`trackers`.

Reads one JSON object per line from standard input: first the run, then what it has recorded.
Answers on standard output, one JSON object per line: the id of the tracker's run, the number of
lines that were sent, or an error.
"""

import base64
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

PROJECT = "llama_jax"
"""W&B project and MLflow experiment, unless an environment variable names another."""
MAX_ERROR = 10_000
"""Characters of an error: a server can answer with a page of megabytes."""
BATCH = 100
"""MLflow's limit for parameters and tags of one request."""


class Wandb:
    """A run of Weights & Biases.

    Args:
      start: "id", "name", "folder" (for W&B's own files, or null), "config" and "notes".
    """

    def __init__(self, start: dict[str, Any]):
        import wandb

        # W&B would record the command's arguments, the environment's packages and the machine.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self.wandb = wandb
        self.id = start["id"]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.id,
            name=start["name"],
            dir=start["folder"],
            config=start["config"] | start["notes"],
            resume="allow",
            settings=settings,
        )
        # A run that was killed repeats steps, which W&B's own step counter does not allow.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def samples(self, step: int, texts: list[str]) -> None:
        table = self.wandb.Table(columns=["sample"], data=[[text] for text in texts])
        self.run.log({"step": step, "samples": table})

    def picture(self, path: str) -> None:
        self.run.log({os.path.splitext(os.path.basename(path))[0]: self.wandb.Image(path)})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """A run of MLflow.

    Args:
      start: "id" (null for a new run), "name", "config" and "notes".
    """

    def __init__(self, start: dict[str, Any]):
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        self.id = start["id"]
        if self.id:
            try:
                self.client.update_run(self.id, status="RUNNING")
                return
            except MlflowException as e:
                if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or (
            found.experiment_id if found else self.client.create_experiment(name)
        )
        self.id = self.client.create_run(experiment, run_name=start["name"]).info.run_id
        self._describe(_flat(start["config"]), start["notes"])

    def _describe(self, config: dict[str, Any], notes: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        params = [Param(_mlflow_name(k), str(v)[:500]) for k, v in config.items()]
        tags = [RunTag(_mlflow_name(k), str(v)[:500]) for k, v in _flat(notes).items()]
        for i in range(0, max(len(params), len(tags)), BATCH):
            self.client.log_batch(self.id, params=params[i : i + BATCH], tags=tags[i : i + BATCH])

    def metrics(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(_mlflow_name(k), v, now, step) for k, v in values.items()]
        for i in range(0, len(points), 10 * BATCH):
            self.client.log_batch(self.id, metrics=points[i : i + 10 * BATCH])

    def samples(self, step: int, texts: list[str]) -> None:
        self.client.log_text(self.id, "\n\n".join(texts) + "\n", f"samples-{step}.txt")

    def picture(self, path: str) -> None:
        self.client.log_artifact(self.id, path)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


WRITERS = {"wandb": Wandb, "mlflow": Mlflow}


def _mlflow_name(key: str) -> str:
    """A name with the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", key)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return out


def main(name: str) -> None:
    """Send what standard input describes, to its end."""
    # A launcher may send these to every process of a job; the end of the input ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Libraries print to standard output and error; only the answers may reach the other process.
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    finished = False
    temporary = tempfile.mkdtemp(prefix="llama_jax-")
    try:
        writer: Any = WRITERS[name](json.loads(sys.stdin.readline()))
        answer(id=writer.id)
        for line in sys.stdin:
            message = json.loads(line)
            kind = message.pop("kind")
            if kind == "finished":
                finished = True
            elif kind == "picture":
                path = os.path.join(temporary, message["name"])
                with open(path, "wb") as file:
                    file.write(base64.b64decode(message["content"]))
                writer.picture(path)
            else:
                getattr(writer, kind)(**message)
            answer(sent=1)
        writer.close(finished)
        answer(closed=True)
    except Exception as e:
        answer(error=f"{type(e).__name__}: {e}"[:MAX_ERROR])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
