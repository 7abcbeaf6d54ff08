// Vectors of fp32 that the machine's vector unit holds, from numbers of any width.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <tuple>

namespace sky {

using Floats = at::vec::Vectorized<float>;
constexpr int LANES = Floats::size();

// The next 2 LANES numbers as fp32.
using Pair = std::tuple<Floats, Floats>;
inline Pair widen(const float* from) { return {Floats::loadu(from), Floats::loadu(from + LANES)}; }
inline Pair widen(const at::BFloat16* from) {
  return at::vec::convert_bfloat16_float(at::vec::Vectorized<at::BFloat16>::loadu(from));
}
inline Pair widen(const int8_t* from) {
  const auto half = [](const int8_t* bytes) {
    return at::vec::convert<float>(at::vec::Vectorized<int8_t>::loadu_one_fourth(bytes));
  };
  return {half(from), half(from + LANES)};
}

// The sum over the lanes of each of LANES vectors, as one vector: a tree of sums of neighbours, which costs a vector
// three instructions where a sum of its own takes some twenty.
inline Floats across_lanes(Floats* vectors) {
  for (int count = LANES / 2; count > 0; count /= 2)
    for (int i = 0; i < count; i++) {
      const auto [even, odd] = at::vec::deinterleave2(vectors[2 * i], vectors[2 * i + 1]);
      vectors[i] = even + odd;
    }
  return vectors[0];
}

}  // namespace sky
