// Attention with one query, and the weights of many.
#pragma once

#include "vector.h"

// Scores to weights that are still to be divided by the sum it returns; L a multiple of 16.
static float softmax(float* p, int64_t L) {
  __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < L; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(p + i));
  top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  for (int64_t i = 0; i < L; i += 16) {
    __m512 y = exped(_mm512_sub_ps(_mm512_loadu_ps(p + i), top));
    sum = _mm512_add_ps(sum, y);
    _mm512_storeu_ps(p + i, y);
  }
  return _mm512_reduce_add_ps(sum);
}

// H heads' weights p (H, L) times v (S, D), into y (H, D); their sums stay in registers.
template <int H>
static void weighed(const float* p, int64_t L, const float* sum, const u16* v, const bool* seen, int64_t S, int64_t D, u16* y) {
  for (int64_t d = 0; d < D; d += 16) {
    __m512 acc[H];
    #pragma GCC unroll 8
    for (int h = 0; h < H; h++) acc[h] = _mm512_setzero_ps();
    for (int64_t s = 0; s < S; s++) {
      if (!seen[s]) continue;
      __m512 value = widened(_mm256_loadu_si256((const __m256i*)(v + s * D + d)));
      #pragma GCC unroll 8
      for (int h = 0; h < H; h++) acc[h] = _mm512_fmadd_ps(_mm512_set1_ps(p[h * L + s]), value, acc[h]);
    }
    #pragma GCC unroll 8
    for (int h = 0; h < H; h++)
      _mm256_storeu_si256((__m256i*)(y + h * D + d), (__m256i)_mm512_cvtneps_pbh(_mm512_div_ps(acc[h], _mm512_set1_ps(sum[h]))));
  }
}

// The heads that share keys, over all columns with a mark. q (heads, D), y (heads, D); D a multiple of 32.
static void read_group(const u16* q, const u16* k, const u16* v, const bool* seen, int64_t heads, int64_t S, int64_t D,
                       float scale, std::vector<float>& p, u16* y) {
  while (S > 1 && !seen[S - 1]) S--;  // room that is not used yet
  int64_t L = (S + 15) / 16 * 16;
  p.assign(heads * (L + 1), -INFINITY);
  float* sum = p.data() + heads * L;
  for (int64_t s = 0; s < S; s++) {
    if (!seen[s]) continue;
    for (int64_t h = 0; h < heads; h++) {
      __m512 dot = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += 32)
        dot = _mm512_dpbf16_ps(dot, (__m512bh)_mm512_loadu_si512(q + h * D + d), (__m512bh)_mm512_loadu_si512(k + s * D + d));
      p[h * L + s] = _mm512_reduce_add_ps(dot) * scale;
    }
  }
  for (int64_t h = 0; h < heads; h++) sum[h] = softmax(p.data() + h * L, L);
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) weighed<4>(p.data() + h * L, L, sum + h, v, seen, S, D, y + h * D);
  for (; h + 2 <= heads; h += 2) weighed<2>(p.data() + h * L, L, sum + h, v, seen, S, D, y + h * D);
  for (; h < heads; h++) weighed<1>(p.data() + h * L, L, sum + h, v, seen, S, D, y + h * D);
}

// q (B, H, 1, D) over k, v (B, K, S, D) with columns and numbers in a row; seen (B or 1, S) -> (B, H, 1, D)
static Tensor attend(Tensor q, Tensor k, Tensor v, Tensor seen, double scale) {
  int64_t B = q.size(0), H = q.size(1), D = q.size(3), KV = k.size(1), S = k.size(2), heads = H / KV;
  Tensor y = torch::stable::new_empty(q, {B, H, 1, D});
  auto *qs = (const u16*)q.const_data_ptr(), *ks = (const u16*)k.const_data_ptr(), *vs = (const u16*)v.const_data_ptr();
  auto* marks = (const bool*)seen.const_data_ptr();
  auto* ys = (u16*)y.mutable_data_ptr();
  int64_t kb = k.stride(0), kh = k.stride(1), vb = v.stride(0), vh = v.stride(1), row = seen.size(0) > 1 ? S : 0;
  torch::stable::parallel_for(0, B * KV, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> p;
    for (int64_t i = begin; i < end; i++) {
      int64_t b = i / KV, h = i % KV, at = (b * H + h * heads) * D;
      read_group(qs + at, ks + b * kb + h * kh, vs + b * vb + h * vh, marks + b * row, heads, S, D, scale, p, ys + at);
    }
  });
  return y;
}

// Scores (B, G x rows, keys) of a text's last queries, in a row, become their weights in place: of each G the first query
// does not see the last rows - 1 keys, the last sees all.
static void weigh(Tensor scores, int64_t rows, double scale) {
  int64_t keys = scores.size(2), all = scores.numel() / keys;
  auto* xs = (u16*)scores.mutable_data_ptr();
  each_row(all, keys, [&](int64_t i) {
    thread_local std::vector<float> p;
    int64_t seen = keys - rows + 1 + i % rows, L = (seen + 15) / 16 * 16;
    if ((int64_t)p.size() < L) p.resize(L);
    u16* x = xs + i * keys;
    for (int64_t s = 0; s < seen; s += 16)
      _mm512_storeu_ps(&p[s], _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), first(seen - s), load(x + s, seen - s), _mm512_set1_ps(scale)));
    __m512 share = _mm512_set1_ps(1.0f / softmax(p.data(), L));
    for (int64_t s = 0; s < seen; s += 16) store(x + s, _mm512_mul_ps(_mm512_loadu_ps(&p[s]), share), seen - s);
    std::fill(x + seen, x + keys, 0);
  });
}
