// Norms, gated activations and RoPE. bf16 in and out, fp32 inside.
#pragma once

#include "vector.h"

// LayerNorm if `centred`, else RMSNorm; `gain_after`: rounded to bf16 before the gain is applied.
struct Norm {
  const bf16 *gain, *bias;
  float eps, offset;
  bool centred, gain_after;

  Norm(const Tensor& gain, const std::optional<Tensor>& bias, double eps, double offset, bool centred, bool gain_after)
      : gain((const bf16*)gain.const_data_ptr()), bias(bias ? (const bf16*)bias->const_data_ptr() : nullptr),
        eps(eps), offset(offset), centred(centred), gain_after(gain_after) {}

  // One row of K elements.
  void operator()(const bf16* x, int64_t K, bf16* y) const {
    __m512 sum = _mm512_setzero_ps(), squares = sum, gain_offset = _mm512_set1_ps(offset);
    if (centred)
      for (int64_t k = 0; k < K; k += 16) sum = _mm512_add_ps(sum, load(x + k, K - k));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / K);
    for (int64_t k = 0; k < K; k += 16) {
      __m512 v = _mm512_maskz_sub_ps(tail_mask(K - k), load(x + k, K - k), mean);
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / K + eps));
    for (int64_t k = 0; k < K; k += 16) {
      __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(x + k, K - k), mean), scale);
      if (gain_after) v = to_float((__m256i)_mm512_cvtneps_pbh(v));
      v = _mm512_mul_ps(v, _mm512_add_ps(load(gain + k, K - k), gain_offset));
      store(y + k, bias ? _mm512_add_ps(v, load(bias + k, K - k)) : v, K - k);
    }
  }
};

// x (.., K), contiguous -> the same shape.
static Tensor norm(Tensor x, Tensor gain, std::optional<Tensor> bias, double eps, double offset, bool centred, bool gain_after) {
  int64_t K = x.size(-1), M = x.numel() / K;
  Tensor y = torch::stable::empty_like(x);
  auto* xs = (const bf16*)x.const_data_ptr();
  auto* ys = (bf16*)y.mutable_data_ptr();
  Norm norm_row(gain, bias, eps, offset, centred, gain_after);
  parallel_rows(M, K, [&](int64_t m) { norm_row(xs + m * K, K, ys + m * K); });
  return y;
}

// x = x * sigmoid(a x + b x^3), times `up` if there is one, for N elements: SiLU and the approximations of GELU.
static void activate(bf16* x, const bf16* up, int64_t N, float a, float b) {
  __m512 one = _mm512_set1_ps(1.0f), linear = _mm512_set1_ps(a), cubic = _mm512_set1_ps(b);
  for (int64_t n = 0; n < N; n += 16) {
    __m512 v = load(x + n, N - n);
    __m512 t = _mm512_mul_ps(v, _mm512_fmadd_ps(cubic, _mm512_mul_ps(v, v), linear));
    __m512 z = exp_nonpositive(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(t)));
    __mmask16 negative = _mm512_cmp_ps_mask(t, _mm512_setzero_ps(), _CMP_LT_OQ);
    v = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_mask_mov_ps(one, negative, z)), _mm512_rcp14_ps(_mm512_add_ps(one, z)));
    store(x + n, up ? _mm512_mul_ps(v, load(up + n, N - n)) : v, N - n);
  }
}

// `activate` in place on all rows of x (.., N), with those of up (.., N); rows at constant strides.
static void gated_activation(Tensor x, std::optional<Tensor> up, double a, double b) {
  int64_t N = x.size(-1), M = x.numel() / N, ldx = x.stride(x.dim() - 2), ldu = up ? up->stride(up->dim() - 2) : 0;
  auto* us = up ? (const bf16*)up->const_data_ptr() : nullptr;
  auto* xs = (bf16*)x.mutable_data_ptr();
  parallel_rows(M, N, [&](int64_t m) { activate(xs + m * ldx, us ? us + m * ldu : nullptr, N, a, b); });
}

// RoPE with split halves: x (B, T, H, D), last dimension contiguous; cos, sin (B or 1, T, 1, R / 2), R <= D.
static Tensor apply_rope(Tensor x, Tensor cos, Tensor sin) {
  int64_t B = x.size(0), T = x.size(1), H = x.size(2), D = x.size(3), half = cos.size(3);
  int64_t xb = x.stride(0), xt = x.stride(1), xh = x.stride(2), angles = cos.size(0) > 1 ? T * half : 0;
  Tensor y = torch::stable::new_empty(x, {B, T, H, D});
  auto *xs = (const bf16*)x.const_data_ptr(), *cs = (const bf16*)cos.const_data_ptr(), *ss = (const bf16*)sin.const_data_ptr();
  auto* ys = (bf16*)y.mutable_data_ptr();
  parallel_rows(B * T * H, D, [&](int64_t i) {
    int64_t b = i / (T * H), t = i / H % T, h = i % H, at = b * angles + t * half;
    const bf16* in = xs + b * xb + h * xh + t * xt;
    bf16* out = ys + i * D;
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
