"""Test accuracy of every method against noise, data and seed: the paper's Figures 2 to 4.

Each cell of the grid trains one method on noisy labels and scores it on clean test labels. Cells
are kept one by one in the folder --out: stop a run whenever you like and give the same command
again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import kernels
import nalayer
from benchmarks import records
from benchmarks.cells import Cell, CellError, Finished, Store
from benchmarks.machine import n_cores
from benchmarks.methods import METHODS, OPTIONAL_SETTINGS, ORIGINS, Task, cell_of, run_cell
from benchmarks.placement import CUPY, require_place, with_device
from benchmarks.records import Row
from benchmarks.summaries import summary_table
from nalayer import stream
from nalayer.datasets import LOADERS, load_dataset
from nalayer.label_noise import KINDS

ALL_NOISE = (0.3, 0.36, 0.38, 0.4, 0.42, 0.44, 0.46, 0.47, 0.475, 0.48, 0.485, 0.49, 0.495, 0.5)
FREE = {
    "dataset": "digits",
    "network": "mlp",
    "methods": ["baseline", "reed-soft", "reed-hard", "s", "c", "em-s", "oracle"],
    "noise": [0.3, 0.4, 0.46],
    "fractions": [1.0],
    "seeds": 3,
}
PAPER = {"noise": list(ALL_NOISE), "fractions": [0.2, 0.5, 1.0], "seeds": 5}
CIFAR = PAPER | {"dataset": "cifar100", "network": "cnn"}
FIGURES: dict[int, dict[str, Any]] = {
    2: PAPER | {"dataset": "mnist", "network": "mlp", "methods": FREE["methods"]},
    3: CIFAR | {"methods": ["baseline", "reed-soft", "reed-hard", "s", "c"]},
    4: CIFAR | {"methods": ["s", "c", "sparse-s", "sparse-c"]},
}
# The authors' protocol, and for the small digits one that gives them as many steps.
PROTOCOLS = {
    "digits": {"epochs": 200, "batch_size": 64},
    "mnist": {"epochs": 40, "batch_size": 256},
    "cifar100": {"epochs": 40, "batch_size": 256},
}
PATIENCE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""

    def option(name: str, help: str, **details: Any) -> None:
        parser.add_argument(name, help=help, **details)

    unset = argparse.SUPPRESS
    option(
        "--figure",
        "take data set, network, methods, noise, fractions and seeds from this figure of the "
        "paper; options given beside it stand",
        type=int,
        choices=sorted(FIGURES),
    )
    option("--dataset", "data to learn from", choices=sorted(LOADERS), default=unset)
    option("--network", "the paper's network", choices=("mlp", "cnn"), default=unset)
    option("--methods", "methods to compare", nargs="+", choices=list(METHODS), default=unset)
    option("--noise", "shares of changed labels", nargs="+", type=float, default=unset)
    option("--fractions", "shares of the training data", nargs="+", type=float, default=unset)
    option("--seeds", "run seeds 0 to N-1", type=int, metavar="N", default=unset)
    option("--noise-kind", "where changed labels go", choices=KINDS, default="permutation")
    option("--epochs", "at most so many epochs or rounds", type=int, default=unset)
    option("--batch-size", "samples of a mini-batch", type=int, default=unset)
    option("--patience", "epochs without improvement before stopping", type=int, default=PATIENCE)
    option("--inner-epochs", "epochs of EM's network M-step", type=int, default=5, metavar="S")
    option("--n-kept", "links per class of the sparse models", type=int, default=5, metavar="L")
    option(
        "--missing",
        "share of labels that 'labelled-only' and 'entropy' do without",
        type=float,
        default=0.5,
    )
    add_run_options(parser, "accuracy-output")


def add_run_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Declare how and where the cells are run, the same for all grids."""

    def option(name: str, help: str, **details: Any) -> None:
        parser.add_argument(name, help=help, **details)

    option("--backend", "kernels to use", choices=sorted(kernels.BACKENDS), default="numba")
    option("--dtype", "of features and weights", choices=("float32", "float64"), default="float32")
    option("--jobs", "cells at a time (None: one for each core, or for the GPU)", type=int)
    option("--threads", "threads of a cell", type=int, default=1)
    option("--dask", "run the cells on this Dask cluster", metavar="ADDRESS")
    option("--out", "folder that keeps finished cells", type=Path, default=Path(out))
    option("--json", "write the table here as well", type=Path, metavar="FILE")


def fill_in(options: argparse.Namespace) -> None:
    """Complete the options from the figure asked for, or from the free choice's defaults."""
    defaults = FIGURES.get(options.figure, FREE)
    for name, value in defaults.items():
        vars(options).setdefault(name, value)
    for name in ("methods", "noise", "fractions"):  # each once, or its cells would count twice
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    for name, value in PROTOCOLS[options.dataset].items():
        vars(options).setdefault(name, value)


def check_numbers(
    options: argparse.Namespace, parser: argparse.ArgumentParser, more: Sequence[str]
) -> None:
    """Refuse numbers that cannot work: those that every grid has, and ``more``."""
    for name in ("seeds", "inner_epochs", "threads", *more):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.patience < 0 or (options.jobs is not None and options.jobs < 1):
        parser.error("--patience must be at least 0 and --jobs at least 1")


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options that cannot work, before anything runs."""
    check_numbers(options, parser, ("epochs", "batch_size", "n_kept"))
    for fraction in options.fractions:
        if not 0 < fraction <= 1:
            parser.error(f"--fractions must lie in (0, 1]; found {fraction}")
    if not 0 <= options.missing < 1:
        parser.error(f"--missing must lie in [0, 1); found {options.missing}")
    try:
        data = load_dataset(options.dataset, np.dtype(options.dtype))
        for noise in options.noise:
            nalayer.make_noise_matrix(
                options.noise_kind, data.n_classes, noise, stream(0, "label noise")
            )
        if options.network == "cnn":
            nalayer.cnn(data.image_shape, data.n_classes)
        for cell in {cell.fraction: cell for cell in grid(options)}.values():
            Task(cell)  # too few samples of a class to split, for instance
        if options.n_kept > data.n_classes:
            parser.error(f"--n-kept must be at most {data.n_classes}; found {options.n_kept}")
        if options.json:
            records.require_writable(options.json)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def grid(options: argparse.Namespace) -> list[Cell]:
    """Return the cells asked for, in the order of the table."""
    return [
        cell_of(
            Cell(
                dataset=options.dataset,
                network=options.network,
                method=method,
                noise=noise,
                noise_kind=options.noise_kind,
                fraction=fraction,
                seed=seed,
                epochs=options.epochs,
                patience=options.patience,
                batch_size=options.batch_size,
                dtype=options.dtype,
                backend=options.backend,
                threads=options.threads,
                **{name: getattr(options, name, None) for name in OPTIONAL_SETTINGS},
            ),
            method,
        )
        for fraction in options.fractions
        for noise in options.noise
        for method in options.methods
        for seed in range(options.seeds)
    ]


def origin_of(cell: Cell) -> Cell | None:
    """Return the cell that this one starts from; None for a fresh network."""
    origin = METHODS[cell.method].starts_from
    return None if origin is None else cell_of(cell, origin)


def waves(cells: list[Cell]) -> list[list[Cell]]:
    """Return the cells and all that they start from, in waves that need only earlier waves."""
    depths: dict[Cell, int] = {}

    def depth(cell: Cell) -> int:
        if cell not in depths:
            origin = origin_of(cell)
            depths[cell] = 0 if origin is None else depth(origin) + 1
        return depths[cell]

    for cell in cells:
        depth(cell)
    found: dict[int, list[Cell]] = defaultdict(list)
    for cell, number in depths.items():
        found[number].append(cell)
    return [found[number] for number in sorted(found)]


def _attempt(
    cell: Cell, start: dict[str, np.ndarray], command: str
) -> tuple[Cell, Finished | None, str]:
    """Run a cell where it has been sent; hand back its result or the text of what went wrong."""
    try:
        with threadpool_limits(cell.threads):
            finished = run_cell(cell, start, keep_parameters=cell.method in ORIGINS)
    except Exception:
        return cell, None, traceback.format_exc()
    backend = cell.backend or kernels.api.DEFAULT_BACKEND
    base = records.provenance("accuracy", command, backend, cell.threads, cell.threads)
    return cell, Finished(with_device(base) | finished.row, finished.arrays), ""


def _n_jobs(options: argparse.Namespace) -> int:
    """Return how many cells run here at a time."""
    if options.backend == CUPY:
        return 1  # in this process: there is one GPU
    return options.jobs or max(1, n_cores() // options.threads)


@contextlib.contextmanager
def _pool(options: argparse.Namespace) -> Iterator[joblib.Parallel]:
    """Yield what runs cells in parallel: local processes, or somebody's Dask cluster."""
    n_jobs = _n_jobs(options)
    with contextlib.ExitStack() as stack:
        if options.dask:
            from distributed import Client

            client = stack.enter_context(Client(options.dask, timeout="30s"))
            _check_workers(client.scheduler_info(n_workers=-1)["workers"])
            config: dict[str, Any] = {"backend": "dask"}
            n_jobs = options.jobs or -1
        else:
            # One process a cell, and no more threads in it than were asked for.
            config = {"backend": "loky", "inner_max_num_threads": options.threads}
        stack.enter_context(joblib.parallel_config(n_jobs=n_jobs, **config))
        # One cell a task: what is finished comes back, and is kept, at once.
        yield joblib.Parallel(
            return_as="generator_unordered", pre_dispatch="n_jobs + 1", batch_size=1
        )


def _check_workers(workers: dict[str, Any]) -> None:
    """Refuse a cluster that cannot run cells."""
    if not workers:
        raise CellError("the Dask cluster has no workers; start some: dask worker ADDRESS")
    threads = max(worker["nthreads"] for worker in workers.values())
    if threads > 1:
        raise CellError(
            f"a Dask worker runs {threads} cells at a time in one process, whose threads would get "
            "in each other's way; start workers with --nthreads 1"
        )


def run_grid(
    cells: list[Cell], store: Store, options: argparse.Namespace, bar: tqdm
) -> dict[Cell, str]:
    """Run what is not finished yet, keeping each cell as it comes; return what failed, and why."""
    failed: dict[Cell, str] = {}
    with _pool(options) as parallel:
        for wave in waves(cells):
            pending = []
            for cell in wave:
                if store.has(cell):
                    continue
                if origin_of(cell) in failed:
                    failed[cell] = f"not run: {METHODS[cell.method].starts_from} failed"
                else:
                    pending.append(cell)
            pending.sort(key=_expected_work, reverse=True)  # the long ones first: no long tail
            for cell, finished, trouble in _results(parallel, store, pending, options.command):
                if finished is None:
                    failed[cell] = trouble
                    bar.write(f"{cell.name} failed:\n{trouble}", file=sys.stderr)
                else:
                    store.save(cell, finished)
                bar.update()
    return failed


def _results(
    parallel: joblib.Parallel, store: Store, cells: list[Cell], command: str
) -> Iterator[tuple[Cell, Finished | None, str]]:
    """Yield what comes of the cells, in the order they end."""
    jobs = (joblib.delayed(_attempt)(cell, _start(store, cell), command) for cell in cells)
    try:
        yield from parallel(jobs)
    except CellError:
        raise
    except Exception as error:  # what a lost process or cluster raises differs from pool to pool
        raise CellError(
            f"what ran the cells is gone ({type(error).__name__}: {error}). Finished cells are in "
            f"{store.folder}; give the same command again, with fewer --jobs if memory ran out"
        ) from error


def _start(store: Store, cell: Cell) -> dict[str, np.ndarray]:
    """Return what the method that a cell starts from kept."""
    origin = origin_of(cell)
    return {} if origin is None else store.load(origin).arrays


def _expected_work(cell: Cell) -> float:
    """Return how long a cell takes at most, in epochs of the whole training set."""
    return cell.fraction * cell.epochs * (1 + (cell.inner_epochs or 0))


def seconds_per_epoch(cell: Cell) -> float:
    """Measure a few mini-batches of the s-model; return the seconds of an epoch over all data."""
    task = Task(cell)
    x, z = task.x[: 4 * cell.batch_size], task.z[: 4 * cell.batch_size]
    model, weights = nalayer.SModel(task.network, backend=cell.backend), task.initial_weights()
    start = model.pack(weights, nalayer.uniform_start(task.data.n_classes, 0.1, weights.dtype.type))
    kernels.limit_threads(cell.threads)
    with threadpool_limits(cell.threads):
        for _ in range(2):  # the first time compiles the kernels or reads them from the disk
            started = time.perf_counter()
            nalayer.train(
                model,
                *task.there(start, x, z),
                n_epochs=1,
                batch_size=cell.batch_size,
                shuffling=stream(0, "shuffling"),
                dropout=stream(0, "dropout"),
            )
            seconds = time.perf_counter() - started
    return seconds * len(task.data.x_train) / len(x)


def _announce(cells: list[Cell], store: Store, options: argparse.Namespace, name: str) -> int:
    """Say how many cells there are and how long they will take; return how many are to be run.

    Finished cells are read, so that a damaged one is told of now and not after hours.
    """
    everything = [cell for wave in waves(cells) for cell in wave]
    for cell in everything:
        if store.has(cell):
            store.load(cell)
    todo = [cell for cell in everything if not store.has(cell)]
    extra = len(everything) - len(cells)
    print(
        f"nalayer {name}: {len(cells)} cells"
        + (f" and {extra} that they start from" if extra else "")
        + f", {len(everything) - len(todo)} of them finished before ({store.folder}).",
        flush=True,
    )
    if todo:
        n_jobs = _n_jobs(options)
        most = sum(_expected_work(cell) for cell in todo) * seconds_per_epoch(todo[0]) / n_jobs
        where = "the GPU" if options.backend == CUPY else f"{n_jobs} processes"
        where = f"the cluster at {options.dask}" if options.dask else where
        print(
            f"{len(todo)} to run: about {most / 60:.0f} min on {n_jobs} of these cores if none "
            f"stops early, usually a third of that; c-models of many classes take longer. Running "
            f"on {where}.",
            flush=True,
        )
    return len(todo)


def table(cells: list[Cell], store: Store) -> list[Row]:
    """Return the rows of all finished cells asked for, in the grid's order."""
    return [store.load(cell).row for cell in cells if store.has(cell)]


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the grid; return 0 if every cell has a result, else 1."""
    fill_in(options)
    _check(options, parser)
    rows, status = run_cells(grid(options), options, parser, "accuracy")
    if rows:
        print("\nClean-test accuracy, mean over seeds and 95 % bootstrap interval of the mean\n")
        print("\n".join(summary_table(rows)))
    return status


def run_cells(
    cells: list[Cell], options: argparse.Namespace, parser: argparse.ArgumentParser, name: str
) -> tuple[list[Row], int]:
    """Run a grid's cells that are not finished yet; return all rows, and 0 if none failed, else 1.

    The rows are written to ``name``.jsonl in the folder --out, and where --json says.
    """
    if options.dask:
        try:
            import distributed  # noqa: F401
        except ImportError:
            parser.error("--dask needs the package distributed: pip install 'nalayer[dask]'")
        if "://" not in options.dask:
            parser.error(f"--dask must look like tcp://host:8786; found {options.dask!r}")
    if options.backend == CUPY and options.jobs not in (None, 1):
        parser.error("--jobs must be 1 with --backend cupy: cells share one GPU")
    try:
        if not options.dask:
            require_place(options.backend)
    except ValueError as error:
        parser.error(str(error))
    try:
        store = Store(options.out / "cells")
        n_todo = _announce(cells, store, options, name)
        with tqdm(total=n_todo, disable=None, leave=False, unit="cell") as bar:
            failed = run_grid(cells, store, options, bar)
        rows = [row | {"benchmark": name} for row in table(cells, store)]
        table_path = options.out / f"{name}.jsonl"
        for path in [table_path] + ([options.json] if options.json else []):
            records.write_rows(path, rows)
    except (CellError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return [], 1
    except KeyboardInterrupt:
        print(
            f"\nStopped. Finished cells are in {options.out / 'cells'}; the same command goes on "
            "from there.",
            file=sys.stderr,
        )
        raise
    print(f"\nRows: {table_path}")
    if failed:
        print(f"{len(failed)} cells failed; the same command tries them again.", file=sys.stderr)
    return rows, 1 if failed else 0
