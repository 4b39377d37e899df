// Vectors of floats as wide as the processor's registers, and their arithmetic.
//
// Compiler vector extensions, so that one text serves every instruction set; intrinsics only where
// these lack an operation. A row is processed in chunks of kLanes, kVectors vectors each: no sum
// depends on the width.
#ifndef VLAL_LANES_H
#define VLAL_LANES_H

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "draw.h"

namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kVectors = kLanes / kWidth;

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

VLAL_INLINE Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

VLAL_INLINE void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// kWidth bytes, widened.
VLAL_INLINE Ints widen(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return Ints{from[0], from[1], from[2], from[3]};
#endif
}

// a * b + c, rounded once where the processor can. In the loss, not in the draw, whose bits are
// defined without.
VLAL_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

VLAL_INLINE Floats broadcast(float value) { return value - Floats{}; }
VLAL_INLINE Floats fused(Floats a, Floats b, float c) { return fused(a, b, broadcast(c)); }
VLAL_INLINE Floats fused(Floats a, float b, Floats c) { return fused(a, broadcast(b), c); }
VLAL_INLINE Floats fused(Floats a, float b, float c) { return fused(a, b, broadcast(c)); }
VLAL_INLINE Floats fused(float a, Floats b, float c) { return fused(b, a, c); }
VLAL_INLINE Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }
// a where a bit of `bits` is set, else b.
template <int BIT>
VLAL_INLINE Floats select_bit(Ints bits, Floats a, Floats b) {
#if defined(__AVX512F__)
  const __mmask16 set = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(BIT));
  return (Floats)_mm512_mask_blend_ps(set, (__m512)b, (__m512)a);
#else
  return (bits & BIT) != 0 ? a : b;
#endif
}
VLAL_INLINE Ints bits_of(Floats v) { return (Ints)v; }
VLAL_INLINE Floats float_of(Ints bits) { return (Floats)bits; }
VLAL_INLINE Floats converted(Ints v) { return __builtin_convertvector(v, Floats); }
VLAL_INLINE Floats reciprocal(Floats v) { return 1.0f / v; }

// exp(-|x|) by Cephes expf; 0 below the smallest normal one; NaN stays NaN.
VLAL_INLINE Floats exp_minus_abs(Floats x) {
  const Floats d = float_of(bits_of(x) | (int32_t)0x80000000);
  const Floats shifted = fused(d, 1.44269504088896341f, 12582912.0f);
  const Floats n = shifted - 12582912.0f;
  const Floats r = fused(n, -VLAL_LN2_LOW, fused(n, -VLAL_LN2_HIGH, d));
  const Floats square = r * r;
  const Floats high = fused(1.98756915e-4f, r, 1.3981999507e-3f);
  const Floats middle = fused(8.3334519073e-3f, r, 4.1665795894e-2f);
  const Floats low = fused(1.6666665459e-1f, r, 5.0000001201e-1f);
  const Floats q = fused(fused(high, square, middle), square, low);
  const Floats fraction = fused(q, square, r) + 1.0f;
  const Floats power = float_of((bits_of(shifted) - (0x4B400000 - 127)) << 23);
  return select(d < -87.33f, Floats{}, fraction * power);
}

}  // namespace

#endif
