"""Which language models are trained side by side: each a name and the settings in which it differs from the others."""

import fnmatch
from typing import NamedTuple

STEPS = 1000
TOKENS = 32_768  # of a step on text, at any length
IMAGES = 64  # of a step on MNIST

# Rotary positions: of 8192 learned ones each is seen too seldom in runs of minutes. Keys that are normalised queries
# have length 1, and scores as large as those of keys of their own take a factor of 1 (`shared_scale`).
_TEXT = (
    *("paper-8k", "--batch.accumulation", "1", "--model.positions", "rope", "--model.shared-scale", "1"),
    *("--optimizer.warmup", "0.1", "--evaluation.every", "100", "--evaluation.windows", "32", "--log-every", "20"),
    *("--sample.tokens", "0", "--checkpoint.every", "250", "--checkpoint.keep", "1"),
)
_PIXELS = (
    *("mnist", "--data.held-out", "test", "--evaluation.every", "500", "--log-every", "100"),
    *("--checkpoint.every", "1000", "--checkpoint.keep", "1"),
)


class Kind(NamedTuple):
    """What layers see.

    Attributes:
        words: the same for a reader.
        settings: of `train.py`.
        shared: whether keys are the queries, normalised.
        script: that trains it.
    """

    words: str
    settings: tuple[str, ...]
    shared: bool = True
    script: str = "train.py"


def _hash(buckets: int, *more: str) -> tuple[str, ...]:
    return ("--model.attention", "hash", "--model.buckets", str(buckets), *more)


def _qk(rate: float, *more: str) -> tuple[str, ...]:
    return ("--model.attention", "qk", "--model.rate", str(rate), *more)


def _by_turns(*kinds: str, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Kinds by turns over the paper's twelve layers, local ones with a window of 128."""
    return (
        *("--model.attention", *(kinds * (12 // len(kinds)))),
        *("--model.window", "128", "--model.dense-backend", "cudnn", *more),
    )


_DENSE = ("--model.attention", "dense", "--model.dense-backend", "cudnn")
_WINDOW = ("--model.attention", "window", "--model.window", "1024", "--model.sinks", "4")
_LOCALS = ("local", "local", "local")
_UNEVEN = tuple(f"{0.25 + 0.5 * head / 11:.3f}" for head in range(12))
_REFORMER = "benchmarks/train_reformer.py"

KINDS: dict[str, Kind] = {
    "dense": Kind("dense, cuDNN", _DENSE),
    "dense-own-keys": Kind("dense, cuDNN", _DENSE, shared=False),
    "hash8": Kind("8 buckets", _hash(8)),
    "hash16": Kind("16 buckets", _hash(16)),
    "hash32": Kind("32 buckets", _hash(32)),
    "hash16-rotated": Kind("16 buckets, after rotary positions", _hash(16, "--model.rotated")),
    "hash16-centred": Kind("16 buckets, centred", _hash(16, "--model.centred")),
    "hash16-own-keys": Kind("16 buckets", _hash(16), shared=False),
    "hash16-with-self": Kind("16 buckets, itself included", _hash(16, "--model.no-exclude-self")),
    "hash16-fixed": Kind("16 buckets, fixed hashes", _hash(16, "--model.fixed-draws")),
    "hash16-rounds2": Kind("16 buckets, 2 rounds", _hash(16, "--model.rounds", "2")),
    "hash16-rounds4": Kind("16 buckets, 4 rounds", _hash(16, "--model.rounds", "4")),
    "hash16-near": Kind("16 buckets and the last 128 tokens", _hash(16, "--model.near", "128")),
    "hash16-near-own-keys": Kind("16 buckets and the last 128 tokens", _hash(16, "--model.near", "128"), shared=False),
    "hash16-near-fixed-own-keys": Kind(
        "16 buckets and the last 128 tokens, fixed hashes",
        _hash(16, "--model.near", "128", "--model.fixed-draws"),
        shared=False,
    ),
    "hash16-near-rotated-fixed-own-keys": Kind(
        "16 buckets, after rotary positions, and the last 128 tokens, fixed hashes",
        _hash(16, "--model.near", "128", "--model.rotated", "--model.fixed-draws"),
        shared=False,
    ),
    "qk30": Kind("30 % of q and k dropped", _qk(0.3)),
    "qk50": Kind("50 % of q and k dropped", _qk(0.5)),
    "qk70": Kind("70 % of q and k dropped", _qk(0.7)),
    "qk50-uneven": Kind("25 to 75 % dropped, by head", _qk(0.5, "--model.rates", *_UNEVEN)),
    "qk50-scored": Kind("50 % dropped by scaled scores", _qk(0.5, "--model.scored")),
    "qk50-straight": Kind(
        "50 % dropped by scores, straight through",
        _qk(0.5, "--model.scored", "--model.score-gradient", "straight_through"),
    ),
    "window-own-keys": Kind("window of 1024, 4 sinks", _WINDOW, shared=False),
    "local-hash16": Kind("window of 128 and 16 buckets, by turns", _by_turns("local", "hash")),
    "local-hash16-own-keys": Kind("window of 128 and 16 buckets, by turns", _by_turns("local", "hash"), shared=False),
    "local-dense-own-keys": Kind("window of 128, every fourth layer dense", _by_turns(*_LOCALS, "dense"), shared=False),
    "local-hash16-rotated": Kind(
        "window of 128, every fourth layer 16 buckets after rotary positions",
        _by_turns(*_LOCALS, "hash", more=("--model.rotated",)),
    ),
    "local-hash16-fixed-own-keys": Kind(
        "window of 128, every fourth layer 16 buckets, fixed hashes",
        _by_turns(*_LOCALS, "hash", more=("--model.fixed-draws",)),
        shared=False,
    ),
    "local-qk50-own-keys": Kind(
        "window of 128, every fourth layer 50 % dropped", _by_turns(*_LOCALS, "qk", more=("--model.rate", "0.5")), False
    ),
    "hash16-dense-own-keys": Kind(
        "16 buckets, every fourth layer dense", _by_turns("hash", "hash", "hash", "dense"), shared=False
    ),
    "reformer": Kind("Reformer, 16 buckets", _hash(16), script=_REFORMER),
    "reformer-rounds4": Kind("Reformer, 16 buckets, 4 rounds", _hash(16, "--model.rounds", "4"), script=_REFORMER),
}


class Run(NamedTuple):
    """A run of training.

    Attributes:
        text: "enwik8" or "eltec", or "mnist", whose pixels are tokens.
        length: tokens of a sequence.
        steps: of the optimizer.
        attention: of `KINDS`.
        seed: of parameters, hashes, drops and the order of the text.
    """

    text: str
    length: int
    steps: int
    attention: str
    seed: int = 0

    def __str__(self) -> str:
        length = f"{self.length // 1024}k" if self.length >= 1024 else str(self.length)
        return f"{self.text}-{length}-{self.steps}-{self.attention}-seed{self.seed}"

    @property
    def kind(self) -> Kind:
        """What its layers see."""
        return KINDS[self.attention]

    @property
    def size(self) -> int:
        """Sequences of a step."""
        return IMAGES if self.text == "mnist" else max(1, TOKENS // self.length)

    @property
    def tokens_of_step(self) -> int:
        """Tokens that a step learns from."""
        return self.size * self.length

    def settings(self) -> list[str]:
        """The arguments of its script, but for folders and time."""
        shape = {"length": self.length, "size": self.size}
        batch = [word for name, value in shape.items() for word in (f"--batch.{name}", str(value))]
        chosen = ["--data", self.text, "--steps", str(self.steps), "--seed", str(self.seed), *batch]
        keys = () if self.kind.shared else ("--model.no-shared-qk",)
        return [*(_PIXELS if self.text == "mnist" else _TEXT), *chosen, *self.kind.settings, *keys]


_PAIR = ("dense-own-keys", "local-dense-own-keys")  # the strongest dense model, and what learned best in `choices`
_DROPPING, _HASHING = "local-qk50-own-keys", "hash16-near-rotated-fixed-own-keys"
_PAPER = ("hash8", "hash16", "hash32", "qk30", "qk50", "qk70")
_BESIDE_REFORMER = ("dense", "hash16", "hash16-rounds4", "reformer", "reformer-rounds4")


def _over_lengths(*kinds: str) -> tuple[Run, ...]:
    return tuple(
        Run("enwik8", length, STEPS, kind, seed)
        for seed in range(3)
        for length in (8192, 16_384, 32_768)
        for kind in kinds
    )


GROUPS: dict[str, tuple[Run, ...]] = {
    "headline": _over_lengths(*_PAIR),
    # The paper's methods where no layer sees all: the best of dropping and of buckets in `choices`, each beside dense.
    "sparse": (*_over_lengths(_PAIR[0], _DROPPING), *_over_lengths(_PAIR[0], _HASHING)),
    # Whether what the headline says holds over three times as many steps.
    "longer": tuple(Run("enwik8", 16_384, 3 * STEPS, kind) for kind in _PAIR),
    # The paper's: one model, keys shared in all.
    "paper": tuple(
        Run(text, length, STEPS, kind)
        for text, length in (("enwik8", 8192), ("enwik8", 16_384), ("eltec", 8192))
        for kind in ("dense", *_PAPER)
    ),
    "choices": tuple(Run("enwik8", 8192, STEPS, name) for name, kind in KINDS.items() if kind.script == "train.py"),
    # As far as the paper compares itself with Reformer.
    "reformer": (
        *(Run("enwik8", 4096, STEPS, kind) for kind in _BESIDE_REFORMER),
        *(Run("mnist", 784, 3000, kind) for kind in _BESIDE_REFORMER),
    ),
}
"""Runs by the question that they answer; a run that several ask for is run once."""


def chosen(groups: list[str], patterns: list[str]) -> list[Run]:
    """The runs of the groups whose names match a pattern, each once; those of the first pattern come first."""
    runs = [run for group in groups for run in GROUPS[group]]
    return list(dict.fromkeys(run for pattern in patterns for run in runs if fnmatch.fnmatchcase(str(run), pattern)))
