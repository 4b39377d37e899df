// Loss and gradient of one pair on the GPU, for the type of logits (VLAL_KIND) and the loss
// (VLAL_OPTIONS) that the program is compiled for.
#ifndef VLAL_PAIR_H
#define VLAL_PAIR_H

// -log(c) of c = 1 + x; before focal.h, whose polynomial it replaces. The GPU's
// own logarithm has an absolute error of 2e-7; near 1 a series replaces it.
VLAL_INLINE float minus_log(float c, float x, bool) {
  const float y = -x;
  float series = fused(0.2f, y, 0.25f);
  series = fused(series, y, 1.0f / 3.0f);
  series = fused(series, y, 0.5f);
  series = fused(series * y, y, y);
  return select(y < 0.0625f, series, -0.693147180559945f * log2_of(c));
}

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

constexpr bool kInteger = is_whole(Loss::gamma_positive) && is_whole(Loss::gamma_negative) &&
                          is_whole(Loss::gamma_feasible) && is_whole(Loss::gamma_infeasible);
constexpr bool kMargin = Loss::margin > 0, kDetach = Loss::detach_focal != 0;

// exp(-|x|). The product is rounded, which costs a power (g + 1) |x| * 6e-8 of its accuracy: 5e-6
// before it underflows.
VLAL_INLINE float exp_minus_abs(float x) {
  return exp2_of(float_of(bits_of(x) | (int)0x80000000) * 1.44269504088896341f);
}

template <int GAMMA>
VLAL_INLINE float whole_power(float base, float square, float fourth) {
  const float one = GAMMA & 1 ? base : 1.0f, two = GAMMA & 2 ? square : 1.0f;
  return one * two * (GAMMA & 4 ? fourth : 1.0f);
}

// base^g of NEGATIVE, FEASIBLE and INFEASIBLE, by squaring where all are whole, else by
// exp(-g * -log(base)).
struct NegativePower {
  float gamma;
  int code;

  template <class MinusLog>
  VLAL_INLINE_MEMBER float operator()(float base, MinusLog minus_log) const {
    if constexpr (kInteger) {
      const float square = base * base, fourth = square * square;
      const float n = whole_power<(int)Loss::gamma_negative>(base, square, fourth);
      const float f = whole_power<(int)Loss::gamma_feasible>(base, square, fourth);
      const float i = whole_power<(int)Loss::gamma_infeasible>(base, square, fourth);
      return code == kInfeasible ? i : code == kFeasible ? f : n;
    } else {
      return gamma == 0.0f ? 1.0f : exp_minus_abs(gamma * minus_log());
    }
  }
};

struct PositivePower {
  template <class MinusLog>
  VLAL_INLINE_MEMBER float operator()(float base, MinusLog minus_log) const {
    if constexpr (kInteger) {
      return whole_power<(int)Loss::gamma_positive>(base, base * base, base * base * (base * base));
    } else {
      constexpr float gamma = Loss::gamma_positive;
      return gamma == 0.0f ? 1.0f : exp_minus_abs(gamma * minus_log());
    }
  }
};

VLAL_INLINE Focal<float> negative_pair(float z, int code) {
  const float infeasible = Loss::gamma_infeasible, feasible = Loss::gamma_feasible;
  const float negative = Loss::gamma_negative;
  const float gamma = code == kInfeasible ? infeasible : code == kFeasible ? feasible : negative;
  const float e = exp_minus_abs(z);
  const Sigmoid<float> x = kMargin ? sigmoid_of(z, e, Loss::margin) : sigmoid_of(z, e);
  return focal<kMargin, kDetach>(Loss{}, z, x, gamma, NegativePower{gamma, code});
}

VLAL_INLINE Focal<float> positive_pair(float z) {
  const Sigmoid<float> x = sigmoid_of(-z, exp_minus_abs(z));
  const float gamma = Loss::gamma_positive;
  const Focal<float> f = focal<false, kDetach>(Loss{}, -z, x, gamma, PositivePower{});
  return {f.loss, -f.slope};
}

#endif
