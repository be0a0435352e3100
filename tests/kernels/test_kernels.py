"""One test body for every kernel, backend, dtype, regime and size, against the exact judge."""

import tracemalloc

import numpy as np
import pytest

import kernels
from kernels import compare, exact
from tests.cases import (
    DTYPES,
    JIT,
    MODELS,
    REGIMES,
    SIZES,
    model_inputs,
    s_model_inputs,
    soft_targets,
)

NAMES = (
    "softmax_nll",
    "soft_target_nll",
    *(f"{model}_{result}" for model in MODELS for result in ("nll", "posterior")),
)
# The judge takes time in proportion to n K K d.
C_SIZES = ((1, 2), (2, 3), (19, 7), (5, 13))
BACKENDS = ("numpy", "numba")


def arguments(name: str, regime: str, n: int, k: int, dtype: type) -> tuple[np.ndarray, ...]:
    if "model" in name:
        return model_inputs(name.rsplit("_", 1)[0], regime, n, k, dtype)
    logits, _, labels = s_model_inputs(regime, n, k, dtype)
    if name == "softmax_nll":
        return logits, labels
    targets = soft_targets(n, k, dtype)
    targets[np.isneginf(logits)] = 0  # a target on probability zero has infinite loss
    targets[np.arange(n), labels] = 0
    targets[np.arange(n), labels] = np.maximum(0, 1 - targets.sum(axis=1))
    return logits, targets


def sizes_of(name: str) -> tuple[tuple[int, int], ...]:
    return C_SIZES if "c_model" in name else SIZES


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in NAMES for size in sizes_of(name)], ids=str
)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_agrees_with_the_exact_value_to_rounding(name, size, dtype, regime):
    arrays = arguments(name, regime, *size, dtype)
    truth = compare.Truth(name, *arrays)
    for backend in BACKENDS:
        result = getattr(kernels, name)(*arrays, backend=backend)
        assert truth.worst_error(result) <= compare.ALLOWED_UNITS, backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_leaves_its_inputs_alone_and_keeps_the_dtype(name, backend):
    for dtype in DTYPES:
        arrays = arguments(name, "usual", 11, 4, dtype)
        for array in arrays:
            array.setflags(write=False)
        result = getattr(kernels, name)(*arrays, backend=backend)
        assert all(np.asarray(value).dtype == dtype for value in result)


@pytest.mark.parametrize("check_values", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_takes_any_memory_order_and_any_integer_dtype(name, backend, check_values):
    arrays = arguments(name, "usual", 11, 4, np.float64)
    expected = getattr(kernels, name)(*arrays, backend=backend)
    for odd in (
        [np.asfortranarray(a) for a in arrays],
        [np.repeat(a, 2, axis=0)[::2] for a in arrays],
        [a.astype(np.uint8) if a.dtype.kind == "i" else a for a in arrays],
        [a.astype(">i4") if a.dtype.kind == "i" else a for a in arrays],
    ):
        result = getattr(kernels, name)(*odd, backend=backend, check_values=check_values)
        assert all(np.array_equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unreachable_label_has_likelihood_minus_infinity_and_no_posterior(backend):
    # Class 0 is the only one the classifier allows, and it is never observed as 1.
    logits = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    channel = np.array([[0.0, -np.inf], [0.0, 0.0]])
    labels = np.array([0, 1])
    e_step = kernels.s_model_posterior(logits, channel, labels, backend=backend)
    assert e_step.log_likelihood_t.tolist() == [0.0, -np.inf]
    assert e_step.posterior[0].tolist() == [1.0, 0.0]
    assert np.isnan(e_step.posterior[1]).all()
    joint = kernels.s_model_nll(logits, channel, labels, backend=backend)
    assert joint.nll == np.inf
    assert np.isnan(joint.d_logits[1]).all()
    for name, result in (("s_model_posterior", e_step), ("s_model_nll", joint)):
        assert compare.worst_error(name, result, logits, channel, labels) <= compare.ALLOWED_UNITS


@pytest.mark.parametrize("name", ["s_model_nll", "s_model_posterior"])
def test_comparison_is_nan_for_a_wrong_shape_dtype_or_missing_number(name):
    arrays = arguments(name, "usual", 5, 3, np.float64)
    result = getattr(kernels, name)(*arrays)
    assert compare.worst_error(name, result, *arrays) <= compare.ALLOWED_UNITS
    for wrong in (result[1][:-1], result[1].astype(np.float32), np.full_like(result[1], np.nan)):
        changed = type(result)(result[0], wrong, *result[2:])
        assert np.isnan(compare.worst_error(name, changed, *arrays))


def test_long_derivative_of_the_paper_equals_the_fused_one():
    """The judge differentiates through both softmaxes; the backends use q - c. Same numbers."""
    arrays = s_model_inputs("usual", 9, 4)
    logits, channel, labels = arrays
    long = exact.s_model_nll(*arrays)
    posterior = exact.s_model_posterior(*arrays).posterior
    with exact.localcontext(exact._CONTEXT):
        n, k = logits.shape
        q = [exact._softmax(row) for row in exact._decimals(logits)]
        theta = [exact._softmax(row) for row in exact._decimals(channel)]
        n_i = [sum(posterior[:, i]) for i in range(k)]
        worst = max(
            abs(long.d_logits[t, i] - (q[t][i] - posterior[t, i]) / n)
            for t in range(n)
            for i in range(k)
        )
        for i in range(k):
            for j in range(k):
                counts = sum(posterior[t, i] for t in range(n) if labels[t] == j)
                fused = (n_i[i] * theta[i][j] - counts) / n
                worst = max(worst, abs(long.d_channel_logits[i, j] - fused))
    assert worst < exact.Decimal("1e-37")


def test_exact_judge_knows_a_value_worked_out_by_hand():
    # q = (3/4, 1/4), theta = ((2/3, 1/3), (1/5, 4/5)), z = 1: m = 1/4 + 1/5 = 9/20, c = (5/9, 4/9)
    logits = np.log(np.array([[3.0, 1.0]]))
    channel = np.log(np.array([[2.0, 1.0], [1.0, 4.0]]))
    e_step = exact.s_model_posterior(logits, channel, np.array([1]))
    assert abs(float(e_step.log_likelihood_t[0]) - np.log(9 / 20)) < 1e-15
    assert abs(float(e_step.posterior[0, 0]) - 5 / 9) < 1e-15
    joint = exact.s_model_nll(logits, channel, np.array([1]))
    assert abs(float(joint.d_logits[0, 0]) - (3 / 4 - 5 / 9)) < 1e-15
    # n_0 theta_01 - N_01 = 5/9 (1/3 - 1)
    assert abs(float(joint.d_channel_logits[0, 1]) + 5 / 9 * 2 / 3) < 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip_below", [0.0, 1e-6, 0.02, 0.3, 1.0])
def test_skipping_errs_by_no_more_than_it_says(backend, dtype, skip_below):
    arrays = model_inputs("c_model", "usual", 90, 7, dtype)
    _, hidden, channel_weights, _, _ = arrays
    exactly = kernels.c_model_nll(
        *(a.astype(np.float64) if a.dtype == dtype else a for a in arrays)
    )
    found = kernels.c_model_nll_skipping(*arrays, skip_below, backend=backend)
    rounding = 64 * np.finfo(dtype).eps
    missing_i = found.missing_i + rounding
    assert abs(found.nll - exactly.nll) <= rounding
    assert np.abs(found.d_logits - exactly.d_logits).max() <= rounding
    errors = [np.abs(a - b) for a, b in zip(found[2:5], exactly[2:5], strict=True)]
    d_hidden, d_channel_weights, d_channel_logits = errors
    assert (d_channel_logits.sum(axis=1) <= missing_i).all()
    assert (d_channel_weights.sum(axis=1) <= missing_i[:, None] * np.abs(hidden).max(axis=0)).all()
    assert d_hidden.max() <= missing_i.sum() * np.abs(channel_weights).max()
    if skip_below >= 0.02:  # it does leave something out
        assert d_channel_logits.max() > 100 * rounding
        assert found.missing_i.max() > 1e-3
    if skip_below == 0:
        assert found.missing_i.max() == 0
    if skip_below == 1:
        assert np.abs(found.d_channel_logits).max() == 0


def test_c_model_gives_the_same_from_one_tile_and_from_many(monkeypatch):
    """Kept and recomputed exponentials, tiles of one class, blocks of a few samples: one result."""
    from kernels.numba_backend import c_model

    arrays = model_inputs("c_model", "usual", 300, 7, np.float32)
    whole = kernels.c_model_nll(*arrays)
    tile = 300 * 7 * 4
    for workspace, tile_bytes in (
        (2**26, tile),
        (3 * 2 * tile, 2 * tile),
        (0, tile),
        (0, tile // 5),
        (0, 1),
    ):
        monkeypatch.setattr(c_model, "WORKSPACE_BYTES", workspace)
        monkeypatch.setattr(c_model, "_TILE_BYTES", tile_bytes)
        cut = kernels.c_model_nll(*arrays)
        for a, b in zip(cut, whole, strict=True):
            assert np.abs(a - b).max() <= 64 * np.finfo(np.float32).eps * np.abs(b).max()


@pytest.mark.skipif(not JIT, reason="loops over 46 million numbers take minutes in Python")
def test_c_model_needs_no_more_memory_than_its_workspace():
    from kernels.numba_backend import c_model

    n, k, d = 256, 300, 2
    blocks, tiles = c_model._blocks_and_tiles(n, k, np.dtype(np.float32))
    memory = {id(tile.memory): tile.memory.nbytes for tile in tiles}
    assert sum(memory.values()) <= c_model.WORKSPACE_BYTES
    assert any(tile.kept for tile in tiles)
    assert not all(tile.kept for tile in tiles)
    covered = np.zeros((k, n), dtype=int)
    for block in blocks:
        for tile in tiles:
            covered[tile.classes, block] += 1
    assert (covered == 1).all()

    arrays = model_inputs("c_model", "usual", n, k, np.float32, n_hidden=d)
    results = sum(np.asarray(value).nbytes for value in kernels.c_model_nll(*arrays))
    tracemalloc.start()
    kernels.c_model_nll(*arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # n x K x K would be 92 MB; what is allowed beside the workspace are arrays of n x K.
    assert peak <= c_model.WORKSPACE_BYTES + results + 8 * n * k * 8


@pytest.mark.parametrize(("n", "k"), [(256, 3162), (2048, 1000)])
def test_c_model_takes_many_samples_at_once_where_its_results_exceed_the_workspace(n, k):
    """A block of one sample would read and write all of U for each of them."""
    from kernels.numba_backend import c_model

    blocks, _ = c_model._blocks_and_tiles(n, k, np.dtype(np.float32))
    assert len(blocks) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ["c_model", "sparse_c_model"])
def test_unreachable_label_of_a_c_model_shows_in_every_gradient(model, backend):
    logits = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    channel, labels = np.array([[0.0, -np.inf], [0.0, 0.0]]), np.array([0, 1])
    wide = np.ones((2, 3)), np.ones((2, 2, 3))
    support = (np.array([[0, 1], [0, 1]]),) if model.startswith("sparse") else ()
    arrays = (logits, *wide, channel, *support, labels)
    e_step = getattr(kernels, f"{model}_posterior")(*arrays, backend=backend)
    assert e_step.log_likelihood_t.tolist() == [0.0, -np.inf]
    joint = getattr(kernels, f"{model}_nll")(*arrays, backend=backend)
    assert joint.nll == np.inf
    assert np.isnan(joint.d_logits[1]).all()
    assert np.isnan(joint.d_hidden[1]).all()
    assert np.isnan(joint.d_channel_weights).all()
    assert np.isnan(joint.d_channel_logits).all()


@pytest.mark.parametrize("n", [63, 2049, 3000])
def test_sparse_s_model_is_the_same_in_chunks_of_any_size(n):
    arrays = model_inputs("sparse_s_model", "usual", n, 12, np.float64)
    for name in ("sparse_s_model_nll", "sparse_s_model_posterior"):
        found, want = (getattr(kernels, name)(*arrays, backend=one) for one in ("numba", "numpy"))
        for there, value in zip(want, found, strict=True):
            assert np.abs(value - there).max() <= 1e-12 * np.abs(there).max()
