"""The CUDA kernels of a network, on a GPU or the CPU (``gpu_fixtures.py``), against NumPy's."""

import numpy as np
import pytest

import kernels
from tests.cases import DTYPES
from tests.kernels.gpu_fixtures import PLACE, cases_of, check_returns_at_once, upload

# Sizes off every block, of less than one pack, of two parts of the rows.
SHAPES = [(1, 1), (1, 37), (37, 1), (5, 128), (33, 65), (2100, 3)]
if PLACE == "device":
    SHAPES += [(256, 500), (256, 300), (256, 10), (4097, 513), (70_001, 10), (3, 100_003)]
STEP = {"step_size": 0.01, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-8}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def unaligned(cupy, array):
    """Return a copy that starts one number behind where 16 bytes start."""
    memory = cupy.asarray(np.zeros(array.size + 1, array.dtype))
    copy = memory[1:].reshape(array.shape)
    copy[...] = cupy.asarray(array)
    return copy


def uploaded(cupy, *arrays):
    """Yield the arrays on the GPU, as they are and not aligned."""
    yield upload(cupy, arrays)
    yield [unaligned(cupy, array) for array in arrays]


def same(cupy, on_gpu, array):
    return cupy.asnumpy(on_gpu).tobytes() == array.tobytes()


def check_sums(found, values):
    """Compare with the sums over rows in more than float64: float64's own are not that good."""
    wide = values.astype(np.longdouble)
    sums, sizes = wide.sum(axis=0), np.abs(wide).sum(axis=0)
    allowed = np.finfo(found.dtype).eps * np.abs(sums) + 4 * np.finfo(np.float64).eps * sizes
    assert (np.abs(found - sums) <= allowed).all()


@each_dtype
@each_shape
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_bias_relu_dropout_and_its_gradient(cupy, shape, dtype, rate):
    start, bias, d_out = normal(shape, dtype), normal(shape[1], dtype, 1), normal(shape, dtype, 2)
    seed = 0x1234_5678_9ABC_DEF0
    expected, expected_d, expected_sums = start.copy(), np.empty_like(start), np.empty_like(bias)
    kernels.bias_relu_dropout(expected, bias, rate, seed, backend="numpy")
    kernels.bias_relu_dropout_backward(
        expected, d_out, expected_d, expected_sums, rate, backend="numpy"
    )
    near = 4 * np.finfo(dtype).eps
    for values, b, d in uploaded(cupy, start, bias, d_out):
        kernels.bias_relu_dropout(values, b, rate, seed)
        found = cupy.asnumpy(values)
        assert ((found != 0) == (expected != 0)).all()  # active, and kept by the same mask
        assert (np.abs(found - expected) <= near * np.abs(expected)).all()

        d_values, d_bias = cupy.empty_like(d), cupy.empty_like(b)
        kernels.bias_relu_dropout_backward(values, d, d_values, d_bias, rate)
        assert same(cupy, b, bias)
        assert same(cupy, d, d_out)
        assert same(cupy, values, found)
        found_d = cupy.asnumpy(d_values)
        assert (np.abs(found_d - expected_d) <= near * np.abs(expected_d)).all()
        check_sums(cupy.asnumpy(d_bias), found_d)

        again = cupy.empty_like(b)
        kernels.bias_relu_dropout_backward(values, d, d, again, rate)  # in place
        assert same(cupy, d, found_d)
        assert same(cupy, again, cupy.asnumpy(d_bias))


@each_dtype
def test_what_is_not_a_positive_number_becomes_zero_and_stops_the_gradient(cupy, dtype):
    values = cupy.asarray(np.array([[np.nan, -1, 0, np.inf, 2]], dtype))
    kernels.bias_relu_dropout(values, cupy.asarray(np.zeros(5, dtype)))
    assert cupy.asnumpy(values).tolist() == [[0, 0, 0, np.inf, 2]]
    d_values, d_bias = cupy.empty_like(values), cupy.asarray(np.zeros(5, dtype))
    kernels.bias_relu_dropout_backward(
        values, cupy.asarray(np.full((1, 5), np.nan, dtype)), d_values, d_bias
    )
    assert np.isnan(cupy.asnumpy(d_values)[0]).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_dropout_keeps_the_same_numbers_as_on_the_cpu(cupy, seed):
    like = cupy.asarray(np.zeros(1))
    for shape, rate in (((13, 37), 0.5), ((1, 1), 0.0), ((70, 3), 0.999)):
        kept = kernels.dropout_kept(shape, rate, seed, like=like)
        assert isinstance(kept, cupy.ndarray)
        assert same(cupy, kept, kernels.dropout_kept(shape, rate, seed))
        there = cupy.asarray(np.array([seed], np.uint64).view(np.int64))  # read by the kernel
        kept = kernels.dropout_kept(shape, rate, there, like=like)
        assert same(cupy, kept, kernels.dropout_kept(shape, rate, seed))


@each_dtype
@each_shape
def test_column_sums(cupy, shape, dtype):
    values = normal(shape, dtype) + dtype(3)
    sums = []
    for there, out in uploaded(cupy, values, np.zeros(shape[1], dtype)):
        kernels.column_sums(there, out)
        assert same(cupy, there, values)
        check_sums(cupy.asnumpy(out), values)
        sums.append(cupy.asnumpy(out).tobytes())
    assert sums[0] == sums[1]


@each_dtype
@pytest.mark.parametrize("transpose", ["NN", "NT", "TN", "TT"])
def test_products(cupy, dtype, transpose):
    for n, d, m in ((1, 1, 1), (5, 3, 7), (40, 70, 11)):
        a, b = normal((n, d), dtype), normal((d, m), dtype)
        left = a if transpose[0] == "N" else a.T.copy()
        right = b if transpose[1] == "N" else b.T.copy()
        exactly, room = a.astype(float) @ b.astype(float), np.abs(a) @ np.abs(b)
        for there, other in uploaded(cupy, left, right):
            out = cupy.asarray(np.full((n, m), np.nan, dtype))
            kernels.product(there, other, out, transpose)
            error = np.abs(cupy.asnumpy(out) - exactly)
            assert (error <= 2 * d * np.finfo(dtype).eps * room).all()


def test_sums_of_nothing_are_zero(cupy):
    out = cupy.asarray(np.ones(3))
    kernels.column_sums(cupy.asarray(np.zeros((0, 3))), out)
    assert cupy.asnumpy(out).tolist() == [0, 0, 0]
    kernels.column_sums(cupy.asarray(np.zeros((3, 0))), cupy.asarray(np.zeros(0)))


@each_dtype
@pytest.mark.parametrize("size", [1, 3, 1030])
@pytest.mark.parametrize("kind", ["number", "array", "one"])
def test_adam(cupy, size, dtype, kind):
    start, factors = normal(size, dtype), normal(size, dtype, 1) ** 2
    if kind != "array":
        factors = 0.7 if kind == "number" else np.array(0.7)
    gradients = [normal(size, dtype, seed) for seed in (2, 3, 4)]
    expected = [start.astype(np.float64), np.zeros(size), np.zeros(size)]
    for n_steps, g in enumerate(gradients, 1):
        wide, own = g.astype(np.float64), np.asarray(factors, np.float64)
        q, *moments = expected
        kernels.adam_update(q, wide, *moments, n_steps, step_factors=own, backend="numpy", **STEP)

    bits = []
    for p, m, v in uploaded(cupy, start, *np.zeros((2, size), dtype)):
        own = factors if kind == "number" else cupy.asarray(factors)
        for n_steps, g in enumerate(gradients, 1):
            there = cupy.asarray(g)
            kernels.adam_update(p, there, m, v, n_steps, step_factors=own, **STEP)
            assert same(cupy, there, g)
        assert kind == "number" or same(cupy, own, factors)
        found = [cupy.asnumpy(array) for array in (p, m, v)]
        bits.append([array.tobytes() for array in found])
        for array, exact in zip(found, expected, strict=True):
            allowed = 8 * np.finfo(dtype).eps * max(1, np.abs(exact).max())
            assert np.abs(array - exact).max() <= allowed
    assert bits[0] == bits[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("row", [(), (1,), (10,), (16,), (3, 5), (64,)])
def test_gather_rows(cupy, dtype, row):
    values = np.random.default_rng(0).integers(0, 200, size=(50, *row)).astype(dtype)
    rows = np.array([7, 0, 49, 7, -3, 50, 2**40])
    for there, out in uploaded(cupy, values, np.zeros((7, *row), dtype)):
        numbers = cupy.asarray(rows)
        kernels.gather_rows(there, numbers, out)
        assert same(cupy, out, values[np.clip(rows, 0, 49)])
        assert same(cupy, there, values)
        assert same(cupy, numbers, rows)
    none = cupy.asarray(np.zeros((0, *row), dtype))
    kernels.gather_rows(there, numbers[:0], none)
    kernels.gather_rows(none, numbers[:0], none)


def forward(values, bias, **options):
    kernels.bias_relu_dropout(values, bias, **options)


def backward(values, bias, **options):
    kernels.bias_relu_dropout_backward(values, values, values, bias, **options)


def adam(values, bias, step_factors=1.0, **options):
    flat = values.reshape(-1)
    kernels.adam_update(
        flat, bias, flat.copy(), flat.copy(), 1, step_factors=step_factors, **STEP, **options
    )


def gather(values, bias, **options):
    kernels.gather_rows(values, bias, values, **options)


@pytest.mark.parametrize(
    ("function", "second", "first_name", "name"),
    [
        (forward, np.zeros(3), "values", "bias"),
        (backward, np.zeros(3), "out", "d_bias"),
        (kernels.column_sums, np.zeros(3), "values", "out"),
        (adam, np.zeros(6), "parameters", "gradient"),
        (gather, np.zeros(2, np.int64), "values", "rows"),
    ],
)
def test_arrays_and_backends_have_to_match(cupy, function, second, first_name, name):
    values = np.zeros((2, 3))
    there, second_there = upload(cupy, (values, second))
    with pytest.raises(TypeError, match=f"{name} is a NumPy array and {first_name} a CuPy array"):
        function(there, second)
    with pytest.raises(TypeError, match=f"{name} is a CuPy array and {first_name} a NumPy array"):
        function(values, second_there)
    for backend in kernels.CPU_BACKENDS:
        with pytest.raises(TypeError, match=rf"{first_name} is a CuPy array.*cupy\.asnumpy"):
            function(there, second_there, backend=backend)
    with pytest.raises(TypeError, match=rf"{first_name} is a NumPy array.*cupy\.asarray"):
        function(values, second, backend="cupy")


def test_what_does_not_fit_is_refused(cupy):
    def zeros(*shape, dtype=np.float64):
        return cupy.asarray(np.zeros(shape, dtype))

    wide, rows = zeros(4, 6), zeros(4, dtype=np.int64)
    for call, error, message in (
        (lambda: forward(wide, zeros(5)), ValueError, r"bias must have shape \(6,\)"),
        (lambda: forward(wide[:, ::2], zeros(3)), ValueError, "values must be contiguous"),
        (lambda: forward(wide, zeros(6, dtype=np.float32)), TypeError, "bias must be float64"),
        (lambda: forward(wide, zeros(6), rate=1.0), ValueError, "rate must lie in"),
        (lambda: backward(wide, zeros(5)), ValueError, r"d_bias must have shape \(6,\)"),
        (lambda: kernels.column_sums(wide, zeros(4)), ValueError, r"out must have shape \(6,\)"),
        (lambda: adam(wide, zeros(23)), ValueError, r"gradient must have shape \(24,\)"),
        (lambda: adam(wide, zeros(24), zeros(2)), ValueError, "step_factors must be a number"),
        (lambda: adam(wide, zeros(24), np.zeros(24)), TypeError, "step_factors is a NumPy array"),
        (lambda: gather(wide, rows[:2]), ValueError, r"out must have shape \(2, 6\)"),
        (lambda: gather(wide, zeros(4)), TypeError, "rows must be int64"),
        (lambda: kernels.gather_rows(wide.T, rows, zeros(4, 4)), ValueError, "values must be cont"),
        (lambda: forward(wide, zeros(6), seed=zeros(1)), TypeError, "seed must be .* int64"),
        (lambda: forward(wide, zeros(6), seed=rows), ValueError, r"seed must have shape \(1,\)"),
        (lambda: forward(np.ones((4, 6)), np.ones(6), seed=rows[:1]), TypeError, "seed is a CuPy"),
        (lambda: adam(wide, zeros(24), corrections=zeros(1)), ValueError, "corrections must have"),
        (lambda: adam(wide, zeros(24), corrections=np.ones(2)), TypeError, "corrections is a Num"),
        (lambda: kernels.gather_rows(zeros(0, 6), rows, wide), ValueError, "at least one row"),
    ):
        with pytest.raises(error, match=message):
            call()


CALLS = {
    "forward": lambda a: kernels.bias_relu_dropout(a["values"], a["bias"], 0.5, 1),
    "backward": lambda a: kernels.bias_relu_dropout_backward(
        a["values"], a["other"], a["other"], a["bias"], 0.5
    ),
    "column sums": lambda a: kernels.column_sums(a["values"], a["bias"]),
    "mask": lambda a: kernels.dropout_kept((300, 7), 0.5, 1, like=a["bias"]),
    "adam": lambda a: kernels.adam_update(*a["flat"], 1, **STEP),
    "adam by factor": lambda a: kernels.adam_update(
        *a["flat"], 1, step_factors=a["flat"][1], **STEP
    ),
    "gather": lambda a: kernels.gather_rows(a["values"], a["rows"], a["other"]),
}


@pytest.mark.parametrize("name", cases_of("device", CALLS))
def test_no_call_waits_for_the_device(device, name):
    values, other, bias = upload(device, (*np.ones((2, 3000, 70), "f4"), np.ones(70, "f4")))
    arrays = {"values": values, "other": other, "bias": bias}
    arrays["flat"] = upload(device, np.ones((4, 10_000), "f4"))
    arrays["rows"] = device.asarray(np.arange(3000))
    check_returns_at_once(device, CALLS[name], arrays)
