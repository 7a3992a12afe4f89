"""Expected time shares against the measurements that they come from."""

import json
import pathlib
import re

import jax
import pytest

import sparse_flash_jax as sfj
from tests.gpus import put_device

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
H100 = "NVIDIA H100 80GB HBM3"


def measured():
    """Device kind, length, method ("causal": none), density and time share of every measurement."""
    for path in RESULTS.glob("density-*.json"):
        result = json.loads(path.read_text())
        kind = result["environment"]["device"].removeprefix("1 x ")
        for case in result["cases"]:
            _, length, _, _, pattern, _ = case["case"].split("-")
            share = case["seconds"]["forward_backward"] / case["seconds"]["dense_forward_backward"]
            yield kind, int(length[1:]), re.sub(r"\d", "", pattern), case["density"], share


def expect(*arguments, **options):
    expected = sfj.expected_time_share(*arguments, **options)
    assert expected is not None
    return expected


def test_a_measured_case_is_expected_as_it_was_measured():
    cases = list(measured())
    assert {kind for kind, *_ in cases} == {"cpu", H100}
    for kind, length, method, density, share in cases:
        dense = method == "causal"
        expected = expect(length, density, method="qk" if dense else method, device_kind=kind)
        assert (expected.own_dense if dense else expected.share) == pytest.approx(share, rel=5e-3)
        assert (expected.device_kind, expected.measured_on) == (kind, kind)


def test_between_measurements_it_lies_between_them():
    share = lambda length, density: expect(length, density, device_kind=H100).share
    for ends in (share(8192, 1 / 16), share(16384, 1 / 16)), (share(16384, 1 / 8), share(16384, 1 / 4)):
        assert ends[0] != ends[1]
    assert min(share(8192, 1 / 16), share(16384, 1 / 16)) < share(11585, 1 / 16)
    assert share(11585, 1 / 16) == pytest.approx((share(8192, 1 / 16) * share(16384, 1 / 16)) ** 0.5, rel=1e-3)
    assert share(16384, 1 / 8) < share(16384, 1 / 6) < share(16384, 1 / 4)


def test_outside_of_measurements_it_is_the_nearest():
    share = lambda length, density: expect(length, density, device_kind=H100).share
    assert share(1, 1 / 16) == share(2, 1 / 16)
    assert share(2**22, 1 / 16) == share(2**21, 1 / 16)
    assert share(16384, 1.9) == share(16384, 1.0)
    assert share(16384, 1e-6) == share(16384, 1e-5)


def test_methods_are_measured_apart():
    hashed, dropped = (expect(16384, 0.25, method=method, device_kind=H100) for method in ("hash", "qk"))
    assert hashed.share != dropped.share
    assert hashed.own_dense == dropped.own_dense


def test_another_gpu_is_assumed_to_be_as_one_that_was_measured():
    a100, h100 = (expect(16384, 0.1, device_kind=kind) for kind in ("NVIDIA A100-SXM4-80GB", H100))
    assert a100.share == h100.share
    assert (a100.device_kind, a100.measured_on) == ("NVIDIA A100-SXM4-80GB", H100)
    assert "NVIDIA A100-SXM4-80GB assumed to be alike" in str(a100)
    assert "assumed" not in str(h100)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "Tesla T4", "AMD Instinct MI300X"])
def test_what_is_not_known_is_not_guessed(kind):
    assert sfj.expected_time_share(16384, 0.1, device_kind=kind) is None


def test_a_gpu_that_the_kernels_do_not_serve_is_not_guessed(monkeypatch):
    put_device(monkeypatch, "NVIDIA TITAN V", "7.0")
    assert sfj.expected_time_share(4096, 0.1) is None
    put_device(monkeypatch, "NVIDIA TITAN V", "8.0")
    assert sfj.expected_time_share(4096, 0.1) == sfj.expected_time_share(4096, 0.1, device_kind="NVIDIA TITAN V")


def test_the_default_device_is_asked_for():
    kind = jax.devices()[0].device_kind
    assert sfj.expected_time_share(4096, 0.1) == sfj.expected_time_share(4096, 0.1, device_kind=kind)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0.1), "length"), ((16, 0.0), "density"), ((16, float("nan")), "density"), ((16, float("inf")), "density")],
)
def test_wrong_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        sfj.expected_time_share(*arguments)


def test_an_unknown_method_is_named(without_shape_checks):
    with pytest.raises(ValueError, match=r"'hash' or 'qk', got 'lsh'"):
        sfj.expected_time_share(16, 0.1, method="lsh")  # pyright: ignore[reportArgumentType]
