/* Prefill with several threads on one sequence and head: for calls with fewer heads than threads, or with
 * just too many for a whole number of rounds.
 *
 * The factors (8), (9) of a chunk do not depend on the state, so that any thread can make them ahead of
 * time. The rest goes chunk after chunk, but value columns never meet, so that each part of V can be a
 * thread of its own. Hence two kinds of work: the factors of a chunk or two, into a ring of slots that
 * all parts read; and some chunks of one part of V, for which the factors are there. A worker does
 * whichever is ready, under one mutex; no bit of the result depends on who did what.
 *
 * A worker with nothing to do sleeps, but only until work ends that another worker has begun. So it
 * never waits for a task that was not started: run one after another, as a caller's parallel-for may do,
 * the first worker does everything.
 */
#ifndef FKDA_CPU_PIPELINE_H
#define FKDA_CPU_PIPELINE_H

#include "cpu/kernels.h"

typedef struct fkda_pipeline_args {
  const fkda_cpu_kernels *kernels;
  int64_t K, V; /* of memory; V the widest of all streams */

  /* A stream is one sequence and head; longest first is best. Fills in the job, all of V, or returns
   * false if there is nothing to do for it. */
  int64_t streams;
  bool (*stream_at)(const void *context, int64_t index, fkda_cpu_job *job);
  const void *context;

  int64_t columns; /* of a part of V: a multiple of kernels->panel, or kernels->lanes */
  int32_t threads;
  char *memory; /* fkda_pipeline_memory() bytes, aligned to 64 */
} fkda_pipeline_args;

/* For up to `threads` threads, any number of streams and parts. */
size_t fkda_pipeline_memory(const fkda_cpu_kernels *kernels, int64_t K, int64_t V, int32_t threads);

void fkda_pipeline_run(const fkda_pipeline_args *args);

#endif
