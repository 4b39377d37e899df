// Sums and counts of a batch out of those of its blocks, in an order that never changes.
#ifndef VLAL_TOTALS_H
#define VLAL_TOTALS_H

VLAL_INLINE void totals_block(const Arguments& a, vlal_i64 blocks) {
  for (int column = 0; column < 9; ++column) {
    PerLane<double> sum;
    EACH_LANE(lane)
      sum[lane] = 0;
      for (vlal_i64 n = lane; n < blocks; n += kTeam) sum[lane] += a.partial[9 * n + column];
    END_LANES
    const double total = team_reduce<Plus>(sum);
    EACH_LANE(lane)
      if (lane == 0 && column < 4) a.sums[column] = total;
      if (lane == 0 && column == 4) a.sums[kIgnored] = 0;
      if (lane == 0 && column >= 4) a.counts[column - 4] = (vlal_i64)total;
    END_LANES
  }
}

#endif
