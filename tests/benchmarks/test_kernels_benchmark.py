"""`kernels`, `step` and `performance` end to end on tiny sizes, and what they are made of."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import (
    kernel_cases,
    peers,
    performance,
    records,
    step,
    step_arms,
    step_layers,
    timing,
)
from benchmarks import kernels as benchmark
from benchmarks.worker import relative_error

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--quick", "--no-peers", "--backend", "numpy"]
PROVENANCE = {
    "benchmark",
    "command",
    "commit",
    "date",
    "machine",
    "device",
    "backend",
    "threads",
    "versions",
    "blas",
    "load_average",
}
TIMING = {
    "arm",
    "status",
    "median_ms",
    "ratio_to_us",
    "ratio_to_us_low",
    "ratio_to_us_high",
    "first_call_ms",
    "peak_extra_bytes",
}
COST = {"bytes_moved", "flops", "share_of_copy_bandwidth", "share_of_gemm_rate"}


def test_the_kernels_command(tmp_path, capsys):
    wanted = ["--kernel", "sparse_s_model", "--kernel", "c_model"]
    assert command.main(["kernels", *QUICK, *wanted, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "c_model 32x6x10 float32" in printed
    assert "own time ~ k^a" in printed

    rows = records.read_rows(tmp_path / "kernels.jsonl")
    assert all(row.keys() >= PROVENANCE for row in rows)
    timed = [row for row in rows if "kernel" in row]
    assert {row["arm"] for row in timed} == {
        "nalayer numpy",
        kernel_cases.DENSE,
        kernel_cases.SOFTMAX,
    }
    assert all(row["status"] == "timed" for row in timed)
    assert all(row.keys() >= TIMING | COST | {"size", "n", "k", "d", "n_kept"} for row in timed)
    assert all(isinstance(row["ratio_to_us"], float) for row in timed)
    assert {row["machine_rate"] for row in rows if "machine_rate" in row} == {"copy", "gemm"}
    (fitted,) = [row for row in rows if "exponent" in row]
    assert fitted.keys() >= {"arm", "exponent", "low", "high", "k_from", "k_to"}

    assert command.main(["figures", str(tmp_path / "kernels.jsonl"), str(tmp_path / "k.svg")]) == 0
    block = "\n".join(performance.performance_block(rows))
    assert "| `c_model` | 32x6x10 | float32 |" in block


@pytest.fixture(scope="module")
def step_rows(tmp_path_factory):
    """Rows of a step of both networks and of the CNN's layers."""
    path = tmp_path_factory.mktemp("step") / "rows"
    units = ["--unit", "step", "--unit", "layer"]
    assert command.main(["step", *QUICK, *units, "--json", str(path)]) == 0
    return records.read_rows(path)


def test_the_step_command(step_rows):
    rows = [row for row in step_rows if "step" in row]
    assert [(row["step"], row["arm"]) for row in rows] == [
        ("step", "nalayer numpy"),
        ("step", "nalayer numpy, s-model on top"),
        ("step", "GEMMs alone, numpy"),
        ("step", "nalayer numpy"),
    ]
    assert [row["size"] for row in rows] == ["20-12-8-10"] * 3 + ["CNN 12x12x1-3"]
    assert all(row.keys() >= PROVENANCE | TIMING | {"batch_size", "gemm_share"} for row in rows)
    assert all(row["status"] == "timed" for row in rows)
    assert "  GEMMs alone, numpy " in "\n".join(performance.case_table(rows[:3]))
    assert "| 20-12-8-10 | step | nalayer numpy |" in "\n".join(performance.performance_block(rows))


def test_the_step_command_times_every_layer_of_the_cnn(step_rows):
    rows = [row for row in step_rows if "layer" in row]
    assert all(row.keys() >= PROVENANCE | TIMING | {"gigaflops", "gemm_share"} for row in rows)
    assert all(row["status"] == "timed" for row in rows)
    assert [row["arm"] for row in rows] == ["nalayer numpy", "GEMMs alone, numpy"] * 12
    assert [row["layer"] for row in rows[::4]] == [
        "1: conv 12x12x1-32",
        "2: conv 10x10x32-32, pool 2",
        "3: conv 4x4x32-64",
        "4: conv 4x4x64-64, pool 2",
        "5: dense 64-512",
        "6: dense 512-3",
    ]
    # 16 images of 10 x 10 places, 3 x 3 x 1 numbers each, 32 filters; backward twice, but for the
    # first layer, whose inputs need no gradient.
    first = 2 * 16 * 100 * 9 * 32
    assert [row["gemm_flops"] for row in rows[:4:2]] == [first, first]
    second = 2 * 16 * 64 * 288 * 32
    assert [row["gemm_flops"] for row in rows[4:8:2]] == [second, 2 * second]
    assert rows[0]["gigaflops"] == pytest.approx(first / rows[0]["median_ms"] / 1e6)
    name = "1: conv 12x12x1-32, forward, CNN 12x12x1-3 float32"
    assert performance.case_table(rows[:2])[0].strip() == name
    table = performance.layers_markdown(rows)
    assert len(table) == 2 + 12
    assert table[2].startswith("| CNN 12x12x1-3 | 1: conv 12x12x1-32 | forward | ")
    assert "\n".join(table) in "\n".join(performance.performance_block(rows))


def test_layers_of_torch_and_ours_agree_with_float64(tmp_path):
    """In one worker, so that pytest stays clear of torch."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    (problem,) = step.cnn_problems(True, 64)
    cases = [dataclasses.asdict(case) for case in step_layers.cases_of(problem)]
    arm = timing.Arm("torch", "tests.benchmarks.arms:every_layer", {"cases": cases})
    worker = timing.Worker(arm, tmp_path, timing.Settings(timeout_seconds=100))
    try:
        found = worker.ask("results")
    finally:
        worker.close()
    truth = [step_layers.build_reference(case).results() for case in cases]
    for case, exact, theirs in zip(cases, truth, found, strict=True):
        ours = step_layers.build_ours(case, "numpy").results()
        assert relative_error(ours, exact) <= timing.tolerance(np.float32), case
        for results in theirs:
            assert relative_error(results, exact) <= timing.tolerance(np.float32), case


@pytest.mark.parametrize("noise_layer", [False, True])
def test_our_step_and_epoch_agree_with_float64(noise_layer):
    problem = dataclasses.asdict(step_arms.Problem((20, 12, 8, 10), n_samples=64, batch_size=16))
    truth = step_arms.build_reference(problem, noise_layer).results()
    for unit in ("step", "epoch"):
        work = step_arms.build_ours(problem, unit, "numpy", noise_layer)
        work.call()
        assert relative_error(work.results(), truth) <= timing.tolerance(np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["kernels", "--size", "256"], "size of softmax_nll must be NxK"),
        (["kernels", "--kernel", "c_model", "--size", "4x4"], "must be NxDxK"),
        (["kernels", "--kernel", "s_model", "--size", "4x1"], "K of at least 2; found '4x1'"),
        (["kernels", "--rounds", "0"], "--rounds must be positive; found 0"),
        (["step", "--budget", "inf"], "--budget must be positive; found inf"),
        (["step", "--samples", "10"], "--samples must be at least 256; found 10"),
        (["step", "--unit", "layer", "--network", "mlp"], "nothing to time: layers are those"),
        (["kernels", "--json", "/"], "cannot write to /"),
        (["performance", "/no/such/rows"], "No such file"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_our_arms_agree_with_their_reference(kernel):
    case = kernel_cases.case(kernel, benchmark.QUICK[kernel][0])
    references = kernel_cases.references(case)
    for arm in kernel_cases.our_arms(case, "numpy"):
        build, truth = (
            getattr(kernel_cases, one.build.partition(":")[2])(**one.arguments)
            for one in (arm, references[arm.reference])
        )
        found, exact = build.results(), truth.results()
        assert relative_error(found, exact) <= timing.tolerance(np.float32)


def test_a_wrong_kernel_makes_the_exit_status_1(capsys):
    rows = [{"arm": "nalayer numpy", "status": "wrong", "detail": "relative error 1"}]
    assert benchmark.exit_status(rows) == 1
    assert "nalayer numpy: wrong" in capsys.readouterr().err
    assert benchmark.exit_status([{"arm": "torch, naive", "status": "died"}]) == 0


def test_peers_that_are_missing_are_said(monkeypatch):
    monkeypatch.setattr(peers, "is_installed", lambda library: False)
    for kernel in kernel_cases.KERNELS:
        arms = peers.peer_arms(kernel_cases.case(kernel, benchmark.QUICK[kernel][0]))
        assert {arm.skip for arm in arms} == {"missing", "does not apply"}
        assert {arm.backend for arm in arms} == {"torch", "jax"}


def test_what_does_not_fit_into_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(kernel_cases, "available_bytes", lambda: 2**20)
    case = kernel_cases.case("sparse_s_model", "8x10000")
    dense = next(arm for arm in kernel_cases.our_arms(case, "numpy") if "dense" in arm.name)
    assert (dense.skip, dense.detail) == ("not run", "would need about 1 GiB")


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_every_form_of_a_peer_agrees(library, tmp_path):
    """In one worker per library, so that pytest stays clear of both."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    cases = [
        dataclasses.asdict(kernel_cases.case(kernel, benchmark.QUICK[kernel][0]))
        for kernel in kernel_cases.KERNELS
    ]
    given = {"cases": cases, "library": library}
    settings = timing.Settings(timeout_seconds=100)
    worker = timing.Worker(
        timing.Arm(library, "tests.benchmarks.arms:every_form", given), tmp_path, settings
    )
    try:
        found = worker.ask("results")
    finally:
        worker.close()
    truth = {case["kernel"]: kernel_cases.build_reference(case).results() for case in cases}
    assert {kernel for kernel, _ in found} == set(kernel_cases.KERNELS)
    for (kernel, form), results in found.items():
        assert relative_error(results, truth[kernel]) <= timing.tolerance(np.float32), form


def test_the_exponent_is_that_of_the_times():
    rng = np.random.default_rng(0)
    times = {k: 1e-6 * k**0.4 * rng.uniform(0.9, 1.1, 15) for k in (100, 1000, 10_000)}
    exponent, low, high = benchmark.fitted_exponent(times, rng)
    assert low <= exponent <= high
    assert abs(exponent - 0.4) <= 0.05
    lost = benchmark.fitted_exponent({10: np.full(3, -1.0), 100: np.ones(3)}, rng)
    assert np.isnan(lost).all()


def test_work_and_traffic_by_hand():
    s = kernel_cases.case("s_model", "4x3")
    assert kernel_cases.bytes_moved(s) == 4 * (2 * 12 + 2 * 9) + 8 * 4
    c = kernel_cases.case("c_model", "4x5x3")
    assert kernel_cases.flops(c) == 3 * (2 * 4 * 3 * 3 * 5)
    assert step_arms.gemm_shapes(step_arms.Problem(sizes=(7, 5, 3), batch_size=2)) == [
        (2, 7, 5),
        (7, 2, 5),
        (2, 5, 3),
        (5, 2, 3),
        (2, 3, 5),
    ]


def test_supports_have_the_diagonal_and_no_link_twice():
    for k, n_kept in ((5, 5), (50, 5), (3, 1)):
        support = kernel_cases.random_support(k, n_kept, np.random.default_rng(0))
        assert (support[:, 0] == np.arange(k)).all()
        assert all(len(set(row)) == n_kept for row in support.tolist())


def test_padded_links_are_the_links_of_every_label():
    support = kernel_cases.random_support(20, 4, np.random.default_rng(1))
    links, present = peers.padded_links(support)
    for j in range(20):
        assert links[j, present[j]].tolist() == np.flatnonzero(support.ravel() == j).tolist()


# --- the README ---------------------------------------------------------------------------------


def test_the_readme_quotes_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    rows = performance.committed_rows()
    assert performance.with_block(readme, performance.performance_block(rows)) == readme


def test_the_block_is_replaced_and_nothing_else(tmp_path, capsys):
    path = tmp_path / "text.md"
    path.write_text(f"before\n{performance.BEGIN}\nold\n{performance.END}\nafter\n")
    (tmp_path / "rows").write_text("")
    assert command.main(["performance", str(tmp_path / "rows"), "--write", str(path)]) == 0
    assert path.read_text() == (
        f"before\n{performance.BEGIN}\n{performance.NO_RESULTS}\n{performance.END}\nafter\n"
    )
    assert performance.NO_RESULTS in capsys.readouterr().out
    with pytest.raises(ValueError, match="once each"):
        performance.with_block("no markers", [])


def test_a_crash_is_in_the_block_and_takes_no_ratio():
    fields = {"size": "4x3", "dtype": "float32", "kernel": "s_model", "n_kept": None}
    ratio = dict.fromkeys(("ratio_to_us", "ratio_to_us_low", "ratio_to_us_high"))
    base = fields | dict.fromkeys(("machine", "versions", "blas", "date", "commit"), "x")
    rows = [
        base
        | {"arm": "nalayer numba", "ours": True, "status": "timed", "detail": "", "median_ms": 0.5}
        | dict.fromkeys(ratio, 1.0)
        | {"peak_extra_bytes": 2**20},
        base
        | {"arm": "torch, column", "ours": False, "status": "timed", "detail": "", "median_ms": 2.0}
        | {"ratio_to_us": 4.0, "ratio_to_us_low": 3.5, "ratio_to_us_high": 4.5},
        base
        | {"arm": "torch.compile, column", "ours": False, "status": "died", "median_ms": None}
        | {"detail": "at 'error', SIGABRT: corrupted list"}
        | ratio,
    ]
    block = performance.performance_block(rows)
    disturbed = performance.performance_block([{**rows[0], "busy_elsewhere": 0.5}])
    assert "other programs kept up to 0.5 cores busy" in "\n".join(disturbed)
    row = "| `s_model` | 4x3 | float32 | 0.5 ms | 1.0 | torch, column | 4.00 [3.50, 4.50] | - |"
    assert row in block
    assert "- torch.compile, column, `s_model` at 4x3: died at 'error', SIGABRT" in block
