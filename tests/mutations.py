"""Mutation tests: plant one bug at a time in a copy of the source, and see whether a test fails.

    python tests/mutations.py                          # all of tests/mutations/*.toml
    python tests/mutations.py --only top_p_keeps_one_more --jobs 2
    python tests/mutations.py --file tests/mutations/model.toml

A mutation is a table of a TOML file:

    [[mutation]]
    name = "top_p_keeps_one_more"
    file = "llama_jax/generate/sampler.py"
    old = "before_BV < s.top_p"           # occurs exactly once in the file
    new = "before_BV <= s.top_p"
    tests = ["tests/generate/test_sampling.py::test_top_p_at_the_limit"]
    equivalent = "..."                    # only where no test can see the change: the reason

All heavy libraries are imported once; each run is a fork of this process, which therefore must
never start a JAX backend itself. The exit status is 0 if at least 97 % of the mutations that are
not equivalent are caught, no entry is stale, and every named test passes on the unchanged source.

pytest does not collect this file; `test_mutations` checks on every run that no entry is stale.
"""

import argparse
import ast
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "mutations"
COPIED = ("llama_jax", "pallas_kernels", "tests", "configs", "launch", "notebooks", "benchmarks",
          "pyproject.toml", "README.md", "requirements.txt", "constraints.txt",
          "setup.py")  # fmt: skip
THRESHOLD = 0.97
TIMEOUT = 300
"""Seconds; a run that takes longer is killed, and counts as caught: the bug made it hang."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One planted bug, and the tests that should find it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str | None = None

    def problem(self, root: Path = ROOT) -> str | None:
        """Why this entry no longer fits the source; None if it does."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        source = path.read_text(encoding="utf-8")
        if (count := source.count(self.old)) != 1:
            return f"`old` occurs {count} times in {self.file}, not once"
        if self.old == self.new:
            return "`new` equals `old`"
        parsers = {".toml": tomllib.loads, ".py": ast.parse}
        parse = parsers.get(path.suffix, str)
        try:
            parse(source.replace(self.old, self.new))
        except (SyntaxError, tomllib.TOMLDecodeError) as e:
            return f"the mutated file cannot be parsed: {e}"
        if not self.tests:
            return "names no tests"
        for test in self.tests:
            file, _, name = test.partition("::")
            if not (root / file).is_file():
                return f"{file} does not exist"
            name = name.partition("[")[0]
            if name and f"def {name}(" not in (root / file).read_text(encoding="utf-8"):
                return f"{file} has no {name}"
        return None


def load(files: list[Path] | None = None) -> list[Mutation]:
    """The mutations of TOML files; default: all of them.

    Raises:
      TypeError: a table has an unknown key or lacks one.
    """
    out = []
    for file in sorted(FOLDER.glob("*.toml")) if files is None else files:
        for table in tomllib.loads(file.read_text(encoding="utf-8")).get("mutation", []):
            out.append(Mutation(**(table | {"tests": tuple(table["tests"])})))
    return out


# Running -----------------------------------------------------------------------------------------


class Outcomes:
    """A pytest plugin that writes the outcome of each test to a file, a line each."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            with self.path.open("a") as f:
                f.write(f"{report.outcome} {report.nodeid}\n")


@dataclasses.dataclass
class Run:
    """A fork that runs tests in a copy of the repository."""

    copy: Path
    tests: tuple[str, ...]
    mutation: Mutation | None
    stop_at_first: bool = True
    start: float = dataclasses.field(default_factory=time.monotonic)
    pid: int = 0

    def fork(self) -> None:
        """Plant the bug and start the tests."""
        self.outcomes.unlink(missing_ok=True)
        if self.mutation is not None:
            path = self.copy / self.mutation.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(self.mutation.old, self.mutation.new), encoding="utf-8")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                os.setsid()
                status = self._in_child()
            finally:
                os._exit(status)

    @property
    def outcomes(self) -> Path:
        return self.copy.with_suffix(".outcomes")

    @property
    def log(self) -> Path:
        return self.copy.with_suffix(".log")

    def _in_child(self) -> int:
        import pytest

        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(self.copy)
        os.environ["PYTHONPATH"] = str(self.copy)
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.copy.with_suffix(".tmp"))
        sys.path[:] = [str(self.copy), str(self.copy / "tests"), *sys.path[1:]]
        more = ["-x"] if self.stop_at_first else []
        args = ["-n", "0", "-q", "-p", "no:cacheprovider", *more, *self.tests]
        return int(pytest.main(args, plugins=[Outcomes(self.outcomes)]))

    def poll(self) -> int | None:
        """pytest's exit status when it has ended, -1 when it had to be killed; None before."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() - self.start < TIMEOUT:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with the processes that the tests started
        if not pid:
            os.waitpid(self.pid, 0)
        if self.mutation is not None:
            shutil.copyfile(ROOT / self.mutation.file, self.copy / self.mutation.file)
        return os.waitstatus_to_exitcode(status) if pid else -1


def make_copy(folder: Path) -> Path:
    """The repository's files, in a new folder."""
    folder.mkdir()
    folder.with_suffix(".tmp").mkdir()
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        elif (ROOT / name).exists():
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_all(runs: list[Run], copies: list[Path]) -> Iterator[tuple[Run, int]]:
    """Each run with its exit status, as they end; one at a time in each copy."""
    pending, going, free = runs[::-1], [], list(copies)
    while pending or going:
        while pending and free:
            run = pending.pop()
            run.copy, run.start = free.pop(), time.monotonic()
            run.fork()
            going.append(run)
        time.sleep(0.05)
        for run in list(going):
            if (status := run.poll()) is not None:
                going.remove(run)
                yield run, status
                free.append(run.copy)


def passing(mutations: list[Mutation], copies: list[Path]) -> dict[str, str]:
    """Outcome of every test that a mutation names, on the unchanged source."""
    tests = sorted({test for m in mutations for test in m.tests})
    shares = [tuple(tests[i :: len(copies)]) for i in range(len(copies))]
    found: dict[str, str] = {}
    runs = [Run(copies[0], share, None, stop_at_first=False) for share in shares if share]
    for run, status in run_all(runs, copies):
        if status not in (0, 1):
            print(run.log.read_text(errors="replace")[-3000:])
        lines = run.outcomes.read_text().splitlines() if run.outcomes.exists() else []
        found |= {nodeid: outcome for outcome, _, nodeid in (x.partition(" ") for x in lines)}
    return found


def baseline_problem(mutation: Mutation, outcomes: dict[str, str]) -> str | None:
    """Why the named tests cannot tell the mutation from the unchanged source."""
    for test in mutation.tests:
        mine = {
            x for t, x in outcomes.items() if t == test or t.startswith((f"{test}[", f"{test}::"))
        }
        if "failed" in mine:
            return f"{test} fails on the unchanged source"
        if "passed" not in mine:
            return f"{test} runs no test here (skipped, or no such name)"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the mutations; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="name of a mutation; repeatable")
    parser.add_argument("--file", action="append", type=Path, help="TOML file; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    mutations = load(args.file)
    if args.only:
        mutations = [m for m in mutations if m.name in args.only]
    if not mutations:
        parser.error("no such mutation")
    _import_heavy()
    tally: Counter[str] = Counter()

    def report(mutation: Mutation, verdict: str, seconds: float = 0, note: str = "") -> None:
        tally[verdict] += 1
        print(f"{verdict:10} {seconds:6.1f} s  {mutation.name}  {note}".rstrip(), flush=True)

    with tempfile.TemporaryDirectory(prefix="mutations-") as temp:
        copies = [make_copy(Path(temp).resolve() / f"copy{i}") for i in range(args.jobs)]
        start, fitting = time.monotonic(), []
        for m in mutations:
            if problem := m.problem():
                report(m, "stale", note=problem)
            else:
                fitting.append(m)
        outcomes = passing(fitting, copies)
        print(f"unchanged source: {len(outcomes)} tests, {time.monotonic() - start:.0f} s")
        runs = []
        for m in fitting:
            if problem := baseline_problem(m, outcomes):
                report(m, "stale", note=problem)
            else:
                runs.append(Run(copies[0], m.tests, m))
        for run, status in run_all(runs, copies):
            caught, mutation = status != 0, run.mutation
            assert mutation is not None
            if mutation.equivalent is not None:
                verdict = "stale" if caught else "equivalent"
                note = "marked equivalent, but caught" if caught else mutation.equivalent
            else:
                verdict, note = ("caught" if caught else "survived"), _first_failure(run, status)
            report(mutation, verdict, time.monotonic() - run.start, note)
    counted = tally["caught"] + tally["survived"]
    share = tally["caught"] / counted if counted else 1.0
    print(f"{share:.1%} of {counted} caught;", ", ".join(f"{k} {n}" for k, n in tally.items()))
    return int(share < THRESHOLD or tally["stale"] > 0)


def _first_failure(run: Run, status: int) -> str:
    if status == -1:
        return f"killed after {TIMEOUT} s"
    lines = run.outcomes.read_text().splitlines() if run.outcomes.exists() else []
    failed = [line.partition(" ")[2] for line in lines if line.startswith("failed")]
    return failed[0] if failed else "" if status in (0, 1) else f"pytest's exit status {status}"


def _import_heavy() -> None:
    """Import the libraries that nearly every test needs. Our own modules are imported per run."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    import flax.nnx
    import jax.experimental.pallas.tpu
    import jax.experimental.pallas.triton
    import numpy
    import optax
    import orbax.checkpoint
    import pydantic
    import pytest
    import sentencepiece
    import tokenizers

    # A backend's threads would not live on in a fork.
    assert not jax._src.xla_bridge.backends_are_initialized()
    used = (flax, numpy, optax, orbax, pydantic, pytest, sentencepiece, tokenizers)
    assert all(used)


if __name__ == "__main__":
    sys.exit(main())
