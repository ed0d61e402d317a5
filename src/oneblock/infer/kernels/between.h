// What lies between a block's products: norms, gates, heads turned to their positions. bf16 in and out, fp32 inside.
#pragma once

#include "vector.h"

// x (.., K), in a row -> the same. LayerNorm where `centred`, else RMSNorm; `after`: in bf16 before the gain comes.
static Tensor norm(Tensor x, Tensor gain, std::optional<Tensor> bias, double eps, double offset, bool centred, bool after) {
  int64_t K = x.size(-1), M = x.numel() / K;
  Tensor y = torch::stable::empty_like(x);
  auto *xs = (const u16*)x.const_data_ptr(), *gs = (const u16*)gain.const_data_ptr();
  auto* bs = bias ? (const u16*)bias->const_data_ptr() : nullptr;
  auto* ys = (u16*)y.mutable_data_ptr();
  __m512 more = _mm512_set1_ps(offset);
  each_row(M, K, [&](int64_t m) {
    const u16* row = xs + m * K;
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    if (centred)
      for (int64_t k = 0; k < K; k += 16) sum = _mm512_add_ps(sum, load(row + k, K - k));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / K);
    for (int64_t k = 0; k < K; k += 16) {
      __m512 v = _mm512_maskz_sub_ps(first(K - k), load(row + k, K - k), mean);
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / K + (float)eps));
    for (int64_t k = 0; k < K; k += 16) {
      __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(row + k, K - k), mean), scale);
      if (after) v = widened((__m256i)_mm512_cvtneps_pbh(v));
      v = _mm512_mul_ps(v, _mm512_add_ps(load(gs + k, K - k), more));
      store(ys + m * K + k, bs ? _mm512_add_ps(v, load(bs + k, K - k)) : v, K - k);
    }
  });
  return y;
}

// x becomes x * sigmoid(a x + b x^3), times `up` where there is one: SiLU and the approximations of GELU. x, up (.., N) in
// even rows.
static void gate(Tensor x, std::optional<Tensor> up, double a, double b) {
  int64_t N = x.size(-1), M = x.numel() / N, ldx = x.stride(x.dim() - 2), ldu = up ? up->stride(up->dim() - 2) : 0;
  auto* us = up ? (const u16*)up->const_data_ptr() : nullptr;
  auto* xs = (u16*)x.mutable_data_ptr();
  __m512 one = _mm512_set1_ps(1.0f), linear = _mm512_set1_ps(a), cubic = _mm512_set1_ps(b);
  each_row(M, N, [&](int64_t m) {
    for (int64_t n = 0; n < N; n += 16) {
      __m512 v = load(xs + m * ldx + n, N - n);
      __m512 t = _mm512_mul_ps(v, _mm512_fmadd_ps(cubic, _mm512_mul_ps(v, v), linear));
      __m512 z = exped(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(t)));
      __mmask16 below = _mm512_cmp_ps_mask(t, _mm512_setzero_ps(), _CMP_LT_OQ);
      v = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_mask_mov_ps(one, below, z)), _mm512_rcp14_ps(_mm512_add_ps(one, z)));
      store(xs + m * ldx + n, us ? _mm512_mul_ps(v, load(us + m * ldu + n, N - n)) : v, N - n);
    }
  });
}

// Heads x (B, H, T, D), numbers in a row, at the angles of cos and sin (B or 1, 1, T, R / 2), R <= D; the halves of R turn
// with each other.
static Tensor turned(Tensor x, Tensor cos, Tensor sin) {
  int64_t B = x.size(0), H = x.size(1), T = x.size(2), D = x.size(3), half = cos.size(3);
  int64_t xb = x.stride(0), xh = x.stride(1), xt = x.stride(2), angles = cos.size(0) > 1 ? T * half : 0;
  Tensor y = torch::stable::new_empty(x, {B, H, T, D});
  auto *xs = (const u16*)x.const_data_ptr(), *cs = (const u16*)cos.const_data_ptr(), *ss = (const u16*)sin.const_data_ptr();
  auto* ys = (u16*)y.mutable_data_ptr();
  each_row(B * H * T, D, [&](int64_t i) {
    int64_t b = i / (H * T), h = i / T % H, t = i % T, at = b * angles + t * half;
    const u16* in = xs + b * xb + h * xh + t * xt;
    u16* out = ys + i * D;
    for (int64_t d = 0; d < half; d += 16) {
      int64_t left = half - d;
      __m512 first = load(in + d, left), second = load(in + half + d, left);
      __m512 c = load(cs + at + d, left), s = load(ss + at + d, left);
      store(out + d, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)), left);
      store(out + half + d, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)), left);
    }
    std::copy(in + 2 * half, in + D, out + 2 * half);
  });
  return y;
}
