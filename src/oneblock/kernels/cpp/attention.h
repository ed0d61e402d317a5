// Decode attention (one query per sequence) and the causal softmax of prefill attention.
#pragma once

#include "vector.h"

// Replaces scores by exp(score - max) and returns their sum; L is a multiple of 16.
static float exp_scores(float* p, int64_t L) {
  __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < L; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(p + i));
  top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  for (int64_t i = 0; i < L; i += 16) {
    __m512 y = exp_nonpositive(_mm512_sub_ps(_mm512_loadu_ps(p + i), top));
    sum = _mm512_add_ps(sum, y);
    _mm512_storeu_ps(p + i, y);
  }
  return _mm512_reduce_add_ps(sum);
}

// y (H, D) = p (H, L) @ v (S, D) / sum (H); the accumulators stay in registers.
template <int H>
static void weigh_values(const float* p, int64_t L, const float* sum, const bf16* v, const bool* mask, int64_t S, int64_t D, bf16* y) {
  for (int64_t d = 0; d < D; d += 16) {
    __m512 acc[H];
    #pragma GCC unroll 8
    for (int h = 0; h < H; h++) acc[h] = _mm512_setzero_ps();
    for (int64_t s = 0; s < S; s++) {
      if (!mask[s]) continue;
      __m512 value = to_float(_mm256_loadu_si256((const __m256i*)(v + s * D + d)));
      #pragma GCC unroll 8
      for (int h = 0; h < H; h++) acc[h] = _mm512_fmadd_ps(_mm512_set1_ps(p[h * L + s]), value, acc[h]);
    }
    #pragma GCC unroll 8
    for (int h = 0; h < H; h++)
      _mm256_storeu_si256((__m256i*)(y + h * D + d), (__m256i)_mm512_cvtneps_pbh(_mm512_div_ps(acc[h], _mm512_set1_ps(sum[h]))));
  }
}

// One KV head: the query heads that share it attend to the keys with a true mask. q, y (heads, D); k, v (S, D); D % 32 == 0.
static void attend_kv_head(const bf16* q, const bf16* k, const bf16* v, const bool* mask, int64_t heads, int64_t S, int64_t D,
                           float scale, std::vector<float>& p, bf16* y) {
  while (S > 1 && !mask[S - 1]) S--;  // cache slots that are not filled yet
  int64_t L = (S + 15) / 16 * 16;
  p.assign(heads * (L + 1), -INFINITY);
  float* sum = p.data() + heads * L;
  for (int64_t s = 0; s < S; s++) {
    if (!mask[s]) continue;
    for (int64_t h = 0; h < heads; h++) {
      __m512 dot = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += 32)
        dot = _mm512_dpbf16_ps(dot, (__m512bh)_mm512_loadu_si512(q + h * D + d), (__m512bh)_mm512_loadu_si512(k + s * D + d));
      p[h * L + s] = _mm512_reduce_add_ps(dot) * scale;
    }
  }
  for (int64_t h = 0; h < heads; h++) sum[h] = exp_scores(p.data() + h * L, L);
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) weigh_values<4>(p.data() + h * L, L, sum + h, v, mask, S, D, y + h * D);
  for (; h + 2 <= heads; h += 2) weigh_values<2>(p.data() + h * L, L, sum + h, v, mask, S, D, y + h * D);
  for (; h < heads; h++) weigh_values<1>(p.data() + h * L, L, sum + h, v, mask, S, D, y + h * D);
}

// q (B, H, 1, D); k, v (B, K, S, D), the last two dimensions contiguous; mask (B or 1, S) -> (B, H, 1, D)
static Tensor decode_attention(Tensor q, Tensor k, Tensor v, Tensor mask, double scale) {
  int64_t B = q.size(0), H = q.size(1), D = q.size(3), KV = k.size(1), S = k.size(2), heads = H / KV;
  Tensor y = torch::stable::new_empty(q, {B, H, 1, D});
  auto *qs = (const bf16*)q.const_data_ptr(), *ks = (const bf16*)k.const_data_ptr(), *vs = (const bf16*)v.const_data_ptr();
  auto* masks = (const bool*)mask.const_data_ptr();
  auto* ys = (bf16*)y.mutable_data_ptr();
  int64_t kb = k.stride(0), kh = k.stride(1), vb = v.stride(0), vh = v.stride(1), row = mask.size(0) > 1 ? S : 0;
  torch::stable::parallel_for(0, B * KV, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> p;
    for (int64_t i = begin; i < end; i++) {
      int64_t b = i / KV, h = i % KV, at = (b * H + h * heads) * D;
      attend_kv_head(qs + at, ks + b * kb + h * kh, vs + b * vb + h * vh, masks + b * row, heads, S, D, scale, p, ys + at);
    }
  });
  return y;
}

// In-place softmax of scores (B, G x queries, keys), contiguous, of a sequence's last `queries` tokens, times `scale`: query i
// of each of the G groups sees all keys but the last queries - 1 - i.
static void causal_softmax(Tensor scores, int64_t queries, double scale) {
  int64_t keys = scores.size(2), rows = scores.numel() / keys;
  auto* xs = (bf16*)scores.mutable_data_ptr();
  parallel_rows(rows, keys, [&](int64_t i) {
    thread_local std::vector<float> p;
    int64_t visible = keys - queries + 1 + i % queries, L = (visible + 15) / 16 * 16;
    if ((int64_t)p.size() < L) p.resize(L);
    bf16* x = xs + i * keys;
    for (int64_t s = 0; s < visible; s += 16)
      _mm512_storeu_ps(&p[s], _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), tail_mask(visible - s), load(x + s, visible - s), _mm512_set1_ps(scale)));
    __m512 inverse = _mm512_set1_ps(1.0f / exp_scores(p.data(), L));
    for (int64_t s = 0; s < visible; s += 16) store(x + s, _mm512_mul_ps(_mm512_loadu_ps(&p[s]), inverse), visible - s);
    std::fill(x + visible, x + keys, 0);
  });
}
