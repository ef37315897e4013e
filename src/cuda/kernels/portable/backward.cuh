/* What the kernels of the backward share: tiles, the workspace, who works on which block.
 *
 * Tiles of bf16 lie in 8 x 8 matrices of 128 contiguous bytes, four of them (the upper two, the lower two) to
 * a square of 16 x 16, squares by rows. So the four matrices of an ldmatrix are 512 contiguous bytes, lane by
 * lane, free of bank conflicts and without address arithmetic; a tile is copied as it lies; and it serves as
 * operand of products over its rows and over its columns. */
#ifndef FKDA_CUDA_PORTABLE_BACKWARD_CUH
#define FKDA_CUDA_PORTABLE_BACKWARD_CUH

#include "cuda/kernels/portable/backward_params.h"
#include "cuda/kernels/portable/backward_workspace.cuh"
#include "cuda/kernels/portable/pieces.cuh"

namespace fkda {
namespace {

using Backward = fkda_portable_backward_params;

constexpr int STEP = FKDA_BACKWARD_CHUNK;
constexpr int BLOCK_TOKENS = FKDA_BACKWARD_BLOCK;
constexpr int MATRIX = 64, SQUARE = 256; /* elements */

/* Element (row, column) of a tile of COLUMNS columns. */
template <int COLUMNS>
__device__ __forceinline__ int tile_at(int row, int column) {
  return ((row >> 4) * (COLUMNS / 16) + (column >> 4)) * SQUARE +
         ((row >> 2 & 2) + (column >> 3 & 1)) * MATRIX + (row & 7) * 8 + (column & 7);
}

/* A square as operands, by lane's place. r = load_square(): matrices (0,0), (0,1), (1,0), (1,1) by rows.
 * B of a product whose second operand's columns are the square's rows: tile n is r[2n], r[2n+1]. With
 * r = load_square_transposed(): A with M = the square's columns as it is; B whose columns are the square's
 * columns: tile n is r[n], r[2+n]. */
__device__ __forceinline__ void load_square(uint32_t (&r)[4], const bf16 *tile, int square) {
  load_matrices(r, tile + square * SQUARE + (threadIdx.x & 31) * 8);
}
__device__ __forceinline__ void load_square_transposed(uint32_t (&r)[4], const bf16 *tile,
                                                       int square) {
  load_transposed(r, tile + square * SQUARE + (threadIdx.x & 31) * 8);
}
/* acc[n] += a * b for the two tiles of 8 columns of a square: see above. */
__device__ __forceinline__ void mma_rows(float (&acc0)[4], float (&acc1)[4], const uint32_t (&a)[4],
                                         const uint32_t (&r)[4]) {
  mma(acc0, a, r[0], r[1]);
  mma(acc1, a, r[2], r[3]);
}
__device__ __forceinline__ void mma_columns(float (&acc0)[4], float (&acc1)[4],
                                            const uint32_t (&a)[4], const uint32_t (&r)[4]) {
  mma(acc0, a, r[0], r[2]);
  mma(acc1, a, r[1], r[3]);
}

/* Two neighbouring accumulator tiles as an A operand. */
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&x)[4],
                                             const float (&y)[4]) {
  a[0] = pack(x[0], x[1]);
  a[1] = pack(x[2], x[3]);
  a[2] = pack(y[0], y[1]);
  a[3] = pack(y[2], y[3]);
}

template <class T, int N, int M>
__device__ __forceinline__ void clear(T (&x)[N][M]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int m = 0; m < M; ++m) x[n][m] = 0;
}

/* ---- whose turn it is -------------------------------------------------------------------------------- */

/* The first row of a sequence. */
__device__ __forceinline__ int64_t first_block(const fkda_problem &p, const fkda_span &span,
                                               int64_t n) {
  return fkda::first_block(p, span.b, span.begin, n);
}

struct Block {
  fkda_span span;
  int64_t t;  /* its first token in the sequence */
  int tokens; /* of the sequence, from there on, at most BLOCK_TOKENS */
};

/* Numbers of blocks and heads fit 32 bits, and are divided as such: a 64-bit division is a hundred instructions. */
__device__ __forceinline__ uint32_t heads_of(const fkda_problem &p) { return (uint32_t)p.HV; }
__device__ __forceinline__ int qk_head_of(const fkda_problem &p, int head) {
  return (int)((uint32_t)head / ((uint32_t)p.HV / (uint32_t)p.H));
}

/* Where the walk of the row sm90 was first: has it left this head, number n * HV + head, to the launches behind it? */
__device__ __forceinline__ bool is_left(const Backward &x, int64_t head) {
  static_assert(FKDA_BACKWARD_REDO == 4, "flags");
  const uint4 flags = reinterpret_cast<const uint4 *>(x.redo)[head];
  return flags.x | flags.y | flags.z | flags.w;
}

/* The block with number `row`; false: nobody's. */
__device__ __forceinline__ bool find_block(const fkda_problem &p, int64_t row, Block &block) {
  int64_t low = 0, high = p.N;
  while (high - low > 1) {
    const int64_t n = (low + high) / 2;
    if (first_block(p, clamped_span(p, n), n) <= row)
      low = n;
    else
      high = n;
  }
  block.span = clamped_span(p, low);
  const int64_t j = row - first_block(p, block.span, low);
  block.t = j * BLOCK_TOKENS;
  const int64_t left = block.span.length - block.t;
  block.tokens = (int)(left < BLOCK_TOKENS ? left : BLOCK_TOKENS);
  return j >= 0 && left > 0;
}

/* Element (token t of the sequence, head, 0). */
__device__ __forceinline__ int64_t row_of(const fkda_rows &rows, const fkda_span &span, int64_t t,
                                          int head) {
  return span.b * rows.stride_b + (span.begin + t) * rows.stride_t + head * rows.stride_h;
}

__device__ __forceinline__ float exp_A_of(const fkda_problem &p, int head) {
  return p.A_log.data ? expf(load_float(p.A_log.data, p.A_log.dtype, head)) : 1.0f;
}

/* TOKENS rows of COLUMNS columns to a tile, zeros from `tokens` on. In pieces: the copies are asynchronous. */
template <int TOKENS, int COLUMNS, int THREADS>
__device__ __forceinline__ void load_tile(bf16 *tile, const fkda_rows &rows, int64_t first,
                                          int tokens, bool aligned, uint32_t thread = threadIdx.x) {
  if (aligned) {
    /* a warp at a time: eight rows of 64 bytes */
    constexpr int WARPS = THREADS / 32, EIGHTS = TOKENS / 8;
    constexpr int SHARE = WARPS > EIGHTS ? WARPS / EIGHTS : 1; /* warps for the same eight rows */
    const int warp = thread / 32, lane = thread & 31;
    const int piece = (lane >> 3) + 4 * (SHARE > 1 ? warp / EIGHTS : 0);
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight += WARPS) {
      const int row = 8 * ((eight + warp) % EIGHTS) + (lane & 7);
      const bool valid = row < tokens;
      const bf16 *from = static_cast<const bf16 *>(rows.data);
      if (valid) from += first + row * rows.stride_t + piece * 8;
      bf16 *to = tile + tile_at<COLUMNS>(row, piece * 8);
#pragma unroll
      for (int i = 0; i < COLUMNS / 32; i += SHARE)
        copy_piece(to + i * 2 * SQUARE, valid ? from + 32 * i : from, valid);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < TOKENS * COLUMNS; i += THREADS) {
      const int row = i / COLUMNS, column = i % COLUMNS;
      const float x = row < tokens && rows.data
                          ? load_float(rows.data, rows.dtype, first + row * rows.stride_t + column)
                          : 0.0f;
      tile[tile_at<COLUMNS>(row, column)] = __float2bfloat16_rn(x);
    }
  }
}

/* BYTES of them, from every thread's first piece at constant distances. */
template <int BYTES, int THREADS>
__device__ __forceinline__ void copy_bytes(char *to, const char *from, uint32_t thread = threadIdx.x) {
  constexpr int ROUND = 16 * THREADS;
  static_assert(BYTES % 16 == 0, "pieces");
  to += thread * 16, from += thread * 16;
#pragma unroll
  for (int i = 0; i < BYTES / ROUND; ++i) copy_piece(to + i * ROUND, from + i * ROUND, true);
  constexpr int DONE = BYTES / ROUND * ROUND;
  if (DONE < BYTES && thread * 16 < BYTES - DONE) copy_piece(to + DONE, from + DONE, true);
}

/* 32 tokens (columns) of 16 rows of accumulators as bf16 to rows of a tensor, `first` that of the first token: a lane has four
 * elements of a token of each tile. */
__device__ __forceinline__ void store_pieces(const float (&y)[STEP / 8][4], bf16 *first,
                                             int64_t stride, int64_t tokens) {
  const int lane = threadIdx.x & 31, token = lane >> 2;
  const bool odd = lane & 1;
  bf16 *row = first + token * stride + 8 * odd + 2 * (lane & 2);
#pragma unroll
  for (int n = 0; n < STEP / 8; ++n) {
    const uint32_t low = transpose_matrix(pack(y[n][0], y[n][1]));
    const uint32_t high = transpose_matrix(pack(y[n][2], y[n][3]));
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
    if (8 * n + token < tokens)
      *reinterpret_cast<uint2 *>(row) = make_uint2(odd ? other : low, odd ? high : other);
    row += 8 * stride;
  }
}

}  // namespace
}  // namespace fkda

#endif
