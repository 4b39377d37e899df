// What a row is worked on in, on the CPU.
#ifndef VLAL_SCRATCH_H
#define VLAL_SCRATCH_H

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace {

constexpr int kLanes = 16;

struct RowResult {
  double loss = 0;
  double sums[kTerms] = {};
  int64_t counts[kTerms] = {};
};

// Kept by a thread from row to row.
struct Scratch {
  std::vector<uint8_t> code;
  std::vector<float> logits, gradient, gathered;
  std::vector<int32_t> positives, taken;
  std::vector<uint32_t> words, word, keys;

  explicit Scratch(const Arguments& a) : code(a.attributes + kLanes) {
    if (a.kind == kBfloat16 || a.kind == kFloat16) {
      logits.resize(a.attributes);
      gradient.resize(a.attributes);
    }
  }
};

}  // namespace

#endif
