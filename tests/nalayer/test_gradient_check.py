import numpy as np
import pytest

from nalayer.gradient_check import (
    check_gradient,
    complex_step_derivative,
    fourth_order_difference,
)

AT = np.array([0.3, -1.2, 0.7])
ONE = np.array([1.0])


def smooth(x: np.ndarray) -> complex:
    return np.exp(x[0]) * np.sin(x[1]) + x[2] ** 3 * x[0]


def gradient(x: np.ndarray) -> np.ndarray:
    return np.array(
        [np.exp(x[0]) * np.sin(x[1]) + x[2] ** 3, np.exp(x[0]) * np.cos(x[1]), 3 * x[2] ** 2 * x[0]]
    )


@pytest.mark.parametrize(("method", "bound"), [("fourth-order", 1e-11), ("complex-step", 1e-15)])
@pytest.mark.parametrize("n_directions", [None, 6])
def test_a_right_gradient_passes(method, bound, n_directions):
    check = check_gradient(
        smooth,
        gradient(AT),
        AT,
        method=method,
        n_directions=n_directions,
        rng=np.random.default_rng(0),
    )
    assert check.relative_error <= bound


@pytest.mark.parametrize("method", ["fourth-order", "complex-step"])
@pytest.mark.parametrize("n_directions", [None, 6])
def test_a_gradient_with_one_wrong_entry_is_found_out(method, n_directions):
    wrong = gradient(AT) * [1, 1, 1.001]
    check = check_gradient(
        smooth, wrong, AT, method=method, n_directions=n_directions, rng=np.random.default_rng(0)
    )
    assert check.relative_error > 1e-5


def test_the_difference_is_of_fourth_order():
    """Halving the step divides the error by sixteen."""

    def error(h):
        found = fourth_order_difference(lambda x: np.exp(x[0]), np.zeros(1), ONE, h)
        return abs(found - 1)

    assert abs(error(0.1) / error(0.05) - 16) < 0.2


def test_the_complex_step_has_no_truncation_error_at_any_step():
    for step in (1e-8, 1e-30, 1e-200):
        assert complex_step_derivative(lambda x: np.exp(x[0]), np.zeros(1), ONE, step) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": np.zeros(2)}, "gradient must have shape"),
        ({"method": "guess"}, "method must be one of"),
        ({"n_directions": 3}, "rng must be given"),
        ({"n_directions": 0}, "n_directions must be at least 1 or None; found 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_gradient(smooth, options.pop("gradient", gradient(AT)), AT, **options)
