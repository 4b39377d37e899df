// The selective loss and its draw on the GPU: a team of lanes for each row, all in one launch.
//
// A team lays out the codes of its row in shared memory, draws among the feasible ones, and goes
// over the logits once. Neighbours in memory go to neighbouring lanes: rows need no alignment,
// and a row's sums are the same wherever it lies. Nothing is atomic.
#ifndef VLAL_ROWS_H
#define VLAL_ROWS_H

#include "codes.h"
#include "pair.h"

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
  vlal_u32 count[5];
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
  Element* gradient = (Element*)a.gradient + row * a.attributes;
  const float weight = a.row_weight ? a.row_weight[row] : 1.0f;
  if (weight == 0) {
    EACH_LANE(lane)
      for (int n = lane; n < size; n += kTeam) gradient[n] = from_float(0.0f);
    END_LANES
    return result;
  }
  lay_out(a, row, code, keys);
  count_codes(code, size, result);
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
      if (team == 0 && lane < 9) {
        float sum = 0;
        for (int n = 0; n < kTeams; ++n) {
          sum += lane < 4 ? done[n].sum[lane] : (float)done[n].count[lane - 4];
        }
        a.partial[block * 9 + lane] = sum;
      }
    END_LANES
  END_TEAMS
}

#endif
