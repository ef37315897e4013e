/* Prefill of two sequences of one batch: 5 and 11 tokens, 2 heads, K = V = 64. */
#include <stdio.h>
#include <stdlib.h>

#include <flashkda/flashkda.h>

enum { N = 2, T = 16, H = 2, D = 64 };

static float q[T * H * D], k[T * H * D], v[T * H * D], g[T * H * D], beta[T * H];
static float out[T * H * D], final_state[N * H * D * D];

static void fill(float *x, int count) {
  for (int i = 0; i < count; ++i) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

static int fail(fkda_status status) {
  fprintf(stderr, "%s: %s\n", fkda_status_string(status), fkda_last_error());
  return 1;
}

int main(void) {
  const int64_t heads[] = {1, T, H, D}; /* q, k, v, g, out; [1, T, H] of it is beta's shape */
  const int64_t states[] = {N, H, D, D};
  int32_t cu_seqlens[] = {0, 5, T}; /* where each sequence begins, and the end */
  const int64_t offsets[] = {N + 1};

  fill(q, T * H * D);
  fill(k, T * H * D);
  fill(v, T * H * D);
  fill(g, T * H * D);
  fill(beta, T * H);

  fkda_prefill_args args = FKDA_PREFILL_ARGS_INIT;
  args.q = fkda_tensor_contiguous(q, FKDA_F32, 4, heads);
  args.k = fkda_tensor_contiguous(k, FKDA_F32, 4, heads);
  args.v = fkda_tensor_contiguous(v, FKDA_F32, 4, heads);
  args.g = fkda_tensor_contiguous(g, FKDA_F32, 4, heads);
  args.beta = fkda_tensor_contiguous(beta, FKDA_F32, 3, heads);
  args.out = fkda_tensor_contiguous(out, FKDA_F32, 4, heads);
  args.cu_seqlens = fkda_tensor_contiguous(cu_seqlens, FKDA_I32, 1, offsets);
  args.final_state = fkda_tensor_contiguous(final_state, FKDA_F32, 4, states);

  /* Ask once, for the largest batch; the same memory then serves every call. */
  size_t bytes;
  fkda_status status = fkda_workspace_size(&args, &bytes);
  if (status != FKDA_OK) return fail(status);
  args.workspace_size = (bytes + 63) / 64 * 64;
  args.workspace = args.workspace_size ? aligned_alloc(64, args.workspace_size) : NULL;

  status = fkda_prefill(&args);
  free(args.workspace);
  if (status != FKDA_OK) return fail(status);

  char plan[2048];
  if (fkda_plan_describe(&args, plan, sizeof plan, NULL) == FKDA_OK) printf("%s\n", plan);
  printf("out[0,0,0,0] = %.6f, final_state[0,0,0,0] = %.6f\n", out[0], final_state[0]);
  return 0;
}
