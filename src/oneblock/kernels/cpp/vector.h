// Helpers of all kernels: AVX512 with BF16, and torch's stable ABI.
#pragma once

#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using bf16 = uint16_t;

static inline __m512 to_float(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline float to_float(bf16 x) { uint32_t y = uint32_t(x) << 16; float f; memcpy(&f, &y, 4); return f; }
static inline bf16 to_bf16(float x) { bf16 y; __m128bh h = _mm_cvtneps_pbh(_mm_set_ss(x)); memcpy(&y, &h, 2); return y; }

// exp(x) for x <= 0 with relative error 2e-7: 2^n times a polynomial of the remainder.
static inline __m512 exp_nonpositive(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x));
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// Masked access to up to 16 elements, `left` of which exist.
static inline __mmask16 tail_mask(int64_t left) { return left >= 16 ? 0xffff : (1u << left) - 1; }
static inline __m512 load(const bf16* x, int64_t left) { return to_float(_mm256_maskz_loadu_epi16(tail_mask(left), x)); }
static inline void store(bf16* y, __m512 x, int64_t left) { _mm256_mask_storeu_epi16(y, tail_mask(left), (__m256i)_mm512_cvtneps_pbh(x)); }

constexpr int64_t GRAIN = 1 << 15;  // elements: fewer do not repay another thread

// Calls f(row) for every row of `columns` elements, in parallel.
template <class F>
static void parallel_rows(int64_t rows, int64_t columns, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(GRAIN / columns, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) f(row);
  });
}
