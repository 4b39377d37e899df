// The selective loss of Eqs. (1), (3), (4) and the draw of Fig. 3, one pass over each row.
//
// A row: codes of all attributes are laid out (infeasible, then the object's feasible ones, then
// the annotated ones, which override), the draw takes its places among the feasible ones, and one
// vector loop over the logits gives losses and gradients. Annotated positives, which know no margin,
// go through a loop of their own over a gathered copy.
//
// The compiler vectorises; nothing here depends on the vector width: sums run in 16 fixed lanes, and
// the file is compiled without contraction; the loss asks for fma where there is one, the draw never
// does. Rows are independent, so threads change nothing.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define VLAL_INLINE static inline __attribute__((always_inline))
#include "draw.h"

namespace {

// In the loss, not in the draw, whose bits are defined without. Every processor since 2013 has it.
#ifdef __FMA__
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

constexpr int kLanes = 16;
constexpr float kLargest = 87.33f;  // exp(-87.33) is the smallest exponential that is normal

enum Term : uint8_t { kPositive, kNegative, kFeasible, kInfeasible, kIgnored, kTerms };
enum Mode : int32_t { kDraw, kList, kIgnoreAll, kIgnoreNone, kMask };
enum Kind : int32_t { kFloat32, kBfloat16, kFloat16, kFloat64 };

}  // namespace

// Mirrored field by field in cpu.py. Pointers may be null where the mode or the form of the labels
// does not need them.
struct Arguments {
  const void* logits;             // [rows, attributes], rows `stride` elements apart
  void* gradient;                 // [rows, attributes], contiguous; null: not wanted
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

// What a thread works in; sized once.
struct Scratch {
  std::vector<uint8_t> code;
  std::vector<float> logits, gradient, gathered, gathered_gradient;
  std::vector<int32_t> positives, taken;
  std::vector<uint32_t> words, word, keys;

  explicit Scratch(const Arguments& a) : code(a.attributes + kLanes) {
    if (a.kind == kBfloat16 || a.kind == kFloat16) {
      logits.resize(a.attributes);
      gradient.resize(a.attributes);
    }
  }
};

// exp(-|x|) by Cephes expf; NaN stays NaN.
VLAL_INLINE float exp_minus_abs(float x) {
  float d = -__builtin_fabsf(x);
  d = d < -kLargest ? -kLargest : d;
  const float shifted = FMA(d, 1.44269504088896341f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  const float r = FMA(n, -VLAL_LN2_LOW, FMA(n, -VLAL_LN2_HIGH, d));
  float q = 1.98756915e-4f;
  q = FMA(q, r, 1.3981999507e-3f);
  q = FMA(q, r, 8.3334519073e-3f);
  q = FMA(q, r, 4.1665795894e-2f);
  q = FMA(q, r, 1.6666665459e-1f);
  q = FMA(q, r, 5.0000001201e-1f);
  const float fraction = FMA(q, r * r, r) + 1.0f;
  const int power = (int)((uint32_t)(vlal_as_int(shifted) - 0x4B400000 + 127) << 23);
  return fraction * vlal_as_float(power);
}

// log(1 + e) of e in [0, 1] by 2 atanh(t), t = e / (2 + e).
VLAL_INLINE float log1p_by(float t) {
  const float s = t * t;
  float p = 2.0f / 11.0f;
  p = FMA(p, s, 2.0f / 9.0f);
  p = FMA(p, s, 2.0f / 7.0f);
  p = FMA(p, s, 2.0f / 5.0f);
  p = FMA(p, s, 2.0f / 3.0f);
  return FMA(t, p * s, 2.0f * t);
}

// As vlal_minus_log, with contraction.
VLAL_INLINE float minus_log(float c, float x_direct, bool direct) {
  const int bits = vlal_as_int(c);
  const int exponent = (bits - VLAL_SQRT_HALF_BITS) >> 23;
  const float mantissa = vlal_as_float(bits - (int)((uint32_t)exponent << 23));
  const float x = direct ? x_direct : mantissa - 1.0f;
  const float n = direct ? 0.0f : (float)exponent;
  const float z = x * x;
  float p = 7.0376836292e-2f;
  p = FMA(p, x, -1.1514610310e-1f);
  p = FMA(p, x, 1.1676998740e-1f);
  p = FMA(p, x, -1.2420140846e-1f);
  p = FMA(p, x, 1.4249322787e-1f);
  p = FMA(p, x, -1.6668057665e-1f);
  p = FMA(p, x, 2.0000714765e-1f);
  p = FMA(p, x, -2.4999993993e-1f);
  p = FMA(p, x, 3.3333331174e-1f);
  const float y = FMA(p * x, z, FMA(n, VLAL_LN2_LOW, -0.5f * z));
  return -FMA(n, VLAL_LN2_HIGH, x + y);
}

// base^g for g in 0..7 by squaring, or for any g >= 0 by exp(-g * minus_log).
template <bool INTEGER>
VLAL_INLINE float power(float base, float minus_log, float gamma, int gamma_bits) {
  if (INTEGER) {
    const float square = base * base, fourth = square * square;
    const float one = gamma_bits & 1 ? base : 1.0f;
    const float two = gamma_bits & 2 ? square : 1.0f;
    const float four = gamma_bits & 4 ? fourth : 1.0f;
    return one * two * four;
  }
  const float exponent = gamma * minus_log;
  return gamma == 0.0f ? 1.0f : exp_minus_abs(exponent);
}

struct Focal {
  float loss, slope;
};

// P^g softplus(u), P = sigmoid(u), and its derivative. One division serves P, Q and log(1 + e).
template <bool DETACH, bool INTEGER>
VLAL_INLINE Focal focal(float u, float gamma, int gamma_bits) {
  const float e = exp_minus_abs(u), one = 1.0f + e, two = 2.0f + e, r = 1.0f / (one * two);
  const float large = two * r, small = e * large;
  const float p = u >= 0 ? large : small, q = u >= 0 ? small : large;
  const float l = log1p_by(e * one * r);
  const float above = (u > 0 ? u : u != u ? u : 0.0f) + l, below = (u < 0 ? -u : 0.0f) + l;
  const float w = power<INTEGER>(p, below, gamma, gamma_bits);
  return {w * above, DETACH ? w * p : w * FMA(gamma * q, above, p)};
}

// The same with p replaced by max(p - m, 0): p_m^g * -log(1 - p_m); 0 where p <= m. With
// q_m = 1 - p_m the pull p q / q_m is e / ((1 + e)^2 q_m): one division serves it, p and q.
template <bool DETACH, bool INTEGER>
VLAL_INLINE Focal focal_margin(float z, float gamma, int gamma_bits, float margin) {
  const float e = exp_minus_abs(z), one = 1.0f + e;
  const float scaled = FMA(margin, one, z >= 0 ? e : 1.0f), r = 1.0f / (one * scaled);
  const float large = scaled * r, small = e * large, pull = e * r;
  const float p = z >= 0 ? large : small, q = z >= 0 ? small : large;
  const bool active = !(p - margin <= 0);
  const float p_m = active ? p - margin : 0.5f, q_m = q + margin;
  const float entropy = minus_log(q_m, -p_m, q_m >= VLAL_SQRT_HALF);
  const float log_p_m = INTEGER ? 0.0f : minus_log(p_m, p_m - 1.0f, p_m >= VLAL_SQRT_HALF);
  const float w = power<INTEGER>(p_m, log_p_m, gamma, gamma_bits);
  const float slope = DETACH ? w * pull : w * (gamma * p * q * entropy / p_m + pull);
  const float loss = z == z ? w * entropy : z;  // the logarithm of a NaN is made of its bits
  return {active ? loss : 0.0f, active ? slope : 0.0f};
}

// Losses and gradients of 16 attributes; `code` kPositive and kIgnored give 0.
template <bool MARGIN, bool DETACH, bool INTEGER>
VLAL_INLINE void chunk(const float* z, float* gradient, const uint8_t* code, const float* gamma,
                       const int* bits, float margin, float weight, float (*lanes)[kLanes]) {
  // In scalars: a choice among array elements would become a gather.
  const float g_n = gamma[kNegative], g_f = gamma[kFeasible], g_i = gamma[kInfeasible];
  const int b_n = bits[kNegative], b_f = bits[kFeasible], b_i = bits[kInfeasible];
  int term[kLanes];  // as wide as the floats, else the widest vectors are not used
  for (int l = 0; l < kLanes; ++l) term[l] = code[l];
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const int t = term[l];
    const bool negative = t == kNegative, feasible = t == kFeasible, infeasible = t == kInfeasible;
    const float g = infeasible ? g_i : feasible ? g_f : g_n;
    const int b = infeasible ? b_i : feasible ? b_f : b_n;
    const Focal f = MARGIN ? focal_margin<DETACH, INTEGER>(z[l], g, b, margin)
                           : focal<DETACH, INTEGER>(z[l], g, b);
    lanes[0][l] += negative ? f.loss : 0.0f;
    lanes[1][l] += feasible ? f.loss : 0.0f;
    lanes[2][l] += infeasible ? f.loss : 0.0f;
    gradient[l] = negative || feasible || infeasible ? f.slope * weight : 0.0f;
  }
}

double sum_of(const float* lanes) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

struct Exponents {
  float gamma[4];
  int bits[4];
};

template <bool MARGIN, bool DETACH, bool INTEGER>
void row_loss(const float* z, float* gradient, const Arguments& a, const Exponents& x, float weight,
              Scratch& s, RowResult& result) {
  float lanes[3][kLanes] = {};
  const float margin = (float)a.margin;
  const uint8_t* code = s.code.data();
  int64_t i = 0;
  for (; i + kLanes <= a.attributes; i += kLanes) {
    chunk<MARGIN, DETACH, INTEGER>(z + i, gradient + i, code + i, x.gamma, x.bits, margin, weight,
                                   lanes);
  }
  if (i < a.attributes) {
    float rest[kLanes] = {}, rest_gradient[kLanes];
    uint8_t rest_code[kLanes];
    std::memset(rest_code, kIgnored, kLanes);
    std::memcpy(rest, z + i, (a.attributes - i) * sizeof(float));
    std::memcpy(rest_code, code + i, a.attributes - i);
    chunk<MARGIN, DETACH, INTEGER>(rest, rest_gradient, rest_code, x.gamma, x.bits, margin, weight,
                                   lanes);
    std::memcpy(gradient + i, rest_gradient, (a.attributes - i) * sizeof(float));
  }
  for (int t = 0; t < 3; ++t) result.sums[kNegative + t] = sum_of(lanes[t]);

  const int64_t count = (int64_t)s.positives.size();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  s.gathered.assign(padded, 0.0f);
  s.gathered_gradient.resize(padded);
  for (int64_t n = 0; n < count; ++n) s.gathered[n] = -z[s.positives[n]];
  float positive_lanes[kLanes] = {};
  for (int64_t n = 0; n < padded; n += kLanes) {
    const float* u = s.gathered.data() + n;
    float* slope = s.gathered_gradient.data() + n;
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const Focal f = focal<DETACH, INTEGER>(u[l], x.gamma[kPositive], x.bits[kPositive]);
      positive_lanes[l] += n + l < count ? f.loss : 0.0f;
      slope[l] = -f.slope * weight;
    }
  }
  for (int64_t n = 0; n < count; ++n) gradient[s.positives[n]] = s.gathered_gradient[n];
  result.sums[kPositive] = sum_of(positive_lanes);
}

// The same in double, for gradcheck and as the oracle's partner; not vectorised.
void row_loss_double(const double* z, double* gradient, const Arguments& a, double weight,
                     Scratch& s, RowResult& result) {
  const auto softplus = [](double u) { return (u > 0 ? u : 0) + std::log1p(std::exp(-std::fabs(u))); };
  for (int64_t i = 0; i < a.attributes; ++i) {
    const int t = s.code[i];
    if (t == kIgnored) {
      gradient[i] = 0;
      continue;
    }
    const double u = t == kPositive ? -z[i] : z[i], g = a.gamma[t];
    const double e = std::exp(-std::fabs(u)), r = 1 / (1 + e);
    const double p = u >= 0 ? r : e * r, q = u >= 0 ? e * r : r;
    double loss, slope;
    if (t == kPositive || a.margin == 0) {
      const double above = u == u ? softplus(u) : u;
      const double w = g == 0 ? 1 : std::exp(-g * softplus(-u));
      loss = w * above;
      slope = a.detach ? w * p : w * (g * q * above + p);
    } else {
      const bool active = !(p - a.margin <= 0);
      const double p_m = active ? p - a.margin : 0.5, q_m = q + a.margin;
      const double minus_log = p_m < 0.5 ? -std::log1p(-p_m) : -std::log(q_m);
      const double w = g == 0 ? 1 : std::exp(g * std::log(p_m));
      loss = active ? w * minus_log : 0;
      const double pull = p * q / q_m;
      slope = !active ? 0 : a.detach ? w * pull : w * (g * p * q * minus_log / p_m + pull);
    }
    result.sums[t] += loss;
    gradient[i] = (t == kPositive ? -slope : slope) * weight;
  }
}

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
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
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
  const float* weight = a.inverse_weight + a.weight_indptr[row];
#pragma omp simd
  for (int32_t n = 0; n < count; ++n) keys[n] = vlal_key_bits(word[n], weight[n]);
}

// Marks kIgnored what is drawn of row `row` (Fig. 3); codes are laid out.
void draw(const Arguments& a, int64_t row, Scratch& s) {
  const int64_t object = a.object_id[row], first = a.feasible_indptr[object];
  const int64_t count = a.feasible_indptr[object + 1] - first;
  const int32_t* index = a.feasible_index + first;
  uint8_t* code = s.code.data();
  int32_t* out = a.drawn_out ? a.drawn_out + row * a.drawn_per_row : nullptr;
  if (a.num_ignore < 0) {
    for (int64_t n = 0; n < count; ++n) {
      if (code[index[n]] == kFeasible) code[index[n]] = kIgnored;
    }
    return;
  }
  if (a.num_ignore == 0 || count == 0) return;
  s.keys.resize(count);
  uint32_t* keys = s.keys.data();
  draw_keys(a, row, index, (int32_t)count, s);
  if (a.over_unannotated) {
    for (int64_t n = 0; n < count; ++n) {
      if (code[index[n]] != kFeasible) keys[n] = VLAL_NOT_DRAWN;
    }
  }
  const int32_t size = (int32_t)count;
  uint32_t least = VLAL_NOT_DRAWN, most = 0, usable = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : usable)
  for (int32_t n = 0; n < size; ++n) {
    const uint32_t key = keys[n], drawable = key != VLAL_NOT_DRAWN;
    least = key < least ? key : least;
    const uint32_t real = drawable ? key : 0;
    most = real > most ? real : most;
    usable += drawable;
  }
  const uint32_t wanted = (uint64_t)a.num_ignore < usable ? (uint32_t)a.num_ignore : usable;
  if (wanted == 0) return;
  // The wanted-th smallest key, by halving the range of its bits.
  uint32_t threshold = most;
  bool exact = wanted == usable;
  while (!exact && least < most) {
    const uint32_t middle = least + (most - least) / 2;
    uint32_t found = 0;
#pragma omp simd reduction(+ : found)
    for (int32_t n = 0; n < size; ++n) found += keys[n] <= middle;
    exact = found == wanted;
    threshold = middle;
    if (found < wanted) {
      least = middle + 1;
    } else {
      most = middle;
    }
  }
  s.taken.resize(count);
  int32_t* taken = s.taken.data();
  uint32_t number = 0;
  if (exact) {
    for (int32_t n = 0; n < size; ++n) {  // no branch: nobody could foretell it
      taken[number] = index[n];
      number += keys[n] <= threshold;
    }
  } else {  // several keys are the wanted-th: the lower attributes go first
    threshold = most;
    uint32_t below = 0;
    for (int32_t n = 0; n < size; ++n) below += keys[n] < threshold;
    uint32_t ties = wanted - below;
    for (int32_t n = 0; n < size; ++n) {
      const bool tie = keys[n] == threshold && ties > 0;
      if (!(keys[n] < threshold || tie)) continue;
      taken[number++] = index[n];
      ties -= tie;
    }
  }
  for (uint32_t n = 0; n < number; ++n) {
    if (code[taken[n]] == kFeasible) code[taken[n]] = kIgnored;
  }
  if (out) std::memcpy(out, taken, number * sizeof(int32_t));
}

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

// Places of the labels above 0, ascending. Eight labels at a time: most are 0.
void find_positives(const int8_t* label, int64_t size, std::vector<int32_t>& found) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, label + i, 8);
    if (!eight) continue;
    for (int64_t n = i; n < i + 8; ++n) {
      if (label[n] > 0) found.push_back((int32_t)n);
    }
  }
  for (; i < size; ++i) {
    if (label[i] > 0) found.push_back((int32_t)i);
  }
}

// Codes of all attributes of a row, its positives, and what counts as what.
void lay_out(const Arguments& a, int64_t row, Scratch& s, RowResult& result) {
  uint8_t* code = s.code.data();
  std::memset(code, kInfeasible, a.attributes);
  const int64_t object = a.object_id[row];
  for (int64_t n = a.feasible_indptr[object]; n < a.feasible_indptr[object + 1]; ++n) {
    code[a.feasible_index[n]] = kFeasible;
  }
  s.positives.clear();
  if (a.label) {
    const int8_t* label = a.label + row * a.attributes;
#pragma omp simd
    for (int64_t i = 0; i < a.attributes; ++i) {
      const uint8_t unannotated = label[i] < 0 ? (uint8_t)kNegative : code[i];
      code[i] = label[i] > 0 ? (uint8_t)kPositive : unannotated;
    }
    find_positives(label, a.attributes, s.positives);
  } else {
    for (int64_t n = a.label_indptr[row]; n < a.label_indptr[row + 1]; ++n) {
      const int32_t attribute = a.label_code[n] >> 1;
      code[attribute] = a.label_code[n] & 1 ? kPositive : kNegative;
      if (a.label_code[n] & 1) s.positives.push_back(attribute);
    }
  }
  if (a.mode == kDraw) draw(a, row, s);
  if (a.mode == kList) {
    const int32_t* drawn = a.drawn + row * a.drawn_per_row;
    for (int64_t n = 0; n < a.drawn_per_row; ++n) {
      if (drawn[n] >= 0 && code[drawn[n]] >= kFeasible) code[drawn[n]] = kIgnored;
    }
  }
  if (a.mode == kIgnoreAll) {
    for (int64_t i = 0; i < a.attributes; ++i) code[i] = code[i] >= kFeasible ? (uint8_t)kIgnored : code[i];
  }
  if (a.mode == kMask) {
    const uint8_t* ignored = a.ignored + row * a.attributes;
    for (int64_t i = 0; i < a.attributes; ++i) {
      code[i] = code[i] >= kFeasible && ignored[i] ? (uint8_t)kIgnored : code[i];
    }
  }
  count_terms(code, a.attributes, result.counts);
}

using RowLoss = void (*)(const float*, float*, const Arguments&, const Exponents&, float, Scratch&,
                         RowResult&);

RowLoss choose(bool margin, bool detach, bool integer) {
  static const RowLoss all[8] = {
      row_loss<false, false, false>, row_loss<false, false, true>, row_loss<false, true, false>,
      row_loss<false, true, true>,   row_loss<true, false, false>, row_loss<true, false, true>,
      row_loss<true, true, false>,   row_loss<true, true, true>};
  return all[4 * margin + 2 * detach + integer];
}

float from_bfloat16(uint16_t value) { return vlal_as_float((int)((uint32_t)value << 16)); }

uint16_t to_bfloat16(float value) {
  const uint32_t bits = (uint32_t)vlal_as_int(value);
  if (value != value) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

void one_row(const Arguments& a, int64_t row, const Exponents& x, RowLoss loss, Scratch& s,
             RowResult& result) {
  const float weight = a.row_weight ? a.row_weight[row] : 1.0f;
  const int64_t at = row * a.stride, to = row * a.attributes, size = a.attributes;
  if (weight == 0) {
    const size_t width = a.kind == kFloat64 ? 8 : a.kind == kFloat32 ? 4 : 2;
    std::memset((char*)a.gradient + to * width, 0, size * width);
    return;
  }
  lay_out(a, row, s, result);
  if (a.kind == kFloat64) {
    row_loss_double((const double*)a.logits + at, (double*)a.gradient + to, a, weight, s, result);
  } else if (a.kind == kFloat32) {
    loss((const float*)a.logits + at, (float*)a.gradient + to, a, x, weight, s, result);
  } else {
    float *z = s.logits.data(), *gradient = s.gradient.data();
    if (a.kind == kBfloat16) {
      const uint16_t* in = (const uint16_t*)a.logits + at;
      for (int64_t i = 0; i < size; ++i) z[i] = from_bfloat16(in[i]);
    } else {
      const _Float16* in = (const _Float16*)a.logits + at;
      for (int64_t i = 0; i < size; ++i) z[i] = (float)in[i];
    }
    loss(z, gradient, a, x, weight, s, result);
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
}

}  // namespace

extern "C" void vlal_selective_loss(const Arguments* arguments) {
  const Arguments& a = *arguments;
  Exponents x;
  bool integer = true;
  for (int t = 0; t < 4; ++t) {
    x.gamma[t] = (float)a.gamma[t];
    x.bits[t] = (int)a.gamma[t];
    integer = integer && a.gamma[t] == x.bits[t] && a.gamma[t] < 8;
  }
  const RowLoss loss = choose(a.margin > 0, a.detach, integer);
  std::vector<RowResult> results(a.rows);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Scratch scratch(a);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) one_row(a, row, x, loss, scratch, results[row]);
  }
  for (int t = 0; t < kTerms; ++t) a.sums[t] = a.counts[t] = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    const RowResult& one = results[row];
    if (a.kind == kFloat64) {
      ((double*)a.per_row)[row] = one.loss;
    } else {
      ((float*)a.per_row)[row] = (float)one.loss;
    }
    for (int t = 0; t < kTerms; ++t) {
      a.sums[t] += one.sums[t];
      a.counts[t] += one.counts[t];
    }
  }
}
