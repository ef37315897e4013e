/* A prompt by prefill, then token by token by decode, on one slot of a state pool: what generating text
 * does. The outputs are compared with those of a single prefill over all tokens.
 *
 *     cc decode.c $(pkg-config --cflags --libs flashkda) -lm && ./a.out
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <flashkda/flashkda.h>

enum { PROMPT = 20, TOKENS = 32, H = 2, D = 64, SLOTS = 4, SLOT = 2 };

/* In an engine the projections of each new token; here all of them are known beforehand. */
static float q[TOKENS * H * D], k[TOKENS * H * D], v[TOKENS * H * D], g[TOKENS * H * D];
static float beta[TOKENS * H], out[TOKENS * H * D], expected[TOKENS * H * D];
static float pool[SLOTS * H * D * D], expected_state[H * D * D];

static void fill(float *x, int count) {
  for (int i = 0; i < count; ++i) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

static int fail(fkda_status status) {
  fprintf(stderr, "%s: %s\n", fkda_status_string(status), fkda_last_error());
  return 1;
}

/* Tokens [begin, begin + count) of an array of H * width floats a token. */
static fkda_tensor tokens(float *x, int begin, int count, int ndim, int width) {
  const int64_t shape[] = {1, count, H, width}; /* beta is [1, count, H] */
  return fkda_tensor_contiguous(x + (size_t)begin * H * (size_t)width, FKDA_F32, ndim, shape);
}

/* Tokens [0, count) into result and into the state, which starts from zero. */
static fkda_status prefill(int count, float *result, fkda_tensor state, int32_t *slot) {
  const int64_t one[] = {1};
  fkda_prefill_args args = FKDA_PREFILL_ARGS_INIT;
  args.q = tokens(q, 0, count, 4, D);
  args.k = tokens(k, 0, count, 4, D);
  args.v = tokens(v, 0, count, 4, D);
  args.g = tokens(g, 0, count, 4, D);
  args.beta = tokens(beta, 0, count, 3, 1);
  args.out = tokens(result, 0, count, 4, D);
  args.final_state = state;
  if (slot) args.final_state_indices = fkda_tensor_contiguous(slot, FKDA_I32, 1, one);
  return fkda_prefill(&args); /* on the CPU the workspace may be NULL */
}

/* One token; the slot is read and written in place. */
static fkda_status decode(int token, fkda_tensor states, int32_t *slot) {
  const int64_t one[] = {1};
  fkda_decode_args args = FKDA_DECODE_ARGS_INIT;
  args.q = tokens(q, token, 1, 4, D);
  args.k = tokens(k, token, 1, 4, D);
  args.v = tokens(v, token, 1, 4, D);
  args.g = tokens(g, token, 1, 4, D);
  args.beta = tokens(beta, token, 1, 3, 1);
  args.out = tokens(out, token, 1, 4, D);
  args.state = states;
  args.initial_state_indices = fkda_tensor_contiguous(slot, FKDA_I32, 1, one);
  return fkda_decode(&args);
}

static double difference(const float *x, const float *y, int count) {
  double error = 0, norm = 0;
  for (int i = 0; i < count; ++i) {
    error += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
    norm += (double)y[i] * y[i];
  }
  return sqrt(error / norm);
}

int main(void) {
  const int64_t states[] = {SLOTS, H, D, D};
  const int64_t one_state[] = {1, H, D, D};
  const fkda_tensor slots = fkda_tensor_contiguous(pool, FKDA_F32, 4, states);
  const fkda_tensor alone = fkda_tensor_contiguous(expected_state, FKDA_F32, 4, one_state);
  int32_t slot[] = {SLOT};

  fill(q, TOKENS * H * D);
  fill(k, TOKENS * H * D);
  fill(v, TOKENS * H * D);
  fill(g, TOKENS * H * D);
  fill(beta, TOKENS * H);

  fkda_status status = prefill(PROMPT, out, slots, slot);
  for (int token = PROMPT; status == FKDA_OK && token < TOKENS; ++token) {
    status = decode(token, slots, slot);
  }
  if (status == FKDA_OK) status = prefill(TOKENS, expected, alone, NULL);
  if (status != FKDA_OK) return fail(status);

  const double outputs = difference(out, expected, TOKENS * H * D);
  const double state = difference(pool + (size_t)SLOT * H * D * D, expected_state, H * D * D);
  printf("%d tokens by prefill and %d by decode, against %d by prefill: out %.1e, state %.1e\n",
         PROMPT, TOKENS - PROMPT, TOKENS, outputs, state);
  return outputs < 1e-5 && state < 1e-5 ? 0 : 1;
}
