"""A serving engine in small: continuous batching of many requests over one pool of states.

    python examples/serving.py                                  on the CPU
    python examples/serving.py --device cuda --graphs           decode by CUDA graphs of padded batches
    python examples/serving.py --requests 10000 --json FILE     a soak, recorded

Requests arrive, wait for a slot of the pool, have their prompts prefilled in pieces, decode one token a
step and finish, or are cancelled at any point; slots are used again. Prompts that begin alike share a
checkpoint: whoever comes later starts from it. A step is one flash_kda.decode() of every request that is
past its prompt and one flash_kda.fwd() of pieces of prompts; with --mixed it is one fwd(), in which a
request that decodes is a sequence of length 1.

The model is one KDA layer over a table of random activations for each token of a small vocabulary; the
next token is a checksum of the output's bits, so that one bit that differs derails all that follow. Every
request is computed a second time by itself, its prompt in one call, and must give the same outputs bit
for bit (--no-check leaves that out). Exit status 1 if one differs or a slot is lost.
"""

import argparse
import bisect
import collections
import dataclasses
import datetime
import json
import pathlib
import platform
import random
import re
import sys
import time

import torch

import flash_kda

VOCABULARY = 256
END = 0  # the token that ends an answer
PREFIXES = 12  # different beginnings that prompts share
CACHED = 6  # slots for their checkpoints: fewer, so that some are evicted
CHECKPOINT = 16  # checkpoints lie at multiples of this
MAX_ANSWER = 48


class Model:
    """Activations q, k, v, g [H,D] and beta [H] of every token, and the calls of the library."""

    def __init__(self, options):
        self.device, self.H, self.D = torch.device(options.device), options.heads, options.dim
        generator = torch.Generator().manual_seed(options.seed)

        def normal(*shape):
            return torch.randn(VOCABULARY, *shape, generator=generator, dtype=torch.bfloat16)

        q, k, v, g = (normal(self.H, self.D) for _ in range(4))
        self.table = [x.to(self.device) for x in (q, k, v, g - 3, normal(self.H))]
        # Odd, so that a change of any single bit of the output changes the sum.
        weights = torch.randint(2**62, (self.H, self.D), generator=generator) * 2 + 1
        self.weights = weights.to(self.device)
        self.piece = max(CHECKPOINT, self.chunk())

    def chunk(self):
        """The plan's: pieces of a prompt that begin at multiples of it give the bits of one call."""
        tokens = self.integers([0] * 64, torch.int64)
        inputs = [x[tokens][None] for x in self.table]
        plan = flash_kda.plan(*inputs, cu_seqlens=self.integers([0, 64]), batch_invariant=True)
        return int(re.search(r"chunk (\d+)", plan)[1])

    def states(self, slots):
        return torch.full((slots, self.H, self.D, self.D), torch.nan, device=self.device)

    def integers(self, values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=self.device)

    def checksums(self, out):
        """[..., H, D] to [...], modulo 2**64."""
        return (out.view(torch.int16).to(torch.int64) * self.weights).sum((-2, -1))

    def prefill(self, tokens, **states):
        """tokens [T] to checksums [T]."""
        inputs = [x[tokens][None] for x in self.table]
        out = torch.empty_like(inputs[2])
        flash_kda.fwd(*inputs, None, out, None, None, None, batch_invariant=True, **states)
        return self.checksums(out[0])

    def decode(self, tokens, pool, slots=None):
        """tokens [N] to checksums [N]; slots [N], -1: the row is padding."""
        inputs = [x[tokens][:, None] for x in self.table]
        out = torch.zeros_like(inputs[2])
        flash_kda.decode(*inputs, pool, out, state_indices=slots, batch_invariant=True)
        return self.checksums(out[:, 0])


@dataclasses.dataclass
class Request:
    id: int
    prompt: int  # tokens
    answer: int  # at most so many
    prefix: int  # which shared beginning; -1: none
    prefix_end: int  # its length, a multiple of the model's piece
    cancelled_at: int | None  # tokens after which the client goes away
    tokens: list  # of the prompt and of the answer so far
    sums: list = dataclasses.field(default_factory=list)  # of each token's output
    done: int = 0  # tokens that the state has seen
    restored: int = 0  # of which these came out of the cache
    slot: int = -1
    start: int = -1  # slot that the next piece starts from, the cache's at first; -1: from zero
    fills: bool = False  # its checkpoint becomes the cache's
    reads: bool = False  # it is still to start from the cache's

    def take(self, sums):
        """The outputs of the next tokens; that of the last there is makes one more."""
        self.sums += sums
        self.done += len(sums)
        if self.done == len(self.tokens):
            self.tokens.append((sums[-1] ^ sums[-1] >> 32) % VOCABULARY)

    @property
    def finished(self):
        said = len(self.tokens) - self.prompt
        return said > 0 and (said == self.answer or self.tokens[-1] == END)

    @property
    def cancelled(self):
        return self.cancelled_at is not None and self.done >= self.cancelled_at


def make_request(seed, number, piece):
    """The same request whenever it is made."""
    rng = random.Random(f"{seed} {number}")
    prefix, shared = -1, []
    if rng.random() < 0.75:
        prefix = min(rng.randrange(PREFIXES), rng.randrange(PREFIXES))  # some are more popular
        beginning = random.Random(f"{seed} prefix {prefix}")
        length = -(-CHECKPOINT * (1 + prefix % 12) // piece) * piece
        shared = [1 + beginning.randrange(VOCABULARY - 1) for _ in range(length)]
    own = 1 + rng.randrange(rng.choice((60, 60, 60, 200)))
    tokens = shared + [1 + rng.randrange(VOCABULARY - 1) for _ in range(own)]
    answer = 1 + rng.randrange(MAX_ANSWER)
    gone = rng.randrange(len(tokens) + answer) if rng.random() < 1 / 8 else None
    return Request(number, len(tokens), answer, prefix, len(shared), gone, tokens)


class Pool:
    """Slots for states. What lies in one without an owner is NaN: whoever still looked at it would not
    go unnoticed."""

    def __init__(self, model, slots):
        self.states = model.states(slots)
        self.unused = list(range(slots))

    def take(self):
        return self.unused.pop()

    def give(self, slot):
        self.states[slot] = torch.nan
        self.unused.append(slot)


@dataclasses.dataclass
class Checkpoint:
    slot: int
    ready: bool = False  # False: the request that will fill it is on its way
    readers: int = 0  # requests that are still to start from it


class PrefixCache:
    """Checkpoints of shared beginnings, the one that was used last at the end."""

    def __init__(self, pool):
        self.pool, self.entries = pool, collections.OrderedDict()
        self.hits = self.evicted = self.restored = 0

    def room(self):
        """Gives up the checkpoint that was not used for longest, but none still to be written or read."""
        if len(self.entries) < CACHED:
            return True
        for prefix, entry in self.entries.items():
            if entry.ready and not entry.readers:
                self.drop(prefix)
                self.evicted += 1
                return True
        return False

    def drop(self, prefix):
        self.pool.give(self.entries.pop(prefix).slot)

    def consult(self, request):
        """A new request starts from its prefix's checkpoint, or promises to leave one."""
        if request.prefix < 0:
            return
        entry = self.entries.get(request.prefix)
        if entry is None:
            if self.room():
                self.entries[request.prefix] = Checkpoint(self.pool.take())
                request.fills = True
        elif entry.ready:
            self.entries.move_to_end(request.prefix)
            entry.readers += 1
            request.reads = True
            request.start = entry.slot
            request.restored = request.done = request.prefix_end
            request.sums = [None] * request.done
            self.hits += 1
            self.restored += request.done

    def advance(self, request):
        """A piece of the request has run: what it read it has, and what it promised may be there."""
        self.stop_reading(request)
        if request.fills and request.done >= request.prefix_end:
            self.entries[request.prefix].ready = True
            request.fills = False

    def stop_reading(self, request):
        if request.reads:
            self.entries[request.prefix].readers -= 1
        request.reads = False

    def forget(self, request):
        self.stop_reading(request)
        if request.fills:
            self.drop(request.prefix)
        request.fills = False


class DecodeGraphs:
    """decode() of 1, 2, 4, ... rows captured once each. A batch takes the next larger one; its rows
    beyond the batch have slot -1 and leave the pool alone."""

    def __init__(self, model, pool, largest):
        flash_kda.warmup(str(model.device))
        self.model = model
        self.sizes, self.graphs = [], []
        size = 1
        while not self.sizes or self.sizes[-1] < largest:
            self.sizes.append(min(size, largest))
            size *= 2
        self.tokens = model.integers([0] * largest, torch.int64)
        self.slots = model.integers([-1] * largest)
        for size in self.sizes:
            tokens, slots = self.tokens[:size], self.slots[:size]
            model.decode(tokens, pool.states, slots)  # -1: nothing happens
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                sums = model.decode(tokens, pool.states, slots)
            self.graphs.append((graph, sums))

    def __call__(self, tokens, slots):
        i = bisect.bisect_left(self.sizes, len(tokens))
        padding = self.sizes[i] - len(tokens)
        self.tokens[: self.sizes[i]] = self.model.integers(tokens + [0] * padding, torch.int64)
        self.slots[: self.sizes[i]] = self.model.integers(slots + [-1] * padding)
        graph, sums = self.graphs[i]
        graph.replay()
        return sums[: len(tokens)].tolist()


class Engine:
    def __init__(self, model, options):
        self.model, self.options = model, options
        self.pool = Pool(model, options.slots + CACHED)
        self.cache = PrefixCache(self.pool)
        self.running = []  # in the order of arrival
        self.prompt_tokens = self.answer_tokens = self.calls = 0
        self.graphs = DecodeGraphs(model, self.pool, options.slots) if options.graphs else None

    def admit(self, request):
        request.slot = self.pool.take()
        self.cache.consult(request)
        self.running.append(request)

    def step(self):
        """Returns the requests that left the batch."""
        if not self.options.mixed:
            self.decode([r for r in self.running if r.done >= r.prompt])
        self.prefill()
        left = [r for r in self.running if r.finished or r.cancelled]
        self.running = [r for r in self.running if not (r.finished or r.cancelled)]
        for request in left:
            self.cache.forget(request)
            self.pool.give(request.slot)
        return left

    def decode(self, requests):
        if not requests:
            return
        tokens = [r.tokens[r.done] for r in requests]
        slots = [r.slot for r in requests]
        if self.graphs:
            sums = self.graphs(tokens, slots)
        else:
            model = self.model
            sums = model.decode(
                model.integers(tokens, torch.int64), self.pool.states, model.integers(slots)
            ).tolist()
        for request, one in zip(requests, sums):
            request.take([one])
        self.answer_tokens += len(requests)
        self.calls += 1

    def pieces(self):
        """(request, tokens) of this step: what is left of a prompt, or whole chunks within the budget. The
        long ones come first, as kernels take sequences in order."""
        budget = max(self.options.step_tokens, self.model.piece)
        for request in self.running:
            count = len(request.tokens) - request.done
            if request.done >= request.prompt:
                continue
            if count > budget:
                count = budget // self.model.piece * self.model.piece
            if count:
                budget -= count
                yield request, count
        if self.options.mixed:
            yield from ((r, 1) for r in self.running if r.done >= r.prompt)

    def prefill(self):
        tokens, ends, offsets, indptr, targets = [], [0], [], [0], []
        members = list(self.pieces())
        if not members:
            return
        for r, count in members:
            tokens += r.tokens[r.done : r.done + count]
            ends.append(len(tokens))
            if r.fills and r.done + count >= r.prefix_end:
                offsets.append(r.prefix_end - r.done)
                targets.append(self.cache.entries[r.prefix].slot)
            indptr.append(len(offsets))
        model, states = self.model, self.pool.states
        checkpoints = {}
        if offsets:  # states on the way, to slots of the same pool
            checkpoints = dict(
                checkpoint_state=states,
                checkpoint_offsets=model.integers(offsets),
                checkpoint_indptr=model.integers(indptr),
                checkpoint_state_indices=model.integers(targets),
            )
        sums = model.prefill(
            model.integers(tokens, torch.int64),
            initial_state=states,
            final_state=states,
            cu_seqlens=model.integers(ends),
            initial_state_indices=model.integers(
                [r.slot if r.start < 0 else r.start for r, _ in members]
            ),
            final_state_indices=model.integers([r.slot for r, _ in members]),
            has_initial_state=model.integers([r.start >= 0 for r, _ in members], torch.bool),
            **checkpoints,
        ).tolist()
        self.calls += 1
        for i, (r, count) in enumerate(members):
            if r.done >= r.prompt:
                self.answer_tokens += count
            else:
                self.prompt_tokens += count
            r.take(sums[ends[i] : ends[i + 1]])
            r.start = r.slot
            self.cache.advance(r)


def same_alone(model, batched, options):
    """The request by itself: its prompt in one call, then token by token."""
    r = make_request(options.seed, batched.id, model.piece)
    state = model.states(1)
    while r.done < batched.done:
        tokens = model.integers(r.tokens[r.done :], torch.int64)
        if r.done == 0 or options.mixed:
            start = {"initial_state": state} if r.done else {}
            sums = model.prefill(tokens, final_state=state, **start)
        else:
            sums = model.decode(tokens, state)
        r.take(sums.tolist())
    known, restored = len(batched.tokens), batched.restored
    return (
        r.sums[restored : batched.done] == batched.sums[restored:]
        and r.tokens[:known] == batched.tokens
    )


def serve(options):
    """Runs all requests; what there is to say about it, as a row of a record."""
    model = Model(options)
    engine = Engine(model, options)
    arrivals = random.Random(options.seed)
    arrived = admitted = steps = most = completed = cancelled = 0
    differing, busy = [], 0.0  # seconds in steps; checking is not counted
    while completed + cancelled < options.requests:
        begin = time.perf_counter()
        steps += 1
        arrived = min(options.requests, arrived + arrivals.randrange(4))
        while admitted < arrived and len(engine.running) < options.slots:
            request = make_request(options.seed, admitted, model.piece)
            admitted += 1
            if request.cancelled:  # while it waited
                cancelled += 1
            else:
                engine.admit(request)
        most = max(most, len(engine.running))
        left = engine.step()
        busy += time.perf_counter() - begin
        for request in left:
            completed += request.finished
            cancelled += not request.finished
            if options.check and not same_alone(model, request, options):
                differing.append(request.id)
    pool, cache = engine.pool, engine.cache
    lost = len(pool.states) - len(pool.unused) - len(cache.entries)
    return {
        "name": "serving",
        "mode": "mixed" if options.mixed else "graphs" if options.graphs else "decode",
        "requests": options.requests,
        "finished": completed,
        "cancelled": cancelled,
        "slots": options.slots,
        "H": options.heads,
        "K": options.dim,
        "V": options.dim,
        "dtype": "bf16",
        "steps": steps,
        "calls": engine.calls,
        "most_at_once": most,
        "cache_hits": cache.hits,
        "cache_evicted": cache.evicted,
        "restored_tokens": cache.restored,
        "prompt_tokens": engine.prompt_tokens,
        "answer_tokens": engine.answer_tokens,
        "seconds": busy,
        "tokens_per_s": (engine.prompt_tokens + engine.answer_tokens) / busy,
        "checked": options.check,
        "differing": differing,
        "slots_lost": lost,
    }


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} CPUs" if models else platform.machine()


def record(path, row, options):
    """Beside the rows of other modes that the file holds of this commit and device."""
    from flash_kda.bench import commit, write_record

    head = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": flash_kda.__version__,
        "device": device_name(options.device),
        "versions": {"torch": torch.__version__},
    }
    rows, path = [row], pathlib.Path(path)
    if path.exists():
        old = json.loads(path.read_text())
        if all(old[key] == head[key] for key in ("commit", "device")):
            rows = [other for other in old["rows"] if other["mode"] != row["mode"]] + rows
    write_record(path, {**head, "rows": rows})


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cpu", help="a torch device (cpu)")
    add("--requests", type=int, default=200)
    add("--slots", type=int, default=24, help="requests at once (24)")
    add("--heads", type=int, default=2)
    add("--dim", type=int, default=64, help="K and V; on CUDA 64 or 128 (64)")
    add("--step-tokens", type=int, default=128, help="of prompts in one step (128)")
    add("--seed", type=int, default=1)
    add("--mixed", action="store_true", help="one call a step, decoding requests in the prefill")
    add("--graphs", action="store_true", help="decode by CUDA graphs of padded batches")
    add("--no-check", dest="check", action="store_false", help="no comparison with each one alone")
    add("--json", metavar="FILE", help="record the result there")
    options = parser.parse_args(arguments)
    if options.graphs and (options.mixed or not options.device.startswith("cuda")):
        parser.error("--graphs: expected --device cuda, and not --mixed")
    if options.step_tokens < CHECKPOINT:
        parser.error(f"--step-tokens: {options.step_tokens}, expected at least {CHECKPOINT}")
    return options


def main(arguments=None):
    options = parse(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)  # for torch's small copies; the library has threads of its own
    row = serve(options)
    print(
        f"{row['requests']} requests: {row['finished']} finished, {row['cancelled']} cancelled; "
        f"{row['steps']} steps, {row['calls']} calls, at most {row['most_at_once']} at once\n"
        f"prefix cache: {row['cache_hits']} restored {row['restored_tokens']} tokens, "
        f"{row['cache_evicted']} evicted\n"
        f"{row['prompt_tokens']} prompt and {row['answer_tokens']} answer tokens in "
        f"{row['seconds']:.3f} s: {row['tokens_per_s']:.0f} tokens/s"
    )
    verdict = "every request as it is alone, bit for bit"
    if row["differing"]:
        verdict = f"requests {row['differing'][:10]} DIFFER from themselves alone"
    print(f"slots lost: {row['slots_lost']}; {verdict if row['checked'] else 'not checked'}")
    if options.json:
        record(options.json, row, options)
    return 1 if row["differing"] or row["slots_lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
