"""Steps recorded as a CUDA graph: launched many times, put together by Python once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kernels.cupy_backend import product
from kernels.cupy_backend.launch import cp

_own = threading.local()


class Recording:
    """A graph and the memory it works in, which is nobody else's as long as this lives."""

    def __init__(self, stream: Any, step: Callable[[], None]) -> None:
        self._stream = stream
        self._held: list[Any] = []
        malloc = cp.cuda.get_allocator()

        def held(size: int) -> Any:
            memory = malloc(size)
            self._held.append(memory)  # not to be handed out again, in this step or elsewhere
            return memory

        with cp.cuda.using_allocator(held):
            stream.begin_capture()
            try:
                step()
            except BaseException:
                _abandon(stream)
                raise
            self._graph = stream.end_capture()

    def replay(self) -> None:
        """Do the step once more; nothing waits for it."""
        self._graph.launch(self._stream)


def _abandon(stream: Any) -> None:
    """End a recording that has failed, after which the stream works again."""
    try:
        stream.end_capture()
    except Exception:  # what CUDA says of a recording that was cut short; its cause is raised
        return


def _streams() -> dict[int, Any]:
    """Return this thread's streams, by device.

    CuPy keeps the memory that was used on a stream for that stream. With a new one for each epoch
    it would be kept for nobody, and each epoch's would be new.
    """
    if not hasattr(_own, "streams"):
        _own.streams = {}
    return _own.streams


@contextmanager
def recording_stream() -> Iterator[Callable[[Callable[[], None]], Recording]]:
    """See :func:`kernels.recording_stream`.

    CUDA records no work of the default stream. The stream starts after what was launched before,
    and what is launched afterwards starts after it. A step must have been done before it is
    recorded, as its kernels are compiled and loaded then.
    """
    device, before = cp.cuda.Device().id, cp.cuda.get_current_stream()
    streams = _streams()
    stream = streams.get(device)
    if stream is None:
        stream = streams[device] = cp.cuda.Stream(non_blocking=True)
    stream.wait_event(before.record())
    try:
        with stream, product.recordable_products(stream):
            yield lambda step: Recording(stream, step)
    finally:
        before.wait_event(stream.record())
