"""Small models with real tokenizers for the tests of the harness."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from flax import nnx
from model_tools import F32, small

from llama_jax.data.sentencepiece_json import to_json
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.generate.decode import Engine, next_power_of_two
from llama_jax.generate.llm import LLM
from llama_jax.generate.scores import _score_windows, _Window
from llama_jax.model.llama import Llama
from llama_jax.model.params import params_of
from llama_jax.prepare.tokenizer import train_tokenizer

TEXT = [
    "the cat sat on a mat.",
    "some animals saw 12 cats!",
    "日本 and é",
    "Question: who?\nAnswer: me",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llama_folder(folder: Path) -> Path:
    """A tokenizer like LLaMA's, which begins each text with BOS."""
    train_tokenizer([t for t in TEXT for _ in range(50)], 300, folder / "tokenizer.model")
    tree = to_json((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def chatml_folder(folder: Path) -> Path:
    """A byte-level tokenizer like SmolLM2's, which has a BOS token but does not add it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([t for t in TEXT for _ in range(50)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<|im_start|>",
        eos_token="<|im_end|>", chat_template=CHATML,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


CFG = small(vocab_size=300, context=96)


@functools.cache
def weights() -> dict:
    """Random weights of CFG whose logits differ enough to generate varied text."""
    return params_of(Llama(CFG, F32, nnx.Rngs(0), 0.3))


@functools.cache
def engine() -> Engine:
    """A model whose compiled programs all tests of a process share."""
    return Engine(CFG, weights(), F32, None)


def tiny(folder: Path, **more) -> LLM:
    """A random model with the tokenizer of a folder."""
    llm = LLM(CFG, weights(), Tokenizer.load(folder), F32, **more)
    llm._engine = engine()
    return llm


def simple_scorer(engine):
    """Scores one continuation after the other, each with its whole context."""

    def score(requests):
        for i, (context, continuation) in reversed(list(enumerate(requests))):
            inputs = [*context, *continuation][:-1]
            length = max(64, next_power_of_two(len(inputs)))
            window = _Window(0, inputs, list(continuation))
            ((logprobs, _, top),) = _score_windows(engine, [window], 1, length, 1)
            greedy = [next(iter(best)) for best in top] == list(continuation)
            yield i, float(logprobs.sum(dtype=np.float64)), greedy

    return score


def instances(kind: str, all_args: list[tuple]) -> list:
    """Requests of a task named "task"; each is a document."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, 0, ("task", i, 1)) for i, args in enumerate(all_args)]


def counted(score):
    """The scorer, and the list of all requests that it was given."""
    seen = SimpleNamespace(requests=[])

    def counting(requests):
        seen.requests += requests
        yield from score(requests)

    return counting, seen.requests
