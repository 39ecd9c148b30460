"""The optimizer: AdamW with clipping, linear warm-up and a cosine, as in the paper's section 2.2.

In: :class:`~llama_jax.config.OptimConfig` and the number of steps. Out: an optax transformation and
its schedule.
"""

from typing import Any

import jax
import optax

from llama_jax.config import OptimConfig


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of the update number ``count`` (from 0).

    Linear to the peak over the warm-up, then a cosine that reaches ``final_fraction`` of it at
    ``steps``.
    """
    warmup = min(cfg.warmup_steps, steps)
    cosine = optax.cosine_decay_schedule(cfg.peak_lr, max(steps - warmup, 1), cfg.final_fraction)
    # The first update is not lost on a rate of zero: update i of the warm-up has
    # (i + 1) / warmup of the peak.
    ramp = lambda count: cfg.peak_lr * (count + 1) / max(warmup, 1)
    return optax.join_schedules([ramp, cosine], [warmup])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """clip by global norm -> Adam moments -> decoupled weight decay -> learning rate."""
    mask = decays if cfg.decay == "matrices" else None
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=mask),
        optax.scale_by_learning_rate(make_schedule(cfg, steps)),
    )


def decays(params: Any) -> Any:
    """True for matrices, False for the norms' scales, by name: stacked scales have two axes too."""
    return jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].key, params)
