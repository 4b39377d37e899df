// The CUDA kernels on a processor: every block, phase by phase, in soiled shared memory.
#include <cstdlib>
#include <vector>

#include "team.h"

#ifdef VLAL_TOTALS
#include "totals.h"

// The text of a failed assertion, else null.
extern "C" const char* emulated(const Arguments* a, vlal_i64 blocks) {
  failed = nullptr;
  totals_block(*a, blocks);
  return failed;
}
#else
#include "rows.h"

extern "C" const char* emulated(const Arguments* a, vlal_i64 blocks) {
  const size_t bytes = (size_t)kTeams * (size_t)team_bytes(*a);
  // Exactly as large as what is launched with, so that a sanitizer sees what lies beyond.
  unsigned char* space = (unsigned char*)std::aligned_alloc(16, bytes);
  RowSums done[kTeams];
  for (vlal_i64 block = 0; block < blocks; ++block) {
    std::memset(space, 0x5A, bytes);
    std::memset(done, 0x5A, sizeof done);
    rows_block(*a, block, space, done);
  }
  std::free(space);
  return nullptr;
}
#endif
