"""llama.cpp (the package xllamacpp) reads what is written here: same ids, same next tokens."""

import json
import urllib.request

import convert_tools as tools
import numpy as np
import pytest
import tiktoken_tools
from convert_tools import DTYPES, STORIES, small
from test_tokenizer import english

import llama_jax
from llama_jax.config import RopeConfig
from llama_jax.convert.huggingface import make_config
from llama_jax.convert.job import convert, open_folder
from llama_jax.convert.logits import _our_logits
from llama_jax.convert.sources import SourceCheckpoint
from llama_jax.data import tiktoken_text
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare.tokenizer import train_tokenizer

xllamacpp = pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

TEXTS = [
    "the cat sat on 12 mats", "  two   spaces", "12345 dogs, 6 cats.", "a\r\nb \xa0 c", "   7",
    "l'été naïve 漢字 😀👩\u200d👩\u200d👧 \u200b", "def f(x):\n    return x + 1\n\n\n", "x²³ Ⅷ",
    "they're I'LL 'Thawed'\t!", "<|eot_id|> </s>", "", " ",
]  # fmt: skip


PLAIN = RopeConfig()


class LlamaCpp:
    """A model in llama.cpp's server, which runs in this process on a free port."""

    def __init__(self, path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port, params.verbosity = 512, 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.n_threads_http, params.warmup, params.fit_params = 1, False, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        kinds = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str, bos: bool = False) -> list[int]:
        answer = self.post("/tokenize", content=text, add_special=bos, parse_special=False)
        return answer["tokens"]

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
        """The next tokens, and log-probabilities of the most probable first ones by id."""
        answer = self.post(
            "/completion", prompt=ids, n_predict=count, temperature=0, top_k=1, n_probs=20,
            return_tokens=True, cache_prompt=False,
        )  # fmt: skip
        top = answer["completion_probabilities"][0]["top_logprobs"]
        return answer["tokens"], {t["id"]: t["logprob"] for t in top}


def spm(folder):
    train_tokenizer(english(200), 330, folder / "tokenizer.model")


def llama3(folder):
    (folder / "tokenizer.model").write_bytes(tiktoken_tools.content())


def smollm(folder):
    """Byte-level BPE with single digits, as SmolLM2's tokenizer.json."""
    tree = tiktoken_text.to_json(tiktoken_tools.ranks(), newer=True)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    tree["model"]["ignore_merges"], tree["post_processor"] = False, None
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def make_model(folder, tokenizer, rope=PLAIN, **sizes):
    """A Hugging Face folder with random weights, whose next tokens are all ASCII."""
    folder.mkdir()
    tokenizer(folder)
    known = Tokenizer.load(folder)
    rows = known.vocab_size + 3  # rows without a token
    cfg = small(
        vocab_size=rows, dim=64, head_dim=16, num_heads=4, num_kv_heads=2, ffn_dim=96, rope=rope,
        context=512, **sizes,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    make = lambda shape, dtype, _: (rng.standard_normal(shape) * (0.15 if len(shape) > 1 else 1)
        ).astype(dtype)  # fmt: skip
    state = tools.meta_state(cfg, DTYPES["float32"], make=make)
    output = state["tok_embeddings.weight" if cfg.tie_embeddings else "output.weight"]
    for i in range(known.vocab_size):  # the server holds back parts of characters
        if not known.decode([i]).isascii() or known.decode([i]) == "":
            output[i] = 0
    tools.save_safetensors(folder / "model.safetensors", tools.hf_state(state, cfg))
    (folder / "config.json").write_text(json.dumps(make_config(cfg, "float32", {"eos": 2})))
    return folder


def compare(ours: SourceCheckpoint, runs: list[tuple], count: int) -> list[int]:
    """Compare next tokens, and the log-probabilities of the first one, in one forward pass.

    Args:
      ours: the weights with which we compute, in float32.
      runs: a model in llama.cpp, token ids of a prompt, and the bound on the differences of
        log-probabilities.
      count: number of next tokens.

    Returns:
      Of each run, the number of tokens before the first one whose lead over the second is below
      twice the bound; all of them were compared.
    """
    answers = [theirs.greedy(prompt, count) for theirs, prompt, _ in runs]
    rows = [prompt + tokens for (_, prompt, _), (tokens, _) in zip(runs, answers, strict=True)]
    ids = np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    all_logits = _our_logits(ours, ours.cfg, ours.dtypes(), ids, positions)
    out = []
    for (_, prompt, bound), (tokens, top), row in zip(runs, answers, all_logits, strict=True):
        logits = row[len(prompt) - 1 :][: len(tokens)].astype(np.float64)
        second, first = np.sort(logits)[:, -2:].T
        sure = next((i for i, lead in enumerate(first - second) if lead < 2 * bound), len(tokens))
        assert tokens[:sure] == logits.argmax(-1)[:sure].tolist()
        logprobs = logits[0] - np.log(np.exp(logits[0]).sum())
        errors = [abs(logprobs[i] - theirs) for i, theirs in top.items()]
        assert len(errors) == 20
        assert max(errors) < bound, errors
        out.append(sure)
    return out


@pytest.mark.parametrize("tokenizer", [spm, llama3, smollm], ids=lambda t: t.__name__)
def test_llama_cpp_gives_our_ids_and_our_next_tokens(tmp_path, tokenizer):
    source = make_model(tmp_path / "hf", tokenizer)
    half = open_folder(convert(source, tmp_path / "half", to="hf", dtype="float16"))
    known = Tokenizer.load(half.path)
    prompts = [known.encode(t) for t in ("the cat sat on 12 mats", "then thawed", "dogs, 6")]
    runs = []
    # llama.cpp rounds activations to the type of the weights: float16, and blocks of 8 bits.
    for kind, bound in (("f16", 0.01), ("q8_0", 0.3)):
        path = convert(source, tmp_path / f"{kind}.gguf", to="gguf", type=kind)
        theirs = LlamaCpp(path)
        runs += [(theirs, prompt, bound) for prompt in prompts]
    sure = compare(half, runs, 8)
    assert sum(sure[: len(prompts)]) >= 12
    for text in TEXTS:
        assert theirs.tokenize(text) == known.encode(text), text
    read = Tokenizer.load(convert(path, tmp_path / "read", dtype="bfloat16"))
    for text in TEXTS:
        assert read.encode(text) == known.encode(text), text
    first = theirs.tokenize("the", bos=True)[0]
    assert (first == known.bos_id) == (tokenizer is not smollm)


ROPES = {
    "linear": RopeConfig(type="linear", factor=4.0),
    "yarn": RopeConfig(type="yarn", factor=8.0, original_context=64),
    "yarn_attention": RopeConfig(
        type="yarn", factor=8.0, original_context=64, attention_factor=1.5, beta_fast=16.0
    ),
    "llama3": RopeConfig(
        type="llama3", factor=8.0, original_context=64, low_freq_factor=1.0, high_freq_factor=4.0
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_llama_cpp_scales_rotary_frequencies_as_we_do(tmp_path, name):
    source = make_model(tmp_path / "hf", smollm, ROPES[name], tie_embeddings=True)
    path = convert(source, tmp_path / "m.gguf", to="gguf", type="f32")
    prompt = np.random.default_rng(1).integers(0, 290, 300).tolist()
    (sure,) = compare(open_folder(path), [(LlamaCpp(path), prompt, 1e-3)], 8)
    assert sure >= 4
    assert open_folder(path).cfg == open_folder(source).cfg


@pytest.mark.skipif(not STORIES.exists(), reason="the published model stories260k is not here")
def test_llama_cpp_tells_the_story_that_we_generate(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = convert(STORIES / "hf-mha", tmp_path / "half", dtype="float16")
    llm = llama_jax.load(source)
    prompt = llm.encode("Once upon a time")
    story = list(llm.generate(prompt, max_new_tokens=30, logprobs=True).ids)
    runs = []
    for kind, bound in (("f16", 0.02), ("q8_0", 0.4)):
        path = convert(STORIES / "hf-mha", tmp_path / f"{kind}.gguf", to="gguf", type=kind)
        theirs = LlamaCpp(path)
        runs.append((theirs, prompt, bound))
        assert theirs.greedy(prompt, 30)[0][:5] == story[:5]
    f16, q8_0 = compare(open_folder(source), runs, 30)
    assert f16 == 30
    assert q8_0 >= 5
    assert runs[0][0].greedy(prompt, 30)[0] == story
    assert theirs.tokenize("Once upon a  time", True) == llm.encode("Once upon a  time")
