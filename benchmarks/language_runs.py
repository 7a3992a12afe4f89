"""Which language models are trained side by side: each a name and the settings in which it differs from the others."""

import fnmatch
import re
from typing import NamedTuple

TOKENS = 32_768  # of a step, at any length

# Rotary positions: of 8192 learned ones each is seen too seldom in runs of minutes. Keys that are normalised queries
# have length 1, and scores as large as those of keys of their own take a factor of 1 (`shared_scale`).
COMMON = (
    *("paper-8k", "--batch.accumulation", "1", "--model.positions", "rope", "--model.shared-scale", "1"),
    *("--optimizer.warmup", "0.1", "--evaluation.every", "100", "--evaluation.windows", "32", "--log-every", "20"),
    *("--sample.tokens", "0", "--checkpoint.every", "0", "--checkpoint.keep", "1"),
)
DENSE = ("--model.attention", "dense", "--model.dense-backend", "cudnn")
HASH = ("--model.attention", "hash", "--model.buckets")
LOCAL = ("--model.window", "128", "--model.dense-backend", "cudnn")
QK = ("--model.attention", "qk", "--model.rate")
OWN_KEYS = ("--model.no-shared-qk",)


def _layers(*kinds: str) -> tuple[str, ...]:
    """The kinds by turns, over the paper's twelve layers."""
    return ("--model.attention", *(kinds * (12 // len(kinds))))


KINDS: dict[str, tuple[str, ...]] = {
    "dense": DENSE,
    "dense-own-keys": (*DENSE, *OWN_KEYS),
    "hash8": (*HASH, "8"),
    "hash16": (*HASH, "16"),
    "hash32": (*HASH, "32"),
    "hash16-centred": (*HASH, "16", "--model.centred"),
    "hash16-own-keys": (*HASH, "16", *OWN_KEYS),
    "hash16-with-self": (*HASH, "16", "--model.no-exclude-self"),
    "hash16-fixed": (*HASH, "16", "--model.fixed-draws"),
    "hash16-rounds2": (*HASH, "16", "--model.rounds", "2"),
    "hash16-rounds4": (*HASH, "16", "--model.rounds", "4"),
    "qk30": (*QK, "0.3"),
    "qk50": (*QK, "0.5"),
    "qk70": (*QK, "0.7"),
    "window-own-keys": ("--model.attention", "window", "--model.window", "1024", "--model.sinks", "4", *OWN_KEYS),
    "local-hash16": (*_layers("local", "hash"), *LOCAL),
    "local-hash16-own-keys": (*_layers("local", "hash"), *LOCAL, *OWN_KEYS),
    "local-dense-own-keys": (*_layers("local", "local", "local", "dense"), *LOCAL, *OWN_KEYS),
    "hash16-dense-own-keys": (*_layers("hash", "hash", "hash", "dense"), *LOCAL, *OWN_KEYS),
}
"""What the layers see, by name."""

_WORDS = {
    "dense": "dense, cuDNN",
    "hash": "{} buckets",
    "qk": "{} % of q and k dropped",
    "window": "window of 1024, 4 sinks",
    "centred": "centred",
    "with-self": "itself included",
    "fixed": "fixed hashes",
    "rounds": "{} rounds",
    "local-hash": "window of 128 and {} buckets, by turns",
    "local-dense": "window of 128, every fourth layer dense",
    "hash-dense": "{} buckets, every fourth layer dense",
}


def in_words(attention: str) -> str:
    """A name of `KINDS` in words, but for whose keys it has."""
    parts = attention.removesuffix("-own-keys")
    if (name := re.sub(r"\d", "", parts)) in _WORDS:
        return _WORDS[name].format(re.sub(r"\D", "", parts))
    first, rest = parts.split("-", 1)
    return f"{in_words(first)}, {in_words(rest)}"


class Run(NamedTuple):
    """A run of `train.py`.

    Attributes:
        text: "enwik8" or "eltec".
        length: tokens of a sequence.
        steps: of the optimizer, of `TOKENS` tokens each.
        attention: of `KINDS`.
        seed: of parameters, hashes, drops and the order of the text.
    """

    text: str
    length: int
    steps: int
    attention: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.text}-{self.length // 1024}k-{self.steps}-{self.attention}-seed{self.seed}"

    @property
    def size(self) -> int:
        """Sequences of a step."""
        return max(1, TOKENS // self.length)

    @property
    def tokens_of_step(self) -> int:
        """Tokens that a step learns from."""
        return self.size * self.length

    def settings(self) -> list[str]:
        """The arguments of `train.py`, but for folders and time."""
        shape = {"length": self.length, "size": self.size}
        batch = [word for name, value in shape.items() for word in (f"--batch.{name}", str(value))]
        chosen = ["--data", self.text, "--steps", str(self.steps), "--seed", str(self.seed), *batch]
        return [*COMMON, *chosen, *KINDS[self.attention]]


STEPS = 1000
_PAPER = ("hash8", "hash16", "hash32", "qk30", "qk50", "qk70")

GROUPS: dict[str, tuple[Run, ...]] = {
    # The strongest dense model here, and the sparse one that learned best in `choices`.
    "headline": tuple(
        Run("enwik8", length, STEPS, kind, seed)
        for seed in range(3)
        for length in (8192, 16_384, 32_768)
        for kind in ("dense-own-keys", "local-dense-own-keys")
    ),
    # The paper's: one model, keys shared in all.
    "paper": tuple(
        Run(text, length, STEPS, kind)
        for text, length in (("enwik8", 8192), ("enwik8", 16_384), ("eltec", 8192))
        for kind in ("dense", *_PAPER)
    ),
    "choices": tuple(Run("enwik8", 8192, STEPS, kind) for kind in KINDS),
}
"""Runs by the question that they answer; a run that several ask for is run once."""


def chosen(groups: list[str], patterns: list[str]) -> list[Run]:
    """The runs of the groups whose names match a pattern, each once, in order."""
    runs = dict.fromkeys(run for group in groups for run in GROUPS[group])
    return [run for run in runs if any(fnmatch.fnmatchcase(str(run), pattern) for pattern in patterns)]
