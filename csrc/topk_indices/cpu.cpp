// Top-k selection on the CPU, exact and deterministic: the k largest of a row in index order, equal values to the lower
// index. NaN and -inf are never chosen, -0.0 ties with 0.0.
//
// A long row takes: (1) a threshold from a sample of it, low enough that a little more than k values lie above; (2) one
// pass that packs those candidates together; (3) a bisection among the candidates for the k-th value; (4) one pass over
// the candidates, which are in index order already. Where the sample shows that the threshold is a value shared by many
// (relu scores tie at 0), (2) counts instead, and if the k-th value is that one the row is written out directly. A sample
// that misleads costs time, never correctness: step 2 is then repeated with another sample's, and if that misleads too,
// with every valid value as a candidate.
#include "topk_indices/topk_indices.h"

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

// Integers in the order of the floating-point values, -0.0 and 0.0 being one.
GLM5_INLINE int32_t order_of(float x) {
  x += 0.f;
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
GLM5_INLINE int64_t order_of(double x) {
  x += 0.;
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits ^ ((bits >> 63) & 0x7fffffffffffffffll);
}

template <class T>
struct Order;
template <>
struct Order<float> {
  using Type = int32_t;
  static constexpr float kLowest = -FLT_MAX;
};
template <>
struct Order<double> {
  using Type = int64_t;
  static constexpr double kLowest = -DBL_MAX;
};

// The value whose order this is.
GLM5_INLINE float value_of(int32_t order) {
  const int32_t bits = order ^ ((order >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

constexpr int64_t kPad = 64;  // candidate arrays are filled up to a multiple of this with keys below every valid one
template <class K>
constexpr K kNoKey = static_cast<K>(sizeof(K) == 8 ? INT64_MIN : INT32_MIN);

// ---- what each instruction set does in its own way -----------------------------------------------------------------

// Packs the values >= threshold and their positions; returns how many there are. Room for n + kPad.
template <class T>
int64_t pack_candidates(const T* row, int64_t n, T threshold, T* values, int32_t* positions) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    values[count] = row[i];
    positions[count] = static_cast<int32_t>(i);
    count += row[i] >= threshold;
  }
  return count;
}

// How many of n keys (a multiple of kPad) are >= bound.
template <class K>
int64_t count_at_least(const K* keys, int64_t n, K bound) {
  K count = 0;  // as wide as a key, so that it vectorises; n < 2^31
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= bound;
  return count;
}

template <class T>
void count_around(const T* row, int64_t n, T threshold, int64_t* above, int64_t* equal) {
  int32_t more = 0, same = 0;
  for (int64_t i = 0; i < n; ++i) {
    more += row[i] > threshold;
    same += row[i] == threshold;
  }
  *above = more;
  *equal = same;
}

// Writes base + position(i) of the values > bound, and of the first `ties` equal to it, in order.
template <class X, class Position>
int64_t emit(const X* values, int64_t n, X bound, int64_t ties, int64_t base, int32_t* out, const Position& position) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool tie = values[i] == bound && ties > 0;
    ties -= tie;
    if (tie || values[i] > bound) out[count++] = static_cast<int32_t>(base + position(i));
  }
  return count;
}
template <class X>
int64_t emit_candidates(const X* keys, const int32_t* positions, int64_t n, X bound, int64_t ties, int64_t base,
                        int32_t* out) {
  return emit(keys, n, bound, ties, base, out, [&](int64_t i) { return positions[i]; });
}
template <class X>
int64_t emit_row(const X* row, int64_t n, X bound, int64_t ties, int64_t base, int32_t* out) {
  return emit(row, n, bound, ties, base, out, [](int64_t i) { return i; });
}

// Turns n values into keys in place, fills up to a multiple of kPad, which it returns, and finds the range of the valid.
template <class T, class K>
int64_t to_keys(const T* values, int64_t n, K* keys, K* low, K* high) {
  const int64_t padded = (n + kPad - 1) / kPad * kPad;
  K bottom = sizeof(K) == 8 ? static_cast<K>(INT64_MAX) : static_cast<K>(INT32_MAX), top = kNoKey<K>;
  for (int64_t i = 0; i < padded; i += 16) {
    T x[16];
    K key[16];
    const int64_t here = n - i < 0 ? 0 : n - i < 16 ? n - i : 16;
    std::memcpy(x, values + i, sizeof(T) * here);
    for (int64_t j = here; j < 16; ++j) x[j] = -static_cast<T>(__builtin_inf());
    for (int j = 0; j < 16; ++j) {
      const bool valid = x[j] >= Order<T>::kLowest;
      key[j] = valid ? order_of(x[j]) : kNoKey<K>;
      top = key[j] > top ? key[j] : top;
      bottom = valid && key[j] < bottom ? key[j] : bottom;
    }
    std::memcpy(keys + i, key, sizeof(key));
  }
  *low = bottom;
  *high = top;
  return padded;
}

// Moves both ends of an interval that holds a key inwards to the nearest key.
template <class K>
void tighten(const K* keys, int64_t n, K* low, K* high) {
  const K first = *low, last = *high;
  K bottom = last, top = first;
  for (int64_t i = 0; i < n; ++i) {
    const K up = keys[i] >= first ? keys[i] : last, down = keys[i] <= last ? keys[i] : first;
    bottom = up < bottom ? up : bottom;
    top = down > top ? down : top;
  }
  *low = bottom;
  *high = top;
}

// Packs the keys in [low, high], which may lie in place, fills up to a multiple of kPad, and returns that.
template <class K>
int64_t pack_between(const K* keys, int64_t n, K low, K high, K* packed) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const K key = keys[i];
    packed[count] = key;
    count += key >= low && key <= high;
  }
  for (; count % kPad; ++count) packed[count] = kNoKey<K>;
  return count;
}

#if GLM5_ISA_LEVEL == 2

GLM5_INLINE int64_t ones(__mmask16 m) { return __builtin_popcount(static_cast<unsigned>(m)); }
struct Places {
  alignas(64) uint8_t bytes[64];
  constexpr Places() : bytes() {
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i);
  }
};
constexpr Places kPlaces;
GLM5_INLINE __m512i counting() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// 64 values at a time: one compression gives the places of the candidates as bytes; widened, 16 at a time, they are the
// positions and choose among the four registers that hold the values. (Compression is into registers: compressing stores
// are microcode on Zen 4.)
GLM5_INLINE int64_t pack_64(const __m512 (&x)[4], uint64_t chosen, __m512i start, float* values, int32_t* positions) {
  const int64_t count = __builtin_popcountll(chosen);
  const auto put = [&](__m128i places, int at) __attribute__((always_inline)) {
    const __m512i place = _mm512_cvtepu8_epi32(places);
    const __m512 low = _mm512_permutex2var_ps(x[0], place, x[1]), high = _mm512_permutex2var_ps(x[2], place, x[3]);
    const __mmask16 upper = _mm512_movepi32_mask(_mm512_slli_epi32(place, 26));
    _mm512_storeu_ps(values + at, _mm512_mask_mov_ps(low, upper, high));
    _mm512_storeu_si512(positions + at, _mm512_add_epi32(place, start));
  };
  const __m512i places = _mm512_maskz_compress_epi8(chosen, _mm512_load_si512(kPlaces.bytes));
  put(_mm512_castsi512_si128(places), 0);
  if (count > 16) {
    put(_mm512_extracti32x4_epi32(places, 1), 16);
    if (count > 32) {
      put(_mm512_extracti32x4_epi32(places, 2), 32);
      put(_mm512_extracti32x4_epi32(places, 3), 48);
    }
  }
  return count;
}

int64_t pack_candidates(const float* row, int64_t n, float threshold, float* values, int32_t* positions) {
  constexpr int64_t kAhead = 1024;
  const __m512 bound = _mm512_set1_ps(threshold);
  __m512i start = _mm512_setzero_si512();
  int64_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512 x[4];
    uint64_t chosen = 0;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(row + i + 16 * j + kAhead), _MM_HINT_T0);
      x[j] = _mm512_loadu_ps(row + i + 16 * j);
      chosen |= static_cast<uint64_t>(_mm512_cmp_ps_mask(x[j], bound, _CMP_GE_OQ)) << 16 * j;
    }
    count += pack_64(x, chosen, start, values + count, positions + count);
    start = _mm512_add_epi32(start, _mm512_set1_epi32(64));
  }
  if (i < n) {
    __m512 x[4];
    uint64_t chosen = 0;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t rest = n - i - 16 * j;
      const __mmask16 valid = rest > 0 ? first_n(rest) : 0;
      x[j] = _mm512_maskz_loadu_ps(valid, row + i + 16 * j);
      chosen |= static_cast<uint64_t>(_mm512_mask_cmp_ps_mask(valid, x[j], bound, _CMP_GE_OQ)) << 16 * j;
    }
    count += pack_64(x, chosen, start, values + count, positions + count);
  }
  return count;
}

int64_t to_keys(const float* values, int64_t n, int32_t* keys, int32_t* low, int32_t* high) {
  const int64_t padded = (n + kPad - 1) / kPad * kPad;
  __m512i bottom = _mm512_set1_epi32(INT32_MAX), top = _mm512_set1_epi32(INT32_MIN);
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 x = _mm512_add_ps(_mm512_maskz_loadu_ps(n > i ? first_n(n - i) : 0, values + i), _mm512_setzero_ps());
    const __mmask16 valid = _mm512_mask_cmp_ps_mask(n > i ? first_n(n - i) : 0, x, _mm512_set1_ps(-FLT_MAX), _CMP_GE_OQ);
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
    const __m512i key = _mm512_mask_xor_epi32(_mm512_set1_epi32(INT32_MIN), valid, bits, flip);
    _mm512_storeu_si512(keys + i, key);
    top = _mm512_max_epi32(top, key);
    bottom = _mm512_mask_min_epi32(bottom, valid, bottom, key);
  }
  *low = _mm512_reduce_min_epi32(bottom);
  *high = _mm512_reduce_max_epi32(top);
  return padded;
}

int64_t pack_between(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* packed) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i key = _mm512_load_si512(keys + i);
    const __mmask16 m = _mm512_mask_cmple_epi32_mask(_mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(low)), key,
                                                     _mm512_set1_epi32(high));
    _mm512_storeu_si512(packed + count, _mm512_maskz_compress_epi32(m, key));
    count += ones(m);
  }
  for (; count % kPad; ++count) packed[count] = INT32_MIN;
  return count;
}

int64_t count_at_least(const int32_t* keys, int64_t n, int32_t bound) {
  const __m512i b = _mm512_set1_epi32(bound);
  int64_t count[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < n; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) count[j] += ones(_mm512_cmpge_epi32_mask(_mm512_load_si512(keys + i + 16 * j), b));
  }
  return count[0] + count[1] + count[2] + count[3];
}

void count_around(const float* row, int64_t n, float threshold, int64_t* above, int64_t* equal) {
  const __m512 bound = _mm512_set1_ps(threshold);
  int64_t more = 0, same = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = first_n(n - i);
    const __m512 x = _mm512_maskz_loadu_ps(valid, row + i);
    more += ones(_mm512_mask_cmp_ps_mask(valid, x, bound, _CMP_GT_OQ));
    same += ones(_mm512_mask_cmp_ps_mask(valid, x, bound, _CMP_EQ_OQ));
  }
  *above = more;
  *equal = same;
}

// The first `ties` of the lanes in `equal`, and what is left of `ties`.
GLM5_INLINE __mmask16 take(__mmask16 equal, int64_t& ties) {
  const int64_t here = ones(equal);
  const __mmask16 taken = here <= ties ? equal : static_cast<__mmask16>(_pdep_u32((1u << ties) - 1u, equal));
  ties -= here <= ties ? here : ties;
  return taken;
}
// A masked store: what stands after the row's end may be another thread's.
GLM5_INLINE int64_t put(int32_t* out, __mmask16 chosen, __m512i positions) {
  const int64_t n = ones(chosen);
  _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1u << n) - 1u), _mm512_maskz_compress_epi32(chosen, positions));
  return n;
}

int64_t emit_candidates(const int32_t* keys, const int32_t* positions, int64_t n, int32_t bound, int64_t ties, int64_t base,
                        int32_t* out) {
  const __m512i b = _mm512_set1_epi32(bound), shift = _mm512_set1_epi32(static_cast<int>(base));
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i key = _mm512_load_si512(keys + i);
    __mmask16 chosen = _mm512_cmpgt_epi32_mask(key, b);
    if (ties > 0) chosen |= take(_mm512_cmpeq_epi32_mask(key, b), ties);
    count += put(out + count, chosen, _mm512_add_epi32(_mm512_load_si512(positions + i), shift));
  }
  return count;
}

int64_t emit_row(const float* row, int64_t n, float bound, int64_t ties, int64_t base, int32_t* out) {
  const __m512 b = _mm512_set1_ps(bound);
  __m512i position = _mm512_add_epi32(counting(), _mm512_set1_epi32(static_cast<int>(base)));
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = first_n(n - i);
    const __m512 x = _mm512_maskz_loadu_ps(valid, row + i);
    __mmask16 chosen = _mm512_mask_cmp_ps_mask(valid, x, b, _CMP_GT_OQ);
    if (ties > 0) chosen |= take(_mm512_mask_cmp_ps_mask(valid, x, b, _CMP_EQ_OQ), ties);
    count += put(out + count, chosen, position);
    position = _mm512_add_epi32(position, _mm512_set1_epi32(16));
  }
  return count;
}

#elif GLM5_ISA_LEVEL == 1

// kLeft[m]: for each set bit of m, its place, from the lowest; what follows is of no interest.
struct LeftTable {
  uint8_t places[256][8];
  constexpr LeftTable() : places() {
    for (int m = 0; m < 256; ++m) {
      int n = 0;
      for (int bit = 0; bit < 8; ++bit)
        if (m >> bit & 1) places[m][n++] = static_cast<uint8_t>(bit);
    }
  }
};
constexpr LeftTable kLeft;

int64_t pack_candidates(const float* row, int64_t n, float threshold, float* values, int32_t* positions) {
  const __m256 bound = _mm256_set1_ps(threshold);
  int64_t count = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(row + i);
    const int m = _mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_GE_OQ));
    const __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLeft.places[m])));
    _mm256_storeu_ps(values + count, _mm256_permutevar8x32_ps(x, places));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions + count),
                        _mm256_add_epi32(places, _mm256_set1_epi32(static_cast<int>(i))));
    count += __builtin_popcount(static_cast<unsigned>(m));
  }
  for (; i < n; ++i) {
    values[count] = row[i];
    positions[count] = static_cast<int32_t>(i);
    count += row[i] >= threshold;
  }
  return count;
}

#endif

// ---- the algorithm -------------------------------------------------------------------------------------------------

// The k-th largest, found by probing: a bound with exactly k of the keys at or above it (then *above = k), or else the
// k-th largest key itself (then *above counts the keys above it). `slack` lets the first form be met by up to k + slack
// keys. n is a multiple of kPad; `valid` >= k >= 1 of the keys are valid and lie in [low, high].
//
// A probe is placed where a straight line between the counts at both ends puts the k-th key; if that did not halve the
// interval the next one is its middle. As the interval closes, the keys inside it move to `spare` (room for n / 4 and
// 2 kPad) and probes count those alone. Now and then the ends move to keys that exist, which ends the search among ties.
template <class K>
K kth_largest(const K* keys, int64_t n, int64_t valid, int64_t k, int64_t slack, K low, K high, K* spare, int64_t* above) {
  using U = std::conditional_t<sizeof(K) == 8, uint64_t, uint32_t>;
  int64_t at_low = valid, over_high = 0;  // how many are >= low, > high
  int64_t left_out = 0;                   // how many above the interval are no longer among `keys`
  bool line = true;
  for (int probe = 1; low < high; ++probe) {
    const U gap = static_cast<U>(high) - static_cast<U>(low);
    U step = gap - gap / 2;
    if (line) {
      const double share = (static_cast<double>(at_low - k) + 0.5) / static_cast<double>(at_low - over_high);
      const double place = static_cast<double>(gap) * share;
      step = place < 1 ? 1 : place < static_cast<double>(gap) ? static_cast<U>(place) : gap;
    }
    const K middle = static_cast<K>(static_cast<U>(low) + step);  // low < middle <= high
    const int64_t count = left_out + count_at_least(keys, n, middle);
    if (count >= k && count <= k + slack) {
      *above = k;
      return middle;
    }
    if (count > k) low = middle, at_low = count;
    else high = middle - 1, over_high = count;
    line = !line || static_cast<U>(high) - static_cast<U>(low) <= gap / 2;
    if (at_low - over_high <= n / 4) {
      n = pack_between(keys, n, low, high, spare);
      keys = spare;
      left_out = over_high;
    }
    if (probe % 8 == 0) tighten(keys, n, &low, &high);
  }
  *above = over_high;
  return low;
}

constexpr int64_t kSampleRun = 16;    // neighbours read together
constexpr int64_t kSampleRuns = 64;   // spread evenly over the row
constexpr int64_t kSampleFrom = 4096;  // shorter rows are candidates whole

// A value that a little more than k of the row are expected to reach; `shared` tells whether many equal it. The second
// sample lies between the runs of the first.
float sampled_threshold(const float* row, int64_t n, int64_t k, bool second, bool* shared) {
  constexpr int64_t kSample = kSampleRun * kSampleRuns;
  alignas(64) float values[kSample];
  alignas(64) int32_t keys[kSample], spare[kSample / 4 + 2 * kPad];
  *shared = false;
  const double expected = static_cast<double>(k) * kSample / static_cast<double>(n);
  const int64_t rank = static_cast<int64_t>(expected + 3.5 * __builtin_sqrt(expected)) + 4;
  for (int64_t r = 0; r < kSampleRuns; ++r)
    std::memcpy(
        values + r * kSampleRun,
        row + (second ? (n - kSampleRun) * (2 * r + 1) / (2 * kSampleRuns) : (n - kSampleRun) * r / (kSampleRuns - 1)),
        sizeof(float) * kSampleRun);
  int32_t low, high;
  to_keys(values, kSample, keys, &low, &high);
  const int64_t valid = count_at_least(keys, kSample, order_of(Order<float>::kLowest));
  if (rank > valid) return Order<float>::kLowest;
  int64_t above;
  const int32_t bound = kth_largest(keys, kSample, valid, rank, rank / 16, low, high, spare, &above);
  if (above < rank) {
    const int64_t reached = count_at_least(keys, kSample, bound);
    *shared = reached - above > kSample / 16;
  }
  return value_of(bound);
}

template <class T>
void select(const T* row, int64_t n, int64_t k, int64_t base, int32_t* out) {
  using K = typename Order<T>::Type;
  int64_t count = 0;
  if (k > 0 && n > 0) {
    T threshold = Order<T>::kLowest;
    if constexpr (sizeof(T) == 4) {
      bool shared = false;
      if (n >= kSampleFrom && k < n / 2) threshold = sampled_threshold(row, n, k, false, &shared);
      if (shared) {
        int64_t above, equal;
        count_around(row, n, threshold, &above, &equal);
        if (above < k && above + equal >= k) {
          GLM5_COUNT_PATH("topk_indices: k-th value shared by many");
          emit_row(row, n, threshold, k - above, base, out);
          return;
        }
        if (above >= k) threshold = value_of(order_of(threshold) + 1);  // candidates lie above the shared value
      }
    }
    T* values = static_cast<T*>(thread_scratch(6, sizeof(T) * (n + n / 4 + 4 * kPad)));
    K* keys = reinterpret_cast<K*>(values);
    int32_t* positions = static_cast<int32_t*>(thread_scratch(7, sizeof(int32_t) * (n + kPad)));
    int64_t candidates = pack_candidates(row, n, threshold, values, positions);
    if (candidates < k && threshold > Order<T>::kLowest) {
      GLM5_COUNT_PATH("topk_indices: misleading sample");
      if constexpr (sizeof(T) == 4) {
        bool shared = false;
        candidates = pack_candidates(row, n, sampled_threshold(row, n, k, true, &shared), values, positions);
      }
      if (candidates < k) {
        GLM5_COUNT_PATH("topk_indices: both samples misleading");
        candidates = pack_candidates(row, n, Order<T>::kLowest, values, positions);
      }
    } else if (threshold > Order<T>::kLowest) {
      GLM5_COUNT_PATH("topk_indices: sampled threshold");
    } else {
      GLM5_COUNT_PATH("topk_indices: every value a candidate");
    }
    if (candidates <= k) {
      for (; count < candidates; ++count) out[count] = static_cast<int32_t>(base + positions[count]);
    } else {
      K low, high;
      const int64_t padded = to_keys(values, candidates, keys, &low, &high);
      int64_t above;
      const K bound = kth_largest(keys, padded, candidates, k, 0, low, high, keys + padded, &above);
      // With exactly k at or above the bound every tie is taken.
      count = emit_candidates(keys, positions, padded, bound, above == k ? k : k - above, base, out);
    }
  }
  for (; count < k; ++count) out[count] = -1;
}

template <class T>
void select_rows(const TopkIndicesArgs& args) {
  using S = Acc<T>;
  const int64_t block = args.cols >= kElementsPerTask ? 1 : kElementsPerTask / (args.cols + 1) + 1;
  parallel_tasks((args.rows + block - 1) / block, [&](int64_t task) {
    const int64_t end = (task + 1) * block < args.rows ? (task + 1) * block : args.rows;
    for (int64_t r = task * block; r < end; ++r) {
      const int64_t first = args.ks ? args.ks[r] : 0, last = args.ke ? args.ke[r] : args.cols;
      const int64_t n = last > first ? last - first : 0;
      const T* row = static_cast<const T*>(args.scores) + r * args.cols + (n ? first : 0);
      int32_t* out = args.indices + r * args.k;
      if constexpr (sizeof(T) == 2) {
        S* wide = static_cast<S*>(thread_scratch(5, sizeof(S) * (n + 1)));
        for (int64_t i = 0; i < n; i += F::kLanes) store_n(wide + i, load_n(row + i, n - i), n - i);
        select(wide, n, args.k, first, out);
      } else {
        select(row, n, args.k, first, out);
      }
    }
  });
}

}  // namespace

void select_topk(const float* row, int64_t n, int64_t k, int64_t base, int32_t* out) { select(row, n, k, base, out); }
#if GLM5_ISA_LEVEL == 0
void select_topk(const double* row, int64_t n, int64_t k, int64_t base, int32_t* out) { select(row, n, k, base, out); }
#endif

void topk_indices(const TopkIndicesArgs& args) {
  if (args.dtype == 0) select_rows<bf16>(args);
  else if (args.dtype == 1) select_rows<float>(args);
#if GLM5_ISA_LEVEL == 0
  else select_rows<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
