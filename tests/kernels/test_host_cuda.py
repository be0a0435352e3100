"""The stand-in for CuPy refuses what CuPy refuses: that makes tests on it worth something."""

import inspect
import warnings

import numpy as np
import pytest

from tests.kernels import host_cuda

CUPY = host_cuda.module()
X = CUPY.asarray(np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "use",
    [
        lambda: np.asarray(X),
        lambda: np.ascontiguousarray(X),
        lambda: X + np.ones(3),
        lambda: np.ones(3) * X,
        lambda: X.dot(np.ones(3)),
        lambda: np.concatenate([X, np.ones((1, 3))]),
        lambda: X[np.array([0, 1])],
        lambda: X.__setitem__(0, np.ones(3)),
        lambda: np.add(X, X, where=X > 0),
        lambda: np.add.reduce(X),
        lambda: np.take(X, X[0].astype(int), mode="clip"),
        lambda: X.max(initial=0.0),
        lambda: np.median(X),
        lambda: np.linalg.inv(X),
    ],
)
def test_what_cupy_refuses_is_refused(use):
    with pytest.raises(TypeError):
        use()


def test_results_are_arrays_of_its_own_even_if_they_are_numbers():
    row = X[0]
    row[...] = 7  # a view
    whole = np.empty((2, 2), np.float32, like=X)
    results = X.sum(), X[0, 0], np.exp(X), np.matmul(X, X.T), np.concatenate([X, X]), X.T, whole
    assert all(type(result) is CUPY.ndarray for result in results)
    assert X.get()[0].tolist() == [7, 7, 7]
    assert whole.dtype == np.float32
    assert np.isnan(whole.get()).all()
    out = CUPY.empty((2, 2))
    assert np.matmul(X, X.T, out=out) is out
    assert out.get().tolist() == (X.get() @ X.get().T).tolist()
    assert np.asarray([1, 2], like=X).get().tolist() == [1, 2]


def test_two_compiled_sources_share_no_memory():
    if host_cuda.why_not():
        pytest.skip(host_cuda.why_not())
    code = """
__device__ inline int times_called() { static int times = 0; return ++times; }
extern "C" __global__ void count(int* out) { *out = times_called(); }"""
    out = CUPY.zeros(1, dtype=np.int32)
    for size in (1, 2):
        module = CUPY.RawModule(code=code, options=(f"-DSIZE={size}",))
        module.get_function("count")((1,), (32,), (out,))
        assert out.get().tolist() == [32]


def test_libraries_are_kept_by_what_makes_them_and_for_one_user(monkeypatch, tmp_path):
    if host_cuda.COMPILER is None:
        pytest.skip(host_cuda.why_not())

    def build(text, options, folder):
        (folder / "one").touch()
        return folder / "one"

    def build_with_other_flags(text, options, folder):
        (folder / "two").touch()
        return folder / "two"

    monkeypatch.setattr(host_cuda, "LIBRARIES", tmp_path / "kept")
    found = []
    for how in (build, build_with_other_flags, build):
        monkeypatch.setattr(host_cuda, "_build", how)
        found.append(host_cuda._built("", ()))
    assert found[0] == found[2] != found[1]
    monkeypatch.setattr(host_cuda.os, "getuid", lambda: -1)
    with pytest.raises(PermissionError, match="kept belongs to another user"):
        host_cuda._built("", ())


def test_functions_and_methods_are_as_cupy_has_them():
    """CuPy can be imported without a GPU; compiled methods tell their parameters in a docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cupy = pytest.importorskip("cupy")
    for name, found in host_cuda._signatures(host_cuda.FUNCTIONS).items():
        function = getattr(cupy, name)
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:
            continue  # compiled
        taken = list(found.parameters)
        assert taken == list(parameters)[: len(taken)], name
    for name, found in host_cuda._signatures(host_cuda.METHODS).items():
        first = (getattr(cupy.ndarray, name).__doc__ or "").partition("\n")[0]
        if "(self" in first:
            told = first.partition("(self")[2]
            assert all(parameter in told for parameter in found.parameters), name
    for name in host_cuda.UFUNCS.split():
        assert callable(getattr(cupy, name))
    for name in (*host_cuda.ATTRIBUTES, *host_cuda.VIEWS):
        assert hasattr(cupy.ndarray, name)
