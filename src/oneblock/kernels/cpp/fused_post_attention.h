// Everything after attention in one parallel region: between its stages threads wait for each other for a fraction of a
// microsecond, where every parallel region costs several and every operator a call.
#pragma once

#include "norm_and_activation.h"
#include "gemm.h"

// x (M, dim) is the residual stream, y (M, heads x D) the attention output. w: wo, the gate projection if there is one, up and
// down. z = x + wo(y); returns z + down(act(gate(norm(z))) * up(norm(z))), act being x * sigmoid(a x + b x^3).
static Tensor fused_post_attention(Tensor x, Tensor y, Tensors w, Tensors scales, Tensors groups, Tensors biases,
                                   std::vector<int64_t> rows, std::vector<int64_t> group_sizes, Tensor gain,
                                   std::optional<Tensor> shift, double eps, double offset, bool centred, bool gain_after,
                                   double a, double b) {
  auto weights = weight_matrices(w, scales, groups, biases, rows, group_sizes);
  const Matrix &wo = weights[0], &gate = weights[1], &up = weights[weights.size() - 2], &down = weights.back();  // gate is up without a gate
  int64_t dim = wo.rows, hidden_dim = up.rows, M = x.numel() / dim;
  Norm norm_row(gain, shift, eps, offset, centred, gain_after);

  thread_local std::vector<bf16> buffer;
  buffer.resize(M * 2 * (dim + hidden_dim));
  bf16 *h = buffer.data(), *branch = h + M * dim, *g = branch + M * dim, *u = g + M * hidden_dim;
  for (auto& weight : weights)
    if (!weight.dense) quantization_buffer(M, weight.K, weight.G, !weight.groups);  // large enough for each before the first is used
  Activations attention((const bf16*)y.const_data_ptr(), M, wo), normed(h, M, gate), activated(g, M, down);
  Tensor z = torch::stable::empty_like(x);
  auto* xs = (const bf16*)x.const_data_ptr();
  auto* zs = (bf16*)z.mutable_data_ptr();

  // z = residual + branch, columns [begin, end).
  auto add_residual = [&](const bf16* residual, int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = m * dim + begin; n < m * dim + end; n += 16) {
        int64_t left = m * dim + end - n;
        store(zs + n, _mm512_add_ps(load(residual + n, left), load(branch + n, left)), left);
      }
  };
  run_stages({
      attention.quantize_stage(),
      {dim, TILE, [&](int64_t begin, int64_t end) {
        gemm_rows(wo, attention, begin, end, branch + begin, dim);
        add_residual(xs, begin, end);
      }},
      {M, 1, [&](int64_t begin, int64_t end) { for (int64_t m = begin; m < end; m++) norm_row(zs + m * dim, dim, h + m * dim); }},
      normed.quantize_stage(),
      {hidden_dim, TILE, [&](int64_t begin, int64_t end) {
        gemm_rows(gate, normed, begin, end, g + begin, hidden_dim);
        if (&up != &gate) gemm_rows(up, normed, begin, end, u + begin, hidden_dim);
        for (int64_t at = begin; at < M * hidden_dim; at += hidden_dim) activate(g + at, &up != &gate ? u + at : nullptr, end - begin, a, b);
      }},
      activated.quantize_stage(),
      {dim, TILE, [&](int64_t begin, int64_t end) {
        gemm_rows(down, activated, begin, end, branch + begin, dim);
        add_residual(zs, begin, end);
      }},
  });
  return z;
}
