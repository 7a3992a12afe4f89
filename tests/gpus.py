"""GPUs that are not there: one to choose kernels for, one to lower for, and kernels that are interpreted instead."""

import functools
from types import SimpleNamespace

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import mosaic, triton
from sparse_flash_jax.kernels.alibi import Alibi
from sparse_flash_jax.kernels.config import mosaic_config, triton_config
from sparse_flash_jax.kernels.repeats import Repeats

H100 = "NVIDIA H100 80GB HBM3"
# Device kind: multiprocessors, compute capability.
GPUS = {
    "NVIDIA A100-SXM4-40GB": (108, 8.0),
    "NVIDIA GeForce RTX 4090": (128, 8.9),
    H100: (132, 9.0),
}


def put_device(monkeypatch, kind=H100, capability="9.0"):
    """Puts a device of this kind and compute capability in the place of the default one."""
    device = SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr("sparse_flash_jax.kernels.implementations._default_device", lambda: device)


def put_interpreted(monkeypatch, chooser, kernel):
    """Has the function of this name choose the kernel as on a GPU, interpreted; the shapes that it is called with."""
    shapes = []

    def interpreted(x, *operands, **options):
        shapes.append(x.shape)
        return kernel(x, *operands, interpret=True, **options)

    monkeypatch.setattr(chooser, lambda *_: interpreted)
    monkeypatch.setattr("jax.lax.platform_dependent", lambda *operands, cuda, default: cuda(*operands))
    return shapes


def abstract_device(kind):
    """A GPU of this kind, for a mesh."""
    return AbstractDevice(device_kind=kind, num_cores=GPUS[kind][0], platform="gpu")


def mesh_of(kind):
    """A mesh of as many GPUs of this kind as there are devices, with the axis "data"."""
    axes = {"axis_types": (AxisType.Auto,), "abstract_device": abstract_device(kind)}
    return AbstractMesh((jax.device_count(),), ("data",), **axes)


def on(kind):
    """A context in which Pallas lowers for this kind of GPU."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract_device(kind)))


def lowered(function, *operands):
    """What a function becomes for a GPU."""
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def passes(kernels, dtype, head_dim, runs, length=300, *, fused=False):
    """The passes of an implementation with their operands' shapes: four query heads, two key heads."""
    q, k = (jax.ShapeDtypeStruct((1, heads, length, head_dim), dtype) for heads in (4, 2))
    row = jax.ShapeDtypeStruct((1, 4, length), "float32")
    gradients = (q, k, k, runs, row, q, row)
    backward = (kernels.backward,) if fused else (kernels.backward_dq, kernels.backward_dkv)
    return (kernels.forward, (q, k, k, runs)), *((kernel, gradients) for kernel in backward)


def passes_with_slopes(kernels, dtype, head_dim, runs, length=300):
    """The same where scores fall with distance; the last operand has the slopes and positions."""
    alibi = Alibi._make(jax.ShapeDtypeStruct(x, "float32") for x in ((4,), (1, 4, length), (1, 2, length)))
    return _passes_given("alibi", alibi, passes(kernels, dtype, head_dim, runs, length))


def passes_of_a_round(kernels, dtype, head_dim, runs, length=300):
    """The same where pairs that two earlier rounds show are hidden; the last operand has their ids."""
    of_queries, of_keys = (jax.ShapeDtypeStruct((1, heads, length), "int32") for heads in (4, 2))
    return _passes_given(
        "repeats", Repeats((of_queries,) * 2, (of_keys,) * 2), passes(kernels, dtype, head_dim, runs, length)
    )


def passes_by_position(kernels, dtype, head_dim, runs, length=300):
    """The same of an implementation that writes outputs by position; the last operand is the order."""
    order = jax.ShapeDtypeStruct((1, 1, length), "int32")
    return _passes_given("order", order, passes(kernels, dtype, head_dim, runs, length))


def _passes_given(name, value, of_passes):
    """These passes with one more operand, the last: an argument of this name."""
    for kernel, operands in of_passes:

        @functools.wraps(kernel)
        def given(*operands, kernel=kernel, **options):
            return kernel(*operands[:-1], **{name: operands[-1]}, **options)

        yield given, (*operands, value)


def assert_passes_lower(of_passes, head_dim, *, long_runs=False, **options):
    """Asserts that the kernels of both GPU implementations lower, of causal runs: `passes`, or those given more."""
    runs = jax.eval_shape(lambda: sfj.causal(300)).runs
    with on(H100):
        for kernels, config in (
            (mosaic, mosaic_config(head_dim, long_runs=long_runs)),
            (triton, triton_config("bfloat16", head_dim, long_runs=long_runs, capability=9.0)),
        ):
            for kernel, operands in of_passes(kernels, "bfloat16", head_dim, runs):
                text = lowered(functools.partial(kernel, scale=0.1, config=config, **options), *operands)
                assert "mosaic_gpu" in text or "triton" in text
