"""Generation with a cache: the scores of a full forward pass, token for token, for each pattern; and the command."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from models import generate as command
from models.cache import cacheable, init_cache, prefill, step
from models.decoding import generate, stream
from models.documents import document_ids
from models.sampler import Sampler
from models.transformer import Transformer, TransformerConfig
from sparse_flash_jax.flax.auto import Auto
from sparse_flash_jax.flax.nnx import SparseSelfAttention
from sparse_flash_jax.flax.pattern import QK, BlockTopK, Dense, Hash, Window
from tests.test_train_cli import TINY
from training.checkpoint import Checkpoints
from training.cli import parse
from training.config import identity
from training.model import transformer_config
from training.optimizer import make_optimizer
from training.saved_config import write_config
from training.step import evaluation_key, init_state
from training.text_stream import TextStream
from training.tokens import ByteTokenizer, FileTokenizer
from training.trained import load_trained

B, T = 2, 24
LENGTHS = np.asarray([11, 7], np.int32)  # prompts of two rows; both then go on for as many tokens
COUNT = T - int(LENGTHS.max())
KEY = jax.random.key(3)
TOKENS = np.random.default_rng(0).integers(1, 50, (B, T)).astype(np.int32)
END = 0
SMALL = TransformerConfig(
    vocab_size=50, num_layers=1, width=32, num_heads=4, max_length=T, positions="rope", shared_qk=False
)
MIX = (Dense(window=5), Hash(4, exclude_self=True))


def make(attention, **changes):
    """A model with parameters that cost no compilation."""
    layers = len(attention) if isinstance(attention, tuple) else 1
    config = dataclasses.replace(SMALL, attention=attention, num_layers=layers, **changes)
    structure, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * draw.standard_normal(x.shape, x.dtype)), params)
    return nnx.merge(structure, params)


def padded(tokens, fill=1):
    """The prompts alone, of the whole length: what follows them is of no matter."""
    return jnp.where(jnp.arange(tokens.shape[1])[None] < LENGTHS[:, None], tokens, fill)


def rows_from(x, first):
    """COUNT places of each row, from its own first."""
    return np.stack([row[start : start + COUNT] for row, start in zip(np.asarray(x), first, strict=True)])


def cached_logits(model, tokens, documents=None):
    """Scores that follow the prompts, and those that follow each of COUNT more tokens."""
    cache = init_cache(model, B, T, key=KEY, documents=documents is not None)
    lengths = jnp.asarray(LENGTHS)
    prompts, cache = prefill(model, padded(tokens), cache, lengths=lengths, segment_ids=documents)

    def next_token(carry, following):
        cache, positions = carry
        token, document = following
        hidden, cache = step(model, token, cache, positions, segment_ids=document)
        return (cache, positions + 1), hidden

    ids = None if documents is None else jnp.asarray(rows_from(documents, LENGTHS).T)
    following = jnp.asarray(rows_from(tokens, LENGTHS).T), ids
    _, hidden = jax.jit(lambda carry, following: jax.lax.scan(next_token, carry, following))(
        (cache, lengths), following
    )
    return model.logits(prompts), model.logits(jnp.swapaxes(hidden, 0, 1))


def check_against_full(model, tokens, documents=None):
    tokens = jnp.asarray(tokens)
    full = model(tokens, key=KEY, segment_ids=documents)
    of_prompts, following = cached_logits(model, tokens, documents)
    # Rounding alone: at most 4e-7 was seen, of scores up to 1.5.
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(of_prompts[row, :length], full[row, :length], rtol=0, atol=1e-6)
    np.testing.assert_allclose(following, rows_from(full, LENGTHS), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("attention", "changes"),
    [
        (
            (Dense(), Hash(4, exclude_self=True), QK((0.4, 0.7, 0.2, 0.9)), Hash(4, centred=True, exclude_self=True)),
            {"num_key_heads": 2, "positions": "learned"},
        ),
        (
            (
                Dense(window=5),
                Hash(4),
                Hash(4, centred=True),
                Hash(4, rotated=True),
                Hash(4, exclude_self=True, near=3),
            ),
            {"shared_qk": True, "shared_scale": 1.0},
        ),
        # Sinks that leave the window before, at and after the prompts' ends; more than a row has; no sinks.
        (
            (Window(4, sinks=2), Window(9, sinks=3), Window(1, sinks=50), Window(5)),
            {"num_key_heads": 2, "positions": "learned"},
        ),
    ],
    ids=["separate", "shared", "sinks"],
)
def test_scores_are_those_of_a_full_forward_pass(attention, changes):
    check_against_full(make(attention, **changes), TOKENS)


def test_documents_stay_apart():
    tokens = TOKENS.copy()
    tokens[0, [4, 13, 18]] = END  # in the prompt, and twice after it
    tokens[1, [6, 9]] = END  # the prompt's last token
    attention = (Dense(), Hash(2, exclude_self=True, window=5))
    model = make(attention, num_key_heads=2, positions="learned")
    check_against_full(model, tokens, document_ids(jnp.asarray(tokens), END))


def test_each_document_has_its_sinks():
    """With sinks a document is a run of equal ids, in a forward pass and token by token: an id may come again."""
    model = make((Window(2, sinks=3), Window(30, sinks=2)), num_key_heads=2)
    # Documents end in the prompt, with it and after it; one is shorter than its sinks.
    ids = jnp.asarray([[0] * 5 + [1] * 9 + [0] * 10, [3] * 7 + [0] * 2 + [3] * 15], jnp.int32)
    check_against_full(model, TOKENS, ids)


def test_a_cache_of_sinks_is_small_and_needs_no_prompt():
    layer = SparseSelfAttention(32, 4, Window(4, sinks=2), rope_base=100.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, T, 32))
    cache = layer.init_cache(1, 1000)
    assert cache.k.shape[2] == 6
    step_once = nnx.jit(lambda layer, x, cache, positions: layer.step(x, cache, positions=positions))
    for place, expected in enumerate(np.asarray(layer(x))[0]):
        o, cache = step_once(layer, x[:, place : place + 1], cache, jnp.full(1, place, jnp.int32))
        np.testing.assert_allclose(o[0, 0], expected, rtol=0, atol=1e-6)


def test_what_sees_nothing_is_zero():
    layer = SparseSelfAttention(32, 4, Hash(2, exclude_self=True), shared_qk=True, rngs=nnx.Rngs(0))
    cache = layer.init_cache(1, T, key=KEY)
    x = jax.random.normal(jax.random.key(0), (1, 1, 32))
    first, cache = layer.step(x, cache, positions=jnp.zeros(1, jnp.int32))
    second, cache = layer.step(x, cache, positions=jnp.ones(1, jnp.int32))
    np.testing.assert_array_equal(first, 0.0)
    np.testing.assert_allclose(second, layer.out(layer.value(x)), atol=1e-6)
    assert float(jnp.max(jnp.abs(second))) > 0


KEYS: dict[str, Any] = {"key": jax.random.key(1), "pattern_key": KEY}


def test_greedy_tokens_are_those_of_full_forward_passes():
    model = make((Dense(window=5), Hash(4, exclude_self=True)))
    forward = jax.jit(lambda tokens: model(tokens, key=KEY)[:, :, :50])
    prompts = np.asarray(padded(jnp.asarray(TOKENS)))
    rows = prompts.copy()
    for place in LENGTHS + np.arange(COUNT)[:, None]:
        best = np.argmax(np.asarray(forward(rows)), axis=-1)
        rows[np.arange(B), place] = best[np.arange(B), place - 1]
    expected = rows_from(rows, LENGTHS)
    # One row ends with a token that the other has nowhere.
    length = next(place for place in range(1, COUNT) if expected[0, place] not in {*expected[0, :place], *expected[1]})
    stop = int(expected[0, length])
    expected[0, length:] = stop
    options = {**KEYS, "sampler": Sampler(0.0), "lengths": LENGTHS, "stop_token": stop}
    prompts = prompts[:, : LENGTHS.max()]
    np.testing.assert_array_equal(generate(model, prompts, COUNT, **options), expected)
    np.testing.assert_array_equal(np.stack(list(stream(model, prompts, COUNT, **options)), axis=1), expected)
    options["lengths"] = LENGTHS[[0, 0]]
    until_both_end = list(stream(model, prompts[[0, 0]], COUNT, **options))
    np.testing.assert_array_equal(np.stack(until_both_end, axis=1), expected[[0, 0], : length + 1])


@pytest.mark.parametrize("packed", [False, True])
def test_documents_that_begin_while_tokens_are_drawn(packed):
    """The token that is drawn first is made the end of documents, so that one ends among those that are drawn."""
    model = make((Dense(),))
    plain = generate(model, TOKENS[:1, :8], COUNT, **KEYS, sampler=Sampler(0.0))
    end = int(np.asarray(plain)[0, 0])
    options = {**KEYS, "sampler": Sampler(0.0), "document_end": end, "packed": packed}
    drawn = np.asarray(generate(model, TOKENS[:1, :8], COUNT, **options))
    row = np.concatenate([TOKENS[:1, :8], drawn], axis=1)
    assert drawn[0, 0] == end
    scores = model(jnp.asarray(row), key=KEY, segment_ids=document_ids(jnp.asarray(row), end, packed=packed))
    np.testing.assert_array_equal(drawn[0], np.argmax(np.asarray(scores)[0, 7:-1, :50], axis=-1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": QK(0.3, scored=True)}, NotImplementedError, "later tokens"),
        ({"attention": BlockTopK(8, 2)}, NotImplementedError, r"BlockTopK\(.*mean of a whole block"),
        ({"attention": Hash(4, rounds=2)}, NotImplementedError, r"Hash\(.* has several rounds.*use rounds=1"),
        ({"attention": Hash(4, centred=True), "document_end": END}, ValueError, "across documents"),
        ({"positions": "learned", "count": 15}, ValueError, "max_length=24"),
        ({"count": 0}, ValueError, "count must be at least 1"),
        ({"prompt": np.zeros((1, 0), np.int32)}, ValueError, "one token, got shape"),
        ({"lengths": np.asarray([11, 0])}, ValueError, "lengths must be"),
    ],
)
def test_what_cannot_be_generated(options, error, message):
    model = {name: options.pop(name) for name in ("attention", "positions") if name in options}
    call = {"prompt": TOKENS[:, :11], "count": 4, **KEYS, **options}
    with pytest.raises(error, match=message):
        generate(make(**({"attention": Dense()} | model)), call.pop("prompt"), call.pop("count"), **call)


def test_auto_is_fixed_before_it_is_cached(monkeypatch):
    chosen = Hash(4)
    monkeypatch.setattr(Auto, "choose", lambda self, length, **kind: type("Choice", (), {"pattern": chosen}))
    model = make((Auto(chosen),))
    assert cacheable(model, T).blocks[0].attention.pattern == chosen
    assert isinstance(model.blocks[0].attention.pattern, Auto)
    with pytest.raises(ValueError, match="choose"):
        init_cache(model, 1, T, key=KEY)


def test_sampler_cuts_off_what_is_unlikely():
    p = np.asarray([0.05, 0.4, 0.25, 0.3])
    logits = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32))[None], (4000, 1))

    def shares(**options):
        token = np.asarray(Sampler(**options)(logits, jax.random.key(0)))
        return np.bincount(token, minlength=4) / len(token)

    # Three standard deviations of 4000 draws.
    np.testing.assert_allclose(shares(), p, atol=0.024)
    np.testing.assert_allclose(shares(top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.024)
    np.testing.assert_allclose(shares(top_p=0.75), [0, 8 / 19, 5 / 19, 6 / 19], atol=0.024)
    np.testing.assert_allclose(shares(top_k=3, top_p=0.6), [0, 4 / 7, 0, 3 / 7], atol=0.024)
    np.testing.assert_allclose(shares(temperature=0.5), p**2 / np.sum(p**2), atol=0.024)
    greedy: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}]
    for options in greedy:
        np.testing.assert_array_equal(shares(**options), [0, 1, 0, 0])
    wrong: list[dict[str, Any]] = [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            Sampler(**options)


def test_text_comes_in_whole_characters():
    bytes_of = "aé漢🙂z".encode()
    text = TextStream(ByteTokenizer(), list(b"before"))
    pieces = [text.add(token) for token in (*bytes_of, 256, 0xE6)]
    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "🙂", "z", "", ""]
    assert text.end() == "\ufffd"


def test_words_keep_the_space_before_them(tmp_path):
    words = {"one": 0, "two": 1, "three": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="one"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    text = TextStream(FileTokenizer(tmp_path / "words.json"), [0])
    assert [text.add(token) for token in (1, 2, 0)] == [" two", " three", " one"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run as train.py leaves it, with checkpoints of parameters that two seeds gave."""
    root = tmp_path_factory.mktemp("run")
    config = parse([*TINY, "--data", "gone.txt", "--out", str(root)])
    write_config(root / "config.json", config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with Checkpoints(root / "checkpoints", 2, identity(config) | {"text": "gone"}) as checkpoints:
        for step_number in (4, 6):
            _, state = init_state(transformer_config(config, 257), optimizer, seed=step_number)
            checkpoints.save(state._replace(step=jnp.asarray(step_number, jnp.int32)), step_number)
    return root


def generated(capsys, *options):
    status = command.main([str(option) for option in options])
    return status, *capsys.readouterr()


def test_command_continues_a_prompt(run, capsys):
    options = ("--prompt", "line 7: ", "--tokens", 12)
    status, shown, said = generated(capsys, run, *options, "--samples", 2, "--top-k", 50)
    assert status == 0
    first, second = (part.split("---\n")[1] for part in shown.split("--- sample ")[1:])
    assert first.startswith("line 7: ")
    assert first != second
    assert f"{run / 'checkpoints' / '6'}: 12 tokens" in said
    assert generated(capsys, run, *options, "--top-k", 50)[1] == first.rstrip("\n") + "\n"

    trained = load_trained(run / "checkpoints" / "4")
    prompt = np.frombuffer(b"line 7: ", np.uint8)[None]
    keys: dict[str, Any] = {"key": jax.random.key(0), "pattern_key": evaluation_key(0)}
    expected = generate(trained.model, prompt, 12, sampler=Sampler(0.0), **keys)
    status, shown, _ = generated(capsys, trained.checkpoint, *options, "--temperature", 0)
    assert status == 0
    assert shown == f"line 7: {ByteTokenizer().decode(np.asarray(expected)[0].tolist())}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "no run in nowhere"),
        (["RUN/checkpoints/5"], "no checkpoint RUN/checkpoints/5"),
        (["RUN"], "--prompt TEXT or --prompt-file FILE"),
        (["RUN", "--prompt", ""], "the prompt is empty"),
        (["RUN", "--prompt-file", "RUN/nowhere.txt"], "nowhere.txt: not a readable UTF-8 file: No such file"),
        (["RUN", "--prompt", "line", "--tokens", "61"], "more than the 64 that the model was trained on"),
        (["RUN", "--prompt", "line", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["RUN", "--prompt", "line", "--top-p", "2"], "--top-p must lie in (0, 1], got 2.0"),
    ],
)
def test_command_errors_are_one_line(run, capsys, options, message):
    status, _, said = generated(capsys, *(option.replace("RUN", str(run)) for option in options))
    assert status == 2
    assert message.replace("RUN", str(run)) in said
    assert said.count("\n") == 1


def test_command_names_what_is_damaged(run, tmp_path, capsys):
    def damaged(name, damage):
        broken = tmp_path / name
        shutil.copytree(run, broken)
        damage(broken)
        status, _, said = generated(capsys, broken, "--prompt", "a")
        assert status == 2
        assert said.count("\n") == 1
        return said

    def cut(run):
        for path in (run / "checkpoints" / "6" / "state").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                path.write_bytes(path.read_bytes()[:100])

    def edit(path, change):
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    def set_model(**values):
        return lambda run: edit(run / "config.json", lambda record: record["model"].update(values))

    gone = lambda run: edit(run / "config.json", lambda record: record["data"].update(tokenizer="gone.json"))
    assert "damaged checkpoint" in damaged("arrays", cut)
    assert "damaged checkpoint" in damaged("state", lambda run: shutil.rmtree(run / "checkpoints" / "6" / "state"))
    assert "damaged" in damaged("record", lambda run: shutil.rmtree(run / "checkpoints" / "6" / "record"))
    assert "no checkpoint in" in damaged("none", lambda run: shutil.rmtree(run / "checkpoints"))
    assert "gone.json: not a readable tokenizers JSON file" in damaged("tokenizer", gone)
    assert "was trained with model.width 16" in damaged("width", set_model(width=32))


def test_auto_is_what_it_was_in_training(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    config, record = copied / "config.json", copied / "checkpoints" / "6" / "record" / "metadata"
    saved = json.loads(config.read_text())
    saved["model"] |= {"attention": ["auto"], "implementation": "triton"}
    config.write_text(json.dumps(saved))
    saved = json.loads(record.read_text())
    saved["identity"] |= {"model.attention": ["auto"], "model.implementation": "triton", "auto": "hash"}
    record.write_text(json.dumps(saved))
    model = load_trained(copied).model
    assert model.config.patterns == (Hash(4, exclude_self=True),)
    assert model.config.implementation is None
