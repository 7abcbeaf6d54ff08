// y = x [w_0; w_1; ...]ᵀ for a few rows of x and weights of 4 bits, w = s (q - 8) + z with s and z of a group of G input
// features (`sky_core.quantization.int4`): every code is read once, and multiplied as a whole number.
//
// For one group, with x_k = r (256 h_k + l_k) rounded to 16 bits (h from -128 to 127, l from 0 to 255):
//
//     Σ_k w_k x_k = r (s (256 Σ q_k h_k + Σ q_k l_k - 8 X) + z X),    X = Σ_k (256 h_k + l_k)
//
// so that both sums are of products of bytes, of which AVX512_VNNI takes 64 at a time. It sums four neighbours along k:
// two permutations (AVX512_VBMI) bring the four bytes of an output feature, which lie P / 2 apart, together.
//
// M rows of x, K input features, N output features (whole panels of P = 64), S those of all matrices.

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "rows.h"
#include "vectors.h"

namespace {

using namespace sky;

constexpr int PANEL = 64, QUARTERS = PANEL / LANES, NEIGHBOURS = 4;
constexpr int64_t GRAIN = 1 << 15;  // weights that are worth a thread
constexpr int64_t MOST = 4096;      // features of a group: 15 * 32767 times as many fit 32 bits

// x in whole numbers, taken apart: h, l and, for each group, X.
struct Halves {
  std::vector<int8_t> high_MK;
  std::vector<uint8_t> low_MK;
  std::vector<int32_t> sums_Mg;

  Halves(const std::vector<int16_t>& x_MK, int64_t group)
      : high_MK(x_MK.size()), low_MK(x_MK.size()), sums_Mg(x_MK.size() / group) {
    for (size_t i = 0; i < x_MK.size(); i++) {
      high_MK[i] = int8_t(x_MK[i] >> 8);
      low_MK[i] = uint8_t(x_MK[i] & 0xff);
    }
    for (size_t g = 0; g < sums_Mg.size(); g++) {
      const int16_t* from = x_MK.data() + g * group;
      sums_Mg[g] = std::accumulate(from, from + group, int32_t(0));
    }
  }
};

struct Shape {
  int64_t K, N, group, S;
};

template <class Byte>
inline __m512i four(const Byte* from) {  // the same four bytes for every output feature
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// The bytes of output features 16 j to 16 j + 15 of four input features, four to a lane: codes low, codes high.
inline __m512i gather(int j) {
  alignas(64) uint8_t index[64];
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < NEIGHBOURS; i++) index[lane * NEIGHBOURS + i] = i * (PANEL / 2) + j * LANES + lane;
  return _mm512_load_si512(index);
}

// One panel with rows `first` to `first + M` of x.
template <int M, class Number>
void panel(const uint8_t* codes, const at::BFloat16* scales_gN2, const Halves& x, const float* steps_M, int64_t first,
           const Shape& n, Number* y_MS) {
  const __m512i mask = _mm512_set1_epi8(15), front = gather(0), back = gather(1);
  __m512 y[M][QUARTERS];
  for (auto& row : y) std::fill(std::begin(row), std::end(row), _mm512_setzero_ps());
  for (int64_t g = 0; g < n.K / n.group; g++) {
    for (int i = 0; i < QUARTERS; i++)  // of the next panel: they lie too far apart for the machine to foresee
      _mm_prefetch((const char*)(scales_gN2 + 2 * (g * n.N + PANEL + i * LANES)), _MM_HINT_T0);
    __m512i high[M][QUARTERS], low[M][QUARTERS];
    for (int m = 0; m < M; m++)
      for (int i = 0; i < QUARTERS; i++) high[m][i] = low[m][i] = _mm512_setzero_si512();
    for (int64_t k = g * n.group; k < (g + 1) * n.group; k += NEIGHBOURS) {
      const __m512i one = _mm512_loadu_si512(codes + k * (PANEL / 2));
      const __m512i two = _mm512_loadu_si512(codes + (k + 2) * (PANEL / 2));
      const __m512i a = _mm512_permutex2var_epi8(one, front, two), b = _mm512_permutex2var_epi8(one, back, two);
      const __m512i q[QUARTERS] = {_mm512_and_si512(a, mask), _mm512_and_si512(b, mask),
                                   _mm512_and_si512(_mm512_srli_epi16(a, 4), mask),
                                   _mm512_and_si512(_mm512_srli_epi16(b, 4), mask)};
#pragma GCC unroll 2
      for (int m = 0; m < M; m++) {
        const __m512i h = four(x.high_MK.data() + (first + m) * n.K + k);
        const __m512i l = four(x.low_MK.data() + (first + m) * n.K + k);
#pragma GCC unroll 4
        for (int i = 0; i < QUARTERS; i++) {
          high[m][i] = _mm512_dpbusd_epi32(high[m][i], q[i], h);
          low[m][i] = _mm512_dpbusd_epi32(low[m][i], l, q[i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < QUARTERS; i++) {
      const __m512i pairs = _mm512_loadu_si512(scales_gN2 + 2 * (g * n.N + i * LANES));  // of bf16: s, z
      const __m512 s = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      const __m512 z = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
#pragma GCC unroll 2
      for (int m = 0; m < M; m++) {
        const int32_t all = x.sums_Mg[(first + m) * (n.K / n.group) + g];
        const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(high[m][i], 8), low[m][i]),
                                             _mm512_set1_epi32(8 * all));
        y[m][i] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(sum), y[m][i]);
        y[m][i] = _mm512_fmadd_ps(z, _mm512_set1_ps(float(all)), y[m][i]);
      }
    }
  }
  for (int m = 0; m < M; m++) {
    float wide[PANEL];
    for (int i = 0; i < QUARTERS; i++) _mm512_storeu_ps(wide + i * LANES, y[m][i]);
    for (int i = 0; i < PANEL; i++) y_MS[(first + m) * n.S + i] = steps_M[first + m] * wide[i];
  }
}

template <class Number>
void product(at::TensorList codes, at::TensorList scales, const Halves& x, const std::vector<float>& steps_M,
             int64_t group, int64_t K, int64_t S, Number* y_MS) {
  std::vector<int64_t> counts, columns{0};
  for (const at::Tensor& one : codes) {
    counts.push_back(one.size(0) / PANEL);
    columns.push_back(columns.back() + one.size(0));
  }
  const int64_t M = steps_M.size();
  in_parallel(counts, GRAIN / (K * PANEL), [&](size_t i, int64_t begin, int64_t end) {
    const Shape n{K, codes[i].size(0), group, S};
    for (int64_t p = begin; p < end; p++) {
      const uint8_t* from = codes[i].const_data_ptr<uint8_t>() + p * K * (PANEL / 2);
      const at::BFloat16* scales_gN2 = scales[i].const_data_ptr<at::BFloat16>() + p * PANEL * 2;
      Number* y = y_MS + columns[i] + p * PANEL;
      int64_t m = 0;
      for (; m + 2 <= M; m += 2) panel<2>(from, scales_gN2, x, steps_M.data(), m, n, y);
      if (m < M) panel<1>(from, scales_gN2, x, steps_M.data(), m, n, y);
    }
  });
}

at::Tensor few_rows_int4(const at::Tensor& x, at::TensorList codes, at::TensorList scales, int64_t group) {
  TORCH_CHECK(x.dim() >= 1 && !codes.empty(), "x has no features, or there are no codes");
  const int64_t K = x.size(-1), M = x.numel() / std::max<int64_t>(1, K);
  TORCH_CHECK(M >= 1 && M <= MOST_ROWS, "x has ", M, " rows, not 1 to ", MOST_ROWS);
  TORCH_CHECK(group > 0 && group <= MOST && group % NEIGHBOURS == 0 && K % group == 0, "groups of ", group, " in ", K, " features");
  TORCH_CHECK(scales.size() == codes.size(), scales.size(), " scales for ", codes.size(), " matrices");
  int64_t S = 0;
  for (size_t i = 0; i < codes.size(); i++) {
    const int64_t N = codes[i].size(0);
    TORCH_CHECK(codes[i].scalar_type() == at::kByte && codes[i].is_contiguous() && codes[i].size(1) == K / 2 &&
                    N % PANEL == 0, "codes are not bytes of whole panels of ", PANEL, " with ", K, " features");
    TORCH_CHECK(scales[i].scalar_type() == at::kBFloat16 && scales[i].is_contiguous() &&
                    scales[i].sizes() == at::IntArrayRef({K / group, N, 2}), "scales are not bf16 of ", K / group,
                " groups of ", N, " features");
    S += N;
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = S;
  const at::Tensor y = at::empty(shape, x.options());
  const Whole whole(in_fp32(x), M);
  const Halves halves(whole.x_MK, group);
  if (x.scalar_type() == at::kFloat) {
    product(codes, scales, halves, whole.steps_M, group, K, S, y.mutable_data_ptr<float>());
  } else {
    product(codes, scales, halves, whole.steps_M, group, K, S, y.mutable_data_ptr<at::BFloat16>());
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sky, library) {
  library.def("few_rows_int4(Tensor x, Tensor[] codes, Tensor[] scales, int group) -> Tensor");
}
TORCH_LIBRARY_IMPL(sky, CPU, library) { library.impl("few_rows_int4", few_rows_int4); }

#endif
