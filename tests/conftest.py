"""Settings of every test: strict promotion, shapes checked by machine, eight virtual CPU devices."""

import importlib
import os
import pathlib
import sys

# Before jax is imported: it reads its flags once. Devices to shard over on a CPU; and on a GPU no search for the
# fastest way of each of the many products that the judges compile.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_gpu_autotune_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jaxtyping.install_import_hook("sparse_flash_jax", "beartype.beartype")
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Compiled functions take memory maps, of which Linux gives a process 65,530: too few for all the tests'."""
    yield
    jax.clear_caches()


def pytest_configure(config):
    if jax.default_backend() == "cpu":
        # What runs for milliseconds is long to compile; processes that tests start do as these.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)
    # Compiling is most of the time that the tests take; workers, and processes that tests start, compile much the same.
    if getattr(config, "cache", None) is None:
        return
    for name, value in {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    # An entry that another worker is just writing reads as broken; it is then compiled here.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache")


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and jax.default_backend() != "gpu":
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def benchmark_module():
    """Imports a module of benchmarks/, whose scripts find one another in their own folder."""
    folder = str(pathlib.Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


@pytest.fixture
def without_shape_checks():
    """The machine's shape checks off, so that a wrong call reaches the package's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
