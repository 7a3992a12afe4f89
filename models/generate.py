"""Continue a text by a trained model: `python -m models.generate runs/NAME-1 --prompt "def "`.

The command alone: which checkpoint, which prompt, and text as it comes. Tokens are drawn in decoding.py.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from models.decoding import stream
from models.sampler import Sampler
from training.errors import CheckpointError, ConfigError, DataError
from training.step import evaluation_key
from training.text_stream import TextStream
from training.trained import Trained, load_trained

_COMPILING = 2  # tokens that wait for the compiler: the one after the prompt, and the first of the loop


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a text by a trained model. The text goes to the standard output, all else to the standard error."""

    run: tyro.conf.Positional[Path]
    """A run's folder, whose newest checkpoint is taken, or one checkpoint: runs/NAME-1/checkpoints/STEP."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: Path | None = None
    """A UTF-8 file with the text to continue."""
    tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 200
    """Most tokens to add."""
    temperature: float = 0.7
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens; default: from all."""
    top_p: float | None = None
    """Draw from the fewest of the likeliest tokens that together have this probability; default: from all."""
    seed: int = 0
    """Decides the choices; each sample has its own."""
    samples: int = 1
    """Continuations, one after another."""
    stop_at_end: bool = False
    """Stop where the model ends the document, and do not begin another."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    config = tyro.cli(GenerateConfig, args=list(arguments), prog="models.generate")
    try:
        sampler = _sampler(config)
        trained = load_trained(config.run)
        if trained.config.data.images:
            raise ConfigError(f"{config.run} has learned images, and no text: python -m models.draw draws them")
        prompt = _prompt_tokens(config, trained)
        for number in range(config.samples):
            _write_sample(config, trained, prompt, sampler, number)
    except (CheckpointError, ConfigError, DataError, NotImplementedError) as error:
        print(f"models.generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    return 0


def _sampler(config: GenerateConfig) -> Sampler:
    for name, value, least in (
        ("--tokens", config.tokens, 1),
        ("--samples", config.samples, 1),
        ("--seed", config.seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    try:
        return Sampler(config.temperature, config.top_k, config.top_p)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-', 1).rstrip('.')}") from error


def _prompt_tokens(config: GenerateConfig, trained: Trained) -> np.ndarray:
    if (config.prompt is None) == (config.prompt_file is None):
        raise ConfigError("give the text to continue with --prompt TEXT or --prompt-file FILE, one of them")
    text = config.prompt
    if config.prompt_file is not None:
        try:
            text = config.prompt_file.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{config.prompt_file}: not a readable UTF-8 file: {reason}") from error
    assert text is not None
    tokens = trained.tokenizer.encode([text.encode(errors="surrogateescape")])[0].tokens
    if not len(tokens):
        raise ConfigError("the prompt is empty; give at least one token to continue")
    longest = trained.config.batch.length
    if len(tokens) + config.tokens > longest:
        raise ConfigError(
            f"{len(tokens):,} tokens of the prompt and --tokens {config.tokens:,} are more than the {longest:,} that"
            " the model was trained on; take a shorter prompt, or fewer tokens"
        )
    return tokens


def _write_sample(config: GenerateConfig, trained: Trained, prompt: np.ndarray, sampler: Sampler, number: int) -> None:
    """Writes the prompt and its continuation, and then how fast it was."""
    if config.samples > 1:
        _write(f"{'' if number == 0 else '\n'}--- sample {number + 1} of {config.samples} ---\n")
    end = trained.tokenizer.end
    tokens = stream(
        trained.model,
        prompt[None],
        config.tokens,
        key=jax.random.fold_in(jax.random.key(config.seed), number),
        pattern_key=evaluation_key(trained.config.seed),
        sampler=sampler,
        document_end=end if trained.config.data.documents_apart else None,
        packed=trained.config.data.packing == "documents",
        stop_token=end if config.stop_at_end else None,
    )
    _write(trained.tokenizer.decode(prompt.tolist()))
    text = TextStream(trained.tokenizer, prompt.tolist())
    count, start = 0, time.perf_counter()
    for count, row in enumerate(tokens, start=1):
        if count == _COMPILING:
            start = time.perf_counter()
        _write(text.add(int(row[0])))
    _write(text.end() + "\n")
    timed = count - _COMPILING
    speed = f", {timed / (time.perf_counter() - start):,.0f} a second" if timed > 0 else ""
    print(f"{trained.checkpoint}: {count} tokens{speed}", file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
