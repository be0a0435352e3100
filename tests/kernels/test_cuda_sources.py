"""What can be known about the CUDA kernels without a GPU: they compile, and their launches fit."""

import ctypes
import ctypes.util
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kernels import cuda_launch

ARCHITECTURES = ("sm_80", "sm_90")
ITEMSIZES = {"float32": 4, "float64": 8}
ROW_LENGTHS = (100, 1000, 16_384)  # in registers
FOLDER = Path(cuda_launch.__file__).with_name("cuda")


def load_nvrtc() -> ctypes.CDLL | None:
    """Return CUDA's run-time compiler, of the package nvidia-cuda-nvrtc or of the system."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    found = [str(path) for place in places or () for path in Path(place).rglob("libnvrtc.so.*")]
    found = [path for path in sorted(found) if "builtins" not in path and "alt" not in path]
    for name in (*found, ctypes.util.find_library("nvrtc")):
        if name:
            return ctypes.CDLL(name)
    return None


def compile_with_nvrtc(nvrtc: ctypes.CDLL, text: str, options: tuple[str, ...]) -> tuple[bool, str]:
    """Return whether it compiles, and what the compiler says."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"a.cu", 0, None, None)
    assert made == 0
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return failed == 0, log.value.decode().strip()


def compile_with_nvcc(nvcc: str, text: str, options: tuple[str, ...], folder: Path):
    with tempfile.TemporaryDirectory(dir=folder) as own:
        source = Path(own) / "a.cu"
        source.write_text(text)
        command = [nvcc, *options, "-cubin", "-o", f"{own}/a.cubin", str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode == 0, (run.stdout + run.stderr).strip()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    nvrtc, nvcc = load_nvrtc(), shutil.which("nvcc")
    if nvrtc:
        return lambda text, options: compile_with_nvrtc(nvrtc, text, options)
    if nvcc:
        folder = tmp_path_factory.mktemp("nvcc")
        return lambda text, options: compile_with_nvcc(nvcc, text, options, folder)
    pytest.skip("no CUDA compiler: neither the package nvidia-cuda-nvrtc nor nvcc")


def test_sources_compile_without_a_warning(compiled):
    held = [(cuda_launch.HELD, "float32", "sm_90", length) for length in ROW_LENGTHS]
    cases = [
        *itertools.product(cuda_launch.SOURCES, cuda_launch.REALS, ARCHITECTURES, (None,)),
        *held,
        (cuda_launch.HELD, "float64", "sm_80", min(ROW_LENGTHS)),
    ]

    def outcome(case):
        name, dtype, architecture, length = case
        held = length and cuda_launch.held(length, ITEMSIZES[dtype])
        # The last one is what CuPy adds.
        options = (*cuda_launch.options(dtype, held), f"-arch={architecture}", "-ftz=true")
        return compiled(cuda_launch.source(name), options)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = dict(zip(cases, pool.map(outcome, cases), strict=True))
    assert {case: log for case, (works, log) in outcomes.items() if not works or log} == {}


def test_the_compiler_would_tell_an_error_and_a_warning(compiled):
    options = (*cuda_launch.options("float32"), "-arch=sm_90")
    works, log = compiled("__global__ void f(float* x) { *x = y; }", options)
    assert not works
    assert "y" in log
    works, log = compiled("__global__ void f(float* x) { int unused; *x = 1; }", options)
    assert works
    assert "unused" in log


def test_every_source_is_in_the_list():
    assert {path.stem for path in FOLDER.glob("*.cu")} == {*cuda_launch.SOURCES, cuda_launch.HELD}


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [
        ("sparse", r"FEATURES_OF_BLOCK = (\d+)", cuda_launch.FEATURES_OF_BLOCK),
        ("network", r"PACK_BYTES = (\d+)", cuda_launch.PACK_BYTES),
        ("convolution", r"LANE_ROWS = (\d+) / sizeof", cuda_launch.TILE_BYTES // 16),
        ("convolution", r"TILE_COLUMNS = (\d+) \* COLUMN_WARPS", cuda_launch.FILTERS_OF_WARP),
        ("pooling", r"sums\[(\d+)\]\[32\]", cuda_launch.PIXEL_ROWS),
        ("labels", r"__shared__ Four tile\[(\d+)\]", cuda_launch.SORT_BLOCK // 4),
        ("labels", r"__shared__ int label_t\[(\d+)\]", cuda_launch.FEW_SAMPLES),
        ("labels", r"blockIdx.x\) \* (4096)", cuda_launch.SORT_LABELS),
        ("labels", r"int CHUNK = (\d+)", cuda_launch.CHUNK_SIZE),
        ("s_model", r"int STRIP = (\d+) / sizeof", cuda_launch.STRIP_BYTES),
        ("s_model", r"int FEW = (\d+)", cuda_launch.FEW_CLASSES),
        ("s_model", r"int FEW_THREADS = (\d+)", cuda_launch.FEW_BLOCK),
        ("s_model", r"__shared__ double counts\[(\d+)\]", cuda_launch.COUNT_BLOCK),
        ("s_model", r"int THETA_ROWS = (\d+)", cuda_launch.THETA_ROWS),
    ],
)
def test_constants_of_the_launches_are_those_of_the_sources(name, constant, value):
    assert re.search(constant, cuda_launch.source(name))[1] == str(value)


LARGE = (1, 2, 7, 255, 256, 257, 1000, 1025, 8193, 65_537, 10**6, 10**7)


def size_of(launch: cuda_launch.Launch) -> int:
    grid, block = launch
    assert all(type(size) is int and size >= 1 for size in (*grid, *block))
    threads = block[0] * (block[1] if len(block) > 1 else 1)
    assert threads <= 1024
    assert threads % 32 == 0
    return threads


@pytest.mark.parametrize("n", LARGE)
def test_every_row_has_threads(n):
    for k in LARGE:
        (blocks,), (x, y) = cuda_launch.rows(n, k)
        size_of(((blocks,), (x, y)))
        assert (blocks - 1) * y < n <= blocks * y
        assert x == 32 or (x % 32 == 0 and y == 1)  # what the reductions of rows.cuh rest on


@pytest.mark.parametrize("itemsize", [4, 8])
def test_rows_in_registers_fit_the_threads_and_the_multiprocessor(itemsize):
    for length in range(1, cuda_launch.MAX_HELD + 1):
        held = cuda_launch.held(length, itemsize)
        assert held.values % 4 == 0  # a pack holds two or four
        assert held.threads // held.rows * held.values >= length
        assert held.threads % 32 == 0
        assert held.rows == 1 or held.threads == 32 * held.rows  # see rows.cuh
        assert 1 <= held.resident * held.threads <= 2048
    assert cuda_launch.held(cuda_launch.MAX_HELD + 1, itemsize) is None


@pytest.mark.parametrize("n", LARGE)
def test_units_and_blocks_cover_all_samples_and_none_is_empty(n):
    if n <= cuda_launch.FEW_SAMPLES:
        assert size_of(cuda_launch.few_samples(n, 5)) >= n
    per_block, n_blocks = cuda_launch.few_classes_blocks(n)
    assert (n_blocks - 1) * per_block < n <= n_blocks * per_block
    assert n_blocks <= cuda_launch.FEW_CLASSES_BLOCKS
    for k in LARGE[1:]:
        held = cuda_launch.held(k, 4)
        if held is None:
            continue
        per_unit, n_units = cuda_launch.sample_units(n, held)
        _, n_rows = cuda_launch.count_rows(n, n_units, k)
        assert n_rows <= min(n, n_units + k)
        assert (n_units - 1) * per_unit < n <= n_units * per_unit
        (blocks,), (x, y) = cuda_launch.held_rows(n_units, held)
        size_of(((blocks,), (x, y)))
        assert (blocks - 1) * y < n_units <= blocks * y


def test_each_unit_and_label_has_a_row_of_counts_of_its_own():
    """As ``counts_row`` in rows.cuh numbers them, along samples sorted by label."""
    rng = np.random.default_rng(0)
    for n, k, per_unit in ((1, 3, 1), (100, 7, 1), (100, 7, 3), (50, 90, 4), (64, 1, 8)):
        labels, places = np.sort(rng.integers(k, size=n)), np.arange(n)
        units = places // per_unit
        pairs = list(zip(units.tolist(), labels.tolist(), strict=True))
        first_place = [pairs.index(pair) for pair in pairs]
        by_place, n_rows = cuda_launch.count_rows(n, units[-1] + 1, k)
        rows = first_place if by_place else (units + labels).tolist()
        assert len(set(rows)) == len(set(pairs))
        assert len(set(zip(rows, pairs, strict=True))) == len(set(pairs))
        assert max(rows) < n_rows


def test_counts_of_half_of_the_chunks_fit_into_16_bits():
    n_chunks = cuda_launch.chunks(cuda_launch.CHUNKED_SAMPLES, 1000)
    assert n_chunks > 0
    assert cuda_launch.divided(n_chunks, 2) * cuda_launch.CHUNK_SIZE < 2**16


@pytest.mark.parametrize("n", LARGE)
def test_the_counting_sort_covers_all_samples_with_a_small_table(n):
    for k in LARGE[1:]:
        chunk, n_chunks = cuda_launch.label_chunks(n, k)
        assert chunk % cuda_launch.SORT_BLOCK == 0
        assert (n_chunks - 1) * chunk < n <= n_chunks * chunk
        assert n_chunks == 1 or n_chunks * (k + 1) <= cuda_launch.SORT_TABLE


@pytest.mark.parametrize("n", LARGE)
def test_the_sums_over_rows_cover_all_rows_with_enough_blocks(n):
    for m in LARGE:
        launch, part, n_parts = cuda_launch.column_sums(n, m)
        assert size_of(launch) == 1024
        (blocks, parts), _ = launch
        assert (blocks - 1) * 32 < m <= blocks * 32
        assert parts == n_parts
        assert (n_parts - 1) * part < n <= n_parts * part
        assert n_parts == 1 or part >= cuda_launch.PART_ROWS
        # A GPU has some 132 processors, each with room for two blocks.
        assert n < 300_000 or blocks * parts >= 264


@pytest.mark.parametrize("size", [*LARGE, 2**31 - 1, 2**31, 2**33 + 3])
def test_every_number_has_a_thread(size):
    for itemsize in (4, 8):
        (blocks,), (threads,) = cuda_launch.packs(size, itemsize)
        size_of(((blocks,), (threads,)))
        numbers = threads * cuda_launch.PACK_BYTES // itemsize
        assert (blocks - 1) * numbers < size <= blocks * numbers
    if size < 2**31:
        (blocks,), (threads,) = cuda_launch.row_packs(size, 4 * 785)  # the last pack is short
        assert (blocks - 1) * threads < 197 * size <= blocks * threads


@pytest.mark.parametrize("k", [size for size in LARGE if 1 < size <= 2_000_000])
def test_blocks_cover_the_noise_matrix(k):
    for itemsize in (4, 8):
        (strips_and_one,), (threads,) = cuda_launch.channel_gradient(k, itemsize)
        strip = cuda_launch.STRIP_BYTES // itemsize
        assert (strips_and_one - 2) * strip < k <= (strips_and_one - 1) * strip
        assert threads == 1024
    (labels, parts), (x, y) = cuda_launch.counts(k)
    assert labels == k
    assert (parts - 1) * x < k <= parts * x
    assert x * y == cuda_launch.COUNT_BLOCK


@pytest.mark.parametrize("n_pixels", [n for n in LARGE if n < 10**7])
@pytest.mark.parametrize("n_filters", [1, 32, 33, 64, 65, 96, 1000])
def test_tiles_cover_a_convolution_and_its_gradients(n_pixels, n_filters):
    for itemsize, (n_patch, pool) in itertools.product((4, 8), ((9, 1), (576, 2), (10**4, 1))):
        (blocks, across), (_, warps) = cuda_launch.convolution(n_pixels, pool, n_filters, itemsize)
        tile = 16 * warps
        windows = 512 // itemsize // pool**2
        assert (blocks - 1) * windows < n_pixels <= blocks * windows
        assert (across - 1) * tile < n_filters <= across * tile

        part, how = cuda_launch.weight_gradient(n_pixels, n_patch, n_filters, itemsize)
        (tiles, parts), (_, warps) = how
        size_of(how)
        assert warps * 32 == tile
        assert tiles == across * -(-n_patch // (256 // itemsize))
        assert part % 16 == 0
        assert (parts - 1) * part < n_pixels <= parts * part
        # Memory for the parts: of the order of what a GPU works on at a time, or what accuracy asks
        assert parts == 1 or parts * tiles * tile <= 2 * 2**16 or part == cuda_launch.PART_PIXELS

        part, ((parts, columns), _) = cuda_launch.pixel_sums(n_pixels, n_filters)
        assert (parts - 1) * part < n_pixels <= parts * part
        assert parts <= cuda_launch.BIAS_PARTS
        assert columns * 32 >= n_filters


@pytest.mark.parametrize("n", [1, 256, 4096, 65_536, 10**7])
def test_a_tile_of_scores_fits_the_budget_and_is_as_large_as_it_can_be(n):
    budget = cuda_launch.SCORE_TILE_BYTES
    for k, itemsize in itertools.product((2, 100, 1000, 100_000), (4, 8)):
        n_samples, n_classes = cuda_launch.score_tile(n, k, itemsize, budget)
        row = k * itemsize
        assert 1 <= n_samples <= n
        assert 1 <= n_classes <= k
        assert n_samples * n_classes * row <= budget
        assert n_samples == n or n_classes in (1, k)
        if n_classes == k:  # as few spans as there can be, of samples by 32
            fit = budget // (k * row)
            assert n_samples == n or n_samples % 32 == 0
            assert n_samples == n or n_samples * 4 >= cuda_launch.SCORE_SAMPLES * itemsize // 2
            assert -(-n // n_samples) == 1 if fit >= n else -(-n // (fit // 32 * 32))
        else:
            assert n * (n_classes + 1) * row > budget or n_classes == 1
            assert budget // (k * row) * 4 < cuda_launch.SCORE_SAMPLES * itemsize
        # cuBLAS counts rows and columns in 32 bits.
        assert n_classes * k <= cuda_launch.MAX_GRID_X
        cuda_launch.rows(n_samples * n_classes, k)


def test_a_row_that_exceeds_the_budget_is_computed_all_the_same():
    assert cuda_launch.score_tile(100, 10**6, 4, budget=2**20) == (1, 1)


def test_a_tile_holds_all_classes_where_that_leaves_enough_samples():
    tile = cuda_launch.score_tile
    assert tile(4096, 1000, 4, 128 * 1000**2 * 4) == (128, 1000)
    assert tile(4096, 1000, 4, 128 * 1000**2 * 4 - 1) == (4096, 31)
    assert tile(4096, 1000, 8, 255 * 1000**2 * 8) == (4096, 62)
    assert tile(300, 100, 4, 200 * 100**2 * 4) == (160, 100)  # not 192 and 108


def test_blocks_cover_long_rows_and_links():
    (n_rows, parts), _ = cuda_launch.row_parts(256, 10**6)
    assert n_rows == 256
    assert (parts - 1) * cuda_launch.ROW_PART < 10**6 <= parts * cuda_launch.ROW_PART
    for k, n_kept in itertools.product(LARGE, (1, 5, 32, 33, 1000)):
        (blocks,), (x, y) = cuda_launch.link_rows(k, n_kept)
        size_of(((blocks,), (x, y)))
        assert (blocks - 1) * y < k <= blocks * y
        assert x == 1 or (n_kept > 32 and x % 32 == 0)


def test_spans_cover_everything_once():
    assert list(cuda_launch.spans(7, 3)) == [(0, 3), (3, 6), (6, 7)]


def test_a_launch_that_no_gpu_takes_is_refused():
    with pytest.raises(ValueError, match="too many samples for the s-model on a GPU: 4294967296"):
        cuda_launch.sample_units(2**32, cuda_launch.held(100, 4))
    with pytest.raises(ValueError, match="too large for one launch"):
        cuda_launch.counts(10**9)
    with pytest.raises(ValueError, match="too large for one launch"):
        cuda_launch.features(2**31, 10)
