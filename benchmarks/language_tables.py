"""The tables of what `language_models.py` measured: how well each kind learns, and how much sooner than dense."""

import math
from pathlib import Path

from environment import device_in_a_word, source
from language_results import RESULTS, Curve, load_curves, sooner
from language_runs import GROUPS, KINDS, Run
from markdown_table import markdown, or_dash, span
from sweep_results import paper

DENSE = "dense-own-keys"
BESIDE_DENSE = ("headline", "sparse")
TEXTS = {"enwik8": "enwik8", "eltec": "novels"}
Pair = tuple[Curve, Curve]  # dense, and another of the same length and seed


def language_tables(folder: Path = RESULTS) -> dict[str, str]:
    """Returns each table by the name in its markers, but for those of which nothing has been measured."""
    curves = load_curves(folder)
    tables = {}
    for name, group, table in (
        ("language-models", "choices", _choices),
        ("paper", "paper", _paper),
        ("paper-training", "paper", _beside_paper),
        ("reformer", "reformer", _beside_reformer),
    ):
        found = [curves[run] for run in GROUPS[group] if run in curves]
        if found and (made := table(found)):
            tables[name] = f"{made}\n\n{_source(group, found)}."
    for name, group in (("sooner", "headline"), ("longer", "longer"), ("sparse", "sparse")):
        if pairs := pairs_of(curves, group):
            tables[name] = f"{_sooner(pairs)}\n\n{_source(group, _each(pairs))}."
    if pairs := beside_dense(curves):
        tables["seeds"] = f"{_over_seeds(pairs)}\n\n{_source(' '.join(BESIDE_DENSE), _each(pairs))}."
    return tables


def _each(pairs: list[Pair]) -> list[Curve]:
    return [curve for pair in pairs for curve in pair]


def _source(group: str, curves: list[Curve]) -> str:
    """The command for the group, whatever else was measured with it."""
    of_group = {"command": f"python benchmarks/language_models.py {group}", "file": f"results/{RESULTS.name}"}
    return source(*(curve.environment | of_group for curve in curves))


def pairs_of(curves: dict[Run, Curve], group: str) -> list[Pair]:
    """The pairs of a group's dense and sparse runs of which both are done, kind by kind, the shortest first."""
    runs = GROUPS[group]
    pairs = zip(runs[::2], runs[1::2], strict=True)
    done = [(curves[dense], curves[sparse]) for dense, sparse in pairs if dense in curves and sparse in curves]
    kinds = [run.attention for run in runs]
    return sorted(done, key=lambda pair: (kinds.index(pair[1].run.attention), pair[0].run.length, pair[0].run.seed))


def beside_dense(curves: dict[Run, Curve]) -> list[Pair]:
    """The pairs of all groups that have each length and seed."""
    return [pair for group in BESIDE_DENSE for pair in pairs_of(curves, group)]


def _choices(curves: list[Curve]) -> str:
    """All kinds at one length, the best first."""
    dense = next((curve for curve in curves if curve.run.attention == DENSE), None)
    quality = ["held-out loss, nats a byte", "bits per byte"]
    rows = [["layers", "keys", *quality, "tokens/s", "over dense", "visible, last step", "peak memory"]]
    for curve in sorted(curves, key=lambda curve: curve.final["loss"]):
        rows.append(
            [
                curve.run.kind.words,
                "shared" if curve.run.kind.shared else "own",
                f"{curve.final['loss']:.3f}",
                f"{curve.final['bits_per_byte']:.3f}",
                _speed([curve], dense or curves[0]),
                or_dash(_speedup(curve, dense), "{:.2f}x"),
                f"{curve.visible[-1].mean():.3g}",
                _memory([curve]),
            ]
        )
    return markdown(rows)


def by_text(curves: list[Curve]) -> dict[str, list[Curve]]:
    """Curves by text and length, as a reader has these."""
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(f"{TEXTS[curve.run.text]}, {curve.run.length // 1024}k tokens", []).append(curve)
    return found


def _paper(curves: list[Curve]) -> str:
    """The paper's kinds, a row for each, with two columns for each text and length."""
    texts = {title: {curve.run.kind: curve for curve in shown} for title, shown in by_text(curves).items()}
    rows = [["layers", *(f"{title}: {what}" for title in texts for what in ("loss, nats a byte", "tokens/s"))]]
    for kind in dict.fromkeys(curve.run.kind for curve in curves):
        found = [of_kind.get(kind) for of_kind in texts.values()]
        pairs = (
            ("-", "-") if curve is None else (f"{curve.final['loss']:.3f}", _speed([curve], curves[0]))
            for curve in found
        )
        rows.append([kind.words, *(cell for pair in pairs for cell in pair)])
    return markdown(rows)


def _beside_paper(curves: list[Curve]) -> str:
    """How much faster than dense models the paper's kinds train, ours and as it says of its own; "" without a pair."""
    rows = [
        ["layers", "T", "the paper's, over its dense model", "ours, over cuDNN's", "ours, loss over dense, nats a byte"]
    ]
    of_enwik8 = {(curve.run.attention, curve.run.length): curve for curve in curves if curve.run.text == "enwik8"}
    for attention, factors in paper()["training_speedup"].items():
        for length, factor in factors.items():
            curve, dense = (of_enwik8.get((name, int(length))) for name in (attention, "dense"))
            if curve is None or dense is None:
                continue
            speedup = or_dash(_speedup(curve, dense), "{:.2f}x")
            loss = f"{curve.final['loss'] - dense.final['loss']:+.3f}"
            rows.append([KINDS[attention].words, length, f"{factor}x", speedup, loss])
    return markdown(rows) if rows[1:] else ""


def _speedup(curve: Curve, dense: Curve | None) -> float | None:
    """Tokens a second over a dense model's; None without one on the same kind of device."""
    if dense is None or dense.environment["device"] != curve.environment["device"]:
        return None
    return curve.tokens_per_second() / dense.tokens_per_second()


def _speed(curves: list[Curve], first: Curve) -> str:
    """Tokens a second, and the devices in brackets if one is another than the first one's of a table."""
    devices = {curve.environment["device"]: device_in_a_word(curve.environment) for curve in curves}
    elsewhere = "" if devices.keys() == {first.environment["device"]} else f" ({', '.join(devices.values())})"
    return f"{span([curve.tokens_per_second() / 1e3 for curve in curves], '{:.0f}')} k{elsewhere}"


def _memory(curves: list[Curve]) -> str:
    """Most memory in use at once, where the device tells."""
    peaks = [curve.peak_bytes / 2**30 for curve in curves if curve.peak_bytes]
    return f"{span(peaks, '{:.1f}')} GiB" if peaks else "-"


def _beside_reformer(curves: list[Curve]) -> str:
    """Exact buckets, Reformer's chunks and dense attention, text by text; below, what the paper says of its own."""
    rows = [["data", "layers", "loss, nats", "bits a byte or pixel", "perplexity", "tokens/s", "peak memory"]]
    for curve in curves:
        loss = curve.final["loss"]
        rows.append(
            [
                f"{curve.run.text}, {curve.run.length} tokens",
                curve.run.kind.words,
                f"{loss:.3f}",
                f"{loss / math.log(2):.3f}",
                f"{math.exp(loss):.3f}",
                _speed([curve], curves[0]),
                _memory([curve]),
            ]
        )
    for text, length in dict.fromkeys((curve.run.text, curve.run.length) for curve in curves):
        for layers, said in paper()["quality"].get(text, {}).items():
            loss = math.log(said["perplexity"]) if "perplexity" in said else math.log(2) * said["bits"]
            quality = f"{loss:.3f}", f"{loss / math.log(2):.3f}", f"{math.exp(loss):.3f}"
            rows.append([f"{text}, {length} tokens", f"the paper's, {layers}", *quality, "-", "-"])
    return markdown(rows)


def _sooner(pairs: list[Pair]) -> str:
    """Dense against the sparse model, pair by pair."""
    columns = [f"{name}, {what}" for what in ("bits per byte", "tokens/s") for name in ("dense", "other")]
    late = f"dense after {max(pairs[0][0].held_out)} steps, nats a byte"
    several = len({sparse.run.kind for _, sparse in pairs}) > 1
    rows = [[*(["other"] if several else []), "T", "seed", *columns, late, "reached by dense", "by other", "sooner"]]
    for dense, sparse in pairs:
        both = dense, sparse
        loss, slow, fast = sooner(dense, sparse)
        at = [f"{loss:.3f}", f"{slow:.0f} s", or_dash(fast, "{:.0f} s"), or_dash(fast and slow / fast, "{:.1f}x")]
        bits = [f"{curve.final['bits_per_byte']:.3f}" for curve in both]
        speeds = [_speed([curve], pairs[0][0]) for curve in both]
        other = [sparse.run.kind.words] if several else []
        rows.append([*other, str(dense.run.length), str(dense.run.seed), *bits, *speeds, *at])
    return markdown(rows)


def _over_seeds(pairs: list[Pair]) -> str:
    """Least and most of the seeds, a row for each length and kind, dense first."""
    first = pairs[0][0]
    titles = ["T", "layers", "bits per byte", "tokens/s", "visible, last step", "peak memory"]
    rows = [[*titles, f"dense's loss after {max(first.held_out)} steps is reached"]]
    for length in sorted({dense.run.length for dense, _ in pairs}):
        of_length = [pair for pair in pairs if pair[0].run.length == length]
        dense = {dense.run: dense for dense, _ in of_length}  # each is beside several kinds
        rows.append([str(length), *_of_seeds(list(dense.values()), first), ""])
        for of_kind in by_kind(of_length).values():
            rows.append([str(length), *_of_seeds([sparse for _, sparse in of_kind], first), how_much_sooner(of_kind)])
    return markdown(rows)


def _of_seeds(curves: list[Curve], first: Curve) -> list[str]:
    """The cells of a kind."""
    return [
        curves[0].run.kind.words,
        span([curve.final["bits_per_byte"] for curve in curves], "{:.3f}"),
        _speed(curves, first),
        span([curve.visible[-1].mean() for curve in curves], "{:.3f}"),
        _memory(curves),
    ]


def by_kind(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Pairs by the attention of their sparse runs."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair[1].run.attention, []).append(pair)
    return found


def how_much_sooner(pairs: list[Pair]) -> str:
    """How many times sooner than dense each has the loss that dense ends with, and how many seeds if not all have."""
    reached = [(slow, fast) for _, slow, fast in (sooner(*pair) for pair in pairs)]
    factors = [slow / fast for slow, fast in reached if fast is not None]
    seeds = f"{len(factors)} of {len(pairs)} seeds"
    if not factors:
        return seeds
    return f"{span(factors, '{:.1f}')}x sooner" + ("" if len(factors) == len(pairs) else f", {seeds}")
