// What all kernels share: AVX512 with BF16, and torch's stable interface.
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
using u16 = uint16_t;  // bf16

static inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline float widened(u16 x) { uint32_t y = uint32_t(x) << 16; float f; memcpy(&f, &y, 4); return f; }
static inline u16 narrowed(float x) { u16 y; __m128bh h = _mm_cvtneps_pbh(_mm_set_ss(x)); memcpy(&y, &h, 2); return y; }

// exp of numbers at or below zero, to 2e-7: 2 ** n times a polynomial of what is left.
static inline __m512 exped(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x));
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// Some of 16 numbers, where fewer are left.
static inline __mmask16 first(int64_t left) { return left >= 16 ? 0xffff : (1u << left) - 1; }
static inline __m512 load(const u16* x, int64_t left) { return widened(_mm256_maskz_loadu_epi16(first(left), x)); }
static inline void store(u16* y, __m512 x, int64_t left) { _mm256_mask_storeu_epi16(y, first(left), (__m256i)_mm512_cvtneps_pbh(x)); }

constexpr int64_t GRAIN = 1 << 15;  // numbers: fewer do not repay another thread

// f(row) for all rows of so many numbers.
template <class F>
static void each_row(int64_t rows, int64_t numbers, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(GRAIN / numbers, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) f(row);
  });
}
