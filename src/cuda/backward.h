/* The backward of the CUDA rows. Its kernels are apart from the rows' others: who never trains need not have them. */
#ifndef FKDA_CUDA_BACKWARD_H
#define FKDA_CUDA_BACKWARD_H

#include "cuda/kernels/portable/backward_params.h"
#include "cuda/module.h"
#include "plan/plan.h"

/* As the functions of a row (run/backend.h), for FKDA_OP_BACKWARD on a device that the row can use. Of the row
 * "portable": kernels/portable/backward_*.cu, several launches a call. */
bool fkda_cuda_backward_supports(const fkda_problem *problem, char *reason, size_t capacity);
void fkda_cuda_backward_plan(const fkda_problem *problem, fkda_plan_t *plan);
fkda_status fkda_cuda_backward_launch(const fkda_problem *problem);
fkda_status fkda_cuda_backward_warmup(int32_t device_id);

/* Of the row "sm90": the walks of kernels/sm90/backward_walk.cu, and behind them the portable kernels. */
bool fkda_cuda_backward_sm90_supports(const fkda_problem *problem, char *reason, size_t capacity);
void fkda_cuda_backward_sm90_plan(const fkda_problem *problem, fkda_plan_t *plan);
fkda_status fkda_cuda_backward_sm90_launch(const fkda_problem *problem, const fkda_plan_t *plan);
fkda_status fkda_cuda_backward_sm90_warmup(int32_t device_id);

/* ---- what the latter takes of the former ---- */

/* Of all sequences and value heads: forwards and backwards at the same time, or backwards only. A question without
 * gradients is about all. */
int64_t fkda_cuda_backward_walks(const fkda_problem *problem);

/* Are any gradients wanted? */
bool fkda_cuda_backward_wants_any(const fkda_problem *problem);

/* What the portable kernels of a call are given, without `redo`. */
fkda_portable_backward_params fkda_cuda_backward_params(const fkda_cuda_device *device,
                                                        const fkda_problem *problem);

/* Launches what the wanted gradients need; where that is a walk, `first` before all, if given. */
fkda_status fkda_cuda_backward_launch_all(const fkda_cuda_driver *driver,
                                          fkda_portable_backward_params *params,
                                          const fkda_cuda_launch *first);

#endif
