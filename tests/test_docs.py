"""What the documentation shows is so: its Python runs, its commands are there, and its errors are the package's."""

import ast
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest

from sparse_flash_jax.flax import linen, nnx
from training.cli import parse
from training.config import DistributedConfig
from training.mesh import make_layout

ROOT = pathlib.Path(__file__).parents[1]
READMES = ["README.md", "models/README.md"]
PAGES = [*READMES, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
BUILD_TOOLS = {"pytest"}  # of the dev extra, run as modules


def fenced(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page, "python")])
def test_python_runs(page):
    if page == "docs/devices.md" and jax.device_count() < 8:
        pytest.skip("needs eight devices")
    names = {"__name__": "page"}
    # As a reader has it, who has not set the strict rules of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in fenced(page, "python"):
            if page in READMES:  # whose blocks stand alone
                names = {"__name__": "page"}
            exec(compile(block, page, "exec"), names)


def commands(page):
    """The words of each command in the page's shell blocks, from `python` on."""
    for block in fenced(page, "bash"):
        for command in re.split(r"&&|\n", block.replace("\\\n", " ")):
            words = shlex.split(command)
            start = next((i for i, word in enumerate(words) if word.rsplit("/", 1)[-1] in ("python", "python3")), None)
            if start is not None:
                yield words[start + 1 :]


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page, "bash")])
def test_commands_are_there(page):
    for words in commands(page):
        if words[0] == "-m":
            assert words[1] in BUILD_TOOLS or importlib.util.find_spec(words[1]), words
        else:
            assert (ROOT / words[0]).is_file(), words
        if words[0] == "train.py" and "--help" not in words:
            config = parse(words[1:])
            if config.distributed == DistributedConfig() and jax.device_count() >= 8:
                make_layout(config)
        elif BUILD_TOOLS.isdisjoint(words):
            options = {word for word in words if word.startswith("--")}
            assert not options or options <= set(re.findall(r"--[\w-]+", said_by_help(words))), words


def said_by_help(words):
    command = words[:2] if words[0] == "-m" else words[:1]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_are_there(page):
    for script in re.findall(r"`python ([\w/.]+\.py)", (ROOT / page).read_text()):
        assert (ROOT / script).is_file(), script


@functools.cache
def messages():
    """A regular expression for each text of the sources, whose fields may be anything, and its given letters."""
    found = []
    files = (path for folder in ("sparse_flash_jax", "training", "models") for path in (ROOT / folder).rglob("*.py"))
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        fixed = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        texts = [text for text in fixed if isinstance(text, str)]
        if texts:
            pattern = "".join(re.escape(text) if isinstance(text, str) else ".+?" for text in fixed)
            found.append((re.compile(pattern), sum(map(len, texts))))
    return found


def test_errors_are_those_of_the_sources():
    quoted = [block.strip() for block in fenced("docs/errors.md", "text")]
    assert quoted
    for message in quoted:
        given = (letters for pattern, letters in messages() if pattern.fullmatch(message))
        assert max(given, default=0) > 0.25 * len(message), message


def documented(page):
    return {path.rsplit(".", 1)[-1] for path in re.findall(r"^::: (\S+)", (ROOT / page).read_text(), re.MULTILINE)}


def test_all_public_names_are_in_the_reference():
    public = ast.parse((ROOT / "sparse_flash_jax" / "__init__.py").read_text()).body
    names = {alias.name for node in public if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names <= documented("docs/api.md"), names - documented("docs/api.md")
    of_flax = {*nnx.__all__, *linen.__all__} - {"Pattern"}  # any of those that are there
    assert of_flax <= documented("docs/api-flax.md"), of_flax - documented("docs/api-flax.md")
