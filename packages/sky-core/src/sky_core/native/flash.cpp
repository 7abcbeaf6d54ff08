// Attention of whole sequences in bf16 for training, forward and backward, in blocks that stay in the cache.
//
// Dao et al. 2022, FlashAttention (arXiv:2205.14135), algorithms 1 and 4; Dao 2023 (arXiv:2307.08691), section 3.1 (one
// division at the end, logsumexp kept). With S = scale q kᵀ, L = logsumexp(S), P = exp(S - L), D = rowsum(dy y):
//
//     y = P v,   dv = Pᵀ dy,   dS = P (dy vᵀ - D),   dq = scale dS k,   dk = scale dSᵀ q
//
// Blocks are 64 x 64; a causal mask leaves out the blocks above the diagonal. Products are of bf16 pairs, summed in fp32
// (AVX512_BF16, `vdpbf16ps`): C_MN += A_MK B_KN with A by rows and B by pairs of rows, (K / 2, N, 2), so that a lane
// holds two neighbours in K of one column. Why not torch's: its blocks are products of general matrices, whose
// preparation costs more than the arithmetic. In the backward pass scores are computed transposed (keys by queries),
// as both Pᵀ dy and dSᵀ q want them.
//
// B rows, G key/value heads, R query heads of each, T tokens, E width of q and k, F of v; a block has N = 64 tokens.

#ifdef __AVX512BF16__

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using Half = uint16_t;   // bf16
using Pair = uint32_t;   // two of them
constexpr int N = 64;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

template <class Number>
struct Matrix {  // rows of `columns` numbers, zero at first
  int64_t columns;
  std::vector<Number> numbers;
  Matrix(int64_t rows, int64_t columns) : columns(columns), numbers(rows * columns) {}
  Number* row(int64_t i) { return numbers.data() + i * columns; }
  const Number* row(int64_t i) const { return numbers.data() + i * columns; }
  void clear() { std::fill(numbers.begin(), numbers.end(), Number(0)); }
};

// C (4, 16 V) += A (4, 2 K) B (2 K, 16 V)
template <int V>
inline void tile(const Half* a, int64_t a_step, const Pair* b, int64_t b_step, int64_t K, float* c, int64_t c_step) {
  __m512 sums[4][V];
  for (int m = 0; m < 4; m++)
    for (int v = 0; v < V; v++) sums[m][v] = _mm512_loadu_ps(c + m * c_step + 16 * v);
  for (int64_t k = 0; k < K; k++) {
    __m512bh columns[V];
    for (int v = 0; v < V; v++) columns[v] = (__m512bh)_mm512_loadu_si512(b + k * b_step + 16 * v);
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
      int pair;
      std::memcpy(&pair, a + m * a_step + 2 * k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], both, columns[v]);
    }
  }
  for (int m = 0; m < 4; m++)
    for (int v = 0; v < V; v++) _mm512_storeu_ps(c + m * c_step + 16 * v, sums[m][v]);
}

// C (M, columns) += A (M, 2 K) B (2 K, columns); M is a multiple of 4, columns of 16.
void multiply(int64_t M, int64_t columns, int64_t K, const Half* a, int64_t a_step, const Pair* b, int64_t b_step,
              float* c, int64_t c_step) {
  for (int64_t n = 0; n < columns; n += 64)
    for (int64_t m = 0; m < M; m += 4) {
      const auto call = [&](auto kernel) {
        kernel(a + m * a_step, a_step, b + n, b_step, K, c + m * c_step + n, c_step);
      };
      switch (std::min<int64_t>(4, (columns - n) / 16)) {
        case 4: call(tile<4>); break;
        case 3: call(tile<3>); break;
        case 2: call(tile<2>); break;
        default: call(tile<1>);
      }
    }
}

inline __m256i to_half(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline __m512 to_float(const Half* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

// Rows of a matrix of bf16 in memory, `step` numbers apart.
struct Rows {
  const Half* from;
  int64_t step, count, width;
  // `rows` rows from `start` on, zero behind the last.
  void copy(int64_t start, int64_t rows, Half* into) const {
    for (int64_t i = 0; i < rows; i++, into += width)
      if (start + i < count) std::copy_n(from + (start + i) * step, width, into);
      else std::fill_n(into, width, Half(0));
  }
};

// (rows, width) -> (rows / 2, width) pairs of neighbouring rows
void pair_rows(const Half* x, int64_t rows, int64_t width, Pair* into) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < width; j++) *into++ = x[i * width + j] | Pair(x[(i + 1) * width + j]) << 16;
}

// (rows, width) -> (width / 2, step) pairs of neighbouring columns, transposed
void pair_columns(const Half* x, int64_t rows, int64_t width, Pair* into, int64_t step) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < width; j += 2) std::memcpy(into + j / 2 * step + i, x + i * width + j, sizeof(Pair));
}

struct Heads {  // one tensor (B, H, T, E) whose last dimension lies together
  const Half* data;
  int64_t row, head, step, count, width;
  explicit Heads(const at::Tensor& x)
      : data(static_cast<const Half*>(x.const_data_ptr())), row(x.stride(0)), head(x.stride(1)), step(x.stride(2)),
        count(x.size(2)), width(x.size(3)) {}
  Rows at(int64_t b, int64_t h) const { return {data + b * row + h * head, step, count, width}; }
};

inline __m512 exponential(__m512 x) {  // e^x for x <= 0: 2^n (1 + r (1 + r / 2 (...))), relative error 2e-7
  const __m512 t = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-120.0f)), _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(t, whole);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);  // 2^rest, -0.5 <= rest <= 0.5
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, whole);
}

const __m512i LANE = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

struct Forward {
  Matrix<Half> q, p;
  Matrix<float> scores, y;
  std::vector<float> top, sum;
  Forward(int64_t E, int64_t F) : q(N, E), p(N, N), scores(N, N), y(N, F), top(N), sum(N) {}

  // Take in keys [from, from + N) of which each query sees those before its limit.
  void take(const Pair* keys, int64_t step, const Pair* values, int64_t from, const int64_t* limits, float scale) {
    scores.clear();
    multiply(N, N, q.columns / 2, q.row(0), q.columns, keys + from, step, scores.row(0), N);
    for (int m = 0; m < N; m++) {
      float* s = scores.row(m);
      __m512 most = _mm512_set1_ps(-INFINITE);
      for (int n = 0; n < N; n += 16) {
        const __mmask16 seen = _mm512_cmplt_epi32_mask(LANE, _mm512_set1_epi32(limits[m] - from - n));
        const __m512 x = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITE), seen, _mm512_loadu_ps(s + n), _mm512_set1_ps(scale));
        _mm512_storeu_ps(s + n, x);
        most = _mm512_max_ps(most, x);
      }
      const float above = std::max(top[m], _mm512_reduce_max_ps(most));
      const float shrink = top[m] == above ? 1.0f : std::exp(top[m] - above);
      __m512 total = _mm512_setzero_ps();
      for (int n = 0; n < N; n += 16) {
        const __m512 x = _mm512_loadu_ps(s + n);
        const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITE), _CMP_GT_OQ);
        const __m512 e = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(x, _mm512_set1_ps(above))));
        total = _mm512_add_ps(total, e);
        _mm256_storeu_si256((__m256i*)(p.row(m) + n), to_half(e));
      }
      sum[m] = sum[m] * shrink + _mm512_reduce_add_ps(total);
      top[m] = above;
      if (shrink != 1.0f)
        for (int64_t f = 0; f < y.columns; f++) y.row(m)[f] *= shrink;
    }
    multiply(N, y.columns, N / 2, p.row(0), N, values + from / 2 * y.columns, y.columns, y.row(0), y.columns);
  }
};

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                                           bool causal) {
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), E = q.size(3), G = k.size(1), F = v.size(3);
  const int64_t R = H / G, padded = (T + N - 1) / N * N;
  const at::Tensor y = at::empty({B, H, T, F}, q.options());
  const at::Tensor logsum = at::empty({B, H, T}, q.options().dtype(at::kFloat));
  const Heads queries(q), keys(k), values(v);
  Half* y_ = static_cast<Half*>(y.mutable_data_ptr());
  float* logsum_ = logsum.mutable_data_ptr<float>();
  at::parallel_for(0, B * G, 1, [&](int64_t begin, int64_t end) {
    Matrix<Half> rows(padded, std::max(E, F));
    Matrix<Pair> key_pairs(E / 2, padded), value_pairs(padded / 2, F);
    Forward block(E, F);
    int64_t limits[N];
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / G, g = i % G;
      keys.at(b, g).copy(0, padded, rows.row(0));
      pair_columns(rows.row(0), padded, E, key_pairs.row(0), padded);
      values.at(b, g).copy(0, padded, rows.row(0));
      pair_rows(rows.row(0), padded, F, value_pairs.row(0));
      for (int64_t h = g * R; h < (g + 1) * R; h++)
        for (int64_t start = 0; start < T; start += N) {
          queries.at(b, h).copy(start, N, block.q.row(0));
          block.y.clear();
          std::fill_n(block.top.begin(), N, -INFINITE);
          std::fill_n(block.sum.begin(), N, 0.0f);
          for (int m = 0; m < N; m++) limits[m] = causal ? std::min(T, start + m + 1) : T;
          for (int64_t from = 0; from < limits[N - 1]; from += N)
            block.take(key_pairs.row(0), padded, value_pairs.row(0), from, limits, scale);
          for (int64_t m = 0; m < std::min<int64_t>(N, T - start); m++) {
            const int64_t place = (b * H + h) * T + start + m;
            const __m512 factor = _mm512_set1_ps(1 / block.sum[m]);
            for (int64_t f = 0; f < F; f += 16)
              _mm256_storeu_si256((__m256i*)(y_ + place * F + f),
                                  to_half(_mm512_mul_ps(factor, _mm512_loadu_ps(block.y.row(m) + f))));
            logsum_[place] = block.top[m] + std::log(block.sum[m]);
          }
        }
    }
  });
  return {y, logsum};
}

void store(const Matrix<float>& sums, int64_t rows, float scale, Half* into) {
  for (int64_t i = 0; i < rows * sums.columns; i += 16)
    _mm256_storeu_si256((__m256i*)(into + i),
                        to_half(_mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(sums.row(0) + i))));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const at::Tensor& q, const at::Tensor& k,
                                                        const at::Tensor& v, const at::Tensor& y,
                                                        const at::Tensor& logsum, double scale, bool causal) {
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), E = q.size(3), G = k.size(1), F = v.size(3);
  const int64_t R = H / G, padded = (T + N - 1) / N * N;
  const at::Tensor dq = at::empty({B, H, T, E}, q.options()), dk = at::empty({B, G, T, E}, q.options()),
                   dv = at::empty({B, G, T, F}, q.options());
  const Heads queries(q), keys(k), values(v), outputs(y), gradients(dy);
  const float* logsum_ = logsum.const_data_ptr<float>();
  at::parallel_for(0, B * G, 1, [&](int64_t begin, int64_t end) {
    Matrix<Half> k_SE(padded, E), v_SF(padded, F), k_ES(E, padded), q_NE(N, E), dy_NF(N, F), y_NF(N, F);
    Matrix<Pair> q_pairs(N / 2, E), q_columns(E / 2, N), dy_pairs(N / 2, F), dy_columns(F / 2, N), ds_pairs(N / 2, N);
    Matrix<Half> p_SN(N, N), ds_SN(N, N);
    Matrix<float> s_SN(N, N), dp_SN(N, N), dq_EN(E, N), dq_NE(N, E), dk_SE(padded, E), dv_SF(padded, F);
    float high[N], dot[N];  // logsumexp and D of the queries
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / G, g = i % G;
      keys.at(b, g).copy(0, padded, k_SE.row(0));
      values.at(b, g).copy(0, padded, v_SF.row(0));
      for (int64_t s = 0; s < padded; s++)
        for (int64_t e = 0; e < E; e++) k_ES.row(e)[s] = k_SE.row(s)[e];
      dk_SE.clear();
      dv_SF.clear();
      for (int64_t h = g * R; h < (g + 1) * R; h++)
        for (int64_t start = 0; start < T; start += N) {
          queries.at(b, h).copy(start, N, q_NE.row(0));
          gradients.at(b, h).copy(start, N, dy_NF.row(0));
          outputs.at(b, h).copy(start, N, y_NF.row(0));
          pair_rows(q_NE.row(0), N, E, q_pairs.row(0));
          pair_columns(q_NE.row(0), N, E, q_columns.row(0), N);
          pair_rows(dy_NF.row(0), N, F, dy_pairs.row(0));
          pair_columns(dy_NF.row(0), N, F, dy_columns.row(0), N);
          for (int n = 0; n < N; n++) {
            high[n] = start + n < T ? logsum_[(b * H + h) * T + start + n] : INFINITE;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t f = 0; f < F; f += 16)
              sum = _mm512_fmadd_ps(to_float(dy_NF.row(n) + f), to_float(y_NF.row(n) + f), sum);
            dot[n] = _mm512_reduce_add_ps(sum);
          }
          dq_EN.clear();
          for (int64_t from = 0; from < (causal ? start + N : padded); from += N) {
            s_SN.clear();
            dp_SN.clear();
            multiply(N, N, E / 2, k_SE.row(from), E, q_columns.row(0), N, s_SN.row(0), N);
            multiply(N, N, F / 2, v_SF.row(from), F, dy_columns.row(0), N, dp_SN.row(0), N);
            for (int s = 0; s < N; s++)
              for (int n = 0; n < N; n += 16) {
                // Query start + n + lane sees key from + s.
                const int64_t first = from + s >= T ? N : causal ? from + s - start - n : 0;
                const __mmask16 seen = _mm512_cmpge_epi32_mask(LANE, _mm512_set1_epi32(first));
                const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s_SN.row(s) + n), _mm512_set1_ps(scale),
                                                 _mm512_loadu_ps(high + n));
                const __m512 p = _mm512_maskz_mov_ps(seen, exponential(x));
                const __m512 ds = _mm512_mul_ps(
                    p, _mm512_sub_ps(_mm512_loadu_ps(dp_SN.row(s) + n), _mm512_loadu_ps(dot + n)));
                _mm256_storeu_si256((__m256i*)(p_SN.row(s) + n), to_half(p));
                _mm256_storeu_si256((__m256i*)(ds_SN.row(s) + n), to_half(ds));
              }
            pair_rows(ds_SN.row(0), N, N, ds_pairs.row(0));
            multiply(N, F, N / 2, p_SN.row(0), N, dy_pairs.row(0), F, dv_SF.row(from), F);
            multiply(N, E, N / 2, ds_SN.row(0), N, q_pairs.row(0), E, dk_SE.row(from), E);
            multiply(E, N, N / 2, k_ES.row(0) + from, padded, ds_pairs.row(0), N, dq_EN.row(0), N);
          }
          for (int64_t e = 0; e < E; e++)
            for (int n = 0; n < N; n++) dq_NE.row(n)[e] = dq_EN.row(e)[n];
          store(dq_NE, std::min<int64_t>(N, T - start), scale,
                static_cast<Half*>(dq.mutable_data_ptr()) + ((b * H + h) * T + start) * E);
        }
      store(dk_SE, T, scale, static_cast<Half*>(dk.mutable_data_ptr()) + i * T * E);
      store(dv_SF, T, 1, static_cast<Half*>(dv.mutable_data_ptr()) + i * T * F);
    }
  });
  return {dq, dk, dv};
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  for (const at::Tensor& x : {q, k, v})
    TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kBFloat16 && x.stride(3) == 1 && x.size(3) % 16 == 0,
                "q, k and v must be (B, H, T, E) of bfloat16, E a multiple of 16 and lying together");
  TORCH_CHECK(q.size(3) == k.size(3) && q.size(2) == k.size(2) && k.size(2) == v.size(2) && k.size(1) == v.size(1) &&
                  q.size(1) % k.size(1) == 0 && q.size(0) == k.size(0) && q.size(0) == v.size(0),
              "q, k and v do not fit: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
}

std::tuple<at::Tensor, at::Tensor> flash(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                                         bool causal) {
  check(q, k, v);
  return forward(q, k, v, scale, causal);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_backward(const at::Tensor& dy, const at::Tensor& q,
                                                              const at::Tensor& k, const at::Tensor& v,
                                                              const at::Tensor& y, const at::Tensor& logsum,
                                                              double scale, bool causal) {
  check(q, k, v);
  return backward(dy.stride(3) == 1 ? dy : dy.contiguous(), q, k, v, y, logsum, scale, causal);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sky, library) {
  library.def("flash(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> (Tensor, Tensor)");
  library.def(
      "flash_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor logsum, float scale, bool causal)"
      " -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(sky, CPU, library) {
  library.impl("flash", flash);
  library.impl("flash_backward", flash_backward);
}

#endif
