"""A run that goes on by `--resume` alone has the settings that it was started with."""

import dataclasses
import json
import pathlib
import shutil

import jax
import pytest

import train
from sparse_flash_jax.flax.pattern import QK
from tests.test_train_cli import finished as finished
from tests.test_train_cli import losses
from tests.test_train_cli import text as text
from training.cli import parse
from training.config import TrainConfig, identity, with_defaults
from training.model import transformer_config
from training.presets import PRESETS
from training.run_folder import choose_folder
from training.saved_config import read_config, write_config


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_are_read_as_they_were_written(preset, tmp_path):
    config = PRESETS[preset][1]
    for folder in (None, pathlib.Path("d")):
        data = dataclasses.replace(config.data, folder=folder)
        model = dataclasses.replace(config.model, rates=(0.25, 0.5))
        config = dataclasses.replace(config, out=tmp_path, resume="newest", max_minutes=1.5, data=data, model=model)
        write_config(tmp_path / "config.json", config)
        assert read_config(tmp_path / "config.json") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_settings_of_another_version(tmp_path):
    """New ones have their defaults; those that are no more do not matter here."""
    path = tmp_path / "config.json"
    path.write_text('{"steps": 7, "gone": 1, "model": {"layers": 2, "gone": [1]}}')
    expected = TrainConfig(steps=7)
    assert read_config(path) == dataclasses.replace(expected, model=dataclasses.replace(expected.model, layers=2))


@pytest.mark.parametrize(("saved", "now"), [("false", "none"), ("true", "attention"), ('"full"', "full")])
def test_remat_was_a_bool(tmp_path, saved, now):
    path = tmp_path / "config.json"
    path.write_text(f'{{"model": {{"remat": {saved}}}}}')
    assert read_config(path).model.remat == now
    assert with_defaults({"model.remat": json.loads(saved)})["model.remat"] == now


def test_scores_of_runs_before_there_was_a_choice_learn_as_they_did():
    config = parse(["--attention", "qk", "--model.scored"])
    now = identity(config)
    assert (now.pop("model.rates"), now.pop("model.score_gradient")) == ([], "scaled")
    assert with_defaults(now) == identity(config)


def test_rates_are_those_of_the_heads():
    config = parse(["--attention", "qk", "--model.rates", "0.5", "0.2", "0.1", "0.9", "--model.scored"])
    of_scores = parse(["--attention", "qk", "--model.scored", "--model.score-gradient", "straight_through"])
    assert transformer_config(config, 257).patterns[0] == QK((0.5, 0.2, 0.1, 0.9), scored=True)
    assert transformer_config(of_scores, 257).patterns[0] == QK(0.3, scored=True, score_gradient="straight_through")


def test_goes_on_as_it_began(finished, copied):
    shutil.rmtree(copied / "checkpoints" / "6")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train.main(["--resume", str(copied)]) == 0
    assert losses(copied) == losses(finished)
    assert (copied / "checkpoints" / "6").is_dir()
    before, after = (read_config(root / "config.json") for root in (finished, copied))
    assert after == dataclasses.replace(before, out=None, resume=str(copied))


def test_what_only_watches_may_change(finished):
    resumed = ["--resume", str(finished)]
    saved = dataclasses.replace(read_config(finished / "config.json"), out=None, resume=str(finished))
    assert parse(resumed) == saved
    assert parse([*resumed, "--log-every", "3"]) == dataclasses.replace(saved, log_every=3)


def test_the_run_is_found_by_each_path(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("run", "run/checkpoints", "run/checkpoints/4"):
        assert parse(["--resume", path]).steps == 6
    assert parse(["--resume", "--out", "run"]).steps == 6
    (tmp_path / "runs").mkdir()
    copied.rename(tmp_path / "runs" / "cpu-small-3")
    assert parse(["--resume"]).steps == 6


def test_a_run_may_be_found_by_a_name_that_it_did_not_have(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    root = copied.rename(tmp_path / "runs" / "cpu-small-1")
    write_config(root / "config.json", dataclasses.replace(read_config(root / "config.json"), name="other"))
    assert choose_folder(parse(["--resume"])).root.name == "cpu-small-1"


def test_without_settings_it_is_as_its_preset(copied):
    (copied / "config.json").unlink()
    assert parse(["--resume", str(copied)]).steps == PRESETS["cpu-small"][1].steps


def test_a_preset_has_the_first_word(finished):
    assert parse(["cpu-small", "--resume", str(finished)]).steps == PRESETS["cpu-small"][1].steps


def test_other_settings_are_refused(finished, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("another text entirely\n" * 500)
    for options, messages in (
        (["-n", "7"], ["steps was 6, now 7"]),
        (["-n", "750"], ["steps was 6, now 750"]),  # the preset's
        (["--model.shared-qk"], ["model.shared_qk was False, now True"]),
        (["--data", str(other)], ["text was", "name the same --data"]),
    ):
        assert train.main(["--resume", str(finished), *options]) == 2
        shown = capsys.readouterr().err
        for message in messages:
            assert message in shown


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model": 3}', '{"out": 3}', '{"steps": null}', '{"model": {"attention": ["x"]}}']
)
def test_damaged_settings_are_named(tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert train.main(["--resume", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'config.json'}: not the settings of a run" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "folder"), [(["--resume", "nowhere"], "nowhere"), (["--resume"], "runs/cpu-small-*")]
)
def test_no_run_to_go_on_with(tmp_path, monkeypatch, capsys, options, folder):
    monkeypatch.chdir(tmp_path)
    assert train.main(options) == 2
    assert f"no checkpoint in {folder}; leave out --resume" in capsys.readouterr().err
