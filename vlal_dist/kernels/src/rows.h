// The selective loss and its draw on the GPU: a team of lanes for each row, all in one launch.
//
// A team lays out the codes of its row in shared memory, draws among the feasible ones, and goes
// over the logits once, four at a time. Rows need no alignment: vectors are aligned in memory,
// and the codes are shifted along. Sums run in an order that never changes; nothing is atomic.
#ifndef VLAL_ROWS_H
#define VLAL_ROWS_H

#include "codes.h"
#include "pair.h"

// What a lane gathers of its row.
struct Gathered {
  float sum[4];
  vlal_u32 bit[4];  // by byte: codes with bit 0, 1, 2 set, and with the first two
};

// Slopes of a vector's pairs; sums and counts of the lane.
VLAL_INLINE void work(const float* z, vlal_u32 four, float weight, float* slope, Gathered& g) {
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const int code = (int)(four >> 8 * k) & 7;
    const Focal<float> f = negative_pair(z[k], code);
    if (code == kNegative) g.sum[kNegative] += f.loss;
    if (code == kFeasible) g.sum[kFeasible] += f.loss;
    if (code == kInfeasible) g.sum[kInfeasible] += f.loss;
    slope[k] = code >= kNegative && code <= kInfeasible ? f.slope * weight : 0.0f;
  }
  const vlal_u32 ones = 0x01010101u;
  g.bit[0] += four & ones;
  g.bit[1] += four >> 1 & ones;
  g.bit[2] += four >> 2 & ones;
  g.bit[3] += four & four >> 1 & ones;
  // Whether one of the four is kPositive, which is 0; few are.
  if (!((four - ones) & ~four & 0x80808080u)) return;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if ((four >> 8 * k & 7) != kPositive) continue;
    const Focal<float> f = positive_pair(z[k]);
    g.sum[kPositive] += f.loss;
    slope[k] = f.slope * weight;
  }
}

// What becomes of a row: its loss by term, and what counts as what.
struct RowSums {
  float sum[4];
  vlal_u32 count[5];
};

VLAL_INLINE vlal_u32 bytes_of(vlal_u32 four) {
  return (four & 255) + (four >> 8 & 255) + (four >> 16 & 255) + (four >> 24);
}

VLAL_INLINE void clear_row(Element* gradient, int size) {
  EACH_LANE(lane)
    for (int n = lane; n < size; n += kTeam) gradient[n] = from_float(0.0f);
  END_LANES
}

VLAL_INLINE RowSums one_row(const Arguments& a, vlal_i64 row, unsigned char* space,
                            vlal_u32* keys) {
  RowSums result = {};
  const int size = (int)a.attributes;
  const Element* logits = (const Element*)a.logits + row * a.stride;
  Element* gradient = (Element*)a.gradient + row * a.gradient_stride;
  const float weight = a.row_weight ? a.row_weight[row] : 1.0f;
  if (weight == 0) {
    clear_row(gradient, size);
    return result;
  }
  const int shift = (int)((vlal_u64)logits / sizeof(Element) % kVector);
  const int vectors = (shift + size + kVector - 1) / kVector;
  const Codes codes = {space, space + shift, shift, (vectors * kVector + 15) / 16 * 16};
  lay_out(a, row, codes, keys);
  const bool together = shift == (int)((vlal_u64)gradient / sizeof(Element) % kVector);
  PerLane<Gathered> gathered;
  EACH_LANE(lane)
    Gathered g = {};
    for (int v = lane; v < vectors; v += kTeam) {
      const int start = v * kVector - shift;
      const bool whole = together && start >= 0 && start + kVector <= size;
      float z[kVector], slope[kVector];
      if (whole) {
        const Vector in = *(const Vector*)(logits + start);
#pragma unroll
        for (int k = 0; k < kVector; ++k) z[k] = to_float(in.value[k]);
      } else {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const bool inside = start + k >= 0 && start + k < size;
          z[k] = inside ? to_float(logits[start + k]) : 0.0f;
        }
      }
      work(z, *(const vlal_u32*)(codes.base + v * kVector), weight, slope, g);
      if (whole) {
        Vector out;
#pragma unroll
        for (int k = 0; k < kVector; ++k) out.value[k] = from_float(slope[k]);
        *(Vector*)(gradient + start) = out;
      } else {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const bool inside = start + k >= 0 && start + k < size;
          if (inside) gradient[start + k] = from_float(slope[k]);
        }
      }
    }
    gathered[lane] = g;
  END_LANES
  PerLane<float> sum;
  PerLane<vlal_u32> count;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    EACH_LANE(lane)
      sum[lane] = gathered[lane].sum[t];
      count[lane] = bytes_of(gathered[lane].bit[t]);
    END_LANES
    result.sum[t] = team_reduce<Plus>(sum) * weight;
    result.count[t] = team_sum(count);
  }
  const vlal_u32 low = result.count[0], high = result.count[1], both = result.count[3];
  const vlal_u32 ignored = result.count[2] - (vlal_u32)(vectors * kVector - size);
  result.count[kPositive] = (vlal_u32)size - low - high + both - ignored;
  result.count[kNegative] = low - both;
  result.count[kFeasible] = high - both;
  result.count[kInfeasible] = both;
  result.count[kIgnored] = ignored;
  return result;
}

// Bytes of shared memory that a team works in; cuda.py knows this too.
VLAL_INLINE int team_bytes(const Arguments& a) {
  const int codes = ((int)a.attributes + 2 * kVector + 15) / 16 * 16;
  return codes + (a.keys ? 0 : (4 * (int)a.largest + 15) / 16 * 16);
}

// A block: kTeams rows. `done` is shared.
VLAL_INLINE void rows_block(const Arguments& a, vlal_i64 block, unsigned char* space,
                            RowSums* done) {
  EACH_TEAM(team)
    const vlal_i64 row = block * kTeams + team;
    RowSums sums = {};
    if (row < a.rows) {
      const int codes = ((int)a.attributes + 2 * kVector + 15) / 16 * 16;
      unsigned char* own = space + (vlal_i64)team * team_bytes(a);
      vlal_u32* keys = a.keys ? a.keys + row * a.largest : (vlal_u32*)(own + codes);
      sums = one_row(a, row, own, keys);
    }
    EACH_LANE(lane)
      if (lane == 0) {
        done[team] = sums;
        const float loss = sums.sum[0] + sums.sum[1] + sums.sum[2] + sums.sum[3];
        if (row < a.rows) ((float*)a.per_row)[row] = loss;
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
