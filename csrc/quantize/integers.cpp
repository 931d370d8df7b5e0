// Quantisation to int8 by rows and to int4 by groups, back from int4, and both at once for training.
#include "common/quantize.h"
#include "quantize/pieces.h"
#include "quantize/quantize.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int kHalf = F::kLanes / 2;

// ---- I: the codes of one F, 32-bit integers ----

#if GLM5_ISA_LEVEL == 2

struct I {
  __m512i v;
};
GLM5_INLINE I to_integers(F x) { return {_mm512_cvtps_epi32(x.v)}; }  // ties to even
GLM5_INLINE F to_floats(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
GLM5_INLINE I splat_integer(int x) { return {_mm512_set1_epi32(x)}; }
GLM5_INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
GLM5_INLINE I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
GLM5_INLINE I operator^(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
GLM5_INLINE I within(I x, int low, int high) {
  return {_mm512_min_epi32(_mm512_max_epi32(x.v, _mm512_set1_epi32(low)), _mm512_set1_epi32(high))};
}
GLM5_INLINE void store_bytes(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v)); }
// Two to a byte, the even one in the low nibble.
GLM5_INLINE void store_nibbles(uint8_t* p, I x) {
  const __m512i nibbles = _mm512_and_si512(x.v, _mm512_set1_epi32(15));
  const __m512i pairs = _mm512_or_si512(nibbles, _mm512_srli_epi64(nibbles, 28));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
}
GLM5_INLINE I load_nibbles(const uint8_t* p) {
  const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), _mm512_set1_epi32(15))};
}

#elif GLM5_ISA_LEVEL == 1

struct I {
  __m256i v;
};
GLM5_INLINE I to_integers(F x) { return {_mm256_cvtps_epi32(x.v)}; }
GLM5_INLINE F to_floats(I x) { return {_mm256_cvtepi32_ps(x.v)}; }
GLM5_INLINE I splat_integer(int x) { return {_mm256_set1_epi32(x)}; }
GLM5_INLINE I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
GLM5_INLINE I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
GLM5_INLINE I operator^(I a, I b) { return {_mm256_xor_si256(a.v, b.v)}; }
GLM5_INLINE I within(I x, int low, int high) {
  return {_mm256_min_epi32(_mm256_max_epi32(x.v, _mm256_set1_epi32(low)), _mm256_set1_epi32(high))};
}
GLM5_INLINE void store_bytes(int8_t* p, I x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
GLM5_INLINE void store_nibbles(uint8_t* p, I x) {
  const __m256i nibbles = _mm256_and_si256(x.v, _mm256_set1_epi32(15));
  const __m256i pairs = _mm256_or_si256(nibbles, _mm256_srli_epi64(nibbles, 28));
  // Byte 0 of each 64-bit lane.
  const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
  const __m128i words = _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(low), _mm_castsi128_ps(high), 0x88));
  const __m128i bytes = _mm_shuffle_epi8(words, _mm_set1_epi32(0x0c080400));
  const int32_t four = _mm_cvtsi128_si32(bytes);
  std::memcpy(p, &four, 4);
}
GLM5_INLINE I load_nibbles(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return {_mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi64(pairs, 28)), _mm256_set1_epi32(15))};
}

#else

struct I {
  F::Ints v;
};
GLM5_INLINE I to_integers(F x) {
  I r;
  for (int i = 0; i < 4; ++i) r.v[i] = static_cast<int32_t>(__builtin_lrintf(x.v[i]));
  return r;
}
GLM5_INLINE F to_floats(I x) {
  F r;
  for (int i = 0; i < 4; ++i) r.v[i] = static_cast<float>(x.v[i]);
  return r;
}
GLM5_INLINE I splat_integer(int x) { return {F::Ints{x, x, x, x}}; }
GLM5_INLINE I operator+(I a, I b) { return {a.v + b.v}; }
GLM5_INLINE I operator-(I a, I b) { return {a.v - b.v}; }
GLM5_INLINE I operator^(I a, I b) { return {a.v ^ b.v}; }
GLM5_INLINE I within(I x, int low, int high) {
  const F::Ints l = {low, low, low, low}, h = {high, high, high, high};
  x.v = x.v < l ? l : x.v;
  return {x.v > h ? h : x.v};
}
GLM5_INLINE void store_bytes(int8_t* p, I x) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
GLM5_INLINE void store_nibbles(uint8_t* p, I x) {
  for (int i = 0; i < 2; ++i) p[i] = static_cast<uint8_t>((x.v[2 * i] & 15) | (x.v[2 * i + 1] & 15) << 4);
}
GLM5_INLINE I load_nibbles(const uint8_t* p) { return {F::Ints{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4}}; }

#endif

GLM5_INLINE bool is_finite(float x) { return magnitude_bits(x) < 0x7f800000u; }

// ---- int8 ----

// A row's scale is at least amax / 127 less half a unit: the ratio rounds to 127 at most, and nothing need be cut off.
template <class T>
void rows_to_int8(const Int8Args& a) {
  // A row has one scale: it is not cut.
  over_pieces(a.rows, a.columns, a.columns, [&](int64_t row, int64_t, int64_t n) {
    const T* x = static_cast<const T*>(a.x) + row * n;
    int8_t* q = a.q + row * n;
    const float amax = largest_magnitude(x, n);
    const float scale = a.scale[row] = (amax < 1e-10f ? 1e-10f : amax) / 127.f;
    if (!is_finite(scale)) {
      std::memset(q, 0, static_cast<size_t>(n));
      return;
    }
    const F s = splat<F>(scale);
    int64_t i = 0;
    for (; i + F::kLanes <= n; i += F::kLanes) store_bytes(q + i, to_integers(load(x + i) / s));
    if (i < n) {
      int8_t rest[F::kLanes];
      store_bytes(rest, to_integers(load_n(x + i, n - i) / s));
      std::memcpy(q + i, rest, static_cast<size_t>(n - i));
    }
  });
}

// ---- int4 ----

// What a group's codes mean: (code - zero) * scale. Codes of a symmetric group are in two's complement, its zero is 0.
struct Group {
  float scale;
  int zero;
};

template <class T>
GLM5_INLINE Group symmetric_group(const T* x, int64_t n) {
  return {largest_magnitude(x, n) / 7.f, 0};
}

// The lanes beyond n are zeros, which take part anyway.
template <class T>
GLM5_INLINE Group group_with_zero(const T* x, int64_t n) {
  if (!(magnitude_bits(largest_magnitude(x, n)) <= 0x7f800000u)) return {float_of(0x7fc00000u), 0};
  F low = splat<F>(0), high = low;
  for (int64_t i = 0; i < n; i += F::kLanes) {
    const F v = load_n(x + i, n - i);
    low = min(low, v);
    high = max(high, v);
  }
  const float lo = -max_lane(splat<F>(0) - low), hi = max_lane(high);
  const float scale = (hi * 0.5f - lo * 0.5f) / 7.5f;
  if (!is_finite(scale) || scale == 0) return {scale, 0};
  const int zero = static_cast<int>(__builtin_lrintf(-lo / scale));
  return {scale, zero > 15 ? 15 : zero};
}

// The codes of one F, all zeros where the scale is zero or not finite.
template <bool kSymmetric>
GLM5_INLINE I codes_of(F x, const Group& g) {
  const I ratio = to_integers(x / splat<F>(g.scale));
  return kSymmetric ? within(ratio, -8, 7) : within(ratio + splat_integer(g.zero), 0, 15);
}

template <bool kSymmetric, class T>
GLM5_INLINE Group group_of(const T* x, int64_t n) {
  return kSymmetric ? symmetric_group(x, n) : group_with_zero(x, n);
}

GLM5_INLINE bool has_codes(const Group& g) { return is_finite(g.scale) && g.scale != 0; }

// Calls fn(group, its first element, its size) over the groups of all rows, which lie one behind the other.
template <class Fn>
void over_groups(const Int4Args& a, const Fn& fn) {
  const int64_t size = a.groups ? a.columns / a.groups : 0, groups = a.rows * a.groups;
  if (size == 0) return;
  const int64_t together = size < kTaskElements ? kTaskElements / size : 1;
  parallel_tasks((groups + together - 1) / together, [&](int64_t task) {
    const int64_t end = (task + 1) * together < groups ? (task + 1) * together : groups;
    for (int64_t group = task * together; group < end; ++group) fn(group, group * size, size);
  });
}

template <bool kSymmetric, class T>
void to_int4(const Int4Args& a) {
  over_groups(a, [&](int64_t group, int64_t first, int64_t n) {
    const T* x = static_cast<const T*>(a.x) + first;
    uint8_t* q = a.q + first / 2;
    const Group g = group_of<kSymmetric>(x, n);
    a.scale[group] = g.scale;
    if (!kSymmetric) a.zeros[group] = static_cast<uint8_t>(g.zero);
    if (!has_codes(g)) {
      std::memset(q, 0, static_cast<size_t>(n / 2));
      return;
    }
    int64_t i = 0;
    for (; i + F::kLanes <= n; i += F::kLanes) store_nibbles(q + i / 2, codes_of<kSymmetric>(load(x + i), g));
    if (i < n) {
      uint8_t rest[kHalf];
      store_nibbles(rest, codes_of<kSymmetric>(load_n(x + i, n - i), g));
      std::memcpy(q + i / 2, rest, static_cast<size_t>((n - i) / 2));
    }
  });
}

template <class T>
void from_int4(const Int4Args& a) {
  over_groups(a, [&](int64_t group, int64_t first, int64_t n) {
    const uint8_t* q = a.codes + first / 2;
    T* out = static_cast<T*>(a.out) + first;
    const F scale = splat<F>(a.scales[group]);
    const I flip = splat_integer(a.symmetric ? 8 : 0), zero = splat_integer(a.symmetric ? 8 : a.zero_points[group]);
    int64_t i = 0;
    for (; i + F::kLanes <= n; i += F::kLanes)
      store_one_nan(out + i, to_floats((load_nibbles(q + i / 2) ^ flip) - zero) * scale);
    if (i < n) {
      uint8_t rest[kHalf] = {};
      std::memcpy(rest, q + i / 2, static_cast<size_t>((n - i) / 2));
      store_one_nan_n(out + i, to_floats((load_nibbles(rest) ^ flip) - zero) * scale, n - i);
    }
  });
}

template <bool kSymmetric, class T>
void through_int4(const Int4Args& a) {
  over_groups(a, [&](int64_t, int64_t first, int64_t n) {
    const T* x = static_cast<const T*>(a.x) + first;
    T* out = static_cast<T*>(a.out) + first;
    const Group g = group_of<kSymmetric>(x, n);
    const bool coded = has_codes(g);
    const F scale = splat<F>(g.scale), nothing = splat<F>(0) * scale;
    const I zero = splat_integer(g.zero);
    for (int64_t i = 0; i < n; i += F::kLanes) {
      const F value = coded ? to_floats(codes_of<kSymmetric>(load_n(x + i, n - i), g) - zero) * scale : nothing;
      store_one_nan_n(out + i, value, n - i);
    }
  });
}

}  // namespace

void quantize_int8(const Int8Args& args) {
  if (args.columns == 0)
    for (int64_t row = 0; row < args.rows; ++row) args.scale[row] = 1e-10f / 127.f;
  args.dtype == 0 ? rows_to_int8<bf16>(args) : rows_to_int8<float>(args);
}

void quantize_int4(const Int4Args& args) {
  if (args.columns == 0)
    for (int64_t i = 0; i < args.rows * args.groups; ++i) {
      args.scale[i] = 0;
      if (!args.symmetric) args.zeros[i] = 0;
    }
  if (args.symmetric) args.dtype == 0 ? to_int4<true, bf16>(args) : to_int4<true, float>(args);
  else args.dtype == 0 ? to_int4<false, bf16>(args) : to_int4<false, float>(args);
}

void dequantize_int4(const Int4Args& args) { args.dtype == 0 ? from_int4<bf16>(args) : from_int4<float>(args); }

void fake_quantize_int4(const Int4Args& args) {
  if (args.symmetric) args.dtype == 0 ? through_int4<true, bf16>(args) : through_int4<true, float>(args);
  else args.dtype == 0 ? through_int4<false, bf16>(args) : through_int4<false, float>(args);
}

}  // namespace glm5::cpu::GLM5_ISA
