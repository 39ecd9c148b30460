"""The fine-tuning recipes against numbers typed from their publications, not from the code.

Alpaca: its README and train.py. Vicuna: FastChat's training scripts. QLoRA: arXiv 2305.14314,
appendix B, and its scripts.
"""

from pathlib import Path

import pytest

from llama_jax.config import load_recipe
from llama_jax.data.chat_template import load_template
from llama_jax.model.lora import num_adapter_params

ALPACA_TOKENS = 229
"""mean tokens of an Alpaca record, cut at 512, with LLaMA's tokenizer (999 records)"""
CONFIGS = Path(__file__).parents[2] / "configs"
ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize(
    ("name", "seq_len", "template", "examples"),
    [("alpaca-7b", 512, "alpaca", 52_002), ("vicuna-7b", 2048, "vicuna", 70_000)],
)
def test_full_fine_tuning(name, seq_len, template, examples):
    recipe = load_recipe(CONFIGS / f"{name}.toml")
    optim, data, train = recipe.optim, recipe.data, recipe.train
    assert recipe.model.num_params == 6_738_415_616
    assert (data.seq_len, data.packing, data.loss) == (seq_len, "examples", "answers")
    assert data.template == template
    assert load_template(data.template, None)
    assert (optim.peak_lr, optim.final_fraction, optim.weight_decay) == (2e-5, 0, 0)
    assert (optim.b1, optim.b2, optim.eps, optim.max_grad_norm) == (0.9, 0.999, 1e-8, 1)
    assert train.epochs == 3
    assert train.init_from
    assert recipe.lora is None
    steps = 3 * examples / 128
    assert optim.warmup_steps == pytest.approx(0.03 * steps, abs=1)


@pytest.mark.parametrize("name", ["alpaca-7b", "lora-7b"])
def test_a_step_has_the_published_number_of_examples(name):
    """128 examples, packed into sequences that are at least 95 % full."""
    recipe = load_recipe(CONFIGS / f"{name}.toml")
    examples = 0.95 * recipe.tokens_per_step / ALPACA_TOKENS
    assert examples == pytest.approx(128, rel=0.1)


def test_lora_7b():
    recipe = load_recipe("lora-7b")
    assert recipe.lora.targets == ALL
    assert (recipe.lora.rank, recipe.lora.base) == (16, "bfloat16")
    assert num_adapter_params(recipe.model, recipe.lora) == 39_976_960
    assert recipe.optim.peak_lr == 10 * load_recipe("alpaca-7b").optim.peak_lr
    assert recipe.train.batch_size // recipe.train.gradient_accumulation == 4


def test_qlora_65b():
    recipe = load_recipe("qlora-65b")
    lora, optim, train = recipe.lora, recipe.optim, recipe.train
    assert recipe.model.num_params == 65_285_660_672
    assert (lora.rank, lora.alpha, lora.targets, lora.dropout) == (64, 16, ALL, 0.05)
    assert (lora.base, lora.rslora) == ("int4", False)
    assert (optim.peak_lr, optim.final_fraction, optim.warmup_steps) == (1e-4, 1, 0)
    assert (optim.b1, optim.b2, optim.max_grad_norm, optim.weight_decay) == (0.9, 0.999, 0.3, 0)
    assert (train.steps, train.batch_size, recipe.data.seq_len) == (1875, 16, 512)
    assert train.batch_size == train.gradient_accumulation  # one sequence at a time on the GPU


def test_lora_tiny_needs_no_download():
    recipe = load_recipe("lora-tiny")
    assert {s.path for s in recipe.data.sources.values()} == {"python:instructions"}
    assert recipe.train.init_from == load_recipe("tiny").checkpoint.dir
    assert recipe.model == load_recipe("tiny").model
