"""What is minimised: a network with a loss on top, as a function of one flat parameter vector.

A model holds no parameters. It maps (parameters, samples, targets) to a loss in nats per sample
and its gradient, so a trainer, an optimiser from SciPy and the gradient check all take it as is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

import kernels
from kernels import LinkIndex, checks, log_softmax
from nalayer.buffers import FRESH, SLICE, Buffers, slice_size, slices
from nalayer.memory import require_memory
from nalayer.network import Network
from nalayer.support import gather_links

AnyNoiseModel = TypeVar("AnyNoiseModel", "SModel", "CModel")

NO_PENALTY = (0.0, 0.0)
"""what :meth:`NoiseModel.penalty` returns where there is none, and nothing need be added"""


class Model(Protocol):
    """What the trainer needs: a loss of a flat vector, with its gradient."""

    @property
    def n_parameters(self) -> int:
        """Length of the flat vector."""

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: np.ndarray,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return the loss (nats, mean over samples) and its gradient, a flat vector.

        With ``buffers`` of its own a training loop gets the same array every time. On a GPU the
        loss stays there, an array of one number: to read it would be to wait for it.
        """

    def loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the loss alone, without dropout."""

    def nll(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the loss without dropout and without penalties."""

    def validation_loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return what early stopping watches on held-out data."""


def check_features(network: Network, parameters: np.ndarray, x: np.ndarray, n_parameters: int):
    """Refuse parameters or features that do not fit the network: shape, dtype, NaN, no samples."""
    checks.check_floats("parameters", parameters, (n_parameters,))
    checks.check_finite("parameters", parameters[: network.n_weights])
    network.check_features(x, parameters.dtype)


def mean_over_slices(
    mean_of: Callable[[slice, Buffers], float], n: int, size: int = SLICE
) -> float:
    """Return the mean over n samples of what ``mean_of`` says of each slice.

    The buffers are the same for all slices: memory does not grow with n. Numbers on a GPU are
    waited for at the end only.
    """
    buffers = Buffers()
    means = ((part.stop - part.start) / n * mean_of(part, buffers) for part in slices(n, size))
    return float(sum(means))


def unread(number: np.floating) -> Any:
    """Return a float; on a GPU the array of one number as it is, in float64, without waiting."""
    return number.astype(np.float64) if checks.is_on_gpu(number) else float(number)


@dataclass(frozen=True)
class PlainModel:
    """The baseline: a network trained as if the labels were clean. Targets are labels (n,)."""

    network: Network
    backend: str | None = None

    @property
    def n_parameters(self) -> int:
        """The network's weights."""
        return self.network.n_weights

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        check_features(self.network, parameters, x, self.n_parameters)
        checks.check_labels("labels", targets, x.shape[0], self.network.n_classes)

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: np.ndarray,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy and its gradient."""
        logits, caches = self.network.forward(parameters, x, rng, buffers)
        nll, d_logits = self._nll(logits, targets)
        gradient = buffers.take("gradient", parameters.shape, parameters.dtype, like=parameters)
        self.network.backward(parameters, caches, d_logits, out=gradient, buffers=buffers)
        return nll if checks.is_on_gpu(nll) else float(nll), gradient

    def loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the mean cross-entropy, without dropout."""
        return self.nll(parameters, x, targets)

    def nll(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the same as :meth:`loss`: there is no penalty."""

        def of(part: slice, buffers: Buffers) -> float:
            logits, _ = self.network.forward(parameters, x[part], buffers=buffers)
            return unread(self._nll(logits, targets[part]).nll)

        return mean_over_slices(of, x.shape[0], slice_size(x))

    def validation_loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return :meth:`nll`."""
        return self.nll(parameters, x, targets)

    def _nll(self, logits: np.ndarray, targets: np.ndarray) -> kernels.SoftmaxNLL:
        return kernels.softmax_nll(logits, targets, backend=self.backend, check_values=False)


@dataclass(frozen=True)
class SoftTargetModel(PlainModel):
    """The network's part of EM's M-step (Eq. 5): targets are posteriors c_ti (n, K)."""

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        check_features(self.network, parameters, x, self.n_parameters)
        shape = (x.shape[0], self.network.n_classes)
        checks.check_floats("targets", targets, shape, parameters.dtype)
        checks.check_probability_rows("targets", targets)

    def _nll(self, logits: np.ndarray, targets: np.ndarray) -> kernels.SoftmaxNLL:
        return kernels.soft_target_nll(logits, targets, backend=self.backend, check_values=False)


class NoiseModel:
    r"""What the four models share: a network under a noise adaptation layer, trained jointly.

    The noise layer reads the network's *outputs* and has *channel* parameters of its own:

    ============  ==================  =========================================  ==============
    model         outputs             channel                                    l
    ============  ==================  =========================================  ==============
    s (Eq. 10)    logits              channel logits B (K, l)                    K
    c (Eq. 8)     logits, hidden      channel weights U (K, l, d), B (K, l)      K
    sparse s, c   as s and c          as s and c                                 links per class
    ============  ==================  =========================================  ==============

    The flat vector is the network's weights followed by the channel, row by row. Targets are the
    noisy labels (n,). The loss is the mean negative log-likelihood, nats per sample (Eq. 12 with
    its sign turned), plus :meth:`penalty`.
    """

    letter: ClassVar[str]
    network: Network
    backend: str | None
    links: LinkIndex | None

    @property
    def name(self) -> str:
        """Return "s", "c", "sparse-s" or "sparse-c"."""
        return self.letter if self.links is None else f"sparse-{self.letter}"

    @property
    def n_kept(self) -> int:
        """The paper's l, links per true class: K for a dense model."""
        return self.network.n_classes if self.links is None else self.links.support.shape[1]

    @property
    def channel_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the noise layer's parameters, in the order of the flat vector."""
        return {"channel_logits": (self.network.n_classes, self.n_kept)}

    @property
    def n_parameters(self) -> int:
        """The network's weights and the channel's parameters."""
        sizes = (prod(shape) for shape in self.channel_shapes.values())
        return self.network.n_weights + sum(sizes)

    def pack(self, weights: np.ndarray, *channel: np.ndarray) -> np.ndarray:
        """Return one flat vector, a copy; raises for wrong shapes or two different dtypes."""
        checks.check_floats("weights", weights, (self.network.n_weights,))
        for (name, shape), value in zip(self.channel_shapes.items(), channel, strict=True):
            checks.check_floats(name, value, shape, weights.dtype)
        return np.concatenate([weights, *(value.ravel() for value in channel)])

    def unpack(self, parameters: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the weights and the channel's parameters, the channel logits last, as views."""
        n_weights = self.network.n_weights
        return parameters[:n_weights], *self.unpack_channel(parameters[n_weights:])

    def unpack_channel(self, flat: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the channel's parameters out of a flat vector of them alone, as views."""
        views, start = [], 0
        for shape in self.channel_shapes.values():
            stop = start + prod(shape)
            views.append(flat[start:stop].reshape(shape))
            start = stop
        return tuple(views)

    def step_factors(self, channel_step: float) -> np.ndarray:
        """Return each parameter's step factor: ``channel_step`` for the noise layer, else 1."""
        factors = np.full(self.n_parameters, float(channel_step))
        factors[: self.network.n_weights] = 1
        return factors

    def check_parameters(self, parameters: np.ndarray) -> None:
        """Refuse parameters of another shape or dtype, or without a noise matrix."""
        checks.check_floats("parameters", parameters, (self.n_parameters,))
        weights, *channel_weights, channel_logits = self.unpack(parameters)
        checks.check_finite("parameters", weights)
        for value in channel_weights:
            checks.check_finite("channel_weights", value)
        checks.check_rows_are_log_weights("channel_logits", channel_logits)

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        self.check_parameters(parameters)
        self.network.check_features(x, parameters.dtype)
        _, *_, channel_logits = self.unpack(parameters)
        checks.check_labels("noisy_labels", targets, x.shape[0], self.network.n_classes)
        if self.links is None:
            checks.check_labels_reachable("noisy_labels", targets, "channel_logits", channel_logits)
        else:
            checks.check_same_home("links", self.links.support, "parameters", parameters)
            alive = self.links.support[~np.isneginf(channel_logits)]
            n_links_j = np.bincount(alive, minlength=self.network.n_classes)
            checks.check_labels_linked("noisy_labels", targets, "links", n_links_j)

    def forward(
        self,
        weights: np.ndarray,
        x: np.ndarray,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[tuple[np.ndarray, ...], Any]:
        """Return the outputs that the noise layer reads, and what the network's backward needs."""
        logits, caches = self.network.forward(weights, x, rng, buffers)
        return (logits,), caches

    def joint(
        self,
        outputs: Sequence[np.ndarray],
        channel: Sequence[np.ndarray],
        noisy_labels: np.ndarray,
        check_values: bool = False,
    ) -> kernels.SModelNLL | kernels.CModelNLL:
        """Return the kernel's loss and its gradients, those of outputs and channel in order."""
        return self._kernel("nll", outputs, channel, noisy_labels, check_values)

    def posterior(
        self,
        outputs: Sequence[np.ndarray],
        channel: Sequence[np.ndarray],
        noisy_labels: np.ndarray,
        check_values: bool = False,
    ) -> kernels.Posterior:
        """Return each sample's log-likelihood and the posterior of its true class (Eq. 3)."""
        return self._kernel("posterior", outputs, channel, noisy_labels, check_values)

    def _kernel(
        self,
        result: str,
        outputs: Sequence[np.ndarray],
        channel: Sequence[np.ndarray],
        noisy_labels: np.ndarray,
        check_values: bool,
    ) -> Any:
        """Call ``kernels.s_model_nll``, ``kernels.sparse_c_model_posterior``, and so on."""
        kernel = getattr(kernels, f"{self.name.replace('-', '_')}_model_{result}")
        links = () if self.links is None else (self.links,)
        arrays = (*outputs, *channel, *links, noisy_labels)
        return kernel(*arrays, backend=self.backend, check_values=check_values)

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: np.ndarray,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient with respect to weights and channel."""
        weights, *channel = buffers.views("parameters", parameters, self.unpack)
        outputs, caches = self.forward(weights, x, rng, buffers)
        nll, *gradients = self.joint(outputs, channel, targets)
        d_outputs, d_channel = gradients[: len(outputs)], gradients[len(outputs) :]

        gradient = buffers.take("gradient", parameters.shape, parameters.dtype, like=parameters)
        d_weights, *d_views = buffers.views("gradient", gradient, self.unpack)
        d_logits, d_hidden = d_outputs if len(d_outputs) == 2 else (*d_outputs, None)
        self.network.backward(weights, caches, d_logits, d_hidden, d_weights, buffers)
        for view, value in zip(d_views, d_channel, strict=True):
            view[...] = value
        penalty, d_penalty = self.penalty(channel[-1])
        if d_penalty is not NO_PENALTY[1]:
            d_views[-1] += d_penalty
            return unread(nll) + penalty, gradient
        return nll if checks.is_on_gpu(nll) else float(nll), gradient

    def loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the loss, without dropout."""
        *_, channel_logits = self.unpack(parameters)
        return self.nll(parameters, x, targets) + float(self.penalty(channel_logits)[0])

    def nll(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the mean negative log-likelihood (Eqs. 9, 12), without dropout or penalty."""
        weights, *channel = self.unpack(parameters)

        def of(part: slice, buffers: Buffers) -> float:
            outputs, _ = self.forward(weights, x[part], buffers=buffers)
            return self._nll(outputs, channel, targets[part])

        # A slice reads all of the channel: it should have more samples than a row has links.
        return mean_over_slices(of, x.shape[0], max(slice_size(x), self.n_kept))

    def validation_loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return :meth:`nll`."""
        return self.nll(parameters, x, targets)

    def _nll(
        self, outputs: Sequence[np.ndarray], channel: Sequence[np.ndarray], targets: np.ndarray
    ) -> float:
        """Return the mean negative log-likelihood, given what the network makes of the samples."""
        return unread(self.joint(outputs, channel, targets).nll)

    def penalty(self, channel_logits: np.ndarray) -> tuple[float, np.ndarray | float]:
        """Return what is added to the loss on account of the channel logits, and its gradient."""
        return NO_PENALTY


def _check_links(links: Any, n_classes: int) -> None:
    """Refuse links that are no index, or are for another number of classes."""
    if links is None:
        return
    if not isinstance(links, LinkIndex):
        raise TypeError(
            f"links must be None or a kernels.LinkIndex, such as kernels.link_index(support) "
            f"gives; found {type(links).__name__}"
        )
    if links.support.shape[0] != n_classes:
        raise ValueError(
            f"links must be for the network's {n_classes} classes; "
            f"found {links.support.shape[0]} rows"
        )


@dataclass(frozen=True)
class SModel(NoiseModel):
    """A network with the simple noise adaptation layer on top (Eqs. 10-12), trained jointly.

    See :class:`NoiseModel` for the flat vector and the loss.

    Parameters
    ----------
    network : Network
    pseudo_count : float
        Dirichlet pseudo-count alpha: adds ``alpha * sum_ij log theta_ij``, over the links that
        there are, to the likelihood (a sum over samples). 0 is the paper.
    n_samples : int, optional
        Size of the training set over which alpha is spread; every mini-batch of b samples then
        carries b / n_samples of the pseudo-counts. Needed where alpha is positive.
    backend : {"numpy", "numba"}, optional
    links : LinkIndex, optional
        Makes it the sparse s-model, whose channel logits are (K, l). None is the dense one, (K, K).
    """

    letter: ClassVar[str] = "s"
    network: Network
    pseudo_count: float = 0.0
    n_samples: int | None = None
    backend: str | None = None
    links: LinkIndex | None = None

    def __post_init__(self) -> None:
        """Refuse a negative pseudo-count or one to be spread over nothing, and wrong links."""
        check_pseudo_count(self.pseudo_count)
        if self.pseudo_count and not (self.n_samples and self.n_samples >= 1):
            raise ValueError(
                f"n_samples must be the size of the training set where pseudo_count is positive; "
                f"found {self.n_samples}"
            )
        _check_links(self.links, self.network.n_classes)

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        super().check(parameters, x, targets)
        _, channel_logits = self.unpack(parameters)
        if self.pseudo_count and (np.isneginf(channel_logits) & (self.pseudo_counts > 0)).any():
            raise ValueError("channel_logits must be finite where pseudo_count is positive")

    @property
    def pseudo_counts(self) -> float | np.ndarray:
        """What EM's M-step adds to the counts N_ij: alpha on each."""
        return self.pseudo_count

    def penalty(self, channel_logits: np.ndarray) -> tuple[float, np.ndarray | float]:
        """Return -(alpha/n) sum_ij log theta_ij and its gradient -(alpha/n) (1 - l theta_ij)."""
        if not self.pseudo_count or not self.n_samples:
            return NO_PENALTY
        share = self.pseudo_count / self.n_samples
        log_theta_ij = log_softmax(channel_logits, check_values=False)
        n_kept = channel_logits.shape[1]
        total = unread(log_theta_ij.sum())
        return -share * total, -share * (1 - n_kept * np.exp(log_theta_ij))


@dataclass(frozen=True)
class CModel(NoiseModel):
    """A network whose noise layer reads the features too (Eqs. 8-9), trained jointly.

    The noise layer reads h(x), the last hidden layer, beside the logits; so the network gets a
    second gradient, through h. See :class:`NoiseModel` for the flat vector and the loss. There are
    no pseudo-counts: with one noise matrix for each sample there is no row for them to be on.

    Parameters
    ----------
    network : Network
    backend : {"numpy", "numba"}, optional
    links : LinkIndex, optional
        Makes it the sparse c-model: channel weights (K, l, d), channel logits (K, l). None is the
        dense one, (K, K, d) and (K, K).
    """

    letter: ClassVar[str] = "c"
    network: Network
    backend: str | None = None
    links: LinkIndex | None = None

    def __post_init__(self) -> None:
        """Refuse wrong links."""
        _check_links(self.links, self.network.n_classes)

    @property
    def channel_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of U and B."""
        rows = (self.network.n_classes, self.n_kept)
        return {"channel_weights": (*rows, self.network.n_hidden), "channel_logits": rows}

    def forward(
        self,
        weights: np.ndarray,
        x: np.ndarray,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[tuple[np.ndarray, ...], Any]:
        """Return logits and h(x), and what the network's backward needs."""
        logits, caches = self.network.forward(weights, x, rng, buffers)
        return (logits, self.network.hidden(caches)), caches

    def _nll(
        self, outputs: Sequence[np.ndarray], channel: Sequence[np.ndarray], targets: np.ndarray
    ) -> float:
        """Take it from the posterior: one of the loss's three products of n x K x l x d."""
        log_likelihood_t = self.posterior(outputs, channel, targets).log_likelihood_t
        return -unread(log_likelihood_t.mean(dtype=np.float64))


def c_start(s_model: SModel, parameters: np.ndarray) -> tuple[CModel, np.ndarray]:
    """Return the c-model, and its parameters, that are the same function as a trained s-model.

    U = 0, B and the network's weights from the s-model (Section 3); sparse if that is sparse.
    Pseudo-counts, which a c-model does not have, stay behind.

    Parameters
    ----------
    s_model : SModel
    parameters : (s_model.n_parameters,)

    Returns
    -------
    CModel, (n_parameters,)
    """
    s_model.check_parameters(parameters)
    weights, channel_logits = s_model.unpack(parameters)
    c_model = CModel(s_model.network, s_model.backend, s_model.links)
    shape = c_model.channel_shapes["channel_weights"]
    require_memory(
        "channel_weights", shape, parameters.dtype, "use links, fewer of them or fewer features"
    )
    channel_weights = np.zeros(shape, parameters.dtype, like=parameters)
    return c_model, c_model.pack(weights, channel_weights, channel_logits)


def sparse_start(
    model: AnyNoiseModel, parameters: np.ndarray, links: LinkIndex
) -> tuple[AnyNoiseModel, np.ndarray]:
    """Return the sparse model, and its parameters, that keeps some links of a dense one.

    The kept channel parameters are the dense model's; the softmax over the links shares out anew
    what the dropped ones had. Choose links with :func:`nalayer.top_support`.

    Parameters
    ----------
    model : SModel or CModel, dense
    parameters : (model.n_parameters,)
    links : LinkIndex

    Returns
    -------
    SModel or CModel as given, now with ``links``, and (n_parameters,)

    Raises
    ------
    TypeError, ValueError
        For a model that is sparse already, and for parameters or links that do not fit.
    """
    if model.links is not None:
        raise ValueError(f"model must be dense; found {model.name}")
    model.check_parameters(parameters)
    sparse = replace(model, links=links)
    weights, *channel = model.unpack(parameters)
    return sparse, sparse.pack(weights, *(gather_links(value, links) for value in channel))


def check_pseudo_count(pseudo_count: float) -> None:
    """Refuse a pseudo-count that is negative or no number."""
    if not 0 <= pseudo_count < np.inf:
        raise ValueError(f"pseudo_count must be finite and at least 0; found {pseudo_count}")
