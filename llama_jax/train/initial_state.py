"""The state that a new run starts from."""

import functools

import jax
from jax.sharding import Mesh

from llama_jax.checkpoint.steps import loaded_step_note
from llama_jax.checkpoint.weights import check_weights, load_weights
from llama_jax.config import Recipe
from llama_jax.model.compute import ComputeConfig
from llama_jax.train.step import TrainState, abstract_state, init_state


def initial_state(recipe: Recipe, compute: ComputeConfig, mesh: Mesh) -> TrainState:
    """Random weights, those of ``train.init_from``, or new adapters; and a new optimizer state.

    Args:
      recipe: the run.
      compute: how the model is computed.
      mesh: devices of the run; it must be set.
    """
    abstract = abstract_state(recipe, compute, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.jit(functools.partial(init_state, recipe, compute), out_shardings=shardings)()
    if (folder := recipe.train.init_from) and not recipe.lora:
        state = state._replace(params=load_weights(folder, abstract.params))
    return state


def check_pretrained(recipe: Recipe) -> str:
    """Check the files of ``train.init_from``; returns which step is read if not the newest."""
    check_weights(recipe.train.init_from)
    return loaded_step_note(recipe.train.init_from)
