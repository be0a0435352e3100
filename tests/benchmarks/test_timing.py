"""The harness: ratios, comparison before timing, and arms that are wrong, crash, fail or hang."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import timing, worker
from benchmarks.timing import Arm, Outcome, Settings, Worker

SETTINGS = Settings(rounds=3, block_seconds=0.001, budget_seconds=1, timeout_seconds=20)


def arm(name: str, **details) -> Arm:
    return Arm(name, f"tests.benchmarks.arms:{name}", **details)


def measure(
    *arms: Arm, cache: Path, settings: Settings = SETTINGS, shared: bool = False
) -> dict[str, Outcome]:
    with timing.Pool(cache, settings, shared) as pool:
        outcomes = timing.measure(
            arms, {"reference": arm("right")}, timing.tolerance(np.float32), pool
        )
    return {outcome.arm.name: outcome for outcome in outcomes}


def test_bad_arms_are_reported_and_the_others_timed(tmp_path):
    names = ("right", "wrong", "not_a_number", "misshapen", "raises", "not_built", "dies")
    absent = Arm("absent", skip="missing", detail="not installed")
    found = measure(*map(arm, names), arm("dies_while_timed"), absent, cache=tmp_path)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "right": "timed",
        "wrong": "wrong",
        "not_a_number": "wrong",
        "misshapen": "wrong",
        "raises": "failed",
        "not_built": "failed",
        "dies": "died",
        "dies_while_timed": "died",
        "absent": "missing",
    }
    assert len(found["right"].seconds) == SETTINGS.rounds
    assert all(not outcome.seconds for name, outcome in found.items() if name != "right")
    assert found["wrong"].detail == "relative error 1.0e-03, allowed 1.2e-04"
    assert found["raises"].detail == "at 'first call', RuntimeError: out of"
    assert found["not_built"].detail == "at 'build', ImportError: no such library"
    assert found["dies"].detail == "at 'first call', SIGABRT: free(): invalid size"

    rows = timing.outcome_rows(list(found.values()))
    fields = {
        "arm",
        "status",
        "detail",
        "median_ms",
        "ratio_to_us",
        "ratio_to_us_low",
        "ratio_to_us_high",
        "first_call_ms",
        "peak_extra_bytes",
        "relative_error",
        "tolerance",
        "backend",
        "busy_elsewhere",
    }
    assert all(row.keys() >= fields for row in rows)
    assert rows[0]["ratio_to_us"] == 1
    assert rows[0]["busy_elsewhere"] >= 0
    assert all(row["ratio_to_us"] is None and row["median_ms"] is None for row in rows[1:])


def test_an_arm_that_hangs_is_given_up(tmp_path):
    hasty = Settings(rounds=3, block_seconds=0.001, budget_seconds=1, timeout_seconds=2)
    found = measure(arm("right"), arm("hangs"), cache=tmp_path, settings=hasty)
    assert found["hangs"].status == "no answer"
    assert found["hangs"].detail == "to 'first call' within 2 s"
    assert found["right"].status == "timed"


def test_without_a_reference_nothing_is_timed(tmp_path):
    with timing.Pool(tmp_path, SETTINGS) as pool:
        (outcome,) = timing.measure([arm("right")], {"reference": arm("not_built")}, 1, pool)
    assert (outcome.status, outcome.seconds) == ("failed", [])
    assert outcome.detail == "the reference failed: at 'build', ImportError: no such library"


def test_without_our_own_time_there_are_no_ratios(tmp_path):
    rows = timing.outcome_rows(list(measure(arm("wrong"), arm("right"), cache=tmp_path).values()))
    assert rows[1]["median_ms"] is not None
    assert rows[1]["ratio_to_us"] is None


def test_a_worker_is_asleep_while_nobody_asks(tmp_path):
    spinning = Worker(arm("spins"), tmp_path, SETTINGS)
    try:
        stat = Path(f"/proc/{spinning._process.pid}/stat")
        time.sleep(0.05)  # the signal is on its way
        before = stat.read_text().split()
        time.sleep(0.1)
        after = stat.read_text().split()
        assert before[2] == "T"
        assert before[13:15] == after[13:15]  # time in user and system mode
        spinning.ask("time", 1)
    finally:
        spinning.close()


def test_workers_see_a_fresh_shell(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "NUMBA_NUM_THREADS", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "1")
    fresh = Worker(arm("environment"), tmp_path, SETTINGS)
    try:
        (names,) = fresh.ask("results")
    finally:
        fresh.close()
    assert not {name for name in names if name.startswith(("OMP", "KMP")) or "THREADS" in name}
    assert {"NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(names)
    assert "PATH" in names


def test_peak_memory_counts_what_a_call_holds_but_not_what_it_returns(tmp_path):
    large = Worker(arm("large"), tmp_path, SETTINGS)
    try:
        peak = large.ask("memory")
    finally:
        large.close()
    if peak is None:
        pytest.skip("the system tells no high-water mark of memory")
    assert abs(peak - 64 * 2**20) <= 4 * 2**20


def test_ratios_are_taken_round_by_round():
    # The machine slows down tenfold, and the ratio stays.
    assert timing.ratios([3.0, 30.0, 300.0], [1.0, 10.0, 100.0]) == (3.0, 3.0, 3.0)
    median, low, high = timing.ratios(np.arange(1.0, 12.0), np.ones(11))
    assert (median, low, high) == (6.0, 2.0, 10.0)


def test_relative_errors():
    truth = [np.array(4.0), np.array([[1.0, -8.0]])]
    assert worker.relative_error([np.float32(4), truth[1]], truth) == 0
    assert worker.relative_error([np.float32(5), truth[1]], truth) == 0.25
    assert worker.relative_error([truth[0], truth[1] + 1], truth) == 0.125
    for unlike in ([truth[0]], [truth[0], truth[1].T], [truth[0], truth[1] * np.nan]):
        assert not worker.relative_error(unlike, truth) <= 1
    assert worker.relative_error([np.ones(2)], [np.zeros(2)]) == 1


def test_closing_leaves_no_process_behind(tmp_path):
    quiet = Worker(arm("right"), tmp_path, SETTINGS)
    pid = quiet._process.pid
    quiet.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
