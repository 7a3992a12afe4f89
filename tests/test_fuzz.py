"""The fuzzer judges right cases right, a wrong result wrong, and says how to see it again."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

import sparse_flash_jax as sfj
from tests import fuzz

ROOT = Path(__file__).resolve().parents[1]


def test_a_case_follows_from_seed_and_number_alone():
    for device in fuzz.IMPLEMENTATIONS:
        first, again = (fuzz.draw_case(3, 47, fuzz.draw_form(3, 2, device)) for _ in range(2))
        assert (str(first), first.pattern.rule) == (str(again), again.pattern.rule)
        ids, ids_again = first.arrays(), again.arrays()
        assert ids.keys() == ids_again.keys()
        for name, x in ids.items():
            np.testing.assert_array_equal(x, ids_again[name], name)


def test_a_form_drawn_twice_is_one_form():
    """So that its cases share what is compiled."""
    assert len({fuzz.draw_form(seed=3, number=number, device="cpu") for number in (0, 0, 1)}) == 2


def test_right_cases(capsys):
    assert fuzz.main(["--seed", "79", "--cases", "3", "--device", "cpu"]) == 0
    assert re.fullmatch(r"3 cases \(xla 3, triton 3\), 0 wrong, \d+ s", capsys.readouterr().out.splitlines()[-1])


def test_as_a_script():
    arguments = ["--seed", "79", "--first", "2", "--cases", "1", "--device", "cpu", "--implementation", "xla"]
    command = [sys.executable, "tests/fuzz.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"1 cases \(xla 1\), 0 wrong, \d+ s", done.stdout.splitlines()[-1])


def test_a_wrong_result_is_reported_and_seen_again(monkeypatch, capsys):
    right = sfj.sparse_attention

    def wrong(*args, **kwargs):
        o, lse = right(*args, **kwargs)
        return o, lse + 0.01

    monkeypatch.setattr(sfj, "sparse_attention", wrong)
    # A seed of its own, since what is compiled here stays wrong; and one whose queries see something.
    assert fuzz.main(["--seed", "89", "--cases", "2", "--device", "cpu", "--implementation", "xla"]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    reports = [line for line in lines if line.startswith("wrong: ")]  # on a slow machine progress is told in between
    assert re.fullmatch(r"2 cases \(xla 2\), 2 wrong, \d+ s", summary)
    assert len(reports) == 2
    assert re.match(r"wrong: B.*: xla: lse: error \S+ exceeds its budget", reports[1])

    python, script, *arguments = shlex.split(reports[1].split("; again: ")[1])
    assert (python, script) == ("python", "tests/fuzz.py")
    assert fuzz.main(arguments) == 1
    assert reports[1] in capsys.readouterr().out.splitlines()
