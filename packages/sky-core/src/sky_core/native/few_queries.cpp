// y = softmax(scale q kᵀ + bias) v for the queries of one new token of each row: keys and values are read once, and
// those that the bias hides (-inf: slots of the cache behind a row's end) are not read at all.
//
// B rows, G key/value heads, R queries that share one (R query heads of a token), S keys, E width of q and k, F of v.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

using namespace sky;

constexpr int64_t GRAIN = 1 << 13;  // numbers of keys that are worth a thread

struct Shape {
  int64_t R, S, E, F, k_step, v_step, bias_step;  // steps: from a key, a value, a query's bias to the next
};

// Scores of all keys for the R queries of one key/value head; what is hidden stays -inf.
template <class Number>
void score(const float* q_RE, const Number* k_SE, const float* bias_RS, const Shape& n, float scale, float* a_RS) {
  Floats sums[LANES];
  float* places[LANES];
  int held = 0;
  const auto settle = [&] {
    std::fill(sums + held, sums + LANES, Floats(0));
    float lanes[LANES];
    across_lanes(sums).store(lanes);
    for (int i = 0; i < held; i++) *places[i] += scale * lanes[i];
    held = 0;
  };
  for (int64_t s = 0; s < n.S; s++)
    for (int64_t r = 0; r < n.R; r++) {
      float* place = a_RS + r * n.S + s;
      *place = bias_RS[r * n.bias_step + s];
      if (*place == -std::numeric_limits<float>::infinity()) continue;
      Floats low_sum(0), high_sum(0);
      for (int64_t e = 0; e < n.E; e += 2 * LANES) {
        const auto [low, high] = widen(k_SE + s * n.k_step + e);
        low_sum = at::vec::fmadd(low, Floats::loadu(q_RE + r * n.E + e), low_sum);
        high_sum = at::vec::fmadd(high, Floats::loadu(q_RE + r * n.E + e + LANES), high_sum);
      }
      sums[held] = low_sum + high_sum;
      places[held++] = place;
      if (held == LANES) settle();
    }
  settle();
}

// a_S = softmax(a_S); 0 everywhere where all is hidden.
void softmax(float* a_S, int64_t S) {
  const float top = at::vec::reduce_all<float>(
      [](const Floats& a, const Floats& b) { return at::vec::maximum(a, b); }, a_S, S);
  if (top == -std::numeric_limits<float>::infinity()) return std::fill(a_S, a_S + S, 0.0f);
  at::vec::map<float>([top](const Floats& a) { return (a - Floats(top)).exp(); }, a_S, a_S, S);
  const float sum = at::vec::reduce_all<float>([](const Floats& a, const Floats& b) { return a + b; }, a_S, S);
  at::vec::map<float>([sum](const Floats& a) { return a / Floats(sum); }, a_S, a_S, S);
}

template <class Number>
void mix(const float* a_RS, const Number* v_SF, const Shape& n, float* y_RF) {
  std::fill(y_RF, y_RF + n.R * n.F, 0.0f);
  for (int64_t f = 0; f < n.F; f += 2 * LANES)
    for (int64_t r = 0; r < n.R; r++) {
      Floats low_sum(0), high_sum(0);
      for (int64_t s = 0; s < n.S; s++) {
        const float a = a_RS[r * n.S + s];
        if (a == 0) continue;
        const auto [low, high] = widen(v_SF + s * n.v_step + f);
        low_sum = at::vec::fmadd(Floats(a), low, low_sum);
        high_sum = at::vec::fmadd(Floats(a), high, high_sum);
      }
      low_sum.store(y_RF + r * n.F + f);
      high_sum.store(y_RF + r * n.F + f + LANES);
    }
}

template <class Number>
void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias, float scale,
            at::Tensor& y) {
  const int64_t B = q.size(0), G = q.size(1);
  const Shape n{q.size(2), k.size(2), q.size(3), v.size(3), k.stride(2), v.stride(2), bias.stride(2)};
  const Number* q_ = q.const_data_ptr<Number>();
  const Number* k_ = k.const_data_ptr<Number>();
  const Number* v_ = v.const_data_ptr<Number>();
  const float* bias_ = bias.const_data_ptr<float>();
  Number* y_ = y.mutable_data_ptr<Number>();
  at::parallel_for(0, B * G, std::max<int64_t>(1, GRAIN / (n.S * n.E)), [&](int64_t begin, int64_t end) {
    std::vector<float> q_RE(n.R * n.E), a_RS(n.R * n.S), y_RF(n.R * n.F);
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / G, g = i % G;
      std::copy_n(q_ + i * n.R * n.E, n.R * n.E, q_RE.begin());
      const float* bias_RS = bias_ + b * bias.stride(0) + g * bias.stride(1);
      score(q_RE.data(), k_ + b * k.stride(0) + g * k.stride(1), bias_RS, n, scale, a_RS.data());
      for (int64_t r = 0; r < n.R; r++) softmax(a_RS.data() + r * n.S, n.S);
      mix(a_RS.data(), v_ + b * v.stride(0) + g * v.stride(1), n, y_RF.data());
      std::copy_n(y_RF.begin(), n.R * n.F, y_ + i * n.R * n.F);
    }
  });
}

at::Tensor few_queries(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias,
                       double scale) {
  const int64_t B = q.size(0), G = q.size(1), R = q.size(2), E = q.size(3), S = k.size(2), F = v.size(3);
  TORCH_CHECK(k.sizes() == at::IntArrayRef({B, G, S, E}) && v.sizes() == at::IntArrayRef({B, G, S, F}),
              "q, k and v do not fit: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK(E % (2 * LANES) == 0 && F % (2 * LANES) == 0 && k.stride(3) == 1 && v.stride(3) == 1,
              "widths of ", E, " and ", F, ", not multiples of ", 2 * LANES, " that lie together");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k and v differ in dtype");
  const at::Tensor queries = q.contiguous();
  const at::Tensor wide = bias.to(at::kFloat).expand({B, G, R, S});
  TORCH_CHECK(wide.stride(3) == 1 || S == 1, "the bias of a query does not lie together");
  at::Tensor y = at::empty({B, G, R, F}, q.options());
  if (q.scalar_type() == at::kFloat) {
    attend<float>(queries, k, v, wide, scale, y);
  } else {
    TORCH_CHECK(q.scalar_type() == at::kBFloat16, "q is ", q.scalar_type(), ", not float32 or bfloat16");
    attend<at::BFloat16>(queries, k, v, wide, scale, y);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sky, library) {
  library.def("few_queries(Tensor q, Tensor k, Tensor v, Tensor bias, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(sky, CPU, library) { library.impl("few_queries", few_queries); }
