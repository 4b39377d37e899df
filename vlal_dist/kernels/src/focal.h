// Loss and gradient of a pair, Eqs. (1) and (3), for a float (CUDA) or a vector of them (CPU).
//
// The including file defines, for its V: fused(a, b, c), select, broadcast, bits_of, float_of,
// converted, reciprocal and exp_minus_abs; and OPTION, which makes of VLAL_OPTIONS, the names of
// LossConfig.options, fields that a call fills (CPU) or constants (CUDA). With P = sigmoid(u),
// Q = 1 - P, s = softplus(u):
//
//   loss P^g s, slope P^g (g Q s + P); detached: the second summand alone.
#ifndef VLAL_FOCAL_H
#define VLAL_FOCAL_H

#include "draw.h"

struct Loss {
  VLAL_OPTIONS
};

template <class V>
struct Focal {
  V loss, slope;
};

// log(1 + e) of e in [0, 1] by 2 atanh(t), t = e / (2 + e).
template <class V>
VLAL_INLINE V log1p_by(V t) {
  const V s = t * t;
  V p = fused(2.0f / 11.0f, s, 2.0f / 9.0f);
  p = fused(p, s, 2.0f / 7.0f);
  p = fused(p, s, 2.0f / 5.0f);
  p = fused(p, s, 2.0f / 3.0f);
  return fused(t, p * s, 2.0f * t);
}

// -log(c) where c is close to 1 (`direct`) given as 1 + x, else by mantissa and exponent of `c`.
template <class V, class Mask>
VLAL_INLINE V minus_log(V c, V x_direct, Mask direct) {
  const auto exponent = (bits_of(c) - VLAL_SQRT_HALF_BITS) >> 23;
  const V x = select(direct, x_direct, float_of(bits_of(c) - (exponent << 23)) - 1.0f);
  const V n = select(direct, V{}, converted(exponent));
  const V z = x * x, z2 = z * z;
  const V p01 = fused(-2.4999993993e-1f, x, 3.3333331174e-1f);
  const V p23 = fused(-1.6668057665e-1f, x, 2.0000714765e-1f);
  const V p45 = fused(-1.2420140846e-1f, x, 1.4249322787e-1f);
  const V p67 = fused(-1.1514610310e-1f, x, 1.1676998740e-1f);
  const V low = fused(p23, z, p01), high = fused(p67, z, p45);
  const V p = fused(fused(z2, 7.0376836292e-2f, high), z2, low);
  const V y = fused(p * x, z, fused(n, VLAL_LN2_LOW, -0.5f * z));
  return -fused(n, VLAL_LN2_HIGH, x + y);
}

// What the logits alone decide, by one division. Without a margin p = P, q = Q and
// `log_of` = e / (2 + e) for log(1 + e); with one p = p_m = P - m, q = 1 - p_m and `log_of` = P Q.
// The slope of -log(1 - p) is `pull`.
template <class V>
struct Sigmoid {
  V p, q, pull, log_of;
};

template <class V>
VLAL_INLINE Sigmoid<V> sigmoid_of(V u, V e) {
  const V one = 1.0f + e, two = 2.0f + e, r = reciprocal(one * two);
  const V large = two * r, small = e * large;
  const auto up = u >= 0.0f;
  const V p = select(up, large, small), q = select(up, small, large);
  return {p, q, p, e * one * r};
}

template <class V>
VLAL_INLINE Sigmoid<V> sigmoid_of(V z, V e, float margin) {
  const V one = 1.0f + e, unit = broadcast(1.0f);
  const auto up = z >= 0.0f;
  const V p_one = select(up, unit, e), q_one = select(up, e, unit);
  const V scaled = fused(one, margin, q_one), both = reciprocal(one * scaled), r = scaled * both;
  return {fused(p_one, r, -margin), fused(q_one, r, margin), e * both, e * r * r};
}

// `power(base, minus_log)` is base^gamma; minus_log() computes -log(base), only where it is needed.
template <bool MARGIN, bool DETACH, class V, class Power>
VLAL_INLINE Focal<V> focal([[maybe_unused]] const Loss& loss, V u, const Sigmoid<V>& x, V gamma,
                           Power power) {
  if constexpr (MARGIN) {
    // Written so that NaN is active and takes the direct branch, which keeps it.
    const auto idle = x.p <= 0.0f, far = x.q < VLAL_SQRT_HALF;
    const V entropy = minus_log(x.q, -x.p, !far);
    const V w = select(idle, V{}, power(x.p, [&] {
      return minus_log(x.p, x.p - 1.0f, !(x.p < VLAL_SQRT_HALF));
    }));
    if constexpr (DETACH) return {w * entropy, w * x.pull};
    const V focus = gamma * (x.log_of * entropy) * reciprocal(x.p);
    return {w * entropy, select(idle, V{}, w * (focus + x.pull))};
  }
  const V l = log1p_by(x.log_of), above = select(u >= 0.0f, u, V{}) + l;
  const V w = power(x.p, [&] { return select(u >= 0.0f, V{}, -u) + l; });
  return {w * above, DETACH ? w * x.p : w * fused(gamma * x.q, above, x.p)};
}

#endif
