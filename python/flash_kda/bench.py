"""What the kernels take on this machine's GPU, against memory's floor, gold, and other packages.

    python -m flash_kda.bench --preset all --json-dir bench/results     time, and record
    python -m flash_kda.bench --compare ...                             FLA in the same run
    python -m flash_kda.bench --from FILE --markdown - --plot FILE      from what was recorded

Needs torch with CUDA; tables and plots from a record need no torch. docs/benchmarks.md says what is
measured and how.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import flash_kda

MB = 1 << 20
GATES = ("weak", "medium", "strong")
# dt_bias is uniform between the two; with g ~ N(0,1), A_log = 0 the log-decay is -5 sigmoid(g + dt_bias).
DT_BIAS = {"weak": (-8.0, -8.0), "medium": (-3.5, -2.0), "strong": (0.0, 1.0)}
LOWER_BOUND = -5.0
ERROR_LIMIT = 5e-3
STATE_BYTES = {"fp32": 4, "bf16": 2}

# ---- shapes -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. Ragged batches come as one row of tokens with cu_seqlens, others as [N,T,...]."""

    name: str
    lens: tuple
    H: int
    HV: int = 0  # 0: H
    D: int = 128  # K and V
    op: str = "prefill"
    state: str = "fp32"
    store: str = "last"  # which states a decode call stores: "last", "all" or "none"
    variant: str = ""
    layout: str = "vk"

    @property
    def heads(self):
        return self.HV or self.H

    @property
    def N(self):
        return len(self.lens)

    @property
    def tokens(self):
        return sum(self.lens)

    @property
    def ragged(self):
        return len(set(self.lens)) > 1

    def state_bytes(self):
        """One state of every sequence."""
        return self.N * self.heads * self.D * self.D * STATE_BYTES[self.state]

    def bytes(self):
        """Every input read once, every output written once."""
        q_k = 2 * self.H * self.D * 2
        v_g_out_beta = self.heads * (3 * self.D + 1) * 2
        parameters = self.heads * (1 + self.D) * 4
        states = 1 + {"none": 0, "last": 1, "all": max(self.lens)}[self.store]
        indices = 0
        if self.op == "decode":
            indices = 4 * self.N * (max(self.lens) + 1 if self.store == "all" else 1)
        elif self.ragged:
            indices = 8 * (self.N + 1)
        total = self.tokens * (q_k + v_g_out_beta) + parameters
        return total + states * self.state_bytes() + indices


RAGGED6 = (1300, 547, 2048, 963, 271, 3063)


def prefill(lens, H, name=None):
    one = f"T{lens[0]}" if len(lens) == 1 else f"{len(lens)}x{lens[0]}"
    return Shape(f"{name or one}_H{H}", tuple(lens), H)


def decode(N, T=1, H=32, **options):
    heads = options.get("HV") or H
    return Shape(f"decode_N{N}_T{T}_H{heads}", (T,) * N, H, op="decode", **options)


def mixed(lens, N, H):
    """Prompts, and N requests that decode, in one prefill call."""
    name = "+".join(f"{lens.count(n)}x{n}" for n in dict.fromkeys(lens))
    return Shape(f"{name}+{N}x1_H{H}", (*lens, *(1,) * N), H, variant="mixed")


PRESETS = {
    "paper": [
        shape
        for H in (96, 64)
        for shape in (
            prefill([8192], H),
            prefill(RAGGED6, H, "ragged6"),
            prefill([1024] * 8, H),
        )
    ]
    + [prefill([8192], 32)],
    "serving": [
        prefill([8192], 12),
        prefill([2048], 12),
        prefill([128] * 64, 32),
        prefill([16384] + [100] * 40, 32, "16384+40x100"),
        mixed([2048] * 2, 64, 32),
        mixed([8192], 32, 32),
    ],
    "long": [prefill([65536], 8), prefill([131072], 4)],
    "decode": [decode(N) for N in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)]
    + [decode(N, state="bf16", variant="bf16state") for N in (1, 8, 32, 64, 128, 256, 1024)]
    + [
        decode(32, 8, store="none", variant="spec8_out"),
        decode(32, 8, store="last", variant="spec8_last"),
        decode(32, 8, store="all", variant="spec8"),
        decode(32, 8, store="none", state="bf16", variant="spec8_out_bf16state"),
        decode(32, 8, store="all", state="bf16", variant="spec8_bf16state"),
        decode(128, layout="kv", variant="kv"),
        decode(128, layout="kv", state="bf16", variant="kv_bf16state"),
        decode(32, 8, layout="kv", store="none", variant="kv_spec8_out"),
        decode(128, H=8, HV=32, variant="gva4"),
    ],
}

# Timed with --compare, in this order, while its time lasts: FLA tunes each new head count for minutes.
PEER_ROWS = (
    *(f"decode_N{N}_T1_H32" for N in (1, 8, 32, 128, 256)),
    *(f"{batch}_H{H}" for H in (96, 64) for batch in ("T8192", "ragged6", "8x1024")),
    "T8192_H32",
)


def shapes_of(presets):
    names = list(PRESETS) if "all" in presets else presets
    for name in names:
        if name not in PRESETS:
            raise SystemExit(f"--preset: {name!r}, expected {', '.join(PRESETS)} or all")
    return [shape for name in names for shape in PRESETS[name]]


# ---- clocks -------------------------------------------------------------------------------------


class CudaClock:
    """Device time. The stream is held back while calls are queued, so that it never waits for the host."""

    HOLD = 30_000_000  # cycles, about 17 ms

    def __init__(self, torch, index):
        self.torch, self.device = torch, torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self.l2 = getattr(properties, "L2_cache_size", 0) or 50 * MB

    def sync(self):
        self.torch.cuda.synchronize()

    def _events(self, functions):
        pairs = []
        self.torch.cuda._sleep(self.HOLD)
        for function in functions:
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            pairs.append((begin, end))
        self.sync()
        return [begin.elapsed_time(end) for begin, end in pairs]

    def calls(self, functions, seconds):
        """Median milliseconds of a call, `functions` in turn."""
        for function in functions:
            function()
        self.sync()
        once = statistics.median(self._events(functions[:3]))
        count = min(50, max(7, int(1e3 * seconds / max(once, 1e-3))))
        return statistics.median(self._events(functions[i % len(functions)] for i in range(count)))

    def graph(self, functions, seconds):
        """The same of the calls captured in one graph: the milliseconds of a replay over their number."""
        torch = self.torch
        functions = functions * -(-16 // len(functions))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for function in functions:
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self.sync()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for function in functions:
                function()
        return self.calls([graph.replay], seconds) / len(functions)

    def copy_gbps(self, size=1024 * MB):
        """Bytes read and written by a large copy, over its time."""
        source = self.torch.ones(size, dtype=self.torch.uint8, device=self.device)
        target = self.torch.empty_like(source)
        return 2 * size / self.calls([lambda: target.copy_(source)], 0.3) / 1e6

    def description(self):
        """driver, clocks_mhz: read while copies keep the device busy."""
        source = self.torch.ones(256 * MB, dtype=self.torch.uint8, device=self.device)
        target = self.torch.empty_like(source)
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            return None, {}
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            for _ in range(50):
                target.copy_(source)
            self.sync()
        if process.poll() is None:
            process.kill()
        lines = process.communicate()[0].strip().splitlines()
        line = lines[min(self.device.index, len(lines) - 1)] if lines else ""
        values = [x.strip() for x in line.split(",")]
        if len(values) != 5:
            return None, {}
        names = ("sm", "mem", "max_sm", "max_mem")
        clocks = {n: int(x) for n, x in zip(names, values[1:]) if x.isdigit()}
        return values[0], clocks


class HostClock:
    """The same on the CPU: what the tests run, and a way to try a change without a GPU."""

    name, l2 = "cpu", MB

    def __init__(self, torch):
        self.torch, self.device = torch, torch.device("cpu")

    def sync(self):
        pass

    def calls(self, functions, seconds):
        times, begin = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            functions[len(times) % len(functions)]()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    graph = calls

    def copy_gbps(self, size=16 * MB):
        source = self.torch.ones(size, dtype=self.torch.uint8)
        target = self.torch.empty_like(source)
        return 2 * size / self.calls([lambda: target.copy_(source)], 0.02) / 1e6

    def description(self):
        return None, {}


def host_us(clock, function, ms):
    """Microseconds until a call returns, the device not waited for: the median over calls.

    Each call is timed by itself: on an idle device the first launch of a round takes the driver 100 us.
    A round is short enough that the stream's queue never fills.
    """
    count, rounds = (100, 7) if ms < 0.3 else (20, 5) if ms < 3 else (10, 3)
    times = []
    for _ in range(rounds):
        clock.sync()
        for _ in range(count):
            begin = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - begin))
    clock.sync()
    return statistics.median(times)


# ---- problems -----------------------------------------------------------------------------------


def on_host(x):
    """A copy, also of what lies there already: timing goes on writing."""
    return x.to("cpu", copy=True)


class Problem:
    """The inputs of one shape, in as many copies as the caches cannot hold. Equal seeds, equal inputs."""

    def __init__(self, shape, clock, backend=None):
        torch = clock.torch
        self.torch, self.shape, self.backend = torch, shape, backend
        self.generator = torch.Generator(device=clock.device)
        self.generator.manual_seed(1)
        self.options = dict(device=clock.device, generator=self.generator)
        self.dt_bias = torch.empty(shape.heads, shape.D, device=clock.device)
        self.A_log = torch.zeros(shape.heads, device=clock.device)
        self.set_gate("medium")
        most = 256 if shape.op == "decode" else 8
        self.copies = min(most, max(2, -(-8 * clock.l2 // shape.bytes())))
        B, T = (1, shape.tokens) if shape.ragged else (shape.N, shape.lens[0])
        self.tensors = [self.activations(B, T) for _ in range(self.copies)]

    def normal(self, *size, dtype=None):
        return self.torch.randn(*size, dtype=dtype or self.torch.bfloat16, **self.options)

    def activations(self, B, T):
        s = self.shape
        q, k = (self.normal(B, T, s.H, s.D) for _ in range(2))
        v, g = (self.normal(B, T, s.heads, s.D) for _ in range(2))
        beta = self.normal(B, T, s.heads)
        return dict(q=q, k=k, v=v, g=g, beta=beta, out=self.torch.full_like(v, math.nan))

    def set_gate(self, gate):
        """Written in place: what was captured in a graph sees it too. One seed for each strength."""
        self.generator.manual_seed(100 + GATES.index(gate))
        low, high = DT_BIAS[gate]
        self.dt_bias.uniform_(0, 1, generator=self.generator).mul_(high - low).add_(low)

    def sampled_heads(self):
        return sorted({0, self.shape.heads - 1})

    def head(self, tensors, j):
        """Value head j of copy 0's inputs, on the CPU."""
        i = j * self.shape.H // self.shape.heads
        at = {"q": i, "k": i, "v": j, "g": j, "beta": j}
        return {name: on_host(tensors[name][:, :, h : h + 1]) for name, h in at.items()} | {
            "A_log": on_host(self.A_log[j : j + 1]),
            "dt_bias": on_host(self.dt_bias[j : j + 1]),
        }


class Prefill(Problem):
    def __init__(self, shape, clock, backend=None):
        super().__init__(shape, clock, backend)
        torch = self.torch
        self.cu_seqlens = None
        if shape.ragged:
            ends = [0]
            for length in shape.lens:
                ends.append(ends[-1] + length)
            self.cu_seqlens = torch.tensor(ends, device=clock.device)
        for x in self.tensors:
            size = (shape.N, shape.heads, shape.D, shape.D)
            x["initial"] = self.normal(*size, dtype=torch.float32)
            x["final"] = torch.full_like(x["initial"], math.nan)

    def arguments(self, c):
        x = self.tensors[c]
        return (
            *(x[name] for name in ("q", "k", "v", "g", "beta")), None, x["out"], self.A_log,
            self.dt_bias, LOWER_BOUND, x["initial"], x["final"], self.cu_seqlens,
        )  # fmt: skip

    def bound(self, c):
        """The call on copy c, its arguments made ready."""
        return functools.partial(flash_kda.fwd, *self.arguments(c), backend=self.backend)

    def plan(self):
        return flash_kda.plan(*self.arguments(0), backend=self.backend)

    def time(self, clock, functions, seconds):
        return clock.calls(functions, seconds)

    def sample(self):
        """One call on copy 0: per sampled head its inputs and what came out, on the CPU."""
        x = self.tensors[0]
        x["out"].fill_(math.nan)
        x["final"].fill_(math.nan)
        self.bound(0)()
        return [
            self.inputs(j) | self.outputs(x["out"], x["final"], j) for j in self.sampled_heads()
        ]

    def inputs(self, j):
        x = self.tensors[0]
        one = self.head(x, j) | {"initial": on_host(x["initial"][:, j : j + 1])}
        one["cu_seqlens"] = None if self.cu_seqlens is None else on_host(self.cu_seqlens)
        return one

    @staticmethod
    def outputs(out, final, j):
        return {"out": on_host(out[:, :, j : j + 1]), "state": on_host(final[:, j : j + 1])}

    @staticmethod
    def gold(x):
        import torch

        out, state = (
            torch.full_like(x[name], math.nan, dtype=torch.float64) for name in ("v", "initial")
        )
        flash_kda.fwd(
            *(x[name] for name in ("q", "k", "v", "g", "beta")), None, out, x["A_log"],
            x["dt_bias"], LOWER_BOUND, x["initial"], state, x["cu_seqlens"], backend="reference",
        )  # fmt: skip
        return out, state


class Decode(Problem):
    """Every copy has its own slots of one pool, which is updated in place."""

    def __init__(self, shape, clock, backend=None):
        super().__init__(shape, clock, backend)
        torch = self.torch
        N, T = shape.N, shape.lens[0]
        columns = T if shape.store == "all" else 1
        slots = self.copies * N * columns
        dtype = torch.float32 if shape.state == "fp32" else torch.bfloat16
        self.pool = self.normal(slots, shape.heads, shape.D, shape.D, dtype=dtype)
        order = torch.randperm(slots, generator=torch.Generator().manual_seed(2), dtype=torch.int32)
        order = order.to(clock.device)
        self.accepted = None
        if shape.store == "all":
            self.indices = list(order.view(self.copies, N, columns))
            counts = torch.arange(N, dtype=torch.int32) % T + 1
            self.accepted = counts.to(clock.device)
        else:
            self.indices = list(order.view(self.copies, N))

    def options_of(self, c):
        return dict(
            state_indices=self.indices[c],
            num_accepted_tokens=self.accepted,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            lower_bound=LOWER_BOUND,
            write_state=self.shape.store != "none",
            state_layout=self.shape.layout,
            backend=self.backend,
        )

    def inputs_of(self, c):
        return [self.tensors[c][name] for name in ("q", "k", "v", "g", "beta")]

    def bound(self, c):
        arguments = (*self.inputs_of(c), self.pool, self.tensors[c]["out"])
        return functools.partial(flash_kda.decode, *arguments, **self.options_of(c))

    def plan(self):
        out = self.tensors[0]["out"]
        return flash_kda.plan(
            *self.inputs_of(0), out=out, op="decode", state=self.pool, **self.options_of(0)
        )

    def time(self, clock, functions, seconds):
        return clock.graph(functions, seconds)

    def between_ms(self, clock, functions, seconds):
        """A call between two kernels that do nothing to speak of, so that no two calls overlap."""
        one = self.torch.zeros(1, device=clock.device)

        def call(function):
            def both():
                function()
                one.add_(1)

            return both

        together = clock.graph([call(function) for function in functions], seconds)
        return together - clock.graph([lambda: one.add_(1)], seconds)

    def copy_ms(self, clock, seconds):
        """Copies that read and write as many bytes as the calls, timed as they are."""
        half = self.shape.bytes() // 2
        source = self.torch.ones(self.copies, half, dtype=self.torch.uint8, device=clock.device)
        target = self.torch.empty_like(source)

        def function(c):
            return lambda: target[c].copy_(source[c])

        return clock.graph([function(c) for c in range(self.copies)], seconds)

    def states(self, j):
        return on_host(self.pool[self.indices[0].long().flatten(), j : j + 1])

    def inputs(self, j):
        accepted = None if self.accepted is None else on_host(self.accepted)
        more = {"initial": self.states(j), "accepted": accepted, "layout": self.shape.layout}
        return self.head(self.tensors[0], j) | more

    def outputs(self, j):
        state = None if self.shape.store == "none" else self.states(j)
        return {"out": on_host(self.tensors[0]["out"][:, :, j : j + 1]), "state": state}

    def sample(self, call=None):
        heads = self.sampled_heads()
        inputs = [self.inputs(j) for j in heads]
        self.tensors[0]["out"].fill_(math.nan)
        (call or self.bound(0))()
        return [x | self.outputs(j) for x, j in zip(inputs, heads)]

    @staticmethod
    def gold(x):
        import torch

        out = torch.full_like(x["v"], math.nan, dtype=torch.float64)
        state = x["initial"].double()
        N, T = out.shape[:2]
        options = {}
        if x["accepted"] is not None:
            table = torch.arange(N * T, dtype=torch.int32).view(N, T)
            options = dict(state_indices=table, num_accepted_tokens=x["accepted"])
        flash_kda.decode(
            *(x[name] for name in ("q", "k", "v", "g", "beta")), state, out, A_log=x["A_log"],
            dt_bias=x["dt_bias"], lower_bound=LOWER_BOUND, state_layout=x["layout"],
            backend="reference", **options,
        )  # fmt: skip
        return out, state


class TwoCalls:
    """What a mixed batch does in one call: a prefill of the prompts, and a decode of the rest."""

    def __init__(self, shape, gate, clock, backend=None):
        prompts = tuple(n for n in shape.lens if n > 1)
        rest = shape.N - len(prompts)
        first = dataclasses.replace(shape, lens=prompts)
        second = dataclasses.replace(shape, lens=(1,) * rest, op="decode")
        self.parts = Prefill(first, clock, backend), Decode(second, clock, backend)
        for part in self.parts:
            part.set_gate(gate)
            if not can_run(part):
                part.backend = None

    def functions(self):
        return [self.both(c) for c in range(min(part.copies for part in self.parts))]

    def both(self, c):
        prefill, decode = (part.bound(c) for part in self.parts)

        def call():
            prefill()
            decode()

        return call


def make_problem(shape, clock, backend=None):
    return (Decode if shape.op == "decode" else Prefill)(shape, clock, backend)


def can_run(problem):
    try:
        problem.plan()
    except RuntimeError:
        return False
    return True


def backends_of(shape, clock, wanted, make=make_problem):
    """Those to time a shape on: the wanted ones; else on a GPU every row of it that can run the shape, of which `make`
    makes a problem."""
    if wanted and len(wanted) == 1:
        return wanted
    if not wanted:
        if clock.device.type == "cpu":
            return [None]
        rows = [name for name, available, _ in flash_kda.backends() if available]
        wanted = [name for name in rows if not name.startswith("cpu-") and name != "reference"]
    small = dataclasses.replace(shape, lens=(min(shape.lens[0], 64),))
    able = []
    for name in wanted:
        with contextlib.suppress(RuntimeError):  # of making it
            able += [name] if can_run(make(small, clock, name)) else []
    return able or wanted[:1] or [None]


def same_inputs(samples, others):
    return all(
        x[name].equal(y[name])
        for x, y in zip(samples, others)
        for name in ("q", "g", "dt_bias", "initial")
    )


def relative_error(pairs):
    """RMS(x - gold) / RMS(gold) over all pairs."""
    difference = power = 0.0
    for x, gold in pairs:
        difference += float((x.double() - gold).square().sum())
        power += float(gold.square().sum())
    return math.sqrt(difference / power) if power else math.sqrt(difference)


def errors(samples, golds):
    """error_o, error_state; the latter None where no state is stored."""
    out = relative_error([(x["out"], gold[0]) for x, gold in zip(samples, golds)])
    if samples[0]["state"] is None:
        return out, None
    return out, relative_error([(x["state"], gold[1]) for x, gold in zip(samples, golds)])


# ---- ours ---------------------------------------------------------------------------------------


def say(text):
    print(text, file=sys.stderr, flush=True)


def parse_plan(text):
    """Backend and plan line of what flash_kda.plan() prints."""
    backend = re.search(r"^backend: (\S+)", text, re.M)
    plan = re.search(r"^plan: (.*)$", text, re.M)
    return backend[1] if backend else "", plan[1] if plan else ""


def measure(problem, gate, clock, copy_gbps, options):
    """One row, and the samples its errors are taken of."""
    shape = problem.shape
    problem.set_gate(gate)
    samples = [] if options.no_errors else problem.sample()
    functions = [problem.bound(c) for c in range(problem.copies)]
    ms = problem.time(clock, functions, options.seconds)
    backend, plan = parse_plan(problem.plan())
    row = {
        "name": shape.name,
        "op": shape.op,
        "N": shape.N,
        "lens": list(shape.lens),
        "H": shape.H,
        "HV": shape.heads,
        "K": shape.D,
        "V": shape.D,
        "gate": gate,
        "backend": backend,
        "variant": shape.variant,
        "dtype": "bf16",
        "plan": plan,
        "ms": ms,
        "floor_ms": shape.bytes() / copy_gbps / 1e6,
        "peers_ms": {},
        "error_o": None,
        "error_state": None,
        "host_us": host_us(clock, functions[0], ms),
        "bytes": shape.bytes(),
    }
    if shape.op == "decode":
        row["copy_ms"] = problem.copy_ms(clock, options.seconds)
        row["between_ms"] = problem.between_ms(clock, functions, options.seconds)
    if shape.variant == "mixed":
        two = TwoCalls(shape, gate, clock, problem.backend)
        row["two_calls_ms"] = clock.calls(two.functions(), options.seconds)
    return row, samples


def first_call_ms(clock, wanted):
    """Wall time of this process's first call, to its end: kernels are loaded in it."""
    problem = make_problem(prefill([64], 2), clock, wanted[0] if wanted else None)
    call = problem.bound(0)
    clock.sync()
    begin = time.perf_counter()
    call()
    clock.sync()
    return 1e3 * (time.perf_counter() - begin)


def gates_of(shape, options):
    if shape.op == "decode":
        return ("medium",)
    return tuple(options.gates)


class Bench:
    def __init__(self, clock, options):
        self.clock, self.options = clock, options
        self.rows, self.failures = [], []
        self.samples = {}  # by key: pairs (row, what its errors are taken of), one for each backend
        self.golds = {}  # by key
        driver, clocks = clock.description()
        self.copy_gbps = clock.copy_gbps()
        self.head = {
            "commit": options.commit if options.commit is not None else commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "version": flash_kda.__version__,
            "device": clock.name,
            "driver": driver,
            "clocks_mhz": clocks,
            "copy_gbps": self.copy_gbps,
            "sgemm_gflops": None,
            "first_call_ms": first_call_ms(clock, options.backend),
            "versions": {"torch": clock.torch.__version__},
            "note": options.note,
        }

    @staticmethod
    def key(row):
        """Of rows on the same inputs."""
        return row["name"], row["variant"], row["gate"]

    @contextlib.contextmanager
    def guarded(self, what):
        """A row that fails is reported, and the others still run."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")
            traceback.print_exc()

    def release(self):
        if self.clock.device.type == "cuda":
            self.clock.torch.cuda.empty_cache()

    def ours(self, shapes):
        for shape in shapes:
            backends = []
            with self.guarded(shape.name):
                backends = backends_of(shape, self.clock, self.options.backend)
            for backend in backends:
                with self.guarded(shape.name):
                    self.rows_of(shape, backend)
                self.release()

    def rows_of(self, shape, backend):
        problem = make_problem(shape, self.clock, backend)
        for gate in gates_of(shape, self.options):
            row, samples = measure(problem, gate, self.clock, self.copy_gbps, self.options)
            self.rows.append(row)
            say(
                f"{shape.name:<20} {shape.variant:<10} {gate:<7} {row['backend']:<10}"
                f" {row['ms']:9.4f} ms, floor {row['floor_ms']:.4f}, host {row['host_us']:.1f} us"
            )
            if not samples:
                continue
            pairs = self.samples.setdefault(self.key(row), [])
            pairs.append((row, samples))
            if not same_inputs(pairs[0][1], samples):
                raise RuntimeError(f"{backend}: the inputs differ from those of the first backend")

    def gold(self):
        """Double precision on all cores, one head a task; the longest first."""
        tasks = []
        for key, pairs in self.samples.items():
            kind = Decode if key[0].startswith("decode") else Prefill
            tasks += [(key, i, kind.gold, x) for i, x in enumerate(pairs[0][1])]
        tasks.sort(key=lambda task: -task[3]["v"].shape[0] * task[3]["v"].shape[1])
        begin = time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda task: task[2](task[3]), tasks))
        for (key, i, _, _), result in zip(tasks, results):
            self.golds.setdefault(key, {})[i] = result
        for key, golds in self.golds.items():
            self.golds[key] = [golds[i] for i in sorted(golds)]
            for row, samples in self.samples[key]:
                row["error_o"], row["error_state"] = errors(samples, self.golds[key])
                for name in ("error_o", "error_state"):
                    if row[name] is not None and not row[name] <= ERROR_LIMIT:
                        what = " ".join((*key, row["backend"]))
                        self.failures.append(f"{what}: {name} {row[name]:.2e}")
        say(f"gold of {len(tasks)} heads took {time.monotonic() - begin:.1f} s")

    def record(self, op=None):
        rows = [row for row in self.rows if op in (None, op_of(row))]
        return {**self.head, "rows": rows}

    def write(self):
        options = self.options
        if options.json:
            write_record(options.json, self.record())
        if options.json_dir:
            for op in ("prefill", "decode"):
                record = self.record(op)
                if record["rows"]:
                    name = f"{op}-{short_device(self.head['device'])}.json"
                    write_record(pathlib.Path(options.json_dir) / name, record)


def op_of(row):
    return "decode" if row["name"].startswith("decode") else "prefill"


# ---- FLA ----------------------------------------------------------------------------------------


def load_fla():
    """(chunk_kda, fused_recurrent_kda_fwd, version), its own Triton kernels and not ours behind them."""
    os.environ["FLA_FLASH_KDA"] = "0"
    import importlib.metadata

    from fla.ops.kda import chunk_kda
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    for name in ("fla-core", "flash-linear-attention"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return chunk_kda, fused_recurrent_kda_fwd, importlib.metadata.version(name)
    return chunk_kda, fused_recurrent_kda_fwd, ""


def v_first(function):
    """The option for [V,K] states, by the name that this version gives it."""
    known = inspect.signature(function).parameters
    return {"state_v_first" if "state_v_first" in known else "transpose_state_layout": True}


def fla_arguments(function, problem, c):
    """What FLA's chunk and recurrent forms take alike: tensors c of the problem, activations in the kernel."""
    x = problem.tensors[c]
    return {
        **{name: x[name] for name in ("q", "k", "v", "g", "beta")},
        "A_log": problem.A_log,
        "dt_bias": problem.dt_bias.view(-1),
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "lower_bound": LOWER_BOUND,
        **v_first(function),
    }


def fla_prefill_call(chunk_kda, problem, c):
    with problem.torch.inference_mode():
        return chunk_kda(
            initial_state=problem.tensors[c]["initial"],
            output_final_state=True,
            safe_gate=True,
            cu_seqlens=problem.cu_seqlens,
            **fla_arguments(chunk_kda, problem, c),
        )


def fla_decode_call(recurrent, problem, c):
    with problem.torch.inference_mode():
        recurrent(
            initial_state=problem.pool,
            inplace_final_state=True,
            ssm_state_indices=problem.indices[c],
            out=problem.tensors[c]["out"],
            **fla_arguments(recurrent, problem, c),
        )


@contextlib.contextmanager
def ours_forbidden():
    """FLA hands chunk_kda to this package where it can: a timing of FLA must not be one of ours."""
    fwd = flash_kda.fwd

    def refuse(*_, **__):
        raise RuntimeError("FLA called flash_kda.fwd: this would not be FLA's time")

    flash_kda.fwd = refuse
    try:
        yield
    finally:
        flash_kda.fwd = fwd


def peer_row(bench, fla, shape, rows):
    """Fills peers_ms and peers_error of a shape's rows; those of several backends share one time."""
    chunk_kda, recurrent, _ = fla
    clock = bench.clock
    problem = make_problem(shape, clock)
    for key in dict.fromkeys(map(bench.key, rows)):
        gate = key[2]
        problem.set_gate(gate)
        if shape.op == "decode":
            samples = problem.sample(lambda: fla_decode_call(recurrent, problem, 0))
            functions = [
                lambda c=c: fla_decode_call(recurrent, problem, c) for c in range(problem.copies)
            ]
        else:
            with ours_forbidden():
                out, final = fla_prefill_call(chunk_kda, problem, 0)[:2]
            samples = [
                problem.inputs(j) | problem.outputs(out, final, j) for j in problem.sampled_heads()
            ]
            del out, final
            functions = [
                lambda c=c: fla_prefill_call(chunk_kda, problem, c) for c in range(problem.copies)
            ]
        with ours_forbidden():
            ms = problem.time(clock, functions, bench.options.seconds)
        peer_error = {}
        if key in bench.golds:
            if not same_inputs(bench.samples[key][0][1], samples):
                raise RuntimeError("the inputs differ from those that ours ran on")
            error_o, error_state = errors(samples, bench.golds[key])
            peer_error = {"peers_error": {"fla": {"o": error_o, "state": error_state}}}
        ours = [row for row in rows if bench.key(row) == key]
        for row in ours:
            row["peers_ms"]["fla"] = ms
            row.update(peer_error)
        times = ", ".join(f"{row['backend']} {row['ms']:.4f}" for row in ours)
        say(f"{shape.name:<20} {gate:<7} fla {ms:9.4f} ms, {times}")


def compile_without_timing(part=0, parts=1):
    """From here on FLA's tuning launches every candidate once and times none; of several processes that do the same
    each launches its share, and what more it takes until one has run. Before FLA is imported."""
    os.environ["FLA_CACHE_RESULTS"] = "0"  # no choice made here may be kept
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    prune, ran = Autotuner.prune_configs, []

    def share(self, *arguments, **keywords):
        candidates = list(prune(self, *arguments, **keywords))
        self.cache_results = False
        ran.clear()
        yield from candidates[part::parts]
        for candidate in candidates:
            if ran:
                return
            yield candidate

    def launch_once(kernel_call, quantiles=None, **_):
        kernel_call()
        ran.append(True)
        return [1.0] * len(quantiles) if quantiles else 1.0

    driver.active.get_benchmarker = lambda: launch_once
    if parts > 1:
        Autotuner.prune_configs = share


# Run in processes of their own, several for each head count and kind of batch: they compile what FLA's
# tuning will ask for, without timing it, into Triton's cache. The tuning itself is then much shorter.
PREWARM = "from flash_kda.bench import prewarm_fla; prewarm_fla({}, {}, {}, {})"


def prewarm_fla(H, ragged, part=0, parts=1):
    import torch

    compile_without_timing(part, parts)
    chunk_kda, _, _ = load_fla()
    lens = (512, 300, 1024) if ragged else (1024,)
    problem = Prefill(Shape("prewarm", lens, H), CudaClock(torch, torch.cuda.current_device()))
    fla_prefill_call(chunk_kda, problem, 0)
    torch.cuda.synchronize()


def start_prewarm(shapes, code=PREWARM):
    """`code` for every kind of batch, part and number of parts: as many processes as there are cores."""
    kinds = sorted({(s.H, s.ragged) for s in shapes if s.op == "prefill"}, reverse=True)
    parts = max(1, (os.cpu_count() or 1) // max(1, len(kinds)))
    started = []
    for part, kind in itertools.product(range(parts), kinds):
        log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-c", code.format(*kind, part, parts)]
        what = "H {}, ragged {}".format(*kind)
        started.append((what, subprocess.Popen(command, stdout=log, stderr=log), log))
    return started


def finish_prewarm(started, seconds):
    """Waits for what was started: (of what, process, log). Not needed for the result: what fails or takes too long
    is tuned the long way."""
    deadline = time.monotonic() + seconds
    for what, process, log in started:
        try:
            outcome = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            outcome = "out of time"
        if outcome:
            log.seek(0)
            say(f"compiling FLA for {what}: {outcome}; {log.read()[-500:]}")
        log.close()


def peers(bench, shapes, start, processes):
    options = bench.options
    names = {row["name"] for row in bench.rows}
    chosen = [
        shape
        for name in PEER_ROWS
        for shape in shapes
        if shape.name == name and not shape.variant and name in names
    ]
    if processes:
        finish_prewarm(processes, max(1.0, 0.6 * options.peers_budget - (time.monotonic() - start)))
        say(f"prewarming ended after {time.monotonic() - start:.0f} s")
    try:
        fla = load_fla()
    except Exception as error:
        say(f"FLA is left out: {type(error).__name__}: {error}")
        bench.head["versions"]["fla-core"] = None
        return
    bench.head["versions"]["fla-core"] = fla[2]
    for shape in chosen:
        if time.monotonic() - start > options.peers_budget:
            say(f"{shape.name} is not timed with FLA: --peers-budget is used up")
            continue
        with bench.guarded(f"fla {shape.name}"):
            rows = [r for r in bench.rows if r["name"] == shape.name and not r["variant"]]
            peer_row(bench, fla, shape, rows)
        bench.release()
        bench.write()


# ---- records, tables, plots ---------------------------------------------------------------------


def commit():
    """FLASHKDA_COMMIT, or of the working tree that this file lies in; empty outside of one."""
    if os.environ.get("FLASHKDA_COMMIT"):
        return os.environ["FLASHKDA_COMMIT"]
    here = pathlib.Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def short_device(name):
    """'NVIDIA H100 80GB HBM3' is h100, 'NVIDIA GeForce RTX 4090' rtx4090."""
    consumer = re.search(r"\b(RTX|GTX)\s+(PRO\s+)?([A-Z]?\d{4}\w*)", name)
    if consumer:
        return (consumer[1] + consumer[3]).lower()
    model = re.search(r"\b([A-Z]{1,2}\d{1,3}[A-Z]?)\b", name)
    return model[1].lower() if model else re.sub(r"\W+", "-", name).strip("-").lower()


def rounded(x):
    """Six digits are more than any time has. JSON knows no NaN."""
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list) else x


def write_record(path, record):
    """One row a line, so that two records can be compared."""
    path = pathlib.Path(path)
    rows = ",\n".join("  " + json.dumps(rounded(row)) for row in record["rows"])
    head = {key: value for key, value in record.items() if key != "rows"}
    lines = [f" {json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in head.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + ',\n "rows": [\n' + rows + "\n ]\n}\n")


def number(x, form):
    return "" if x is None else format(x, form)


def markdown(record):
    """One table, made from nothing but the record."""
    decode = [row for row in record["rows"] if op_of(row) == "decode"]
    prefill = [row for row in record["rows"] if op_of(row) == "prefill"]
    clocks = record.get("clocks_mhz") or {}
    lines = [
        f"{record['device']}, driver {record.get('driver') or 'unknown'}, SM clock"
        f" {clocks.get('sm', 'unknown')} MHz, copy rate {record['copy_gbps']:.0f} GB/s;"
        f" commit {record.get('commit') or 'unknown'}, {record['date'][:10]}",
    ]
    for rows, title in ((prefill, "prefill"), (decode, "decode")):
        if not rows:
            continue
        special = "of the copy of equal bytes" if title == "decode" else "of the floor's rate"
        lines += [
            "",
            f"| {title} | gate | backend | ms | floor | {special} | FLA | FLA / ours | error o"
            " | error state | FLA's error o | host µs |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            fla = row["peers_ms"].get("fla")
            peer_error = row.get("peers_error", {}).get("fla", {}).get("o")
            best = row.get("copy_ms") or row["floor_ms"]
            cells = [
                " ".join(filter(None, (row["name"], row["variant"]))),
                row["gate"],
                row["backend"],
                number(row["ms"], ".4f"),
                number(row["floor_ms"], ".4f"),
                f"{100 * best / row['ms']:.0f} %",
                number(fla, ".4f"),
                number(fla and fla / row["ms"], ".2f"),
                number(row["error_o"], ".1e"),
                number(row["error_state"], ".1e"),
                number(peer_error, ".1e"),
                number(row.get("host_us"), ".1f"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(record, path):
    """Bars of every backend and gate strength, and of FLA, over each shape's floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys((row["name"], row["variant"]) for row in record["rows"]))
    rows = {
        (row["name"], row["variant"], row["gate"], row["backend"]): row for row in record["rows"]
    }
    backends = list(dict.fromkeys(row["backend"] for row in record["rows"]))
    series = [(f"{name}, {gate} gates", [(gate, name)], "ms") for name in backends for gate in GATES]
    series.append(("FLA", [(gate, name) for gate in reversed(GATES) for name in backends], "fla"))
    figure, axes = plt.subplots(figsize=(max(6, 0.9 * len(names)), 4.5), layout="constrained")
    width = 0.8 / len(series)
    for i, (label, choices, what) in enumerate(series):
        points = []
        for x, name in enumerate(names):
            for choice in choices:
                row = rows.get((*name, *choice))
                ms = row and (row["ms"] if what == "ms" else row["peers_ms"].get("fla"))
                if ms:
                    points.append((x + (i - (len(series) - 1) / 2) * width, ms / row["floor_ms"]))
                    break
        if points:
            axes.bar(*zip(*points), width, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("time / time of moving its bytes once")
    labels = [" ".join(filter(None, name)) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    axes.set_title(f"{record['device']}, copy rate {record['copy_gbps']:.0f} GB/s")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show(record, options):
    if options.markdown:
        text = markdown(record)
        if options.markdown == "-":
            print(text, end="")
        else:
            pathlib.Path(options.markdown).write_text(text)
    if options.plot:
        plot(record, options.plot)


def read_records(paths):
    """One record; of several the rows of all under the head of the first."""
    records = [json.loads(pathlib.Path(path).read_text()) for path in paths]
    return {**records[0], "rows": [row for record in records for row in record["rows"]]}


# ---- command line -------------------------------------------------------------------------------


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="flash_kda.bench", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="all", help="paper, serving, long, decode or all; comma-separated")
    add("--gates", default=",".join(GATES), help="gate strengths of prefill rows (all three)")
    add("--backend", metavar="NAME,...", help="instead of all of the GPU's that can run a row")
    add("--quick", action="store_true", help="strong gates only, 0.1 s a row")
    add("--seconds", type=float, default=0.3, help="of device time for a row (0.3)")
    add("--no-errors", action="store_true", help="no comparison with double precision")
    add("--compare", action="store_true", help="time FLA on some of the rows")
    add("--peers-budget", type=float, default=300, help="seconds; no peer row starts later (300)")
    add("--no-prewarm", action="store_true", help="do not compile FLA's kernels ahead in parallel")
    add("--device", type=int, default=0, help="CUDA device (0)")
    add("--json", metavar="FILE", help="write all rows there")
    add(
        "--json-dir", metavar="DIR", help="write DIR/prefill-<device>.json and decode-<device>.json"
    )
    add("--markdown", metavar="FILE", help="write tables there; - for standard output")
    add("--plot", metavar="FILE", help="write a plot there (needs matplotlib)")
    add("--from", dest="source", nargs="+", metavar="FILE", help="measure nothing; tables of these")
    add("--commit", help="recorded with the result; default: what git says")
    add("--note", default="", help="recorded with the result")
    options = parser.parse_args(arguments)
    options.gates = options.gates.split(",")
    options.backend = options.backend.split(",") if options.backend else []
    if not set(options.gates) <= set(GATES):
        parser.error(f"--gates: expected {', '.join(GATES)}")
    if options.quick:
        options.gates, options.seconds = ["strong"], 0.1
    return options


def run(clock, shapes, options):
    bench = Bench(clock, options)
    begin = time.monotonic()
    bench.ours(shapes)
    bench.write()
    say(f"our rows took {time.monotonic() - begin:.0f} s")
    start, processes = time.monotonic(), []
    if options.compare and not options.no_prewarm:
        timed = [s for s in shapes if s.name in PEER_ROWS]
        processes = start_prewarm(timed)
    with bench.guarded("gold"):
        bench.gold()
    bench.write()
    if options.compare:
        peers(bench, shapes, start, processes)
        say(f"peers took {time.monotonic() - start:.0f} s")
    bench.write()
    return bench


def main(arguments=None):
    options = parse(arguments)
    if options.source:
        options.markdown = options.markdown or (None if options.plot else "-")
        show(read_records(options.source), options)
        return 0
    shapes = shapes_of(options.preset.split(","))
    try:
        import torch
    except ImportError:
        raise SystemExit("flash_kda.bench needs torch with CUDA") from None
    if not torch.cuda.is_available():
        raise SystemExit(
            "flash_kda.bench: torch sees no CUDA device (flashkda bench times the CPU)"
        )
    bench = run(CudaClock(torch, options.device), shapes, options)
    record = bench.record()
    print(markdown(record))
    show(record, options)
    for text in bench.failures:
        print(f"FAILED {text}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
