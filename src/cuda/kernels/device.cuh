/* What the CUDA kernels share: small arithmetic, the gates (2), a block's task, states and checkpoints in memory. */
#ifndef FKDA_CUDA_DEVICE_CUH
#define FKDA_CUDA_DEVICE_CUH

#include <cuda_bf16.h>

#include "check/problem.h"

namespace fkda {

using bf16 = __nv_bfloat16;

constexpr float LOG2E = 1.4426950408889634f;
constexpr float CLAMP = (float)FKDA_GATE_CLAMP * LOG2E;

/* ---- arithmetic ------------------------------------------------------------------------------------ */

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.0f + exp2_approx(-LOG2E * x));
}

/* log(1 + e^x): max(x, 0) + 2 atanh(y / (2 + y)), y = e^-|x|; polynomial as in the CPU's vector_math.h. */
__device__ __forceinline__ float softplus(float x) {
  const float y = exp2_approx(-LOG2E * fabsf(x));
  const float s = y * reciprocal(2.0f + y), z = s * s;
  float q = 0.2819154961037639f;
  q = fmaf(q, z, 0.2795766525963916f);
  q = fmaf(q, z, 0.40025114361268205f);
  q = fmaf(q, z, 0.6666631014408443f);
  q = fmaf(q, z, 2.0000000080787173f);
  return fmaf(s, q, x > 0 ? x : 0);
}

/* (2) for one channel, in units of log2; constants prepared once. Where the gate is bounded or softplus, a raw one
 * of -inf is no decay, whatever A is. */
struct Gate {
  float slope, offset; /* bounded: -log2(e) exp(A_log) (raw + bias) as one fma. softplus: 1, bias */
  float factor;        /* bounded: lower_bound log2(e). softplus: -log2(e) exp(A_log) */
  __device__ Gate(const fkda_problem &p, int mode, float exp_A, float bias) {
    exp_A = exp_A < 1e-37f ? 1e-37f : exp_A > 1e37f ? 1e37f : exp_A;
    slope = mode == FKDA_GATE_BOUNDED ? -LOG2E * exp_A : 1.0f;
    offset = slope * bias;
    factor = mode == FKDA_GATE_BOUNDED ? LOG2E * (float)p.lower_bound : -LOG2E * exp_A;
  }
  template <int MODE>
  __device__ __forceinline__ float decay(float raw) const {
    return MODE == FKDA_GATE_BOUNDED ? factor * unit<MODE>(raw) : unit<MODE>(raw);
  }
  /* The same, of a bounded gate without its factor: within [0, 1] as it is. */
  template <int MODE>
  __device__ __forceinline__ float unit(float raw) const {
    if (MODE == FKDA_GATE_BOUNDED) return reciprocal(1.0f + exp2_approx(fmaf(slope, raw, offset)));
    float g = MODE == FKDA_GATE_SOFTPLUS ? factor * softplus(raw + offset) : LOG2E * raw;
    g = g > 0 ? 0 : g; /* comparisons that keep a NaN, unlike fminf */
    return g < CLAMP ? CLAMP : g;
  }
};

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t &>(pair);
}
__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
/* What pack() lost: x = high part + low part to 16 bits. */
__device__ __forceinline__ uint32_t pack_rest(float low, float high, uint32_t packed) {
  return pack(low - low_of(packed), high - high_of(packed));
}

__device__ __forceinline__ float load_float(const void *data, int32_t dtype, int64_t i) {
  return dtype == FKDA_F32 ? static_cast<const float *>(data)[i]
                           : __bfloat162float(static_cast<const bf16 *>(data)[i]);
}

__device__ __forceinline__ int64_t clamp64(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

/* A number, opaque: what is computed from it is made anew where it is needed. The compiler otherwise
 * moves every address out of the chunk loop and spills them. */
__device__ __forceinline__ int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int fresh_warp() { return fresh(threadIdx.x / 32); }
__device__ __forceinline__ int fresh_lane() { return fresh(threadIdx.x & 31); }

/* Lanes that arrive at an mbarrier for a warp which does so together: one, after __syncwarp(). compute-sanitizer's
 * racecheck does not see through that; for it (FLASHKDA_CUDA_RACECHECK) each lane arrives for itself. */
#ifdef FKDA_RACECHECK
constexpr int ARRIVING_LANES = 32;
#else
constexpr int ARRIVING_LANES = 1;
#endif
__device__ __forceinline__ bool lane_arrives() { return (threadIdx.x & 31) < ARRIVING_LANES; }

/* ---- the block's task ----------------------------------------------------------------------------- */

/* A sequence's place. cu_seqlens lies in device memory: clamped, not trusted. */
__device__ inline fkda_span clamped_span(const fkda_problem &p, int64_t n) {
  fkda_span span = fkda_span_of(&p, n);
  if (p.cu_seqlens.data) {
    const int64_t end = clamp64(span.begin + span.length, 0, p.T);
    span.begin = clamp64(span.begin, 0, p.T);
    span.length = end > span.begin ? end - span.begin : 0;
  }
  return span;
}

/* What a block works on. It lies in shared memory: a dozen 64-bit values that are rarely needed. */
struct alignas(16) Task {
  int64_t n, b, begin;
  int64_t initial_slot, final_slot;
  int32_t length, chunks;         /* tokens; chunks of them */
  int32_t head, qk_head, v_begin; /* v_begin: first value column of the block */
  bool skip, load_initial;
  bool backward; /* a walk of the backward: from the last chunk to the first */
  uint8_t cut;   /* Cut: is it all of the sequence? */
};

/* A sequence that two blocks do one after the other: its first part, whose state goes to the other block, or the rest. */
enum Cut : uint8_t { UNCUT, BEFORE_CUT, BEHIND_CUT };

/* First element of a tensor's row for token t of the sequence. */
__device__ __forceinline__ int64_t row_at(const fkda_rows &rows, const Task &task, int head,
                                          int t) {
  return task.b * rows.stride_b + (task.begin + t) * rows.stride_t + head * rows.stride_h;
}
__device__ __forceinline__ int64_t first_row(const fkda_rows &rows, const Task &task, int head) {
  return row_at(rows, task, head, 0);
}

/* Part `part` of head `head` of sequence n, a part being `columns` value columns. */
__device__ inline Task make_task(const fkda_problem &p, int64_t n, int head, int part, int columns,
                                 int chunk) {
  Task task;
  task.n = n;
  task.backward = false;
  task.cut = UNCUT;
  task.head = head;
  task.qk_head = (int64_t)head * p.H / p.HV;
  task.v_begin = part * columns;
  const fkda_span span = clamped_span(p, n);
  task.b = span.b;
  task.begin = span.begin;
  task.length = (int32_t)span.length;
  task.chunks = (task.length + chunk - 1) / chunk;
  task.initial_slot = fkda_index_of(&p.initial_indices, n, 0);
  task.final_slot = fkda_index_of(&p.final_indices, n, 0);
  task.skip = (p.initial.data && (task.initial_slot < 0 || task.initial_slot >= p.initial.slots)) ||
              (p.final.data && (task.final_slot < 0 || task.final_slot >= p.final.slots));
  task.load_initial =
      p.initial.data &&
      (!p.has_initial.data ||
       static_cast<const uint8_t *>(p.has_initial.data)[n * p.has_initial.stride] != 0);
  return task;
}

/* ---- states in memory ------------------------------------------------------------------------------- */

/* Sixteen value rows of S in a warp, K / 8 tiles of 8 channels, in the layout of mma accumulators: element i of
 * tile n is value row lane / 4 + 8 (i / 2), channel 8 n + 2 (lane % 4) + i % 2. */
template <int K>
struct StateRows {
  /* Calls visit(address of the first, bytes from one to the other, first, second) for the pairs of
   * neighbouring channels. `data` is element (0, 0) of this warp's rows, strides in bytes. The empty asm keeps
   * the compiler from holding every address in registers at once. */
  template <class Visit>
  __device__ __forceinline__ static void each_pair(float (&s)[K / 2], char *data, int64_t sv,
                                                   int64_t sk, Visit visit) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      char *at = data + (8 * h + (lane >> 2)) * sv + 2 * (lane & 3) * sk;
#pragma unroll
      for (int n = 0; n < K / 8; ++n, at += 8 * sk) {
        asm volatile("" : "+l"(at));
        visit(at, sk, s[4 * n + 2 * h], s[4 * n + 2 * h + 1]);
      }
    }
  }

  /* Can two neighbouring channels move as one access? Strides in bytes. */
  __device__ __forceinline__ static bool paired(const void *data, int64_t sv, int64_t sk,
                                                int size) {
    return sk == size && sv % (2 * size) == 0 &&
           reinterpret_cast<uintptr_t>(data) % (2 * size) == 0;
  }

  __device__ static void load(float (&s)[K / 2], char *data, int32_t dtype, int64_t sv,
                              int64_t sk) {
    if (dtype == FKDA_F32) {
      if (paired(data, sv, sk, 4))
        each_pair(s, data, sv, 4, [](char *at, int64_t, float &a, float &b) {
          const float2 x = *reinterpret_cast<const float2 *>(at);
          a = x.x, b = x.y;
        });
      else
        each_pair(s, data, sv, sk, [](char *at, int64_t step, float &a, float &b) {
          a = *reinterpret_cast<const float *>(at), b = *reinterpret_cast<const float *>(at + step);
        });
    } else {
      each_pair(s, data, sv, sk, [](char *at, int64_t step, float &a, float &b) {
        a = __bfloat162float(*reinterpret_cast<const bf16 *>(at));
        b = __bfloat162float(*reinterpret_cast<const bf16 *>(at + step));
      });
    }
  }

  __device__ static void store(float (&s)[K / 2], char *data, int32_t dtype, int64_t sv,
                               int64_t sk) {
    if (dtype == FKDA_F32) {
      if (paired(data, sv, sk, 4))
        each_pair(s, data, sv, 4, [](char *at, int64_t, float a, float b) {
          *reinterpret_cast<float2 *>(at) = make_float2(a, b);
        });
      else
        each_pair(s, data, sv, sk, [](char *at, int64_t step, float a, float b) {
          *reinterpret_cast<float *>(at) = a, *reinterpret_cast<float *>(at + step) = b;
        });
    } else if (paired(data, sv, sk, 2)) {
      each_pair(s, data, sv, 2, [](char *at, int64_t, float a, float b) {
        asm volatile("" : "+f"(a), "+f"(b)); /* or all of S is packed ahead, and spilled */
        *reinterpret_cast<uint32_t *>(at) = pack(a, b);
      });
    } else {
      each_pair(s, data, sv, sk, [](char *at, int64_t step, float a, float b) {
        asm volatile("" : "+f"(a), "+f"(b));
        *reinterpret_cast<bf16 *>(at) = __float2bfloat16_rn(a);
        *reinterpret_cast<bf16 *>(at + step) = __float2bfloat16_rn(b);
      });
    }
  }

  /* The head's state at element `offset` of `states`; value rows from `v_first` on. */
  template <class Move>
  __device__ __forceinline__ static void place(const fkda_states &states, int layout,
                                               int64_t offset, int v_first, Move move) {
    const int size = states.dtype == FKDA_F32 ? 4 : 2;
    const int64_t row = states.stride_row * size;
    const int64_t sv = layout == FKDA_STATE_VK ? row : size;
    move(static_cast<char *>(states.data) + offset * size + v_first * sv, sv,
         layout == FKDA_STATE_VK ? size : row);
  }
  __device__ static void load(float (&s)[K / 2], const fkda_states &from, int layout,
                              int64_t offset, int v_first) {
    place(from, layout, offset, v_first,
          [&](char *data, int64_t sv, int64_t sk) { load(s, data, from.dtype, sv, sk); });
  }
  __device__ static void store(float (&s)[K / 2], const fkda_states &to, int layout, int64_t offset,
                               int v_first) {
    place(to, layout, offset, v_first,
          [&](char *data, int64_t sv, int64_t sk) { store(s, data, to.dtype, sv, sk); });
  }
};
/* Checkpoints by interval: rows of the sequences before this one. A warp together. */
__device__ int64_t first_checkpoint_row(const fkda_problem &p, int64_t n) {
  const int lane = threadIdx.x & 31;
  int64_t sum = 0;
  for (int64_t m = lane; m < n; m += 32) {
    const fkda_span span = fkda_span_of(&p, m);
    const int64_t length = clamp64(span.length, 0, p.T);
    sum += (length + p.checkpoints.every - 1) / p.checkpoints.every;
  }
#pragma unroll
  for (int width = 16; width; width /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, width);
  return sum;
}

/* The checkpoints and the final state of a sequence. A visit at a chunk boundary calls put(states, element
 * offset of the head's state) for each one that belongs there. */
struct Checkpoints {
  int next; /* tokens done at the next boundary worth a visit */

  __device__ Checkpoints(const fkda_problem &p)
      : next(p.checkpoints.mode == FKDA_CHECKPOINT_NONE ? INT32_MAX : 0) {}

  __device__ __forceinline__ bool due(int done, bool at_end) const {
    return done >= next || at_end;
  }

  template <class Put>
  __device__ __forceinline__ void visit(const fkda_problem &p, const Task &task, int done,
                                        bool at_end, Put put) {
    const fkda_checkpoints &c = p.checkpoints;
    const bool every = c.mode == FKDA_CHECKPOINT_EVERY, packed = c.mode == FKDA_CHECKPOINT_PACKED;
    int64_t first = task.n * c.per_sequence, last = first + c.per_sequence;
    const bool checkpoints_due = done >= next;
    if (checkpoints_due) next = INT32_MAX;
    if (!checkpoints_due) {
      last = first;
    } else if (every) {
      int64_t j = -1;
      if (c.before)
        j = done % c.every == 0 && done < task.length ? done / c.every : -1;
      else if (done > 0 && (done % c.every == 0 || done == task.length))
        j = (done - 1) / c.every;
      first = last = first_checkpoint_row(p, task.n) + j;
      if (j >= 0) ++last;
      const int64_t following = (done / c.every + 1) * c.every;
      next = following < task.length ? (int)following : task.length;
      if (next <= done) next = INT32_MAX;
    } else if (packed) {
      first = fkda_int_at(c.indptr.data, c.indptr.dtype, task.n * c.indptr.stride);
      last = fkda_int_at(c.indptr.data, c.indptr.dtype, (task.n + 1) * c.indptr.stride);
      first = clamp64(first, 0, c.rows);
    }
    if (last > c.rows) last = c.rows < first ? first : c.rows; /* device memory: not trusted */
#pragma unroll 1
    for (int64_t row = first; row <= last; ++row) {
      const fkda_states *states = &c.state;
      int64_t offset = row * c.state.stride_slot;
      if (row == last) { /* behind the checkpoints: the final state */
        states = &p.final;
        if (!at_end || !states->data) break;
        offset = task.final_slot * states->stride_slot;
      } else {
        const int64_t column = row - first;
        if (!every) {
          const int64_t at_token = packed ? fkda_index_of(&c.offsets, row, 0)
                                          : fkda_index_of(&c.offsets, task.n, column);
          if (at_token > done && at_token < next) next = (int)at_token;
          if (at_token != done || done > task.length) continue;
          if (!packed) offset = task.n * c.stride_n + column * c.state.stride_slot;
        }
        if (c.slots.data) {
          const int64_t slot = c.mode == FKDA_CHECKPOINT_OFFSETS && c.slots.columns
                                   ? fkda_index_of(&c.slots, task.n, column)
                                   : fkda_index_of(&c.slots, row, 0);
          if (slot < 0 || slot >= c.state.slots) continue;
          offset = slot * c.state.stride_slot;
        }
      }
      put(*states, offset + task.head * states->stride_head);
    }
  }
};

}  // namespace fkda

#endif
