"""Eq. (2): the likelihood g(a | x, o), a softmax of cosine similarities over Omega_o.

Ragged rows: values of all samples end to end, sample i in `indptr[i]:indptr[i + 1]`, attributes
ascending. Rows may be empty. Stored as float32 log-likelihoods, which keep every feasible
attribute where a float16 softmax would underflow. Numpy only, so that tools need no torch.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlal_dist.errors import ConfigError, DataError

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# exp(d) = 2^n * exp(r), n = round(d / ln 2), r = d - n ln 2 in [-0.35, 0.35].
_LOG2_E = np.float32(1.44269504088896341)
# ln 2 in two parts; the first has 10 bits, so its product with n <= 129 is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Adding and subtracting 1.5 * 2^23 rounds a small float32 to the nearest integer, ties to even.
_ROUND = np.float32(12582912.0)
# exp(r) = 1 + r + r^2 Q(r); Q's coefficients, the highest power first (Cephes expf).
_EXP_HIGHEST = 1.98756915e-4
_EXP_LOWER = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 0.16666665459, 0.50000001201)
# exp overflows float32 here; clamping keeps n small and still overflows to infinity.
_LARGEST = np.float32(89.0)


def log_likelihood(similarity: Float32, indptr: Int64, *, temperature: float) -> Float32:
    """log g(a | x, o) = similarity / tau - log sum exp over the row, Eq. (2).

    Computed in float64 and rounded once; each row's likelihoods sum to 1 within float32.

    Args:
        similarity: float32 [S], cosines over each object's feasible attributes.
        indptr: int64 [N + 1], rows of `similarity`.
        temperature: tau > 0 (0.01 for CLIP: the inverse of its logit scale).

    Returns:
        float32 [S].

    Raises:
        ConfigError: tau is not positive and finite.
        DataError: `indptr` does not fit, or a similarity is not finite.
    """
    _check_temperature(temperature)
    return _log_softmax(similarity.astype(np.float64) / temperature, indptr)


def rescale(
    log_likelihood: Float32, indptr: Int64, *, temperature_from: float, temperature_to: float
) -> Float32:
    """Log-likelihoods of one temperature as those of another, Eq. (2).

    The row's constant cancels, so the similarities are not needed.

    Args:
        log_likelihood: float32 [S], at `temperature_from`.
        indptr: int64 [N + 1].
        temperature_from: tau of the input, > 0.
        temperature_to: tau of the result, > 0.

    Returns:
        float32 [S].

    Raises:
        ConfigError: a tau is not positive and finite.
        DataError: as `log_likelihood`.
    """
    _check_temperature(temperature_from)
    _check_temperature(temperature_to)
    factor = temperature_from / temperature_to
    return _log_softmax(log_likelihood.astype(np.float64) * factor, indptr)


def inverse_weights(log_likelihood: Float32, indptr: Int64) -> Float32:
    """max g / g(a) = exp(row's maximum - log-likelihood): how much later a clock of Fig. 3 runs.

    The bits are defined: single IEEE float32 operations in the order written, no library exp.
    Relative error below 3e-7 of the exponential (tested).

    Args:
        log_likelihood: float32 [S].
        indptr: int64 [N + 1].

    Returns:
        float32 [S], >= 1; infinite, meaning `cannot be drawn`, where the quotient overflows
        (a likelihood 3.4e38 times below the row's largest), or the input is NaN or infinite.

    Raises:
        DataError: `indptr` does not fit.
    """
    starts, lengths = _rows(log_likelihood, indptr)
    if not len(starts):
        return np.zeros(0, np.float32)
    values = log_likelihood.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore"):  # -inf - -inf in a row that has nothing to draw
        distance = np.repeat(np.fmax.reduceat(values, starts), lengths) - values
    usable = np.isfinite(distance)
    return np.where(usable, _exp(np.where(usable, distance, np.float32(0))), np.float32(np.inf))


def _log_softmax(logits: NDArray[np.float64], indptr: Int64) -> Float32:
    """Log of the softmax within each row; shifted by the row's maximum, as exp overflows."""
    starts, lengths = _rows(logits, indptr)
    if not np.isfinite(logits).all():
        raise DataError(
            "similarities: not all are finite, as of broken CLIP weights or too low a precision; "
            "score into a new paths.scores with scoring.precision fp32, or other weights"
        )
    if not len(starts):
        return np.zeros(0, np.float32)
    shifted = logits - np.repeat(np.maximum.reduceat(logits, starts), lengths)
    log_sum = np.log(np.add.reduceat(np.exp(shifted), starts))
    result: Float32 = (shifted - np.repeat(log_sum, lengths)).astype(np.float32)
    return result


def _check_temperature(temperature: float) -> None:
    if not (np.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature}; give a positive number (CLIP: 0.01)")


def _exp(distance: Float32) -> Float32:
    """exp of finite non-negative float32 by single multiplications and additions."""
    d = np.minimum(distance, _LARGEST)
    n = (d * _LOG2_E + _ROUND) - _ROUND
    r = (d - n * _LN2_HIGH) - n * _LN2_LOW
    q = np.full_like(r, _EXP_HIGHEST)
    for coefficient in _EXP_LOWER:  # numpy rounds a Python number to the array's float32 first
        q = q * r + coefficient
    fraction = (q * (r * r) + r) + np.float32(1)
    # 2^n in two factors: n reaches 128, which has no float32 of its own.
    half = n.astype(np.int32) >> 1
    with np.errstate(over="ignore"):
        result: Float32 = fraction * _power_of_two(half) * _power_of_two(n.astype(np.int32) - half)
    return result


def _power_of_two(n: NDArray[np.int32]) -> Float32:
    """2^n for -126 <= n <= 127, by its bits."""
    return ((n + np.int32(127)) << np.int32(23)).view(np.float32)


def _rows(values: NDArray[Any], indptr: Int64) -> tuple[Int64, Int64]:
    """Starts and lengths of the rows that are not empty."""
    lengths = np.diff(indptr)
    if len(indptr) < 1 or indptr[0] != 0 or indptr[-1] != len(values) or (lengths < 0).any():
        raise DataError(f"ragged rows: indptr must rise from 0 to {len(values)}; write them again")
    return np.asarray(indptr[:-1][lengths > 0]), lengths[lengths > 0]
