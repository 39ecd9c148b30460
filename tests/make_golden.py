"""Logits and gradients of transformers' LlamaForCausalLM over the grid, for machines without torch.

The weights come from a seed, so the file holds samples of the results only. Run after a change of
the grid:

    JAX_PLATFORMS=cpu PYTHONPATH=. python tests/make_golden.py
"""

from pathlib import Path

import model_tools as tools
import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "logits.npz"
SAMPLES = 96


def sample(x: np.ndarray) -> np.ndarray:
    """The same entries of an array of this size every time."""
    return x.reshape(-1)[np.random.default_rng(x.size).integers(0, x.size, SAMPLES)]


def main() -> None:
    """Write the golden file."""
    out = {}
    for case, (cfg, batch, length) in tools.GRID.items():
        logits, grads = tools.hf_run(cfg, batch, length)
        out[f"{case}/range"] = np.array([logits.min(), logits.max()])
        out[f"{case}/logits"] = sample(logits)
        out[f"{case}/grads"] = np.stack([sample(grads[name]) for name in sorted(grads)])
        out[f"{case}/norms"] = np.array([np.linalg.norm(grads[name]) for name in sorted(grads)])
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **out)


if __name__ == "__main__":
    main()
