"""A killed run goes on from its checkpoint and ends bit for bit where the unbroken run ends."""

import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nalayer import (
    SGD,
    Adam,
    PlainModel,
    checkpoints,
    mlp,
    stream,
    tensor_file,
    train,
    training,
)
from nalayer.checkpoints import CheckpointError
from tests.checkpointed import LABELS, RUNS, TRAIN, X, em, end_of, fingerprint, joint

ROOT = Path(__file__).resolve().parents[2]


class KilledError(Exception):
    """Stands for the kill in runs that are cut off between two epochs."""


def cut_off(run, path, n_calls, hook="on_epoch"):
    """Start a run and end it at the n-th call of its hook."""
    left = n_calls

    def die(*_):
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError

    with pytest.raises(KilledError):
        run(checkpoint=path, **{hook: die})


@pytest.mark.parametrize("run", RUNS)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, run):
    """SIGKILL at random moments, while it computes or writes, until it has ended five times."""
    expected = fingerprint(RUNS[run]())
    path, moment = tmp_path / "run", random.Random(run)
    command = [sys.executable, "-m", "tests.checkpointed", run, str(path)]
    sizes, n_kills = [], 0
    while True:
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while n_kills < 5 and child.poll() is None:
            if path.exists() and path.stat().st_mtime_ns != before:  # under way
                time.sleep(moment.uniform(0, 0.05))
                child.kill()
                break
            time.sleep(0.001)
        printed, _ = child.communicate()
        if child.returncode == 0:
            break
        assert child.returncode == -9
        n_kills += 1
        sizes.append(path.stat().st_size)
    assert n_kills == 5
    assert sizes == sorted(sizes)
    assert printed.strip() == expected


CASES = {
    "s, dropout, early stopping": (joint, "on_epoch"),
    "without validation": (lambda **o: joint(validation=None, n_epochs=4, **o), "on_epoch"),
    "compiled": (
        lambda **o: joint(n_epochs=4, optimiser=Adam(0.01), dropout=None, **o),
        "on_epoch",
    ),
    "one stream for both": (lambda **o: joint(n_epochs=5, **one_stream(), **o), "on_epoch"),
    "no loss": (
        lambda **o: joint(n_epochs=4, optimiser=SGD(0.1), with_loss=False, **o),
        "on_epoch",
    ),
    "em s float32": (lambda **o: em("s", np.float32, **o), "on_half_step"),
    "em c": (lambda **o: em("c", n_rounds=5, patience=1, **o), "on_half_step"),
}


def one_stream():
    both = stream(0, "shuffling")
    return {"shuffling": both, "dropout": both}


@pytest.mark.filterwarnings("ignore::em_baseline.LikelihoodDropWarning")
@pytest.mark.parametrize("name", CASES)
def test_cut_off_between_any_two_epochs_it_ends_with_the_same_bytes(tmp_path, name):
    run, hook = CASES[name]
    unbroken = run()
    for n_calls in range(1, len(unbroken.history) + 1):
        path = tmp_path / f"{n_calls}"
        cut_off(run, path, n_calls, hook)
        assert end_of(run(checkpoint=path)) == end_of(unbroken)


def test_early_stopping_is_what_ends_the_first_case():
    assert len(joint().history) < 31


@pytest.mark.parametrize("generator", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_every_bit_generator_goes_on(tmp_path, generator):
    def run(**options):
        rng = np.random.Generator(getattr(np.random, generator)(3))
        rng.integers(10, dtype=np.uint32)  # leaves half of a 64-bit draw behind
        return joint(shuffling=rng, n_epochs=3, **options)

    cut_off(run, tmp_path / "run", 3)
    assert end_of(run(checkpoint=tmp_path / "run")) == end_of(run())


def test_streams_end_where_they_would_have(tmp_path):
    states = []
    for path in (None, tmp_path / "run"):
        if path:
            cut_off(joint, path, 4)
        rng = stream(0, "dropout")
        joint(dropout=rng, checkpoint=path)
        states.append(rng.bit_generator.state)
    assert states[0] == states[1]


def test_a_finished_run_is_returned_and_not_run_again(tmp_path):
    seen = []
    first = joint(checkpoint=tmp_path / "run")
    again = joint(checkpoint=tmp_path / "run", on_epoch=lambda *_: seen.append(0))
    assert end_of(again) == end_of(first)
    assert again.history == first.history  # the seconds too
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_pause_does_not_count(tmp_path, monkeypatch):
    def seconds_of(run, start):
        clock = itertools.count(float(start))  # a second between any two looks at it
        monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        return run()

    path = tmp_path / "run"
    unbroken = seconds_of(joint, 100)
    seconds_of(lambda: cut_off(joint, path, 4), 200)
    resumed = seconds_of(lambda: joint(checkpoint=path), 3000)
    assert resumed.history == unbroken.history


NETWORK = mlp(5, (7, 6), 4, dropout=0.3, backend="numpy")
OTHERS = {
    "model": {"model": PlainModel(NETWORK, "numpy"), "parameters": np.ones(NETWORK.n_weights)},
    "parameters": {"parameters": np.linspace(-1, 1, joint(n_epochs=0).parameters.size)},
    "x": {"x": X[TRAIN] + 1e-9},
    "targets": {"targets": (LABELS[TRAIN] + 1) % 4},
    "validation": {"validation": None},
    "n_epochs": {"n_epochs": 5},
    "patience": {"patience": 2},
    "batch_size": {"batch_size": 17},
    "optimiser": {"optimiser": Adam(0.011)},
    "step_factors": {"step_factors": 0.5},
    "with_loss": {"with_loss": False},
    "shuffling": {"shuffling": stream(1, "shuffling")},
    "dropout": {"dropout": None},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_runs_checkpoint_is_refused_by_name(tmp_path, name):
    path = tmp_path / "run"
    cut_off(joint, path, 3)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"run is of another run.*other .*\b{name}\b"):
        joint(checkpoint=path, **OTHERS[name])
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match=r"of another run, with other .*network_step"):
        em("s", checkpoint=path)


def test_any_damage_is_one_clear_error(tmp_path):
    path = tmp_path / "run"
    cut_off(joint, path, 3)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [
        b"",
        whole[:31],
        whole[:-1],
        whole + b"x",
        b"\0" * len(whole),
        whole[: len(whole) // 2],
    ]
    for place in rng.integers(len(whole), size=60):
        one = bytearray(whole)
        one[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(one))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"run: found .*delete this one"):
            joint(checkpoint=path)
    path.write_bytes(whole)
    joint(checkpoint=path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch, step):
    path = tmp_path / "run"
    cut_off(joint, path, 3)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(CheckpointError, match=r"cannot write .*run: No space left"):
            joint(checkpoint=path)
    assert path.read_bytes() == before
    assert end_of(joint(checkpoint=path)) == end_of(joint())


def test_a_place_that_cannot_be_used_is_named_before_the_first_step(tmp_path):
    for path, words in (
        (tmp_path / "none" / "run", "cannot write checkpoint .*No such file"),
        (tmp_path, "cannot read checkpoint .*directory"),
    ):
        seen = []
        with pytest.raises(CheckpointError, match=words):
            joint(checkpoint=path, on_epoch=lambda epoch, _, seen=seen: seen.append(epoch.number))
        assert 1 not in seen
    with pytest.raises(TypeError, match="checkpoint must be a path; found int"):
        joint(checkpoint=3)


def test_settings_and_states_that_cannot_be_kept_are_refused(tmp_path):
    @dataclass(frozen=True)
    class OddState(SGD):
        def initial_state(self, parameters):
            return {1, 2}

    class Opaque:
        def check(self, *_):
            pass

    path = tmp_path / "run"
    with pytest.raises(TypeError, match=r"state\.0\.1 must consist of.*found set"):
        joint(optimiser=OddState(0.1), checkpoint=path)
    with pytest.raises(TypeError, match=r"model must consist of.*found Opaque"):
        train(Opaque(), np.zeros(3), X, LABELS, shuffling=stream(0, "shuffling"), checkpoint=path)
    assert list(tmp_path.iterdir()) == []


# --- content that somebody changed, with a checksum that is right ---------------------------------


def forged(path, change, shuffling=None, run=joint):
    """Change what a checkpoint holds, seal it, and return the refusal of going on from it.

    ``change`` is given facts and arrays, to change in place, and may return bytes for the facts.
    """
    _, arrays = tensor_file.read(path, checkpoints.FORMAT)
    facts = json.loads(arrays.pop("facts").tobytes())
    arrays = dict(arrays)
    facts = change(facts, arrays) or facts
    words = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    arrays["facts"] = np.frombuffer(words, np.uint8)
    path.write_bytes(tensor_file.encoded({}, arrays, checkpoints.FORMAT))
    rng = shuffling or stream(0, "shuffling")
    before = rng.bit_generator.state
    with pytest.raises(CheckpointError, match=r"run: found a run that cannot be .*") as refusal:
        run(checkpoint=path, shuffling=rng)
    assert str(rng.bit_generator.state) == str(before)  # it may be used for a run from the start
    return str(refusal.value)


def put(place, value):
    """Return a change that sets one of the facts."""

    def change(facts, arrays):
        *parents, last = place
        for name in parents:
            facts = facts[name]
        facts[last] = value

    return change


def put_array(name, value):
    return lambda facts, arrays: arrays.update({name: value})


STATE = "state.0.0"  # of the parameters
BEST = "state.1"
N_STEPS = "state.0.1.0.n_steps"
FORGERIES = {
    "no JSON": (lambda facts, arrays: b"{", "JSONDecodeError"),
    "deep JSON": (lambda facts, arrays: b"[" * 100_000, "RecursionError"),
    "long number": (lambda facts, arrays: b"9" * 100_000, "ValueError"),
    "no object": (lambda facts, arrays: b"[1]", "AttributeError|TypeError"),
    "no history": (lambda facts, arrays: facts.pop("history") and None, "KeyError: 'history'"),
    "empty history": (put(["history"], []), "IndexError"),
    "rows of numbers": (put(["history"], [1]), "TypeError"),
    "a field more": (put(["history", 1, "more"], 1), "unexpected keyword"),
    "a loss of words": (put(["history", 1, "loss"], "low"), "loss is 'low'"),
    "a truth for a number": (put(["history", 1, "number"], True), "number is True"),
    "out of order": (put(["history", 1, "number"], 7), "the history is out of order"),
    "best is none": (put(["best"], 99), "IndexError"),
    "best from the end": (put(["best"], -1), "best and n_worse are"),
    "best not judged": (lambda facts, arrays: unjudge(facts), "the best is Epoch"),
    "n_worse": (put(["n_worse"], 1.5), "best and n_worse are"),
    "finished": (put(["finished"], "no"), "finished is 'no'"),
    "no stream": (put(["streams"], {}), "KeyError: 'shuffling'"),
    "stream of another kind": (
        put(["streams", "shuffling", "bit_generator"], "MT19937"),
        "must be for a PCG64",
    ),
    "stream of words": (put(["streams", "shuffling", "state"], "x"), r"shuffling\.state is a str"),
    "stream with more": (put(["streams", "shuffling", "more"], 1), "shuffling has"),
    "stream too large": (
        put(["streams", "shuffling", "state", "inc"], 2**200),
        "OverflowError",
    ),
    "no array": (lambda facts, arrays: arrays.pop(STATE) is None, "state.0.0"),
    "an array more": (put_array("state.9", np.zeros(1)), "state.9"),
    "another shape": (put_array(STATE, np.zeros(3)), r"state.0.0 must have shape \(\d+,\)"),
    "another dtype": (lambda facts, arrays: retype(arrays), "state.0.0 is of float32"),
    "NaN in the best": (lambda facts, arrays: put_nan(arrays), "a parameter is nan"),
    "steps before the first": (put_array(N_STEPS, np.array(-1)), "n_steps must be at least 0"),
}
OF_EM = {
    "half a round": (
        lambda facts, arrays: facts["history"].pop() and None,
        "the history ends within a round",
    ),
    "halves the other way round": (
        lambda facts, arrays: swap_halves(facts["history"]),
        "the history is out of order",
    ),
    "no such half": (put(["history", 0, "half"], "stop"), "the history is out of order"),
    "best within a round": (put(["best"], 1), "the best is HalfStep"),
}


def unjudge(facts):
    for epoch in facts["history"]:
        epoch["validation_loss"] = None


def retype(arrays):
    arrays[STATE] = arrays[STATE].astype(np.float32)


def put_nan(arrays):
    arrays[BEST] = np.full_like(arrays[BEST], np.nan)


def swap_halves(history):
    history[1]["half"], history[2]["half"] = history[2]["half"], history[1]["half"]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_content_that_cannot_be_is_refused_whatever_its_checksum(tmp_path, forgery):
    change, words = FORGERIES[forgery]
    path = tmp_path / "run"
    cut_off(joint, path, 3)  # in the second epoch
    found = forged(path, change)
    assert re.search(words, found), found


@pytest.mark.parametrize("validation", ["held out", None])
@pytest.mark.parametrize("forgery", OF_EM)
def test_a_history_of_em_that_cannot_be_is_refused(tmp_path, forgery, validation):
    def run(**options):
        return em("s", **options) if validation else em("s", validation=None, **options)

    change, words = OF_EM[forgery]
    path = tmp_path / "run"
    cut_off(run, path, 4, "on_half_step")  # in the second round
    found = forged(path, change, run=run)
    assert re.search(words, found), found


def test_a_generator_is_not_sent_beyond_its_table(tmp_path):
    """NumPy would take the position as it is, and read there."""

    def mersenne():
        return np.random.Generator(np.random.MT19937(3))

    path = tmp_path / "run"
    cut_off(lambda **options: joint(shuffling=mersenne(), **options), path, 2)
    far = put(["streams", "shuffling", "state", "pos"], 10**6)
    assert "state.pos is 1000000" in forged(path, far, mersenne())


def test_a_run_of_em_ends_wherever_its_history_says_it_is(tmp_path):
    path = tmp_path / "run"
    cut_off(lambda **options: em("s", **options), path, 4, "on_half_step")
    _, arrays = tensor_file.read(path, checkpoints.FORMAT)
    facts = json.loads(arrays["facts"].tobytes())
    a_round = facts["history"][1:]

    def write(*rounds):
        more = [half | {"round": r} for r in rounds for half in a_round]
        changed = facts | {"history": facts["history"] + more}
        words = np.frombuffer(json.dumps(changed).encode(), np.uint8)
        path.write_bytes(tensor_file.encoded({}, arrays | {"facts": words}, checkpoints.FORMAT))

    write(10**9)
    with pytest.raises(CheckpointError, match="the history is out of order"):
        em("s", checkpoint=path)
    write(*range(2, 12))  # beyond the last round, which is the eighth

    def no_more(step, parameters):
        assert step.round <= 12, "it does not end"

    assert em("s", checkpoint=path, on_half_step=no_more).history[-1].round == 12


def test_no_pickle_is_read(tmp_path):
    path = tmp_path / "run"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        joint(checkpoint=path)


def test_a_state_of_a_dtype_that_no_file_keeps_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Complex(SGD):
        def initial_state(self, parameters):
            return parameters.astype(complex)

    with pytest.raises(TypeError, match=r"state\.0\.1 must be of dtype .*; found complex128"):
        joint(optimiser=Complex(0.1), checkpoint=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
