"""SGD and Adam, written out. An optimiser holds settings; its state is handed in and out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import kernels
from nalayer.recorded_steps import StepNumbers


class Optimiser(Protocol):
    """Settings of an update rule."""

    def initial_state(self, parameters: np.ndarray) -> Any:
        """Return the state before the first update."""

    def update(
        self,
        parameters: np.ndarray,
        gradient: np.ndarray,
        state: Any,
        step_factors: np.ndarray | float = 1.0,
    ) -> None:
        """Move the parameters downhill and the state forward, both in place."""


@dataclass(frozen=True)
class SGD:
    """Plain gradient descent: p <- p - step_size * factor * g.

    Entries of g beyond +-``clip`` are cut to that, where it is given.
    """

    step_size: float
    clip: float | None = None

    def __post_init__(self) -> None:
        """Refuse a bound that lets no gradient through."""
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or None; found {self.clip}")

    def initial_state(self, parameters: np.ndarray) -> None:
        """Return nothing: this rule remembers nothing."""

    def update(
        self,
        parameters: np.ndarray,
        gradient: np.ndarray,
        state: None,
        step_factors: np.ndarray | float = 1.0,
    ) -> None:
        """Take one step in place."""
        if self.clip is not None:
            gradient = np.clip(gradient, -self.clip, self.clip)
        parameters -= self.step_size * step_factors * gradient


@dataclass
class AdamState:
    """Moments and step count of :class:`Adam`."""

    mean: np.ndarray
    square: np.ndarray
    n_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse a negative count."""
        if self.n_steps < 0:
            raise ValueError(f"n_steps must be at least 0; found {self.n_steps}")


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2014, Algorithm 1) with the paper's defaults.

    With gradient g, step count s and per-parameter factor f (1 unless given)::

        m <- beta_1 m + (1 - beta_1) g          v <- beta_2 v + (1 - beta_2) g^2
        p <- p - step_size f  m / (1 - beta_1^s) / (sqrt(v / (1 - beta_2^s)) + epsilon)
    """

    step_size: float = 1e-3
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    backend: str | None = None

    def initial_state(self, parameters: np.ndarray) -> AdamState:
        """Return zero moments."""
        return AdamState(np.zeros_like(parameters), np.zeros_like(parameters))

    def update(
        self,
        parameters: np.ndarray,
        gradient: np.ndarray,
        state: AdamState,
        step_factors: np.ndarray | float = 1.0,
        numbers: StepNumbers | None = None,
    ) -> None:
        """Take one step in place; given ``numbers`` it is recorded, not counted."""
        if numbers is None:
            state.n_steps += 1
            corrections = None
        else:
            corrections = numbers.array(2, np.float64, lambda: self._next_corrections(state))
        kernels.adam_update(
            parameters,
            gradient,
            state.mean,
            state.square,
            state.n_steps,
            step_size=self.step_size,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            step_factors=step_factors,
            corrections=corrections,
            backend=self.backend,
        )

    def _next_corrections(self, state: AdamState) -> tuple[float, float]:
        """Count a step that was recorded, and return what it multiplies the moments by."""
        state.n_steps += 1
        return kernels.adam_corrections(self.beta_1, self.beta_2, state.n_steps)


@dataclass(frozen=True)
class Split:
    """One rule for the first parameters, the network's weights, and another for the rest."""

    first: Optimiser
    rest: Optimiser
    n_first: int

    def initial_state(self, parameters: np.ndarray) -> Any:
        """Return both rules' states."""
        n = self.n_first
        return self.first.initial_state(parameters[:n]), self.rest.initial_state(parameters[n:])

    def update(
        self,
        parameters: np.ndarray,
        gradient: np.ndarray,
        state: Any,
        step_factors: np.ndarray | float = 1.0,
        numbers: StepNumbers | None = None,
    ) -> None:
        """Take one step in place, or record it as :meth:`Adam.update` does."""
        recorded = () if numbers is None else (numbers,)
        for rule, part, own in zip(
            (self.first, self.rest),
            (slice(None, self.n_first), slice(self.n_first, None)),
            state,
            strict=True,
        ):
            factors = step_factors if np.ndim(step_factors) == 0 else step_factors[part]  # type: ignore[index]
            rule.update(parameters[part], gradient[part], own, factors, *recorded)


def can_be_recorded(optimiser: Optimiser) -> bool:
    """Return whether ``update`` takes ``numbers``: Adam, and Split made of it."""
    if type(optimiser) is Split:
        return can_be_recorded(optimiser.first) and can_be_recorded(optimiser.rest)
    return type(optimiser) is Adam


@dataclass(frozen=True)
class Projected:
    """Another rule, and after each of its steps a projection onto what parameters may be."""

    optimiser: Optimiser
    project: Callable[[np.ndarray], None]
    """changes the flat vector in place"""

    def initial_state(self, parameters: np.ndarray) -> Any:
        """Return the other rule's."""
        return self.optimiser.initial_state(parameters)

    def update(
        self,
        parameters: np.ndarray,
        gradient: np.ndarray,
        state: Any,
        step_factors: np.ndarray | float = 1.0,
    ) -> None:
        """Take one step and project, in place."""
        self.optimiser.update(parameters, gradient, state, step_factors)
        self.project(parameters)
