"""Settings: of a model (:mod:`.model_config`) and of a run (:mod:`.recipe`)."""

from llama_jax.config.model_config import MODELS, ModelConfig, RopeConfig
from llama_jax.config.recipe import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimConfig,
    Recipe,
    SourceConfig,
    TrainConfig,
    check_model,
    check_recipe,
    load_recipe,
    load_saved_recipe,
    settings,
    to_dict,
    to_toml,
)

__all__ = [
    "MODELS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "RopeConfig",
    "SourceConfig",
    "TrainConfig",
    "check_model",
    "check_recipe",
    "load_recipe",
    "load_saved_recipe",
    "settings",
    "to_dict",
    "to_toml",
]
