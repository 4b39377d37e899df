// The selective loss of Eqs. (1), (3), (4) and the draw of Fig. 3, one pass over each row.
//
// A row: codes of all attributes are laid out (infeasible, then the object's feasible ones, then
// the annotated ones, which override), the draw takes its places among the feasible ones, and one
// vector loop over the logits gives losses and gradients. Annotated positives, which know no
// margin, go through a loop of their own over a gathered copy.
//
// The compiler vectorises; nothing depends on the vector width: sums run in 16 fixed lanes. All is
// compiled without contraction; the loss asks for fma where there is one, the draw never does. Rows
// are independent, so threads change nothing.

#include <cstdint>
#include <cstring>
#include <vector>

#define VLAL_INLINE inline __attribute__((always_inline))
#include "row.h"

namespace {

// Attributes of each code. Bytes are counted in bytes, as long as these cannot overflow.
void count_terms(const uint8_t* code, int64_t size, int64_t* counts) {
  for (int64_t start = 0; start < size; start += 64 * 255) {
    const int64_t stop = start + 64 * 255 < size ? start + 64 * 255 : size;
    uint8_t lanes[4][64] = {};
    int64_t i = start;
    for (; i + 64 <= stop; i += 64) {
#pragma omp simd
      for (int l = 0; l < 64; ++l) {
        const uint8_t c = code[i + l];
        lanes[0][l] += c == kPositive;
        lanes[1][l] += c == kNegative;
        lanes[2][l] += c == kFeasible;
        lanes[3][l] += c == kInfeasible;
      }
    }
    for (; i < stop; ++i) counts[code[i]]++;
    for (int t = 0; t < 4; ++t) {
      int sum = 0;
      for (int l = 0; l < 64; ++l) sum += lanes[t][l];
      counts[t] += sum;
    }
  }
  counts[kIgnored] = size - counts[0] - counts[1] - counts[2] - counts[3];
}

// Places of the labels above 0, ascending; false if one is not -1, 0 or 1. Eight labels at a time:
// most are 0.
bool find_positives(const int8_t* label, int64_t size, std::vector<int32_t>& found) {
  constexpr uint64_t kOnes = 0x0101010101010101u;
  uint64_t wrong = 0;
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, label + i, 8);
    if (!eight) continue;
    const uint64_t negative = eight >> 7 & kOnes;
    wrong |= eight ^ (negative * 255 | (eight & kOnes));
    for (int64_t n = i; n < i + 8; ++n) {
      if (label[n] > 0) found.push_back((int32_t)n);
    }
  }
  for (; i < size; ++i) {
    if (label[i] > 0) found.push_back((int32_t)i);
    wrong |= label[i] < -1 || label[i] > 1;
  }
  return wrong == 0;
}

// Whether the attributes of a set are below `size`, ascending and distinct.
bool is_set(const int32_t* index, int64_t members, int64_t size) {
  uint32_t wrong = 0;
#pragma omp simd reduction(+ : wrong)
  for (int64_t n = 1; n < members; ++n) wrong += index[n] <= index[n - 1];
  return members == 0 || (wrong == 0 && index[0] >= 0 && index[members - 1] < size);
}

// Lays out the codes of all attributes of a row, lists its positives and counts its terms.
Problem lay_out(const Arguments& a, int64_t row, Scratch& s, bool listed, RowResult& result) {
  uint8_t* code = s.code.data();
  const int64_t size = a.attributes;
  std::memset(code, kInfeasible, size);
  // Bounds in locals: a byte stored through `code` could be anything of `a`.
  const int64_t object = a.object_id[row], first = a.feasible_indptr[object];
  const int64_t members = a.feasible_indptr[object + 1] - first;
  const int32_t* feasible = a.feasible_index + first;
  if (!s.known[object]) {
    if (!is_set(feasible, members, size)) return kBadSet;
    s.known[object] = 1;
  }
  for (int64_t n = 0; n < members; ++n) code[feasible[n]] = kFeasible;
  s.positives.clear();
  if (a.label) {
    const int8_t* label = a.label + row * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const uint8_t unannotated = label[i] < 0 ? (uint8_t)kNegative : code[i];
      code[i] = label[i] > 0 ? (uint8_t)kPositive : unannotated;
    }
    if (!find_positives(label, size, s.positives)) return kBadLabel;
  } else {
    const int32_t* annotated = a.label_code + a.label_indptr[row];
    const int64_t number = a.label_indptr[row + 1] - a.label_indptr[row];
    for (int64_t n = 0; n < number; ++n) {
      const int32_t attribute = annotated[n] >> 1;
      if (attribute < 0 || attribute >= size || code[attribute] < kFeasible) return kBadLabel;
      code[attribute] = annotated[n] & 1 ? kPositive : kNegative;
      if (annotated[n] & 1) s.positives.push_back(attribute);
    }
  }
  if (a.mode == kDraw) {
    const Problem problem = draw(a, row, s, listed);
    if (problem) return problem;
  }
  if (a.mode == kList) {
    const int32_t* drawn = a.drawn + row * a.drawn_per_row;
    for (int64_t n = 0, width = a.drawn_per_row; n < width; ++n) {
      if ((uint64_t)drawn[n] < (uint64_t)size) {
        if (code[drawn[n]] >= kFeasible) code[drawn[n]] = kIgnored;
      } else if (drawn[n] != -1) {
        return kBadDrawn;
      }
    }
  }
  if (a.mode == kIgnoreAll) {
    for (int64_t i = 0; i < size; ++i) {
      code[i] = code[i] >= kFeasible ? (uint8_t)kIgnored : code[i];
    }
  }
  if (a.mode == kMask) {
    const uint8_t* ignored = a.ignored + row * size;
    for (int64_t i = 0; i < size; ++i) {
      code[i] = code[i] >= kFeasible && ignored[i] ? (uint8_t)kIgnored : code[i];
    }
  }
  count_terms(code, size, result.counts);
  return kFine;
}

using RowLoss = void (*)(const float*, float*, int64_t, const Loss&, float, Scratch&, RowResult&);

RowLoss choose(const Loss& loss) {
  bool integer = true;
  for (const float g : {loss.gamma_positive, loss.gamma_negative, loss.gamma_feasible,
                        loss.gamma_infeasible}) {
    integer = integer && g < 8 && g == (float)(int)g;
  }
  static const RowLoss all[8] = {
      row_loss<false, false, false>, row_loss<false, false, true>, row_loss<false, true, false>,
      row_loss<false, true, true>,   row_loss<true, false, false>, row_loss<true, false, true>,
      row_loss<true, true, false>,   row_loss<true, true, true>};
  return all[4 * (loss.margin > 0) + 2 * (loss.detach_focal != 0) + integer];
}

float from_bfloat16(uint16_t value) { return vlal_as_float((int)((uint32_t)value << 16)); }

uint16_t to_bfloat16(float value) {
  const uint32_t bits = (uint32_t)vlal_as_int(value);
  if (value != value) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

int one_row(const Arguments& a, int64_t row, const Loss& loss, RowLoss row_loss, Scratch& s,
            RowResult& result) {
  const float weight = a.row_weight ? a.row_weight[row] : 1.0f;
  const int64_t from = row * a.stride, to = row * a.gradient_stride, size = a.attributes;
  const int problem = check_row(a, row, weight);
  if (problem) return problem;
  const int unfit = lay_out(a, row, s, weight != 0, result);
  if (unfit) return unfit;
  if (weight == 0) {
    const size_t width = a.kind == kFloat32 ? 4 : 2;
    std::memset((char*)a.gradient + to * width, 0, size * width);
    result = RowResult();
    return kFine;
  }
  if (a.kind == kFloat32) {
    row_loss((const float*)a.logits + from, (float*)a.gradient + to, size, loss, weight, s, result);
  } else {
    float *z = s.logits.data(), *gradient = s.gradient.data();
    if (a.kind == kBfloat16) {
      const uint16_t* in = (const uint16_t*)a.logits + from;
      for (int64_t i = 0; i < size; ++i) z[i] = from_bfloat16(in[i]);
    } else {
      const _Float16* in = (const _Float16*)a.logits + from;
      for (int64_t i = 0; i < size; ++i) z[i] = (float)in[i];
    }
    row_loss(z, gradient, size, loss, weight, s, result);
    if (a.kind == kBfloat16) {
      uint16_t* out = (uint16_t*)a.gradient + to;
      for (int64_t i = 0; i < size; ++i) out[i] = to_bfloat16(gradient[i]);
    } else {
      _Float16* out = (_Float16*)a.gradient + to;
      for (int64_t i = 0; i < size; ++i) out[i] = (_Float16)gradient[i];
    }
  }
  for (int t = 0; t < kTerms; ++t) {
    result.sums[t] *= weight;
    result.loss += result.sums[t];
  }
  return kFine;
}

}  // namespace

// Losses, gradient, sums and counts; or of the first row whose values are refused, its number times
// kProblems plus what is wrong. Then the outputs are not to be used.
extern "C" int64_t vlal_selective_loss(const Arguments* arguments, const Loss* loss) {
  const Arguments& a = *arguments;
  const RowLoss row_loss = choose(*loss);
  std::vector<RowResult> results(a.rows);
  const int ends = check_ends(a);
  if (ends) return ends;
  int64_t refused = INT64_MAX;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1) reduction(min : refused)
  {
    Scratch scratch(a);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) {
      const int problem = one_row(a, row, *loss, row_loss, scratch, results[row]);
      if (problem && row * kProblems + problem < refused) refused = row * kProblems + problem;
    }
  }
  if (refused != INT64_MAX) return refused;
  for (int t = 0; t < kTerms; ++t) a.sums[t] = a.counts[t] = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    a.per_row[row] = (float)results[row].loss;
    for (int t = 0; t < kTerms; ++t) {
      a.sums[t] += results[row].sums[t];
      a.counts[t] += results[row].counts[t];
    }
  }
  return 0;
}
