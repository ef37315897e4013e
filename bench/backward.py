"""Prefill and backward, timed in one process, with the error of every gradient against double precision.

    python bench/backward.py                                          # on the CPU: a table
    python bench/backward.py --json bench/results/backward-cpu.json
    python bench/backward.py --device cuda --compare --json bench/results/backward-h100.json

    python bench/backward.py --device cuda --compare --json FILE --continue     # what is missing in FILE

Wants flash_kda installed, or FLASHKDA built into PYTHONPATH, and NumPy; on a GPU torch, and FLA with --compare.
A record is written row by row. FLA tunes its kernels for each number of heads: --peers-budget says when to stop, and
a later run with --continue, of the same commit on the same device, goes on.

On the CPU a time is the median of --repeat calls after one, and the errors are those of one head. On a GPU `ms` is
the device time of a training step of chunk_kda, forward and backward through autograd with the gradients of
all inputs; `forward_ms` and `backward_ms` are the library's calls alone. Memory is the peak of such a step, its
inputs and gradients included. The errors are those of four heads, and FLA's are of the same inputs. An error is
RMS(x - gold) / RMS(gold), gold being the reference in float64.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import flash_kda
import numpy as np
from flash_kda import bench

SHAPES = [
    dict(T=2048, H=8),
    dict(T=8192, H=8),
    dict(T=2048, H=8, lens=[300, 47, 1048, 63, 271, 319]),
    dict(T=2048, H=8, HV=32),
    dict(T=2048, H=8, gate="softplus"),
]
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
D = 128


# ---- on the CPU -------------------------------------------------------------------------------------


def problem(T, H, HV=None, lens=None, gate="bounded", dtype=np.float32):
    rng = np.random.default_rng(0)
    HV = HV or H

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    x = dict(q=normal(1, T, H, D), k=normal(1, T, H, D), v=normal(1, T, HV, D),
             g=normal(1, T, HV, D) - dtype(2), beta=normal(1, T, HV),
             A_log=normal(HV) * dtype(0.3), dt_bias=normal(HV, D) * dtype(0.3))  # fmt: skip
    options = dict(gate=gate)
    if lens:
        options["cu_seqlens"] = np.concatenate([[0], np.cumsum(lens)]).astype(np.int64)
    return x, normal(1, T, HV, D), options


def forward(x, out, options, **more):
    tokens = [x[n] for n in NAMES[:5]]
    flash_kda.fwd(*tokens, None, out, x["A_log"], x["dt_bias"], None, **options, **more)


def backward(x, d_out, gradients, options, **more):
    tokens = [x[n] for n in NAMES[:5]]
    flash_kda.backward(
        *tokens, None, d_out, x["A_log"], x["dt_bias"], None,
        **{f"d_{n}": d for n, d in gradients.items()}, **options, **more,
    )  # fmt: skip


def median_ms(function, repeat):
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[repeat // 2]


def errors(shape):
    """Of each gradient, on one head of q and k."""
    group = (shape.get("HV") or shape["H"]) // shape["H"]
    x, d_out, options = problem(**{**shape, "H": 1, "HV": group})
    ours = {n: np.empty_like(t) for n, t in x.items()}
    backward(x, d_out, ours, options)
    wide = {n: t.astype(np.float64) for n, t in x.items()}
    gold = {n: np.empty_like(t) for n, t in wide.items()}
    backward(wide, d_out.astype(np.float64), gold, options, backend="reference")
    return {
        f"d_{n}": float(np.sqrt(np.mean((ours[n] - gold[n]) ** 2) / np.mean(gold[n] ** 2)))
        for n in x
    }


def measure(shape, repeat):
    x, d_out, options = problem(**shape)
    out = np.empty_like(x["v"])
    gradients = {n: np.empty_like(t) for n, t in x.items()}
    tokens = sum(shape["lens"]) if "lens" in shape else shape["T"]
    name = f"T{shape['T']}_H{shape['H']}" + ("_ragged" if "lens" in shape else "")
    name += f"_HV{shape['HV']}" if "HV" in shape else ""
    return {
        "name": name, "N": len(shape.get("lens", [0])), "lens": shape.get("lens", [tokens]),
        "H": shape["H"], "HV": shape.get("HV", shape["H"]), "K": D, "V": D, "gate": shape.get("gate", "bounded"),
        "dtype": "f32", "threads": flash_kda.get_num_threads(),
        "forward_ms": round(median_ms(lambda: forward(x, out, options), repeat), 3),
        "ms": round(median_ms(lambda: backward(x, d_out, gradients, options), repeat), 3),
        "errors": errors(shape),
    }  # fmt: skip


def on_the_cpu(args):
    plan = flash_kda.plan(*(problem(16, 1)[0][n] for n in NAMES[:5]), op="backward")
    backend = bench.parse_plan(plan)[0]
    print(f"{backend}, {flash_kda.get_num_threads()} threads")
    print(f"{'':22}{'gate':10}{'forward ms':>12}{'backward ms':>12}{'ratio':>8}{'worst error':>14}")
    rows = []
    for shape in SHAPES:
        row = {**measure(shape, args.repeat), "backend": backend}
        rows.append(row)
        print(f"{row['name']:22}{row['gate']:10}{row['forward_ms']:12.1f}{row['ms']:12.1f}"
              f"{row['ms'] / row['forward_ms']:8.2f}{max(row['errors'].values()):14.1e}")  # fmt: skip
    record = {"commit": bench.commit() or None,
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
              "device": platform.processor() or platform.machine(), "rows": rows}  # fmt: skip
    if args.json:
        bench.write_record(args.json, record)
    return 0


# ---- on a GPU ---------------------------------------------------------------------------------------

GPU_SHAPES = [
    bench.prefill([8192], 32),
    bench.prefill([8192], 96),
    *(
        bench.prefill(lens, H, name)
        for H in (96, 64)
        for lens, name in ((bench.RAGGED6, "ragged6"), ([1024] * 8, None))
    ),
    bench.prefill([16384] + [100] * 40, 32, "16384+40x100"),
]
# Timed with --compare unless --peers says otherwise, in this order while its time lasts.
PEER_ROWS = ("T8192_H32", "T8192_H96", "ragged6_H96", "8x1024_H96")
STATE = "initial_state"
DRAWS = 2  # of inputs with rounding errors
OF_TOKENS = NAMES[:5]


def gradient_bytes(shape):
    """Every input read once and every gradient written once, by a backward."""
    q_k = 2 * shape.H * shape.D * 2
    others = shape.heads * (2 * shape.D + 1) * 2
    d_out = shape.heads * shape.D * 2
    per_token = 2 * (q_k + others) + d_out
    return shape.tokens * per_token + 2 * shape.heads * (1 + shape.D) * 4 + 2 * shape.state_bytes()


class Step(bench.Prefill):
    """A training step: chunk_kda with the gradients of all that goes in, given that of `out`."""

    def __init__(self, shape, clock, backend=None):
        super().__init__(shape, clock, backend)
        self.leaves = []
        for x in self.tensors:
            del x["final"]
            x["d_out"] = self.normal(*x["out"].shape)
            given = {n: x[n] for n in OF_TOKENS} | {"A_log": self.A_log, "dt_bias": self.dt_bias}
            given[STATE] = x["initial"]
            self.leaves.append({n: t.detach().requires_grad_() for n, t in given.items()})
        self.gradients = {f"d_{n}": self.torch.empty_like(t) for n, t in self.leaves[0].items()}
        self.workspace = self.torch.empty(
            workspace_bytes(self.plan()) + 256, dtype=self.torch.uint8, device=clock.device
        )

    def sampled_heads(self):
        last = self.shape.heads - 1
        return sorted({last * i // 3 for i in range(4)})

    def inputs_bytes(self):
        """Of one copy."""
        tensors = (*self.leaves[0].values(), self.tensors[0]["d_out"])
        return sum(t.numel() * t.element_size() for t in tensors)

    def arguments(self, c, middle):
        x = self.leaves[c]
        tokens = (x[n].detach() for n in OF_TOKENS)
        return (
            *tokens, None, middle, self.A_log, self.dt_bias, bench.LOWER_BOUND,
            self.tensors[c]["initial"], None, self.cu_seqlens,
        )  # fmt: skip

    def forward(self, c):
        arguments = self.arguments(c, self.tensors[c]["out"])
        return functools.partial(flash_kda.fwd, *arguments, backend=self.backend)

    def backward(self, c):
        return functools.partial(
            flash_kda.backward, *self.arguments(c, self.tensors[c]["d_out"]), **self.gradients,
            workspace=self.workspace, backend=self.backend,
        )  # fmt: skip

    def plan(self, op="backward"):
        return flash_kda.plan(*self.arguments(0, None), op=op, backend=self.backend)

    def output(self, c, chunk_kda=None):
        """Of copy c; FLA's with its chunk_kda."""
        x = self.leaves[c]
        function = chunk_kda or flash_kda.chunk_kda
        return function(
            **{n: x[n] for n in OF_TOKENS}, A_log=x["A_log"], dt_bias=x["dt_bias"].view(-1),
            initial_state=x[STATE], use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, safe_gate=True, lower_bound=bench.LOWER_BOUND,
            cu_seqlens=self.cu_seqlens, **bench.v_first(function),
        )[0]  # fmt: skip

    def differentiated(self, c, out, **options):
        """The gradients by all inputs of copy c."""
        x = self.leaves[c]
        found = self.torch.autograd.grad(out, list(x.values()), self.tensors[c]["d_out"], **options)
        return dict(zip(x, found))

    def step(self, c, chunk_kda=None):
        return self.differentiated(c, self.output(c, chunk_kda))

    def steps(self, chunk_kda=None):
        return [functools.partial(self.step, c, chunk_kda) for c in range(self.copies)]

    def backwards(self, chunk_kda):
        """The second half of a step, of a graph that is kept."""
        outs = [self.output(c, chunk_kda) for c in range(self.copies)]
        return [
            functools.partial(self.differentiated, c, out, retain_graph=True)
            for c, out in enumerate(outs)
        ]

    def peak_gib(self, clock, chunk_kda=None):
        """Of a step: one copy of the inputs, what it makes of them, and its gradients."""
        if clock.device.type != "cuda":
            return None
        memory = self.torch.cuda
        self.step(0, chunk_kda)
        clock.sync()
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        self.step(0, chunk_kda)
        clock.sync()
        return (memory.max_memory_allocated() - before + self.inputs_bytes()) / 2**30

    def sample(self, chunk_kda=None):
        """Per sampled head the inputs of a step and its gradients, on the CPU."""
        found = self.step(0, chunk_kda)
        x, samples = self.tensors[0], []
        for j in self.sampled_heads():
            one = self.inputs(j) | {"d_out": bench.on_host(x["d_out"][:, :, j : j + 1])}
            for n, d in found.items():
                one[f"d_{n}"] = bench.on_host(d[j : j + 1] if n in ("A_log", "dt_bias")
                                              else d[:, j : j + 1] if n == STATE
                                              else d[:, :, j : j + 1])  # fmt: skip
            samples.append(one)
        return samples

    @staticmethod
    def gold(x):
        """The gradients in double precision, and what they are where operands are rounded to bfloat16 once, as a
        GPU's matrix products take them: off by up to 2**-9 of themselves. Of the latter the squared
        differences only."""
        import torch

        wide = in_double(x)
        generator = torch.Generator().manual_seed(1)
        rounding = dict.fromkeys(wide, 0.0)
        for _ in range(DRAWS):
            y = {
                n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                for n, t in x.items()
            }
            for n in ("q", "k", "v", "d_out", "initial"):
                noise = torch.rand(y[n].shape, generator=generator, dtype=torch.float64)
                y[n] = y[n] * (1 + 2**-9 * (2 * noise - 1))
            for n, d in in_double(y).items():
                rounding[n] += float((d - wide[n]).square().sum()) / DRAWS
        return wide, rounding


def in_double(x):
    import torch

    shapes = {**{n: n for n in NAMES}, STATE: "initial"}
    wide = {
        f"d_{n}": torch.full_like(x[y], torch.nan, dtype=torch.float64) for n, y in shapes.items()
    }
    flash_kda.backward(
        *(x[n] for n in OF_TOKENS), None, x["d_out"], x["A_log"], x["dt_bias"], bench.LOWER_BOUND,
        x["initial"], None, x["cu_seqlens"], **wide, backend="reference",
    )  # fmt: skip
    return wide


def workspace_bytes(plan):
    return int(plan.split("workspace ")[1].split()[0])


def errors_of(samples, golds):
    """Of each gradient."""
    return {
        name: bench.relative_error([(x[name], gold[name]) for x, gold in zip(samples, golds)])
        for name in golds[0]
    }


def worst(found):
    return max(found[f"d_{n}"] for n in OF_TOKENS), max(found[f"d_{n}"] for n in ("A_log", "dt_bias", STATE))  # fmt: skip


FIRST_STEP = """
import time, torch
one = torch.ones(1, device="cuda", requires_grad=True)
torch.autograd.grad(one * 2, one, torch.ones_like(one))  # torch's own first time, imports of its included
q, k, v, g, d = (torch.randn(1, 8192, 32, 128, device="cuda").bfloat16() for _ in range(5))
beta, A_log = torch.randn(1, 8192, 32, device="cuda").bfloat16(), torch.zeros(32, device="cuda")
dt_bias = torch.zeros(32 * 128, device="cuda")
x = [t.requires_grad_() for t in (q, k, v, g, beta, A_log, dt_bias)]
(q.detach() + 1).sum().item()
times = [time.perf_counter()]
import flash_kda
out, _ = flash_kda.chunk_kda(
    q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0, use_qk_l2norm_in_kernel=True,
    use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
)
torch.cuda.synchronize()
times.append(time.perf_counter())
torch.autograd.grad(out, x, d)
torch.cuda.synchronize()
times.append(time.perf_counter())
print(*times)
"""


FIRST_STEP_KEYS = ("first_step_parts_ms", "first_step_ms")


def first_step_ms():
    """Of a process of its own, from `import flash_kda` to the outputs, and on to the gradients; torch, its
    context and its autograd are there."""
    done = subprocess.run([sys.executable, "-c", FIRST_STEP], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    begin, middle, end = map(float, done.stdout.split()[-3:])
    return {"forward": 1e3 * (middle - begin), "backward": 1e3 * (end - middle)}


@contextlib.contextmanager
def forced(backend):
    """chunk_kda has no argument for it."""
    before = os.environ.pop("FLASHKDA_BACKEND", None)
    if backend:
        os.environ["FLASHKDA_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("FLASHKDA_BACKEND", None)
        if before is not None:
            os.environ["FLASHKDA_BACKEND"] = before


class Training(bench.Bench):
    def ours(self, shapes):
        for shape in shapes:
            backends = [None]
            with self.guarded(shape.name):
                backends = bench.backends_of(shape, self.clock, self.options.backend, Step)
            for backend in backends:
                with self.guarded(shape.name), forced(backend):
                    self.rows_of(shape, backend)
                self.release()

    earlier = ()  # rows of a run that this one continues

    def go_on_from(self, path):
        """Takes over what an earlier run has written, which must have measured the same on the same."""
        if not pathlib.Path(path).exists():
            return
        record = json.loads(pathlib.Path(path).read_text())
        for name in ("commit", "device", "driver"):
            if record[name] != self.head[name]:
                raise SystemExit(
                    f"--continue: {path}: {name} {record[name]}, expected {self.head[name]}"
                )
        self.earlier = record["rows"]
        self.head["continued"] = [*record.get("continued", []), record["date"]]
        self.head["versions"] = {**record["versions"], **self.head["versions"]}
        self.head |= {name: record[name] for name in FIRST_STEP_KEYS if name in record}

    def add_first_step(self):
        parts = first_step_ms()
        self.head |= dict(zip(FIRST_STEP_KEYS, (parts, sum(parts.values()))))

    def record(self, op=None):
        """With what the run that this one continues had and this one has not come to yet."""
        record = super().record(op)
        there = {(row["name"], row["gate"], row["backend"]) for row in self.rows}
        later = [x for x in self.earlier if (x["name"], x["gate"], x["backend"]) not in there]
        return {**record, "rows": record["rows"] + later}

    def wants_peer(self, row):
        return (
            self.options.compare
            and row["name"] in self.options.peers
            and "fla" not in row["peers_ms"]
        )

    def rows_of(self, shape, backend):
        problem = None
        for gate in self.options.gates:
            found = [
                row for row in self.earlier
                if (row["name"], row["gate"]) == (shape.name, gate)
                and backend in (None, row["backend"])
            ]  # fmt: skip
            row = found[0] if found else None
            if row and "errors" in row and not self.wants_peer(row):
                self.rows.append(row)
                continue
            problem = problem or Step(shape, self.clock, backend)
            problem.set_gate(gate)
            samples = problem.sample()
            row = row or self.timed(problem, gate)
            self.rows.append(row)
            self.write()
            pairs = self.samples.setdefault(self.key(row), [])
            pairs.append((row, samples))
            if not bench.same_inputs(pairs[0][1], samples):
                raise RuntimeError(
                    f"{row['backend']}: the inputs differ from those of the first backend"
                )

    def timed(self, problem, gate):
        shape, clock, seconds = problem.shape, self.clock, self.options.seconds
        text = problem.plan()
        backend, plan = bench.parse_plan(text)
        forward = bench.parse_plan(problem.plan(op="prefill"))[0]
        row = {
            "name": shape.name, "op": "backward", "N": shape.N, "lens": list(shape.lens), "H": shape.H,
            "HV": shape.heads, "K": shape.D, "V": shape.D, "gate": gate, "backend": backend,
            "forward_backend": forward, "variant": shape.variant, "dtype": "bf16", "plan": plan,
            "ms": clock.calls(problem.steps(), seconds),
            "forward_ms": clock.calls([problem.forward(c) for c in range(problem.copies)], seconds),
            "backward_ms": clock.calls([problem.backward(c) for c in range(problem.copies)], seconds),
            "floor_ms": (shape.bytes() + gradient_bytes(shape)) / self.copy_gbps / 1e6,
            "peers_ms": {}, "error_o": None, "error_state": None,
            "peak_gib": problem.peak_gib(clock), "workspace_bytes": workspace_bytes(text),
            "host_us": bench.host_us(clock, problem.steps()[0], 5.0),
        }  # fmt: skip
        bench.say(
            f"{row['name']:<20} {gate:<7} {backend:<10} step {row['ms']:8.3f} ms, forward"
            f" {row['forward_ms']:.3f}, backward {row['backward_ms']:.3f}, floor {row['floor_ms']:.3f}"
        )
        return row

    def gold(self):
        tasks = [(key, x) for key, pairs in self.samples.items() for x in pairs[0][1]]
        order = sorted(
            range(len(tasks)), key=lambda i: -max(self.samples[tasks[i][0]][0][0]["lens"])
        )
        begin = time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = dict(zip(order, pool.map(lambda i: Step.gold(tasks[i][1]), order)))
        rounded = {}
        for i, (key, _) in enumerate(tasks):
            self.golds.setdefault(key, []).append(made[i][0])
            rounded.setdefault(key, []).append(made[i][1])
        for key, pairs in self.samples.items():
            rounding = {
                name: math.sqrt(
                    sum(x[name] for x in rounded[key])
                    / sum(float(gold[name].square().sum()) for gold in self.golds[key])
                )
                for name in rounded[key][0]
            }
            for row, samples in pairs:
                row["errors"] = errors_of(samples, self.golds[key])
                row["rounding"] = rounding
                row["error_o"], row["error_state"] = worst(row["errors"])
                for name, x in row["errors"].items():
                    # As in tests/cases/verify.c: a sum that cancels, as d_A_log, has more than its operands.
                    if not x <= max(bench.ERROR_LIMIT, 4 * rounding[name]):
                        what = " ".join((*key, row["backend"]))
                        self.failures.append(f"{what}: {name} {x:.2e}")
        bench.say(f"gold of {len(tasks)} heads took {time.monotonic() - begin:.1f} s")

    def write(self):
        if self.options.json:
            bench.write_record(self.options.json, self.record())

    def peer(self, chunk_kda, shape):
        clock, seconds = self.clock, self.options.seconds
        rows = [row for row in self.rows if row["name"] == shape.name and self.wants_peer(row)]
        problem = Step(shape, clock)
        begin = time.perf_counter()
        problem.step(0, chunk_kda)
        clock.sync()
        bench.say(f"{shape.name}: FLA's first step took {time.perf_counter() - begin:.1f} s")
        for gate in dict.fromkeys(row["gate"] for row in rows):
            problem.set_gate(gate)
            samples = problem.sample(chunk_kda)
            ms = clock.calls(problem.steps(chunk_kda), seconds)
            alone = clock.calls(problem.backwards(chunk_kda), seconds)
            peak = problem.peak_gib(clock, chunk_kda)
            mine = [row for row in rows if row["gate"] == gate]
            key = self.key(mine[0])
            for row in mine:
                row["peers_ms"]["fla"] = ms
                row["peers_backward_ms"] = {"fla": alone}
                row["peers_peak_gib"] = {"fla": peak}
            if key in self.golds:
                if not bench.same_inputs(self.samples[key][0][1], samples):
                    raise RuntimeError("the inputs differ from those that ours ran on")
                found = errors_of(samples, self.golds[key])
                o, state = worst(found)
                for row in mine:
                    row["peers_errors"] = {"fla": found}
                    row["peers_error"] = {"fla": {"o": o, "state": state}}
            bench.say(f"{shape.name:<20} {gate:<7} fla step {ms:8.3f} ms, backward {alone:.3f}")

    def peer_shapes(self, shapes):
        wanted = {row["name"] for row in self.rows if self.wants_peer(row)}
        names = [name for name in self.options.peers if name in wanted]
        return [shape for name in names for shape in shapes if shape.name == name]

    def peers(self, chosen, start, processes):
        if processes:
            budget = 0.6 * self.options.peers_budget
            bench.finish_prewarm(processes, max(1.0, budget - (time.monotonic() - start)))
            bench.say(f"prewarming ended after {time.monotonic() - start:.0f} s")
        try:
            chunk_kda, _, version = bench.load_fla()
        except Exception as error:
            bench.say(f"FLA is left out: {type(error).__name__}: {error}")
            self.head["versions"]["fla-core"] = None
            return
        self.head["versions"]["fla-core"] = version
        for shape in chosen:
            if time.monotonic() - start > self.options.peers_budget:
                bench.say(f"{shape.name} is not timed with FLA: --peers-budget is used up")
                continue
            with self.guarded(f"fla {shape.name}"), bench.ours_forbidden():
                self.peer(chunk_kda, shape)
            self.release()
            self.write()


# As in flash_kda.bench: compiled ahead, in processes of their own, what FLA's tuning will ask for.
HERE = os.path.dirname(os.path.abspath(__file__))
PREWARM = f"import sys; sys.path.insert(0, {HERE!r}); import backward; "
PREWARM += "backward.prewarm_fla({}, {}, {}, {})"


def prewarm_fla(H, ragged, part, parts):
    import torch

    bench.compile_without_timing(part, parts)
    chunk_kda, _, _ = bench.load_fla()
    lens = (512, 300, 1024) if ragged else (1024,)
    clock = bench.CudaClock(torch, torch.cuda.current_device())
    Step(bench.Shape("prewarm", lens, H), clock).step(0, chunk_kda)
    torch.cuda.synchronize()


def run(clock, shapes, options):
    training = Training(clock, options)
    if options.go_on:
        training.go_on_from(options.json)
    if clock.device.type == "cuda" and not all(name in training.head for name in FIRST_STEP_KEYS):
        with training.guarded("first step"):
            training.add_first_step()
    begin = time.monotonic()
    training.ours(shapes)
    training.write()
    bench.say(f"our rows took {time.monotonic() - begin:.0f} s")
    start, processes = time.monotonic(), []
    chosen = training.peer_shapes(shapes)
    if chosen and not options.no_prewarm:
        processes = bench.start_prewarm(chosen, PREWARM)
    with training.guarded("gold"):
        training.gold()
    training.write()
    if chosen:
        training.peers(chosen, start, processes)
        bench.say(f"peers took {time.monotonic() - start:.0f} s")
        training.write()
    return training


def on_a_gpu(args):
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    shapes = [s for s in GPU_SHAPES if args.rows is None or s.name in args.rows.split(",")]
    training = run(bench.CudaClock(torch, 0), shapes, args)
    for row in training.rows:
        fla = row["peers_ms"].get("fla")
        theirs = row.get("peers_errors", {}).get("fla", {})
        print(
            f"{row['name']:<18}{row['gate']:<8}{row['backend']:<10}{row['ms']:8.3f} ms"
            f"  forward {row['forward_ms']:.3f}  backward {row['backward_ms']:.3f}"
            f"  peak {row['peak_gib']:.2f} GiB"
            + (f"  FLA {fla:.3f} ms, {row['peers_peak_gib']['fla']:.2f} GiB" if fla else "")
        )
        for name, x in row.get("errors", {}).items():
            beside = f", FLA {theirs[name]:.1e}" if name in theirs else ""
            more = "  MORE" if x > theirs.get(name, x) else ""
            print(f"    {name:<18}{x:.1e}{beside}{more}")
    print(f"first step: {training.head.get('first_step_parts_ms')} ms")
    for text in training.failures:
        print(f"FAILED {text}")
    return 1 if training.failures else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--repeat", type=int, default=7, help="on the CPU: calls")
    add("--json", help="write a record")
    add("--seconds", type=float, default=0.2, help="on a GPU: of device time for each time (0.2)")
    add("--gates", default=",".join(bench.GATES), help="on a GPU: gate strengths (all three)")
    add("--rows", metavar="NAME,...", help="on a GPU: only these, as T8192_H32")
    add("--backend", metavar="NAME,...", help="on a GPU: forced, forward too (all that can)")
    add("--compare", action="store_true", help="on a GPU: FLA on some of the rows")
    add(
        "--peers",
        metavar="NAME,...",
        default=",".join(PEER_ROWS),
        help="on a GPU: rows that FLA runs (%(default)s)",
    )
    add("--peers-budget", type=float, default=400, help="seconds; no peer row starts later (400)")
    add(
        "--continue",
        dest="go_on",
        action="store_true",
        help="on a GPU: only what --json FILE does not have",
    )
    add("--no-prewarm", action="store_true", help="do not compile FLA's kernels ahead in parallel")
    add("--commit", help="recorded with the result; default: what git says")
    add("--note", default="", help="recorded with the result")
    args = parser.parse_args()
    args.gates, args.peers = args.gates.split(","), args.peers.split(",")
    for name in [*args.peers, *(args.rows.split(",") if args.rows else [])]:
        if name not in (shape.name for shape in GPU_SHAPES):
            parser.error(f"{name}: expected rows of " + ", ".join(s.name for s in GPU_SHAPES))
    if args.go_on and not args.json:
        parser.error("--continue: expected --json FILE with it")
    args.backend = args.backend.split(",") if args.backend else []
    return on_the_cpu(args) if args.device == "cpu" else on_a_gpu(args)


if __name__ == "__main__":
    sys.exit(main())
