// The operators of torch.ops.oneblock_rows. Compiled by build.py, in about three seconds.

#include "attention.h"
#include "norm_and_activation.h"
#include "gemm.h"
#include "fused_post_attention.h"

STABLE_TORCH_LIBRARY(oneblock_rows, m) {
  m.def("linear(Tensor x, Tensor[] w, Tensor[] scales, Tensor[] groups, Tensor[] biases, int[] rows, int[] blocks) -> Tensor");
  m.def("rest(Tensor x, Tensor y, Tensor[] w, Tensor[] scales, Tensor[] groups, Tensor[] biases, int[] rows, int[] blocks,"
        " Tensor gain, Tensor? shift, float eps, float offset, bool centred, bool after, float a, float b) -> Tensor");
  m.def("attend(Tensor q, Tensor k, Tensor v, Tensor seen, float scale) -> Tensor");
  m.def("weigh(Tensor(a!) scores, int rows, float scale) -> ()");
  m.def("norm(Tensor x, Tensor gain, Tensor? bias, float eps, float offset, bool centred, bool after) -> Tensor");
  m.def("gate(Tensor(a!) x, Tensor? up, float a, float b) -> ()");
  m.def("turned(Tensor x, Tensor cos, Tensor sin) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(oneblock_rows, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("rest", TORCH_BOX(&rest));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("weigh", TORCH_BOX(&weigh));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("gate", TORCH_BOX(&gate_rows));
  m.impl("turned", TORCH_BOX(&turned));
}
