// Skinny GEMM: y = x @ w.T for M (few) rows of x (M, K) and a weight matrix w (N, K) too large for the caches, at memory bandwidth.
#pragma once

#include <sched.h>

#include <functional>

#include "vector.h"

constexpr int64_t SHORT = 1536;  // columns: shorter rows of w are read one after another
constexpr int64_t PREFETCH = 2048;  // bytes of qweight
constexpr int64_t MAX_THREADS = 64;
constexpr int64_t PIECES = 8;    // parts of a thread's range that others can steal
constexpr int SPINS = 1 << 14;   // busy-wait iterations before a waiting thread yields its core

// Where each of several concatenated ranges starts.
struct Offsets {
  std::vector<int64_t> starts{0};
  int64_t end() const { return starts.back(); }
  size_t index_of(int64_t n) const { return std::upper_bound(starts.begin(), starts.end(), n) - starts.begin() - 1; }
};

// Work on rows [begin, end); both are multiples of `unit`, except at the end.
struct Stage {
  int64_t rows, unit;
  std::function<void(int64_t begin, int64_t end)> work;
};

// Runs stages in sequence in one parallel region; a stage begins when the one before is complete. Each thread owns a range of a
// stage's rows and then steals pieces of the others' ranges, since one preempted thread would hold up all.
static void run_stages(const std::vector<Stage>& stages) {
  struct Progress { std::atomic<int64_t> next[MAX_THREADS], done; };
  std::vector<Progress> progress(stages.size());
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), MAX_THREADS);
  auto units = [](const Stage& s) { return (s.rows + s.unit - 1) / s.unit; };
  auto range = [&](const Stage& s) { return (units(s) + threads - 1) / threads; };
  for (size_t s = 0; s < stages.size(); s++) {
    progress[s].done = 0;
    for (int64_t i = 0; i < threads; i++) progress[s].next[i] = i * range(stages[s]);
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (size_t s = 0; s < stages.size(); s++) {
      auto& [rows, unit, work] = stages[s];
      int64_t all = units(stages[s]), each = range(stages[s]), piece = std::max<int64_t>(each / PIECES, 1);
      for (int64_t i = 0; i < threads; i++) {
        int64_t owner = (first + i) % threads, end = std::min((owner + 1) * each, all);
        for (int64_t at; (at = progress[s].next[owner].fetch_add(piece)) < end;) {
          int64_t until = std::min(at + piece, end);
          work(at * unit, std::min(until * unit, rows));
          progress[s].done += until - at;
        }
      }
      for (int spins = 0; s + 1 < stages.size() && progress[s].done < all;)
        if (++spins < SPINS) _mm_pause();
        else sched_yield();
    }
  });
}

// ---------------------------------------------------------------- bf16

// Dot product of one row of w and one of x. Short rows are best read one after another; several long rows at a time hide more
// memory latency (`gemm_bf16`).
static float dot(const bf16* w, const bf16* x, int64_t K) {
  __m512 acc[4];
  for (int i = 0; i < 4; i++) acc[i] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 128 <= K; k += 128)
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const bf16 *a = w + k + 32 * i, *b = x + k + 32 * i;
      _mm_prefetch((const char*)a + 1024, _MM_HINT_T1);
      acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
    }
  for (; k < K; k += 32) {
    __mmask32 m = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
    acc[0] = _mm512_dpbf16_ps(acc[0], (__m512bh)_mm512_maskz_loadu_epi16(m, w + k), (__m512bh)_mm512_maskz_loadu_epi16(m, x + k));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
}

// R rows of w times B rows of x.
template <int R, int B>
static void gemm_bf16(const bf16* w, int64_t K, const bf16* x, const bf16* bias, bf16* y, int64_t ldy) {
  __m512 acc[R][B];
  #pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    #pragma GCC unroll 8
    for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 32) {
    __mmask32 m = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
    __m512bh xs[B];
    #pragma GCC unroll 8
    for (int b = 0; b < B; b++) xs[b] = (__m512bh)_mm512_maskz_loadu_epi16(m, x + b * K + k);
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      _mm_prefetch((const char*)(w + (r + R) * K + k), _MM_HINT_T1);
      __m512bh ws = (__m512bh)_mm512_maskz_loadu_epi16(m, w + r * K + k);
      #pragma GCC unroll 8
      for (int b = 0; b < B; b++) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], ws, xs[b]);
    }
  }
  #pragma GCC unroll 8
  for (int b = 0; b < B; b++)
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      y[b * ldy + r] = to_bf16(_mm512_reduce_add_ps(acc[r][b]) + (bias ? to_float(bias[r]) : 0.0f));
}

// R rows of w times all M rows of x.
template <int R>
static void gemm_bf16_batch(const bf16* w, int64_t K, const bf16* x, int64_t M, const bf16* bias, bf16* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) gemm_bf16<R, 4>(w, K, x + m * K, bias, y + m * ldy, ldy);
  for (; m + 2 <= M; m += 2) gemm_bf16<R, 2>(w, K, x + m * K, bias, y + m * ldy, ldy);
  for (; m < M; m++) gemm_bf16<R, 1>(w, K, x + m * K, bias, y + m * ldy, ldy);
}

// `rows` rows of w times all M rows of x.
static void gemm_bf16_rows(const bf16* w, int64_t rows, int64_t K, const bf16* x, int64_t M, const bf16* bias, bf16* y, int64_t ldy) {
  int64_t n = 0;
  if (M == 1 && K < SHORT)
    for (; n < rows; n++) y[n] = to_bf16(dot(w + n * K, x, K) + (bias ? to_float(bias[n]) : 0.0f));
  for (; M == 1 && n + 8 <= rows; n += 8) gemm_bf16<8, 1>(w + n * K, K, x, bias ? bias + n : nullptr, y + n, ldy);
  for (; M > 1 && n + 4 <= rows; n += 4) gemm_bf16_batch<4>(w + n * K, K, x, M, bias ? bias + n : nullptr, y + n, ldy);
  for (; n < rows; n++) gemm_bf16_batch<1>(w + n * K, K, x, M, bias ? bias + n : nullptr, y + n, ldy);
}

// ---------------------------------------------------------------- int8 and int4

// int8 activations x (M, K) in groups of G: x = scale * q, or with a residual scale * (q + residual / 254), which is as accurate
// as bf16. `sums` are the sums of each group's x.
struct QuantizedActivations {
  int64_t M, K, G;
  int8_t *q, *residual;
  float *scales, *sums;
};

static void quantize_group(const bf16* x, int64_t g, const QuantizedActivations& c) {
  __m512 top = _mm512_setzero_ps();
  for (int64_t k = 0; k < c.G; k += 16)
    top = _mm512_max_ps(top, _mm512_abs_ps(to_float(_mm256_loadu_si256((const __m256i*)(x + g * c.G + k)))));
  float scale = _mm512_reduce_max_ps(top) / 127.0f;
  __m512 inverse = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f);
  __m512i sum = _mm512_setzero_si512(), residual_sum = sum;
  for (int64_t k = 0; k < c.G; k += 16) {
    __m512 v = _mm512_mul_ps(to_float(_mm256_loadu_si256((const __m256i*)(x + g * c.G + k))), inverse);
    __m512i q = _mm512_cvtps_epi32(v);
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128((__m128i*)(c.q + g * c.G + k), _mm512_cvtsepi32_epi8(q));
    if (!c.residual) continue;
    q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(v, _mm512_cvtepi32_ps(q)), _mm512_set1_ps(254.0f)));
    residual_sum = _mm512_add_epi32(residual_sum, q);
    _mm_storeu_si128((__m128i*)(c.residual + g * c.G + k), _mm512_cvtsepi32_epi8(q));
  }
  c.scales[g] = scale;
  c.sums[g] = scale * ((float)_mm512_reduce_add_epi32(sum) + (float)_mm512_reduce_add_epi32(residual_sum) / 254.0f);
}

// Buffers of the calling thread for M x K quantized activations; the next call reuses them.
static QuantizedActivations quantization_buffer(int64_t M, int64_t K, int64_t G, bool with_residual) {
  thread_local std::vector<int8_t> bytes;
  thread_local std::vector<float> floats;
  int64_t groups = M * K / G, size = M * K;
  if ((int64_t)bytes.size() < 2 * size) bytes.resize(2 * size);
  if ((int64_t)floats.size() < 2 * groups) floats.resize(2 * groups);
  return {M, K, G, bytes.data(), with_residual ? bytes.data() + size : nullptr, floats.data(), floats.data() + groups};
}

// One weight matrix: bf16 (`dense`), or qweight in tiles of 16 rows with a scale per row, and for int4 parameters per group.
struct Matrix {
  const bf16* dense;
  const uint8_t *qweight, *groups;
  const float* scale;
  const bf16* bias;
  int64_t rows, K, G;
};

static inline __m512i broadcast_4_bytes(const int8_t* x) { int32_t v; memcpy(&v, x, 4); return _mm512_set1_epi32(v); }

// A tile of 16 rows of w, without their scales, times B rows of x from row m on. int8: bytes [K / 4][16 rows][4], stored plus 128.
template <int B>
static void gemm_int8(const Matrix& w, int64_t t, const QuantizedActivations& x, int64_t m, __m512* out) {
  constexpr int U = B <= 2 ? 2 : 1;  // independent accumulators, to hide the latency of additions
  const uint8_t* qweight = w.qweight + t * x.K * 16;
  int64_t groups = x.K / x.G;
  for (int b = 0; b < B; b++) out[b] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512i sum[U * B], residual[U * B];
    #pragma GCC unroll 8
    for (int i = 0; i < U * B; i++) sum[i] = residual[i] = _mm512_setzero_si512();
    for (int64_t k = g * x.G; k < (g + 1) * x.G; k += 4 * U)
      #pragma GCC unroll 2
      for (int u = 0; u < U; u++) {
        const uint8_t* at = qweight + (k + 4 * u) * 16;
        _mm_prefetch((const char*)at + PREFETCH, _MM_HINT_T0);
        __m512i c = _mm512_loadu_si512(at);
        #pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
          int64_t offset = (m + b) * x.K + k + 4 * u;
          sum[u * B + b] = _mm512_dpbusd_epi32(sum[u * B + b], c, broadcast_4_bytes(x.q + offset));
          residual[u * B + b] = _mm512_dpbusd_epi32(residual[u * B + b], c, broadcast_4_bytes(x.residual + offset));
        }
      }
    #pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      int64_t at = (m + b) * groups + g;
      if (U == 2) sum[b] = _mm512_add_epi32(sum[b], sum[(U - 1) * B + b]), residual[b] = _mm512_add_epi32(residual[b], residual[(U - 1) * B + b]);
      __m512 dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(residual[b]), _mm512_set1_ps(1.0f / 254.0f), _mm512_cvtepi32_ps(sum[b]));
      out[b] = _mm512_fmadd_ps(dot, _mm512_set1_ps(x.scales[at]), out[b]);
      out[b] = _mm512_fnmadd_ps(_mm512_set1_ps(128.0f), _mm512_set1_ps(x.sums[at]), out[b]);
    }
  }
}

// 16 unsigned bytes as floats.
static inline __m512 bytes_to_float(const uint8_t* x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x))); }

// int4: bytes [K / 8][16 rows][4], low nibbles the first four of eight columns; w = group_qscale * (q - (qzero - 128) / 8) in
// groups of G, with group_qscale and qzero in bytes [K / G][2][16 rows].
template <int B>
static void gemm_int4(const Matrix& w, int64_t t, const QuantizedActivations& x, int64_t m, __m512* out) {
  const __m512i nibble = _mm512_set1_epi8(15);
  constexpr int U = B <= 2 ? 2 : 1;
  const uint8_t* qweight = w.qweight + t * x.K * 8;
  int64_t groups = x.K / x.G;
  const uint8_t* params = w.groups + t * groups * 32;
  for (int b = 0; b < B; b++) out[b] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512i sum[U * B], high_sum[U * B];
    #pragma GCC unroll 8
    for (int i = 0; i < U * B; i++) sum[i] = high_sum[i] = _mm512_setzero_si512();
    for (int64_t k = g * x.G; k < (g + 1) * x.G; k += 8 * U)
      #pragma GCC unroll 2
      for (int u = 0; u < U; u++) {
        const uint8_t* at = qweight + (k + 8 * u) * 8;
        _mm_prefetch((const char*)at + PREFETCH, _MM_HINT_T0);
        __m512i both = _mm512_loadu_si512(at);
        __m512i low = _mm512_and_si512(both, nibble), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        #pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
          const int8_t* xs = x.q + (m + b) * x.K + k + 8 * u;
          sum[u * B + b] = _mm512_dpbusd_epi32(sum[u * B + b], low, broadcast_4_bytes(xs));
          high_sum[u * B + b] = _mm512_dpbusd_epi32(high_sum[u * B + b], high, broadcast_4_bytes(xs + 4));
        }
      }
    __m512 group_qscale = bytes_to_float(params + g * 32);
    __m512 minus_zero_point = _mm512_fnmadd_ps(bytes_to_float(params + g * 32 + 16), _mm512_set1_ps(0.125f), _mm512_set1_ps(16.0f));
    #pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      int64_t at = (m + b) * groups + g;
      if (U == 2) sum[b] = _mm512_add_epi32(sum[b], _mm512_add_epi32(sum[(U - 1) * B + b], high_sum[(U - 1) * B + b]));
      __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum[b], high_sum[b])), _mm512_set1_ps(x.scales[at]));
      out[b] = _mm512_fmadd_ps(group_qscale, _mm512_fmadd_ps(minus_zero_point, _mm512_set1_ps(x.sums[at]), dot), out[b]);
    }
  }
}

template <int B>
static void gemm_tile(const Matrix& w, int64_t t, const QuantizedActivations& x, int64_t m, bf16* y, int64_t ldy) {
  __m512 out[B];
  if (w.groups) gemm_int4<B>(w, t, x, m, out);
  else gemm_int8<B>(w, t, x, m, out);
  __m512 scale = _mm512_loadu_ps(w.scale + t * 16);
  int64_t n = t * 16, count = std::min<int64_t>(16, w.rows - n);
  __mmask16 mask = count == 16 ? 0xffff : (1u << count) - 1;
  #pragma GCC unroll 8
  for (int b = 0; b < B; b++) {
    out[b] = _mm512_mul_ps(out[b], scale);
    if (w.bias) out[b] = _mm512_add_ps(out[b], to_float(_mm256_maskz_loadu_epi16(mask, w.bias + n)));
    _mm256_mask_storeu_epi16(y + (m + b) * ldy + n, mask, (__m256i)_mm512_cvtneps_pbh(out[b]));
  }
}

// ---------------------------------------------------------------- any dtype

// Matrices of one dtype. Quantized ones have scales, group parameters (int4) and the number of columns of x that share a scale.
static std::vector<Matrix> weight_matrices(const Tensors& w, const Tensors& scales, const Tensors& groups, const Tensors& biases,
                                           const std::vector<int64_t>& rows, const std::vector<int64_t>& group_sizes) {
  std::vector<Matrix> matrices;
  for (size_t i = 0; i < w.size(); i++) {
    auto* bias = biases.empty() ? nullptr : (const bf16*)biases[i].const_data_ptr();
    auto* params = groups.empty() ? nullptr : (const uint8_t*)groups[i].const_data_ptr();
    int64_t K = w[i].size(1);
    if (scales.empty())
      matrices.push_back({(const bf16*)w[i].const_data_ptr(), nullptr, nullptr, nullptr, bias, rows[i], K, 0});
    else
      matrices.push_back({nullptr, (const uint8_t*)w[i].const_data_ptr(), params, (const float*)scales[i].const_data_ptr(), bias,
                       rows[i], K * (params ? 8 : 4), group_sizes[i]});
  }
  return matrices;
}

// M rows of x, and their int8 form where the weights are quantized.
struct Activations {
  const bf16* x;
  int64_t M;
  QuantizedActivations quantized;

  Activations(const bf16* x, int64_t M, const Matrix& w) : x(x), M(M), quantized(w.dense ? QuantizedActivations{} : quantization_buffer(M, w.K, w.G, !w.groups)) {}

  Stage quantize_stage() const {  // runs before the GEMM; empty for bf16 weights
    int64_t groups = quantized.G ? M * quantized.K / quantized.G : 0;
    return {groups, 8, [*this](int64_t begin, int64_t end) { for (int64_t g = begin; g < end; g++) quantize_group(x, g, quantized); }};
  }
};

constexpr int64_t TILE = 16;  // rows of a weight matrix

// Rows [begin, end) of w, `begin` a multiple of TILE, times all of x; y points at the first row's result.
static void gemm_rows(const Matrix& w, const Activations& x, int64_t begin, int64_t end, bf16* y, int64_t ldy) {
  if (w.dense) {
    gemm_bf16_rows(w.dense + begin * w.K, end - begin, w.K, x.x, x.M, w.bias ? w.bias + begin : nullptr, y, ldy);
    return;
  }
  y -= begin;
  for (int64_t t = begin / TILE; t * TILE < end; t++) {
    int64_t m = 0;
    for (; m + 8 <= x.M; m += 8) gemm_tile<8>(w, t, x.quantized, m, y, ldy);
    for (; m + 4 <= x.M; m += 4) gemm_tile<4>(w, t, x.quantized, m, y, ldy);
    for (; m + 2 <= x.M; m += 2) gemm_tile<2>(w, t, x.quantized, m, y, ldy);
    for (; m < x.M; m++) gemm_tile<1>(w, t, x.quantized, m, y, ldy);
  }
}

// x (M, K) times several matrices -> (M, sum of their rows)
static Tensor linear(Tensor x, Tensors w, Tensors scales, Tensors groups, Tensors biases, std::vector<int64_t> rows, std::vector<int64_t> group_sizes) {
  auto weights = weight_matrices(w, scales, groups, biases, rows, group_sizes);
  Activations activations((const bf16*)x.const_data_ptr(), x.numel() / weights[0].K, weights[0]);
  Offsets tiles, columns;  // where each matrix begins, in tiles and in y
  for (auto& weight : weights) {
    tiles.starts.push_back(tiles.end() + (weight.rows + TILE - 1) / TILE);
    columns.starts.push_back(columns.end() + weight.rows);
  }
  Tensor y = torch::stable::new_empty(x, {activations.M, columns.end()});
  auto* ys = (bf16*)y.mutable_data_ptr();
  run_stages({activations.quantize_stage(), {tiles.end(), 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      size_t i = tiles.index_of(begin);
      int64_t from = (begin - tiles.starts[i]) * TILE, until = std::min(end, tiles.starts[i + 1]);
      gemm_rows(weights[i], activations, from, std::min((until - tiles.starts[i]) * TILE, weights[i].rows), ys + columns.starts[i] + from,
                columns.end());
      begin = until;
    }
  }}});
  return y;
}
