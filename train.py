#!/usr/bin/env python
"""Train a sparse-attention model on text or pixels: config -> data -> model -> step -> loop -> evaluation -> sample."""

import contextlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from rich.console import Console

from models.transformer import TransformerConfig
from training.batches import Batches, EvaluationBatch, evaluation_batches
from training.check import check
from training.checkpoint import Checkpoints, restore
from training.cli import read_settings
from training.config import TrainConfig
from training.data import Corpus, load_corpus
from training.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, OutputError, writing
from training.evaluation import Evaluation, evaluate, unigram
from training.mesh import Layout, make_layout
from training.metrics import MetricsLog, recent_mean
from training.model import automatic_choice, resolved_identity, transformer_config
from training.optimizer import learning_rate, make_optimizer
from training.pictures import complete_held_out
from training.plot import plot_loss
from training.png import write_png
from training.processes import JointStop, advice, another_is_gone, check_same, is_first, join, leave, shared_settings
from training.progress import TrainProgress
from training.report import Report
from training.run_folder import RunFolder, choose_folder_together
from training.sampling import continue_held_out
from training.saved_config import write_config
from training.step import (
    StepMetrics,
    TrainState,
    evaluation_params,
    init_state,
    make_evaluation_step,
    make_train_step,
    structure_of,
)
from training.stopping import StopRequest
from training.throughput import Throughput, peak_bytes
from training.tokens import Tokenizer, load_tokenizer

ModelStructure = Callable[[TransformerConfig], nnx.GraphDef]
"""The structure of a model of this shape, as `structure_of` gives it; its name is `str` of it."""


class Run(NamedTuple):
    """What a run is made of; only the state changes."""

    config: TrainConfig
    folder: RunFolder
    tokenizer: Tokenizer
    corpus: Corpus
    layout: Layout
    structure: nnx.GraphDef
    train_step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
    evaluation_step: Callable[..., jax.Array]
    checkpoints: Checkpoints
    metrics: MetricsLog
    console: Console
    stop: JointStop

    def held_out(self, windows: int, length: int | None = None) -> list[EvaluationBatch]:
        """So many windows of the held-out text; at another length as much text, and as many tokens at once."""
        batch, packing = self.config.batch, self.config.data.packing
        length = batch.length if length is None else length
        parts = self.layout.sequence_parts
        size = max(-(-batch.size * batch.length // (length * parts)), 1) * parts
        windows = -(-windows * batch.length // length)
        return list(evaluation_batches(self.corpus.held_out, size, length, windows, packing))


def main(arguments: Sequence[str], model_structure: ModelStructure = structure_of) -> int:
    """Runs the command line; returns the exit status. One of several processes that fails leaves at once."""
    try:
        status = run_command(arguments, model_structure)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if status and jax.distributed.is_initialized():
        leave(status)
    return status


def run_command(arguments: Sequence[str], model_structure: ModelStructure = structure_of) -> int:
    """Trains; says in a line what went wrong."""
    try:
        config = read_settings(arguments)
        join(config.distributed)
        check(config)
        with StopRequest(config.max_minutes) as stop:
            train(config, JointStop(stop), Console(quiet=not is_first()), model_structure)
    except (ConfigError, DataError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OutputError) as error:
        print(f"train.py: {error}{advice()}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        print(f"train.py: {another_is_gone(error)}{advice()}", file=sys.stderr)
        return 1
    return 0


def train(
    config: TrainConfig, stop: JointStop, console: Console, model_structure: ModelStructure = structure_of
) -> None:
    """Trains, from the settings to the sample; another structure is another model with the same parameters."""
    check_same("settings", shared_settings(config))
    layout = make_layout(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    corpus = load_corpus(config.data, tokenizer, config.batch.length)
    folder = choose_folder_together(config)  # after what may fail, which then leaves none

    check_same("text", corpus.fingerprint)
    model_config = transformer_config(config, tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    ema, skip = config.optimizer.ema, config.optimizer.non_finite == "skip"
    _, state = init_state(model_config, optimizer, config.seed, layout, average=ema is not None, skip_non_finite=skip)
    belongs_to = resolved_identity(config) | {"text": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    if model_structure is not structure_of:
        belongs_to["structure"] = str(model_structure)
    if folder.resume_from is not None:
        state = restore(folder.resume_from, state, belongs_to)

    end_token = tokenizer.end if config.data.separate_documents else None
    packed = config.data.packing == "documents"
    run = Run(
        config=config,
        folder=folder,
        tokenizer=tokenizer,
        corpus=corpus,
        layout=layout,
        structure=model_structure(model_config),
        train_step=make_train_step(
            model_structure(layout.training_model(model_config)),
            optimizer,
            config.seed,
            end_token,
            layout,
            ema=ema,
            packed=packed,
            fixed_draws=config.model.fixed_draws,
        ),
        evaluation_step=make_evaluation_step(
            model_structure(layout.evaluation_model(model_config)), config.seed, end_token, packed=packed
        ),
        checkpoints=Checkpoints(folder.checkpoints, config.checkpoint.keep, belongs_to),
        metrics=MetricsLog(folder.metrics if is_first() else None, int(state.step)),
        console=console,
        stop=stop,
    )
    if is_first():
        write_config(folder.config, config)
    introduce(run, state)
    with contextlib.closing(run.metrics), run.checkpoints:
        state, throughput = loop(run, state)
        run.checkpoints.wait()
        conclude(run, state, throughput)


def loop(run: Run, state: TrainState) -> tuple[TrainState, Throughput]:
    """Steps until the end or until asked to stop; returns the state and the clock."""
    config = run.config
    batches = Batches(run.corpus.train.tokens, config.batch, config.seed, run.layout.shard, config.data.packing)
    held_out = run.held_out(config.evaluation.windows)
    done = int(state.step)
    unread: StepMetrics | None = None
    throughput = Throughput(run.metrics.training_seconds)
    coming = batches.from_step(done)
    with contextlib.closing(coming), TrainProgress(done, config.steps, run.console) as progress:
        if batches.packed is not None:
            progress.say(f"documents packed into {len(batches.packed):,} sequences, {batches.packed.filled:.1%} filled")
        report = Report(config, learning_rate(config.optimizer, config.steps), run.metrics, progress, throughput)
        while done < config.steps:
            run.stop.ask()
            state, measured = run.train_step(state, run.layout.place(next(coming)))
            # The device is busy with this step while the one before it is read.
            if unread is not None:
                report_or_stop(run, report, done, unread)
            done, unread = done + 1, measured
            stopping = run.stop.requested() or done == config.steps
            evaluating = is_due(config.evaluation.every, done) and done < config.steps and not run.stop.signalled
            saving = is_due(config.checkpoint.every, done) or stopping
            if not (saving or evaluating):
                continue
            # Nothing is saved before it is known to be finite.
            report_or_stop(run, report, done, unread)
            unread = None
            throughput.pause()
            # Evaluated before it is saved: going on from a checkpoint, its evaluation is not missing.
            if evaluating:
                quality = evaluate(run.evaluation_step, evaluation_params(state), held_out, run.layout)
                run.metrics.write("evaluation", done, **quality._asdict())
                progress.say(
                    f"step {done}: held-out loss {quality.loss:.3f}, {quality.bits_per_byte:.3f} bits per byte"
                )
            if saving:
                run.checkpoints.save(state, done)
            if stopping:
                break
            throughput.resume()
    return state, throughput


def is_due(every: int, done: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and done % every == 0


def report_or_stop(run: Run, report: Report, done: int, measured: StepMetrics) -> None:
    """Reports a step; where it is not finite, says what is left to go on from."""
    try:
        report.step(done, measured)
    except NonFiniteLossError as error:
        newest = run.checkpoints.newest
        saved = (
            "no checkpoint was saved"
            if newest is None
            else f"the last good checkpoint is {run.folder.checkpoints / str(newest)}"
        )
        raise NonFiniteLossError(f"{error}: training stopped; {saved}. Try a lower --learning-rate.") from error


def introduce(run: Run, state: TrainState) -> None:
    """Says what is about to run."""
    config, corpus = run.config, run.corpus
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    train_bytes = int(corpus.train.byte_counts.sum())
    batch = config.batch
    lines = [
        f"device  {jax.devices()[0].device_kind}, jax {jax.__version__}, {run.layout}"
        + (f", {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        f"text    {config.data.source}: {corpus.train.documents:,} documents, {train_bytes / 1e6:.1f} MB to train on,"
        f" {corpus.held_out.byte_counts.sum() / 1e6:.2f} MB held out",
        f"model   {parameters / 1e6:.2f} M parameters, {config.model.layers} layers, attention"
        f" {' '.join(config.model.attention)}, vocabulary {run.tokenizer.vocab_size:,}",
        f"step    {batch.accumulation} x {batch.size} sequences of {batch.length:,} tokens; {config.steps:,} steps",
        f"files   {run.folder.root}",
    ]
    if "auto" in config.model.attention:
        lines.insert(3, f"auto    {automatic_choice(config)}")
    if run.folder.resume_from is not None:
        lines.append(f"resumed {run.folder.resume_from}, step {int(state.step)}")
    for line in lines:
        run.console.print(line, markup=False, highlight=False, soft_wrap=True)


def evaluate_lengths(run: Run, params: nnx.State) -> dict[int, Evaluation]:
    """The quality at the lengths that are asked for, beside that of training; each compiles."""
    windows = run.config.evaluation.final_windows
    return {
        length: evaluate(run.evaluation_step, params, run.held_out(windows, length), run.layout)
        for length in run.config.evaluation.lengths
    }


def conclude(run: Run, state: TrainState, throughput: Throughput) -> None:
    """Evaluates and samples, unless a signal asked to stop; says how it ended and where the files are."""
    done = int(state.step)
    say = lambda text: run.console.print(text, markup=False, highlight=False, soft_wrap=True)
    baseline: Evaluation | None = None
    reason = "done" if done >= run.config.steps and not run.stop.signalled else run.stop.reason
    if reason != "done":
        by = reason if run.stop.signalled else f"the {reason}"
        say(f"stopped by {by} after step {done} of {run.config.steps}; go on with --resume {run.folder.root}")
    if run.stop.signalled:
        run.metrics.write("end", done, reason=reason, training_seconds=throughput.seconds)
    else:
        held_out = run.held_out(run.config.evaluation.final_windows)
        params = evaluation_params(state)
        quality, lengths = evaluate(run.evaluation_step, params, held_out, run.layout), evaluate_lengths(run, params)
        params = run.layout.whole(params)
        if not is_first():
            return
        baseline = unigram(run.corpus.train, run.tokenizer.vocab_size, held_out)
        at_lengths = [{"length": length} | result._asdict() for length, result in lengths.items()]
        run.metrics.write("final", done, **quality._asdict(), unigram=baseline._asdict(), lengths=at_lengths)
        try:
            (write_text if run.corpus.image_shape is None else write_picture)(run, params, done, say)
        except NotImplementedError as error:
            say(f"no sample: {error}")
        speed = {"tokens_per_second": throughput.tokens_per_second, "training_seconds": throughput.seconds}
        run.metrics.write("end", done, reason=reason, **speed, peak_bytes=peak_bytes())
        logged = recent_mean(run.folder.metrics, "loss")
        mean = f"{logged:.3f} nats a token (mean of the last records)"
        say(f"\ntraining loss {'unknown: no finite one was logged' if math.isnan(logged) else mean}")
        others = [(f"held-out at {length:,} tokens:", result) for length, result in lengths.items()]
        for name, result in (("held-out", quality), *others, ("unigram ", baseline)):
            say(
                f"{name} loss {result.loss:.3f} nats a token, {result.bits_per_byte:.3f} bits per byte,"
                f" perplexity {result.perplexity:.2f}"
            )
    say(f"speed      {throughput.tokens_per_second:,.0f} tokens/s")
    say(f"metrics    {run.folder.metrics}")
    say(f"checkpoint {run.folder.checkpoints / str(done) if done else 'none'}")
    if not is_first():
        return
    with writing(run.folder.plot):
        drawn = plot_loss(run.folder.metrics, run.folder.plot, None if baseline is None else baseline.loss)
    say(f"plot       {run.folder.plot if drawn else 'none (needs matplotlib and a logged step)'}")


def write_text(run: Run, params: nnx.State, done: int, say: Callable[[str], None]) -> None:
    """Samples how held-out text goes on."""
    text = continue_held_out(run.config, run.structure, params, run.corpus.held_out, run.tokenizer)
    if text is not None:
        with writing(run.folder.sample):
            run.folder.sample.write_text(text.prompt + text.continuation, "utf-8")
        say(f"\n--- held-out text ---\n{text.prompt}\n--- its sampled continuation ---\n{text.continuation}\n---")
        run.metrics.write("sample", done, **text._asdict())


def write_picture(run: Run, params: nnx.State, done: int, say: Callable[[str], None]) -> None:
    """Samples how held-out images go on."""
    picture = complete_held_out(run.config, run.structure, params, run.corpus, run.tokenizer)
    if picture is not None:
        with writing(run.folder.picture):
            write_png(run.folder.picture, picture)
        say(f"sample     {run.folder.picture}: held-out images, and below each its sampled completion")
        run.metrics.write("sample", done, picture=run.folder.picture.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
