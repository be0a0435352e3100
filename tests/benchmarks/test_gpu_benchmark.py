"""What the benchmarks do on a GPU: the clocks, the arms, shared processes, the deadline, tables."""

import dataclasses
import importlib.util
import time
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import (
    devices,
    gpu_tables,
    kernel_cases,
    peers,
    performance,
    records,
    scaling,
    step,
    step_arms,
    step_peers,
    timing,
)
from benchmarks import kernels as benchmark
from benchmarks.kernel_cases import Case
from benchmarks.timing import Arm, Pool, Settings
from benchmarks.worker import REQUESTS, relative_error
from tests.benchmarks.arms import StubClock

SETTINGS = Settings(rounds=3, block_seconds=0.001, budget_seconds=1, timeout_seconds=60)
TOLERANCE = timing.tolerance(np.float32)
CASE = Case("c_model", 30, 7, 5)
MLP = step_arms.Problem((20, 12, 8, 10), n_samples=64, batch_size=16)
CNN = step_arms.Problem((144, 3), (12, 12, 1), n_samples=32, batch_size=16)


# --- the clocks -----------------------------------------------------------------------------------


class FakeDevice(devices.EventClock):
    """A device on which a launch takes the host 1 ms and the device 3 ms, of which 8 are queued."""

    def __init__(self):
        self.host = self.free = 0.0

    def mark(self):
        return max(self.host, self.free)

    def milliseconds(self, first, second):
        return second - first

    def hold(self, milliseconds):
        self.free = max(self.host, self.free) + milliseconds

    def wait(self, result=None):
        self.host = self.free = max(self.host, self.free)


def launching(device, host_ms, device_ms):
    def call():
        device.host += host_ms
        device.free = max(device.host, device.free) + device_ms

    return call


def test_a_loop_of_calls_takes_what_is_slower_and_the_queue_only_the_device():
    device = FakeDevice()
    bound_by_launches = launching(device, 3.0, 1.0)
    assert device.seconds(bound_by_launches, 5) == pytest.approx(3e-3)
    assert device.queued_seconds(bound_by_launches, 3e-3) == pytest.approx(1e-3)
    bound_by_work = launching(device, 1.0, 3.0)
    assert device.seconds(bound_by_work, 5) == pytest.approx(3e-3)
    assert device.queued_seconds(bound_by_work, 3e-3) == pytest.approx(3e-3)
    assert device.queued_seconds(bound_by_work, 1.0) is None


def test_cupy_is_timed_by_its_events_and_weighed_by_a_pool(device):
    clock = devices.CupyClock()
    a = device.ones(2**20, dtype=np.float32)
    assert 0 < clock.seconds(lambda: a + a, 5) < 1
    assert 0 < clock.queued_seconds(lambda: a + a, 1e-4) < 1
    assert clock.peak_bytes(lambda: (a + a).sum()) >= a.nbytes
    assert clock.used_bytes() >= a.nbytes


def test_large_results_are_compared_in_part_and_no_column_is_left_out(monkeypatch):
    monkeypatch.setattr(devices, "COMPARED", 1000)
    large = np.arange(6000).reshape(600, 10)
    part = devices.compared(large)
    assert part.size <= 1000
    assert set(part % 10) == set(range(10))
    assert devices.compared(large[:100]) is not None
    assert devices.compared(np.float32(3)) == 3


def test_an_array_is_moved_once():
    moved = []
    put = devices.Put(lambda array: moved.append(array) or array + 1)
    a = np.zeros(2)
    assert put(a) is put(a)
    assert put(np.zeros(2)) is not put(a)
    assert len(moved) == 2


# --- the arms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_peers_on_a_device_agree_with_the_reference(library, tmp_path):
    """Other sets of inputs, parts of a batch, batches picked from all over: not so on the CPU."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    problems = [dataclasses.asdict(problem) for problem in (MLP, CNN)]
    given = {"case": dataclasses.asdict(CASE), "problems": problems, "library": library}
    arm = Arm(library, "tests.benchmarks.arms:peers_as_on_a_gpu", given)
    worker = timing.Worker(arm, tmp_path, Settings(timeout_seconds=200))
    try:
        worker.ask("first call")
        kernel, *steps = worker.ask("results")
    finally:
        worker.close()
    exact = kernel_cases.build_reference(given["case"]).results()
    assert relative_error(kernel, exact) <= TOLERANCE
    for problem, found in zip(problems, steps, strict=True):
        assert relative_error(found, step_arms.build_reference(problem).results()) <= TOLERANCE


@pytest.fixture
def stub_clock(monkeypatch):
    monkeypatch.setattr(devices, "_clock", lambda library: StubClock())
    monkeypatch.setattr(
        devices, "device_facts", lambda: {"device": "stub", "memory": 2**36, "versions": "stub"}
    )


@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_our_kernels_take_arrays_on_the_gpu(cupy, stub_clock, kernel):
    case = kernel_cases.case(kernel, "6x5x4" if kernel.endswith("c_model") else "6x4")
    for arm in kernel_cases.our_arms(case, "cupy"):
        reference = kernel_cases.references(case, devices.CUDA)[arm.reference]
        build, truth = (
            getattr(kernel_cases, one.build.partition(":")[2])(**one.arguments)
            for one in (arm, reference)
        )
        assert build.clock.seconds(build.call, 5) == 1e-3
        assert relative_error(build.results(), truth.results()) <= TOLERANCE


def test_a_large_reference_is_worked_out_on_the_gpu(cupy, stub_clock, monkeypatch):
    monkeypatch.setattr(kernel_cases, "MOST_ON_THE_CPU", 10)
    case = dataclasses.asdict(Case("s_model", 6, 4))
    found = kernel_cases.build_reference(case, devices.CUDA)
    assert found.clock is not None
    exact = kernel_cases.build_reference(case).results()
    assert relative_error(found.results(), exact) <= timing.tolerance(np.float64)


@pytest.mark.parametrize("noise_layer", [False, True])
def test_our_step_and_epoch_take_arrays_on_the_gpu(cupy, stub_clock, noise_layer):
    problem = dataclasses.asdict(MLP)
    truth = step_arms.build_reference(problem, noise_layer).results()
    for unit in ("step", "epoch"):
        work = step_arms.build_ours(problem, unit, "cupy", noise_layer)
        assert work.clock.seconds(work.call, 1) == 1e-3
        assert relative_error(work.results(), truth) <= TOLERANCE
    in_epoch = step_arms.build_ours(problem, "step", "cupy", noise_layer, in_epoch=True)
    n_steps = MLP.n_samples // MLP.batch_size
    assert REQUESTS["time"](in_epoch, 1) == pytest.approx(1e-3 / n_steps)
    assert relative_error(in_epoch.results(), truth) <= TOLERANCE


def test_what_is_too_large_for_the_gpu_is_done_in_parts_or_not_run(stub_clock, monkeypatch):
    monkeypatch.setattr(peers, "is_installed", lambda library: True)
    case = kernel_cases.case("c_model", "4096x512x1000")
    arms = {arm.name: arm for arm in peers.peer_arms(case, devices.CUDA)}
    assert arms["torch, naive"].skip == "not run"
    assert "GiB" in arms["torch, naive"].detail
    in_parts = arms["torch, flat, in 8 parts"]
    assert not in_parts.skip
    assert in_parts.arguments["parts"] == 8
    assert arms["jax.jit, flat"].skip == "not run"
    assert in_parts.process != arms["torch.compile, flat, in 8 parts"].process


def test_torch_compile_is_asked_for_networks_only_where_there_is_time(monkeypatch):
    monkeypatch.setattr(step_peers, "is_installed", lambda library: True)
    for problem in (MLP, step.cnn_problems(True, 64)[0]):
        asked = [step_arms.arms_of(problem, "step", "cupy", True, also) for also in (True, False)]
        names = [{arm.name for arm in arms} for arms in asked]
        left_out = names[0] - names[1]
        assert left_out
        assert all(name.startswith("torch.compile") for name in left_out)
        assert not any(name.startswith("torch.compile") for name in names[1])


def test_sets_of_inputs_differ_in_their_samples_only():
    sets = kernel_cases.input_sets(CASE, devices.CUDA)
    assert len(sets) == kernel_cases.N_SETS
    for name in ("logits", "noisy_labels", "hidden"):
        assert not any((one[name] == sets[0][name]).all() for one in sets[1:])
    assert all(one["channel_weights"] is sets[0]["channel_weights"] for one in sets)
    calls = kernel_cases.in_turn([lambda: 1, lambda: 2])
    assert [calls() for _ in range(3)] == [1, 2, 1]


def test_the_gpu_sizes_come_in_order_and_batches_are_whole(monkeypatch):
    options = SimpleNamespace(backend="cupy", quick=False, size=None, kernel=None, dtype=None)
    cases = benchmark.chosen_cases(options)
    assert [(c.kernel, c.size) for c in cases[:3]] == list(benchmark.GPU_TARGETS)
    asked = [benchmark.with_compilers(case, devices.CUDA) for case in cases]
    assert all(asked[:3])
    assert not all(asked)
    assert all(benchmark.with_compilers(case, devices.CPU) for case in cases)
    problems = step.chosen_cases(options, ("step", "epoch"), ("mlp", "cnn"))
    assert [step.size_of(problem) for problem, _ in problems[:2]] == ["784-500-300-10"] * 2
    assert all(problem.n_samples % problem.batch_size == 0 for problem, _ in problems)


# --- shared processes and the deadline ------------------------------------------------------------


def arm(name, **details):
    return Arm(name, f"tests.benchmarks.arms:{name}", **details)


def test_arms_share_a_process_that_is_renewed_after_a_failure(tmp_path):
    references = {"reference": arm("right", backend="ours")}
    arms = [arm("right", backend="ours"), arm("large", backend="ours")]
    with Pool(tmp_path, SETTINGS, shared=True) as pool:
        found = timing.measure(arms, references, TOLERANCE, pool)
        assert [outcome.status for outcome in found] == ["timed", "timed"]
        first = pool.process("ours")._process.pid
        arms = [arm("right", backend="ours"), arm("dies", backend="theirs"), arm("raises")]
        found = timing.measure(arms, references, TOLERANCE, pool)
        assert [outcome.status for outcome in found] == ["timed", "died", "failed"]
        assert pool.process("ours")._process.pid == first
        arms = [arm("right", backend="theirs")]
        found = timing.measure(arms, references, TOLERANCE, pool)
        assert [outcome.status for outcome in found] == ["timed"]


def test_nothing_is_begun_after_the_deadline(tmp_path):
    late = dataclasses.replace(SETTINGS, deadline=time.monotonic() - 1)
    absent = Arm("absent", skip="missing", detail="not installed")
    with Pool(tmp_path, late) as pool:
        found = timing.measure([arm("right"), absent], {"reference": arm("right")}, 1, pool)
    assert [outcome.status for outcome in found] == ["not run", "missing"]
    assert found[0].detail == timing.NO_TIME


def test_an_arm_on_a_gpu_sees_it_and_leaves_memory_to_others(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "x")
    found = timing.fresh_environment(None, devices.CUDA)
    assert found["JAX_PLATFORMS"] == "cuda"
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "XLA_FLAGS" not in found
    assert timing.fresh_environment(None)["JAX_PLATFORMS"] == "cpu"


# --- the command and the README's block -----------------------------------------------------------


def test_the_command_gets_through_and_says_what_was_left_out(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    options = ["--quick", "--no-peers", "--backend", "numpy", "--seconds"]
    assert command.main(["gpu", *options, "8", "--json", str(path)]) == 0
    rows = records.read_rows(path)
    assert {row["benchmark"] for row in rows} == {"kernels", "step", "scaling"}
    statuses = [row["status"] for row in rows if "status" in row]
    assert statuses[0] == "timed"
    assert set(statuses) <= {"timed", "not run"}
    assert {row["machine_rate"] for row in rows if "machine_rate" in row} == {"copy", "gemm"}
    capsys.readouterr()

    assert command.main(["gpu", *options, "0.001", "--json", str(path)]) == 0
    rows = records.read_rows(path)
    assert {row["detail"] for row in rows if "status" in row} == {timing.NO_TIME}
    parts = [(row["benchmark"], row.get("step")) for row in rows if row["benchmark"] != "scaling"]
    in_order = [part for part, before in zip(parts, [None, *parts], strict=False) if part != before]
    kernels = ("kernels", None)  # the targets first, the others last
    assert in_order == [kernels, ("step", "step"), ("step", "epoch"), kernels]
    assert "No time was left" in capsys.readouterr().err


def test_a_run_goes_on_where_another_one_ended(tmp_path, capsys):
    earlier, path = tmp_path / "earlier.jsonl", tmp_path / "rows.jsonl"
    base = {"device": "cpu", "arm": "nalayer numpy", "commit": "x", "backend": "numpy"}
    kernel = base | {"benchmark": "kernels", "dtype": "float32", "status": "timed", "detail": ""}
    kernel |= {"kernel": "s_model", "size": "32x10", "median_ms": 123.0}
    cut_off = kernel | {"size": "32x20", "kernel": "sparse_s_model"}
    no_time = cut_off | {"status": "not run", "detail": timing.NO_TIME}
    epoch = base | {"benchmark": "step", "step": "epoch", "size": "20-12-8-10"}
    epoch |= {"status": "failed", "detail": ""}
    rate = base | {"benchmark": "kernels", "machine_rate": "copy", "gigabytes_per_second": 1.0}
    scaled = base | {"benchmark": "scaling", "series": "s", "k": 10, "status": "timed"}
    sparse = scaled | {"series": "s-kept", "arm": scaling.sparse_name(5), "detail": ""}
    grown = [sparse | {"k": k, "rounds_ms": [k / 1e3] * 3} for k in (1000, 10_000)]
    about = base | {"benchmark": "scaling", "series": "s-kept"}
    fitted = [about | {"theory": 1.0, "exponent": 9.0}, about | {"k": 1000, "own_ms": 9.0}]
    kept = [rate, kernel, epoch, scaled, *grown]
    records.write_rows(earlier, [cut_off, no_time, *fitted, *kept])
    options = ["--quick", "--no-peers", "--backend", "numpy", "--seconds", "0.001"]
    options += ["--json", str(path), "--go-on", str(earlier)]
    assert command.main(["gpu", *options]) == 1  # for what failed
    rows = records.read_rows(path)
    assert [{name: row[name] for name in one} for row, one in zip(rows, kept, strict=False)] == kept
    *later, grows = rows[len(kept) :]
    assert (grows["k_from"], grows["k_to"], round(grows["exponent"], 6)) == (1000, 10_000, 1.0)
    assert not any("theory" in row or "own_ms" in row for row in later)
    assert {row["detail"] for row in later} == {timing.NO_TIME}
    assert {row["kernel"] for row in later if row["benchmark"] == "kernels"} == {
        *benchmark.QUICK
    } - {"s_model"}
    steps = {(row["step"], row["size"]) for row in later if row["benchmark"] == "step"}
    assert steps == {("step", "20-12-8-10"), ("step", "CNN 12x12x1-3")}
    places = {(row["series"], row["k"]) for row in later if row["benchmark"] == "scaling"}
    assert ("s", 10) not in places
    assert ("s", 32) in places

    records.write_rows(earlier, [rate | {"device": "NVIDIA X1"}])
    with pytest.raises(SystemExit, match="2"):
        command.main(["gpu", *options])
    assert "rows of NVIDIA X1, not of cpu" in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    def no_gpu():
        raise RuntimeError("no CUDA-capable device")

    monkeypatch.setattr(devices, "device_facts", no_gpu)
    for name in ("gpu", "kernels", "step", "scaling"):
        with pytest.raises(SystemExit, match="2"):
            command.main([name, "--backend", "cupy"])
        assert "no GPU to measure on: RuntimeError: no CUDA" in capsys.readouterr().err


def test_the_readme_quotes_the_committed_rows():
    readme = (records.ROOT / "README.md").read_text()
    block = gpu_tables.gpu_block(gpu_tables.committed_rows())
    markers = gpu_tables.BEGIN, gpu_tables.END
    assert performance.with_block(readme, block, *markers) == readme


def test_the_block_has_every_number_from_the_rows(tmp_path, capsys):
    base = dict.fromkeys(("device", "machine", "versions", "date", "commit"), "x")
    base |= {"size": "4x3", "dtype": "float32", "n_kept": None, "d": None, "detail": ""}
    ours = {"arm": "nalayer cupy", "ours": True, "status": "timed", "median_ms": 0.5}
    ours |= {"device_ms": 0.25, "ratio_to_us": 1.0, "ratio_to_us_low": 1.0, "ratio_to_us_high": 1.0}
    ours |= {"device_ratio_to_us": 1.0, "peak_extra_bytes": 2**20, "share_of_gemm_rate": 0.1}
    ours |= {"share_of_copy_bandwidth": 0.75, "k": 3}
    theirs = ours | {"arm": "torch, column", "ours": False, "ratio_to_us": 4.0}
    theirs |= {"device_ratio_to_us": 3.0, "median_ms": 2.0}
    lost = theirs | {"arm": "jax.jit, column", "status": "died", "detail": "SIGSEGV"}
    lost |= {"ratio_to_us": None, "median_ms": None}
    rates = {"machine_rate": "copy", "gigabytes_per_second": 3000.0, "arm": "cupy"}
    rows = [base | {"benchmark": "kernels"} | rates]
    rows += [
        base | {"benchmark": "kernels", "kernel": "s_model"} | row for row in (ours, theirs, lost)
    ]
    rows += [base | {"benchmark": "step", "step": "epoch"} | row for row in (ours, lost)]
    rows += [base | {"benchmark": "scaling", "series": "s"} | row for row in (ours, lost)]
    block = gpu_tables.gpu_block(rows)
    kernel = "| `s_model` | 4x3 | 0.5 ms | 0.25 ms | 75% | - | 1.0 | 4.00 [1.00, 1.00], 3.00 | - |"
    assert f"{kernel} died |" in block
    assert "| 4x3 | epoch | nalayer cupy | 0.5 ms | 0.25 ms | 1.00 [1.00, 1.00] | 1.0 |" in block
    assert "| s | jax.jit, column | died |" in block
    assert "- jax.jit, column, `s_model` 4x3: died: SIGSEGV" in block
    assert "copy bandwidth 3000 GB/s (cupy)" in "\n".join(block)
    two = gpu_tables.gpu_block([*rows, *(row | {"device": "y"} for row in rows)])
    assert [line[:9] for line in two if line.startswith("Device")] == ["Device: x", "Device: y"]
    assert sum(line.startswith(kernel) for line in two) == 2
    old = [row | {"benchmark": "gpu"} for row in rows]
    assert gpu_tables.gpu_block(old) == [gpu_tables.NO_RESULTS]
