/* The one case table: what the C tests, the Python tests, `flashkda check` and `flashkda bench` run.
 *
 * A case says which call to make, how its data are made and what must hold of the results; nothing in it
 * knows a backend. Running one goes through the public API only:
 *
 *   fkda_fixture *f = fkda_fixture_new(fkda_case_at(i), fkda_memory_host(), error, sizeof error);
 *   fkda_fixture_run(f, "cpu-avx2", &result);      (as many backends as there are; gold is made once)
 *   fkda_fixture_free(f);
 *
 * In every case inputs and outputs lie between guard zones, gaps between rows included; everything that
 * must be written is NaN before the call; inputs, gaps and whatever must stay untouched are compared bit for
 * bit afterwards. The workspace is of exactly the size asked for in every second case, NULL in the
 * others where the device allows it.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef FKDA_CASES_CASES_H
#define FKDA_CASES_CASES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "call.h"

/* ---- the table -------------------------------------------------------------------------------- */

/* X(name, text). A ctest entry each. */
#define FKDA_CASE_GROUP_LIST(X)                                                                    \
  X(gate, "gate forms over every range of raw values")                                             \
  X(numbers, "collinear keys, weak decay, extreme values")                                         \
  X(options, "every combination of options and dtypes")                                            \
  X(shapes, "T, B, H, HV, K, V")                                                                   \
  X(ragged, "cu_seqlens, empty sequences anywhere")                                                \
  X(strides, "views into larger tensors")                                                          \
  X(indices, "state pools and slots")                                                              \
  X(states, "dtypes and layouts of states, in place")                                              \
  X(checkpoints, "states on the way")                                                              \
  X(invariance, "bit-equal where it must be")                                                      \
  X(nan, "a NaN stays in its sequence and head")                                                   \
  X(decode, "few tokens from a state pool")                                                        \
  X(summary, "affine map of the state")                                                            \
  X(backward, "gradients")                                                                         \
  X(threads, "host threads, pool sizes, fork")

typedef enum fkda_case_group {
#define FKDA_CASE_GROUP_ENUM(name, text) FKDA_GROUP_##name,
  FKDA_CASE_GROUP_LIST(FKDA_CASE_GROUP_ENUM)
#undef FKDA_CASE_GROUP_ENUM
      FKDA_GROUPS
} fkda_case_group;

const char *fkda_group_name(fkda_case_group group);
const char *fkda_group_text(fkda_case_group group);

/* How an element is drawn. a and b are the two parameters. */
typedef enum fkda_dist_kind {
  FKDA_DIST_NORMAL,   /* mean a, standard deviation b */
  FKDA_DIST_UNIFORM,  /* in [a, b) */
  FKDA_DIST_CONSTANT, /* a */
  FKDA_DIST_EITHER,   /* a or b, half of the elements each */
  FKDA_DIST_UNIT,     /* a normal vector scaled to length a over the last dimension */
  FKDA_DIST_REPEAT, /* one normal vector (standard deviation b) a head, the same for every token */
  FKDA_DIST_REPEAT_EVEN, /* the same in heads 0, 2, ..., normal ones in the others */
  FKDA_DIST_TILE16,      /* 16 such vectors, repeated every 16 tokens */
  FKDA_DIST_RAMP,        /* normal times (0.1 + 2 i / size), i the index in the last dimension */
  FKDA_DIST_SPARSE,      /* standard deviation b, but every third token is 0 */
  FKDA_DIST_SWITCH,      /* a for 5 tokens, then b for 5 tokens, and so on */
} fkda_dist_kind;

typedef struct fkda_dist {
  fkda_dist_kind kind;
  double a, b;
} fkda_dist;

typedef enum fkda_strides {
  FKDA_STRIDES_CONTIGUOUS,
  FKDA_STRIDES_FUSED, /* q, k, v (and g of their type) slices of one projection; beta rows of 6288 */
  FKDA_STRIDES_PADDED,     /* gaps after every head, token and batch row, of states too */
  FKDA_STRIDES_HEAD_MAJOR, /* stored [B,H,T,D] */
  FKDA_STRIDES_BROADCAST,  /* q and k stride 0 over B, beta over T */
  FKDA_STRIDES_MISALIGNED, /* contiguous, but every base one element off 64 bytes */
} fkda_strides;

typedef enum fkda_slots {
  FKDA_SLOTS_NONE,         /* sequence n uses slot n */
  FKDA_SLOTS_PERMUTED,     /* one index tensor each, the same random slots of one pool, in place */
  FKDA_SLOTS_APART,        /* read and write slots of one pool, disjoint */
  FKDA_SLOTS_INITIAL_ONLY, /* initial pool with indices, final state [N] without */
  FKDA_SLOTS_FINAL_ONLY,
  FKDA_SLOTS_TWO_POOLS,    /* two pools of different size */
  FKDA_SLOTS_OUT_OF_RANGE, /* as PERMUTED with one slot = P; CPU: an error */
  FKDA_SLOTS_NEGATIVE,     /* as PERMUTED with one slot = -2; CPU: an error */
  FKDA_SLOTS_2D,           /* decode: [N,M] for both, in place */
  FKDA_SLOTS_2D_APART,     /* decode: [N,M] each, some final -1 */
  FKDA_SLOTS_ONE_TENSOR,   /* decode: only initial_state_indices, [N] */
  FKDA_SLOTS_2D_ONE_TENSOR,
  FKDA_SLOTS_2D_OUT_OF_RANGE, /* as 2D with slots P and -2 to start from or to store to; CPU: an error */
  FKDA_SLOTS_2D_ACCEPTED, /* as 2D with counts 0 and M + 1; CPU: an error */
} fkda_slots;

typedef enum fkda_marks {
  FKDA_MARKS_NONE,
  FKDA_MARKS_OFFSETS, /* [N,C], some -1 */
  FKDA_MARKS_PACKED,
  FKDA_MARKS_EVERY,  /* after */
  FKDA_MARKS_BEFORE, /* every n tokens, before */
  FKDA_MARKS_ONE,    /* [N], one a sequence, some -1 */
} fkda_marks;

/* What else must hold; bits of fkda_case.claims. On the CPU any number of threads must give the same bits in
 * every case. */
enum {
  FKDA_CLAIM_TWICE = 1, /* the same call again: the same bits */
  FKDA_CLAIM_SPLIT = 2, /* two calls split at multiples of the plan's chunk: the same bits */
  FKDA_CLAIM_ALONE = 4, /* each sequence by itself: the same bits */
  FKDA_CLAIM_FUTURE =
      8, /* later tokens changed: earlier chunks the same bits, the rest in tolerance */
  FKDA_CLAIM_PREFIX = 16,  /* a checkpoint = the final state of the prefix, bits */
  FKDA_CLAIM_THREADS = 32, /* several host threads at once: the same bits */
  FKDA_CLAIM_FORK = 64,    /* in a forked child: the same bits */
  FKDA_CLAIM_AFFINE = 128, /* summary: S_in M + b = the prefill's final state */
  FKDA_CLAIM_STEPS = 256,  /* decode: T calls of one token, the pool in fp32: the same bits */
  /* Decode, a state stored after every token: without write_state the same outputs and no state; and
   * storing only the state after the tokens that were accepted, in a slot of its own or where the
   * sequence started from, leaves the same state there. */
  FKDA_CLAIM_VERIFY = 512,
};

#define FKDA_CASE_NUMBERS 3
#define FKDA_CASE_NAME 64

typedef struct fkda_case {
  char name[FKDA_CASE_NAME]; /* "gate/raw-8_bias+4_f32" */
  fkda_case_group group;
  int numbers[FKDA_CASE_NUMBERS]; /* of the list of cases that must be tested; 0 = none */
  const char *range; /* label by which errors are summed up ("bounded raw N(0,8)"), or NULL */
  uint64_t seed;

  fkda_op op;
  int64_t B, T;        /* decode: N and T */
  const int64_t *lens; /* cu_seqlens: lengths of `lens_count` sequences; NULL: none. B is then 1 */
  int64_t lens_count;
  int64_t tail; /* rows after the last sequence, to stay untouched */
  int64_t H, HV, K, V;

  /* FKDA_NONE: absent. decode: with final_dtype the states that are read are tensors of their own */
  int32_t io, g_dtype, beta_dtype, A_log_dtype, dt_bias_dtype;
  int32_t initial_dtype, final_dtype, checkpoint_dtype, index_dtype;

  fkda_gate gate;
  bool l2norm, beta_is_logit, allow_neg_eigval, batch_invariant;
  double lower_bound, scale;
  fkda_state_layout layout;

  fkda_dist q, k, v, g, beta, A_log, dt_bias, initial;
  bool q_is_k; /* q = k, element for element */
  fkda_strides strides;
  fkda_slots slots;
  int skip_every; /* 0, or every n-th sequence has slot -1; -n: all but every n-th have */
  bool
      has_initial; /* has_initial_state given: false for every second sequence, whose slot is NaN */
  bool in_place;   /* final_state is initial_state */
  fkda_marks marks;
  int64_t every;         /* checkpoints: the interval, or the spacing of offsets */
  bool checkpoint_slots; /* checkpoint_state_indices, some -1 */
  int64_t M;             /* decode: columns of two-dimensional indices */
  bool write_state;

  /* backward: initial_dtype and final_dtype are those of initial_state and d_final_state. */
  int32_t gradient_dtype; /* of d_q .. d_beta; FKDA_NONE: that of what each belongs to */
  fkda_field only;        /* the one gradient asked for; FKDA_FIELDS: all */

  fkda_field nan_field; /* FKDA_FIELDS: none. One NaN at sequence, token and head below */
  int64_t nan_sequence, nan_token, nan_head;

  int claims;
  /* The state's tolerance is at least twice the error of (4)-(6) token by token in fp32 on the same data:
   * for data on which no fp32 state can do better. Bounded gate, one head, no parameters. */
  bool same_precision;
} fkda_case;

int fkda_case_count(void);
/** NULL past the end. Static storage. */
const fkda_case *fkda_case_at(int index);
/** The case of that name, or NULL. */
const fkda_case *fkda_case_find(const char *name);
/** Number of sequences. */
int64_t fkda_case_sequences(const fkda_case *c);
/** Are the indices [N,M]? */
bool fkda_slots_2d(fkda_slots slots);
/** Do they name what is no slot, or no column? The CPU backends refuse that and write nothing; CUDA skips
 *  the sequence, or does not store the state. */
bool fkda_slots_bad(fkda_slots slots);
/** "f32", "bf16", "f16", ... */
const char *fkda_dtype_short(int32_t dtype);

/* ---- memory ----------------------------------------------------------------------------------- */

enum { FKDA_MEMORY_GUARD = 512 };

/* Where tensors live. */
typedef struct fkda_memory {
  int32_t device_type, device_id;
  void *context;
  bool null_workspace; /* do the device's backends take workspace = NULL? */
  /* Bytes of guard zone on either side of every buffer: FKDA_MEMORY_GUARD; 0 leaves it to a memory checker
   * to notice what is past the end of an allocation. */
  size_t guard;
  void *(*alloc)(const struct fkda_memory *memory,
                 size_t size); /* 256-byte aligned; NULL on failure */
  bool (*upload)(const struct fkda_memory *memory, void *device, const void *host, size_t size);
  bool (*download)(const struct fkda_memory *memory, void *host, const void *device, size_t size);
  void (*free)(const struct fkda_memory *memory, void *device);
  /* Makes the guard zones trap (address sanitizer) or be plain memory again. May be NULL. */
  void (*protect)(const struct fkda_memory *memory, void *device, size_t size, bool on);
  /* A stream for the calls of one fixture, NULL for some. May be NULL: there are no streams. */
  void *(*stream)(const struct fkda_memory *memory, uint64_t seed);
  /* Waits for all work; false with what went wrong in it. May be NULL: nothing is asynchronous. */
  bool (*finish)(const struct fkda_memory *memory, char *error, size_t capacity);
} fkda_memory;

const fkda_memory *fkda_memory_host(void);
/** The first CUDA device's; NULL with the reason where there is none. */
const fkda_memory *fkda_memory_cuda(char *error, size_t capacity);
/** Its name, once there is that memory. */
const char *fkda_memory_cuda_device(void);

/* ---- running ---------------------------------------------------------------------------------- */

typedef enum fkda_verdict { FKDA_PASS, FKDA_FAIL, FKDA_SKIP } fkda_verdict;

/* Errors are RMS(x - gold) / RMS(gold); negative: there is no such output. Of a backward "out" stands for the
 * worst of d_q .. d_beta, "state" for the worst of d_initial_state, d_A_log and d_dt_bias. */
typedef struct fkda_result {
  fkda_verdict verdict;
  double error_out, error_state, error_checkpoint;
  double tolerance_out, tolerance_state, tolerance_checkpoint;
  double seconds;    /* the call itself */
  int32_t chunk;     /* of the plan */
  char message[512]; /* why it failed or was skipped */
} fkda_result;

typedef struct fkda_fixture fkda_fixture;

/** Makes the data of a case. NULL with a message on failure. */
fkda_fixture *fkda_fixture_new(const fkda_case *c, const fkda_memory *memory, char *error,
                               size_t capacity);
void fkda_fixture_free(fkda_fixture *fixture);
/** Runs it on a backend and judges. Gold (the backend "reference" with outputs in double) is made by the
 *  first call and kept. Returns result->verdict == FKDA_PASS. A case that the backend need not be
 *  able to run, and refuses, is skipped. */
bool fkda_fixture_run(fkda_fixture *fixture, const char *backend, fkda_result *result);
/** All of the above at once, in host memory. */
bool fkda_case_run(const fkda_case *c, const char *backend, fkda_result *result);

/** The call of the fixture on host memory: inputs and the outputs' contents before the call. */
const fkda_call *fkda_fixture_call(const fkda_fixture *fixture);
/** An output's gold values, contiguous doubles in the shape of the call's tensor; what the call leaves
 *  untouched holds its contents before the call. NULL without such an output or with a message. */
const double *fkda_fixture_gold(fkda_fixture *fixture, fkda_field field, char *error,
                                size_t capacity);
/** What a state's error may be, where a case allows more than its dtypes' tolerance; else 0. */
double fkda_fixture_state_limit(fkda_fixture *fixture);

/** Tolerance of a result of dtype `dtype` computed on the CPU from inputs of dtype `io`. */
double fkda_tolerance(int32_t io, int32_t dtype);

/* ---- random numbers ----------------------------------------------------------------------------- */

typedef struct fkda_random {
  uint64_t state;
  double spare;
  bool has_spare;
} fkda_random;

void fkda_random_seed(fkda_random *random, uint64_t seed);
uint64_t fkda_random_bits(fkda_random *random);
double fkda_random_uniform(fkda_random *random); /* [0, 1) */
double fkda_random_normal(fkda_random *random);
/** Fills any tensor [.., T, heads, dim] or vector. `token` and `head` are the dimensions' numbers, -1
 *  where the tensor has none (then the special kinds act like NORMAL). */
void fkda_random_fill(fkda_random *random, const fkda_tensor *tensor, fkda_dist dist, int32_t token,
                      int32_t head);

#endif
