// The loss of one row, Eqs. (1) and (3), and its gradient.
#ifndef VLAL_ROW_H
#define VLAL_ROW_H

#include <cstring>

#define OPTION(name) float name;
#include "lanes.h"

#include "focal.h"
#include "race.h"

namespace {

struct RowResult {
  double loss = 0;
  double sums[kTerms] = {};
  int64_t counts[kTerms] = {};
};

// base^g by squaring where all are whole and below 8, else by exp(-g * -log(base)).
template <bool INTEGER>
struct Power {
  Floats gamma;
  Ints bits;  // of whole exponents, the lower three

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

// Whole exponents below 8, four bits each; that of a term is got by a shift of 4 x its code.
int packed(const Loss& l) {
  return (int)l.gamma_positive | (int)l.gamma_negative << 4 * kNegative |
         (int)l.gamma_feasible << 4 * kFeasible | (int)l.gamma_infeasible << 4 * kInfeasible;
}

constexpr int kBlock = 256;

// Losses and gradients of up to kBlock attributes, a multiple of kLanes; `code` kPositive and
// kIgnored give 0. In three loops: in one, the chain from logit to loss is so long that the
// processor waits for it.
template <bool MARGIN, bool DETACH, bool INTEGER>
VLAL_INLINE void block(int64_t size, const float* z, float* gradient, const uint8_t* code,
                       const Loss& loss, float weight, Floats (&lanes)[3][kVectors]) {
  const Ints exponents = (INTEGER ? packed(loss) : 0) - Ints{};
  alignas(64) float e[kBlock], p[kBlock], q[kBlock], pull[kBlock], log_of[kBlock];
  for (int64_t i = 0; i < size; i += kWidth) store(e + i, exp_minus_abs(load(z + i)));
  for (int64_t i = 0; i < size; i += kWidth) {
    const Sigmoid<Floats> s = MARGIN ? sigmoid_of(load(z + i), load(e + i), loss.margin)
                                   : sigmoid_of(load(z + i), load(e + i));
    store(p + i, s.p);
    store(q + i, s.q);
    if (MARGIN) store(pull + i, s.pull);
    if (!MARGIN || !DETACH) store(log_of + i, s.log_of);
  }
  for (int64_t i = 0; i < size; i += kLanes) {
    for (int part = 0; part < kVectors; ++part) {
      const int64_t at = i + part * kWidth;
      const Ints term = widen(code + at);
      const Ints negative = term == (int)kNegative, feasible = term == (int)kFeasible;
      const Ints infeasible = term == (int)kInfeasible;
      const Floats unannotated = select(feasible, broadcast(loss.gamma_feasible),
                                        broadcast(loss.gamma_infeasible));
      const Floats gamma = select(negative, broadcast(loss.gamma_negative), unannotated);
      const Sigmoid<Floats> s = {load(p + at), load(q + at), MARGIN ? load(pull + at) : load(p + at),
                               !MARGIN || !DETACH ? load(log_of + at) : Floats{}};
      const Power<INTEGER> power = {gamma, exponents >> term * 4};
      const Focal<Floats> f = focal<MARGIN, DETACH>(loss, load(z + at), s, gamma, power);
      lanes[0][part] = select(negative, lanes[0][part] + f.loss, lanes[0][part]);
      lanes[1][part] = select(feasible, lanes[1][part] + f.loss, lanes[1][part]);
      lanes[2][part] = select(infeasible, lanes[2][part] + f.loss, lanes[2][part]);
      store(gradient + at, select(negative | feasible | infeasible, f.slope * weight, Floats{}));
    }
  }
}

// In the order of the lanes.
double sum_of(const Floats (&lanes)[kVectors]) {
  float one_by_one[kLanes];
  for (int part = 0; part < kVectors; ++part) store(one_by_one + part * kWidth, lanes[part]);
  double sum = 0;
  for (const float lane : one_by_one) sum += lane;
  return sum;
}

// The annotated positives, which know no margin; put back over the zeros.
template <bool DETACH, bool INTEGER>
double positive_loss(float* gradient, const Loss& loss, float weight, const Scratch& s) {
  const int64_t count = (int64_t)s.positives.size();
  const Floats gamma = broadcast(loss.gamma_positive);
  const Power<INTEGER> power = {gamma, (INTEGER ? packed(loss) : 0) - Ints{}};
  Floats lanes[kVectors] = {};
  for (int64_t n = 0; n < count; n += kLanes) {
    const int64_t here = count - n < kLanes ? count - n : kLanes;
    float u[kLanes] = {}, losses[kLanes], slope[kLanes];
    for (int64_t l = 0; l < here; ++l) u[l] = -s.gathered[n + l];
    for (int part = 0; part < kVectors; ++part) {
      const Floats here_u = load(u + part * kWidth);
      const Sigmoid<Floats> sigmoid = sigmoid_of(here_u, exp_minus_abs(here_u));
      const Focal<Floats> f = focal<false, DETACH>(loss, here_u, sigmoid, gamma, power);
      store(losses + part * kWidth, f.loss);
      store(slope + part * kWidth, -f.slope * weight);
    }
    for (int64_t l = here; l < kLanes; ++l) losses[l] = 0;
    for (int part = 0; part < kVectors; ++part) lanes[part] += load(losses + part * kWidth);
    for (int64_t l = 0; l < here; ++l) gradient[s.positives[n + l]] = slope[l];
  }
  return sum_of(lanes);
}

template <bool MARGIN, bool DETACH, bool INTEGER>
void row_loss(const float* z, float* gradient, int64_t size, const Loss& loss, float weight,
              Scratch& s, RowResult& result) {
  Floats lanes[3][kVectors] = {};
  const uint8_t* code = s.code.data();
  s.gathered.clear();  // before the gradient is written, which may lie where the logits do
  for (const int32_t attribute : s.positives) s.gathered.push_back(z[attribute]);
  const int64_t whole = size / kLanes * kLanes;
  int64_t i = 0;
  for (int64_t here; i < whole; i += here) {
    here = whole - i < kBlock ? whole - i : kBlock;
    block<MARGIN, DETACH, INTEGER>(here, z + i, gradient + i, code + i, loss, weight, lanes);
  }
  if (i < size) {
    float rest[kLanes] = {}, rest_gradient[kLanes];
    uint8_t rest_code[kLanes];
    std::memset(rest_code, kIgnored, kLanes);
    std::memcpy(rest, z + i, (size - i) * sizeof(float));
    std::memcpy(rest_code, code + i, size - i);
    block<MARGIN, DETACH, INTEGER>(kLanes, rest, rest_gradient, rest_code, loss, weight, lanes);
    std::memcpy(gradient + i, rest_gradient, (size - i) * sizeof(float));
  }
  for (int t = 0; t < 3; ++t) result.sums[kNegative + t] = sum_of(lanes[t]);
  result.sums[kPositive] = positive_loss<DETACH, INTEGER>(gradient, loss, weight, s);
}

}  // namespace

#endif
