// What the operator is given, and what a row is worked on in.
#ifndef VLAL_ARGUMENTS_H
#define VLAL_ARGUMENTS_H

#include <cstdint>
#include <vector>

namespace {

constexpr int kLanes = 16;

enum Term : uint8_t { kPositive, kNegative, kFeasible, kInfeasible, kIgnored, kTerms };
enum Mode : int32_t { kDraw, kList, kIgnoreAll, kIgnoreNone, kMask };
enum Kind : int32_t { kFloat32, kBfloat16, kFloat16, kFloat64 };

}  // namespace

// Mirrored field by field in cpu.py. Pointers may be null where the mode or the form of the labels
// does not need them.
struct Arguments {
  const void* logits;             // [rows, attributes], rows `stride` elements apart
  void* gradient;                 // [rows, attributes], contiguous
  const int8_t* label;            // dense [rows, attributes], contiguous
  const int64_t* label_indptr;    // or CSR: [rows + 1], and
  const int32_t* label_code;      // attribute * 2 + (1: present)
  const int64_t* object_id;       // [rows]
  const int64_t* feasible_indptr; // [objects + 1]
  const int32_t* feasible_index;  // attributes ascending
  const int64_t* weight_indptr;   // [rows + 1]; each row as long as its object's feasible set
  const float* inverse_weight;
  const int64_t* uid;             // [rows]
  const int64_t* visit;           // [rows]
  const int64_t* seed;            // [1]
  const int32_t* drawn;           // [rows, drawn_per_row], -1 where there are fewer
  const uint8_t* ignored;         // dense bool [rows, attributes], contiguous
  const float* row_weight;        // [rows]; null: 1
  void* per_row;                  // float, or double for double logits
  double* sums;                   // [5]
  int64_t* counts;                // [5]
  int32_t* drawn_out;             // [rows, drawn_per_row]; null: not wanted
  int64_t rows, attributes, stride, num_ignore, drawn_per_row;  // num_ignore -1: all
  double gamma[4];
  double margin;
  int32_t mode, kind, detach, over_unannotated, threads;
};

namespace {

struct RowResult {
  double loss = 0;
  double sums[kTerms] = {};
  int64_t counts[kTerms] = {};
};

// What a thread works in, kept from row to row.
struct Scratch {
  std::vector<uint8_t> code;
  std::vector<float> logits, gradient;
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
