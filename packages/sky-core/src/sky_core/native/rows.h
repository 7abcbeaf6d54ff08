// What products of a few rows share: their input as numbers that the machine multiplies fast, and the threads' parts of
// several matrices that lie apart.
//
// M rows of x, K input features.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace sky {

constexpr int MOST_ROWS = 8;

inline std::vector<float> in_fp32(const at::Tensor& x) {
  const at::Tensor rows = x.contiguous();
  std::vector<float> wide(rows.numel());
  if (rows.scalar_type() == at::kFloat) {
    std::copy_n(rows.const_data_ptr<float>(), wide.size(), wide.data());
  } else {
    TORCH_CHECK(rows.scalar_type() == at::kBFloat16, "numbers of ", x.scalar_type(), ", not float32 or bfloat16");
    at::vec::convert(rows.const_data_ptr<at::BFloat16>(), wide.data(), wide.size());
  }
  return wide;
}

#ifdef __AVX512VNNI__
// x_mk ≈ steps_m whole_mk with whole numbers of 16 bits: steps_m = max_k |x_mk| / 32767, NaN where x_m is not finite, 0
// where it is nothing (or so small that its reciprocal is no number).
struct Whole {
  std::vector<int16_t> x_MK;
  std::vector<float> steps_M;

  Whole(const std::vector<float>& from_MK, int64_t M) : x_MK(from_MK.size()), steps_M(M) {
    const int64_t K = from_MK.size() / M;
    constexpr float most = std::numeric_limits<int16_t>::max();
    for (int64_t m = 0; m < M; m++) {
      const float* from_K = from_MK.data() + m * K;
      const auto here = [K](int64_t k) { return __mmask16((1u << std::min<int64_t>(LANES, K - k)) - 1); };
      Floats largest(0);
      for (int64_t k = 0; k < K; k += LANES)  // a NaN stays
        largest = at::vec::maximum(largest, Floats(_mm512_maskz_loadu_ps(here(k), from_K + k)).abs());
      const float size = at::vec::vec_reduce_all<float>(
          [](const Floats& a, const Floats& b) { return at::vec::maximum(a, b); }, largest);
      if (!std::isfinite(size)) steps_M[m] = std::numeric_limits<float>::quiet_NaN();
      if (!std::isfinite(size) || !std::isfinite(most / size)) continue;
      steps_M[m] = size / most;
      const __m512 factor = _mm512_set1_ps(most / size);
      for (int64_t k = 0; k < K; k += LANES) {
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(here(k), from_K + k), factor);
        _mm512_mask_cvtsepi32_storeu_epi16(x_MK.data() + m * K + k, here(k), _mm512_cvtps_epi32(scaled));
      }
    }
  }
};
#endif

// Calls `of(i, begin, end)` for the parts of matrix i, of `counts[i]` blocks of equal work, that fall to a thread.
template <class Part>
void in_parallel(const std::vector<int64_t>& counts, int64_t grain, const Part& of) {
  int64_t all = 0;
  for (const int64_t count : counts) all += count;
  at::parallel_for(0, all, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (size_t i = 0; i < counts.size(); first += counts[i++]) {
      const int64_t from = std::max(begin, first) - first, to = std::min(end, first + counts[i]) - first;
      if (from < to) of(i, from, to);
    }
  });
}

}  // namespace sky
