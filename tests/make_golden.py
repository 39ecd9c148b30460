"""Logits and gradients of transformers' LlamaForCausalLM over the grid, for machines without torch.

The weights come from a seed, so the file holds only samples of the results. Run it after a change
of the grid:

    JAX_PLATFORMS=cpu PYTHONPATH=. python tests/make_golden.py
"""

from pathlib import Path

import model_tools as tools
import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "logits.npz"
SAMPLES = 96


def sample(x: np.ndarray) -> np.ndarray:
    """A fixed sample of the entries of an array."""
    return x.reshape(-1)[np.random.default_rng(x.size).integers(0, x.size, SAMPLES)]


def golden_of(case: str) -> dict[str, np.ndarray]:
    """The entry of the golden file for one case of the grid."""
    logits, grads = tools.hf_run(*tools.GRID[case])
    names = sorted(grads)
    return {
        f"{case}/range": np.array([logits.min(), logits.max()]),
        f"{case}/logits": sample(logits),
        f"{case}/grads": np.stack([sample(grads[name]) for name in names]),
        f"{case}/norms": np.array([np.linalg.norm(grads[name]) for name in names]),
    }


def main() -> None:
    """Writes the golden file."""
    GOLDEN.parent.mkdir(exist_ok=True)
    out: dict[str, np.ndarray] = {}
    for case in tools.GRID:
        out |= golden_of(case)
    np.savez_compressed(GOLDEN, **out)


if __name__ == "__main__":
    main()
