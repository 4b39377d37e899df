// Arguments of the operator, shared by CPU and CUDA; includes no header.
#ifndef VLAL_ARGUMENTS_H
#define VLAL_ARGUMENTS_H

typedef unsigned int vlal_u32;
typedef unsigned long long vlal_u64;
typedef long long vlal_i64;

enum Term : unsigned char { kPositive, kNegative, kFeasible, kInfeasible, kIgnored, kTerms };
enum Mode : int { kDraw, kList, kMask, kIgnoreAll, kIgnoreNone };
enum Kind : int { kFloat32, kBfloat16, kFloat16 };
#define PROBLEM(name, text) name,
enum Problem : int {
  kFine,
#include "problems.h"
  kProblems
};
#undef PROBLEM

// Packed field by field in arguments.py. Pointers may be null where the mode or the form of the
// labels does not need them.
struct Arguments {
  const void* logits;               // [rows, attributes], rows `stride` apart
  void* gradient;                   // as logits, rows `gradient_stride` apart; may be the logits
  const signed char* label;         // dense [rows, attributes], contiguous
  const vlal_i64* label_indptr;     // or CSR: [rows + 1], and
  const int* label_code;            // attribute * 2 + (1: present)
  const vlal_i64* object_id;        // [rows]
  const vlal_i64* feasible_indptr;  // [objects + 1]
  const int* feasible_index;        // attributes ascending
  const vlal_i64* weight_indptr;    // [rows + 1]; each row as long as its object's feasible set;
                                    // null: the weights are [rows, attributes]
  const float* inverse_weight;
  const vlal_i64* uid;              // [rows]
  const vlal_i64* visit;            // [rows]
  const vlal_i64* seed;             // [1]
  const int* drawn;                 // [rows, drawn_per_row], -1 where there are fewer
  const unsigned char* ignored;     // dense bool [rows, attributes], contiguous
  const float* row_weight;          // [rows]; null: 1
  float* per_row;                   // [rows]
  double* sums;                     // [5]
  vlal_i64* counts;                 // [5]
  int* drawn_out;                   // as drawn, -1 before; null: not wanted; rows of weight 0 keep -1
  vlal_u32* keys;                   // CUDA: [rows, largest], null where they fit shared memory
  float* partial;                   // CUDA: [blocks, 10], sums of four terms, five counts and the
                                    // greatest Problem
  vlal_i64 rows, attributes, stride, gradient_stride, drawn_per_row;
  vlal_i64 objects;                 // and the lengths of feasible_index, label_code and
  vlal_i64 set_size, label_size, weight_size;  // inverse_weight
  vlal_i64 num_ignore;              // -1: all
  vlal_i64 largest;                 // CUDA: no feasible set has more attributes
  int mode, kind, over_unannotated, threads;
};

#endif
