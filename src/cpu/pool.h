/* Threads of the CPU backends: a built-in pool, or the caller's through fkda_set_parallel_for(). */
#ifndef FKDA_CPU_POOL_H
#define FKDA_CPU_POOL_H

#include "flashkda/flashkda.h"

/* Threads that a run may use, the calling one included. */
int32_t fkda_pool_threads(void);

/* Calls task(arg, i) for every i in [0, count), the calling thread taking part. Several host threads may
 * call at once, and tasks may call again: whoever finds the pool busy runs its tasks itself. */
void fkda_pool_run(int32_t count, fkda_task_fn task, void *arg);

/* Starts the built-in pool's threads ahead of the first run. */
void fkda_pool_start(void);

/* The bodies of fkda_set_num_threads() and fkda_set_parallel_for(). */
fkda_status fkda_pool_set_threads(int32_t num_threads);
fkda_status fkda_pool_set_hook(fkda_parallel_for_fn parallel_for, void *context,
                               int32_t num_threads);

#endif
