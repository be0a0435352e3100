"""Adam in one pass, against the formulas in float64; sums and batches against NumPy's."""

import numpy as np
import pytest

import kernels
from kernels import CPU_BACKENDS
from tests.cases import DTYPES

SETTINGS = {"step_size": 0.01, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-8}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 100, 40_001])
@pytest.mark.parametrize("by_factor", [False, True])
def test_adam_does_three_steps_of_the_algorithm(backend, dtype, size, by_factor):
    rng = np.random.default_rng(size)
    start, factors = rng.normal(size=size).astype(dtype), rng.random(size).astype(dtype)
    p, m, v = start.copy(), np.zeros(size, dtype), np.zeros(size, dtype)
    want, mean, square = start.astype(np.float64), np.zeros(size), np.zeros(size)
    for s in (1, 2, 3):
        g = rng.normal(size=size).astype(dtype)
        kernels.adam_update(
            p, g, m, v, s, step_factors=factors if by_factor else 0.5, backend=backend, **SETTINGS
        )
        # Algorithm 1 of Kingma & Ba (2014), as printed
        g64 = g.astype(np.float64)
        mean = 0.9 * mean + (1 - 0.9) * g64
        square = 0.99 * square + (1 - 0.99) * g64**2
        m_hat, v_hat = mean / (1 - 0.9**s), square / (1 - 0.99**s)
        want -= 0.01 * (factors if by_factor else 0.5) * m_hat / (np.sqrt(v_hat) + 1e-8)
    eps = np.finfo(dtype).eps
    assert np.abs(m - mean).max() <= 8 * eps
    assert np.abs(v - square).max() <= 8 * eps * max(1.0, square.max())
    # Three roundings of p itself, and some of steps that are smaller by a factor of a hundred.
    assert np.abs(p - want).max() <= 4 * eps * np.abs(want).max() + 64 * eps * 0.03


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("transpose", ["NN", "NT", "TN", "TT"])
def test_products_are_those_of_the_transposed_factors(backend, transpose):
    a, b = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    left = a if transpose[0] == "N" else a.T.copy()
    right = b if transpose[1] == "N" else b.T.copy()
    out = np.empty((2, 4))
    for order in "CF":
        kernels.product(left.copy(order), right.copy(order), out, transpose, backend)
        assert out.tolist() == [[20, 23, 26, 29], [56, 68, 80, 92]]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_column_sums_are_taken_in_float64(backend, dtype):
    values = np.array([[1e8, 1], [1, 2], [-1e8, 3]], dtype)
    out = np.empty(2, dtype)
    kernels.column_sums(values, out, backend)
    assert out.tolist() == [1, 6]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_gathered_rows_are_those_of_the_numbers_or_the_nearest(backend, order):
    values = np.arange(24.0).reshape(6, 4).copy(order)
    rows, out = np.array([5, 0, 6, -1]), np.empty((4, 4))
    kernels.gather_rows(values, rows, out, backend)
    assert np.array_equal(out, values[[5, 0, 5, 0]])
