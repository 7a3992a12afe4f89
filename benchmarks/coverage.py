"""What Reformer's chunks miss and what that saves: coverage of same-bucket pairs and of large weights, time; by length.

python benchmarks/coverage.py                        both; JSON to benchmarks/results/
python benchmarks/coverage.py --no-speed             coverage alone, for which a CPU will do
python benchmarks/coverage.py --checkpoint RUN       on the queries of a run of train.py, too
python benchmarks/coverage.py --quick                one tiny length, to see that it runs

Ours and Reformer's chunks (`reformer.py`) are given the same vectors and buckets, in three settings:

    fixed     16 buckets, chunks of 64 at any length, as in the code that Reformer's authors published
    rule      16 buckets, chunks of twice the mean bucket, 2 T / 16: Reformer's rule, work growing as T^2 like ours
    growing   a bucket for each 512 tokens, and by the same rule chunks of 1024

`covered` is the share of pairs in the same bucket of any round that a scheme shows; `top` the share of a query's 32
largest weights in exact dense attention, `mass` that of its softmax. `computed` are the pairs that go through products,
shown or not, over those of dense causal attention: in ours those of the tiles that the forward pass visits.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from coverage_counts import SCHEMES, count_pairs, hashed_rounds, weigh_pairs
from coverage_speed import DTYPES, SETTINGS, Setting, speed_cases, timed_cases
from coverage_vectors import KINDS, Vectors, drawn, of_run
from environment import environment, written
from passes import forward_tiles
from selection import QUICK_LENGTH

RESULTS = Path(__file__).resolve().parent / "results"
GPU_LENGTHS = (1024, 4096, 16_384, 65_536)
CPU_LENGTHS = (1024, 2048, 4096, 8192, 16_384)
ROUNDS = (1, 2, 4)
SAMPLES, QUICK_SAMPLES = 256, 32  # queries of each head
SEED = 1  # of hashes, the same at each length, and of sampled queries
HEADER = (
    "shares of same-bucket pairs, of the 32 largest weights, and of all weights; computed: of dense causal's pairs\n"
    f"{'vectors':<10}{'setting':<9}{'T':>7}{'buckets':>8}{'chunk':>7}{'rounds':>7}{'density':>9}"
    f"{'ours':>7}{'Ref.':>7}{'top':>8}{'ours':>7}{'Ref.':>7}{'mass':>8}{'ours':>7}{'Ref.':>7}{'comp.':>8}{'Ref.':>7}"
)
SPEED_HEADER = f"\nms, forward + backward, hashing and sorting inside\n{'T':>7}{'batch':>6} {'scheme':<26}{'ms':>10}"


def main() -> None:
    """Counts, times, prints tables, writes JSON."""
    args = _arguments()
    platform = jax.default_backend()
    lengths = (QUICK_LENGTH,) if args.quick else args.lengths or (GPU_LENGTHS if platform == "gpu" else CPU_LENGTHS)
    samples = QUICK_SAMPLES if args.quick else SAMPLES
    settings = [setting for setting in SETTINGS if setting.name in args.settings]
    sources: list[tuple[str, Callable[..., Vectors]]] = [
        (kind, functools.partial(drawn, kind)) for kind in args.vectors
    ]
    if args.checkpoint is not None:
        sources.append(("trained", of_run(args.checkpoint, args.layer)))
    result: dict[str, Any] = {"environment": environment(), "coverage": [], "speed": []}
    path = args.out or (None if args.quick else RESULTS / f"coverage-{platform}.json")
    with written(result, path) as keep:
        print(HEADER)
        for name, source in sources:
            for length in lengths:
                vectors = source(length, heads=args.heads)
                for setting in settings:
                    for record in _covered(setting, vectors, length, args.rounds, samples):
                        result["coverage"].append({"vectors": name, **record})
                        print(_row(result["coverage"][-1]), flush=True)
                keep()
        if args.no_speed:
            return
        print(SPEED_HEADER)
        for record in timed_cases(
            speed_cases(settings, args.rounds, lengths, platform), 1 if args.quick else args.samples
        ):
            result["speed"].append(record)
            print(_speed_row(record), flush=True)
            keep()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures what exact buckets and Reformer's chunks show, and take.")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence; default those of the platform")
    parser.add_argument("--vectors", nargs="*", choices=KINDS, default=KINDS, help="drawn queries; default all kinds")
    parser.add_argument("--checkpoint", type=Path, help="a run of train.py, whose queries are used too")
    parser.add_argument("--layer", type=int, help="of that run; default the one in the middle")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="default all")
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=ROUNDS, help="hashes; 2 are not timed, 4 in one setting"
    )
    parser.add_argument("--heads", type=int, default=4, help="heads, each with queries of its own")
    parser.add_argument("--no-speed", action="store_true", help="coverage alone")
    parser.add_argument("--quick", action="store_true", help="one tiny length, few queries, one sample of times")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median time is taken")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/coverage-PLATFORM.json")
    return parser.parse_args()


def _covered(
    setting: Setting, vectors: Vectors, length: int, after: tuple[int, ...], samples: int
) -> Iterator[dict[str, Any]]:
    """Counts after each of several numbers of rounds, of which the fewer are the first ones of the more."""
    start = time.perf_counter()
    num_buckets, chunk = setting.buckets(length), setting.chunk(length)
    rounds, plans = hashed_rounds(vectors, num_buckets, chunk, max(after), SEED)
    counts = count_pairs(rounds, after)
    weights = weigh_pairs(rounds, vectors, after, samples, SEED)
    heads, head_dim = vectors.q.shape[2:]
    causal = heads * length * (length - 1) // 2
    tiles = [forward_tiles(plan, DTYPES[jax.default_backend()], head_dim, None) for plan in plans]
    tiled = [each.executed_tiles * each.block_q * each.block_k / causal for each in tiles]
    chunked = 2 * chunk * -(-length // chunk) * chunk * heads / causal
    seconds = time.perf_counter() - start
    for number, pairs, shares in zip(after, counts, weights, strict=True):
        yield {
            "setting": setting.name,
            "length": length,
            "heads": heads,
            "buckets": num_buckets,
            "chunk": chunk,
            "rounds": number,
            "density": pairs["same_bucket"] / causal,
            "pairs": pairs,
            "covered": {name: pairs[name] / max(pairs["same_bucket"], 1) for name in SCHEMES[1:]},
            **shares,
            "computed": {"ours": sum(tiled[:number]), "reformer": number * chunked},
            "samples": samples,
            "seconds": seconds,
        }


def _row(record: dict[str, Any]) -> str:
    cells = [f"{record['vectors']:<10}{record['setting']:<9}{record['length']:>7}{record['buckets']:>8}"]
    cells.append(f"{record['chunk']:>7}{record['rounds']:>7}{record['density']:>9.4f}")
    cells += [f"{record['covered'][name]:>7.3f}" for name in SCHEMES[1:]]
    for share in ("top", "mass"):
        cells.append(f"{record[share]['same_bucket']:>8.3f}")
        cells += [f"{record[share][name]:>7.3f}" for name in SCHEMES[1:]]
    return "".join(cells) + f"{record['computed']['ours']:>8.3f}{record['computed']['reformer']:>7.3f}"


def _speed_row(record: dict[str, Any]) -> str:
    start = f"{record['length']:>7}{record['batch']:>6} {record['scheme']:<26}"
    if "failed" in record:
        return f"{start}  {record['failed']}"
    return f"{start}{1e3 * record['seconds']['median']:>10.3f}"


if __name__ == "__main__":
    main()
