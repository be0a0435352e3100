"""CUDA sources and the arithmetic of their launches, in plain Python: it runs without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SOURCES = (
    "labels",
    "softmax",
    "s_model",
    "c_model",
    "sparse",
    "network",
    "convolution",
    "pooling",
    "counts",
)
SHARED = ("rows.cuh", "dropout.cuh", "chunks.cuh")
HELD = "held"  # compiled for the length of its rows
REALS = {"float32": "float", "float64": "double"}

# Limits of the hardware, the same for every architecture since 2012.
MAX_GRID_X = 2**31 - 1
MAX_GRID_Y = 65535
REGISTERS = 65536  # of a multiprocessor

# held.cu numbers samples in 32 bits: of 33 classes or more, that is more than a terabyte.
MAX_SAMPLES = 2**32 - 1

# What the cuts of the s-model's samples are made for. Fixed, so that the same numbers are added in
# the same order on every device: 132 on an H100 or H200.
MULTIPROCESSORS = 132

# The same constants stand in the sources.
TILE = 32  # columns of a block that adds up columns, and the like
SORT_BLOCK = 256  # labels.cu
COUNT_BLOCK = 256  # s_model.cu, posterior_counts
THETA_ROWS = 16  # s_model.cu, log_theta_columns: rows of a block
FEW_CLASSES = 32  # s_model.cu, few_classes
FEW_BLOCK = 256  # s_model.cu, few_classes
FEW_SAMPLES = 1024  # labels.cu, sort_few
SORT_LABELS = 4096  # labels.cu, sort_few: of a block
CHUNK_SIZE = 1024  # chunks.cuh: samples of a block, and threads for labels
STRIP_BYTES = 32  # s_model.cu, channel_gradient: of each row of the counts
FEATURES_OF_BLOCK = 1024  # sparse.cu
PACK_BYTES = 16  # rows.cuh: what a thread reads or writes at once
TILE_BYTES = 512  # convolution.cu: a column of a block's tile; a warp has half of it
FILTERS_OF_WARP = 32  # convolution.cu
PIXEL_ROWS = 8  # pooling.cu: pixels at once

# How finely sums over pixels are cut: so many warps work on a convolution's weights, so many blocks
# for 32 filters on its bias. About what a large GPU has at a time, and a constant, so that the bits
# are the same on every one. The parts are added in float64; in float32 a part stays short.
WEIGHT_WARPS = 2048
BIAS_PARTS = 1024
PART_PIXELS = 8192

# A chunk of samples looks through all of itself, so it is kept short; but the table of counts, one
# for each chunk and label, is kept small too (4 million counts, 32 MiB).
SORT_CHUNK = 1024
SORT_TABLE = 2**22

# Up to so many samples of up to 1023 classes are sorted by two kernels, each of whose blocks has a
# chunk of CHUNK_SIZE; of more samples, a block would read too many counts. Half of them, added in
# pairs of 16 bits (chunks.cuh), must stay below 2**16.
CHUNKED_SAMPLES = 65536

# Sums over rows: the least rows of a part, and the most blocks.
PART_ROWS = 1024
SUM_BLOCKS = 528

# Numbers of a long row that one block of the sparse models' kernels works on.
ROW_PART = 8192

# With few classes, up to so many samples are for one block alone, in one launch.
ONE_BLOCK_SAMPLES = 512
FEW_CLASSES_BLOCKS = 128

# Rows of up to so many numbers are held in registers.
MAX_HELD = 16384

# Scores of the c-model held at a time, in bytes.
SCORE_TILE_BYTES = 512 * 2**20
# A tile with all classes of fewer samples than this (in float32; twice as many in float64) keeps
# the products waiting for memory: each tile reads and writes the gradient of the weights once.
# On an H100 at (n, d, K) = (4096, 512, 1000): 64 samples 404 ms, 128 samples 322 ms; all samples of
# 16 or 32 classes, with a product more, 377 and 369 ms.
SCORE_SAMPLES = 128

Launch = tuple[tuple[int, ...], tuple[int, ...]]
"""Grid and block, as CuPy's kernels take them."""


class Held(NamedTuple):
    """Rows in registers: VALUES, THREADS and RESIDENT of the sources (``rows.cuh``)."""

    values: int
    """Numbers of a row that one thread holds."""
    threads: int
    """Of a block."""
    rows: int
    """Of a block: each belongs to one warp, or one to all."""
    resident: int
    """Blocks that a multiprocessor is to hold at a time; more registers a thread cannot have."""


def held(length: int, itemsize: int) -> Held | None:
    """Return how rows of this length are held in registers; None if they are too long for it.

    Rows of up to 4 KiB belong to a warp. A thread is given registers for three arrays of its
    values and some more: what does not fit goes through memory, and that costs more than fewer
    warps do.
    """
    if length > MAX_HELD:
        return None
    words = itemsize // 4
    if length * itemsize <= 4096:
        values, threads, rows = 4 * divided(length, 128), 128, 4
        registers = 40 + 16 * words + 3 * words * values
        return Held(values, threads, rows, REGISTERS // (threads * registers))
    threads = 256 if length <= 2048 else 512 if length <= 4096 else 1024
    values = max(4, 4 * divided(length, 4 * threads))
    return Held(values, threads, 1, max(1, 1024 // (threads * words)))


def source(name: str) -> str:
    """Return the text of one CUDA source, what it shares with the others in front."""
    folder = Path(__file__).with_name("cuda")
    return "\n".join((folder / file).read_text() for file in (*SHARED, f"{name}.cu"))


def options(dtype: str, rows: Held | None = None) -> tuple[str, ...]:
    """Return the compiler's options: the number type, rows in registers, no fast arithmetic."""
    given = ("-std=c++17", f"-DREAL={REALS[dtype]}")
    if rows is None:
        return given
    sizes = {
        "VALUES": rows.values,
        "ROW_THREADS": rows.threads // rows.rows,
        "THREADS": rows.threads,
        "RESIDENT": rows.resident,
    }
    return *given, *(f"-D{name}={size}" for name, size in sizes.items())


def divided(size: int, part: int) -> int:
    """Return how many parts it takes, the last one maybe not full."""
    return -(-size // part)


def _checked(grid: tuple[int, ...], block: tuple[int, ...]) -> Launch:
    if grid[0] > MAX_GRID_X or any(size > MAX_GRID_Y for size in grid[1:]):
        raise ValueError(f"too large for one launch on a GPU: a grid of {grid} blocks")
    return grid, block


def rows(n_rows: int, length: int) -> Launch:
    """Return the launch of a kernel that works row by row (``my_row`` in ``rows.cuh``).

    Short rows get one warp each, eight in a block; long rows a block each.
    """
    if length <= 256:
        return _checked((divided(n_rows, 8),), (32, 8))
    return _checked((n_rows,), (128 if length <= 1024 else 256 if length <= 8192 else 1024, 1))


def warp_rows(n_rows: int) -> Launch:
    """Return the launch of a kernel that works row by row with a warp for each, long or not."""
    return rows(n_rows, 32)


def row_parts(n_rows: int, length: int) -> Launch:
    """Return the launch of a kernel whose blocks each work on ``ROW_PART`` numbers of a row."""
    return _checked((n_rows, divided(length, ROW_PART)), (256, 1))


def link_rows(k: int, n_kept: int) -> Launch:
    """Return the launch of a kernel that works on the links of each class: (K, l) numbers.

    Few links are left to a single thread: neighbours share what they load.
    """
    if n_kept <= 32:
        return _checked((divided(k, 256),), (1, 256))
    return rows(k, n_kept)


def held_rows(n_rows: int, how: Held) -> Launch:
    """Return the launch of a kernel that holds its rows in registers."""
    return _checked((divided(n_rows, how.rows),), (how.threads // how.rows, how.rows))


def theta_rows(k: int, n_chunks: int) -> Launch:
    """Return the launch of ``log_theta_columns``: a block for a chunk, or 16 rows of theta."""
    return _checked((n_chunks + divided(k, THETA_ROWS),), (32, 32))


def theta_of_labels(k: int) -> Launch:
    """Return the launch of ``log_theta_of_labels``: rows in flight that the cache can hold."""
    return rows(k, min(k, 8192))


def sample_units(n: int, how: Held) -> tuple[int, int]:
    """Return how many samples a unit of the s-model has, and how many units there are.

    As many as the device holds at a time; one sample each if there are fewer.
    """
    if n > MAX_SAMPLES:
        raise ValueError(f"too many samples for the s-model on a GPU: {n}")
    per_unit = divided(n, MULTIPROCESSORS * how.resident * how.rows)
    return per_unit, divided(n, per_unit)


def count_rows(n: int, n_units: int, k: int) -> tuple[bool, int]:
    """Return how the rows of the table of counts are numbered, and how many there are.

    By place or not: ``counts_row`` in ``rows.cuh``.
    """
    by_place = n <= n_units + k
    return by_place, n if by_place else n_units + k


def few_classes_blocks(n: int) -> tuple[int, int]:
    """Return how many samples a block of ``few_classes`` has, and how many blocks there are."""
    if n <= ONE_BLOCK_SAMPLES:
        return n, 1
    per_block = max(FEW_BLOCK, divided(n, FEW_CLASSES_BLOCKS))
    return per_block, divided(n, per_block)


def warps(n_blocks: int) -> Launch:
    """Return the launch of a block of eight warps for each sample."""
    return _checked((n_blocks,), (32, 8))


def columns(n_columns: int, height: int, n_parts: int = 1) -> Launch:
    """Return the launch of column sums: a block for 32 columns, ``height`` rows at once."""
    return _checked((divided(n_columns, TILE), n_parts), (TILE, height))


def elements(size: int, block: int = SORT_BLOCK) -> Launch:
    """Return the launch of one thread for each element."""
    return _checked((divided(size, block),), (block,))


@lru_cache
def packs(size: int, itemsize: int) -> Launch:
    """Return the launch of one thread for each 16 bytes of a flat array."""
    return elements(divided(size, PACK_BYTES // itemsize))


@lru_cache
def row_packs(n_rows: int, row_bytes: int) -> Launch:
    """Return the launch of one thread for each 16 bytes of each row; a last pack may be shorter."""
    return elements(n_rows * divided(row_bytes, PACK_BYTES))


@lru_cache
def column_sums(n_rows: int, n_columns: int) -> tuple[Launch, int, int]:
    """Return the launch of sums over rows, how many rows a part has, and how many parts there are.

    A block adds 32 columns of a part. Up to 2047 rows are one part, which needs no second launch;
    more are cut, as far as it takes to keep a GPU busy.
    """
    blocks = max(1, divided(n_columns, TILE))
    n_parts = max(1, min(n_rows // PART_ROWS, divided(SUM_BLOCKS, blocks)))
    part = divided(max(1, n_rows), n_parts)
    n_parts = divided(max(1, n_rows), part)
    return columns(n_columns, 32, n_parts), part, n_parts


def channel_gradient(k: int, itemsize: int) -> Launch:
    """Return the launch of the s-model's ``channel_gradient``: blocks for strips, and one more."""
    return _checked((divided(k, STRIP_BYTES // itemsize) + 1,), (1024,))


def counts(k: int) -> Launch:
    """Return the launch of ``posterior_counts``: a block's threads are true classes x samples."""
    n_classes = TILE
    while n_classes < min(k, COUNT_BLOCK):
        n_classes *= 2
    return _checked((k, divided(k, n_classes)), (n_classes, COUNT_BLOCK // n_classes))


def features(n_blocks: int, d: int) -> Launch:
    """Return the launch of the sparse c-model's gradients: a block per row of d features."""
    return _checked((n_blocks, divided(d, FEATURES_OF_BLOCK)), (32, 8))


def filter_tile(n_filters: int) -> int:
    """Return for how many filters a block of a convolution works: the fewest that are not there."""
    return 2 * FILTERS_OF_WARP if divided(n_filters, FILTERS_OF_WARP) % 2 == 0 else FILTERS_OF_WARP


@lru_cache
def convolution(n_out: int, pool: int, n_filters: int, itemsize: int) -> Launch:
    """Return the launch of a convolution, for windows of pool x pool pixels (1 or 2)."""
    tile = filter_tile(n_filters)
    windows = TILE_BYTES // itemsize // pool**2
    grid = divided(n_out, windows), divided(n_filters, tile)
    return _checked(grid, (32, 2 * tile // FILTERS_OF_WARP))


@lru_cache
def weight_gradient(
    n_pixels: int, n_patch: int, n_filters: int, itemsize: int
) -> tuple[int, Launch]:
    """Return how many pixels a part of the gradient spans, and its launch: tiles x parts."""
    tile = filter_tile(n_filters)
    n_tiles = divided(n_patch, TILE_BYTES // itemsize // 2) * divided(n_filters, tile)
    n_parts = max(1, WEIGHT_WARPS * FILTERS_OF_WARP // (n_tiles * tile))
    # Whole slabs; short ones do not repay their share of the sum.
    part = min(PART_PIXELS, max(64, divided(divided(n_pixels, n_parts), 16) * 16))
    return part, _checked((n_tiles, divided(n_pixels, part)), (32, tile // FILTERS_OF_WARP))


@lru_cache
def pixel_sums(n_pixels: int, n_channels: int) -> tuple[int, Launch]:
    """Return how many pixels a part of their sum spans, and its launch: parts x 32 channels."""
    part = divided(divided(n_pixels, BIAS_PARTS), PIXEL_ROWS) * PIXEL_ROWS
    grid = divided(n_pixels, part), divided(n_channels, TILE)
    return part, _checked(grid, (TILE, PIXEL_ROWS))


@lru_cache
def added_parts(n_weight: int, n_bias: int) -> Launch:
    """Return the launch that adds the parts of gradients: 32 numbers of either for each block."""
    return _checked((divided(n_weight, TILE) + divided(n_bias, TILE),), (TILE, 32))


def few_samples(n: int, k: int) -> Launch:
    """Return the launch of ``sort_few``: a thread for each sample, in turn for each label."""
    grid = (divided(k + 1, SORT_LABELS),)
    return _checked(grid, (32 * divided(max(n, min(k + 1, FEW_SAMPLES)), 32),))


def chunks(n: int, k: int) -> int:
    """Return in how many chunks of ``CHUNK_SIZE`` samples are sorted; 0 if another way."""
    if FEW_SAMPLES < n <= CHUNKED_SAMPLES and k < CHUNK_SIZE:
        return divided(n, CHUNK_SIZE)
    return 0


def label_chunks(n: int, k: int) -> tuple[int, int]:
    """Return how many samples a chunk of the counting sort holds, and how many chunks there are.

    Labels out of range are one label more.
    """
    most_chunks = max(1, SORT_TABLE // (k + 1))
    chunk = max(SORT_CHUNK, divided(divided(n, most_chunks), SORT_BLOCK) * SORT_BLOCK)
    return chunk, divided(n, chunk)


def score_tile(n: int, k: int, itemsize: int, budget: int) -> tuple[int, int]:
    """Return how many samples and true classes one tile of the c-model's scores spans.

    All classes where that leaves enough samples: the posterior of a sample needs the scores of all
    classes, and these are then still there for the gradient. Otherwise all samples where the
    scores of one class fit the budget: every tile is then computed once for the loss and, but for
    one, once more for the gradient. A tile holds one row of scores at least.
    """
    n_rows = max(1, budget // (k * itemsize))
    n_samples = n_rows // k  # with all classes
    if n_samples >= n:
        return n, k
    if n_samples * 4 >= SCORE_SAMPLES * itemsize:
        # Spans of much the same size, in full warps of samples.
        n_spans = divided(n, n_samples // 32 * 32)
        return divided(divided(n, n_spans), 32) * 32, k
    return (n, min(k, n_rows // n)) if n_rows >= n else (n_rows, 1)


def spans(size: int, part: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each part."""
    for first in range(0, size, part):
        yield first, min(size, first + part)
