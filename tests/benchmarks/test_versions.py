"""The benchmark of one kernel in four versions."""

import pytest

from benchmarks import records, versions_page
from benchmarks.__main__ import main
from benchmarks.timing import Arm, Outcome
from benchmarks.versions import LOOPS, NUMBA, NUMPY, ONE_THREAD, gains


def test_command_times_every_version(tmp_path, capsys):
    path = tmp_path / "versions.jsonl"
    assert main(["versions", "--quick", "--size", "8x3", "--json", str(path)]) == 0
    rows = records.read_rows(path)
    assert [row["arm"] for row in rows] == [LOOPS, NUMPY, ONE_THREAD, NUMBA]
    assert [row["backend"] for row in rows] == ["python", "numpy", "numba", "numba"]
    assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in rows)
    assert all(row["relative_error"] <= 1e-6 for row in rows)
    assert ["gain" in row for row in rows] == [False, True, True, True]
    assert "times faster" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["versions", "--size", "8"])


def test_gains_are_ratios_of_a_round():
    first, second, third = (Outcome(Arm(name)) for name in ("a", "b", "c"))
    first.seconds, second.seconds = [4.0, 9.0, 2.0], [2.0, 3.0, 2.0]
    assert gains([first, second, third]).keys() == {"b"}
    assert gains([first, second])["b"]["gain"] == 2.0


def row(n, arm, ms, **more):
    fields = {"n": n, "k": 10, "size": f"{n}x10", "arm": arm, "median_ms": ms, "rounds": 9}
    return fields | {"peak_extra_bytes": 2**20, "busy_elsewhere": 0.0} | more


def gpu(ms, date, arm="nalayer", **more):
    fields = {"n": 8, "k": 10, "arm": arm, "median_ms": ms, "date": date, "dtype": "float32"}
    return fields | {"kernel": "s_model_nll", "backend": "cupy", "device": "a GPU"} | more


GAIN = {"gain": 4.0, "gain_low": 3.0, "gain_high": 5.0}


def test_page_has_every_version_and_the_last_run_on_a_gpu():
    rows = [row(8, LOOPS, 8.0), row(8, NUMPY, 2.0, **GAIN), row(8, NUMBA, 1.0), row(9, LOOPS, None)]
    on_gpu = [
        gpu(0.25, "2026-02-02", device_ms=0.125),
        gpu(0.5, "2026-01-01"),
        gpu(0.1, "2026-03-03", "torch"),
    ]
    on_gpu += [gpu(0.1, "2026-03-03", dtype="float64"), gpu(0.1, "2026-03-03", kernel="c_model")]
    text = "\n".join(versions_page.block(rows, on_gpu))
    assert "| (8, 10) | 8 | 2 (4 [3, 5]) | 1 | 0.25 (0.125) |" in text
    assert "| (9, 10) | - | - | - | - |" in text
    assert "CUDA on that GPU**, times faster: 4 at (8, 10)" in text
    assert "quiet" not in text
    assert "CUDA" not in "\n".join(versions_page.block(rows, []))
    other = [gpu(ms, "2026-04-04", n=n, device="B") for n, ms in ((9, 0.75), (10, 0.5))]
    assert {of["device"] for of in versions_page.cuda_rows([*on_gpu, other[0]]).values()} == {
        "a GPU"
    }
    assert versions_page.cuda_rows([*on_gpu, *other]) == {(9, 10): other[0], (10, 10): other[1]}


def test_page_says_if_the_machine_was_busy_or_rounds_were_few():
    rows = [row(8, LOOPS, 8.0, busy_elsewhere=0.7), row(9, LOOPS, 1.0, rounds=2)]
    text = "\n".join(versions_page.block(rows, []))
    assert "other programs kept busy 0.7 cores at (8, 10)" in text
    assert "fewer than 5 rounds: (9, 10)" in text
