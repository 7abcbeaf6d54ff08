// y_MN = x_MK w_NKᵀ for a few rows of x: every weight is read once, in the order of memory, and widened in registers.
//
// Its floor is the time that the memory takes to hand over w. Two things keep it there: rows of w one after the other
// (four at a time, as blocked products have it, are four streams that the prefetcher loses), and sums that do not wait
// for each other (the latency of one addition is that of four steps of the loop).
//
// M rows of x, K input features, N output features.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "vectors.h"

namespace {

using namespace sky;

constexpr int MOST_ROWS = 8;
constexpr int64_t GRAIN = 1 << 15;  // weights that are worth a thread

// For each row of x, a vector whose lanes add up to Σ_k w_k x_mk for one row of w (but the last K % STEP features).
template <int M, class Weight>
inline int64_t dot(const Weight* w_K, const float* x_MK, int64_t K, Floats* sums_M) {
  constexpr int PAIRS = M == 1 ? 2 : 1;
  constexpr int STEP = 2 * PAIRS * LANES;
  Floats sums[M][2 * PAIRS];
  for (auto& row : sums) std::fill(std::begin(row), std::end(row), Floats(0));
  int64_t k = 0;
  for (; k + STEP <= K; k += STEP) {
#pragma GCC unroll 2
    for (int p = 0; p < PAIRS; p++) {
      const auto [low, high] = widen(w_K + k + 2 * p * LANES);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const float* x = x_MK + m * K + k + 2 * p * LANES;
        sums[m][2 * p] = at::vec::fmadd(low, Floats::loadu(x), sums[m][2 * p]);
        sums[m][2 * p + 1] = at::vec::fmadd(high, Floats::loadu(x + LANES), sums[m][2 * p + 1]);
      }
    }
  }
  for (int m = 0; m < M; m++) {
    sums_M[m] = sums[m][0] + sums[m][1];
    for (int p = 1; p < PAIRS; p++) sums_M[m] = sums_M[m] + (sums[m][2 * p] + sums[m][2 * p + 1]);
  }
  return k;
}

#ifdef __AVX512BF16__
// The same of bf16 with bf16: two neighbours at a time, their exact products summed in fp32.
template <int M>
inline int64_t dot(const at::BFloat16* w_K, const at::BFloat16* x_MK, int64_t K, Floats* sums_M) {
  constexpr int SUMS = M < 3 ? 4 / M : 1;
  const auto pairs = [](const at::BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); };
  __m512 sums[M][SUMS];
  for (auto& row : sums) std::fill(std::begin(row), std::end(row), _mm512_setzero_ps());
  int64_t k = 0;
  for (; k + 2 * LANES * SUMS <= K; k += 2 * LANES * SUMS) {
#pragma GCC unroll 4
    for (int s = 0; s < SUMS; s++) {
      const __m512bh w = pairs(w_K + k + 2 * LANES * s);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[m][s] = _mm512_dpbf16_ps(sums[m][s], w, pairs(x_MK + m * K + k + 2 * LANES * s));
    }
  }
  for (int m = 0; m < M; m++) {
    sums_M[m] = sums[m][0];
    for (int s = 1; s < SUMS; s++) sums_M[m] = sums_M[m] + Floats(sums[m][s]);
  }
  return k;
}
#endif

template <int M, class Weight, class Input, class Number>
void product(const Weight* w_NK, const Input* x_MK, const float* scales_N, int64_t N, int64_t K, Number* y_MN) {
  constexpr int ROWS = std::max(1, LANES / M);  // of w, whose sums across lanes are taken together
  constexpr int VECTORS = (ROWS * M + LANES - 1) / LANES * LANES;
  const int64_t tiles = (N + ROWS - 1) / ROWS;
  at::parallel_for(0, tiles, std::max<int64_t>(1, GRAIN / (K * ROWS)), [=](int64_t begin, int64_t end) {
    Floats sums[VECTORS];
    float y[VECTORS];
    for (int64_t n = begin * ROWS; n < std::min(end * ROWS, N); n += ROWS) {
      const int rows = std::min<int64_t>(ROWS, N - n);
      std::fill(std::begin(sums), std::end(sums), Floats(0));
      int64_t k = 0;
      for (int r = 0; r < rows; r++) k = dot<M>(w_NK + (n + r) * K, x_MK, K, sums + r * M);
      for (int v = 0; v < VECTORS; v += LANES) across_lanes(sums + v).store(y + v);
      for (int r = 0; r < rows; r++)
        for (int m = 0; m < M; m++) {
          float sum = y[r * M + m];
          for (int64_t rest = k; rest < K; rest++) sum += float(w_NK[(n + r) * K + rest]) * float(x_MK[m * K + rest]);
          y_MN[m * N + n + r] = scales_N ? sum * scales_N[n + r] : sum;
        }
    }
  });
}

template <int M, class Weight, class Input, class Number>
void of_rows(int64_t rows, const Weight* w, const Input* x, const float* scales, int64_t N, int64_t K, Number* y) {
  if (rows == M) return product<M>(w, x, scales, N, K, y);
  if constexpr (M < MOST_ROWS) of_rows<M + 1>(rows, w, x, scales, N, K, y);
}

std::vector<float> in_fp32(const at::Tensor& x) {
  const at::Tensor rows = x.contiguous();
  const int64_t count = rows.numel();
  if (rows.scalar_type() == at::kFloat) {
    const float* from = rows.const_data_ptr<float>();
    return {from, from + count};
  }
  TORCH_CHECK(rows.scalar_type() == at::kBFloat16, "x is ", x.scalar_type(), ", not float32 or bfloat16");
  const at::BFloat16* from = rows.const_data_ptr<at::BFloat16>();
  return {from, from + count};
}

at::Tensor few_rows(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& scales) {
  const int64_t M = x.size(0), K = x.size(1), N = w.size(0);
  TORCH_CHECK(M >= 1 && M <= MOST_ROWS, "x has ", M, " rows, not 1 to ", MOST_ROWS);
  TORCH_CHECK(w.size(1) == K && w.is_contiguous(), "w is not contiguous, or not of ", K, " input features");
  TORCH_CHECK(!scales || scales->numel() == N, "scales are not one for each of ", N, " output features");
  const at::Tensor factors = scales ? scales->to(at::kFloat).contiguous() : at::Tensor();
  const float* s = scales ? factors.const_data_ptr<float>() : nullptr;
  const at::Tensor y = at::empty({M, N}, x.options());
#ifdef __AVX512BF16__
  if (x.scalar_type() == at::kBFloat16 && w.scalar_type() == at::kBFloat16) {
    const at::Tensor rows = x.contiguous();
    of_rows<1>(M, w.const_data_ptr<at::BFloat16>(), rows.const_data_ptr<at::BFloat16>(), s, N, K,
               y.mutable_data_ptr<at::BFloat16>());
    return y;
  }
#endif
  const std::vector<float> wide = in_fp32(x);
  const auto write = [&](auto* out) {
    const auto read = [&](const auto* weights) {
      of_rows<1>(M, weights, wide.data(), s, N, K, out);
    };
    switch (w.scalar_type()) {
      case at::kFloat: return read(w.const_data_ptr<float>());
      case at::kBFloat16: return read(w.const_data_ptr<at::BFloat16>());
      case at::kChar: return read(w.const_data_ptr<int8_t>());
      default: TORCH_CHECK(false, "w is ", w.scalar_type(), ", not float32, bfloat16 or int8");
    }
  };
  if (x.scalar_type() == at::kFloat) {
    write(y.mutable_data_ptr<float>());
  } else {
    write(y.mutable_data_ptr<at::BFloat16>());
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sky, library) {
  library.def("few_rows(Tensor x, Tensor w, Tensor? scales=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(sky, CPU, library) { library.impl("few_rows", few_rows); }
