"""How much held-out loss depends on the hashes or drops that evaluation draws: a run's own, and others.

python benchmarks/evaluation_draws.py RUN [RUN ...]         runs of train.py, on their held-out text
python benchmarks/evaluation_draws.py RUN --draws 8 --windows 64

`train.py` evaluates with one draw, that of the run's seed; a run with --model.fixed-draws was trained on that draw,
others on a new one at each step.
"""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

from environment import environment, written
from flax import nnx
from loaded_run import load_run

from training.batches import evaluation_batches
from training.data import Stream
from training.evaluation import evaluate
from training.step import evaluation_key, make_evaluation_step
from training.trained import Trained

RESULTS = Path(__file__).resolve().parent / "results"
OTHERS = 1000  # seeds from here on draw what no run did


def main() -> None:
    """Evaluates, prints a table, writes JSON."""
    args = _arguments()
    loaded = [load_run(run) for run in args.runs]  # what cannot be read ends this before anything is written
    described = environment()
    result: dict[str, Any] = {"environment": described, "runs": []}
    path = args.out or RESULTS / f"evaluation-draws-{described['platform']}.json"
    width = max(len(name) for name in ("run", *(run.name for run in args.runs)))
    with written(result, path) as keep:
        print(f"{'run':<{width}}{'own draw':>10}{'others':>10}{'least':>10}{'most':>10}")
        for run, (trained, held_out) in zip(args.runs, loaded, strict=True):
            record = {"run": run.name} | _measured(trained, held_out, args.windows, args.draws)
            result["runs"].append(record)
            others = record["others"]
            columns = record["own"], statistics.mean(others), min(others), max(others)
            print(f"{run.name:<{width}}{''.join(f'{loss:10.4f}' for loss in columns)}", flush=True)
            keep()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares held-out losses over draws of hashes or drops.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of checkpoints in them")
    parser.add_argument("--draws", type=int, default=8, help="others than the run's own")
    parser.add_argument("--windows", type=int, default=32, help="of the held-out text, each as long as in training")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/evaluation-draws-PLATFORM.json")
    return parser.parse_args()


def _measured(trained: Trained, held_out: Stream, windows: int, draws: int) -> dict[str, Any]:
    """The run's settings, and its losses, nats a token."""
    config = trained.config
    batch, packing = config.batch, config.data.packing
    batches = list(evaluation_batches(held_out, batch.size, batch.length, windows, packing))
    structure, params = nnx.split(trained.model, nnx.Param)
    end_token = trained.tokenizer.end if config.data.separate_documents else None

    step = make_evaluation_step(structure, config.seed, end_token, packed=packing == "documents")
    drawn = lambda seed: functools.partial(step, key=evaluation_key(seed))

    return {
        **{name: getattr(config.model, name) for name in ("attention", "buckets", "rate", "fixed_draws")},
        "steps": config.steps,
        "length": batch.length,
        "windows": windows,
        "own": evaluate(step, params, batches).loss,
        "others": [evaluate(drawn(OTHERS + number), params, batches).loss for number in range(draws)],
    }


if __name__ == "__main__":
    main()
