"""Counter-based random numbers for the draw of Fig. 3: Philox4x32-10 and a bit-defined -log(1 - U).

A number depends on (seed, uid, visit, attribute) and on nothing else: not on the batch, the rank,
the device or any generator's state. The key path uses integer operations and single IEEE float32
multiplications and additions in the order written here, so that every backend gets the same bits.
It must run eagerly: a compiler that contracts `a * b + c` into one fused operation changes them.

Shapes: any; all tensors of one call broadcast. 32-bit words are held in int64.
"""

import torch
from torch import Tensor

# Multipliers and key increments of Philox4x32 (Salmon et al., SC 2011).
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF

# sqrt(1/2) in float32 and its bits: where the two forms of -log(1 - U) meet.
_SQRT_HALF, _SQRT_HALF_BITS = 0.707106769084930419921875, 0x3F3504F3
# ln 2 = _LN2_HIGH + _LN2_LOW; the high part has 10 bits, so a small integer times it is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# log(1 + x) = x - x^2 / 2 + x^3 P(x) for sqrt(1/2) - 1 <= x < sqrt(2) - 1; P's coefficients, the
# highest power first (Cephes logf).
_LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words of each 128-bit counter.

    Args:
        counter: four int64 tensors in [0, 2^32), broadcast against each other.
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors in [0, 2^32), of the broadcast shape (ten rounds mix all four).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_32(c0, _MULTIPLIER_0)
        high1, low1 = _multiply_32(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def unit_exponential(word: Tensor) -> Tensor:
    """-log(1 - U) with U = (word + 1/2) / 2^32: exponential with rate 1, never 0 or infinite.

    The smallest numbers decide a race, so U is built from two exact products (one rounding), and
    near U = 1 the logarithm is taken of 1 - U built the same way from the complement. Relative
    error below 2.5e-7 (tested), range [1.16e-10, 22.9].

    Args:
        word: int64 in [0, 2^32), any shape.

    Returns:
        float32 of the same shape.
    """
    uniform = _half_open(word)
    complement = _half_open(_WORD - word)
    # complement = mantissa * 2^exponent with mantissa in [sqrt(1/2), sqrt(2)).
    bits = complement.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)
    direct = (1.0 - uniform) >= _SQRT_HALF
    x = torch.where(direct, -uniform, mantissa - 1.0)
    n = torch.where(direct, 0, exponent).to(torch.float32)
    z = x * x
    polynomial = torch.full_like(x, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        polynomial = polynomial * x + coefficient
    y = polynomial * x * z
    y = y + n * _LN2_LOW
    y = y - 0.5 * z
    return -((x + y) + n * _LN2_HIGH)


def _half_open(word: Tensor) -> Tensor:
    """(word + 1/2) / 2^32 in float32: 24 high and 8 low bits, each product exact."""
    high = (word >> 8).to(torch.float32) * 2.0**-24
    low = ((word & 0xFF).to(torch.float32) + 0.5) * 2.0**-32
    return high + low


def _multiply_32(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, by 16-bit halves: int64 cannot overflow."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
