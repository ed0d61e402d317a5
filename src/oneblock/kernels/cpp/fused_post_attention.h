// What a block does after its attention, in one parallel region: between products threads wait for each other for a
// fraction of a microsecond, where each region costs several and each operator a call.
#pragma once

#include "norm_and_activation.h"
#include "gemm.h"

// x (M, dim) is the stream, y (M, heads x D) what attention read. w: its last matrix, the gate where there is one, up and
// down. -> z = x + y wo, and then z + down(act(gate(norm(z))) up(norm(z))); the curve of act is that of `gate`.
static Tensor rest(Tensor x, Tensor y, Tensors w, Tensors scales, Tensors groups, Tensors biases, std::vector<int64_t> rows,
                   std::vector<int64_t> blocks, Tensor gain, std::optional<Tensor> shift, double eps, double offset,
                   bool centred, bool after, double a, double b) {
  auto all = matrices(w, scales, groups, biases, rows, blocks);
  const Matrix &out = all[0], &inner = all[1], &up = all[all.size() - 2], &down = all.back();  // inner is up without a gate
  int64_t dim = out.rows, hidden = up.rows, M = x.numel() / dim;
  Norm normed(gain, shift, eps, offset, centred, after);

  thread_local std::vector<u16> numbers;
  numbers.resize(M * 2 * (dim + hidden));
  u16 *h = numbers.data(), *part = h + M * dim, *g = part + M * dim, *u = g + M * hidden;
  for (auto& one : all)
    if (!one.plain) room(M, one.K, one.G, !one.groups);  // so that it is large enough for each
  Given read((const u16*)y.const_data_ptr(), M, out), stream(h, M, inner), gated(g, M, down);
  Tensor z = torch::stable::empty_like(x);
  auto* xs = (const u16*)x.const_data_ptr();
  auto* zs = (u16*)z.mutable_data_ptr();

  // Adds what is in `part` to rows of `from`.
  auto joined = [&](const u16* from, int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = m * dim + begin; n < m * dim + end; n += 16) {
        int64_t left = m * dim + end - n;
        store(zs + n, _mm512_add_ps(load(from + n, left), load(part + n, left)), left);
      }
  };
  in_stages({
      read.code(),
      {dim, UNIT, [&](int64_t begin, int64_t end) {
        multiply(out, read, begin, end, part + begin, dim);
        joined(xs, begin, end);
      }},
      {M, 1, [&](int64_t begin, int64_t end) { for (int64_t m = begin; m < end; m++) normed(zs + m * dim, dim, h + m * dim); }},
      stream.code(),
      {hidden, UNIT, [&](int64_t begin, int64_t end) {
        multiply(inner, stream, begin, end, g + begin, hidden);
        if (&up != &inner) multiply(up, stream, begin, end, u + begin, hidden);
        for (int64_t at = begin; at < M * hidden; at += hidden) gate(g + at, &up != &inner ? u + at : nullptr, end - begin, a, b);
      }},
      gated.code(),
      {dim, UNIT, [&](int64_t begin, int64_t end) {
        multiply(down, gated, begin, end, part + begin, dim);
        joined(zs, begin, end);
      }},
  });
  return z;
}
