"""Settings of a model (:mod:`.model_config`) and of a run (:mod:`.recipe`)."""

from llama_jax.config.help import SettingsHelp, help_text, settings
from llama_jax.config.loading import (
    ConfigError,
    check_model,
    check_recipe,
    load_recipe,
    load_saved_recipe,
    load_settings,
    recipe_names,
    recipes_folder,
    to_dict,
    to_toml,
)
from llama_jax.config.model_config import MODELS, ModelConfig, RopeConfig
from llama_jax.config.recipe import (
    CheckpointConfig,
    DataConfig,
    DpoConfig,
    EvaluateConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    Recipe,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "MODELS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DpoConfig",
    "EvaluateConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "RopeConfig",
    "SettingsHelp",
    "SourceConfig",
    "TrainConfig",
    "check_model",
    "check_recipe",
    "help_text",
    "load_recipe",
    "load_saved_recipe",
    "load_settings",
    "recipe_names",
    "recipes_folder",
    "settings",
    "to_dict",
    "to_toml",
]
