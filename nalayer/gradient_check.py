"""Is a hand-written gradient right? Differences of fourth order, complex step, random directions.

Fourth-order central differences need the function at four points and reach about 1e-11 of its
size with the default step. The complex step reaches rounding, but needs a function that goes
through with complex arguments. Both assume a smooth function: with ReLU, a step that crosses a
kink shows up as an error of the difference, not of the gradient. The complex step, being
infinitesimal, does not cross any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import checks

# Balances the truncation error h^4 against the rounding error eps / h.
FOURTH_ORDER_STEP = float(np.finfo(np.float64).eps ** 0.2)
COMPLEX_STEP = 1e-30


def fourth_order_difference(
    function: Callable[[np.ndarray], float],
    at: np.ndarray,
    direction: np.ndarray,
    step: float = FOURTH_ORDER_STEP,
) -> float:
    r"""Return the derivative of ``function`` along ``direction``, to fourth order in the step.

    .. math:: \frac{-f(x+2hd) + 8f(x+hd) - 8f(x-hd) + f(x-2hd)}{12h}

    Examples
    --------
    >>> import numpy as np
    >>> d = fourth_order_difference(lambda x: np.exp(x[0]), np.array([1.0]), np.array([1.0]))
    >>> bool(abs(d - np.e) < 1e-11)
    True
    """
    f1, f_1 = function(at + step * direction), function(at - step * direction)
    f2, f_2 = function(at + 2 * step * direction), function(at - 2 * step * direction)
    return (8 * (f1 - f_1) - (f2 - f_2)) / (12 * step)


def complex_step_derivative(
    function: Callable[[np.ndarray], complex],
    at: np.ndarray,
    direction: np.ndarray,
    step: float = COMPLEX_STEP,
) -> float:
    r"""Return the derivative along ``direction`` as :math:`\mathrm{Im} f(x + ihd) / h`.

    No two numbers are subtracted, so the step can be as small as one likes.

    Examples
    --------
    >>> import numpy as np
    >>> complex_step_derivative(lambda x: np.exp(x[0]), np.array([0.0]), np.array([1.0]))
    1.0
    """
    return float(np.imag(function(at + 1j * step * direction)) / step)


METHODS: dict[str, Callable[..., float]] = {
    "fourth-order": fourth_order_difference,
    "complex-step": complex_step_derivative,
}


@dataclass(frozen=True)
class GradientCheck:
    """What :func:`check_gradient` found."""

    error: float
    """largest difference between claimed and measured derivative over all directions"""
    scale: float
    """largest derivative measured, at least the tiniest normal number"""

    @property
    def relative_error(self) -> float:
        """``error / scale``."""
        return self.error / self.scale


def check_gradient(
    function: Callable[[np.ndarray], complex],
    gradient: np.ndarray,
    at: np.ndarray,
    *,
    method: str = "fourth-order",
    n_directions: int | None = None,
    rng: np.random.Generator | None = None,
    step: float | None = None,
) -> GradientCheck:
    """Compare a claimed gradient with derivatives measured along many directions.

    Parameters
    ----------
    function : callable
        Maps a flat float64 vector to a scalar; for "complex-step" it has to accept complex input.
    gradient : (p,)
        The claim, at ``at``.
    at : (p,)
        The point. Not zero weights: there, wrong paths carry no signal and stay hidden.
    method : {"fourth-order", "complex-step"}
    n_directions : int, optional
        None checks every coordinate. For large nets, so many random unit directions: an error
        anywhere in the gradient shows in almost every one of them.
    rng : Generator
        Needed for random directions.
    step : float, optional

    Returns
    -------
    GradientCheck

    Raises
    ------
    TypeError, ValueError
        For what are no two vectors of one length, NaN or +inf in ``at``, an unknown method, or
        random directions without ``rng``. NaN in ``gradient`` is a wrong claim: the error is NaN.
    """
    checks.check_floats("at", at, ("p",))
    checks.check_floats("gradient", gradient, at.shape)
    if not (at < np.inf).all():  # -inf, a zero of a noise matrix, stays where it is
        raise ValueError("at must hold no NaN or +inf")
    if not at.size:
        raise ValueError("at must hold at least one number; found none")
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}; found {method!r}")
    if n_directions is None:
        directions = np.eye(at.size)
    elif n_directions < 1:
        raise ValueError(f"n_directions must be at least 1 or None; found {n_directions}")
    elif rng is None:
        raise ValueError("rng must be given to draw random directions; found None")
    else:
        directions = rng.normal(size=(n_directions, at.size))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    steps = {} if step is None else {"step": step}
    measured = np.array([METHODS[method](function, at, d, **steps) for d in directions])
    return GradientCheck(
        float(np.abs(measured - directions @ gradient).max()),
        max(float(np.abs(measured).max()), float(np.finfo(np.float64).tiny)),
    )
