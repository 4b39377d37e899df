// The key path of Fig. 3's draw: the bits of method/philox.py, by integer operations and single
// IEEE multiplications and additions (compile without contraction). Shared by CPU and CUDA; uses no
// header, so that NVRTC needs no include path.
#ifndef VLAL_DRAW_H
#define VLAL_DRAW_H

#include "arguments.h"

#define VLAL_M0 0xD2511F53u
#define VLAL_M1 0xCD9E8D57u
#define VLAL_W0 0x9E3779B9u
#define VLAL_W1 0xBB67AE85u
#define VLAL_SQRT_HALF 0.707106769084930419921875f
#define VLAL_SQRT_HALF_BITS 0x3F3504F3
#define VLAL_LN2_HIGH 0.693359375f
#define VLAL_LN2_LOW -2.12194440e-4f
// Orders after every key that can be drawn, infinite ones included.
#define VLAL_NOT_DRAWN 0x7FFFFFFFu
// Orders after that: the key of a weight that is no max g / g, below 1 or NaN.
#define VLAL_REFUSED 0xFFFFFFFFu

#ifdef __CUDACC__
#define vlal_as_float(bits) __int_as_float(bits)
#define vlal_as_int(value) __float_as_int(value)
#else  // a union or memcpy would keep gcc from vectorising
#define vlal_as_float(bits) __builtin_bit_cast(float, (int)(bits))
#define vlal_as_int(value) __builtin_bit_cast(int, (float)(value))
#endif

// One of the ten rounds of Philox4x32; the caller unrolls them, else compilers do not vectorise.
#define VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)      \
  {                                                    \
    const vlal_u64 p0 = (vlal_u64)VLAL_M0 * (c0);      \
    const vlal_u64 p1 = (vlal_u64)VLAL_M1 * (c2);      \
    (c0) = (vlal_u32)(p1 >> 32) ^ (c1) ^ (k0);         \
    (c1) = (vlal_u32)p1;                               \
    (c2) = (vlal_u32)(p0 >> 32) ^ (c3) ^ (k1);         \
    (c3) = (vlal_u32)p0;                               \
    (k0) += VLAL_W0;                                   \
    (k1) += VLAL_W1;                                   \
  }
#define VLAL_PHILOX(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)    \
  VLAL_PHILOX_ROUND(c0, c1, c2, c3, k0, k1)

// (word + 1/2) / 2^32: both products are exact, the sum is rounded once.
VLAL_INLINE float vlal_half_open(vlal_u32 word) {
  const float high = (float)(int)(word >> 8) * 5.9604644775390625e-8f;
  const float low = ((float)(int)(word & 0xFFu) + 0.5f) * 2.3283064365386962890625e-10f;
  return high + low;
}

// P of log(1 + x) = x - x^2 / 2 + x^3 P(x), sqrt(1/2) - 1 <= x < sqrt(2) - 1 (Cephes logf);
// MA(a, b, c) is a * b + c, contracted or not.
#define VLAL_LOG_POLYNOMIAL(MA, x)                                                        \
  MA(MA(MA(MA(MA(MA(MA(MA(7.0376836292e-2f, x, -1.1514610310e-1f), x, 1.1676998740e-1f), \
                    x, -1.2420140846e-1f), x, 1.4249322787e-1f), x, -1.6668057665e-1f),   \
           x, 2.0000714765e-1f), x, -2.4999993993e-1f), x, 3.3333331174e-1f)
#define VLAL_PLAIN(a, b, c) ((a) * (b) + (c))

// c = mantissa * 2^exponent with mantissa in [sqrt(1/2), sqrt(2)), of c > 0.
VLAL_INLINE int vlal_exponent(float c) { return (vlal_as_int(c) - VLAL_SQRT_HALF_BITS) >> 23; }

VLAL_INLINE float vlal_mantissa(float c, int exponent) {
  return vlal_as_float(vlal_as_int(c) - (int)((vlal_u32)exponent << 23));
}

// -log(c) where c is close to 1 (`direct`) given as 1 + x, else by mantissa and exponent of `c`.
VLAL_INLINE float vlal_minus_log(float c, float x_direct, int direct) {
  const int exponent = vlal_exponent(c);
  const float x = direct ? x_direct : vlal_mantissa(c, exponent) - 1.0f;
  const float n = direct ? 0.0f : (float)exponent;
  const float z = x * x;
  float y = VLAL_LOG_POLYNOMIAL(VLAL_PLAIN, x) * x * z;
  y = y + n * VLAL_LN2_LOW;
  y = y - 0.5f * z;
  return -((x + y) + n * VLAL_LN2_HIGH);
}

// The clock E of the race: -log(1 - U), rate 1.
VLAL_INLINE float vlal_unit_exponential(vlal_u32 word) {
  const float uniform = vlal_half_open(word);
  return vlal_minus_log(vlal_half_open(~word), -uniform, (1.0f - uniform) >= VLAL_SQRT_HALF);
}

// Bits of a race key; VLAL_NOT_DRAWN for an infinite weight.
VLAL_INLINE vlal_u32 vlal_key_bits(vlal_u32 word, float inverse_weight) {
  const float key = vlal_unit_exponential(word) * inverse_weight;
  const int finite = inverse_weight <= 3.402823466e+38f;
  const vlal_u32 bits = finite ? (vlal_u32)vlal_as_int(key) : VLAL_NOT_DRAWN;
  return inverse_weight >= 1.0f ? bits : VLAL_REFUSED;
}

#endif
