"""Whatever arrays a public function is given: the right result, or one clear exception.

One array argument comes in another memory layout, which must change nothing, or with a defect:
another dtype or shape, NaN, infinities, numbers at the end of the range, no array at all. Then
there is a result without NaN, or a TypeError or ValueError that names an argument. What is handed
in is never written.
"""

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

import em_baseline
import kernels
import nalayer
from nalayer import CModel, PlainModel, SModel, SoftTargetModel, mlp, stream
from nalayer.datasets import validation_split
from nalayer.learned_noise import learned_noise_matrix
from tests.cases import model_inputs, random_support, soft_targets

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """From which all arguments of a call are made."""

    n: int
    k: int
    d: int
    dtype: type
    seed: int

    @property
    def rng(self):
        return np.random.default_rng([self.seed, self.n, self.k, self.d])

    @property
    def links(self):
        return kernels.link_index(random_support(self.k, 2, self.rng))

    @property
    def labels(self):
        return self.rng.integers(self.k, size=self.n)

    @property
    def theta(self):
        return self.rng.dirichlet(np.ones(self.k), size=self.k).astype(self.dtype)

    @property
    def network(self):
        return mlp(self.d, (3,), self.k, backend="numpy")

    def normal(self, *shape):
        return self.rng.normal(size=shape).astype(self.dtype)

    def soft(self, n):
        return soft_targets(n, self.k, self.dtype, self.seed)


SIZES = st.builds(
    Sizes,
    n=st.integers(1, 5),
    k=st.integers(2, 4),
    d=st.integers(1, 3),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)


@dataclass(frozen=True)
class Call:
    """A public function with what makes its array arguments."""

    function: Callable[..., Any]
    arrays: Callable[[Sizes], Arguments]
    also_named: tuple[str, ...] = ()
    """names that stand for an argument in messages"""
    is_kernel: bool = False
    """a label of probability zero has log-likelihood -inf, and NaN for gradient and posterior"""
    copies: bool = False
    """numbers are moved and not looked at"""
    writes: tuple[str, ...] | None = None
    """for kernels that work in place, on contiguous arrays alone: the arguments that they write"""


def of_kernel(name: str, backend: str) -> Call:
    function = getattr(kernels, name)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind == 1]
    model = name.removesuffix("_skipping").rpartition("_")[0]

    def arrays(s: Sizes) -> Arguments:
        if model == "softmax":
            return {"logits": s.normal(s.n, s.k), "labels": s.labels}
        if model == "soft_target":
            return {"logits": s.normal(s.n, s.k), "targets": s.soft(s.n)}
        inputs = model_inputs(model, "usual", s.n, s.k, s.dtype, s.d, 2, s.seed)
        return dict(zip(names[: len(inputs)], inputs, strict=True))

    options = {"skip_below": 0.1} if "skip_below" in names else {}
    return Call(lambda s, **a: function(**a, **options, backend=backend), arrays, is_kernel=True)


def of_model(kind: type, function: Callable[..., Any], targets: str = "targets") -> Call:
    """Return a call that takes parameters, samples and targets of a model."""

    def arrays(s: Sizes) -> Arguments:
        model = kind(s.network)
        z = s.soft(s.n) if kind is SoftTargetModel else s.labels
        return {"parameters": s.normal(model.n_parameters), "x": s.normal(s.n, s.d), targets: z}

    named = ("labels", "channel_logits", "channel_weights")
    return Call(lambda s, **a: function(kind(s.network), **a), arrays, named)


def fit(model, **arrays):
    step = em_baseline.OneGradientStep(nalayer.SGD(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", em_baseline.LikelihoodDropWarning)
        result = em_baseline.fit(
            model,
            **arrays,
            network_step=step,
            noise_step=None if isinstance(model, SModel) else step,
            n_rounds=2,
            shuffling=stream(0, "shuffling"),
        )
    return result.parameters, result.best.log_likelihood


def statistics(model, **arrays):
    found = em_baseline.e_step_statistics(model, **arrays)
    return tuple(vars(found).values())


def train(model, **arrays):
    options = {"n_epochs": 2, "batch_size": 2, "shuffling": stream(0, "shuffling")}
    result = nalayer.train(model, **arrays, **options)
    return result.parameters, result.best.loss


KERNELS = [
    "softmax_nll",
    "soft_target_nll",
    "c_model_nll_skipping",
    *(name for name in kernels.__all__ if name.endswith(("model_nll", "model_posterior"))),
]

CALLS = {
    **{f"{name}, {b}": of_kernel(name, b) for name in KERNELS for b in kernels.CPU_BACKENDS},
    "link_index": Call(
        lambda s, **a: kernels.link_index(**a), lambda s: {"support": random_support(s.k, 2, s.rng)}
    ),
    "log_softmax": Call(
        lambda s, **a: kernels.log_softmax(**a), lambda s: {"scores": s.normal(s.n, s.k)}
    ),
    "counts_by_label": Call(
        lambda s, **a: kernels.counts_by_label(**a),
        lambda s: {"weights": s.soft(s.n), "labels": s.labels},
    ),
    **{
        f"train, {kind.__name__}": of_model(kind, train)
        for kind in (PlainModel, SoftTargetModel, SModel, CModel)
    },
    **{f"fit, {kind.__name__}": of_model(kind, fit, "noisy_labels") for kind in (SModel, CModel)},
    "predict": Call(
        lambda s, **a: s.network.predict(**a),
        lambda s: {"weights": s.normal(s.network.n_weights), "x": s.normal(s.n, s.d)},
    ),
    "learned_noise_matrix": Call(
        lambda s, **a: learned_noise_matrix(CModel(s.network), **a),
        lambda s: {
            "parameters": s.normal(CModel(s.network).n_parameters),
            "x": s.normal(s.n, s.d),
        },
        ("channel_logits", "channel_weights"),
    ),
    "c_start": Call(
        lambda s, **a: nalayer.c_start(SModel(s.network), **a)[1],
        lambda s: {"parameters": s.normal(SModel(s.network).n_parameters)},
        ("channel_logits",),
    ),
    "sparse_start": Call(
        lambda s, **a: nalayer.sparse_start(CModel(s.network), **a, links=s.links)[1],
        lambda s: {"parameters": s.normal(CModel(s.network).n_parameters)},
        ("channel_logits", "channel_weights"),
    ),
    "noise_matrix": Call(
        lambda s, **a: nalayer.noise_matrix(**a), lambda s: {"channel_logits": s.normal(s.k, s.k)}
    ),
    "channel_logits_of": Call(
        lambda s, **a: nalayer.channel_logits_of(**a), lambda s: {"theta": s.theta}
    ),
    "confusion_start": Call(
        lambda s, **a: nalayer.confusion_start(**a),
        lambda s: {"probabilities": s.soft(s.n), "noisy_labels": s.labels},
    ),
    "clustered_start": Call(
        lambda s, **a: nalayer.clustered_start(**a, rng=stream(0, "clusters")),
        lambda s: {"probabilities": s.soft(s.n), "noisy_labels": s.labels},
    ),
    "best_relabelling": Call(
        lambda s, **a: nalayer.best_relabelling(**a),
        lambda s: {"estimate": s.theta, "truth": s.theta[::-1].copy()},
    ),
    "noise_matrix_error": Call(
        lambda s, **a: nalayer.noise_matrix_error(**a),
        lambda s: {"estimate": s.theta, "truth": s.theta[::-1].copy()},
    ),
    "corrupt_labels": Call(
        lambda s, **a: nalayer.corrupt_labels(**a, rng=stream(0, "label noise")),
        lambda s: {"labels": s.labels, "theta": s.theta},
    ),
    "corrupt_labels, sparse": Call(
        lambda s, **a: nalayer.corrupt_labels(**a, links=s.links, rng=stream(0, "label noise")),
        lambda s: {"labels": s.labels, "theta": np.full((s.k, 2), 0.5, s.dtype)},
    ),
    "confusion_counts": Call(
        lambda s, **a: nalayer.confusion_counts(**a, n_candidates=2).toarray(),
        lambda s: {"probabilities": s.soft(s.n), "noisy_labels": s.labels},
    ),
    "labels_hash": Call(lambda s, **a: nalayer.labels_hash(**a), lambda s: {"labels": s.labels}),
    "top_support": Call(
        lambda s, **a: nalayer.top_support(**a, n_kept=2), lambda s: {"confusion": s.theta}
    ),
    "gather_links": Call(
        lambda s, **a: nalayer.gather_links(**a, links=s.links),
        lambda s: {"matrix": s.normal(s.k, s.k, s.d)},
        copies=True,
    ),
    "scatter_links": Call(
        lambda s, **a: nalayer.scatter_links(**a, links=s.links, missing=0.0),
        lambda s: {"values": s.normal(s.k, 2)},
        copies=True,
    ),
    "validation_split": Call(
        lambda s, **a: validation_split(10 * s.k, **a, share=0.5, rng=stream(0, "split")),
        lambda s: {"labels": np.tile(np.arange(s.k), 10)},
    ),
    "check_gradient": Call(
        lambda s, **a: nalayer.check_gradient(lambda p: float(p @ p), **a).error < 1e-6,
        lambda s: {"gradient": 2 * s.normal(s.n), "at": s.normal(s.n)},
    ),
    "e_step": Call(
        lambda s, logits, hidden, channel_weights, channel_logits, noisy_labels: em_baseline.e_step(
            CModel(s.network, "numpy"),
            (logits, hidden),
            (channel_weights, channel_logits),
            noisy_labels,
        ),
        of_kernel("c_model_posterior", "numpy").arrays,
        is_kernel=True,
    ),
    "expected_counts": Call(
        lambda s, **a: em_baseline.expected_counts(**a),
        lambda s: {"posterior": s.soft(s.n), "noisy_labels": s.labels},
    ),
    "expected_counts, sparse": Call(
        lambda s, **a: em_baseline.expected_counts(**a, links=s.links),
        lambda s: {"posterior": s.soft(s.n), "noisy_labels": s.labels},
    ),
    "e_step_statistics": of_model(SModel, statistics, "noisy_labels"),
    "noise_matrix_m_step": Call(
        lambda s, **a: em_baseline.noise_matrix_m_step(**a),
        lambda s: {"counts_ij": s.theta * 5, "previous": s.theta},
    ),
    "expected_log_likelihood": Call(
        lambda s, posterior, **a: em_baseline.expected_log_likelihood(
            SModel(s.network), **a, posterior=posterior
        ),
        lambda s: of_model(SModel, fit, "noisy_labels").arrays(s) | {"posterior": s.soft(s.n)},
        ("channel_logits",),
    ),
}


def image_arrays(s: Sizes) -> Arguments:
    return {"images": s.normal(s.n, 4, 5, s.d), "weight": s.normal(2, 2, s.d, s.k)}


def block_arrays(s: Sizes) -> Arguments:
    """Return arguments of a convolution with bias, ReLU and pooling by two."""
    shape = (s.n, 1, 2, s.k)
    place = np.zeros(shape, np.uint8)
    return image_arrays(s) | {"bias": s.normal(s.k), "out": s.normal(*shape), "place": place}


def block_gradient_arrays(s: Sizes) -> Arguments:
    arrays = block_arrays(s)
    bias = arrays.pop("bias")
    d_arrays = {"d_images": arrays["images"] * 0, "d_weight": arrays["weight"] * 0, "d_bias": bias}
    return arrays | {"d_out": arrays["out"].copy()} | d_arrays


ADAM = {"n_steps": 1, "step_size": 0.1, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-8}
IN_PLACE = {
    "adam_update": (
        lambda s: {
            name: np.abs(s.normal(s.n)) for name in ("parameters", "gradient", "mean", "square")
        },
        ("parameters", "mean", "square"),
        ADAM,
    ),
    "bias_relu_dropout": (
        lambda s: {"values": s.normal(s.n, s.k), "bias": s.normal(s.k)},
        ("values",),
        {"rate": 0.5},
    ),
    "bias_relu_dropout_backward": (
        lambda s: {
            **{name: s.normal(s.n, s.k) for name in ("out", "d_out", "d_values")},
            "d_bias": s.normal(s.k),
        },
        ("d_values", "d_bias"),
        {"rate": 0.5},
    ),
    "conv2d": (image_arrays, (), {}),
    "conv2d_backward": (lambda s: image_arrays(s) | {"d_out": s.normal(s.n, 3, 4, s.k)}, (), {}),
    "conv2d_relu": (block_arrays, ("out", "place"), {"pool": 2}),
    "conv2d_relu_backward": (
        block_gradient_arrays,
        ("d_images", "d_weight", "d_bias"),
        {"pool": 2},
    ),
    "max_pool2d": (lambda s: {"images": s.normal(s.n, 4, 5, s.d)}, (), {"size": 2}),
}
CALLS |= {
    f"{name}, {backend}": Call(
        lambda s, f=name, o=options, b=backend, **a: getattr(kernels, f)(**a, **o, backend=b),
        arrays,
        copies=True,
        writes=writes,
    )
    for name, (arrays, writes, options) in IN_PLACE.items()
    for backend in kernels.CPU_BACKENDS
}
CALLS |= {
    f"max_pool2d_backward, {backend}": Call(
        lambda s, b=backend, **a: kernels.max_pool2d_backward(
            **a, size=2, shape=(s.n, 4, 5, s.d), backend=b
        ),
        lambda s: {
            "place": s.rng.integers(4, size=(s.n, 2, 2, s.d), dtype=np.uint8),
            "d_out": s.normal(s.n, 2, 2, s.d),
        },
        copies=True,
        writes=(),
    )
    for backend in kernels.CPU_BACKENDS
}


def strided(array, step):
    """Return an equal array of which only every other number in memory is its own."""
    wide = np.zeros([2 * size for size in array.shape], array.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view[tuple(slice(None, None, step) for _ in array.shape)]


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "every other number": lambda a: strided(a, 1),
    "backwards": lambda a: np.flip(np.flip(a).copy()),
    "read-only": read_only,
    "mapped": lambda a: a.view(np.memmap) if a.size else a,
    "other integers": lambda a: a.astype(np.int16) if a.dtype.kind == "i" else a,
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
}


def with_number(number):
    def at_random(array, rng):
        if array.dtype.kind not in "f" or not array.size:
            return array.astype(np.int64) + int(rng.choice([-1, 1, 2**40, -(2**63)]))
        array = array.copy()
        array.flat[rng.integers(array.size)] = number
        return array

    return at_random


DEFECTS: dict[str, Callable[[np.ndarray, np.random.Generator], Any]] = {
    **{str(number): with_number(number) for number in (np.nan, np.inf, -np.inf, 0.0, -1.0)},
    "huge": with_number(1e38),
    "minus huge": with_number(-1e38),
    "all huge": lambda a, rng: np.where(rng.random(a.shape) < 0.5, 3e38, -3e38).astype(a.dtype),
    "all -inf": lambda a, rng: np.full(a.shape, -np.inf),
    "tiny": with_number(1e-45),
    "all zero": lambda a, rng: np.zeros_like(a),
    "empty": lambda a, rng: a[:0],
    "empty rows": lambda a, rng: a[..., :0],
    "shorter": lambda a, rng: a[1:],
    "longer": lambda a, rng: np.concatenate([a, a[:1]]),
    "narrower": lambda a, rng: a[..., 1:],
    "flat": lambda a, rng: a.ravel(),
    "one more axis": lambda a, rng: a[None],
    "no axis": lambda a, rng: np.array(a.flat[0]),
    **{
        str(np.dtype(d)): lambda a, rng, d=d: a.astype(d)
        for d in (
            np.float16,
            np.longdouble,
            ">f8",
            ">i4",
            np.uint8,
            np.uint64,
            bool,
            complex,
            "O",
            "U8",
        )
    },
    "times": lambda a, rng: a.astype("i8").astype("M8[s]"),
    "records": lambda a, rng: np.zeros(a.shape, [("a", "f8")]),
    "list": lambda a, rng: a.tolist(),
    "None": lambda a, rng: None,
    "number": lambda a, rng: 1.0,
    "words": lambda a, rng: "logits",
    "masked": lambda a, rng: np.ma.masked_array(a, rng.random(a.shape) < 0.5),
    "matrix": lambda a, rng: a.view(np.matrix) if a.ndim == 2 else None,
}


def numbers_of(result) -> list[np.ndarray]:
    if isinstance(result, tuple):
        return [number for part in result for number in numbers_of(part)]
    return [np.asarray(result)]


def copies(arrays: Arguments) -> Arguments:
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in arrays.items()}


def same_bytes(a: Any, b: Any) -> bool:
    return not isinstance(a, np.ndarray) or a.dtype == object or a.tobytes() == b.tobytes()


def outcome(call: Call, s: Sizes, arrays: Arguments):
    """Return the numbers that come out, or why there are none."""
    before = copies(arrays)
    found = numbers_or_error(call, s, arrays)
    written = () if isinstance(found, Exception) else call.writes or ()
    assert all(same_bytes(arrays[k], before[k]) for k in arrays if k not in written)
    if isinstance(found, FloatingPointError):
        assert re.search("loss is|likelihood is|parameter is nan|leave the range", str(found))
    elif isinstance(found, Exception):
        assert any(name in str(found) for name in (*arrays, *call.also_named)), repr(found)
    return found


def numbers_or_error(call: Call, s: Sizes, arrays: Arguments):
    try:
        return numbers_of(call.function(s, **arrays))
    except (TypeError, ValueError, FloatingPointError) as error:
        return error


def changed(arrays: Arguments, changes: dict[str, Callable[..., Any]], *more: Any):
    """Yield the arguments with each of them changed in each of the ways."""
    for which, array in arrays.items():
        for words, change in changes.items():
            note(f"{which}: {words}")
            yield arrays | {which: change(array, *more)}


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=4, deadline=None)
@given(s=SIZES)
def test_memory_layout_changes_nothing(name, s):
    call = CALLS[name]
    arrays = call.arrays(s)
    expected = outcome(call, s, arrays)
    for odd in changed(arrays, LAYOUTS):
        found = outcome(call, s, odd)
        if call.writes is not None:
            continue
        if isinstance(expected, Exception):
            assert (type(found), str(found)) == (type(expected), str(expected))
        else:
            assert all(agree(a, b, s.dtype) for a, b in zip(found, expected, strict=True))


def agree(a: np.ndarray, b: np.ndarray, dtype: type) -> bool:
    """Return whether two results are the same but for rounding in the dtype of the arguments.

    BLAS sums a transposed matrix in another order, and some results are float64 in any case.
    """
    same = a == b
    if b.dtype.kind == "f":
        error = np.subtract(a, b, where=~same, out=np.zeros_like(b))
        size = np.abs(b[np.isfinite(b)]).max(initial=1)
        same |= np.abs(error) <= 64 * np.finfo(dtype).eps * size
    return a.dtype == b.dtype and bool(same.all())


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=4, deadline=None)
@given(s=SIZES)
def test_defects_are_named_or_do_no_harm(name, s):
    call = CALLS[name]
    with np.errstate(all="ignore"):
        for odd in changed(call.arrays(s), DEFECTS, s.rng):
            found = outcome(call, s, odd)
            assert isinstance(found, Exception) or call.copies or not hides_nan(call, found)


def hides_nan(call: Call, found: list[np.ndarray]) -> bool:
    if call.is_kernel and np.isinf(found[0]).any():
        return False
    return any(np.isnan(number).any() for number in found if number.dtype.kind in "fc")
