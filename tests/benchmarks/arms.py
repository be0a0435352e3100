"""Arms that behave badly on purpose, each built in a worker by name."""

import os
import time

import numpy as np

from benchmarks.worker import Work

TRUTH = (np.array(2.0), np.arange(6.0).reshape(2, 3))


def right():
    return Work(lambda: None, lambda: TRUTH)


def wrong():
    return Work(lambda: None, lambda: (TRUTH[0], TRUTH[1] * (1 + 1e-3)))


def not_a_number():
    return Work(lambda: None, lambda: (TRUTH[0], np.where(TRUTH[1] == 4, np.nan, TRUTH[1])))


def misshapen():
    return Work(lambda: None, lambda: (TRUTH[0], TRUTH[1].ravel()))


def raises():
    def call():
        raise RuntimeError("out of\nmemory")

    return Work(call, lambda: TRUTH)


def not_built():
    raise ImportError("no such library")


def dies():
    os.write(2, b"some warning\nfree(): invalid size\n")
    return Work(os.abort, lambda: TRUTH)


def dies_while_timed():
    calls = []

    def call():
        calls.append(None)
        if len(calls) > 6:
            os.abort()

    return Work(call, lambda: TRUTH)


def hangs():
    return Work(lambda: time.sleep(60), lambda: TRUTH)


def spins():
    """A thread that never rests, as those of an OpenMP pool before they fall asleep."""
    import threading

    def forever():
        while True:
            pass

    threading.Thread(target=forever, daemon=True).start()
    return right()


def large():
    def call():
        let_go, handed_back = np.ones(2**23), np.ones(2**20)  # 64 and 8 MiB
        return handed_back, let_go.sum()

    return Work(call, lambda: TRUTH, 8 * 2**20)


def environment():
    return Work(lambda: None, lambda: (np.array(sorted(os.environ)),))


def every_form(cases, library):
    """Return a work whose results are those of all forms of a peer, case by case."""
    from benchmarks import peers

    def results():
        found = {}
        for case in cases:
            kernel = case["kernel"]
            if library == "torch":
                for form in peers.TORCH_FORMS[kernel]:
                    work = peers.build_torch(case, form, compiled=False)
                    found[kernel, form] = work.results()
            else:
                for form in peers.JAX_FORMS[kernel]:
                    found[kernel, form] = peers.build_jax(case, form).results()
        return found

    return Work(lambda: None, results)


class StubClock:
    """A device's clock without a device."""

    def wait(self, result=None):
        pass

    def seconds(self, call, n_calls):
        for _ in range(n_calls + 1):
            call()
        return 1e-3

    def queued_seconds(self, call, seconds):
        return 1e-4

    def peak_bytes(self, call):
        call()
        return None

    def used_bytes(self):
        return 0

    def give_back(self):
        pass


STUB_DEVICE = "cpu:0"  # PyTorch's other name of the CPU


def as_on_a_gpu():
    """Let the benchmarks take a stub for the GPU; only in a worker, before it imports them."""
    from benchmarks import devices

    devices.CUDA = STUB_DEVICE
    devices.CLOCKS = dict.fromkeys(devices.CLOCKS, StubClock)


def peers_as_on_a_gpu(case, problems, library):
    """Return a work that makes the calls of a GPU's arms; its results are those of all of them."""
    as_on_a_gpu()
    from benchmarks import peers, step_peers

    works = []
    given = {"device": STUB_DEVICE, "form": "flat"}
    steps = {"device": STUB_DEVICE, "unit": "step"}
    mlp, cnn = (steps | {"problem": problem} for problem in problems)
    if library == "torch":
        eager = {"compiled": False}
        works.append(peers.build_torch(case, parts=3, **given, **eager))
        steps = eager | {"fused": True}
        works += [
            step_peers.build_torch(**mlp, **steps),
            step_peers.build_torch_cnn(**cnn, **steps, memory_format="channels_last"),
        ]
    else:
        import jax

        jax.default_backend = lambda: "gpu"
        works.append(peers.build_jax(case, **given))
        works += [step_peers.build_jax(**one, generator="rbg") for one in (mlp, cnn)]

    def call():
        for work in works:
            assert work.clock.seconds(work.call, 5) == 1e-3  # more calls than sets of inputs

    return Work(call, lambda: [work.results() for work in works])


def every_layer(cases):
    """Return a work whose results are those of torch's layers, in both orders of the numbers."""
    from benchmarks import step_layers

    formats = ("contiguous_format", "channels_last")

    def results():
        return [
            [step_layers.build_torch(case, form).results() for form in formats] for case in cases
        ]

    return Work(lambda: None, results)
