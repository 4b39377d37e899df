// The loss of one row, Eqs. (1) and (3), and its gradient.
#ifndef VLAL_ROW_H
#define VLAL_ROW_H

#include <cmath>
#include <cstring>

#include "draw.h"
#include "scratch.h"
#include "lanes.h"

#include "focal.h"

namespace {

// Exponents of the terms: as numbers, and where all are whole and below 8 as bits.
struct Exponents {
  float gamma[4];
  int32_t bits[4];
};

// base^g by squaring where all are whole, else by exp(-g * -log(base)).
template <bool INTEGER>
struct Power {
  Floats gamma;
  Ints bits;

  template <class MinusLog>
  VLAL_INLINE Floats operator()(Floats base, MinusLog minus_log) const {
    if constexpr (INTEGER) {
      const Floats square = base * base, fourth = square * square;
      Floats w = select_bit<1>(bits, base, broadcast(1.0f));
      w = select_bit<2>(bits, w * square, w);
      return select_bit<4>(bits, w * fourth, w);
    } else {
      return select(gamma == 0.0f, broadcast(1.0f), exp_minus_abs(gamma * minus_log()));
    }
  }
};

// The exponents of a chunk by code; 0 where it has none.
Table table_of(const void* four) {
  int32_t eight[8] = {};
  std::memcpy(eight, four, 4 * sizeof(int32_t));
  return Table(eight);
}

constexpr int kBlock = 256;

// Losses and gradients of up to kBlock attributes, a multiple of kLanes; `code` kPositive and
// kIgnored give 0. In three loops: in one, the chain from logit to loss is so long that the
// processor waits for it.
template <bool MARGIN, bool DETACH, bool INTEGER>
VLAL_INLINE void block(int64_t size, const float* z, float* gradient, const uint8_t* code,
                       const Table& gammas, const Table& exponents, float margin, float weight,
                       Floats (&lanes)[3][kParts]) {
  alignas(64) float e[kBlock], p[kBlock], q[kBlock], pull[kBlock], log_of[kBlock];
  for (int64_t i = 0; i < size; i += kWidth) store(e + i, exp_minus_abs(load(z + i)));
  for (int64_t i = 0; i < size; i += kWidth) {
    const Parts<Floats> x = MARGIN ? parts(load(z + i), load(e + i), margin)
                                   : parts(load(z + i), load(e + i));
    store(p + i, x.p);
    store(q + i, x.q);
    if (MARGIN) store(pull + i, x.pull);
    if (!MARGIN || !DETACH) store(log_of + i, x.log_of);
  }
  for (int64_t i = 0; i < size; i += kLanes) {
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = i + part * kWidth;
      const Ints term = widen(code + at);
      const Ints negative = term == (int)kNegative, feasible = term == (int)kFeasible;
      const Ints infeasible = term == (int)kInfeasible;
      const Floats gamma = float_of(gammas.at(term));
      const Parts<Floats> x = {load(p + at), load(q + at), MARGIN ? load(pull + at) : load(p + at),
                               !MARGIN || !DETACH ? load(log_of + at) : Floats{}};
      const Focal<Floats> f = focal<MARGIN, DETACH>(load(z + at), x, gamma,
                                                    Power<INTEGER>{gamma, exponents.at(term)});
      lanes[0][part] = select(negative, lanes[0][part] + f.loss, lanes[0][part]);
      lanes[1][part] = select(feasible, lanes[1][part] + f.loss, lanes[1][part]);
      lanes[2][part] = select(infeasible, lanes[2][part] + f.loss, lanes[2][part]);
      store(gradient + at, select(negative | feasible | infeasible, f.slope * weight, Floats{}));
    }
  }
}

// In the order of the lanes.
double sum_of(const Floats (&lanes)[kParts]) {
  float one_by_one[kLanes];
  for (int part = 0; part < kParts; ++part) store(one_by_one + part * kWidth, lanes[part]);
  double sum = 0;
  for (const float lane : one_by_one) sum += lane;
  return sum;
}

// The annotated positives, which know no margin; put back over the zeros.
template <bool DETACH, bool INTEGER>
double positive_loss(float* gradient, const Exponents& x, float weight, const Scratch& s) {
  const int64_t count = (int64_t)s.positives.size();
  const Floats gamma = broadcast(x.gamma[kPositive]);
  const Power<INTEGER> power = {gamma, Ints{} + x.bits[kPositive]};
  Floats lanes[kParts] = {};
  for (int64_t n = 0; n < count; n += kLanes) {
    const int64_t here = count - n < kLanes ? count - n : kLanes;
    float u[kLanes] = {}, loss[kLanes], slope[kLanes];
    for (int64_t l = 0; l < here; ++l) u[l] = -s.gathered[n + l];
    for (int part = 0; part < kParts; ++part) {
      const Floats here_u = load(u + part * kWidth);
      const Focal<Floats> f =
          focal<false, DETACH>(here_u, parts(here_u, exp_minus_abs(here_u)), gamma, power);
      store(loss + part * kWidth, f.loss);
      store(slope + part * kWidth, -f.slope * weight);
    }
    for (int64_t l = here; l < kLanes; ++l) loss[l] = 0;
    for (int part = 0; part < kParts; ++part) lanes[part] += load(loss + part * kWidth);
    for (int64_t l = 0; l < here; ++l) gradient[s.positives[n + l]] = slope[l];
  }
  return sum_of(lanes);
}

template <bool MARGIN, bool DETACH, bool INTEGER>
void row_loss(const float* z, float* gradient, const Arguments& a, const Exponents& x, float weight,
              Scratch& s, RowResult& result) {
  Floats lanes[3][kParts] = {};
  const Table gammas = table_of(x.gamma), exponents = table_of(x.bits);
  const float margin = (float)a.margin;
  const uint8_t* code = s.code.data();
  s.gathered.clear();  // before the gradient is written, which may be in the logits' place
  for (const int32_t attribute : s.positives) s.gathered.push_back(z[attribute]);
  const int64_t whole = a.attributes / kLanes * kLanes;
  int64_t i = 0;
  for (int64_t size; i < whole; i += size) {
    size = whole - i < kBlock ? whole - i : kBlock;
    block<MARGIN, DETACH, INTEGER>(size, z + i, gradient + i, code + i, gammas, exponents, margin,
                                   weight, lanes);
  }
  if (i < a.attributes) {
    float rest[kLanes] = {}, rest_gradient[kLanes];
    uint8_t rest_code[kLanes];
    std::memset(rest_code, kIgnored, kLanes);
    std::memcpy(rest, z + i, (a.attributes - i) * sizeof(float));
    std::memcpy(rest_code, code + i, a.attributes - i);
    block<MARGIN, DETACH, INTEGER>(kLanes, rest, rest_gradient, rest_code, gammas, exponents,
                                   margin, weight, lanes);
    std::memcpy(gradient + i, rest_gradient, (a.attributes - i) * sizeof(float));
  }
  for (int t = 0; t < 3; ++t) result.sums[kNegative + t] = sum_of(lanes[t]);
  result.sums[kPositive] = positive_loss<DETACH, INTEGER>(gradient, x, weight, s);
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
