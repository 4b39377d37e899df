// The loss of one row, Eqs. (1) and (3), and its gradient.
#ifndef VLAL_FOCAL_H
#define VLAL_FOCAL_H

#include <cmath>
#include <cstring>

#include "arguments.h"
#include "draw.h"

namespace {

// In the loss, not in the draw, whose bits are defined without. Every processor since 2013 has it.
#ifdef __FMA__
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

constexpr float kLargest = 87.33f;  // exp(-87.33) is the smallest exponential that is normal

// exp(-|x|) by Cephes expf; NaN stays NaN.
VLAL_INLINE float exp_minus_abs(float x) {
  float d = -__builtin_fabsf(x);
  d = d < -kLargest ? -kLargest : d;
  const float shifted = FMA(d, 1.44269504088896341f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  const float r = FMA(n, -VLAL_LN2_LOW, FMA(n, -VLAL_LN2_HIGH, d));
  float q = 1.98756915e-4f;
  q = FMA(q, r, 1.3981999507e-3f);
  q = FMA(q, r, 8.3334519073e-3f);
  q = FMA(q, r, 4.1665795894e-2f);
  q = FMA(q, r, 1.6666665459e-1f);
  q = FMA(q, r, 5.0000001201e-1f);
  const float fraction = FMA(q, r * r, r) + 1.0f;
  const int power = (int)((uint32_t)(vlal_as_int(shifted) - 0x4B400000 + 127) << 23);
  return fraction * vlal_as_float(power);
}

// log(1 + e) of e in [0, 1] by 2 atanh(t), t = e / (2 + e).
VLAL_INLINE float log1p_by(float t) {
  const float s = t * t;
  float p = 2.0f / 11.0f;
  p = FMA(p, s, 2.0f / 9.0f);
  p = FMA(p, s, 2.0f / 7.0f);
  p = FMA(p, s, 2.0f / 5.0f);
  p = FMA(p, s, 2.0f / 3.0f);
  return FMA(t, p * s, 2.0f * t);
}

// As vlal_minus_log, with contraction.
VLAL_INLINE float minus_log(float c, float x_direct, bool direct) {
  const int exponent = vlal_exponent(c);
  const float x = direct ? x_direct : vlal_mantissa(c, exponent) - 1.0f;
  const float n = direct ? 0.0f : (float)exponent;
  const float z = x * x;
  const float p = VLAL_LOG_POLYNOMIAL(FMA, x);
  const float y = FMA(p * x, z, FMA(n, VLAL_LN2_LOW, -0.5f * z));
  return -FMA(n, VLAL_LN2_HIGH, x + y);
}

// base^g for g in 0..7 by squaring, or for any g >= 0 by exp(-g * minus_log).
template <bool INTEGER>
VLAL_INLINE float power(float base, float minus_log, float gamma, int gamma_bits) {
  if (INTEGER) {
    const float square = base * base, fourth = square * square;
    const float one = gamma_bits & 1 ? base : 1.0f;
    const float two = gamma_bits & 2 ? square : 1.0f;
    const float four = gamma_bits & 4 ? fourth : 1.0f;
    return one * two * four;
  }
  const float exponent = gamma * minus_log;
  return gamma == 0.0f ? 1.0f : exp_minus_abs(exponent);
}

struct Focal {
  float loss, slope;
};

// P^g softplus(u), P = sigmoid(u), and its derivative. One division serves P, Q and log(1 + e).
template <bool DETACH, bool INTEGER>
VLAL_INLINE Focal focal(float u, float gamma, int gamma_bits) {
  const float e = exp_minus_abs(u), one = 1.0f + e, two = 2.0f + e, r = 1.0f / (one * two);
  const float large = two * r, small = e * large;
  const float p = u >= 0 ? large : small, q = u >= 0 ? small : large;
  const float l = log1p_by(e * one * r);
  const float above = (u > 0 ? u : u != u ? u : 0.0f) + l, below = (u < 0 ? -u : 0.0f) + l;
  const float w = power<INTEGER>(p, below, gamma, gamma_bits);
  return {w * above, DETACH ? w * p : w * FMA(gamma * q, above, p)};
}

// The same with p replaced by max(p - m, 0): p_m^g * -log(1 - p_m); 0 where p <= m. With
// q_m = 1 - p_m the pull p q / q_m is e / ((1 + e)^2 q_m): one division serves it, p and q.
template <bool DETACH, bool INTEGER>
VLAL_INLINE Focal focal_margin(float z, float gamma, int gamma_bits, float margin) {
  const float e = exp_minus_abs(z), one = 1.0f + e;
  const float scaled = FMA(margin, one, z >= 0 ? e : 1.0f), r = 1.0f / (one * scaled);
  const float large = scaled * r, small = e * large, pull = e * r;
  const float p = z >= 0 ? large : small, q = z >= 0 ? small : large;
  const bool active = !(p - margin <= 0);
  const float p_m = active ? p - margin : 0.5f, q_m = q + margin;
  const float entropy = minus_log(q_m, -p_m, q_m >= VLAL_SQRT_HALF);
  const float log_p_m = INTEGER ? 0.0f : minus_log(p_m, p_m - 1.0f, p_m >= VLAL_SQRT_HALF);
  const float w = power<INTEGER>(p_m, log_p_m, gamma, gamma_bits);
  const float slope = DETACH ? w * pull : w * (gamma * p * q * entropy / p_m + pull);
  const float loss = z == z ? w * entropy : z;  // the logarithm of a NaN is made of its bits
  return {active ? loss : 0.0f, active ? slope : 0.0f};
}

// Losses and gradients of 16 attributes; `code` kPositive and kIgnored give 0.
template <bool MARGIN, bool DETACH, bool INTEGER>
VLAL_INLINE void chunk(const float* z, float* gradient, const uint8_t* code, const float* gamma,
                       const int* bits, float margin, float weight, float (*lanes)[kLanes]) {
  // In scalars: a choice among array elements would become a gather.
  const float g_n = gamma[kNegative], g_f = gamma[kFeasible], g_i = gamma[kInfeasible];
  const int b_n = bits[kNegative], b_f = bits[kFeasible], b_i = bits[kInfeasible];
  int term[kLanes];  // as wide as the floats, else the widest vectors are not used
  for (int l = 0; l < kLanes; ++l) term[l] = code[l];
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const int t = term[l];
    const bool negative = t == kNegative, feasible = t == kFeasible, infeasible = t == kInfeasible;
    const float g = infeasible ? g_i : feasible ? g_f : g_n;
    const int b = infeasible ? b_i : feasible ? b_f : b_n;
    const Focal f = MARGIN ? focal_margin<DETACH, INTEGER>(z[l], g, b, margin)
                           : focal<DETACH, INTEGER>(z[l], g, b);
    lanes[0][l] += negative ? f.loss : 0.0f;
    lanes[1][l] += feasible ? f.loss : 0.0f;
    lanes[2][l] += infeasible ? f.loss : 0.0f;
    gradient[l] = negative || feasible || infeasible ? f.slope * weight : 0.0f;
  }
}

double sum_of(const float* lanes) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

struct Exponents {
  float gamma[4];
  int bits[4];
};

template <bool MARGIN, bool DETACH, bool INTEGER>
void row_loss(const float* z, float* gradient, const Arguments& a, const Exponents& x, float weight,
              Scratch& s, RowResult& result) {
  float lanes[3][kLanes] = {};
  const float margin = (float)a.margin;
  const uint8_t* code = s.code.data();
  int64_t i = 0;
  for (; i + kLanes <= a.attributes; i += kLanes) {
    chunk<MARGIN, DETACH, INTEGER>(z + i, gradient + i, code + i, x.gamma, x.bits, margin, weight,
                                   lanes);
  }
  if (i < a.attributes) {
    float rest[kLanes] = {}, rest_gradient[kLanes];
    uint8_t rest_code[kLanes];
    std::memset(rest_code, kIgnored, kLanes);
    std::memcpy(rest, z + i, (a.attributes - i) * sizeof(float));
    std::memcpy(rest_code, code + i, a.attributes - i);
    chunk<MARGIN, DETACH, INTEGER>(rest, rest_gradient, rest_code, x.gamma, x.bits, margin, weight,
                                   lanes);
    std::memcpy(gradient + i, rest_gradient, (a.attributes - i) * sizeof(float));
  }
  for (int t = 0; t < 3; ++t) result.sums[kNegative + t] = sum_of(lanes[t]);

  const int64_t count = (int64_t)s.positives.size();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  s.gathered.assign(padded, 0.0f);
  s.gathered_gradient.resize(padded);
  for (int64_t n = 0; n < count; ++n) s.gathered[n] = -z[s.positives[n]];
  float positive_lanes[kLanes] = {};
  for (int64_t n = 0; n < padded; n += kLanes) {
    const float* u = s.gathered.data() + n;
    float* slope = s.gathered_gradient.data() + n;
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const Focal f = focal<DETACH, INTEGER>(u[l], x.gamma[kPositive], x.bits[kPositive]);
      positive_lanes[l] += n + l < count ? f.loss : 0.0f;
      slope[l] = -f.slope * weight;
    }
  }
  for (int64_t n = 0; n < count; ++n) gradient[s.positives[n]] = s.gathered_gradient[n];
  result.sums[kPositive] = sum_of(positive_lanes);
}

// The same in double, for gradcheck and as the oracle's partner; not vectorised.
void row_loss_double(const double* z, double* gradient, const Arguments& a, double weight,
                     Scratch& s, RowResult& result) {
  const auto softplus = [](double u) {
    return (u > 0 ? u : 0) + std::log1p(std::exp(-std::fabs(u)));
  };
  for (int64_t i = 0; i < a.attributes; ++i) {
    const int t = s.code[i];
    if (t == kIgnored) {
      gradient[i] = 0;
      continue;
    }
    const double u = t == kPositive ? -z[i] : z[i], g = a.gamma[t];
    const double e = std::exp(-std::fabs(u)), r = 1 / (1 + e);
    const double p = u >= 0 ? r : e * r, q = u >= 0 ? e * r : r;
    double loss, slope;
    if (t == kPositive || a.margin == 0) {
      const double above = u == u ? softplus(u) : u;
      const double w = g == 0 ? 1 : std::exp(-g * softplus(-u));
      loss = w * above;
      slope = a.detach ? w * p : w * (g * q * above + p);
    } else {
      const bool active = !(p - a.margin <= 0);
      const double p_m = active ? p - a.margin : 0.5, q_m = q + a.margin;
      const double minus_log = p_m < 0.5 ? -std::log1p(-p_m) : -std::log(q_m);
      const double w = g == 0 ? 1 : std::exp(g * std::log(p_m));
      loss = active ? w * minus_log : 0;
      const double pull = p * q / q_m;
      slope = !active ? 0 : a.detach ? w * pull : w * (g * p * q * minus_log / p_m + pull);
    }
    result.sums[t] += loss;
    gradient[i] = (t == kPositive ? -slope : slope) * weight;
  }
}

}  // namespace

#endif
