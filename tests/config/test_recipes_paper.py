"""The recipes' and the models' numbers against tables typed from the papers, not from the code.

LLaMA: arXiv 2302.13971, sections 2.1 to 2.3, tables 1 and 2. What it does not state (feed-forward
width, vocabulary, epsilon, context) is that of the published params.json files and tokenizer.
"""

from pathlib import Path

import pytest

from llama_jax.config import (
    MODELS,
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    load_recipe,
)

CONFIGS = Path(__file__).parents[2] / "configs"
M = 10**6

# Table 2, and the exact parameters that its sizes make.
#      dim heads layers peak lr  batch  tokens   ffn    eps     parameters
LLAMA = {
    "7b": (4096, 32, 32, 3.0e-4, 4 * M, 1.0e12, 11008, 1e-6, 6_738_415_616),
    "13b": (5120, 40, 40, 3.0e-4, 4 * M, 1.0e12, 13824, 1e-6, 13_015_864_320),
    "33b": (6656, 52, 60, 1.5e-4, 4 * M, 1.4e12, 17920, 1e-6, 32_528_943_616),
    "65b": (8192, 64, 80, 1.5e-4, 4 * M, 1.4e12, 22016, 1e-5, 65_285_660_672),
}
# Table 1: sampling proportions in percent.
MIXTURE = {
    "commoncrawl": 67.0,
    "c4": 15.0,
    "github": 4.5,
    "wikipedia": 4.5,
    "books": 4.5,
    "arxiv": 2.5,
    "stackexchange": 2.0,
}
# What the recipes choose: microbatches and recomputation per device kind.
MEMORY = {
    ("7b", "tpu"): (1, "auto"),
    ("7b", "gpu"): (8, "matmuls"),
    ("13b", "tpu"): (1, "auto"),
    ("13b", "gpu"): (4, "full"),
    ("33b", "tpu"): (1, "auto"),
    ("33b", "gpu"): (4, "full"),
    ("65b", "tpu"): (1, "auto"),
    ("65b", "gpu"): (4, "full"),
}
RECIPES = list(MEMORY)

# The published models: vocabulary, dim, layers, heads, key/value heads, ffn, eps, theta, context,
# factor of the rotary scaling, tied embedding.
PUBLISHED = {
    "llama-7b": (32000, 4096, 32, 32, 32, 11008, 1e-6, 1e4, 2048, None, False),
    "llama-13b": (32000, 5120, 40, 40, 40, 13824, 1e-6, 1e4, 2048, None, False),
    "llama-33b": (32000, 6656, 60, 52, 52, 17920, 1e-6, 1e4, 2048, None, False),
    "llama-65b": (32000, 8192, 80, 64, 64, 22016, 1e-5, 1e4, 2048, None, False),
    "llama2-7b": (32000, 4096, 32, 32, 32, 11008, 1e-5, 1e4, 4096, None, False),
    "llama2-13b": (32000, 5120, 40, 40, 40, 13824, 1e-5, 1e4, 4096, None, False),
    "llama2-70b": (32000, 8192, 80, 64, 8, 28672, 1e-5, 1e4, 4096, None, False),
    "llama3-8b": (128256, 4096, 32, 32, 8, 14336, 1e-5, 5e5, 8192, None, False),
    "llama3-70b": (128256, 8192, 80, 64, 8, 28672, 1e-5, 5e5, 8192, None, False),
    "llama3.1-8b": (128256, 4096, 32, 32, 8, 14336, 1e-5, 5e5, 131072, 8.0, False),
    "llama3.1-70b": (128256, 8192, 80, 64, 8, 28672, 1e-5, 5e5, 131072, 8.0, False),
    "llama3.1-405b": (128256, 16384, 126, 128, 8, 53248, 1e-5, 5e5, 131072, 8.0, False),
    "llama3.2-1b": (128256, 2048, 16, 32, 8, 8192, 1e-5, 5e5, 131072, 32.0, True),
    "llama3.2-3b": (128256, 3072, 28, 24, 8, 8192, 1e-5, 5e5, 131072, 32.0, True),
}
# How Meta's reference code derives the width of the feed-forward: multiple_of, ffn_dim_multiplier.
WIDTH = {
    "llama-7b": (256, None),
    "llama-13b": (256, None),
    "llama-33b": (256, None),
    "llama-65b": (256, None),
    "llama2-7b": (256, None),
    "llama2-13b": (256, None),
    "llama2-70b": (4096, 1.3),
    "llama3-8b": (1024, 1.3),
    "llama3-70b": (4096, 1.3),
    "llama3.2-1b": (256, 1.5),
    "llama3.2-3b": (256, 1.0),
}


def test_every_size_has_its_recipes():
    found = {path.stem for path in CONFIGS.glob("llama-*.toml")}
    assert {f"llama-{size}-{kind}" for size, kind in RECIPES} <= found


@pytest.mark.parametrize(("size", "kind"), RECIPES)
def test_the_papers_numbers(size, kind):
    dim, heads, layers, peak_lr, batch, tokens, ffn, eps, params = LLAMA[size]
    recipe = load_recipe(CONFIGS / f"llama-{size}-{kind}.toml")
    model, optim, train = recipe.model, recipe.optim, recipe.train
    assert (model.dim, model.num_heads, model.num_layers, model.ffn_dim) == (
        dim,
        heads,
        layers,
        ffn,
    )
    assert (model.num_kv_heads, model.head_dim, model.vocab_size) == (heads, 128, 32000)
    assert (model.norm_eps, model.rope.theta, model.rope.type) == (eps, 1e4, "default")
    assert model.num_params == params
    assert not model.tie_embeddings
    # Section 2.2: AdamW with a cosine that ends at a tenth of the peak.
    assert optim.peak_lr == peak_lr
    assert (optim.b1, optim.b2, optim.weight_decay, optim.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (optim.warmup_steps, optim.final_fraction, optim.eps) == (2000, 0.1, 1e-8)
    assert optim.decay == "matrices"
    # "4M" is 2048 sequences of 2048 tokens, 4,194,304; enough steps for the tokens, and no more.
    assert recipe.data.seq_len == model.context == 2048
    seen = train.batch_size * recipe.data.seq_len
    assert batch < seen == 2**22 < 1.05 * batch
    assert 0 <= train.steps * seen - tokens < seen
    # Section 2.1.
    assert {n: s.weight for n, s in recipe.data.sources.items()} == MIXTURE
    assert sum(MIXTURE.values()) == 100
    assert recipe.data.packing == "concat"


@pytest.mark.parametrize(("size", "kind"), RECIPES)
def test_settings_that_are_not_the_papers(size, kind):
    recipe = load_recipe(CONFIGS / f"llama-{size}-{kind}.toml")
    train = recipe.train
    assert (train.gradient_accumulation, train.remat) == MEMORY[size, kind]
    assert recipe.mesh == MeshConfig(preset="fsdp")
    assert recipe.checkpoint == CheckpointConfig(
        dir=f"checkpoints/llama-{size}", save_every="30min", keep=3
    )
    assert recipe.data == DataConfig(
        tokenizer="tokenizer.model",
        seq_len=2048,
        sources={
            name: SourceConfig(path=f"data/{name}", weight=weight)
            for name, weight in MIXTURE.items()
        },
    )
    assert list(recipe.data.sources) == list(MIXTURE)
    rest = dict(steps=train.steps, gradient_accumulation=train.gradient_accumulation)
    chunk = 8192 if kind == "tpu" else 2048
    rest |= dict(loss_chunk=chunk, hang_factor=20, remat=train.remat)
    assert train == TrainConfig(batch_size=2048, eval_every=5000, **rest)


def test_defaults_are_the_papers():
    optim = OptimConfig()
    assert (optim.b1, optim.b2, optim.weight_decay, optim.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (optim.warmup_steps, optim.final_fraction, optim.eps) == (2000, 0.1, 1e-8)
    assert (optim.peak_lr, optim.decay) == (3e-4, "matrices")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    vocabulary, dim, layers, heads, kv_heads, ffn, eps, theta, context, factor, tied = PUBLISHED[
        name
    ]
    model = MODELS[name]
    assert (model.vocab_size, model.dim, model.num_layers) == (vocabulary, dim, layers)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (heads, kv_heads, dim // heads)
    assert (model.ffn_dim, model.norm_eps, model.context) == (ffn, eps, context)
    assert (model.rope.theta, model.rope.factor, model.tie_embeddings) == (theta, factor, tied)
    assert model.rope.type == ("llama3" if factor else "default")
    if factor:
        rope = model.rope
        scaling = rope.low_freq_factor, rope.high_freq_factor, rope.original_context
        assert scaling == (1.0, 4.0, 8192)
    if name in WIDTH:
        multiple, multiplier = WIDTH[name]
        width = int(2 * (4 * dim) / 3)
        width = int(multiplier * width) if multiplier else width
        assert -(-width // multiple) * multiple == ffn


def test_every_published_model_is_in_the_table():
    assert PUBLISHED.keys() == {name for name in MODELS if name.startswith("llama")}
