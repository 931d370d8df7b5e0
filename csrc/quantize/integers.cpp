// Quantisation to int8 by rows and to int4 by groups, back from int4, and both at once for training.
#include "common/pieces.h"
#include "common/quantize.h"
#include "quantize/quantize.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// ---- int8 ----

template <class T>
void rows_to_int8(const Int8Args& a) {
  // A row has one scale: it is not cut.
  over_pieces(a.rows, a.columns, a.columns, [&](int64_t row, int64_t, int64_t n) {
    const T* x = static_cast<const T*>(a.x) + row * n;
    const float scale = a.scale[row] = int8_scale(largest_magnitude(x, n));
    encode_int8(x, n, scale, a.q + row * n);
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
      uint8_t rest[F::kLanes / 2];
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
      uint8_t rest[F::kLanes / 2] = {};
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
    for (int64_t row = 0; row < args.rows; ++row) args.scale[row] = int8_scale(0);
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
