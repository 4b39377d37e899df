// Loss and gradient of one pair on the GPU, for the settings that the program is compiled for:
// VLAL_KIND, VLAL_MARGIN, VLAL_DETACH and VLAL_GAMMA_POSITIVE, _NEGATIVE, _FEASIBLE, _INFEASIBLE.
#ifndef VLAL_PAIR_H
#define VLAL_PAIR_H

#include "focal.h"

#if VLAL_KIND == 0
typedef float Element;
VLAL_INLINE float to_float(Element v) { return v; }
VLAL_INLINE Element from_float(float v) { return v; }
#elif VLAL_KIND == 1
typedef unsigned short Element;
VLAL_INLINE float to_float(Element v) { return from_bfloat16(v); }
VLAL_INLINE Element from_float(float v) { return to_bfloat16(v); }
#else
typedef unsigned short Element;
VLAL_INLINE float to_float(Element v) { return from_float16(v); }
VLAL_INLINE Element from_float(float v) { return to_float16(v); }
#endif
VLAL_INLINE constexpr bool is_whole(float g) { return g >= 0 && g < 8 && g == (float)(int)g; }

constexpr bool kInteger = is_whole(VLAL_GAMMA_POSITIVE) && is_whole(VLAL_GAMMA_NEGATIVE) &&
                          is_whole(VLAL_GAMMA_FEASIBLE) && is_whole(VLAL_GAMMA_INFEASIBLE);

// exp(-|x|); the product's rounding error is put back, as ex2 is exact to two units.
VLAL_INLINE float exp_minus_abs(float x) {
  const float d = float_of(bits_of(x) | (int)0x80000000), log2_e = 1.44269504088896341f;
  const float t = d * log2_e, rest = fused(d, 1.925963033500e-8f, fused(d, log2_e, -t));
  const float e = exp2_of(t);
  return select(d < -87.33f, 0.0f, fused(e * 0.693147180559945f, rest, e));
}

template <int GAMMA>
VLAL_INLINE float whole_power(float base, float square, float fourth) {
  const float one = GAMMA & 1 ? base : 1.0f, two = GAMMA & 2 ? square : 1.0f;
  return one * two * (GAMMA & 4 ? fourth : 1.0f);
}

// base^g of the code's g, by squaring where all are whole, else by exp(-g * -log(base)).
struct Power {
  float gamma;
  int code;

  template <class MinusLog>
  VLAL_INLINE_MEMBER float operator()(float base, MinusLog minus_log) const {
    if constexpr (kInteger) {
      const float square = base * base, fourth = square * square;
      const float n = whole_power<(int)VLAL_GAMMA_NEGATIVE>(base, square, fourth);
      const float f = whole_power<(int)VLAL_GAMMA_FEASIBLE>(base, square, fourth);
      const float i = whole_power<(int)VLAL_GAMMA_INFEASIBLE>(base, square, fourth);
      const float p = whole_power<(int)VLAL_GAMMA_POSITIVE>(base, square, fourth);
      const float unannotated = code == kInfeasible ? i : f;
      return code >= kFeasible ? unannotated : code == kNegative ? n : p;
    } else {
      return gamma == 0.0f ? 1.0f : exp_minus_abs(gamma * minus_log());
    }
  }
};

VLAL_INLINE float gamma_of(int code) {
  const float unannotated = code == kInfeasible ? VLAL_GAMMA_INFEASIBLE : VLAL_GAMMA_FEASIBLE;
  const float annotated = code == kNegative ? VLAL_GAMMA_NEGATIVE : VLAL_GAMMA_POSITIVE;
  return code >= kFeasible ? unannotated : annotated;
}

VLAL_INLINE Focal<float> negative_pair(float z, int code) {
  const float gamma = gamma_of(code), e = exp_minus_abs(z);
  constexpr bool margin = VLAL_MARGIN > 0;
  const Parts<float> x = margin ? parts(z, e, VLAL_MARGIN) : parts(z, e);
  return focal<margin, VLAL_DETACH>(z, x, gamma, Power{gamma, code});
}

VLAL_INLINE Focal<float> positive_pair(float z) {
  const float gamma = VLAL_GAMMA_POSITIVE;
  const Focal<float> f = focal<false, VLAL_DETACH>(-z, parts(-z, exp_minus_abs(z)), gamma,
                                                   Power{gamma, kPositive});
  return {f.loss, -f.slope};
}

#endif
