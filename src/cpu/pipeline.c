#include "cpu/pipeline.h"

#include <pthread.h>

#include "cpu/pool.h"

#define MAX_PARTS (FKDA_MAX_DIM / 4) /* of 4 lanes */
#define SLOTS_PER_THREAD 8
#define MAX_RING 64       /* bits of stream.finished */
#define FACTORS_AT_ONCE 2 /* chunks */

typedef struct part {
  int64_t done; /* chunks */
  int64_t next_checkpoint;
  bool taken, ended;
} part;

/* Chunks [0, made) have factors, [made, claimed) may; those before `slowest` are no longer needed. */
typedef struct stream {
  bool live;
  fkda_cpu_job job;
  fkda_cpu_ring ring;
  void *state;
  int64_t chunks, claimed, made, slowest;
  uint64_t finished; /* bit c % ring.count: made although one before it is not */
  int32_t parts, parts_left;
  part part[MAX_PARTS];
} stream;

typedef struct pipeline {
  const fkda_pipeline_args *args;
  stream *streams; /* those at work */
  int32_t active;
  char *scratch; /* one for each worker */
  size_t scratch_size;
  pthread_mutex_t mutex; /* guards what follows, and the streams */
  pthread_cond_t progress;
  int64_t next_stream, unfinished; /* of all */
  int32_t sleeping;
} pipeline;

/* A piece of work. */
typedef struct item {
  stream *of;
  part *part; /* NULL: factors */
  int64_t first, last;
} item;

static size_t streams_size(int32_t threads) {
  return fkda_cpu_align_up((size_t)threads * sizeof(stream));
}

size_t fkda_pipeline_memory(const fkda_cpu_kernels *kernels, int64_t K, int64_t V,
                            int32_t threads) {
  return streams_size(threads) +
         (size_t)threads * (kernels->state_size(K, V) + kernels->scratch_size(K, V) +
                            SLOTS_PER_THREAD * kernels->factors_size(K));
}

/* ---- under the mutex ------------------------------------------------------------------------------ */

/* Puts the next sequence and head to work in place of a finished one. */
static void start_next(pipeline *p, stream *s) {
  const fkda_pipeline_args *args = p->args;
  s->live = false;
  while (p->next_stream < args->streams) {
    if (!args->stream_at(args->context, p->next_stream++, &s->job)) {
      --p->unfinished;
      continue;
    }
    const fkda_problem *problem = s->job.problem;
    s->live = true;
    s->chunks = (fkda_span_of(problem, s->job.n).length + FKDA_CPU_CHUNK - 1) / FKDA_CPU_CHUNK;
    s->claimed = s->made = s->slowest = 0;
    s->finished = 0;
    s->parts = s->parts_left = (int32_t)((problem->V + args->columns - 1) / args->columns);
    for (int32_t i = 0; i < s->parts; ++i) s->part[i] = (part){0};
    return;
  }
}

static bool take_factors(stream *s, int64_t room, item *work) {
  int64_t count = room < FACTORS_AT_ONCE ? room : FACTORS_AT_ONCE;
  if (count > s->chunks - s->claimed) count = s->chunks - s->claimed;
  if (count <= 0) return false;
  *work = (item){s, NULL, s->claimed, s->claimed + count};
  s->claimed += count;
  return true;
}

static bool take_part(stream *s, int32_t favourite, item *work) {
  const int64_t most = s->ring.count / 4;
  for (int32_t i = 0; i < s->parts; ++i) {
    part *x = &s->part[(favourite + i) % s->parts];
    if (x->taken || x->ended || (x->done == s->made && s->chunks)) continue;
    const int64_t count = s->made - x->done;
    *work = (item){s, x, x->done, x->done + (count < most ? count : most)};
    x->taken = true;
    return true;
  }
  return false;
}

/* Factors first until half of the ring is full, so that no part starves later. `favourite`: the stream, and
 * the part of it, that the worker had last, whose state is in its cache. */
static bool take(pipeline *p, const item *favourite, item *work) {
  const int32_t first = (int32_t)(favourite->of - p->streams);
  for (int32_t i = 0; i < p->active; ++i) {
    stream *s = &p->streams[(first + i) % p->active];
    if (!s->live) continue;
    const int64_t ahead = s->claimed - s->slowest, count = s->ring.count;
    const int32_t last = i == 0 && favourite->part ? (int32_t)(favourite->part - s->part) : 0;
    if (take_factors(s, count / 2 - ahead, work) || take_part(s, last, work) ||
        take_factors(s, count - ahead, work))
      return true;
  }
  return false;
}

static void complete(pipeline *p, const item *work) {
  stream *s = work->of;
  part *x = work->part;
  if (!x) {
    for (int64_t c = work->first; c < work->last; ++c)
      s->finished |= UINT64_C(1) << (c % s->ring.count);
    for (uint64_t bit; s->finished & (bit = UINT64_C(1) << (s->made % s->ring.count)); ++s->made)
      s->finished &= ~bit;
    return;
  }
  x->taken = false;
  x->done = work->last;
  x->ended = x->done == s->chunks;
  s->slowest = x->done;
  for (int32_t i = 0; i < s->parts; ++i)
    if (s->part[i].done < s->slowest) s->slowest = s->part[i].done;
  if (!x->ended || --s->parts_left) return;
  --p->unfinished;
  start_next(p, s);
}

/* ---- workers --------------------------------------------------------------------------------------- */

static void perform(const pipeline *p, const item *work, void *scratch) {
  const fkda_cpu_kernels *kernels = p->args->kernels;
  stream *s = work->of;
  fkda_cpu_job job = s->job;
  if (!work->part) {
    kernels->make_factors(&job, &s->ring, work->first, work->last, scratch);
    return;
  }
  job.v_begin = (work->part - s->part) * p->args->columns;
  job.v_end = job.v_begin + p->args->columns;
  if (job.v_end > job.problem->V) job.v_end = job.problem->V;
  kernels->apply(&job, &s->ring, work->first, work->last, s->state, &work->part->next_checkpoint,
                 scratch);
}

static void worker(void *arg, int32_t index) {
  pipeline *p = arg;
  void *scratch = p->scratch + (size_t)index * p->scratch_size;
  item work = {.of = &p->streams[index % p->active]}, favourite = work;
  favourite.part = &favourite.of->part[index / p->active];
  pthread_mutex_lock(&p->mutex);
  while (p->unfinished) {
    if (!take(p, &favourite, &work)) {
      ++p->sleeping;
      pthread_cond_wait(&p->progress, &p->mutex);
      --p->sleeping;
      continue;
    }
    if (work.part) favourite = work;
    pthread_mutex_unlock(&p->mutex);
    perform(p, &work, scratch);
    pthread_mutex_lock(&p->mutex);
    complete(p, &work);
    if (p->sleeping) pthread_cond_broadcast(&p->progress);
  }
  pthread_mutex_unlock(&p->mutex);
}

void fkda_pipeline_run(const fkda_pipeline_args *args) {
  const fkda_cpu_kernels *kernels = args->kernels;
  const int32_t threads = args->threads;
  pipeline p = {.args = args,
                .active = args->streams < threads ? (int32_t)args->streams : threads,
                .unfinished = args->streams,
                .mutex = PTHREAD_MUTEX_INITIALIZER,
                .progress = PTHREAD_COND_INITIALIZER};
  char *at = args->memory;
  p.streams = (stream *)(void *)at;
  at += streams_size(threads);
  p.scratch = at;
  p.scratch_size = kernels->scratch_size(args->K, args->V);
  at += (size_t)threads * p.scratch_size;
  const size_t state_size = kernels->state_size(args->K, args->V);
  const int32_t slots = SLOTS_PER_THREAD * threads / p.active;
  const fkda_cpu_ring ring = {.slot_size = kernels->factors_size(args->K),
                              .count = slots < MAX_RING ? slots : MAX_RING};
  for (int32_t i = 0; i < p.active; ++i) {
    stream *s = &p.streams[i];
    s->state = at;
    at += state_size;
    s->ring = ring;
    s->ring.slots = at;
    at += (size_t)ring.count * ring.slot_size;
    start_next(&p, s);
  }
  fkda_pool_run(threads, worker, &p);
  pthread_cond_destroy(&p.progress);
  pthread_mutex_destroy(&p.mutex);
}
