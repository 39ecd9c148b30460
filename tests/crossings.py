"""Count how often the control flow crosses from one source file to another.

    python tests/crossings.py [--pairs]

Runs a short training run, generates one token with the result, and converts it from the Hugging
Face format. For each, prints the number of files that ran on the main thread and of distinct pairs
(caller file, callee file) and (caller package, callee package); --pairs lists the pairs of files.
"""

import argparse
import contextlib
import importlib
import os
import pkgutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("llama_jax", "pallas_kernels")
RECIPE = [
    "train.steps=4", "train.eval_every=2", "train.log_every=2", "checkpoint.save_every=2",
    "model.vocab_size=600", "data.seq_len=64",
]  # fmt: skip


class Crossings:
    """Counts calls between files of the project while its context is entered."""

    def __init__(self) -> None:
        self.pairs: Counter[tuple[str, str]] = Counter()
        self._files: dict[str, str | None] = {}

    def __enter__(self) -> "Crossings":
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _file(self, frame: FrameType) -> str | None:
        """The frame's file relative to the project; None outside of it."""
        name = frame.f_code.co_filename
        if name not in self._files:
            path = os.path.relpath(name, ROOT)
            self._files[name] = path if path.startswith(PACKAGES) else None
        return self._files[name]

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        callee = self._file(frame) if event == "call" else None
        caller = frame.f_back
        # Frames of libraries in between do not count: a jitted function belongs to its caller.
        while callee and caller is not None and self._file(caller) is None:
            caller = caller.f_back
        if callee and caller is not None and (source := self._file(caller)) != callee:
            assert source is not None
            self.pairs[source, callee] += 1

    def report(self, title: str, list_pairs: bool) -> None:
        files = {file for pair in self.pairs for file in pair}
        packages = {(package(a), package(b)) for a, b in self.pairs} - {
            (name, name) for name in map(package, files)
        }
        print(
            f"{title:<12}{len(files):>4} files {len(self.pairs):>4} pairs of files "
            f"{len(packages):>4} pairs of packages"
        )
        for (caller, callee), calls in sorted(self.pairs.items()) if list_pairs else ():
            print(f"  {caller} -> {callee} {calls}")


def package(file: str) -> str:
    """``llama_jax/train/loop.py`` -> ``train``, ``llama_jax/io.py`` -> ``io``."""
    top, name, *_ = Path(file).with_suffix("").parts
    return name if top == "llama_jax" else top


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield


def command(name: str) -> Any:
    return importlib.import_module(f"llama_jax.{name}.__main__").main


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", action="store_true", help="list the pairs")
    list_pairs = parser.parse_args().pairs
    for package in PACKAGES:  # so that imports inside functions do not count as calls
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if "__main__" not in module.name:
                importlib.import_module(module.name)
    import llama_jax
    from llama_jax.train import loop

    training, generation, conversion = Crossings(), Crossings(), Crossings()
    run, sources = loop.run, []

    def profiled_run(*args: Any) -> Any:
        with training:
            return run(*args)

    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as temporary, quiet():
        ours, hf = Path(temporary, "ours"), Path(temporary, "hf")
        loop.run = profiled_run  # type: ignore[assignment]
        for source in ("code", "prose"):
            sources.append(f"data.sources.{source}.path={Path(temporary, source)}")
            Path(temporary, source).mkdir()
            for i, path in enumerate(sorted(ROOT.glob("llama_jax/*/*.py"))):
                Path(temporary, source, f"{i}.txt").write_text(path.read_text())
        code = command("train")(["configs/tiny.toml", f"checkpoint.dir={ours}", *sources, *RECIPE])
        assert code == 0, code
        llm = llama_jax.load(str(ours))
        with generation:
            llm.generate("def main(", max_new_tokens=1)
        convert = command("convert")
        assert convert([str(ours), str(hf), "--to", "hf"]) == 0
        with conversion:
            assert convert([str(hf), str(Path(temporary, "back"))]) == 0
    training.report("training", list_pairs)
    generation.report("generation", list_pairs)
    conversion.report("conversion", list_pairs)


if __name__ == "__main__":
    main()
