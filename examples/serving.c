/* A serving engine in small: continuous batching of many requests over one pool of states.
 *
 * Requests arrive, wait for a slot of the pool, have their prompts prefilled in pieces, decode one token
 * a step and finish, or are cancelled at any point; slots are used again. Prompts that begin alike share
 * a checkpoint: whoever comes later starts from it. A step is at most two calls of the library,
 *
 *   fkda_prefill   the pieces of prompts, ragged, from slot to slot, checkpoints to slots of their own
 *   fkda_decode    one token of every request that is past its prompt, in place
 *
 * or with --mixed one: a request that decodes is then a sequence of length 1 of the prefill.
 *
 * The model is one KDA layer over a table of random activations for each token of a small vocabulary; the
 * next token is a checksum of the output's bits, so that one bit that differs derails all that follow.
 * Every request is computed a second time by itself, its prompt in one call, and must give the same
 * outputs bit for bit (--no-check leaves that out). Exit status 1 if one differs or a slot is lost.
 *
 *   cc serving.c $(pkg-config --cflags --libs flashkda)
 *   ./a.out --requests 10000
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <flashkda/flashkda.h>

enum {
  VOCABULARY = 256,
  END = 0,          /* the token that ends an answer */
  PREFIXES = 12,    /* different beginnings that prompts share */
  CACHED = 6,       /* slots for their checkpoints: fewer, so that some are evicted */
  CHECKPOINT = 16,  /* checkpoints lie at multiples of this */
  MAX_PROMPT = 400, /* of a request's prompt and answer */
  MAX_ANSWER = 48,
  STEP_TOKENS = 128, /* of prompts in one step */
};

static struct {
  int64_t requests, slots, heads, dim;
  uint64_t seed;
  bool mixed, check;
} options = {200, 24, 2, 64, 1, false, true};

static _Noreturn void die(const char *what) {
  fprintf(stderr, "serving: %s\n", what);
  exit(2);
}

static void must(fkda_status status) {
  if (status == FKDA_OK) return;
  fprintf(stderr, "serving: %s: %s\n", fkda_status_string(status), fkda_last_error());
  exit(2);
}

static void *room(size_t bytes) {
  void *memory = aligned_alloc(64, (bytes / 64 + 1) * 64);
  if (!memory) die("out of memory");
  return memory;
}

static double seconds(void) {
  struct timespec now;
  timespec_get(&now, TIME_UTC);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- random numbers: of a place, so that a request is the same whenever it is looked at ------------- */

static uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
  return z ^ z >> 31;
}

static uint64_t draw(uint64_t stream, uint64_t index) {
  return mix(mix(options.seed * UINT64_C(0x9e3779b97f4a7c15) + stream) + index);
}

/* ---- the model ----------------------------------------------------------------------------------------- */

/* Activations of a token: q, k, v, g [H,D] and beta [H]. */
enum { Q, K, V, G, BETA, TENSORS };
static float *table[TENSORS]; /* [VOCABULARY,H,D] or [VOCABULARY,H] */

static int64_t width(int tensor) { return options.heads * (tensor == BETA ? 1 : options.dim); }

static void make_model(void) {
  for (int i = 0; i < TENSORS; ++i) {
    const int64_t count = VOCABULARY * width(i);
    table[i] = room((size_t)count * sizeof(float));
    for (int64_t j = 0; j < count; ++j) { /* uniform, deviation 1; gates mostly weak */
      const double u = (double)(draw((uint64_t)i + 1, (uint64_t)j) >> 11) * 0x1p-53;
      table[i][j] = (float)((u - 0.5) * 3.4641) - (i == G ? 3 : 0);
    }
  }
}

/* Room for `tokens` tokens of a call. */
typedef struct batch {
  float *x[TENSORS], *out;
} batch;

static batch new_batch(int64_t tokens) {
  batch b;
  for (int i = 0; i < TENSORS; ++i) b.x[i] = room((size_t)(tokens * width(i)) * sizeof(float));
  b.out = room((size_t)(tokens * width(V)) * sizeof(float));
  return b;
}

static void free_batch(batch *b) {
  for (int i = 0; i < TENSORS; ++i) free(b->x[i]);
  free(b->out);
}

static void put_token(batch *b, int64_t row, int32_t token) {
  for (int i = 0; i < TENSORS; ++i)
    memcpy(b->x[i] + row * width(i), table[i] + token * width(i), (size_t)width(i) * sizeof(float));
}

/* Of one row of out. */
static uint64_t checksum(const batch *b, int64_t row) {
  uint64_t sum = UINT64_C(0xcbf29ce484222325);
  for (int64_t i = 0; i < width(V); ++i) {
    uint32_t bits;
    memcpy(&bits, b->out + row * width(V) + i, sizeof bits);
    sum = (sum ^ bits) * UINT64_C(0x100000001b3);
  }
  return mix(sum);
}

static int32_t next_token(uint64_t sum) { return (int32_t)(sum % VOCABULARY); }

#define TOKENS_OF(args, b, B, T)                                                                   \
  do {                                                                                             \
    const int64_t shape[] = {B, T, options.heads, options.dim};                                    \
    (args)->q = fkda_tensor_contiguous((b)->x[Q], FKDA_F32, 4, shape);                             \
    (args)->k = fkda_tensor_contiguous((b)->x[K], FKDA_F32, 4, shape);                             \
    (args)->v = fkda_tensor_contiguous((b)->x[V], FKDA_F32, 4, shape);                             \
    (args)->g = fkda_tensor_contiguous((b)->x[G], FKDA_F32, 4, shape);                             \
    (args)->beta = fkda_tensor_contiguous((b)->x[BETA], FKDA_F32, 3, shape);                       \
    (args)->out = fkda_tensor_contiguous((b)->out, FKDA_F32, 4, shape);                            \
    (args)->batch_invariant = 1;                                                                   \
  } while (0)

static int64_t state_size(void) { return options.heads * options.dim * options.dim; }

static fkda_tensor states_of(float *data, int64_t slots) {
  const int64_t shape[] = {slots, options.heads, options.dim, options.dim};
  return fkda_tensor_contiguous(data, FKDA_F32, 4, shape);
}

static fkda_tensor vector_of(void *data, int32_t dtype, int64_t count) {
  return fkda_tensor_contiguous(data, dtype, 1, &count);
}

/* Pieces of a prompt begin at multiples of it: of the plan's chunk, so that they give the bits of one
 * call, and where checkpoints may lie. */
static int64_t piece = CHECKPOINT;

/* ---- requests ------------------------------------------------------------------------------------------- */

typedef struct request {
  int64_t id;
  int64_t prompt, answer; /* tokens of the prompt; at most so many of the answer */
  int64_t prefix,
      prefix_end;       /* which shared beginning (-1: none), how long; a multiple of `piece` */
  int64_t cancelled_at; /* tokens after which the client goes away; beyond all: never */
  int32_t tokens[MAX_PROMPT + MAX_ANSWER + 1];
  uint64_t sums[MAX_PROMPT + MAX_ANSWER]; /* checksum of each token's output */

  int64_t known;    /* tokens that there are: prompt and answer so far */
  int64_t done;     /* of which the state has seen */
  int64_t restored; /* of which these came out of the cache */
  int32_t slot;     /* of the state; -1: it waits */
  int32_t from;     /* slot that the next piece starts from, the cache's at first; -1: from zero */
  bool fills;       /* its checkpoint becomes the cache's */
  bool reads;       /* it is still to start from the cache's */
} request;

static request *new_request(int64_t id) {
  request *r = room(sizeof *r);
  const uint64_t stream = UINT64_C(1000) + (uint64_t)id;
  *r = (request){.id = id, .prefix = -1, .slot = -1, .from = -1};
  if (draw(stream, 0) % 4) {
    const uint64_t a = draw(stream, 1) % PREFIXES, b = draw(stream, 2) % PREFIXES;
    r->prefix = (int64_t)(a < b ? a : b); /* some are more popular than others */
    const int64_t length = CHECKPOINT * (int64_t)(1 + draw(100, (uint64_t)r->prefix) % 12);
    r->prefix_end = (length + piece - 1) / piece * piece;
  }
  r->prompt = r->prefix_end + 1 + (int64_t)(draw(stream, 3) % (draw(stream, 4) % 4 ? 60 : 200));
  r->answer = 1 + (int64_t)(draw(stream, 5) % MAX_ANSWER);
  r->cancelled_at = MAX_PROMPT + MAX_ANSWER;
  if (draw(stream, 6) % 8 == 0)
    r->cancelled_at = (int64_t)(draw(stream, 7) % (uint64_t)(r->prompt + r->answer));
  for (int64_t t = 0; t < r->prompt; ++t) {
    const uint64_t place = t < r->prefix_end ? 200 + (uint64_t)r->prefix : stream << 20;
    r->tokens[t] = (int32_t)(1 + draw(place, (uint64_t)t) % (VOCABULARY - 1));
  }
  r->known = r->prompt;
  return r;
}

/* Takes over the output of the next token; that of the last there is makes one more. */
static void take_output(request *r, uint64_t sum) {
  r->sums[r->done++] = sum;
  if (r->done == r->known) r->tokens[r->known++] = next_token(sum);
}

/* Is it past its prompt? */
static bool decodes(const request *r) { return r->done >= r->prompt; }

static bool finished(const request *r) {
  return r->known > r->prompt &&
         (r->known == r->prompt + r->answer || r->tokens[r->known - 1] == END);
}

static bool all_same = true;

/* The same request by itself: its prompt in one call, then token by token. */
static bool same_alone(const request *batched) {
  request *r = new_request(batched->id);
  batch b = new_batch(MAX_PROMPT);
  float *state = room((size_t)state_size() * sizeof(float));
  bool same = true;
  while (r->done < batched->done) {
    const int64_t count = r->known - r->done;
    for (int64_t i = 0; i < count; ++i) put_token(&b, i, r->tokens[r->done + i]);
    if (r->done == 0 || options.mixed) {
      fkda_prefill_args args = FKDA_PREFILL_ARGS_INIT;
      TOKENS_OF(&args, &b, 1, count);
      if (r->done) args.initial_state = states_of(state, 1);
      args.final_state = states_of(state, 1);
      must(fkda_prefill(&args)); /* without a workspace, on the CPU, it allocates one */
    } else {
      fkda_decode_args args = FKDA_DECODE_ARGS_INIT;
      TOKENS_OF(&args, &b, 1, 1);
      args.state = states_of(state, 1);
      must(fkda_decode(&args));
    }
    for (int64_t i = 0; i < count; ++i) take_output(r, checksum(&b, i));
  }
  for (int64_t t = batched->restored; t < batched->done && same; ++t) {
    same = r->sums[t] == batched->sums[t] && r->tokens[t] == batched->tokens[t];
    if (!same && all_same) /* the first of them */
      fprintf(stderr, "serving: request %lld differs from itself alone at token %lld\n",
              (long long)r->id, (long long)t);
  }
  free(state);
  free_batch(&b);
  free(r);
  return same;
}

/* ---- the pool: slots for requests and for cached checkpoints ---------------------------------------------- */

static float *pool;
static int32_t *unused; /* a stack of slots */
static int64_t unused_count;

static int64_t pool_slots(void) { return options.slots + CACHED; }

/* What lies in a slot without an owner is NaN: whoever still looked at it would not go unnoticed. */
static void free_slot(int32_t slot) {
  memset(pool + slot * state_size(), 0xFF, (size_t)state_size() * sizeof(float));
  unused[unused_count++] = slot;
}

static int32_t new_slot(void) { return unused[--unused_count]; }

static void make_pool(void) {
  pool = room((size_t)(pool_slots() * state_size()) * sizeof(float));
  unused = room((size_t)pool_slots() * sizeof *unused);
  for (int32_t slot = (int32_t)pool_slots() - 1; slot >= 0; --slot) free_slot(slot);
}

/* ---- the cache of prefixes --------------------------------------------------------------------------------- */

static struct {
  int32_t slot;    /* -1: not there */
  bool ready;      /* false: the request that will fill it is on its way */
  int64_t readers; /* requests that are still to start from it */
  int64_t used;    /* step of the last use */
} cache[PREFIXES];

static int64_t step, cached_count, hits, restored_tokens, evictions;

/* By giving up the checkpoint that was not used for longest, if need be; but none that is still to be
 * written or read. */
static bool make_cache_room(void) {
  if (cached_count < CACHED) return true;
  int oldest = -1;
  for (int i = 0; i < PREFIXES; ++i)
    if (cache[i].slot >= 0 && cache[i].ready && !cache[i].readers &&
        (oldest < 0 || cache[i].used < cache[oldest].used))
      oldest = i;
  if (oldest < 0) return false;
  free_slot(cache[oldest].slot);
  cache[oldest].slot = -1;
  --cached_count;
  ++evictions;
  return true;
}

/* A new request starts from its prefix's checkpoint, or promises to leave one. */
static void consult_cache(request *r) {
  if (r->prefix < 0) return;
  if (cache[r->prefix].slot < 0) {
    if (!make_cache_room()) return;
    cache[r->prefix].slot = new_slot();
    cache[r->prefix].ready = false;
    ++cached_count;
    r->fills = true;
  } else if (cache[r->prefix].ready) {
    cache[r->prefix].used = step;
    ++cache[r->prefix].readers;
    r->reads = true;
    r->from = cache[r->prefix].slot;
    r->restored = r->done = r->prefix_end;
    ++hits;
    restored_tokens += r->prefix_end;
  }
}

static void end_reading(request *r) {
  if (r->reads) --cache[r->prefix].readers;
  r->reads = false;
}

static void forget_promise(request *r) {
  if (!r->fills) return;
  free_slot(cache[r->prefix].slot);
  cache[r->prefix].slot = -1;
  --cached_count;
  r->fills = false;
}

/* ---- the engine ----------------------------------------------------------------------------------------------- */

static request **running; /* [slots], in the order of arrival */
static int64_t running_count;
static struct {
  batch tokens;
  void *workspace;
  size_t workspace_size;
  int32_t *starts, *ends, *cu_seqlens, *offsets, *indptr, *targets;
  uint8_t *has_state;
  request **members;
} call;
static int64_t prompt_tokens, answer_tokens, calls, completed, cancelled;

typedef struct prefill_size {
  int64_t tokens, sequences, checkpoints;
} prefill_size;

static void prefill_args_of(fkda_prefill_args *args, const prefill_size *size) {
  const int64_t sequences = size->sequences, checkpoints = size->checkpoints;
  *args = FKDA_PREFILL_ARGS_INIT;
  TOKENS_OF(args, &call.tokens, 1, size->tokens);
  args->cu_seqlens = vector_of(call.cu_seqlens, FKDA_I32, sequences + 1);
  args->initial_state = args->final_state = states_of(pool, pool_slots());
  args->initial_state_indices = vector_of(call.starts, FKDA_I32, sequences);
  args->final_state_indices = vector_of(call.ends, FKDA_I32, sequences);
  args->has_initial_state = vector_of(call.has_state, FKDA_BOOL, sequences);
  if (checkpoints) { /* states on the way, to slots of the same pool */
    args->checkpoint_state = states_of(pool, pool_slots());
    args->checkpoint_offsets = vector_of(call.offsets, FKDA_I32, checkpoints);
    args->checkpoint_indptr = vector_of(call.indptr, FKDA_I32, sequences + 1);
    args->checkpoint_state_indices = vector_of(call.targets, FKDA_I32, checkpoints);
  }
  args->workspace = call.workspace;
  args->workspace_size = call.workspace_size;
}

static void decode_args_of(fkda_decode_args *args, int64_t sequences) {
  *args = FKDA_DECODE_ARGS_INIT;
  TOKENS_OF(args, &call.tokens, sequences, 1);
  args->state = states_of(pool, pool_slots());
  args->initial_state_indices = vector_of(call.starts, FKDA_I32, sequences);
  args->workspace = call.workspace;
  args->workspace_size = call.workspace_size;
}

/* All memory at once: a workspace for the largest call serves every smaller one. */
static void make_engine(void) {
  const int64_t tokens = STEP_TOKENS + options.slots, N = options.slots;
  const size_t words = (size_t)(N + 1) * sizeof(int32_t);
  running = room((size_t)N * sizeof(request *));
  call.members = room((size_t)N * sizeof(request *));
  call.tokens = new_batch(tokens);
  call.starts = room(words), call.ends = room(words), call.cu_seqlens = room(words);
  call.offsets = room(words), call.indptr = room(words), call.targets = room(words);
  call.has_state = room((size_t)N);
  fkda_prefill_args prefill;
  fkda_decode_args decode;
  size_t sizes[2];
  prefill_args_of(&prefill, &(prefill_size){tokens, N, N});
  decode_args_of(&decode, N);
  must(fkda_workspace_size(&prefill, &sizes[0]));
  must(fkda_workspace_size(&decode, &sizes[1]));
  call.workspace_size = sizes[0] > sizes[1] ? sizes[0] : sizes[1];
  call.workspace = room(call.workspace_size);
  fkda_plan_info plan = {.struct_size = sizeof plan};
  must(fkda_plan(&prefill, &plan));
  if (plan.chunk > piece) piece = plan.chunk;
  printf("backend %s, chunk %d\n", plan.backend, (int)plan.chunk);
}

static void retire(request *r, bool done) {
  end_reading(r);
  forget_promise(r);
  if (r->slot >= 0) free_slot(r->slot);
  *(done ? &completed : &cancelled) += 1;
  if (options.check && !same_alone(r)) all_same = false;
  free(r);
}

/* Requests whose client has gone, or whose answer is complete, leave the batch. */
static void sweep(void) {
  int64_t kept = 0;
  for (int64_t i = 0; i < running_count; ++i) {
    request *r = running[i];
    if (finished(r) || r->done >= r->cancelled_at)
      retire(r, finished(r));
    else
      running[kept++] = r;
  }
  running_count = kept;
}

/* The next piece of a prompt: what is left of it, or as many chunks as this step still takes. */
static int64_t piece_of(const request *r, int64_t budget) {
  const int64_t left = r->known - r->done;
  return left <= budget ? left : budget / piece * piece;
}

/* One more sequence of the call that is being made. */
static void add_piece(request *r, int64_t count, prefill_size *size) {
  const int64_t n = size->sequences++;
  call.members[n] = r;
  call.cu_seqlens[n] = (int32_t)size->tokens;
  call.has_state[n] = r->from >= 0;
  call.starts[n] = r->from >= 0 ? r->from : r->slot;
  call.ends[n] = r->slot;
  call.indptr[n] = (int32_t)size->checkpoints;
  if (r->fills && r->done + count >= r->prefix_end) {
    call.offsets[size->checkpoints] = (int32_t)(r->prefix_end - r->done);
    call.targets[size->checkpoints++] = cache[r->prefix].slot;
  }
  for (int64_t t = 0; t < count; ++t)
    put_token(&call.tokens, size->tokens++, r->tokens[r->done + t]);
}

/* Pieces of prompts, first come first served; with --mixed then the decoding requests: long sequences
 * come first, as kernels take them in order. */
static void prefill_step(void) {
  prefill_size size = {0};
  int64_t budget = STEP_TOKENS;
  for (int64_t i = 0; i < running_count; ++i) {
    const int64_t count = decodes(running[i]) ? 0 : piece_of(running[i], budget);
    if (count) add_piece(running[i], count, &size);
    budget -= count;
  }
  for (int64_t i = 0; i < running_count && options.mixed; ++i)
    if (decodes(running[i])) add_piece(running[i], 1, &size);
  const int64_t N = size.sequences;
  if (N == 0) return;
  call.cu_seqlens[N] = (int32_t)size.tokens;
  call.indptr[N] = (int32_t)size.checkpoints;
  fkda_prefill_args args;
  prefill_args_of(&args, &size);
  must(fkda_prefill(&args));
  ++calls;
  for (int64_t n = 0; n < N; ++n) {
    request *r = call.members[n];
    const int64_t count = call.cu_seqlens[n + 1] - call.cu_seqlens[n];
    *(decodes(r) ? &answer_tokens : &prompt_tokens) += count;
    for (int64_t t = call.cu_seqlens[n]; t < call.cu_seqlens[n + 1]; ++t)
      take_output(r, checksum(&call.tokens, t));
    end_reading(r);
    r->from = r->slot;
    if (r->fills && r->done >= r->prefix_end) {
      cache[r->prefix].ready = true;
      cache[r->prefix].used = step;
      r->fills = false;
    }
  }
}

/* One token of every request that is past its prompt. */
static void decode_step(void) {
  int64_t N = 0;
  for (int64_t i = 0; i < running_count; ++i) {
    request *r = running[i];
    if (!decodes(r)) continue;
    call.starts[N] = r->slot;
    put_token(&call.tokens, N, r->tokens[r->done]);
    call.members[N++] = r;
  }
  if (N == 0) return;
  fkda_decode_args args;
  decode_args_of(&args, N);
  must(fkda_decode(&args));
  ++calls;
  answer_tokens += N;
  for (int64_t n = 0; n < N; ++n) take_output(call.members[n], checksum(&call.tokens, n));
}

/* ---- command line ------------------------------------------------------------------------------------------------ */

static void parse(int argc, char **argv) {
  struct {
    const char *name;
    int64_t *value, low, high;
  } const numbers[] = {{"--requests", &options.requests, 1, 100000000},
                       {"--slots", &options.slots, 1, 4096},
                       {"--heads", &options.heads, 1, 256},
                       {"--dim", &options.dim, 1, 256}};
  for (int i = 1; i < argc; ++i) {
    bool known = true;
    if (strcmp(argv[i], "--mixed") == 0) {
      options.mixed = true;
    } else if (strcmp(argv[i], "--no-check") == 0) {
      options.check = false;
    } else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      options.seed = strtoull(argv[++i], NULL, 10);
    } else {
      known = false;
      for (size_t j = 0; j < sizeof numbers / sizeof numbers[0] && !known; ++j) {
        if (strcmp(argv[i], numbers[j].name) != 0 || i + 1 == argc) continue;
        *numbers[j].value = strtoll(argv[++i], NULL, 10);
        known = *numbers[j].value >= numbers[j].low && *numbers[j].value <= numbers[j].high;
      }
    }
    if (!known)
      die("usage: serving [--requests N] [--slots N] [--heads H] [--dim D] [--seed S] [--mixed] "
          "[--no-check]");
  }
}

int main(int argc, char **argv) {
  parse(argc, argv);
  make_model();
  make_pool();
  make_engine();
  for (int i = 0; i < PREFIXES; ++i) cache[i].slot = -1;

  int64_t arrived = 0, admitted = 0, most = 0;
  double busy = 0; /* seconds in steps; checking is not counted */
  while (completed + cancelled < options.requests) {
    const double begin = seconds();
    ++step;
    arrived += (int64_t)(draw(0, (uint64_t)step) % 4);
    if (arrived > options.requests) arrived = options.requests;
    while (admitted < arrived && running_count < options.slots) {
      request *r = new_request(admitted++);
      if (r->cancelled_at == 0) { /* while it waited */
        retire(r, false);
        continue;
      }
      r->slot = new_slot();
      consult_cache(r);
      running[running_count++] = r;
    }
    most = running_count > most ? running_count : most;
    if (options.mixed) {
      prefill_step();
    } else {
      decode_step(); /* first: who ends its prompt in this step decodes in the next */
      prefill_step();
    }
    busy += seconds() - begin;
    sweep();
  }

  const int64_t lost = pool_slots() - unused_count - cached_count;
  for (int i = 0; i < PREFIXES; ++i)
    if (cache[i].slot >= 0) free_slot(cache[i].slot);
  printf(
      "%lld requests: %lld finished, %lld cancelled; %lld steps, %lld calls, at most %lld at "
      "once\n",
      (long long)options.requests, (long long)completed, (long long)cancelled, (long long)step,
      (long long)calls, (long long)most);
  printf("prefix cache: %lld restored %lld tokens, %lld evicted\n", (long long)hits,
         (long long)restored_tokens, (long long)evictions);
  printf("%lld prompt and %lld answer tokens in %.3f s: %.0f tokens/s\n", (long long)prompt_tokens,
         (long long)answer_tokens, busy, (double)(prompt_tokens + answer_tokens) / busy);
  printf("slots lost: %lld; %s\n", (long long)lost,
         !options.check ? "not checked"
         : all_same     ? "every request as it is alone, bit for bit"
                        : "requests DIFFER from themselves alone");
  return lost == 0 && unused_count == pool_slots() && all_same ? 0 : 1;
}
