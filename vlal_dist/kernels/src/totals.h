// Sums and counts of a batch out of those of its blocks, in an order that never changes.
#ifndef VLAL_TOTALS_H
#define VLAL_TOTALS_H

// The greatest problem of any row ends the program; `fail` is the device's assertion.
#define PROBLEM(name, text) if (problem == name) fail("selective_loss: " text);
VLAL_INLINE void fail_of(int problem) {
#include "problems.h"
}
#undef PROBLEM

VLAL_INLINE void totals_block(const Arguments& a, vlal_i64 blocks) {
  for (int column = 0; column < 9; ++column) {
    PerLane<double> sum;
    EACH_LANE(lane)
      sum[lane] = 0;
      for (vlal_i64 n = lane; n < blocks; n += kTeam) sum[lane] += a.partial[10 * n + column];
    END_LANES
    const double total = team_reduce<Plus>(sum);
    EACH_LANE(lane)
      if (lane == 0 && column < 4) a.sums[column] = total;
      if (lane == 0 && column == 4) a.sums[kIgnored] = 0;
      if (lane == 0 && column >= 4) a.counts[column - 4] = (vlal_i64)total;
    END_LANES
  }
  PerLane<float> problem;
  EACH_LANE(lane)
    problem[lane] = kFine;
    for (vlal_i64 n = lane; n < blocks; n += kTeam) {
      const float other = a.partial[10 * n + 9];
      problem[lane] = other > problem[lane] ? other : problem[lane];
    }
  END_LANES
  fail_of((int)team_reduce<Most>(problem));
}

#endif
