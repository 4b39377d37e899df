// The selective loss and its draw on the GPU: a team of lanes for each row, all in one launch.
//
// A team lays out the codes of its row in shared memory, draws among the feasible ones, and goes
// over the logits once. Neighbours in memory go to neighbouring lanes: rows need no alignment,
// and a row's sums are the same wherever it lies. Nothing is atomic. The type of the logits
// (VLAL_KIND) and the loss (VLAL_OPTIONS) are constants of the program.
#ifndef VLAL_ROWS_H
#define VLAL_ROWS_H

#include "codes.h"

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

constexpr int kAhead = 4;  // logits that a lane loads before it works on the first

// Slopes of COUNT pairs of a lane, kTeam apart from `start`; their losses join `sum`.
template <int COUNT>
VLAL_INLINE void work(const Element* logits, Element* gradient, const unsigned char* code,
                      int start, float weight, float (&sum)[4]) {
  float z[COUNT], slope[COUNT];
  int is[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) z[k] = to_float(logits[start + k * kTeam]);
  bool positive = false;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    is[k] = code[start + k * kTeam];
    const Focal<float> f = negative_pair(z[k], is[k]);
    if (is[k] == kNegative) sum[kNegative] += f.loss;
    if (is[k] == kFeasible) sum[kFeasible] += f.loss;
    if (is[k] == kInfeasible) sum[kInfeasible] += f.loss;
    slope[k] = is[k] == kIgnored ? 0.0f : f.slope * weight;
    positive = positive || is[k] == kPositive;
  }
  if (positive) {  // few are
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      if (is[k] != kPositive) continue;
      const Focal<float> f = positive_pair(z[k]);
      sum[kPositive] += f.loss;
      slope[k] = f.slope * weight;
    }
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) gradient[start + k * kTeam] = from_float(slope[k]);
}

// Result of a row: its loss by term, and the number of attributes of each term.
struct RowSums {
  float sum[4];
  vlal_u32 count[5], problem;
};

VLAL_INLINE vlal_u32 bytes_of(vlal_u32 four) {
  return (four & 255) + (four >> 8 & 255) + (four >> 16 & 255) + (four >> 24);
}

// How many attributes have each code: of four at a time the bits are counted in bytes.
VLAL_INLINE void count_codes(const unsigned char* code, int size, RowSums& result) {
  PerLane<vlal_u32> low, high, both, ignored;
  EACH_LANE(lane)
    const vlal_u32 ones = 0x01010101u;
    vlal_u32 bit[4] = {};
    for (int n = lane; n < code_bytes(size) / 4; n += kTeam) {
      const vlal_u32 four = ((const vlal_u32*)code)[n];
      bit[0] += four & ones;
      bit[1] += four >> 1 & ones;
      bit[2] += four >> 2 & ones;
      bit[3] += four & four >> 1 & ones;
    }
    low[lane] = bytes_of(bit[0]);
    high[lane] = bytes_of(bit[1]);
    ignored[lane] = bytes_of(bit[2]);
    both[lane] = bytes_of(bit[3]);
  END_LANES
  const vlal_u32 idle = (vlal_u32)(code_bytes(size) - size);  // they are kInfeasible
  const vlal_u32 infeasible = team_sum(both);
  result.count[kNegative] = team_sum(low) - infeasible;
  result.count[kFeasible] = team_sum(high) - infeasible;
  result.count[kInfeasible] = infeasible - idle;
  result.count[kIgnored] = team_sum(ignored);
  result.count[kPositive] = (vlal_u32)size - result.count[kNegative] - result.count[kFeasible] -
                            result.count[kInfeasible] - result.count[kIgnored];
}

VLAL_INLINE RowSums one_row(const Arguments& a, vlal_i64 row, unsigned char* code,
                            vlal_u32* keys) {
  RowSums result = {};
  const int size = (int)a.attributes;
  const Element* logits = (const Element*)a.logits + row * a.stride;
  Element* gradient = (Element*)a.gradient + row * a.gradient_stride;
  const float weight = a.row_weight ? a.row_weight[row] : 1.0f;
  result.problem = row == 0 ? (vlal_u32)check_ends(a) : kFine;
  if (!result.problem) result.problem = (vlal_u32)check_row(a, row, weight);
  if (!result.problem) result.problem = lay_out(a, row, code, keys, weight != 0);
  if (result.problem || weight == 0) {
    EACH_LANE(lane)
      for (int n = lane; n < size; n += kTeam) gradient[n] = from_float(0.0f);
    END_LANES
    return result;
  }
  count_codes(code, size, result);
  const vlal_u32 annotated = result.count[kPositive] + result.count[kNegative];
  if (a.label_indptr && annotated != (vlal_u32)(a.label_indptr[row + 1] - a.label_indptr[row])) {
    result.problem = kBadLabel;  // a pair is annotated twice
  }
  PerLane<float> gathered[4];
  EACH_LANE(lane)
    float sum[4] = {};
    int n = lane;
    for (; n + (kAhead - 1) * kTeam < size; n += kAhead * kTeam) {
      work<kAhead>(logits, gradient, code, n, weight, sum);
    }
    for (; n < size; n += kTeam) work<1>(logits, gradient, code, n, weight, sum);
    for (int t = 0; t < 4; ++t) gathered[t][lane] = sum[t];
  END_LANES
#pragma unroll
  for (int t = 0; t < 4; ++t) result.sum[t] = team_reduce<Plus>(gathered[t]) * weight;
  return result;
}

// Bytes of shared memory that a team works in; `plan_launch` in cuda.py computes the same.
VLAL_INLINE int team_bytes(const Arguments& a) {
  return code_bytes((int)a.attributes) + (a.keys ? 0 : (4 * (int)a.largest + 15) / 16 * 16);
}

// A block: kTeams rows. `done` is shared.
VLAL_INLINE void rows_block(const Arguments& a, vlal_i64 block, unsigned char* space,
                            RowSums* done) {
  EACH_TEAM(team)
    const vlal_i64 row = block * kTeams + team;
    RowSums sums = {};
    if (row < a.rows) {
      unsigned char* own = space + (vlal_i64)team * team_bytes(a);
      vlal_u32* behind = (vlal_u32*)(own + code_bytes((int)a.attributes));
      vlal_u32* keys = a.keys ? a.keys + row * a.largest : behind;
      sums = one_row(a, row, own, keys);
    }
    EACH_LANE(lane)
      if (lane == 0) {
        done[team] = sums;
        const float loss = sums.sum[0] + sums.sum[1] + sums.sum[2] + sums.sum[3];
        if (row < a.rows) a.per_row[row] = loss;
      }
    END_LANES
  END_TEAMS
  EACH_TEAM(team)
    EACH_LANE(lane)
      if (team == 0 && lane < 10) {
        float sum = 0;
        for (int n = 0; n < kTeams; ++n) {
          if (lane < 4) sum += done[n].sum[lane];
          if (lane >= 4 && lane < 9) sum += (float)done[n].count[lane - 4];
          if (lane == 9 && (float)done[n].problem > sum) sum = (float)done[n].problem;
        }
        a.partial[block * 10 + lane] = sum;
      }
    END_LANES
  END_TEAMS
}

#endif
