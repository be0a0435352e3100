"""A thousand damaged files for every reader, and a look at whether the fuzzer would notice."""

import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.records import read_rows
from nalayer import model_files
from nalayer.model_files import ModelFileError
from tests import fuzz

ROOT = Path(__file__).resolve().parents[1]


def test_every_reader_reads_or_refuses_every_input(tmp_path):
    path, n = tmp_path / "fuzz.jsonl", 1000
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(n), "--json", str(path)]
    subprocess.run([*command, "--seed", "1"], cwd=ROOT, check=True)
    rows = read_rows(path)
    totals = {row["reader"]: row for row in rows if "accepted" in row}
    assert totals.keys() == fuzz.READERS.keys()
    for name, total in totals.items():
        refusals = [row["count"] for row in rows if row["reader"] == name and "count" in row]
        assert total["accepted"] + total["refused"] == n
        assert sum(refusals) == total["refused"]
        # The changes do not all go to the same place, and some leave the file whole.
        assert 0 < total["accepted"] < n
        assert len(refusals) >= 2


def test_inputs_are_the_same_again_and_differ_from_each_other():
    inputs = [fuzz.make_input("idx", 0, number) for number in range(200)]
    assert inputs == [fuzz.make_input("idx", 0, number) for number in range(200)]
    assert len(set(inputs)) > 150
    assert len({fuzz.a_model_file() for _ in range(20)}) == 1


def test_a_sealed_file_gets_past_its_checksum(tmp_path):
    data = bytearray(fuzz.a_model_file())
    data[-1] ^= 1  # of the last parameter
    path = tmp_path / "model"
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match="do not match"):
        model_files.load(path)
    path.write_bytes(fuzz.sealed(bytes(data)))
    found = model_files.load(path)
    assert fuzz.consistent_model(found)
    assert not fuzz.same_model(found)


JSON = {
    "facts of a checkpoint": (
        b'"n_worse": 0',
        b'"n_worse": 2',
        lambda found: found.best.n_worse == 2,
    ),
    "description of an estimator": (
        b'"n_iter": 1',
        b'"n_iter": 5',
        lambda found: found.n_iter_ == 5,
    ),
}


@pytest.mark.parametrize("name", JSON)
def test_json_is_changed_inside_a_file_that_is_whole(name, tmp_path):
    reader, (old, new, holds) = fuzz.READERS[name], JSON[name]
    (data,), path = reader.seeds.values(), tmp_path / "file"
    assert old in data
    path.write_bytes(reader.seal(data.replace(old, new)))
    found = reader.read(path)
    assert holds(found)
    assert reader.is_sound(found)


def test_most_changes_of_json_leave_it_json():
    (data,) = fuzz.READERS["facts of a checkpoint"].seeds.values()
    different = valid = 0
    for number in range(200):
        new = fuzz.changed_json(data, [data], random.Random(number))
        different += new != data
        with suppress(ValueError, RecursionError):
            json.loads(new)
            valid += 1
    assert different > 190
    assert 80 < valid < 200


def key_error(path):
    raise KeyError("planted")


def slow(path):
    until = time.process_time() + 1.1
    while time.process_time() < until:
        pass
    return np.zeros(1, np.uint8)


FAULTS = {
    "another exception": ({"read": key_error}, r"seed 5, input 7 .*KeyError: 'planted'"),
    "the wrong result": ({"read": lambda path: np.zeros(1)}, "read, but unsound"),
    "too long": ({"read": slow}, r"took 1\.\d s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_reader_is_a_failure(fault, monkeypatch, tmp_path):
    change, words = FAULTS[fault]
    monkeypatch.setitem(fuzz.READERS, "idx", replace(fuzz.READERS["idx"], **change))
    with pytest.raises(fuzz.Failure, match=words):
        fuzz.fuzz("idx", range(7, 9), 5, tmp_path)


GREEDY = """
import sys
from dataclasses import replace
import numpy as np
from tests import fuzz
greedy = lambda path: np.ones({size} * 2**20, np.uint8)
fuzz.READERS["idx"] = replace(fuzz.READERS["idx"], read=greedy)
sys.exit(fuzz.main(["--inputs", "1", "--reader", "idx"]))
"""


@pytest.mark.parametrize(("size", "status"), [(200, 1), (10, 0)])
def test_a_greedy_reader_is_a_failure(size, status):
    command = [sys.executable, "-c", GREEDY.format(size=size)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == status, found.stderr
    assert ("MemoryError" in found.stderr) == (status == 1)
