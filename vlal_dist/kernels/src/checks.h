// What a row names lies within its tables, or the batch is refused. Shared by CPU and CUDA; labels,
// sets and inverse weights are checked where they are read.
#ifndef VLAL_CHECKS_H
#define VLAL_CHECKS_H

#include "arguments.h"

VLAL_INLINE bool lies_within(vlal_i64 first, vlal_i64 last, vlal_i64 size) {
  return 0 <= first && first <= last && last <= size;
}

VLAL_INLINE bool covers(const vlal_i64* indptr, vlal_i64 rows, vlal_i64 size) {
  return indptr[0] == 0 && indptr[rows] == size;
}

// Whether the weights of the draw are read.
VLAL_INLINE bool races(const Arguments& a) { return a.mode == kDraw && a.num_ignore > 0; }

// The ends of all offsets.
VLAL_INLINE int check_ends(const Arguments& a) {
  if (!covers(a.feasible_indptr, a.objects, a.set_size)) return kBadSet;
  if (a.label_indptr && !covers(a.label_indptr, a.rows, a.label_size)) return kBadLabel;
  if (!races(a) || !a.weight_indptr) return kFine;
  return covers(a.weight_indptr, a.rows, a.weight_size) ? kFine : kBadWeightRow;
}

// Offsets and ids of a row, and its weight.
VLAL_INLINE int check_row(const Arguments& a, vlal_i64 row, float row_weight) {
  if (!(row_weight >= 0.0f && row_weight <= 3.402823466e+38f)) return kBadRowWeight;
  const vlal_i64 object = a.object_id[row];
  if (object < 0 || object >= a.objects) return kBadObject;
  const vlal_i64 first = a.feasible_indptr[object], last = a.feasible_indptr[object + 1];
  if (!lies_within(first, last, a.set_size)) return kBadSet;
  if (last - first > (a.largest ? a.largest : a.attributes)) return kBadSet;
  if (a.label_indptr &&
      !lies_within(a.label_indptr[row], a.label_indptr[row + 1], a.label_size)) {
    return kBadLabel;
  }
  if (!races(a) || !a.weight_indptr) return kFine;
  const vlal_i64 from = a.weight_indptr[row], to = a.weight_indptr[row + 1];
  return lies_within(from, to, a.weight_size) && to - from == last - first ? kFine : kBadWeightRow;
}

#endif
