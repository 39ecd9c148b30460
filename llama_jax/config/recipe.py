"""The settings of a training run: one frozen, checked dataclass per section of a recipe.

The string below a field is its help text; see ``python -m llama_jax.train --help``.
"""

import os
from typing import Annotated, Literal, get_args

from pydantic import Field

from llama_jax.config.activations import Remat, RematNames
from llama_jax.config.model_config import ModelConfig, Positive, checked
from llama_jax.config.values import (
    Beta,
    Fraction,
    LocalPath,
    NonNegative,
    RequiredPath,
    SaveEvery,
    Seed,
    StepRange,
    StoredPath,
)
from llama_jax.storage.paths import is_remote

MAX_STEP_TOKENS = 2**28
"""Maximum number of tokens per optimizer step; the largest published batches have 16 million."""

SourceFormat = Literal[
    "auto", "text", "alpaca", "sharegpt", "prompt_response", "messages", "preference"
]


@checked
class SourceConfig:
    """One text source of the mixture.

    Example::

      SourceConfig(path="python:code", weight=0.8)
    """

    path: RequiredPath
    """text or conversations (folder, .txt, .json, .jsonl[.gz|.zst], .parquet), a folder written by
    `python -m llama_jax.prepare` (also gs://... or s3://...), or `python:code` / `python:prose` /
    `python:instructions` (Python's own standard library)"""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """sampling weight: share of the training tokens, relative to the other sources"""
    format: SourceFormat = "auto"
    """how a record states a text, a conversation or a preference pair; auto: the first record
    decides"""


@checked
class DataConfig:
    """Text sources, tokenizer and batches.

    Example::

      DataConfig(sources={"code": SourceConfig(path="python:code")}, seq_len=256)
    """

    sources: dict[str, SourceConfig]
    """the mixture: one table [data.sources.NAME] with path and weight per source"""
    tokenizer: StoredPath = ""
    """SentencePiece, tokenizer.json or tiktoken file; empty: train.init_from's, or a new one"""
    seq_len: Positive
    """T, tokens per training sequence"""
    packing: Literal["concat", "segments", "examples"] = "concat"
    """concat: attention crosses document boundaries, as in LLaMA; segments: it does not; examples:
    nor do examples cross sequences, each is whole in one (required for conversations)"""
    long_examples: Literal["cut", "drop"] = "cut"
    """conversations longer than T with packing=examples: cut from the right, or dropped"""
    template: str = ""
    """chat template of conversations: alpaca, vicuna, gpt4all, chatml, llama2, llama3, or a .jinja
    file; empty: that of train.init_from"""
    loss: Literal["answers", "all"] = "answers"
    """tokens of conversations in the loss: answers with their end-of-turn token, or all"""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """fraction of documents kept for validation (prepared folders have their own split)"""
    seed: Seed = 0
    """seed of the order of the training sequences"""
    skip_batches: tuple[StepRange, ...] = ()
    """training batches to skip after a non-finite loss: [[first, last], ...], counted from 1"""
    prepared: StoredPath = ""
    """folder for the token shards of raw sources; empty: `data` inside the run folder"""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """tokenizer threads; 0: one per CPU core"""
    skip_bad_lines: bool = False
    """skip and count lines that are not valid JSON or have no text; false: raise an error"""

    @property
    def has_segments(self) -> bool:
        """Whether attention stays inside each document, so that batches have segment ids."""
        return self.packing != "concat"

    def __post_init__(self):
        if not self.sources:
            raise ValueError(
                "data.sources is empty; give at least one text source, as "
                "data.sources.NAME.path=PATH (or [data.sources.NAME] in the recipe)"
            )
        name_of: dict[str, str] = {}
        for name, source in self.sources.items():
            path = source.path
            named = path.startswith("python:") or is_remote(path)
            key = path.rstrip("/") if named else os.path.realpath(path)
            if key in name_of:
                raise ValueError(
                    f"data.sources.{name}.path={path!r} is the text of data.sources.{name_of[key]} "
                    "too; name it once, with the sum of the weights"
                )
            name_of[key] = name


@checked
class MeshConfig:
    """Device mesh and sharding.

    Example::

      MeshConfig(preset="fsdp_tensor", fsdp=1, tensor=-1)
    """

    preset: Literal["fsdp", "fsdp_tensor", "tensor_sequence"] = "fsdp"
    """shards weights (fsdp), heads and widths too (fsdp_tensor), positions too (tensor_sequence)"""
    data: int = 1
    """devices along `data`: data parallelism, each with a full copy of the weights"""
    fsdp: int = -1
    """devices along `fsdp`: weights sharded, gathered when used; -1: all remaining devices"""
    tensor: int = 1
    """devices along `tensor`: heads and feed-forward width are sharded"""
    context: int = 1
    """devices along `context`: sequence positions are sharded"""


@checked
class OptimConfig:
    """The optimizer and its learning-rate schedule; the defaults are the paper's (section 2.2).

    Example::

      OptimConfig(peak_lr=3e-4, warmup_steps=2000)
    """

    peak_lr: Annotated[float, Field(gt=0)] = 3e-4
    """peak learning rate"""
    warmup_steps: NonNegative = 2000
    """steps of linear warm-up; the first update is at peak_lr / warmup_steps"""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """after the warm-up: cosine decay, or warm-up-stable-decay: constant, then linear decay"""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """wsd: fraction of the steps in the decay"""
    final_fraction: Fraction = 0.1
    """the decay ends at this fraction of peak_lr"""
    algorithm: Literal["adamw", "muon"] = "adamw"
    """muon: the layers' matrices by Muon, with updates as large as AdamW's; others by AdamW"""
    b1: Beta = 0.9
    """AdamW beta 1"""
    b2: Beta = 0.95
    """AdamW beta 2"""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW epsilon (not given in the paper)"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """decoupled weight decay"""
    decay: Literal["matrices", "all"] = "matrices"
    """weights that decay: matrices (all but the norms), or all"""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """gradients are clipped to this global norm; 0: no clipping"""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """storage of the moments of matrices; bfloat16: half the memory, rounded stochastically"""
    skip_spikes: Annotated[float, Field(ge=0)] = 0.0
    """skip updates whose gradient norm is over this multiple of the recent median; 0: never"""


Tracker = Literal["wandb", "mlflow"]


@checked
class EvaluateConfig:
    """Benchmarks of lm-evaluation-harness during training, on the weights in memory.

    Example::

      EvaluateConfig(tasks=("piqa", "paper_boolq"), every=1000, limit=200)
    """

    tasks: tuple[str, ...]
    """tasks and task sets of this project and of the harness; only those that compare
    log-likelihoods"""
    every: Positive
    """steps between evaluations; there is one at the end too"""
    limit: Positive = 100
    """questions of each task; training waits while they are answered"""
    data: LocalPath = ""
    """folder of local data, as for `llama-jax evaluate`; empty: tasks download their data"""

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("train.evaluate.tasks is empty; name at least one task")


@checked
class TrainConfig:
    """Training loop.

    Example::

      TrainConfig(steps=100, batch_size=8)
    """

    steps: Positive | None = None
    """number of optimizer steps; or give train.epochs"""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """passes over the training sequences of all sources, instead of train.steps"""
    batch_size: Positive
    """B, sequences per optimizer step, over all devices and microbatches"""
    gradient_accumulation: Positive = 1
    """microbatches per optimizer step, computed one after the other"""
    seed: Seed = 0
    """seed of the initial weights"""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """standard deviation of the initial matrices (attention and MLP outputs: / sqrt(2 L))"""
    init_from: StoredPath = ""
    """checkpoint to fine-tune: its weights, tokenizer and chat template; empty: random weights"""
    allow_other_tokenizer: bool = False
    """allow a data.tokenizer that differs from train.init_from's: token ids change meaning"""
    restart_from: NonNegative = 0
    """restart once from the checkpoint of this step and move newer ones away; 0: the newest"""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of activations and matmuls; auto: bfloat16 on TPU and GPU, float32 on CPU"""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """storage of matrices and their gradients; bfloat16: half the memory, rounded stochastically"""
    reduce_dtype: Literal["compute", "float32"] = "compute"
    """dtype of gradient sums over devices: that of train.compute_dtype (compute), or float32"""
    remat: Remat = "none"
    """recompute in the backward pass nothing (none), all but matmul outputs (matmuls, as the paper)
    or all (full); or keep a list of q, k, v, attention, o, gate, up, down; auto: those that fit"""
    offload: RematNames = ()
    """activations to keep in the host's memory instead, a list of the same names (TPU, GPU)"""
    unroll: bool = False
    """unroll the layers instead of a scan: faster steps on a CPU, slower compilation"""
    z_loss: Annotated[float, Field(ge=0, le=1)] = 0.0
    """weight of the mean of log(sum of exp(logits))^2, added to the loss (PaLM: 1e-4)"""
    loss_chunk: NonNegative = 0
    """tokens per device whose logits are in memory at once; 0: all"""
    attention: str = ""
    """implementation of pallas_kernels.rotary_attention; empty: the fastest for the platform"""
    log_every: Positive = 10
    """steps between log lines"""
    eval_every: NonNegative = 0
    """steps between evaluations on the validation text; 0: only at the end"""
    eval_batches: Positive = 16
    """maximum number of validation batches per source and evaluation"""
    early_stopping: NonNegative = 0
    """end the run after this many evaluations without a better validation loss; 0: never"""
    evaluate: EvaluateConfig | None = None
    """benchmarks during training: {tasks, every, limit, data}"""
    hang_factor: Annotated[float, Field(ge=0)] = 0.0
    """end the run if a step takes this many times the usual time, and over a minute; 0: never"""
    trackers: tuple[Tracker, ...] = ()
    """trackers beside TensorBoard: wandb, mlflow; the run goes on without one that fails"""
    profile_steps: StepRange | None = None
    """[first, last] steps to profile (for TensorBoard or Perfetto)"""
    sample_prompts: tuple[str, ...] = ()
    """prompts that the model continues at the end of the run"""

    def __post_init__(self):
        if self.steps is None and self.epochs is None:
            raise ValueError("setting train.steps is missing; give it, or train.epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} both set the length of "
                "the run; give one of them"
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"train.trackers={list(self.trackers)} must name each tracker once")
        if self.offload and self.remat == "none":
            raise ValueError(
                f"train.offload={list(self.offload)} has no effect with train.remat=none; choose "
                "full, auto or a list of names"
            )
        if self.early_stopping and not self.eval_every:
            raise ValueError(
                f"train.early_stopping={self.early_stopping} counts evaluations, and there is only "
                "one, at the end; set train.eval_every"
            )


@checked
class CheckpointConfig:
    """Run folder and checkpoints.

    Example::

      CheckpointConfig(dir="checkpoints/tiny")
    """

    dir: RequiredPath
    """run folder: checkpoints, recipe, metrics and loss plot; also gs://... or s3://..."""
    save_every: SaveEvery = 1000
    """steps between checkpoints, or time between them: 90s, 10min, 2h"""
    keep: Positive = 2
    """number of newest checkpoints to keep"""
    keep_best: bool = False
    """also keep the checkpoint with the best validation loss, which is the one that is loaded"""


LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]
LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)
"""The matrices of a layer, which can have a LoRA adapter."""


@checked
class LoraConfig:
    """LoRA: train adapters of rank r beside the matrices of the layers, which stay as they are.

    Example::

      LoraConfig(rank=16, targets=("q", "v"), base="int8")
    """

    rank: Positive = 16
    """r, the rank of each adapter"""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """the update of a matrix is multiplied by alpha / rank"""
    targets: tuple[LoraTarget, ...] = LORA_TARGETS
    """matrices with an adapter"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """probability that an input of an adapter is zero in training"""
    rslora: bool = False
    """multiply the update by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)"""
    base: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """number format of the weights that stay as they are; auto: train.compute_dtype"""

    def __post_init__(self):
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets={list(self.targets)} must name each matrix once, and at least one"
            )


@checked
class DpoConfig:
    """Preference tuning with DPO, on a source of pairs of a chosen and a rejected answer.

    Example::

      DpoConfig(beta=0.1)
    """

    beta: Annotated[float, Field(gt=0)] = 0.1
    """how strongly the model is kept near train.init_from (arXiv 2305.18290)"""


@checked
class Recipe:
    """All settings of a training run.

    Example::

        recipe = load_recipe("configs/tiny.toml", ["train.steps=100"])
        recipe.optim.peak_lr
    """

    model: ModelConfig
    data: DataConfig
    mesh: MeshConfig = MeshConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig
    lora: LoraConfig | None = None
    dpo: DpoConfig | None = None

    def __post_init__(self):
        if self.train.batch_size % self.train.gradient_accumulation:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} must be a multiple of "
                f"train.gradient_accumulation={self.train.gradient_accumulation}"
            )
        if (tokens := self.tokens_per_step) > MAX_STEP_TOKENS:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} x data.seq_len={self.data.seq_len} are "
                f"{tokens:,} tokens per step; at most {MAX_STEP_TOKENS:,} are possible"
            )
        if self.data.seq_len > self.model.context:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is longer than "
                f"model.context={self.model.context}; set model.context to at least data.seq_len"
            )
        for name in ("lora", "dpo"):
            if getattr(self, name) is not None and not self.train.init_from:
                raise ValueError(
                    f"[{name}] needs the weights of a trained model; set train.init_from"
                )
        if self.checkpoint.keep_best and not self.train.eval_every:
            raise ValueError("checkpoint.keep_best needs evaluations; set train.eval_every")
        skipped = sum(last - first + 1 for first, last in self.data.skip_batches)
        if self.train.steps and skipped > self.train.steps:
            raise ValueError(
                f"data.skip_batches leaves out {skipped:,} batches, more than the "
                f"{self.train.steps:,} of train.steps; give only the batches to leave out"
            )

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of an optimizer step."""
        return self.train.batch_size * self.data.seq_len
