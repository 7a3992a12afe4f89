"""Settings of a run as frozen dataclasses.

The command line (`training/cli.py`) is made out of these classes; the docstring under a field is its help text. What
decides the result of a run is told apart from what only watches it by `identity`, which checkpoints store and compare.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Kind = Literal["dense", "local", "window", "hash", "qk", "block_top_k", "auto"]
Packing = Literal["stream", "documents", "single"]
Exchange = Literal["gather", "ring"]
alias = tyro.conf.arg

# Of default blocks: those of "MoBA", arXiv 2502.13189, at 8192 tokens; and what GPU kernels take at least.
_BLOCKS, _LARGEST_BLOCK, _SMALLEST_BLOCK = 16, 512, 16

NEWEST = "newest"
"""The value of `resume` where no path is given."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: Annotated[str, alias(aliases=["--data"])] = "python"
    """'python' (source code of the standard library and installed packages), 'enwik8', 'eltec', 'mnist' (images, a
    pixel a token: see the preset mnist), or a path: a file, folder or glob, also .gz, .xz, .tar, .tar.gz, .tar.xz, and
    FILE.jsonl:FIELD. Or hf:NAME_OR_PATH, with the package `datasets`: a Hugging Face data set's name, its folder from
    save_to_disk, or .json, .parquet, .csv or .txt files."""
    folder: Annotated[Path | None, alias(aliases=["--data-dir"])] = None
    """Folder that holds enwik8.xz, eltec_eng.tar.xz, and mnist/ with the files train-images-idx3-ubyte and
    t10k-images-idx3-ubyte, as they are, .gz or .xz; else $SPARSE_FLASH_DATA, else ./data."""
    tokenizer: Annotated[str, alias(aliases=["--tokenizer"])] = "bytes"
    """'bytes', or the JSON file of a Hugging Face `tokenizers` tokenizer; `python -m training.bpe FILE` trains one."""
    encoding: str = "utf-8"
    """Encoding of the files."""
    max_megabytes: float = 16.0
    """Most text to read for the source 'python' (it bounds the start-up time), and of one that is streamed."""
    held_out: Literal["valid", "test"] = "valid"
    """Which held-out part to evaluate on, where the source has both."""
    configuration: str | None = None
    """hf: configuration of the data set, where it has several."""
    split: str = "train"
    """hf: split to train on, or several, joined by +."""
    field: str = "text"
    """hf: the field that is the text."""
    streaming: bool = False
    """hf: read while it comes, and no more than --data.max-megabytes, in place of loading all."""
    separate_documents: bool = False
    """Let no token attend to another document of its sequence."""
    packing: Packing = "stream"
    """How sequences are filled. stream: documents joined, and cut wherever a sequence ends. documents: whole documents,
    as many as fit, none of which sees another; longer ones are cut into pieces. Positions count on through a sequence,
    so that learned ones do not tell where a document began. single: one document, of --length tokens as all must be,
    behind an end token, which is not learned: an image."""

    @property
    def images(self) -> bool:
        """Whether documents are images, a pixel a byte and a token, so that bits per byte are bits per pixel."""
        return self.source == "mnist"

    @property
    def documents_apart(self) -> bool:
        """Whether tokens see their own document only."""
        return self.separate_documents or self.packing == "documents"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder and its attention."""

    layers: int = 4
    """Number of blocks."""
    width: int = 128
    """Size of the residual stream."""
    heads: int = 4
    """Query heads; head_dim = width / heads."""
    key_heads: int | None = None
    """Key and value heads (grouped-query attention); default: as many as query heads."""
    mlp_ratio: int = 4
    """Hidden size of the MLP over the width."""
    positions: Literal["learned", "rope"] = "rope"
    """Learned position embeddings, or rotary positions."""
    attention: Annotated[tuple[Kind, ...], alias(aliases=["--attention"])] = ("hash",)
    """One kind for all layers, or one a layer: dense (all earlier tokens), local (the last --model.window tokens),
    window (these and the first --model.sinks), hash (same bucket), qk (queries and keys dropped), block_top_k (the
    blocks of keys that suit a block of queries best; --model.block-*), auto (hash or qk where that is expected to be
    faster than dense attention at --length on this device, else dense; --model.auto-*)."""
    buckets: Annotated[int, alias(aliases=["--buckets"])] = 16
    """hash: number of buckets (even)."""
    centred: Annotated[bool, alias(aliases=["--centred"])] = False
    """hash: hash vectors minus their running mean, which evens buckets out. Not with --data.separate-documents or
    --data.packing documents."""
    near: int | None = None
    """hash: tokens back, itself included, that a token sees whatever their buckets, at the cost of one more call of
    attention, as with rounds; no auto, and no --mesh that divides sequences."""
    rotated: bool = False
    """hash: hash vectors as rotary positions have turned them, so that buckets go by place, too."""
    rounds: int = 1
    """hash: hashes, of which each shows what is in the same bucket, at the cost of one more call of attention. In the
    metrics `visible` is the sum over rounds. With several there is no sample, no auto, and no --mesh that divides
    sequences."""
    fixed_draws: bool = False
    """hash, qk: the same rotations and drops at every step, those of evaluation, in place of fresh ones."""
    shared_qk: bool = True
    """Project q and v only; a key is its query, normalised per head. In all layers, so that kinds compare fairly."""
    shared_scale: float | None = None
    """Factor on the scores where keys are shared; default 1 / sqrt(head_dim). 1 learns faster at the start."""
    exclude_self: bool = True
    """hash: a token does not see itself."""
    rate: Annotated[float, alias(aliases=["--rate"])] = 0.3
    """qk: share of queries and of keys that is dropped, each."""
    rates: tuple[float, ...] = ()
    """qk: that share for each query head, in place of --model.rate. Heads that share keys drop the least of theirs."""
    scored: bool = False
    """qk: drop by a learned score, not at random. The choice looks at the whole sequence, so it is not causal."""
    score_gradient: Literal["scaled", "straight_through", "none"] = "scaled"
    """scored: how scores learn. scaled: values and outputs of kept tokens are multiplied by sigmoid(score);
    straight_through: they are not, but scores get the gradient of that; none: they stay as they began."""
    auto_sparse: Literal["hash", "qk"] = "hash"
    """auto: what is weighed against dense."""
    auto_density: float | None = None
    """auto: share of dense attention's pairs that the sparse kind is expected to show; default 1 / buckets, or
    (1 - rate)^2, the mean over heads. Buckets of an untrained model show more: `visible` in the metrics tells."""
    window: int | None = None
    """local, window: tokens back that a token sees, itself included."""
    sinks: int = 4
    """window: tokens at the start, of each document where they are apart, that all later ones see; 0: none. Source:
    "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, where four are enough."""
    block_size: int | None = None
    """block_top_k: tokens of a block; default: a power of two of which --length has 16 or more, from 16 to 512. GPU
    kernels take multiples of 16, Hopper's those of 64."""
    block_count: int = 3
    """block_top_k: blocks that a block of queries sees, its own included. Which ones goes by its mean query: the choice
    looks up to a block ahead, so it is not strictly causal."""
    dense_backend: Literal["sparse_flash", "xla", "cudnn"] = "sparse_flash"
    """dense: our kernels, or jax.nn.dot_product_attention's 'xla' or 'cudnn'."""
    implementation: Literal["mosaic", "triton", "xla"] | None = None
    """Kernels to use; default: the best for the device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters. The optimizer's means, averages and sums of gradients are float32; still, a step that is
    too small for a bfloat16 parameter is lost."""
    remat: Literal["none", "attention", "full"] = "none"
    """What the backward pass computes again of each block, which saves memory: none; attention (all but what attention
    gave); full (all of it)."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine decay and clipping."""

    learning_rate: Annotated[float, alias(aliases=["--learning-rate", "--lr"])] = 1e-3
    """Peak learning rate."""
    warmup: float = 0.02
    """Share of the steps in which the learning rate rises."""
    final: float = 0.05
    """Last learning rate over the peak."""
    beta1: float = 0.9
    """Decay of the mean gradient."""
    beta2: float = 0.95
    """Decay of the mean square gradient."""
    weight_decay: float = 0.1
    """Decay of the matrices (not of norms)."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    ema: float | None = None
    """Decay of a float32 average of the parameters, with which the model is evaluated and samples; default: none."""
    non_finite: Literal["stop", "skip"] = "stop"
    """Where the loss or the gradient of a step is not finite: stop the run, or skip that step's update and go on."""
    max_skipped: int = 10
    """skip: stop after so many skipped steps in a row."""


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Shape of a step: accumulation x size sequences of `length` tokens."""

    length: Annotated[int, alias(aliases=["--length"])] = 2048
    """Tokens of a sequence."""
    size: Annotated[int, alias(aliases=["--batch-size"])] = 1
    """Sequences that go through the model at once."""
    accumulation: Annotated[int, alias(aliases=["--accumulation"])] = 1
    """Such batches added up for one step of the optimizer."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out text."""

    every: int = 200
    """Steps between evaluations; 0: only at the end."""
    windows: int = 16
    """Held-out sequences of an evaluation in between, spread evenly; 0: all."""
    final_windows: int = 64
    """Held-out sequences of the last evaluation; 0: all."""
    lengths: tuple[int, ...] = ()
    """Tokens of a sequence in further last evaluations, beside --batch.length: of about as much text each, of the same
    where --evaluation.final-windows is 0. With learned positions no longer ones."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The continuation of a held-out text, sampled when the run ends."""

    tokens: int = 400
    """Tokens to sample; 0: none."""
    prompt: int = 200
    """Tokens of held-out text to start from."""
    temperature: float = 0.7
    """0 takes the likeliest token."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and how many of them stay."""

    every: int = 200
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints to keep."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train as one, on one host or many; the same command on each, but for its number. Each uses
    all the GPUs that it sees: on one host, set CUDA_VISIBLE_DEVICES for each."""

    coordinator: str | None = None
    """HOST:PORT of the first process, where all of them meet."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Number of this one, from 0."""
    auto: bool = False
    """Learn all three from the environment of the cluster: Slurm, Open MPI, Kubernetes, TPU pods."""
    timeout: int = 300
    """Seconds to wait for the others to come."""
    heartbeat: int = 100
    """Seconds without a sign of life after which a process counts as gone, and ends the others."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All settings of a run."""

    steps: Annotated[int, alias(aliases=["-n"])] = 1000
    """Steps of the optimizer."""
    seed: int = 0
    """Decides parameters, batches, hashes and drops."""
    name: str = "cpu-small"
    """Name of the run's folder under runs/."""
    out: Path | None = None
    """Folder for metrics, checkpoints and plots; default: a new one, runs/NAME-1, runs/NAME-2, ..."""
    resume: str | None = None
    """Go on from a checkpoint: `--resume` takes the newest run (or the one in --out), `--resume PATH` a run's folder or
    one checkpoint in it. Without a preset, what is not given is as in that run."""
    max_minutes: float | None = None
    """Save and stop after so many minutes."""
    log_every: int = 10
    """Steps between lines of metrics."""
    mesh: str | None = None
    """Devices by axis: data=4, data=2,fsdp=2, data=2,tensor=2, context=4 or all four. data divides the sequences of a
    batch; fsdp these and parameters and optimizer state; context the tokens of each sequence, for what is too long for
    one device; tensor heads, hidden units and vocabulary. Default: data over all devices if they divide --batch-size,
    else one device (an error in several processes)."""
    exchange: Exchange = "gather"
    """How keys come to queries where --mesh divides sequences by context. gather: each device has all of a layer's,
    mostly faster; ring: two devices' parts at a time, for what does not fit."""
    parallel: Literal["jit", "pmap"] = "jit"
    """One program over all devices of the mesh, or jax.pmap of one for each (data alone, one process)."""
    distributed: DistributedConfig = DistributedConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def block_size(self) -> int:
        """Tokens of a block of block_top_k: the same at every length of evaluation."""
        if self.model.block_size is not None:
            return self.model.block_size
        even = max(self.batch.length // _BLOCKS, 1)
        return min(max(1 << (even.bit_length() - 1), _SMALLEST_BLOCK), _LARGEST_BLOCK)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the result, flat: {"model.width": 128, ...}."""
    watching = {"name", "out", "resume", "max_minutes", "log_every", "evaluation", "sample", "checkpoint"}
    watching |= {"mesh", "exchange", "parallel", "distributed"}  # the same losses, to rounding
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if name in watching:
            continue
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    # The text itself is compared by its fingerprint, wherever it is read from: a data folder may move.
    for moved in ("folder", "source", "tokenizer", "max_megabytes", "configuration", "split", "field", "streaming"):
        del flat[f"data.{moved}"]
    # Nothing that was saved would differ: a run that had to stop may go on and skip.
    for finite in ("optimizer.non_finite", "optimizer.max_skipped"):
        del flat[finite]
    return json.loads(json.dumps(flat))


def with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved identity, complete: settings that are newer than it had their defaults."""
    return identity(TrainConfig()) | {name: as_now(name, value) for name, value in saved.items()}


def as_now(name: str, value: Any) -> Any:
    """A saved setting's value as it is said now: remat was once a bool."""
    if name.endswith("remat") and isinstance(value, bool):
        return "attention" if value else "none"
    return value
