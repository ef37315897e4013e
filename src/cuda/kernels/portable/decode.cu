/* Decode on any GPU since Ampere: one to eight tokens of every sequence through the token recurrence
 * (4)-(7), in one launch, states in a pool that is worked on in place.
 *
 * The work is the state's traffic. A block of 128 threads takes one sequence n, one value head and one
 * part (32 or 64) of its value columns, and reads and writes that part of the state once whatever the
 * number of tokens. It runs
 *
 *   1. loads of the sequence's slot number and of all that does not depend on it; with the slot, the
 *      asynchronous copy of the whole state part to shared memory;
 *   2. meanwhile activation (1)-(3), one warp a token;
 *   3. the state to registers in fp32, and the recurrence, token by token. S q of (7) is taken together
 *      with S k of (5) from the decayed state, so that a token costs one reduction:
 *      S_new q = S q + u (k . q);
 *   4. stores, after the last token, or after each that has a slot of its own.
 *
 * Every sum has the same tree whatever value_split is: a sequence's bits depend on nothing but itself.
 * docs/kernels/decode.md has the budget.
 */
#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>

#include "cuda/kernels/portable/params.h"

namespace {

constexpr int THREADS = FKDA_PORTABLE_DECODE_THREADS;
constexpr int WARPS = THREADS / 32;
constexpr int TOKENS = FKDA_DECODE_MAX_TOKENS;
constexpr int MAX_PART = 64;
constexpr int BLOCKS_PER_SM = 4; /* 128 registers a thread; 4 x 32 KB of state in flight */
constexpr unsigned WARP = 0xffffffffu;

static_assert(WARPS == 4, "the KV sums add four warps");
static_assert(TOKENS <= THREADS, "a thread fetches a token's slot");

#define INLINE __device__ __forceinline__

/* What the tokens bring to one head and part, activated. */
template <int K>
struct tokens {
  alignas(16) float decay[TOKENS][K]; /* exp g of (2) */
  alignas(16) float k[TOKENS][K];     /* (1) */
  alignas(16) float q[TOKENS][K];     /* (1), times scale */
  alignas(16) float v[TOKENS][MAX_PART];
  float beta[TOKENS]; /* (3) */
  float kq[TOKENS];   /* k . q */
  int64_t to[TOKENS]; /* where the head's state goes after the token (element); -1: nowhere */
};

/* KV only: each warp's share of S k and S q, alternating between tokens so that one barrier is enough. */
struct partial_sums {
  alignas(16) float sk[2][WARPS][MAX_PART];
  alignas(16) float sq[2][WARPS][MAX_PART];
};

template <int K>
struct shared_memory {
  tokens<K> x;
  uint32_t unused; /* of start() */
  union { /* a barrier lies between the last look at what has landed and the first sum */
    alignas(16) float4 landing[K * MAX_PART / 4]; /* where the state arrives */
    partial_sums sums;
  };
};

static_assert(sizeof(shared_memory<128>) <= 48 * 1024, "static shared memory");

/* ---- where a block works ---------------------------------------------------------------------- */

struct place {
  int64_t n;
  uint32_t head, qk_head; /* value head j reads q/k head j*H/HV */
  int column;             /* first value column of the part */
};

INLINE place find_place(const fkda_portable_params &x, int part_columns) {
  const uint32_t HV = (uint32_t)x.problem.HV, H = (uint32_t)x.problem.H;
  const uint32_t split = (uint32_t)x.value_split; /* 1, 2 or 4: its logarithm is split / 2 */
  const uint32_t pair = blockIdx.x >> split / 2;
  place at;
  at.column = (int)(blockIdx.x & (split - 1)) * part_columns;
  at.n = pair / HV;
  at.head = pair - (uint32_t)at.n * HV;
  at.qk_head = HV == H ? at.head : at.head / (HV / H);
  return at;
}

/* What memory holds is fetched as it is, without a use that would wait for it, so that the loads of all
 * that follows are on their way together; it is understood afterwards. */
struct raw_slots {
  uint2 initial; /* slot number that the sequence starts from; x alone if 32 bits wide */
  uint2 final;   /* lane t: slot number of token t. One-dimensional indices: of the last token */
  uint32_t has_initial;
  bool valid; /* num_accepted_tokens lies in 1..M */
};

INLINE uint2 fetch_index(const fkda_indices &x, int64_t n, int64_t column) {
  if (!x.data) return make_uint2((uint32_t)n, (uint32_t)(n >> 32));
  const int64_t i = n * x.stride_n + (x.columns ? column * x.stride_column : 0);
  if (x.dtype == FKDA_I64) return ((const uint2 *)x.data)[i];
  return make_uint2(((const uint32_t *)x.data)[i], 0);
}

/* -1 for what is not a slot of the pool. */
INLINE int64_t slot_of(const fkda_states &pool, const fkda_indices &x, uint2 raw) {
  int64_t slot = (int64_t)((uint64_t)raw.y << 32 | raw.x);
  if (x.data && x.dtype != FKDA_I64) slot = (int32_t)raw.x;
  return slot >= 0 && slot < pool.slots ? slot : -1;
}

INLINE raw_slots fetch_slots(const fkda_problem &p, int64_t n) {
  raw_slots raw;
  int64_t column = 0;
  raw.valid = true;
  if (p.initial_indices.columns > 0 && p.num_accepted_tokens.data) {
    column = fkda_int_at(p.num_accepted_tokens.data, p.num_accepted_tokens.dtype,
                         n * p.num_accepted_tokens.stride) -
             1;
    raw.valid = column >= 0 && column < p.initial_indices.columns;
    if (!raw.valid) column = 0;
  }
  const int lane = threadIdx.x % 32;
  raw.initial = fetch_index(p.initial_indices, n, column);
  raw.final = fetch_index(p.final_indices, n, lane < p.T ? lane : 0);
  raw.has_initial = 1;
  if (p.has_initial.data)
    raw.has_initial = ((const uint8_t *)p.has_initial.data)[n * p.has_initial.stride];
  return raw;
}

/* ---- activation (1)-(3) ----------------------------------------------------------------------- */

INLINE uint32_t fetch_element(const void *data, int32_t dtype, int64_t i) {
  if (dtype == FKDA_F32) return ((const uint32_t *)data)[i];
  return ((const uint16_t *)data)[i];
}

INLINE float widen_element(uint32_t raw, int32_t dtype) {
  return __uint_as_float(dtype == FKDA_F32 ? raw : raw << 16);
}

/* Lane l of a warp has elements l, l + 32, ... of a row: any alignment is as good as any other. `first` is
 * the lane's first element. */
template <int N>
INLINE void fetch_row(uint32_t (&to)[N], const void *data, int32_t dtype, int64_t first) {
  if (dtype == FKDA_F32) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = ((const uint32_t *)data)[first + 32 * i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = ((const uint16_t *)data)[first + 32 * i];
  }
}

INLINE int64_t row_offset(const fkda_rows &x, int64_t n, int t, uint32_t head) {
  return n * x.stride_b + t * x.stride_t + head * x.stride_h;
}

/* Where a token of one head lies: the lane's first elements. */
struct token_place {
  int64_t q, k, v, g, beta;
};

INLINE token_place find_token(const fkda_problem &p, const place &at, int t) {
  const int lane = threadIdx.x % 32;
  return {row_offset(p.q, at.n, t, at.qk_head) + lane, row_offset(p.k, at.n, t, at.qk_head) + lane,
          row_offset(p.v, at.n, t, at.head) + at.column + lane,
          row_offset(p.g, at.n, t, at.head) + lane, row_offset(p.beta, at.n, t, at.head)};
}

/* One token of one head, and the head's gate (absent is zero), as memory holds them. */
template <int K, int PART>
struct raw_token {
  uint32_t q[K / 32], k[K / 32], g[K / 32], v[PART / 32], beta;
};

template <int K>
struct raw_gate {
  uint32_t bias[K / 32], A_log;
};

template <int K, int PART>
INLINE void fetch_token(raw_token<K, PART> &x, const fkda_problem &p, const token_place &at) {
  fetch_row(x.q, p.q.data, FKDA_BF16, at.q);
  fetch_row(x.k, p.k.data, FKDA_BF16, at.k);
  fetch_row(x.v, p.v.data, FKDA_BF16, at.v);
  fetch_row(x.g, p.g.data, p.g.dtype, at.g);
  x.beta = fetch_element(p.beta.data, p.beta.dtype, at.beta);
}

template <int K>
INLINE void fetch_gate(raw_gate<K> &x, const fkda_problem &p, const place &at) {
#pragma unroll
  for (int i = 0; i < K / 32; ++i) x.bias[i] = 0;
  x.A_log = 0;
  if (p.dt_bias.data)
    fetch_row(x.bias, p.dt_bias.data, p.dt_bias.dtype, (int64_t)at.head * K + threadIdx.x % 32);
  if (p.A_log.data) x.A_log = fetch_element(p.A_log.data, p.A_log.dtype, at.head);
}

template <int N>
INLINE void widen_row(float (&to)[N], const uint32_t (&raw)[N], int32_t dtype) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen_element(raw[i], dtype);
}

INLINE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

/* log(1 + e^x) = max(x, 0) + log1p(e^-|x|); log1p(y) = 2 atanh(s), s = y / (2 + y) in [0, 1/3],
 * 2 atanh(s) = s c(s^2), c minimax of degree 4 (error 8e-9). A weak gate is a small y, which a logarithm
 * of 1 + y would lose. */
INLINE float softplus(float x) {
  const float y = expf(-fabsf(x));
  const float s = __fdividef(y, 2.0f + y), z = s * s;
  float c = 0.2819154961037639f;
  c = fmaf(c, z, 0.2795766525963916f);
  c = fmaf(c, z, 0.40025114361268205f);
  c = fmaf(c, z, 0.6666631014408443f);
  c = fmaf(c, z, 2.0000000080787173f);
  return fmaf(s, c, fmaxf(x, 0.0f));
}

/* exp of the log-decay (2), which is clamped such that NaN stays NaN. */
template <int K>
INLINE void decay_of(float (&decay)[K / 32], const uint32_t (&raw)[K / 32], const raw_gate<K> &gate,
                     const fkda_problem &p) {
  constexpr int N = K / 32;
  float bias[N];
  widen_row(decay, raw, p.g.dtype);
  widen_row(bias, gate.bias, p.dt_bias.dtype);
  const float exp_A = expf(widen_element(gate.A_log, p.A_log.dtype));
  if (p.gate == FKDA_GATE_BOUNDED) {
    const float lower_bound = (float)p.lower_bound;
#pragma unroll
    for (int i = 0; i < N; ++i) decay[i] = lower_bound * sigmoid(exp_A * (decay[i] + bias[i]));
  } else if (p.gate == FKDA_GATE_SOFTPLUS) {
#pragma unroll
    for (int i = 0; i < N; ++i) decay[i] = -exp_A * softplus(decay[i] + bias[i]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float clamp = (float)FKDA_GATE_CLAMP, g = decay[i];
    decay[i] = expf(g < clamp ? clamp : g > 0.0f ? 0.0f : g);
  }
}

/* A warp activates one token. */
template <int K, int PART>
INLINE void activate(tokens<K> &to, const raw_token<K, PART> &x, const raw_gate<K> &gate,
                     const fkda_problem &p, int t) {
  constexpr int N = K / 32;
  const int lane = threadIdx.x % 32;
  float q[N], k[N], v[PART / 32], decay[N], qq = 0, kk = 0, kq = 0;
  widen_row(q, x.q, FKDA_BF16);
  widen_row(k, x.k, FKDA_BF16);
  widen_row(v, x.v, FKDA_BF16);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    qq = fmaf(q[i], q[i], qq);
    kk = fmaf(k[i], k[i], kk);
    kq = fmaf(k[i], q[i], kq);
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    qq += __shfl_xor_sync(WARP, qq, mask);
    kk += __shfl_xor_sync(WARP, kk, mask);
    kq += __shfl_xor_sync(WARP, kq, mask);
  }
  float q_factor = (float)p.scale, k_factor = 1;
  if (p.l2norm) { /* (1) */
    q_factor *= rsqrtf(qq + (float)FKDA_L2NORM_EPS);
    k_factor = rsqrtf(kk + (float)FKDA_L2NORM_EPS);
  }
  decay_of(decay, x.g, gate, p);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to.q[t][lane + 32 * i] = q[i] * q_factor;
    to.k[t][lane + 32 * i] = k[i] * k_factor;
    to.decay[t][lane + 32 * i] = decay[i];
  }
#pragma unroll
  for (int i = 0; i < PART / 32; ++i) to.v[t][lane + 32 * i] = v[i];
  float beta = widen_element(x.beta, p.beta.dtype);
  if (p.beta_is_logit) beta = (p.allow_neg_eigval ? 2.0f : 1.0f) * sigmoid(beta); /* (3) */
  if (lane == 0) {
    to.beta[t] = beta;
    to.kq[t] = kq * k_factor * q_factor;
  }
}

/* ---- the state between memory and registers --------------------------------------------------- */

/* A thread holds LINES x QUADS groups of four elements that are consecutive in memory: group (i, j) is
 * at `first` + i * `step` + j * 64 elements of the head's state. */
template <int LINES, int QUADS>
struct held {
  float x[LINES][QUADS][4];
};

struct lines {
  int64_t first, step;
};

/* Element e of group (i, j) if groups cannot be moved as a whole. */
template <int LINES, int QUADS>
INLINE void load_state(held<LINES, QUADS> &S, const fkda_states &from, int64_t head,
                       const lines &at) {
#pragma unroll
  for (int i = 0; i < LINES; ++i)
#pragma unroll
    for (int j = 0; j < QUADS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t place = head + at.first + i * at.step + 64 * j + e;
        S.x[i][j][e] = widen_element(fetch_element(from.data, from.dtype, place), from.dtype);
      }
}

template <int LINES, int QUADS>
INLINE void clear_state(held<LINES, QUADS> &S) {
#pragma unroll
  for (int i = 0; i < LINES; ++i)
#pragma unroll
    for (int j = 0; j < QUADS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) S.x[i][j][e] = 0;
}

/* Groups of 16 bytes (f32) or 8 (bf16) on their way to shared memory, where group g of a thread lies
 * beside group g of the next thread. */
template <int LINES, int QUADS>
INLINE void send_state(float4 *landing, const fkda_states &from, int64_t head, const lines &at) {
  if (from.dtype == FKDA_F32) {
    const float *p = (const float *)from.data + head + at.first;
    float4 *to = landing + threadIdx.x;
#pragma unroll
    for (int i = 0; i < LINES; ++i)
#pragma unroll
      for (int j = 0; j < QUADS; ++j)
        __pipeline_memcpy_async(to + (i * QUADS + j) * THREADS, p + i * at.step + 64 * j, 16);
  } else {
    const uint16_t *p = (const uint16_t *)from.data + head + at.first;
    uint2 *to = (uint2 *)landing + threadIdx.x;
#pragma unroll
    for (int i = 0; i < LINES; ++i)
#pragma unroll
      for (int j = 0; j < QUADS; ++j)
        __pipeline_memcpy_async(to + (i * QUADS + j) * THREADS, p + i * at.step + 64 * j, 8);
  }
  __pipeline_commit();
}

/* What send_state() sent. A thread reads what it sent itself, so no barrier is needed. */
template <int LINES, int QUADS>
INLINE void receive_state(held<LINES, QUADS> &S, const float4 *landing, int32_t dtype) {
  __pipeline_wait_prior(0);
  if (dtype == FKDA_F32) {
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
#pragma unroll
      for (int j = 0; j < QUADS; ++j) {
        const float4 four = landing[(i * QUADS + j) * THREADS + threadIdx.x];
        S.x[i][j][0] = four.x, S.x[i][j][1] = four.y;
        S.x[i][j][2] = four.z, S.x[i][j][3] = four.w;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
#pragma unroll
      for (int j = 0; j < QUADS; ++j) {
        const uint2 four = ((const uint2 *)landing)[(i * QUADS + j) * THREADS + threadIdx.x];
        S.x[i][j][0] = __uint_as_float(four.x << 16);
        S.x[i][j][1] = __uint_as_float(four.x & 0xffff0000u);
        S.x[i][j][2] = __uint_as_float(four.y << 16);
        S.x[i][j][3] = __uint_as_float(four.y & 0xffff0000u);
      }
    }
  }
}

INLINE uint32_t bf16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

INLINE uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return (uint32_t)__bfloat16_as_ushort(pair.y) << 16 | __bfloat16_as_ushort(pair.x);
}

/* A state is not read again before the whole model has passed by: streaming stores let its lines leave
 * the caches first. */
template <int LINES, int QUADS>
INLINE void store_state(const held<LINES, QUADS> &S, const fkda_states &to, bool aligned,
                        int64_t head, const lines &at) {
  if (to.dtype == FKDA_F32) {
    float *p = (float *)to.data + head + at.first;
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
#pragma unroll
      for (int j = 0; j < QUADS; ++j) {
        const float *s = S.x[i][j];
        float *quad = p + i * at.step + 64 * j;
        if (aligned) {
          __stcs((float4 *)quad, make_float4(s[0], s[1], s[2], s[3]));
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) __stcs(quad + e, s[e]);
        }
      }
    }
  } else {
    uint16_t *p = (uint16_t *)to.data + head + at.first;
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
#pragma unroll
      for (int j = 0; j < QUADS; ++j) {
        const float *s = S.x[i][j];
        uint16_t *quad = p + i * at.step + 64 * j;
        if (aligned) {
          __stcs((uint2 *)quad, make_uint2(bf16_pair(s[0], s[1]), bf16_pair(s[2], s[3])));
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) __stcs(quad + e, (uint16_t)bf16_bits(s[e]));
        }
      }
    }
  }
}

INLINE float4 quad_at(const float *x) { return *(const float4 *)x; }

INLINE void store_out(const fkda_problem &p, const place &at, int t, int column, float o) {
  ((uint16_t *)p.out.data)[row_offset(p.out, at.n, t, at.head) + at.column + column] =
      (uint16_t)bf16_bits(o);
}

/* The kernel may be started while what is before it in the stream is still running
 * (fkda_cuda_launch.waits): addresses are computed before the wait for that. What comes after it may be
 * started as soon as all blocks have got here.
 *
 * A launch's parameters are in no cache at first, and a miss holds up its warp. Looked at before the wait,
 * every 64 bytes of what decode uses once, they cost nothing after it. */
INLINE void start(uint32_t *unused, const fkda_portable_params &params, const token_place &token) {
#if __CUDA_ARCH__ >= 900
  const uint32_t *words = (const uint32_t *)&params;
  uint32_t all = (uint32_t)(params.value_split | params.aligned_state);
#pragma unroll
  for (size_t i = 0; i < offsetof(fkda_problem, checkpoints) / 4; i += 16) all |= words[i];
  if (threadIdx.x == 0) *unused = all; /* else the compiler would leave the loads out */
  asm volatile("" ::"l"(token.q), "l"(token.k), "l"(token.v), "l"(token.g), "l"(token.beta));
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* A block up to the recurrence, common to both layouts. False: the sequence is skipped. All that does not
 * depend on the slot is asked for before the slot is waited for: a small batch takes as long as the
 * longest chain of loads, which is the slot and then the state. */
template <int K, int PART, int LINES, int QUADS>
INLINE bool begin(held<LINES, QUADS> &S, shared_memory<K> &shared,
                  const fkda_portable_params &params, const place &at, const lines &mine) {
  const fkda_problem &p = params.problem;
  const int warp = threadIdx.x / 32, T = (int)p.T;
  const token_place first = find_token(p, at, warp);
  start(&shared.unused, params, first);
  const raw_slots raw = fetch_slots(p, at.n);
  raw_gate<K> gate;
  raw_token<K, PART> token;
  if (__any_sync(WARP, warp < T)) { /* votes tell the compiler that a warp's threads agree */
    fetch_gate(gate, p, at);
    fetch_token(token, p, first);
  }

  const bool one_dimensional = p.final_indices.columns == 0;
  const int64_t initial = slot_of(p.initial, p.initial_indices, raw.initial);
  const int64_t final = slot_of(p.final.data ? p.final : p.initial, p.final_indices, raw.final);
  const bool skip = !raw.valid || initial < 0 || (one_dimensional && final < 0);
  if (__any_sync(WARP, skip)) return false;

  const bool load = __any_sync(WARP, raw.has_initial != 0), aligned = params.aligned_state != 0;
  const int64_t from = initial * p.initial.stride_slot + at.head * p.initial.stride_head;
  if (load && aligned) send_state<LINES, QUADS>(shared.landing, p.initial, from, mine);

  if (threadIdx.x < TOKENS) {
    const bool stored =
        p.final.data && final >= 0 && (!one_dimensional || (int)threadIdx.x == T - 1);
    shared.x.to[threadIdx.x] =
        stored ? final * p.final.stride_slot + at.head * p.final.stride_head : -1;
  }
#pragma unroll 1
  for (int t = warp; __any_sync(WARP, t < T); t += WARPS) {
    raw_token<K, PART> next = token;
    if (__any_sync(WARP, t + WARPS < T)) fetch_token(next, p, find_token(p, at, t + WARPS));
    activate(shared.x, token, gate, p, t);
    token = next;
  }

  if (!load)
    clear_state(S);
  else if (aligned)
    receive_state(S, shared.landing, p.initial.dtype);
  else
    load_state(S, p.initial, from, mine);
  __syncthreads();
  return true;
}

template <int LINES, int QUADS>
INLINE void end_token(const held<LINES, QUADS> &S, const fkda_portable_params &params, int64_t head,
                      const lines &mine) {
  if (head < 0) return;
  if (params.aligned_state)
    store_state(S, params.problem.final, true, head, mine);
  else
    store_state(S, params.problem.final, false, head, mine);
}

/* ---- [V,K] states ----------------------------------------------------------------------------- */

/* Sums each of x[0..ROWS) over the 16 lanes of a half-warp, halving the rows with the lanes: 8 shuffles
 * for 8 rows instead of 32. Lane l has the sum of row (l % 16) / (16 / ROWS). */
template <int ROWS>
INLINE float sum_rows(float (&x)[ROWS]) {
  int mask = 8;
#pragma unroll
  for (int half = ROWS / 2; half; half /= 2) {
    const bool upper = threadIdx.x & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? x[i + half] : x[i], send = upper ? x[i] : x[i + half];
      x[i] = keep + __shfl_xor_sync(WARP, send, mask);
    }
    mask /= 2;
  }
#pragma unroll
  for (; mask; mask /= 2) x[0] += __shfl_xor_sync(WARP, x[0], mask);
  return x[0];
}

/* A half-warp owns a row: its 16 lanes hold four channels each of every 64. */
template <int K, int PART>
INLINE void decode_vk(const fkda_portable_params &params, shared_memory<K> &shared) {
  constexpr int WARP_ROWS = PART / WARPS, ROWS = WARP_ROWS / 2, QUADS = K / 64;
  constexpr int LANES_A_ROW = 16 / ROWS; /* lanes that sum_rows() gives the same row */
  const fkda_problem &p = params.problem;
  const place at = find_place(params, PART);
  const int lane = threadIdx.x % 32, channel = threadIdx.x % 16 * 4;
  const int first_row = threadIdx.x / 32 * WARP_ROWS + lane / 16; /* the thread's i-th: + 2 i */
  const lines mine = {(at.column + first_row) * p.initial.stride_row + channel,
                      2 * p.initial.stride_row};
  held<ROWS, QUADS> S; /* S.x[i][j][e] = S[first_row + 2i, channel + 64j + e] */
  if (!begin<K, PART>(S, shared, params, at, mine)) return;

  const tokens<K> &x = shared.x;
  const int T = (int)p.T;
  const int row = first_row + lane % 16 / LANES_A_ROW * 2; /* whose sums this lane will have */
#pragma unroll 1
  for (int t = 0; t < T; ++t) {
    float sk[ROWS], sq[ROWS], key[QUADS][4];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) sk[i] = sq[i] = 0;
#pragma unroll
    for (int j = 0; j < QUADS; ++j) { /* (4); S k of (5) and S q of (7) */
      const float4 d4 = quad_at(&x.decay[t][channel + 64 * j]);
      const float4 k4 = quad_at(&x.k[t][channel + 64 * j]);
      const float4 q4 = quad_at(&x.q[t][channel + 64 * j]);
      const float decay[4] = {d4.x, d4.y, d4.z, d4.w}, query[4] = {q4.x, q4.y, q4.z, q4.w};
      key[j][0] = k4.x, key[j][1] = k4.y, key[j][2] = k4.z, key[j][3] = k4.w;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          S.x[i][j][e] *= decay[e];
          sk[i] = fmaf(S.x[i][j][e], key[j][e], sk[i]);
          sq[i] = fmaf(S.x[i][j][e], query[e], sq[i]);
        }
      }
    }
    const float Sk = sum_rows(sk), Sq = sum_rows(sq);
    const float u = x.beta[t] * (x.v[t][row] - Sk);                              /* (5) */
    if (lane % LANES_A_ROW == 0) store_out(p, at, t, row, fmaf(u, x.kq[t], Sq)); /* (7) */

    const int64_t to = x.to[t];
    if (t + 1 == T && to < 0) break;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) { /* (6) */
      const float u_i = __shfl_sync(WARP, u, i * LANES_A_ROW, 16);
#pragma unroll
      for (int j = 0; j < QUADS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) S.x[i][j][e] = fmaf(u_i, key[j][e], S.x[i][j][e]);
    }
    end_token(S, params, to, mine);
  }
}

/* ---- [K,V] states ----------------------------------------------------------------------------- */

/* A thread owns four value columns of some consecutive channels: PART / 4 threads side by side are a
 * group, and the groups share K. Sums over K stay in the thread, then cross the groups of a warp by
 * shuffles and the warps through shared memory. */
template <int K, int PART>
INLINE void decode_kv(const fkda_portable_params &params, shared_memory<K> &shared) {
  constexpr int GROUP = PART / 4, CHANNELS = K * GROUP / THREADS;
  constexpr int SLICE = K / 16; /* channels of a thread when PART is 32: the unit of every sum */
  static_assert(CHANNELS % SLICE == 0 && SLICE % 4 == 0, "sums do not depend on PART");
  const fkda_problem &p = params.problem;
  const place at = find_place(params, PART);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = threadIdx.x % GROUP * 4, channel = threadIdx.x / GROUP * CHANNELS;
  const lines mine = {channel * p.initial.stride_row + at.column + column, p.initial.stride_row};
  held<CHANNELS, 1> S; /* S.x[c][0][e] = S[channel + c, column + e] */
  if (!begin<K, PART>(S, shared, params, at, mine)) return;

  const tokens<K> &x = shared.x;
  partial_sums &sums = shared.sums;
  const int T = (int)p.T;
#pragma unroll 1
  for (int t = 0; t < T; ++t) {
    float sk[4] = {0, 0, 0, 0}, sq[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < CHANNELS; s += SLICE) { /* (4); S k of (5) and S q of (7) */
      float slice_k[4] = {0, 0, 0, 0}, slice_q[4] = {0, 0, 0, 0};
#pragma unroll
      for (int c = s; c < s + SLICE; c += 4) {
        const float4 d4 = quad_at(&x.decay[t][channel + c]);
        const float4 k4 = quad_at(&x.k[t][channel + c]);
        const float4 q4 = quad_at(&x.q[t][channel + c]);
        const float decay[4] = {d4.x, d4.y, d4.z, d4.w}, key[4] = {k4.x, k4.y, k4.z, k4.w};
        const float query[4] = {q4.x, q4.y, q4.z, q4.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float &element = S.x[c + i][0][e];
            element *= decay[i];
            slice_k[e] = fmaf(element, key[i], slice_k[e]);
            slice_q[e] = fmaf(element, query[i], slice_q[e]);
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sk[e] = s ? sk[e] + slice_k[e] : slice_k[e];
        sq[e] = s ? sq[e] + slice_q[e] : slice_q[e];
      }
    }
#pragma unroll
    for (int mask = GROUP; mask < 32; mask *= 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sk[e] += __shfl_xor_sync(WARP, sk[e], mask);
        sq[e] += __shfl_xor_sync(WARP, sq[e], mask);
      }
    }
    if (lane < GROUP) {
      *(float4 *)&sums.sk[t % 2][warp][column] = make_float4(sk[0], sk[1], sk[2], sk[3]);
      *(float4 *)&sums.sq[t % 2][warp][column] = make_float4(sq[0], sq[1], sq[2], sq[3]);
    }
    __syncthreads();

    const float4 v4 = quad_at(&x.v[t][column]);
    const float v[4] = {v4.x, v4.y, v4.z, v4.w};
    float Sk[4] = {0, 0, 0, 0}, Sq[4] = {0, 0, 0, 0}, u[4];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float4 k4 = quad_at(&sums.sk[t % 2][w][column]);
      const float4 q4 = quad_at(&sums.sq[t % 2][w][column]);
      Sk[0] += k4.x, Sk[1] += k4.y, Sk[2] += k4.z, Sk[3] += k4.w;
      Sq[0] += q4.x, Sq[1] += q4.y, Sq[2] += q4.z, Sq[3] += q4.w;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) u[e] = x.beta[t] * (v[e] - Sk[e]); /* (5) */
    if (threadIdx.x < GROUP) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store_out(p, at, t, column + e, fmaf(u[e], x.kq[t], Sq[e])); /* (7) */
    }

    const int64_t to = x.to[t];
    if (t + 1 == T && to < 0) break;
#pragma unroll
    for (int c = 0; c < CHANNELS; c += 4) { /* (6) */
      const float4 k4 = quad_at(&x.k[t][channel + c]);
      const float key[4] = {k4.x, k4.y, k4.z, k4.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) S.x[c + i][0][e] = fmaf(u[e], key[i], S.x[c + i][0][e]);
    }
    end_token(S, params, to, mine);
  }
}

}  // namespace

/* ---- entry points ----------------------------------------------------------------------------- */

/* One for each row of FKDA_PORTABLE_DECODE_LIST. The part, 32 or 64 columns, is a branch and not an entry
 * of its own: parts of 32 are for batches too small to fill the processors' registers. */
#define ENTRY(layout, K)                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)                             \
      fkda_portable_decode_##layout##_k##K(const __grid_constant__ fkda_portable_params params) {  \
    __shared__ shared_memory<K> shared;                                                            \
    if (params.problem.V == 32 * params.value_split)                                               \
      decode_##layout<K, 32>(params, shared);                                                      \
    else                                                                                           \
      decode_##layout<K, 64>(params, shared);                                                      \
  }

FKDA_PORTABLE_DECODE_LIST(ENTRY)
