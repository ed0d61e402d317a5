// Products of a few rows with matrices too large for the caches: as fast as the weights come from memory.
//
// M rows of x, K numbers each; N rows of w.
#pragma once

#include <sched.h>

#include <functional>

#include "vector.h"

constexpr int64_t SHORT = 1536;  // numbers in a row
constexpr int64_t AHEAD = 2048;  // bytes of codes that are fetched before they are needed
constexpr int64_t THREADS = 64;  // at most
constexpr int64_t PIECES = 8;    // of a thread's run
constexpr int SPINS = 1 << 14;   // that a thread waits for others before it lets them have the core

// Several things one after another.
struct Places {
  std::vector<int64_t> starts{0};
  int64_t end() const { return starts.back(); }
  size_t of(int64_t n) const { return std::upper_bound(starts.begin(), starts.end(), n) - starts.begin() - 1; }
};

// Work on rows [begin, end), which are multiples of `unit` but for the last.
struct Stage {
  int64_t rows, unit;
  std::function<void(int64_t begin, int64_t end)> work;
};

// Stages one after another, in one parallel region: a stage begins when the one before is done, by whatever threads there
// are. Each thread has one run of a stage's rows, which it goes through piece by piece; where it is done it helps the others
// with theirs, since a thread that is held up would hold up all.
static void in_stages(const std::vector<Stage>& stages) {
  struct Progress { std::atomic<int64_t> next[THREADS], done; };
  std::vector<Progress> made(stages.size());
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), THREADS);
  auto units = [](const Stage& s) { return (s.rows + s.unit - 1) / s.unit; };
  auto run = [&](const Stage& s) { return (units(s) + threads - 1) / threads; };
  for (size_t s = 0; s < stages.size(); s++) {
    made[s].done = 0;
    for (int64_t i = 0; i < threads; i++) made[s].next[i] = i * run(stages[s]);
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (size_t s = 0; s < stages.size(); s++) {
      auto& [rows, unit, work] = stages[s];
      int64_t all = units(stages[s]), each = run(stages[s]), piece = std::max<int64_t>(each / PIECES, 1);
      for (int64_t i = 0; i < threads; i++) {
        int64_t whose = (first + i) % threads, end = std::min((whose + 1) * each, all);
        for (int64_t at; (at = made[s].next[whose].fetch_add(piece)) < end;) {
          int64_t until = std::min(at + piece, end);
          work(at * unit, std::min(until * unit, rows));
          made[s].done += until - at;
        }
      }
      for (int spins = 0; s + 1 < stages.size() && made[s].done < all;)
        if (++spins < SPINS) _mm_pause();
        else sched_yield();
    }
  });
}

// ---------------------------------------------------------------- bf16

// One row of w with one of x. Short rows are best read one after another; of long ones several at a time hide more of the
// way to the memory (`dots`).
static float dot(const u16* w, const u16* x, int64_t K) {
  __m512 acc[4];
  for (int i = 0; i < 4; i++) acc[i] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 128 <= K; k += 128)
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const u16 *a = w + k + 32 * i, *b = x + k + 32 * i;
      _mm_prefetch((const char*)a + 1024, _MM_HINT_T1);
      acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
    }
  for (; k < K; k += 32) {
    __mmask32 m = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
    acc[0] = _mm512_dpbf16_ps(acc[0], (__m512bh)_mm512_maskz_loadu_epi16(m, w + k), (__m512bh)_mm512_maskz_loadu_epi16(m, x + k));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
}

// R rows of w with B rows of x.
template <int R, int B>
static void dots(const u16* w, int64_t K, const u16* x, const u16* bias, u16* y, int64_t ldy) {
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
      y[b * ldy + r] = narrowed(_mm512_reduce_add_ps(acc[r][b]) + (bias ? widened(bias[r]) : 0.0f));
}

// R rows of w with all M of x.
template <int R>
static void all_rows(const u16* w, int64_t K, const u16* x, int64_t M, const u16* bias, u16* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) dots<R, 4>(w, K, x + m * K, bias, y + m * ldy, ldy);
  for (; m + 2 <= M; m += 2) dots<R, 2>(w, K, x + m * K, bias, y + m * ldy, ldy);
  for (; m < M; m++) dots<R, 1>(w, K, x + m * K, bias, y + m * ldy, ldy);
}

// `rows` rows of one matrix with all M of x.
static void plain_rows(const u16* w, int64_t rows, int64_t K, const u16* x, int64_t M, const u16* bias, u16* y, int64_t ldy) {
  int64_t n = 0;
  if (M == 1 && K < SHORT)
    for (; n < rows; n++) y[n] = narrowed(dot(w + n * K, x, K) + (bias ? widened(bias[n]) : 0.0f));
  for (; M == 1 && n + 8 <= rows; n += 8) dots<8, 1>(w + n * K, K, x, bias ? bias + n : nullptr, y + n, ldy);
  for (; M > 1 && n + 4 <= rows; n += 4) all_rows<4>(w + n * K, K, x, M, bias ? bias + n : nullptr, y + n, ldy);
  for (; n < rows; n++) all_rows<1>(w + n * K, K, x, M, bias ? bias + n : nullptr, y + n, ldy);
}

// ---------------------------------------------------------------- 8 and 4 bits

// x (M, K) in whole numbers of 8 bits, in groups of G: x = scale * code, or with `fine` ones scale * (code + fine / 254),
// which is as good as bf16 itself. `sums` are the sums of each group's x.
struct Codes {
  int64_t M, K, G;
  int8_t *codes, *fine;
  float *scales, *sums;
};

static void code_group(const u16* x, int64_t g, const Codes& c) {
  __m512 top = _mm512_setzero_ps();
  for (int64_t k = 0; k < c.G; k += 16)
    top = _mm512_max_ps(top, _mm512_abs_ps(widened(_mm256_loadu_si256((const __m256i*)(x + g * c.G + k)))));
  float scale = _mm512_reduce_max_ps(top) / 127.0f;
  __m512 inverse = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f);
  __m512i sum = _mm512_setzero_si512(), rest = sum;
  for (int64_t k = 0; k < c.G; k += 16) {
    __m512 v = _mm512_mul_ps(widened(_mm256_loadu_si256((const __m256i*)(x + g * c.G + k))), inverse);
    __m512i q = _mm512_cvtps_epi32(v);
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128((__m128i*)(c.codes + g * c.G + k), _mm512_cvtsepi32_epi8(q));
    if (!c.fine) continue;
    q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(v, _mm512_cvtepi32_ps(q)), _mm512_set1_ps(254.0f)));
    rest = _mm512_add_epi32(rest, q);
    _mm_storeu_si128((__m128i*)(c.fine + g * c.G + k), _mm512_cvtsepi32_epi8(q));
  }
  c.scales[g] = scale;
  c.sums[g] = scale * ((float)_mm512_reduce_add_epi32(sum) + (float)_mm512_reduce_add_epi32(rest) / 254.0f);
}

// Room for the codes of M x K numbers, of the calling thread: a later one takes its place.
static Codes room(int64_t M, int64_t K, int64_t G, bool fine) {
  thread_local std::vector<int8_t> bytes;
  thread_local std::vector<float> floats;
  int64_t groups = M * K / G, size = M * K;
  if ((int64_t)bytes.size() < 2 * size) bytes.resize(2 * size);
  if ((int64_t)floats.size() < 2 * groups) floats.resize(2 * groups);
  return {M, K, G, bytes.data(), fine ? bytes.data() + size : nullptr, floats.data(), floats.data() + groups};
}

// One matrix: numbers in bf16, or codes in tiles with their scales, and groups of 4 bits.
struct Matrix {
  const u16* plain;
  const uint8_t *codes, *groups;
  const float* scale;
  const u16* bias;
  int64_t rows, K, G;
};

static inline __m512i four(const int8_t* x) { int32_t v; memcpy(&v, x, 4); return _mm512_set1_epi32(v); }

// A tile of 16 rows of w, but for their scales, with B rows of x, from row m on. 8 bits: bytes [K / 4][16 rows][4], codes + 128.
template <int B>
static void tile8(const Matrix& w, int64_t t, const Codes& x, int64_t m, __m512* out) {
  constexpr int U = B <= 2 ? 2 : 1;  // sums of each kind, so that one need not wait for the other
  const uint8_t* codes = w.codes + t * x.K * 16;
  int64_t groups = x.K / x.G;
  for (int b = 0; b < B; b++) out[b] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512i sum[U * B], rest[U * B];
    #pragma GCC unroll 8
    for (int i = 0; i < U * B; i++) sum[i] = rest[i] = _mm512_setzero_si512();
    for (int64_t k = g * x.G; k < (g + 1) * x.G; k += 4 * U)
      #pragma GCC unroll 2
      for (int u = 0; u < U; u++) {
        const uint8_t* at = codes + (k + 4 * u) * 16;
        _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
        __m512i c = _mm512_loadu_si512(at);
        #pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
          int64_t here = (m + b) * x.K + k + 4 * u;
          sum[u * B + b] = _mm512_dpbusd_epi32(sum[u * B + b], c, four(x.codes + here));
          rest[u * B + b] = _mm512_dpbusd_epi32(rest[u * B + b], c, four(x.fine + here));
        }
      }
    #pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      int64_t at = (m + b) * groups + g;
      if (U == 2) sum[b] = _mm512_add_epi32(sum[b], sum[(U - 1) * B + b]), rest[b] = _mm512_add_epi32(rest[b], rest[(U - 1) * B + b]);
      __m512 dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rest[b]), _mm512_set1_ps(1.0f / 254.0f), _mm512_cvtepi32_ps(sum[b]));
      out[b] = _mm512_fmadd_ps(dot, _mm512_set1_ps(x.scales[at]), out[b]);
      out[b] = _mm512_fnmadd_ps(_mm512_set1_ps(128.0f), _mm512_set1_ps(x.sums[at]), out[b]);
    }
  }
}

// 16 bytes as floats.
static inline __m512 counted(const uint8_t* x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x))); }

// 4 bits: bytes [K / 8][16 rows][4], low halves the first four of eight numbers; w = factor * (code - (zero - 128) / 8) in
// groups of G, factors and zeros [K / G][2][16 rows] in bytes.
template <int B>
static void tile4(const Matrix& w, int64_t t, const Codes& x, int64_t m, __m512* out) {
  const __m512i low = _mm512_set1_epi8(15);
  constexpr int U = B <= 2 ? 2 : 1;
  const uint8_t* codes = w.codes + t * x.K * 8;
  int64_t groups = x.K / x.G;
  const uint8_t* ranges = w.groups + t * groups * 32;
  for (int b = 0; b < B; b++) out[b] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512i sum[U * B], odd[U * B];
    #pragma GCC unroll 8
    for (int i = 0; i < U * B; i++) sum[i] = odd[i] = _mm512_setzero_si512();
    for (int64_t k = g * x.G; k < (g + 1) * x.G; k += 8 * U)
      #pragma GCC unroll 2
      for (int u = 0; u < U; u++) {
        const uint8_t* at = codes + (k + 8 * u) * 8;
        _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
        __m512i both = _mm512_loadu_si512(at);
        __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        #pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
          const int8_t* xs = x.codes + (m + b) * x.K + k + 8 * u;
          sum[u * B + b] = _mm512_dpbusd_epi32(sum[u * B + b], first, four(xs));
          odd[u * B + b] = _mm512_dpbusd_epi32(odd[u * B + b], second, four(xs + 4));
        }
      }
    __m512 factor = counted(ranges + g * 32);
    __m512 lowest = _mm512_fnmadd_ps(counted(ranges + g * 32 + 16), _mm512_set1_ps(0.125f), _mm512_set1_ps(16.0f));
    #pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      int64_t at = (m + b) * groups + g;
      if (U == 2) sum[b] = _mm512_add_epi32(sum[b], _mm512_add_epi32(sum[(U - 1) * B + b], odd[(U - 1) * B + b]));
      __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum[b], odd[b])), _mm512_set1_ps(x.scales[at]));
      out[b] = _mm512_fmadd_ps(factor, _mm512_fmadd_ps(lowest, _mm512_set1_ps(x.sums[at]), dot), out[b]);
    }
  }
}

template <int B>
static void tile(const Matrix& w, int64_t t, const Codes& x, int64_t m, u16* y, int64_t ldy) {
  __m512 out[B];
  if (w.groups) tile4<B>(w, t, x, m, out);
  else tile8<B>(w, t, x, m, out);
  __m512 scale = _mm512_loadu_ps(w.scale + t * 16);
  int64_t n = t * 16, count = std::min<int64_t>(16, w.rows - n);
  __mmask16 mask = count == 16 ? 0xffff : (1u << count) - 1;
  #pragma GCC unroll 8
  for (int b = 0; b < B; b++) {
    out[b] = _mm512_mul_ps(out[b], scale);
    if (w.bias) out[b] = _mm512_add_ps(out[b], widened(_mm256_maskz_loadu_epi16(mask, w.bias + n)));
    _mm256_mask_storeu_epi16(y + (m + b) * ldy + n, mask, (__m256i)_mm512_cvtneps_pbh(out[b]));
  }
}

// ---------------------------------------------------------------- of any kind

// Matrices of one kind; of codes with scales, groups (4 bits) and how many columns of x share one; biases or none.
static std::vector<Matrix> matrices(const Tensors& w, const Tensors& scales, const Tensors& groups, const Tensors& biases,
                                    const std::vector<int64_t>& rows, const std::vector<int64_t>& blocks) {
  std::vector<Matrix> found;
  for (size_t i = 0; i < w.size(); i++) {
    auto* bias = biases.empty() ? nullptr : (const u16*)biases[i].const_data_ptr();
    auto* ranges = groups.empty() ? nullptr : (const uint8_t*)groups[i].const_data_ptr();
    int64_t K = w[i].size(1);
    if (scales.empty())
      found.push_back({(const u16*)w[i].const_data_ptr(), nullptr, nullptr, nullptr, bias, rows[i], K, 0});
    else
      found.push_back({nullptr, (const uint8_t*)w[i].const_data_ptr(), ranges, (const float*)scales[i].const_data_ptr(), bias,
                       rows[i], K * (ranges ? 8 : 4), blocks[i]});
  }
  return found;
}

// What matrices multiply: M rows of x, and their codes where the matrices are codes.
struct Given {
  const u16* x;
  int64_t M;
  Codes codes;

  Given(const u16* x, int64_t M, const Matrix& w) : x(x), M(M), codes(w.plain ? Codes{} : room(M, w.K, w.G, !w.groups)) {}

  Stage code() const {  // to be done before the product
    int64_t groups = codes.G ? M * codes.K / codes.G : 0;
    return {groups, 8, [*this](int64_t begin, int64_t end) { for (int64_t g = begin; g < end; g++) code_group(x, g, codes); }};
  }
};

constexpr int64_t UNIT = 16;  // rows of a matrix: a tile

// Rows [begin, end) of w, from a multiple of UNIT on, times all of x; y is where the first row's product goes.
static void multiply(const Matrix& w, const Given& x, int64_t begin, int64_t end, u16* y, int64_t ldy) {
  if (w.plain) {
    plain_rows(w.plain + begin * w.K, end - begin, w.K, x.x, x.M, w.bias ? w.bias + begin : nullptr, y, ldy);
    return;
  }
  y -= begin;
  for (int64_t t = begin / UNIT; t * UNIT < end; t++) {
    int64_t m = 0;
    for (; m + 8 <= x.M; m += 8) tile<8>(w, t, x.codes, m, y, ldy);
    for (; m + 4 <= x.M; m += 4) tile<4>(w, t, x.codes, m, y, ldy);
    for (; m + 2 <= x.M; m += 2) tile<2>(w, t, x.codes, m, y, ldy);
    for (; m < x.M; m++) tile<1>(w, t, x.codes, m, y, ldy);
  }
}

// x (M, K) times several matrices -> (M, their rows one after another)
static Tensor linear(Tensor x, Tensors w, Tensors scales, Tensors groups, Tensors biases, std::vector<int64_t> rows, std::vector<int64_t> blocks) {
  auto all = matrices(w, scales, groups, biases, rows, blocks);
  Given given((const u16*)x.const_data_ptr(), x.numel() / all[0].K, all[0]);
  Places units, at;  // where each matrix begins, in tiles and in y
  for (auto& one : all) {
    units.starts.push_back(units.end() + (one.rows + UNIT - 1) / UNIT);
    at.starts.push_back(at.end() + one.rows);
  }
  Tensor y = torch::stable::new_empty(x, {given.M, at.end()});
  auto* ys = (u16*)y.mutable_data_ptr();
  in_stages({given.code(), {units.end(), 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      size_t i = units.of(begin);
      int64_t from = (begin - units.starts[i]) * UNIT, until = std::min(end, units.starts[i + 1]);
      multiply(all[i], given, from, std::min((until - units.starts[i]) * UNIT, all[i].rows), ys + at.starts[i] + from, at.end());
      begin = until;
    }
  }}});
  return y;
}
