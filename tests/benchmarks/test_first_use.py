"""The benchmark of the first use: every compiled kernel is called, and the rows are told right."""

import json

import pytest

from benchmarks import first_use
from kernels import numba_backend
from tests.cases import JIT

NOT_COMPILED = {"column_sums", "gather_rows", "limit_threads", "product", "thread_count"}


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_every_compiled_kernel_is_called(capsys):
    first_use.print_calls(["float64"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["call"] for row in rows} == set(numba_backend.__all__) - NOT_COMPILED
    assert {row["dtype"] for row in rows} == {"float64"}
    assert all(row["seconds"] >= 0 for row in rows)


def test_the_sentence_adds_up_what_the_rows_say():
    compiled, loaded = first_use.COMPILED, first_use.LOADED
    rows = [
        {"first_use": compiled, "dtype": "float32", "call": "a", "seconds": 3.0},
        {"first_use": compiled, "dtype": "float32", "call": "b", "seconds": 4.0},
        {"first_use": compiled, "dtype": "float64", "call": "a", "seconds": 2.0},
        {"first_use": loaded, "dtype": "float32", "call": "a", "seconds": 0.25},
        {"first_use": loaded, "dtype": "float32", "call": "b", "seconds": 0.125},
        {"first_use": loaded, "dtype": "float64", "call": "a", "seconds": 0.125},
        {"first_use": first_use.FIRST_STEP, "seconds": 1.5},
        {"first_use": first_use.IMPORTED, "seconds": 0.5},
        {"first_use": first_use.IMPORTED, "seconds": 0.25},
        {"first_use": first_use.IMPORTED, "seconds": 0.75},
    ]
    text = first_use.sentence(rows)
    for words in ("7 s for float32", "2 s for float64", "after 0.5 s", "after 1.5 s", "0.50 s"):
        assert words in text
    assert first_use.table(rows)[1].endswith("4.00 s compiled  0.125 s loaded")
