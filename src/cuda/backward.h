/* The backward of the row "portable": kernels/portable/backward_*.cu, several launches a call. */
#ifndef FKDA_CUDA_BACKWARD_H
#define FKDA_CUDA_BACKWARD_H

#include "plan/plan.h"

/* As the functions of a row (run/backend.h), for FKDA_OP_BACKWARD on a device that the row can use. */
bool fkda_cuda_backward_supports(const fkda_problem *problem, char *reason, size_t capacity);
void fkda_cuda_backward_plan(const fkda_problem *problem, fkda_plan_t *plan);
fkda_status fkda_cuda_backward_launch(const fkda_problem *problem, const fkda_plan_t *plan);

/* Loads its kernels, which are apart from the row's others: who never trains need not have them. */
fkda_status fkda_cuda_backward_warmup(int32_t device_id);

#endif
