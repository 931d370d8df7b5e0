// The projections of a decoder layer around its attention, each group in one call: a decode step is so many small calls that
// what lies between them costs as much as many of them. Nothing is computed here: the kernels are those of linear,
// batched_linear, rms_norm, layer_norm, rope and silu_mul with the arguments that those ops give them, so that the bits are
// those of the ops called one after the other. Products of one input are one list for the GEMM core. No gradients.
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/gemm/gemm.h"
#include "norm/norm.h"
#include "rope/rope.h"
#include "silu_mul/silu_mul.h"

namespace glm5 {
namespace {

// Intermediate results, freed with it.
class Workspace {
 public:
  Workspace(int64_t elements, ScalarType dtype, int64_t pieces)
      : size_(static_cast<int64_t>(element_bytes(dtype))),
        memory_(empty_cpu({elements * size_ + 64 * pieces}, ScalarType::Byte)),
        next_(static_cast<char*>(memory_.mutable_data_ptr())) {}
  void* take(int64_t elements) {
    void* here = next_;
    next_ += (elements * size_ + 63) / 64 * 64;
    return here;
  }

 private:
  int64_t size_;
  Tensor memory_;
  char* next_;
};

// One layer's call: the op's name and the dtype of its activations and weights.
struct Layer {
  const char* op;
  Dtype dtype;
  ScalarType type;
  int64_t rows;
  std::vector<GemmArgs> products;

  Layer(const char* of, const char* name, const Tensor& x) : op(of), dtype(float_dtype(of, name, x)), type(x.scalar_type()) {
    check_cpu(op, name, x);
    check_dtype(op, name, x, {ScalarType::BFloat16, ScalarType::Float});
    rows = x.size(0);
  }

  int64_t size() const { return static_cast<int64_t>(element_bytes(type)); }

  // A weight of this dtype, contiguous; `dims` of -1 are any size.
  Tensor weight(const char* name, const Tensor& t, std::initializer_list<int64_t> dims) const {
    check_cpu(op, name, t);
    check_dtype(op, name, t, {type});
    check_dim(op, name, t, static_cast<int64_t>(dims.size()), dims.size() == 1 ? "[dim]" : "[out, in]");
    int64_t d = 0;
    for (const int64_t want : dims) {
      if (want >= 0) check_size(op, name, t, d, want, "what the other arguments make it");
      ++d;
    }
    return as_contiguous(t);
  }

  // c [rows, n], rows c_row apart, = x [rows, k] times the rows [first, first + n) of w, transposed.
  void multiply(const void* x, int64_t x_row, const Tensor& w, int64_t first, int64_t n, const Tensor* bias, void* c,
                int64_t c_row, Dtype out) {
    GemmArgs g{};
    g.dtype = static_cast<int>(dtype), g.out_dtype = static_cast<int>(out);
    g.m = rows, g.n = n, g.k = w.size(1);
    g.a = x, g.a_row = x_row, g.a_col = 1;
    g.b = static_cast<const char*>(w.const_data_ptr()) + first * g.k * size(), g.b_row = 1, g.b_col = g.k;
    g.c = c, g.c_row = c_row;
    g.bias = bias ? static_cast<const char*>(bias->const_data_ptr()) + first * size() : nullptr;
    products.push_back(g);
  }
  void multiply(const void* x, const Tensor& w, const Tensor* bias, void* c) {
    multiply(x, w.size(1), w, 0, w.size(0), bias, c, w.size(0), dtype);
  }

  void run() {
    GLM5_CALL_KERNEL(false, gemm, products.data(), static_cast<int64_t>(products.size()));
    products.clear();
  }

  void rms_norm(const void* x, const Tensor& weight, double eps, void* y) const {
    RmsNormArgs args{};
    args.dtype = static_cast<int>(dtype);
    args.rows = rows, args.dim = weight.size(0), args.eps = eps;
    args.x = x, args.weight = weight.const_data_ptr(), args.y = y;
    GLM5_CALL_KERNEL(false, rms_norm_forward, args);
  }

  // `to` and `from` are blocks of `width` elements, count of them.
  void copy(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t width, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(static_cast<char*>(to) + i * to_stride * size(), static_cast<const char*>(from) + i * from_stride * size(),
                  width * size());
  }

  void* at(void* p, int64_t elements) const { return static_cast<char*>(p) + elements * size(); }
  const void* at(const void* p, int64_t elements) const { return static_cast<const char*>(p) + elements * size(); }
};

// Rotates the first dims of heads where they lie, or those of `from` to `to`.
struct Rotation {
  Layer& layer;
  Tensor cos, sin, positions;
  int64_t dim;
  void* buffer;  // [rows, heads, dim]

  void operator()(const void* from, int64_t from_row, int64_t from_head, int64_t heads, void* to, int64_t to_row,
                  int64_t to_head) const {
    RopeArgs args{};
    args.dtype = static_cast<int>(layer.dtype), args.interleaved = true, args.sign = 1;
    args.tokens = layer.rows, args.heads = heads, args.dim = dim;
    args.x_token_stride = from_row, args.x_head_stride = from_head;
    args.x = from, args.cos = cos.const_data_ptr(), args.sin = sin.const_data_ptr();
    args.positions = positions.const_data_ptr(), args.y = buffer;
    GLM5_CALL_KERNEL(false, rope, args);
    for (int64_t t = 0; t < layer.rows; ++t)
      layer.copy(layer.at(to, t * to_row), to_head, layer.at(buffer, t * heads * dim), dim, dim, heads);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> decoder_inputs(
    const Tensor& x_in, const Tensor& q_a_in, const std::optional<Tensor>& q_a_bias_in, const Tensor& q_norm_in,
    const Tensor& q_b_in, const Tensor& kv_a_in, const std::optional<Tensor>& kv_a_bias_in, const Tensor& kv_norm_in,
    const Tensor& kv_b_in, int64_t heads, int64_t nope, double eps, const Tensor& cos_in, const Tensor& sin_in,
    const Tensor& positions_in, const std::optional<Tensor>& index_q_in, const std::optional<Tensor>& index_k_in,
    const std::optional<Tensor>& index_norm_in, const std::optional<Tensor>& index_norm_bias_in,
    const std::optional<Tensor>& index_weights_in, double index_scale) {
  const char* op = "decoder_inputs";
  check_dim(op, "x", x_in, 2, "[tokens, hidden]");
  const Tensor x = as_contiguous(x_in);
  Layer layer(op, "x", x);
  const int64_t rows = layer.rows, hidden = x.size(1), half = cos_in.dim() == 2 ? cos_in.size(1) : 0, rope = 2 * half;
  const Tensor q_norm = layer.weight("q_norm", q_norm_in, {-1}), kv_norm = layer.weight("kv_norm", kv_norm_in, {-1});
  const int64_t q_rank = q_norm.size(0), kv = kv_norm.size(0), wide = kv + rope;
  if (heads < 1 || nope < 1 || rope < 2)
    fail(op, ": heads is ", heads, ", nope ", nope, ", rope ", rope, ", want at least 1");
  const Tensor q_a = layer.weight("q_a", q_a_in, {q_rank, hidden}), kv_a = layer.weight("kv_a", kv_a_in, {wide, hidden});
  const Tensor q_b = layer.weight("q_b", q_b_in, {heads * (nope + rope), q_rank});
  const Tensor kv_b = layer.weight("kv_b", kv_b_in, {-1, kv});
  if (kv_b.size(0) % heads || kv_b.size(0) / heads < nope)
    fail(op, ": kv_b has shape ", shape_of(kv_b), ", want at least ", nope, " rows for each of ", heads, " heads");
  std::optional<Tensor> q_a_bias, kv_a_bias;
  if (q_a_bias_in) q_a_bias = layer.weight("q_a_bias", *q_a_bias_in, {q_rank});
  if (kv_a_bias_in) kv_a_bias = layer.weight("kv_a_bias", *kv_a_bias_in, {wide});
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in), positions = as_contiguous(positions_in);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"cos", cos}, {"sin", sin}}) {
    check_cpu(op, name, t);
    check_dtype(op, name, t, {ScalarType::Float});
    check_dim(op, name, t, 2, "[positions, rope / 2]");
    check_size(op, name, t, 0, cos.size(0), "the rows of cos");
    check_size(op, name, t, 1, half, "the columns of cos");
  }
  check_cpu(op, "positions", positions);
  check_dtype(op, "positions", positions, {ScalarType::Int});
  check_dim(op, "positions", positions, 1, "[tokens]");
  check_size(op, "positions", positions, 0, rows, "the tokens of x");
  const int32_t* position = positions.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < rows; ++t)
    if (position[t] < 0 || position[t] >= cos.size(0))
      fail(op, ": positions[", t, "] is ", position[t], ", want 0 <= position < ", cos.size(0), " (the rows of cos)");

  const bool indexed = index_q_in.has_value();
  Tensor index_q = q_a, index_k = q_a, index_norm = q_a, index_norm_bias = q_a, index_weights = q_a;
  int64_t index_heads = 0, index_dim = 0;
  if (indexed) {
    if (!index_k_in || !index_norm_in || !index_norm_bias_in || !index_weights_in)
      fail(op, ": index_q comes without one of the indexer's other weights, want all or none");
    index_norm = layer.weight("index_norm", *index_norm_in, {-1});
    index_dim = index_norm.size(0);
    index_norm_bias = layer.weight("index_norm_bias", *index_norm_bias_in, {index_dim});
    index_weights = layer.weight("index_weights", *index_weights_in, {-1, hidden});
    index_heads = index_weights.size(0);
    index_k = layer.weight("index_k", *index_k_in, {index_dim, hidden});
    index_q = layer.weight("index_q", *index_q_in, {index_heads * index_dim, q_rank});
    if (index_dim < rope) fail(op, ": index_norm has shape ", shape_of(index_norm), ", want at least ", rope, " dims");
  }

  const int64_t most_heads = heads > index_heads ? heads : index_heads, q_width = heads * (nope + rope);
  Tensor q = empty_cpu({rows, heads, wide}, layer.type), latent = empty_cpu({rows, wide}, layer.type);
  Tensor out_q = empty_cpu({rows, index_heads, index_dim}, layer.type), out_k = empty_cpu({rows, index_dim}, layer.type);
  Tensor out_weights = empty_cpu({rows, index_heads}, ScalarType::Float);
  if (rows == 0) return {q, latent, out_q, out_k, out_weights};
  Workspace work(rows * (2 * q_rank + 2 * kv + rope + q_width + most_heads * rope + index_dim), layer.type, 8);
  void *q_low = work.take(rows * q_rank), *q_normed = work.take(rows * q_rank), *q_full = work.take(rows * q_width);
  void *compressed = work.take(rows * kv), *compressed_normed = work.take(rows * kv), *k_rope = work.take(rows * rope);
  void* k_raw = work.take(rows * index_dim);
  const Rotation rotate{layer, cos, sin, positions, rope, work.take(rows * most_heads * rope)};

  const Tensor *q_a_b = q_a_bias ? &*q_a_bias : nullptr, *kv_a_b = kv_a_bias ? &*kv_a_bias : nullptr;
  const void* in = x.const_data_ptr();
  layer.multiply(in, q_a, q_a_b, q_low);
  layer.multiply(in, hidden, kv_a, 0, kv, kv_a_b, compressed, kv, layer.dtype);
  layer.multiply(in, hidden, kv_a, kv, rope, kv_a_b, k_rope, rope, layer.dtype);
  if (indexed) {
    layer.multiply(in, index_k, nullptr, k_raw);
    layer.multiply(in, hidden, index_weights, 0, index_heads, nullptr, out_weights.mutable_data_ptr(), index_heads,
                   Dtype::float32);
  }
  layer.run();

  layer.rms_norm(q_low, q_norm, eps, q_normed);
  layer.multiply(q_normed, q_b, nullptr, q_full);
  if (indexed) layer.multiply(q_normed, index_q, nullptr, out_q.mutable_data_ptr());
  layer.run();

  // The key half: normed latent rows beside rotated keys.
  layer.rms_norm(compressed, kv_norm, eps, compressed_normed);
  layer.copy(latent.mutable_data_ptr(), wide, compressed_normed, kv, kv, rows);
  rotate(k_rope, rope, rope, 1, layer.at(latent.mutable_data_ptr(), kv), wide, rope);

  // The query, its first part taken to the latent space.
  const int64_t of_head = kv_b.size(0) / heads;
  for (int64_t h = 0; h < heads; ++h) {
    GemmArgs g{};
    g.dtype = g.out_dtype = static_cast<int>(layer.dtype);
    g.m = rows, g.n = kv, g.k = nope;
    g.a = layer.at(static_cast<const void*>(q_full), h * (nope + rope)), g.a_row = q_width, g.a_col = 1;
    g.b = layer.at(kv_b.const_data_ptr(), h * of_head * kv), g.b_row = kv, g.b_col = 1;
    g.c = layer.at(q.mutable_data_ptr(), h * wide), g.c_row = heads * wide;
    layer.products.push_back(g);
  }
  layer.run();
  rotate(layer.at(static_cast<const void*>(q_full), nope), q_width, nope + rope, heads, layer.at(q.mutable_data_ptr(), kv),
         heads * wide, wide);

  if (indexed) {
    LayerNormArgs norm{};
    norm.dtype = static_cast<int>(layer.dtype);
    norm.rows = rows, norm.dim = index_dim, norm.eps = eps;
    norm.x = k_raw, norm.weight = index_norm.const_data_ptr(), norm.bias = index_norm_bias.const_data_ptr();
    norm.y = out_k.mutable_data_ptr();
    GLM5_CALL_KERNEL(false, layer_norm_forward, norm);
    rotate(norm.y, index_dim, index_dim, 1, norm.y, index_dim, index_dim);
    void* heads_of_q = out_q.mutable_data_ptr();
    rotate(heads_of_q, index_heads * index_dim, index_dim, index_heads, heads_of_q, index_heads * index_dim, index_dim);
    float* w = static_cast<float*>(out_weights.mutable_data_ptr());
    for (int64_t i = 0; i < rows * index_heads; ++i) w[i] *= static_cast<float>(index_scale);
  }
  return {q, latent, out_q, out_k, out_weights};
}

Tensor decoder_output(const Tensor& attended_in, const Tensor& kv_b_in, int64_t nope, const Tensor& o_in,
                      const std::optional<Tensor>& o_bias_in) {
  const char* op = "decoder_output";
  check_dim(op, "attended", attended_in, 3, "[tokens, heads, kv]");
  const Tensor x = as_contiguous(attended_in);
  Layer layer(op, "attended", x);
  const int64_t rows = layer.rows, heads = x.size(1), kv = x.size(2);
  const Tensor kv_b = layer.weight("kv_b", kv_b_in, {-1, kv});
  if (heads < 1 || nope < 0 || kv_b.size(0) % heads || kv_b.size(0) / heads < nope)
    fail(op, ": kv_b has shape ", shape_of(kv_b), ", want at least ", nope, " rows for each of ", heads, " heads");
  const int64_t of_head = kv_b.size(0) / heads, value = of_head - nope;
  const Tensor o = layer.weight("o", o_in, {-1, heads * value});
  std::optional<Tensor> bias;
  if (o_bias_in) bias = layer.weight("o_bias", *o_bias_in, {o.size(0)});
  Tensor out = empty_cpu({rows, o.size(0)}, layer.type);
  Workspace work(rows * heads * value, layer.type, 1);
  void* values = work.take(rows * heads * value);
  for (int64_t h = 0; h < heads; ++h)
    layer.multiply(layer.at(x.const_data_ptr(), h * kv), heads * kv, kv_b, h * of_head + nope, value, nullptr,
                   layer.at(values, h * value), heads * value, layer.dtype);
  layer.run();
  layer.multiply(values, o, bias ? &*bias : nullptr, out.mutable_data_ptr());
  layer.run();
  return out;
}

Tensor decoder_mlp(const Tensor& x_in, const Tensor& gate_in, const Tensor& up_in, const Tensor& down_in) {
  const char* op = "decoder_mlp";
  check_dim(op, "x", x_in, 2, "[tokens, hidden]");
  const Tensor x = as_contiguous(x_in);
  Layer layer(op, "x", x);
  const int64_t rows = layer.rows, hidden = x.size(1);
  const Tensor gate = layer.weight("gate", gate_in, {-1, hidden});
  const int64_t width = gate.size(0);
  const Tensor up = layer.weight("up", up_in, {width, hidden}), down = layer.weight("down", down_in, {-1, width});
  Tensor out = empty_cpu({rows, down.size(0)}, layer.type);
  Workspace work(rows * 3 * width, layer.type, 2);
  void *both = work.take(rows * 2 * width), *activated = work.take(rows * width);
  layer.multiply(x.const_data_ptr(), hidden, gate, 0, width, nullptr, both, 2 * width, layer.dtype);
  layer.multiply(x.const_data_ptr(), hidden, up, 0, width, nullptr, layer.at(both, width), 2 * width, layer.dtype);
  layer.run();
  SiluMulArgs args{};
  args.dtype = static_cast<int>(layer.dtype);
  args.rows = rows, args.width = width, args.x = both, args.y = activated;
  GLM5_CALL_KERNEL(false, silu_mul_forward, args);
  layer.multiply(activated, down, nullptr, out.mutable_data_ptr());
  layer.run();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def(
      "decoder_inputs(Tensor x, Tensor q_a, Tensor? q_a_bias, Tensor q_norm, Tensor q_b, Tensor kv_a, Tensor? kv_a_bias, "
      "Tensor kv_norm, Tensor kv_b, int heads, int nope, float eps, Tensor cos, Tensor sin, Tensor positions, "
      "Tensor? index_q, Tensor? index_k, Tensor? index_norm, Tensor? index_norm_bias, Tensor? index_weights, "
      "float index_scale) -> (Tensor q, Tensor latent, Tensor index_q_out, Tensor index_k_out, Tensor index_weights_out)");
  m.def("decoder_output(Tensor attended, Tensor kv_b, int nope, Tensor o, Tensor? o_bias) -> Tensor");
  m.def("decoder_mlp(Tensor x, Tensor gate, Tensor up, Tensor down) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, decoder_inputs);
  GLM5_IMPL(m, decoder_output);
  GLM5_IMPL(m, decoder_mlp);
}

}  // namespace glm5
