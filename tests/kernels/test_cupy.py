"""The CUDA kernels of the losses, on a GPU or the CPU (``gpu_fixtures.py``)."""

import importlib
import itertools
import sys
from decimal import Decimal

import numpy as np
import pytest

import kernels
from kernels import compare, cuda_launch, numpy_backend
from tests.cases import DTYPES, REGIMES, model_inputs, s_model_inputs
from tests.kernels.gpu_fixtures import (
    BACKEND,
    PLACE,
    cases_of,
    check_returns_at_once,
    download,
    same_bits,
    upload,
    without_backend,
)
from tests.kernels.test_kernels import NAMES, arguments, sizes_of

EPS = {dtype: np.finfo(dtype).eps for dtype in DTYPES}


def call(cupy, name, arrays, **options):
    return download(cupy, getattr(kernels, name)(*upload(cupy, arrays), **options))


def worst_of(truth, result):
    """Return a line about each array of a result: its worst number, beside the exact one."""
    lines = []
    for field, found, exactly, unit in zip(
        result._fields, result, truth.exact, truth.units, strict=True
    ):
        found, exactly = np.asarray(found), np.asarray(exactly, dtype=object)
        if found.shape != exactly.shape or found.dtype != truth.dtype:
            lines.append(f"{field}: {found.dtype} {found.shape}, not {truth.dtype} {exactly.shape}")
            continue
        units = np.broadcast_to(unit, found.shape)

        def error(at, found=found, exactly=exactly, units=units):
            value, exact = float(found[at]), exactly[at]
            if not (np.isfinite(value) and exact.is_finite()):
                same = str(value).lower()[:3] == str(exact).lower()[:3]  # nan, inf, -in
                return 0.0 if same else np.inf
            difference = float(abs(Decimal(value) - exact))
            return difference and difference / max(units[at], 5e-324)

        at = max(np.ndindex(found.shape), key=error)
        lines.append(
            f"{field}{list(at)} = {found[at]!r}, exactly {exactly[at]:.9g}: off by {error(at):.3g} "
            f"units of {units[at]:.3g}"
        )
    return lines


def check_exactly(cupy, name, arrays):
    """Compare with the exact value; say all there is to know if it is missed."""
    truth = compare.Truth(name, *arrays)
    result = call(cupy, name, arrays)
    worst = truth.worst_error(result)
    if worst <= compare.ALLOWED_UNITS:
        return
    again = call(cupy, name, arrays)
    on_cpu = getattr(kernels, name)(*arrays, backend="numpy")
    lines = [
        f"{name} is off by {worst:.4g} units, a second call by {truth.worst_error(again):.4g} "
        f"(the same bits: {same_bits(result, again)}), the NumPy twin by "
        f"{truth.worst_error(on_cpu):.4g}; {compare.ALLOWED_UNITS} are allowed",
        *worst_of(truth, result),
        f"numpy {np.__version__}, labels {arrays[-1].tolist()[:20]}",
    ]
    pytest.fail("\n".join(lines))


@pytest.mark.parametrize(
    ("name_size", "dtype", "regime"),
    cases_of(
        "device", [(name, size) for name in NAMES for size in sizes_of(name)], DTYPES, REGIMES
    ),
)
def test_kernel_agrees_with_the_exact_value_to_rounding(device, name_size, dtype, regime):
    name, size = name_size
    check_exactly(device, name, arguments(name, regime, *size, dtype))


@pytest.mark.parametrize(("name", "dtype"), cases_of("host", NAMES, DTYPES))
def test_the_same_on_the_host(host, name, dtype):
    for regime, (n, k) in itertools.product(REGIMES, ((1, 2), (11, 5))):
        check_exactly(host, name, arguments(name, regime, n, k, dtype))


# How the s-model and the softmax go about their rows, by settings of cuda_launch.
WAYS = {
    "few classes": {"ONE_BLOCK_SAMPLES": 40},
    "in registers": {"FEW_CLASSES": 0},
    "few units": {"FEW_CLASSES": 0, "MULTIPROCESSORS": 1},
    "sorted by chunks": {"FEW_CLASSES": 0, "MULTIPROCESSORS": 1, "FEW_SAMPLES": 0},
    "from memory": {"FEW_CLASSES": 0, "MAX_HELD": 0, "FEW_SAMPLES": 0, "CHUNKED_SAMPLES": 0},
}
DENSE = ("softmax_nll", "soft_target_nll", "s_model_nll", "s_model_posterior")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(cuda_launch, name, value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_is_exact(cupy, way, dtype):
    for name, regime in itertools.product(DENSE, REGIMES):
        check_exactly(cupy, name, arguments(name, regime, 11, 5, dtype))


def test_every_way_agrees_with_the_twin(cupy, way, monkeypatch):
    monkeypatch.setattr(cuda_launch, "SORT_CHUNK", 256)
    sizes = ((600, 5), (310, 32), (20, 1025))  # the last one has rows of many threads
    for name, size in itertools.product(DENSE, sizes if PLACE == "device" else sizes[:2]):
        check_against_twin(cupy, name, inputs_of(name, *size))


def test_one_label_for_all_and_labels_that_do_not_occur(cupy, way):
    cases = (2100, 7, [3]), (90, 7, [6, 0]), (5, 32, [9, 30]), (59, 32, [30, 9]), (59, 40, [30, 9])
    for n, k, labels in cases:
        logits, channel, _ = s_model_inputs("usual", n, k, np.float32)
        arrays = logits, channel, np.resize(labels, n)
        check_against_twin(cupy, "s_model_nll", arrays)


def test_samples_of_one_label_of_which_some_have_numbers_that_might_vanish(cupy, monkeypatch):
    monkeypatch.setattr(cuda_launch, "MULTIPROCESSORS", 1)  # several samples for each warp
    logits, channel, _ = s_model_inputs("usual", 90, 40, np.float32)
    logits[::2, 7] = -70
    check_against_twin(cupy, "s_model_nll", (logits, channel, np.full(90, 5)))


def test_labels_of_many_samples_among_more_classes_than_threads(cupy, monkeypatch):
    monkeypatch.setattr(cuda_launch, "MULTIPROCESSORS", 2)  # eight units, five of the first label
    logits, channel, _ = s_model_inputs("usual", 48, 1030, np.float32)
    check_against_twin(cupy, "s_model_nll", (logits, channel, np.repeat([3, 1027], [30, 18])))


def test_memory_that_starts_between_packs_gives_the_same_numbers(cupy):
    """Rows of 40 classes are read and written by packs; here they start at any number."""
    for name in DENSE:
        arrays = upload(cupy, inputs_of(name, 5, 40))
        expected = download(cupy, getattr(kernels, name)(*arrays))
        for array in arrays[:2]:
            if array.ndim == 2:
                memory = cupy.zeros(array.size + 1, dtype=array.dtype)
                memory[1:] = array.ravel()
                others = [memory[1:].reshape(array.shape) if a is array else a for a in arrays]
                found = download(cupy, getattr(kernels, name)(*others))
                assert same_bits(found, expected)


def of_dtype(arrays, dtype):
    return [a.astype(dtype) if getattr(a, "dtype", None) in DTYPES else a for a in arrays]


def twin_error(name, arrays):
    """Return the twin's result in float64, and for each array an error that rounding explains.

    That is 64 times what the twin errs by in float32, or one rounding of the largest number if
    that is more; for float64 it is as much less as its roundings are smaller.
    """
    twin = getattr(numpy_backend, name)
    *others, labels = arrays
    if "sparse" in name:
        others[-1] = kernels.link_index(others[-1])
    exactly = twin(*of_dtype(others, np.float64), labels)
    return exactly, [
        64 * max(np.abs(a - b).max(), EPS[np.float32] * np.abs(b).max())
        for a, b in zip(twin(*of_dtype(others, np.float32), labels), exactly, strict=True)
    ]


def inputs_of(name, n, k, n_hidden=6, n_kept=3):
    """Return arguments in float32; the targets are labels. Only a dense noise layer has K x K."""
    model = name.rsplit("_", 1)[0]
    if model == "s_model":
        return s_model_inputs("usual", n, k, np.float32)
    if model == "c_model":
        return model_inputs(model, "usual", n, k, np.float32, n_hidden=n_hidden)
    rng = np.random.default_rng([n, k])
    logits = 2 * rng.normal(size=(n, k)).astype(np.float32)
    if not name.startswith("sparse"):
        labels = rng.integers(k, size=n)
        if name == "softmax_nll":
            return logits, labels
        targets = np.zeros_like(logits)
        targets[np.arange(n), labels] = 1
        return logits, targets
    support = np.array([rng.choice(k, n_kept, replace=False) for _ in range(k)])
    labels = rng.choice(support.ravel(), n)  # of which each can be reached
    hidden, weights = rng.normal(size=(n, n_hidden)), rng.normal(size=(k, n_kept, n_hidden))
    wide = of_dtype((hidden, 0.7 * weights), np.float32) if model == "sparse_c_model" else ()
    return logits, *wide, rng.normal(size=(k, n_kept)).astype(np.float32), support, labels


def check_against_twin(cupy, name, arrays, dtypes=(np.float32,)):
    exactly, limits = twin_error(name, arrays)
    for dtype in dtypes:
        result = call(cupy, name, of_dtype(arrays, dtype))
        for found, exact, limit in zip(result, exactly, limits, strict=True):
            assert found.dtype == dtype
            assert np.abs(found - exact).max() <= limit * EPS[dtype] / EPS[np.float32]


# A warp per row up to 256 classes, blocks of 128, 256 and 1024 threads above; of rows in registers
# a warp each up to 4 KiB, then blocks of 256, 512 and 1024; more than one chunk of samples in the
# counting sort; long rows cut for several blocks; sizes off every block.
DENSE_SIZES = (
    (1, 1000),
    (300, 1000),
    (37, 257),
    (5000, 33),
    (100, 1025),
    (3, 2100),
    (3, 4100),
    (70001, 10),
)
TOO_LONG_FOR_REGISTERS = (3, cuda_launch.MAX_HELD + 100)
C_SIZES = ((1, 257, 5), (300, 100, 512), (33, 300, 65))
SPARSE_SIZES = (
    (1, 1000, 6, 3),
    (300, 1000, 33, 5),
    (5000, 50, 6, 40),
    (40, 100, 1100, 5),
    (3, 3 * cuda_launch.ROW_PART + 7, 6, 2),
)


def large_sizes(name):
    if name.startswith("c_model"):
        return C_SIZES
    if name.startswith("sparse"):
        return SPARSE_SIZES
    return DENSE_SIZES if "model" in name else (*DENSE_SIZES, TOO_LONG_FOR_REGISTERS)


@pytest.mark.parametrize(
    "name_size", cases_of("device", [(name, size) for name in NAMES for size in large_sizes(name)])
)
def test_large_shapes_agree_with_the_twin(device, name_size):
    name, size = name_size
    check_against_twin(device, name, inputs_of(name, *size), DTYPES)


@pytest.mark.parametrize("name", cases_of("host", NAMES))
def test_larger_shapes_on_the_host(host, name, monkeypatch):
    monkeypatch.setattr(cuda_launch, "SORT_CHUNK", 256)
    if name.startswith("c_model"):
        sizes = (5, 33, 65), (1, 257, 5)
    elif name.startswith("sparse"):
        sizes = (600, 9, 3, 4), (2, 270, 5, 3), (7, 5, 1030, 3), (9, 36, 3, 34)
    else:
        sizes = ((2, 1030), (600, 5), (40, 65)) if "model" in name else ((1, 300), (2, 1030))
    for size in sizes:
        check_against_twin(host, name, inputs_of(name, *size))


def test_rows_of_theta_too_long_for_registers_on_the_host(host):
    """More samples than classes, whose rows are longer than 4 KiB."""
    check_against_twin(
        host, "s_model_posterior", inputs_of("s_model_posterior", 540, 530), [np.float64]
    )


def check_same_bits(cupy, name):
    arrays = inputs_of(name, 40, 13)
    assert same_bits(call(cupy, name, arrays), call(cupy, name, arrays))


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(cupy, name):
    check_same_bits(cupy, name)


def test_two_runs_give_the_same_bits_every_way(cupy, way):
    for name in DENSE:
        check_same_bits(cupy, name)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_leaves_its_inputs_alone_and_keeps_the_dtype(cupy, name):
    for dtype in DTYPES:
        arrays = arguments(name, "usual", 11, 4, dtype)
        uploaded = upload(cupy, arrays)
        result = getattr(kernels, name)(*uploaded)
        assert all(value.dtype == dtype for value in result)
        assert all(isinstance(value, cupy.ndarray) for value in result)
        assert same_bits([cupy.asnumpy(array) for array in uploaded], arrays)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_takes_any_memory_order_and_any_integer_dtype(cupy, name):
    arrays = upload(cupy, arguments(name, "usual", 11, 4, np.float64))
    expected = download(cupy, getattr(kernels, name)(*arrays))
    for odd in (
        [array.copy(order="F") for array in arrays],
        [array.repeat(2, axis=0)[::2] for array in arrays],
        [array.astype(np.uint8) if array.dtype.kind == "i" else array for array in arrays],
    ):
        assert same_bits(download(cupy, getattr(kernels, name)(*odd)), expected)


def test_a_label_out_of_range_does_so_every_way(cupy, way):
    check_labels_out_of_range(cupy, "s_model", 4)


@pytest.mark.parametrize("k", [4, 12])
@pytest.mark.parametrize("model", ["c_model", "sparse_s_model", "sparse_c_model"])
def test_a_label_out_of_range_spoils_its_sample_and_the_loss_only(cupy, model, k, monkeypatch):
    monkeypatch.setattr(cuda_launch, "ROW_PART", 5)
    check_labels_out_of_range(cupy, model, k)


def check_labels_out_of_range(cupy, model, k):
    arrays = model_inputs(model, "usual", 9, k, np.float32)
    wrong = (*arrays[:-1], np.array(arrays[-1]))
    wrong[-1][[2, 5]] = k, -1
    good = np.arange(9)[(wrong[-1] >= 0) & (wrong[-1] < k)]
    e_step = call(cupy, f"{model}_posterior", wrong, check_values=False)
    right = call(cupy, f"{model}_posterior", arrays)
    for found, expected in zip(e_step, right, strict=True):
        assert np.isnan(found[[2, 5]]).all()
        assert found[good].tobytes() == expected[good].tobytes()
    joint = call(cupy, f"{model}_nll", wrong, check_values=False)
    assert np.isnan(joint.nll)
    assert np.isnan(joint.d_logits[[2, 5]]).all()
    assert np.isfinite(joint.d_logits[good]).all()
    found = rf"noisy_labels must lie in 0\.\.{k - 1}; found -1\.\.{k}"
    with pytest.raises(ValueError, match=found):
        getattr(kernels, f"{model}_nll")(*upload(cupy, wrong))


def test_unreachable_label_has_likelihood_minus_infinity_and_no_posterior(cupy, way):
    logits = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    channel, labels = np.array([[0.0, -np.inf], [0.0, 0.0]]), np.array([0, 1])
    for name in ("s_model_posterior", "s_model_nll"):
        result = call(cupy, name, (logits, channel, labels))
        assert compare.worst_error(name, result, logits, channel, labels) <= compare.ALLOWED_UNITS


def test_a_label_that_only_unlikely_classes_explain(cupy, way):
    """Products of probabilities would be zero: of small logits, of small theta, of both."""
    for dtype, far in itertools.product(DTYPES, (42.0, 44.0, 70.0, 200.0)):
        logits = np.array([[0, -far, -2 * far], [-far, 0, 1], [0, 1, 2]], dtype=dtype)
        channel = np.array([[0, -np.inf, -far], [far, 0, 0], [0, -far, -np.inf]], dtype=dtype)
        for labels in ([1, 1, 1], [2, 2, 2], [2, 1, 0]):
            arrays = logits, channel, np.array(labels)
            check_exactly(cupy, "s_model_posterior", arrays)
            check_exactly(cupy, "s_model_nll", arrays)


@pytest.mark.parametrize("rows", [1, 7, 19 * 3, 10**6])
@pytest.mark.parametrize("name", ["c_model_nll", "c_model_posterior"])
def test_the_tiles_of_scores_do_not_show_in_the_results(cupy, name, rows, monkeypatch):
    """Tiles of one row, of some samples of a class, of some classes, of everything."""
    arrays = model_inputs("c_model", "usual", 19, 7, np.float64)
    monkeypatch.setattr(cuda_launch, "SCORE_TILE_BYTES", rows * 7 * 8)
    assert compare.worst_error(name, call(cupy, name, arrays), *arrays) <= compare.ALLOWED_UNITS


def test_tiles_of_all_classes_do_not_show_in_the_results(cupy, monkeypatch):
    """Two of 32 samples and a last one of 6."""
    monkeypatch.setattr(cuda_launch, "SCORE_SAMPLES", 16)
    monkeypatch.setattr(cuda_launch, "SCORE_TILE_BYTES", 32 * 3 * 3 * 8)
    assert cuda_launch.score_tile(70, 3, 8, cuda_launch.SCORE_TILE_BYTES) == (32, 3)
    for name in ("c_model_nll", "c_model_posterior"):
        arrays = model_inputs("c_model", "usual", 70, 3, np.float64)
        assert compare.worst_error(name, call(cupy, name, arrays), *arrays) <= compare.ALLOWED_UNITS


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sparse")])
def test_the_parts_of_long_rows_do_not_show_in_the_results(cupy, name, monkeypatch):
    monkeypatch.setattr(cuda_launch, "ROW_PART", 2)
    for regime, dtype in itertools.product(REGIMES, DTYPES):
        check_exactly(cupy, name, arguments(name, regime, 6, 5, dtype))
    monkeypatch.setattr(cuda_launch, "ROW_PART", 1300)  # more than a block loads at once
    check_against_twin(cupy, name, inputs_of(name, 3, 3000, 3))


SORTS = [(1, 7, 1), (300, 7, 1), (1030, 7, 1), (1030, 7, 40), (1030, 7, 10**6)]


@pytest.mark.parametrize(
    ("n", "k", "table", "chunked"),
    [*((*sort, 0) for sort in SORTS), (2100, 7, 1, 65536), (3000, 1023, 1, 65536)],
)
def test_samples_are_sorted_by_label_and_stay_in_order(cupy, n, k, table, chunked, monkeypatch):
    monkeypatch.setattr(cuda_launch, "SORT_CHUNK", 256)
    monkeypatch.setattr(cuda_launch, "SORT_TABLE", table)
    monkeypatch.setattr(cuda_launch, "CHUNKED_SAMPLES", chunked)
    labels = np.random.default_rng(0).integers(-1, k + 1, size=n)
    groups = importlib.import_module(f"{BACKEND}.labels")
    order, ends_jb, n_chunks = groups.group_by_label(cupy.asarray(labels), k)
    inside = np.flatnonzero((labels >= 0) & (labels < k))
    keys = np.where((labels >= 0) & (labels < k), labels, k)
    assert cupy.asnumpy(order).tolist() == np.argsort(keys, kind="stable").tolist()
    ends_j = cupy.asnumpy(ends_jb)[n_chunks - 1 :: n_chunks]
    n_j = np.append(np.bincount(labels[inside], minlength=k), labels.size - inside.size)
    assert ends_j.tolist() == np.cumsum(n_j).tolist()
    assert chunked == 0 or n_chunks == 1


def test_as_many_samples_of_one_label_as_chunks_can_have(cupy):
    """Their counts are added in 16 bits."""
    n = cuda_launch.CHUNKED_SAMPLES
    groups = importlib.import_module(f"{BACKEND}.labels")
    order, ends_jb, n_chunks = groups.group_by_label(cupy.full(n, 4, dtype=np.int64), 6)
    assert (cupy.asnumpy(order) == np.arange(n)).all()
    assert cupy.asnumpy(ends_jb).tolist() == [0, 0, 0, 0, n, n, n]
    assert n_chunks == 1


def test_arrays_and_backends_have_to_match(cupy):
    arrays = arguments("s_model_nll", "usual", 5, 3, np.float64)
    with pytest.raises(TypeError, match=r"logits is a NumPy array.*cupy\.asarray"):
        kernels.s_model_nll(*arrays, backend="cupy")
    for backend in kernels.CPU_BACKENDS:
        with pytest.raises(TypeError, match=r"logits is a CuPy array.*cupy\.asnumpy"):
            kernels.s_model_nll(*upload(cupy, arrays), backend=backend)
    with pytest.raises(TypeError, match="noisy_labels is a NumPy array and logits a CuPy array"):
        kernels.s_model_nll(*upload(cupy, arrays[:2]), arrays[2])
    with pytest.raises(ValueError, match="logits: row 0 holds NaN"):
        kernels.s_model_nll(*upload(cupy, (arrays[0] * np.nan, *arrays[1:])))


def test_a_support_on_the_gpu_gives_an_index_there(cupy):
    support = model_inputs("sparse_s_model", "usual", 5, 6)[2]
    index = kernels.link_index(cupy.asarray(support))
    for found, expected in zip(index, kernels.link_index(support), strict=True):
        assert isinstance(found, cupy.ndarray)
        assert cupy.asnumpy(found).tolist() == expected.tolist()


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    without_backend(monkeypatch)
    with pytest.raises(ImportError, match=r"pip install nalayer\[cuda13\]"):
        kernels.get_backend("cupy")


@pytest.mark.parametrize("name", cases_of("device", NAMES))
def test_no_call_waits_for_the_device(device, name):
    arrays = upload(device, inputs_of(name, 300, 13))
    if "sparse" in name:
        arrays[-2] = kernels.link_index(arrays[-2])
    check_returns_at_once(device, getattr(kernels, name), *arrays, check_values=False)


@pytest.mark.parametrize("k", [200, 100])
def test_the_c_model_keeps_to_its_budget(device, k, monkeypatch):
    """Tiles of all samples and 20 classes, of 192 samples and all classes."""
    n, d, budget = 512, 64, 2**23
    monkeypatch.setattr(cuda_launch, "SCORE_TILE_BYTES", budget)
    arrays = upload(device, inputs_of("c_model_nll", n, k, d))
    kernels.c_model_nll(*arrays)
    pool = device.cuda.MemoryPool()
    with device.cuda.using_allocator(pool.malloc):
        result = kernels.c_model_nll(*arrays, check_values=False)
        results = sum(value.nbytes for value in result)
        # Besides the scores: two (n, K) arrays, one (K, K) in float64, and the pool's rounding.
        beside = 8 * (n * k + k * k) + 2**20
        assert pool.total_bytes() <= results + budget + beside
        assert budget < n * k * k * 4
        del result
