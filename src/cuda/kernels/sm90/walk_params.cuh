/* What the roles that prefill and walks share ask of the parameters, answered for walks. To be included before them. */
#ifndef FKDA_CUDA_SM90_WALK_PARAMS_CUH
#define FKDA_CUDA_SM90_WALK_PARAMS_CUH

#include "cuda/kernels/portable/backward_workspace.cuh"
#include "cuda/kernels/sm90/backward_params.h"

namespace fkda {

__device__ __forceinline__ const fkda_problem &problem_of(const fkda_sm90_backward_params &x) {
  return x.backward.problem;
}

__device__ __forceinline__ bool is_dealt_ahead(const fkda_sm90_backward_params &) { return false; }

/* In the places of v and o: forward v; backward d_out, and d_v where it is wanted. */
__device__ __forceinline__ const fkda_tensor_map &map_in(const fkda_sm90_backward_params &x,
                                                         const Task &task) {
  return task.backward ? x.d_out : x.v;
}
__device__ __forceinline__ const fkda_tensor_map &map_out(const fkda_sm90_backward_params &x) {
  return x.d_v;
}
__device__ __forceinline__ const fkda_rows &rows_out(const fkda_sm90_backward_params &x) {
  return x.backward.problem.d_v;
}

/* Leaves a chunk's norms and beta in the workspace, where the gradients read them; a lane has a token. */
template <class S, class Handover>
__device__ __forceinline__ void keep_in_record(const fkda_sm90_backward_params &params,
                                               const Task &task, int chunk, const Handover &f,
                                               int lane) {
  if (!task.backward || (task.v_begin && !S::PAIR)) return;
  const int64_t row = first_block(params.backward.problem, task.b, task.begin, task.n) + chunk / 2;
  char *record = Workspace<S::K>(params.backward).record(row, task.head, chunk & 1);
  const auto of_token = [&](int offset) -> float & {
    return reinterpret_cast<float *>(record + offset)[lane];
  };
  const float norm = f.norm_k[lane];
  of_token(FKDA_BACKWARD_NORM_K(S::K)) = norm;
  of_token(FKDA_BACKWARD_NORM_Q(S::K)) = f.norm_q[lane];
  of_token(FKDA_BACKWARD_BETA(S::K)) = f.column[lane] * reciprocal(norm);
  if (lane == 0) *reinterpret_cast<uint32_t *>(record + FKDA_BACKWARD_PARALLEL(S::K)) = 0;
}

}  // namespace fkda

#endif
