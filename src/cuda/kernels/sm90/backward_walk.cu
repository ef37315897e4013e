/* The backward's walks on Hopper: factors and both directions in one launch; sm_90a.
 *
 * A task is one sequence, value head, 64 or 128 value columns and a direction; a block does one after the other. Its roles
 * are those of the prefill (prefill.cu), whose factor groups and helpers it shares; state groups of its own
 * (walk.cuh) hold S going forward, its gradient going backward, and leave in the workspace what the gradients' launch reads.
 * The backward direction has the queries, d_out for v, d_v for o, and leaves the norms and beta; the forward
 * direction needs no query. */
#include "cuda/kernels/sm90/walk_params.cuh"

#include "cuda/kernels/sm90/roles.cuh"
#include "cuda/kernels/sm90/walk.cuh"

namespace fkda {

/* The block's i-th task; n < 0 if there is none. Of each sequence backward ones, which take longer, come first. */
template <class S>
__device__ Task deal_task(const fkda_sm90_backward_params &params, const Shared<S> &shared,
                          int64_t i) {
  const fkda_problem &p = params.backward.problem;
  const int parts = dealt_parts<S>(params);
  const int64_t walks = p.HV * parts;
  const int64_t per_sequence = walks * (params.backward.forward ? 2 : 1);
  const int64_t position = dealt_task(i, dealt_to<S>(), dealt_among<S>());
  int64_t n = position / per_sequence;
  if (n >= p.N) return no_task();
  int within = (int)(position - n * per_sequence);
  const bool backward = within < walks;
  if (!backward) within -= (int)walks;
  const int head = within / parts, part = S::PAIR ? cluster_rank() : within - head * parts;
  if (is_sorted(p)) n = shared.order[n];
  Task task = make_task(p, n, head, part, S::V, CHUNK);
  task.backward = backward;
  task.skip = false;
  task.chunks = 2 * ((task.length + FKDA_BACKWARD_BLOCK - 1) / FKDA_BACKWARD_BLOCK);
  return task;
}

template <class S>
__device__ __forceinline__ void backward_walk(const fkda_sm90_backward_params &params) {
  Shared<S> &shared = start_block<S>();
  const fkda_problem &p = params.backward.problem;
  if (is_sorted(p)) {
    const int N = (int)p.N;
    sort_sequences(shared, read_lengths(p, shared, N), N);
  }
  start_roles<S>();
  run_roles(params, shared, [&] { run_walk<S>(params.backward, shared); });
  end_roles<S>();
}

}  // namespace fkda

#define FKDA_ENTRY_OF(K, part, bounded, suffix, threads, pair, cluster)                            \
  extern "C" __global__ void cluster __launch_bounds__(threads, 1)                                 \
      fkda_sm90_backward_walk_k##K##_v##part##suffix(                                              \
          const __grid_constant__ fkda_sm90_backward_params params) {                              \
    using S = fkda::Shape<K, part, 2, bounded, true, pair>;                                        \
    static_assert(S::THREADS == threads, "threads");                                               \
    static_assert(                                                                                 \
        sizeof(fkda::Shared<S>) + fkda::ALIGNMENT - fkda::ALIGNED <= FKDA_SM90_PREFILL_SHARED,     \
        "shared memory");                                                                          \
    fkda::backward_walk<S>(params);                                                                \
  }
#define FKDA_ENTRY(K, part, bounded, suffix)                                                       \
  FKDA_ENTRY_OF(K, part, bounded, suffix, FKDA_SM90_PREFILL_THREADS, false, )
FKDA_SM90_BACKWARD_LIST(FKDA_ENTRY)
#define FKDA_PAIR_ENTRY(K, part, bounded, suffix)                                                  \
  FKDA_ENTRY_OF(K, part, bounded, suffix, FKDA_SM90_PAIR_THREADS, true, __cluster_dims__(2, 1, 1))
FKDA_SM90_BACKWARD_PAIR_LIST(FKDA_PAIR_ENTRY)
