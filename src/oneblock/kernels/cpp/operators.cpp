// The operators of torch.ops.oneblock_cpu. Compiled by build.py, in about three seconds.

#include "attention.h"
#include "norm_and_activation.h"
#include "gemm.h"
#include "fused_post_attention.h"

STABLE_TORCH_LIBRARY(oneblock_cpu, m) {
  m.def("linear(Tensor x, Tensor[] w, Tensor[] scales, Tensor[] groups, Tensor[] biases, int[] rows, int[] group_sizes) -> Tensor");
  m.def("fused_post_attention(Tensor x, Tensor y, Tensor[] w, Tensor[] scales, Tensor[] groups, Tensor[] biases, int[] rows,"
        " int[] group_sizes, Tensor gain, Tensor? shift, float eps, float offset, bool centred, bool gain_after, float a, float b)"
        " -> Tensor");
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
  m.def("causal_softmax(Tensor(a!) scores, int queries, float scale) -> ()");
  m.def("norm(Tensor x, Tensor gain, Tensor? bias, float eps, float offset, bool centred, bool gain_after) -> Tensor");
  m.def("gated_activation(Tensor(a!) x, Tensor? up, float a, float b) -> ()");
  m.def("apply_rope(Tensor x, Tensor cos, Tensor sin) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(oneblock_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("fused_post_attention", TORCH_BOX(&fused_post_attention));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("causal_softmax", TORCH_BOX(&causal_softmax));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("apply_rope", TORCH_BOX(&apply_rope));
}
