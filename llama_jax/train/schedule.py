"""The number of steps of a run, and its learning rate when it continues with another one."""

import math

from llama_jax.config import Recipe, check_recipe, to_dict
from llama_jax.data.mixture import TrainData
from llama_jax.train.optim import make_schedule
from llama_jax.train.run_folder import SavedRun


def with_steps(recipe: Recipe, sequences_per_epoch: float) -> tuple[Recipe, str]:
    """The recipe with train.steps in place of train.epochs, and the log line about it."""
    train = recipe.train
    if train.steps:
        return recipe, ""
    assert train.epochs
    steps = max(1, math.ceil(train.epochs * sequences_per_epoch / train.batch_size - 1e-9))
    line = (
        f"{train.epochs:g} epochs of {sequences_per_epoch:,} sequences are {steps:,} steps of "
        f"{train.batch_size} sequences"
    )
    tree = to_dict(recipe)
    tree["train"] |= {"steps": steps, "epochs": None}
    return check_recipe(tree, f"train.epochs={train.epochs:g}"), line


def schedule_change(saved: SavedRun, recipe: Recipe, step: int, data: TrainData) -> str:
    """The log line about the learning rate of a continued run; "" if its schedule is the same.

    Args:
      saved: the run that is continued.
      recipe: the current settings, with train.steps.
      step: the step from which it continues.
      data: the training data.
    """
    if not {"train.steps", "train.epochs", "optim.peak_lr"} & saved.changes.keys():
        return ""
    old = with_steps(saved.recipe, data.sequences_per_epoch)[0]
    before, now = (float(make_schedule(r.optim, r.train.steps or 0)(step)) for r in (old, recipe))
    return (
        f"the learning rate follows the schedule of all {recipe.train.steps} steps: {now:.2e} "
        f"after step {step}, {before:.2e} by the old settings"
    )
