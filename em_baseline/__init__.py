"""Alternating EM for the same networks, and the statements that tie it to the joint gradient."""

import nalayer as _nalayer  # noqa: F401  (checks which package 'kernels' is)
from em_baseline.alternating import EMFit, HalfStep, LikelihoodDropWarning, fit
from em_baseline.partial import Statistics, e_step_statistics, sum_of, with_m_step
from em_baseline.steps import (
    LBFGS,
    ExpectedModel,
    MiniBatches,
    NetworkHalf,
    NoiseRegressions,
    OneGradientStep,
    e_step,
    expected_log_likelihood,
    minimise,
    noise_matrix_m_step,
)
from nalayer.completed import Completed, expected_counts

__all__ = [
    "LBFGS",
    "Completed",
    "EMFit",
    "ExpectedModel",
    "HalfStep",
    "LikelihoodDropWarning",
    "MiniBatches",
    "NetworkHalf",
    "NoiseRegressions",
    "OneGradientStep",
    "Statistics",
    "e_step",
    "e_step_statistics",
    "expected_counts",
    "expected_log_likelihood",
    "fit",
    "minimise",
    "noise_matrix_m_step",
    "sum_of",
    "with_m_step",
]
