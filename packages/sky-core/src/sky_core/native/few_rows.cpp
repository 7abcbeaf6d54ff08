// y = x [w_0; w_1; ...]ᵀ for a few rows of x and one matrix or several: every weight is read once, in the order of
// memory, and widened in registers.
//
// Its floor is the time that the memory takes to hand the weights over. Three things keep it there: rows of w one after
// the other (four at a time, as blocked products have it, are four streams that the prefetcher loses), sums that do not
// wait for each other (the latency of one addition is that of four steps of the loop), and few calls: matrices that
// multiply the same x are one run through memory.
//
// Weights of int8 multiply activations of 16 bits where the machine has an instruction for it (AVX512_VNNI); widened to
// fp32 they would take longer than the memory does. x_mk is rounded to whole steps of max_k |x_mk| / 32767 for that.
//
// M rows of x, K input features, N output features of a matrix, S of all of them.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "rows.h"
#include "vectors.h"

namespace {

using namespace sky;

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

#ifdef __AVX512VNNI__
// The same of int8 with whole numbers of 16 bits, exact: 2 * 256 products of 128 * 32767 fit a lane of 32 bits.
template <int M>
inline int64_t dot(const int8_t* w_K, const int16_t* x_MK, int64_t K, Floats* sums_M) {
  constexpr int SUMS = M < 3 ? 4 / M : 1;
  constexpr int64_t STEP = 2 * LANES * SUMS, MOST = 256 * STEP;
  std::fill(sums_M, sums_M + M, Floats(0));
  int64_t k = 0;
  while (k + STEP <= K) {
    __m512i sums[M][SUMS];
    for (auto& row : sums) std::fill(std::begin(row), std::end(row), _mm512_setzero_si512());
    for (const int64_t end = std::min(K, k + MOST); k + STEP <= end; k += STEP) {
#pragma GCC unroll 4
      for (int s = 0; s < SUMS; s++) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)(w_K + k + 2 * LANES * s));
        const __m512i w = _mm512_cvtepi8_epi16(bytes);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
          sums[m][s] = _mm512_dpwssd_epi32(sums[m][s], w, _mm512_loadu_si512(x_MK + m * K + k + 2 * LANES * s));
      }
    }
    for (int m = 0; m < M; m++)
      for (int s = 0; s < SUMS; s++) sums_M[m] = sums_M[m] + Floats(_mm512_cvtepi32_ps(sums[m][s]));
  }
  return k;
}
#endif

// Rows `begin` to `end` of w with all rows of x; y begins with the first of w's output features, `S` to a row.
template <int M, class Weight, class Input, class Number>
void multiply(const Weight* w_NK, const float* scales_N, int64_t begin, int64_t end, const Input* x_MK,
              const float* steps_M, int64_t K, Number* y_MN, int64_t S) {
  constexpr int ROWS = std::max(1, LANES / M);  // of w, whose sums across lanes are taken together
  constexpr int VECTORS = (ROWS * M + LANES - 1) / LANES * LANES;
  Floats sums[VECTORS];
  float y[VECTORS];
  for (int64_t n = begin; n < end; n += ROWS) {
    const int rows = std::min<int64_t>(ROWS, end - n);
    std::fill(std::begin(sums), std::end(sums), Floats(0));
    int64_t k = 0;
    for (int r = 0; r < rows; r++) k = dot<M>(w_NK + (n + r) * K, x_MK, K, sums + r * M);
    for (int v = 0; v < VECTORS; v += LANES) across_lanes(sums + v).store(y + v);
    for (int r = 0; r < rows; r++)
      for (int m = 0; m < M; m++) {
        float sum = y[r * M + m];
        for (int64_t rest = k; rest < K; rest++) sum += float(w_NK[(n + r) * K + rest]) * float(x_MK[m * K + rest]);
        if (steps_M) sum *= steps_M[m];
        y_MN[m * S + n + r] = scales_N ? sum * scales_N[n + r] : sum;
      }
  }
}

struct Matrices {
  at::TensorList w;
  std::vector<std::vector<float>> scales;  // of each, or none
  int64_t K, S;
};

template <int M, class Weight, class Input, class Number>
void product(const Matrices& matrices, int64_t rows, const Input* x_MK, const float* steps_M, Number* y_MS) {
  if constexpr (M < MOST_ROWS) {
    if (rows > M) return product<M + 1, Weight>(matrices, rows, x_MK, steps_M, y_MS);
  }
  const at::TensorList w = matrices.w;
  const int64_t K = matrices.K;
  constexpr int BLOCK = std::max(1, LANES / M);
  std::vector<int64_t> counts, columns{0};
  for (const at::Tensor& one : w) {
    counts.push_back((one.size(0) + BLOCK - 1) / BLOCK);
    columns.push_back(columns.back() + one.size(0));
  }
  in_parallel(counts, GRAIN / (K * BLOCK), [&](size_t i, int64_t begin, int64_t end) {
    const float* factors = matrices.scales.empty() ? nullptr : matrices.scales[i].data();
    multiply<M>(w[i].const_data_ptr<Weight>(), factors, begin * BLOCK, std::min(end * BLOCK, w[i].size(0)), x_MK,
                steps_M, K, y_MS + columns[i], matrices.S);
  });
}

at::Tensor few_rows(const at::Tensor& x, at::TensorList w, at::TensorList scales) {
  TORCH_CHECK(x.dim() >= 1 && !w.empty(), "x has no features, or there is no w");
  const int64_t K = x.size(-1), M = x.numel() / std::max<int64_t>(1, K);
  TORCH_CHECK(M >= 1 && M <= MOST_ROWS, "x has ", M, " rows, not 1 to ", MOST_ROWS);
  TORCH_CHECK(scales.empty() || scales.size() == w.size(), scales.size(), " scales for ", w.size(), " matrices");
  const at::ScalarType kind = w[0].scalar_type();
  std::vector<std::vector<float>> factors;
  int64_t S = 0;
  for (size_t i = 0; i < w.size(); i++) {
    TORCH_CHECK(w[i].dim() == 2 && w[i].size(1) == K && w[i].is_contiguous(), "w is not contiguous, or not of ", K,
                " input features");
    TORCH_CHECK(w[i].scalar_type() == kind, "w is of ", kind, " and of ", w[i].scalar_type());
    if (!scales.empty()) {
      TORCH_CHECK(scales[i].numel() == w[i].size(0), "scales are not one for each of ", w[i].size(0), " features");
      factors.push_back(in_fp32(scales[i]));
    }
    S += w[i].size(0);
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = S;
  const at::Tensor y = at::empty(shape, x.options());
  const Matrices matrices{w, std::move(factors), K, S};
#ifdef __AVX512BF16__
  if (x.scalar_type() == at::kBFloat16 && kind == at::kBFloat16) {
    const at::Tensor rows = x.contiguous();
    product<1, at::BFloat16>(matrices, M, rows.const_data_ptr<at::BFloat16>(), nullptr,
                             y.mutable_data_ptr<at::BFloat16>());
    return y;
  }
#endif
  const std::vector<float> wide = in_fp32(x);
  const auto write = [&](auto* out) {
    switch (kind) {
      case at::kFloat: return product<1, float>(matrices, M, wide.data(), nullptr, out);
      case at::kBFloat16: return product<1, at::BFloat16>(matrices, M, wide.data(), nullptr, out);
      case at::kChar: {
#ifdef __AVX512VNNI__
        const Whole whole(wide, M);
        return product<1, int8_t>(matrices, M, whole.x_MK.data(), whole.steps_M.data(), out);
#else
        return product<1, int8_t>(matrices, M, wide.data(), nullptr, out);
#endif
      }
      default: TORCH_CHECK(false, "w is ", kind, ", not float32, bfloat16 or int8");
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
  library.def("few_rows(Tensor x, Tensor[] w, Tensor[] scales) -> Tensor");
}
TORCH_LIBRARY_IMPL(sky, CPU, library) { library.impl("few_rows", few_rows); }
