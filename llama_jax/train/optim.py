"""The optimizer: AdamW (the paper's section 2.2) or Muon, and its learning-rate schedule."""

import math
from typing import Any

import jax
import optax
import optax.contrib

from llama_jax.config import OptimConfig
from llama_jax.model.sharding import no_mesh


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of earlier updates.

    It rises linearly to the peak during the warm-up. Then it follows a cosine, or it is constant
    and falls linearly at the end; both reach ``final_fraction`` of the peak at ``steps``.
    """
    warmup = min(cfg.warmup_steps, steps)
    # The first update has peak / warmup and not zero, which would waste it.
    ramp = lambda count: cfg.peak_lr * (count + 1) / max(warmup, 1)
    left = steps - warmup
    if cfg.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(cfg.peak_lr, max(left, 1), cfg.final_fraction)
        return optax.join_schedules([ramp, cosine], [warmup])
    decay = min(math.ceil(cfg.decay_fraction * steps), left)
    linear = optax.linear_schedule(cfg.peak_lr, cfg.final_fraction * cfg.peak_lr, max(decay, 1))
    stable = optax.constant_schedule(cfg.peak_lr)
    return optax.join_schedules([ramp, stable, linear], [warmup, steps - decay])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm -> Adam moments or Muon -> decoupled weight decay -> learning rate."""
    mask = decays if cfg.decay == "matrices" else None
    direction = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)
    if cfg.algorithm == "muon":
        direction = optax.partition({"muon": _muon(), "adam": direction}, _algorithms)
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(cfg.weight_decay, mask=mask),
        optax.scale_by_learning_rate(make_schedule(cfg, steps)),
    )


def decays(params: Any) -> Any:
    """True for matrices, False for the scales of norms.

    By name: the scales of stacked layers have two axes, as matrices do.
    """
    return jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].key, params)


def cast_matrices(tree: Any, dtype: str) -> Any:
    """Matrices, or moments of matrices, in another dtype; norms and counters keep theirs."""

    def cast(path, x):
        is_matrix = x.ndim > 1 and "norm" not in path[-1].key
        return x.astype(dtype) if is_matrix else x

    return jax.tree.map_with_path(cast, tree)


def _algorithms(params: Any) -> Any:
    """ "muon" for the matrices of the layers; "adam" for norms, embedding and output matrix.

    By name, because stacked matrices have three axes and stacked norms two.
    """
    label = lambda path, _: (
        "muon" if path[0].key == "blocks" and "norm" not in path[-1].key else "adam"
    )
    return jax.tree.map_with_path(label, params)


def _muon() -> optax.GradientTransformation:
    """Orthogonalized momentum of each matrix [..., in, out], scaled to the usual size of Adam's
    updates (root mean square 0.2, arXiv 2502.16982), so that ``peak_lr`` keeps its meaning."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    matrices = lambda params: jax.tree.map(lambda _: matrix, params)
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=matrices)
    scale = lambda x: 0.2 * math.sqrt(max(x.shape[-2:])) * x

    def update(updates, state, params=None):
        run = muon.update
        if not no_mesh():  # optax's products leave the sharding to XLA
            out = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
            run = jax.sharding.auto_axes(run, out_sharding=out)
        updates, state = run(updates, state)
        return jax.tree.map(scale, updates), state

    return optax.GradientTransformation(muon.init, update)
