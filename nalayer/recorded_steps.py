"""What differs between steps of training that a GPU repeats by itself.

A step on a GPU is some dozens of kernels, and Python takes longer to launch them than they run. So
the launches of one step are recorded (``kernels.recording_stream``) and repeated as a whole. All
that is an argument of a launch stays as it was; what has to change lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import kernels

MOST_WORDS = 1024
"""64-bit numbers that a step may ask for, beside the numbers of its samples"""


class _Slot(NamedTuple):
    array: np.ndarray
    start: int
    of_step: Callable[[], Any]


class StepNumbers:
    """The numbers of each of some steps, one step's at a time in the device's memory.

    A step that is recorded asks for arrays, which will hold other numbers in each repetition, and
    says where these come from. A table of them is then made on the CPU, step by step in the order
    of asking: random streams are used as by steps that are taken one by one. Each step ends with
    fetching the next one's row.

    Parameters
    ----------
    n_steps : int
    n_words : int
        The most numbers of a step.
    like : array
        On the device.
    """

    def __init__(self, n_steps: int, n_words: int, like: Any) -> None:
        self._n_steps = n_steps
        self._words = np.empty(n_words, np.int64, like=like)
        self._slots: list[_Slot] = []
        self._n_words = 0
        self._table: Any = None
        self._step = np.zeros(1, np.int64, like=like)
        self._step -= 2
        self._step += 1  # -1, before the first; and the kernel is there when this is recorded

    def array(self, size: int, dtype: Any, of_step: Callable[[], Any]) -> np.ndarray:
        """Return an array of the device; ``of_step`` gives its numbers, for one step a call.

        The dtype has 64 bits: int64 or float64.
        """
        start = self._n_words
        self._n_words += size
        if self._n_words > self._words.size:
            raise ValueError(f"a step has more than {self._words.size} numbers of its own")
        array = self._words[start : self._n_words].view(dtype)
        self._slots.append(_Slot(array, start, of_step))
        return array

    def next_step(self) -> None:
        """Fetch the numbers of the next step: a step's last act."""
        if self._table is None:
            shape = self._n_steps, self._n_words
            self._table = np.empty(shape, np.int64, like=self._words)
        self._step += 1
        current = self._words[: self._n_words].reshape(1, -1)
        kernels.gather_rows(self._table, self._step, current)

    def start(self) -> None:
        """Make the table of all steps, and fetch the numbers of the first."""
        words = np.empty((self._n_steps, self._n_words), np.int64)
        floats = words.view(np.float64)
        for step in range(self._n_steps):
            for array, start, of_step in self._slots:
                table = floats if array.dtype == np.float64 else words
                table[step, start : start + array.size] = of_step()
        self._table[...] = np.asarray(words, like=self._words)
        self.next_step()


class StepSeeds:
    """Stands for the generator of dropout in a recorded step."""

    def __init__(self, numbers: StepNumbers, draw: Callable[[], int]) -> None:
        self._numbers, self._draw = numbers, draw

    def seed(self) -> np.ndarray:
        """Return the next seed: an array (1,) of the device."""
        return self._numbers.array(1, np.int64, self._draw)


def repeat(
    step: Callable[[np.ndarray, Any, StepNumbers], None],
    batches: Sequence[np.ndarray],
    draw: Callable[[], int] | None,
    record: Callable[[Callable[[], None]], Any],
    like: Any,
) -> None:
    """Record a step and repeat it for batches of equal size: their samples, on the CPU.

    Parameters
    ----------
    step : callable
        Is given the samples of its batch, on the device, seeds for dropout, and all other numbers.
    batches : sequence of (b,) int64
    draw : callable, optional
        Draws the seed of one layer's dropout in one step; None is for steps without dropout.
    record : callable
        What :func:`kernels.recording_stream` gives.
    like : array
        On the device.
    """
    size = batches[0].size
    numbers = StepNumbers(len(batches), size + MOST_WORDS, like)
    seeds = None if draw is None else StepSeeds(numbers, draw)
    samples = iter(batches)

    def recorded() -> None:
        step(numbers.array(size, np.int64, samples.__next__), seeds, numbers)
        numbers.next_step()

    recording = record(recorded)
    numbers.start()
    for _ in batches:
        recording.replay()
