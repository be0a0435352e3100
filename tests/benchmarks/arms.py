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
