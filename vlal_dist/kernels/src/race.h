// The draw of Fig. 3 for one row, on the CPU.
#ifndef VLAL_RACE_H
#define VLAL_RACE_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "checks.h"
#include "draw.h"
#include "lanes.h"

namespace {

// Buffers of a thread, kept from row to row. `known`: objects whose sets were checked.
struct Scratch {
  std::vector<uint8_t> code, known;
  std::vector<float> logits, gradient, gathered;
  std::vector<int32_t> positives, taken;
  std::vector<uint32_t> words, word, keys;

  explicit Scratch(const Arguments& a) : code(a.attributes + kLanes), known(a.objects) {
    if (a.kind != kFloat32) {
      logits.resize(a.attributes);
      gradient.resize(a.attributes);
    }
  }
};

// Single loads: a gather takes longer.
__attribute__((noinline, optimize("no-tree-vectorize"))) void pick(
    const uint32_t* words, const int32_t* index, int32_t count, uint32_t* word) {
  for (int32_t n = 0; n < count; ++n) word[n] = words[index[n]];
}

struct Stream {
  uint32_t visit, uid_low, uid_high, seed_low, seed_high;
};

// Philox words of the attributes 4 g .. 4 g + 3 for g in [0, blocks), written one after the other;
// `words` has room for a multiple of 8 blocks.
#if defined(__AVX512F__)
void philox_words(int32_t blocks, const Stream& s, uint32_t* words) {
  const __m512i m0 = _mm512_set1_epi64(VLAL_M0), m1 = _mm512_set1_epi64(VLAL_M1);
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
  for (int32_t g = 0; g < blocks; g += 8) {
    // One 32-bit word in each 64-bit lane; a product reads the low half alone, so the high half
    // may hold anything until the end.
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(g), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i c1 = _mm512_set1_epi64(s.visit), c2 = _mm512_set1_epi64(s.uid_low);
    __m512i c3 = _mm512_set1_epi64(s.uid_high);
    uint32_t k0 = s.seed_low, k1 = s.seed_high;
    for (int round = 0; round < 10; ++round) {
      const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
      c1 = p1;
      c3 = p0;
      k0 += VLAL_W0;
      k1 += VLAL_W1;
    }
    const __m512i a = _mm512_or_si512(_mm512_and_si512(c0, low), _mm512_slli_epi64(c1, 32));
    const __m512i b = _mm512_or_si512(_mm512_and_si512(c2, low), _mm512_slli_epi64(c3, 32));
    _mm512_storeu_si512(words + 4 * g, _mm512_permutex2var_epi64(a, first, b));
    _mm512_storeu_si512(words + 4 * g + 16, _mm512_permutex2var_epi64(a, second, b));
  }
}
#elif defined(__AVX2__)
void philox_words(int32_t blocks, const Stream& s, uint32_t* words) {
  const __m256i m0 = _mm256_set1_epi64x(VLAL_M0), m1 = _mm256_set1_epi64x(VLAL_M1);
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
  for (int32_t g = 0; g < blocks; g += 4) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(g), _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c1 = _mm256_set1_epi64x(s.visit), c2 = _mm256_set1_epi64x(s.uid_low);
    __m256i c3 = _mm256_set1_epi64x(s.uid_high);
    uint32_t k0 = s.seed_low, k1 = s.seed_high;
    for (int round = 0; round < 10; ++round) {
      const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
      const __m256i h0 = _mm256_srli_epi64(p0, 32), h1 = _mm256_srli_epi64(p1, 32);
      c0 = _mm256_xor_si256(_mm256_xor_si256(h1, c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(h0, c3), _mm256_set1_epi64x(k1));
      c1 = p1;
      c3 = p0;
      k0 += VLAL_W0;
      k1 += VLAL_W1;
    }
    const __m256i a = _mm256_or_si256(_mm256_and_si256(c0, low), _mm256_slli_epi64(c1, 32));
    const __m256i b = _mm256_or_si256(_mm256_and_si256(c2, low), _mm256_slli_epi64(c3, 32));
    const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
    _mm256_storeu_si256((__m256i*)(words + 4 * g), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i*)(words + 4 * g + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
}
#else
void philox_words(int32_t blocks, const Stream& s, uint32_t* words) {
  for (int32_t g = 0; g < blocks; ++g) {
    uint32_t c0 = (uint32_t)g, c1 = s.visit, c2 = s.uid_low, c3 = s.uid_high;
    uint32_t k0 = s.seed_low, k1 = s.seed_high;
    VLAL_PHILOX(c0, c1, c2, c3, k0, k1)
    words[4 * g] = c0;
    words[4 * g + 1] = c1;
    words[4 * g + 2] = c2;
    words[4 * g + 3] = c3;
  }
}
#endif

// The race keys of a row's feasible attributes. Blocks are made of all attributes in order; where
// far fewer are feasible than there are, one for each of them.
void draw_keys(const Arguments& a, int64_t row, const int32_t* index, int32_t count, Scratch& s) {
  const int32_t blocks = (int32_t)((a.attributes + 3) / 4);
  const uint64_t uid = (uint64_t)a.uid[row], seed = (uint64_t)*a.seed;
  const Stream stream = {(uint32_t)a.visit[row], (uint32_t)uid, (uint32_t)(uid >> 32),
                         (uint32_t)seed, (uint32_t)(seed >> 32)};
  s.word.resize(count);
  uint32_t *word = s.word.data(), *keys = s.keys.data();
  if (blocks > 2 * count) {
#pragma omp simd
    for (int32_t n = 0; n < count; ++n) {
      uint32_t c0 = (uint32_t)index[n] >> 2, c1 = stream.visit, c2 = stream.uid_low;
      uint32_t c3 = stream.uid_high, k0 = stream.seed_low, k1 = stream.seed_high;
      VLAL_PHILOX(c0, c1, c2, c3, k0, k1)
      const uint32_t low = index[n] & 1 ? c1 : c0, high = index[n] & 1 ? c3 : c2;
      word[n] = index[n] & 2 ? high : low;
    }
  } else {
    s.words.resize(4 * ((size_t)blocks + 8));
    philox_words(blocks, stream, s.words.data());
    pick(s.words.data(), index, count, word);
  }
  if (a.weight_indptr == nullptr) {  // dense
    const float* weight = a.inverse_weight + row * a.attributes;
#pragma omp simd
    for (int32_t n = 0; n < count; ++n) keys[n] = vlal_key_bits(word[n], weight[index[n]]);
    return;
  }
  const float* weight = a.inverse_weight + a.weight_indptr[row];
#pragma omp simd
  for (int32_t n = 0; n < count; ++n) keys[n] = vlal_key_bits(word[n], weight[n]);
}

// How many keys are at most `bound`, of whole vectors of keys.
VLAL_INLINE uint32_t count_at_most(const uint32_t* keys, int32_t padded, uint32_t bound) {
  uint32_t found = 0;
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi32((int)bound);
  for (int32_t n = 0; n < padded; n += kLanes) {
    found += __builtin_popcount(_mm512_cmple_epu32_mask(_mm512_loadu_si512(keys + n), limit));
  }
#else
#pragma omp simd reduction(+ : found)
  for (int32_t n = 0; n < padded; ++n) found += keys[n] <= bound;
#endif
  return found;
}

// Attributes whose key is at most `bound`, one after the other; how many. `taken` has room for
// kLanes more.
VLAL_INLINE uint32_t take(const uint32_t* keys, const int32_t* index, int32_t size,
                          uint32_t bound, int32_t* taken) {
  uint32_t number = 0;
  int32_t n = 0;
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi32((int)bound);
  for (; n + kLanes <= size; n += kLanes) {
    const __mmask16 small = _mm512_cmple_epu32_mask(_mm512_loadu_si512(keys + n), limit);
    const __m512i ids = _mm512_loadu_si512(index + n);
    _mm512_storeu_si512(taken + number, _mm512_maskz_compress_epi32(small, ids));
    number += (uint32_t)__builtin_popcount(small);
  }
#endif
  for (; n < size; ++n) {  // no branch: it would be unpredictable
    taken[number] = index[n];
    number += keys[n] <= bound;
  }
  return number;
}

// Attributes of the `wanted` smallest keys, ascending; equal keys go to the lower attribute.
// `least` and `most` are the extremes of those that can be drawn, `usable` of them.
uint32_t smallest(const uint32_t* keys, const int32_t* index, int32_t size, uint32_t wanted,
                  uint32_t least, uint32_t most, uint32_t usable, int32_t* taken) {
  const int32_t padded = (size + kLanes - 1) / kLanes * kLanes;
  uint32_t threshold = most;
  bool exact = wanted == usable;
  while (!exact && least < most) {  // the wanted-th smallest, by halving the range of its bits
    threshold = least + (most - least) / 2;
    const uint32_t found = count_at_most(keys, padded, threshold);
    exact = found == wanted;
    if (found < wanted) {
      least = threshold + 1;
    } else {
      most = threshold;
    }
  }
  if (exact) return take(keys, index, size, threshold, taken);
  // Several keys are the wanted-th.
  uint32_t number = 0, ties = wanted - (most ? count_at_most(keys, padded, most - 1) : 0);
  for (int32_t n = 0; n < size; ++n) {
    const bool tie = keys[n] == most && ties > 0;
    if (!(keys[n] < most || tie)) continue;
    taken[number++] = index[n];
    ties -= tie;
  }
  return number;
}

// Marks kIgnored what is drawn of row `row` (Fig. 3); codes are laid out. `listed`: whether the
// drawn attributes are written out, where that is wanted.
Problem draw(const Arguments& a, int64_t row, Scratch& s, bool listed) {
  const int64_t object = a.object_id[row], first = a.feasible_indptr[object];
  const int32_t size = (int32_t)(a.feasible_indptr[object + 1] - first);
  const int32_t* index = a.feasible_index + first;
  uint8_t* code = s.code.data();
  if (a.num_ignore < 0) {
    for (int32_t n = 0; n < size; ++n) {
      if (code[index[n]] == kFeasible) code[index[n]] = kIgnored;
    }
    return kFine;
  }
  if (a.num_ignore == 0 || size == 0) return kFine;
  s.keys.resize(size + kLanes);
  uint32_t* keys = s.keys.data();
  draw_keys(a, row, index, size, s);
  std::fill_n(keys + size, kLanes, VLAL_NOT_DRAWN);
  if (a.over_unannotated) {
    for (int32_t n = 0; n < size; ++n) {
      if (code[index[n]] != kFeasible && keys[n] != VLAL_REFUSED) keys[n] = VLAL_NOT_DRAWN;
    }
  }
  uint32_t least = VLAL_NOT_DRAWN, most = 0, usable = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : usable)
  for (int32_t n = 0; n < size; ++n) {
    const uint32_t key = keys[n], drawable = key != VLAL_NOT_DRAWN;
    least = key < least ? key : least;
    const uint32_t real = drawable ? key : 0;
    most = real > most ? real : most;
    usable += drawable;
  }
  if (most == VLAL_REFUSED) return kBadWeight;
  const uint32_t wanted = (uint64_t)a.num_ignore < usable ? (uint32_t)a.num_ignore : usable;
  if (wanted == 0) return kFine;
  s.taken.resize(size + kLanes);
  int32_t* taken = s.taken.data();
  const uint32_t number = smallest(keys, index, size, wanted, least, most, usable, taken);
  for (uint32_t n = 0; n < number; ++n) {
    if (code[taken[n]] == kFeasible) code[taken[n]] = kIgnored;
  }
  if (a.drawn_out && listed) {
    std::memcpy(a.drawn_out + row * a.drawn_per_row, taken, number * sizeof(int32_t));
  }
  return kFine;
}

}  // namespace

#endif
