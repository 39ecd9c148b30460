"""The optimizer: AdamW with clipping, linear warm-up and cosine decay (the paper's section 2.2)."""

from typing import Any

import jax
import optax

from llama_jax.config import OptimConfig


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of earlier updates.

    It rises linearly to the peak during the warm-up, then follows a cosine that reaches
    ``final_fraction`` of the peak at ``steps``.
    """
    warmup = min(cfg.warmup_steps, steps)
    cosine = optax.cosine_decay_schedule(cfg.peak_lr, max(steps - warmup, 1), cfg.final_fraction)
    # The first update has peak / warmup and not zero, which would waste it.
    ramp = lambda count: cfg.peak_lr * (count + 1) / max(warmup, 1)
    return optax.join_schedules([ramp, cosine], [warmup])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm -> Adam moments -> decoupled weight decay -> learning rate."""
    mask = decays if cfg.decay == "matrices" else None
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=mask),
        optax.scale_by_learning_rate(make_schedule(cfg, steps)),
    )


def decays(params: Any) -> Any:
    """True for matrices, False for the scales of norms.

    By name: the scales of stacked layers have two axes, as matrices do.
    """
    return jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].key, params)
