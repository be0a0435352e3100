"""Kernels that take arrays as they are would read or write beyond their ends: they look first."""

import numpy as np
import pytest

import kernels

ADAM = {"n_steps": 1, "step_size": 0.1, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-8}
IMAGES, WEIGHT = np.ones((1, 4, 4, 2)), np.ones((3, 3, 2, 5))


def adam(**changes):
    arrays = {name: np.ones(4) for name in ("parameters", "gradient", "mean", "square")}
    kernels.adam_update(**(arrays | ADAM | changes))


CASES = {
    "a short gradient": (lambda: adam(gradient=np.ones(3)), r"gradient must have shape \(4,\)"),
    "too many factors": (lambda: adam(step_factors=np.ones(5)), "step_factors must be a number"),
    "no step yet": (lambda: adam(n_steps=0), "n_steps must be at least 1; found 0"),
    "every other": (lambda: adam(mean=np.ones(8)[::2]), "mean must be contiguous"),
    "rate one": (
        lambda: kernels.bias_relu_dropout(np.ones((2, 2)), np.ones(2), 1.0),
        r"rate must lie in \[0, 1\); found 1.0",
    ),
    "columns of another": (
        lambda: kernels.column_sums(np.ones((2, 3)), np.ones(2)),
        r"out must have shape \(3,\)",
    ),
    "factors that do not fit": (
        lambda: kernels.product(np.ones((2, 3)), np.ones((4, 3)), np.ones((2, 4))),
        r"a, b and out must fit as 'NN'.*found shapes \(2, 3\), \(4, 3\) and \(2, 4\)",
    ),
    "factors without a common size": (
        lambda: kernels.product(np.ones((2, 3)), np.ones((4, 5)), np.ones((2, 5))),
        "a, b and out must fit as 'NN'",
    ),
    "no such transpose": (
        lambda: kernels.product(np.ones((2, 3)), np.ones((3, 4)), np.ones((2, 4)), "NC"),
        "transpose must be one of",
    ),
    "a batch of another size": (
        lambda: kernels.gather_rows(np.ones((5, 2)), np.arange(3), np.ones((2, 2))),
        r"out must have shape \(3, 2\)",
    ),
    "a batch out of nothing": (
        lambda: kernels.gather_rows(np.ones((0, 2)), np.arange(2), np.ones((2, 2))),
        "values must hold at least one row",
    ),
    "filter too large": (lambda: kernels.conv2d(IMAGES[:, :2], WEIGHT), "images must be at least"),
    "filter not square": (lambda: kernels.conv2d(IMAGES, WEIGHT[:2]), "weight must hold square"),
    "padding below zero": (lambda: kernels.conv2d(IMAGES, WEIGHT, -1), "padding must not be"),
    "no window": (lambda: kernels.max_pool2d(IMAGES, 0), r"size must lie in 1\.\.16; found 0"),
    "a place outside its window": (
        lambda: kernels.max_pool2d_backward(
            np.full((1, 2, 2, 2), 4, np.uint8), np.ones((1, 2, 2, 2)), 2, IMAGES.shape
        ),
        r"place must lie in 0\.\.3; found 4",
    ),
    "a shape of another array": (
        lambda: kernels.max_pool2d_backward(
            np.zeros((1, 2, 2, 2), np.uint8), np.ones((1, 2, 2, 2)), 2, (1, 2, 2, 2)
        ),
        r"place must have shape \(1, 1, 1, 2\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(case):
    call, words = CASES[case]
    with pytest.raises(ValueError, match=words):
        call()
