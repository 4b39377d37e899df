// The GPU kernels; cuda.py compiles them for a run's loss. Includes no header but its own.
#include "team.h"

#ifdef VLAL_TOTALS
#include "totals.h"

extern "C" __global__ void __launch_bounds__(kThreads) vlal_totals(const Arguments a,
                                                                  const vlal_i64 blocks) {
  totals_block(a, blocks);
}
#else
#include "rows.h"

// Registers for four blocks on an SM: with more blocks the compiler spills.
extern "C" __global__ void __launch_bounds__(kThreads, 4) vlal_rows(const Arguments a) {
  extern __shared__ Words space[];
  __shared__ RowSums done[kTeams];
  rows_block(a, blockIdx.x, (unsigned char*)space, done);
}
#endif
