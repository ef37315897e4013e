#!/usr/bin/env python3
"""Times this machine's CPU kernels and their peers; writes bench/results/cpu-<isa>.json.

Ours is timed by `flashkda bench`, in processes of its own and in rounds: a few hundred milliseconds each of one thread, of all
threads and of what the machine can do on as many (OpenBLAS's sgemm, reading and writing memory), in
turn. Ratios are formed inside a round, so that a machine whose speed drifts, or a neighbour who is busy
for a while, meets both sides of them alike. The processes of the main shapes go round several times too. Recorded are the medians
over all rounds, of the ratios too, with every round's number beside them.

The peers are what transformers itself runs for Kimi Linear where no kernel package is installed: the
chunk form and the token loop in PyTorch. They get what their model gives them (activated gates in fp32,
beta after its sigmoid, K-first states), made outside of the time that is taken, and their results
must agree with ours on the same inputs.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Arguments of `flashkda bench`. MAIN is timed every time around; DECODE the first and the last time; OTHER once.
PREFILL = "--T 4096 --heads 32"
ONE_HEAD = "--T 16384 --heads 1"
MAIN = [f"{shape} --gate {gate}" for shape in (PREFILL, ONE_HEAD) for gate in ("weak", "strong")]
DECODE = "--preset decode"
OTHER = [
    f"{PREFILL} --gate medium",
    f"{PREFILL} --gate weak --dtype float32",
    f"{PREFILL} --gate strong --dtype float32",
    "--T 4096 --heads 8 --value-heads 32 --gate strong",
    "--lens 1300,547,2048,963,271,3063 --heads 8 --gate medium",
    f"{PREFILL} --gate weak --backend cpu-avx2",
    f"{PREFILL} --gate weak --backend cpu-scalar",
]
# With the peers. Their chunk form holds [H, T/64, 64, 64, K] floats three times over, 3 GB at T 1024.
BESIDE_PEERS = ["--T 1024 --heads 32 --gate weak", "--T 1024 --heads 32 --gate strong"]
PEER_PREFILLS = [(1024, "weak"), (1024, "strong"), (4096, "weak")]
PEER_LONGEST = {"transformers_chunk": 1024}
PEER_PATIENCE = 8.0  # seconds a call; a token loop on a busy machine can take minutes
PEER_DECODES = [1, 64]
HEADS, DIM, LOWER_BOUND = 32, 128, -5.0

# RMS difference to ours: fp32 states, and outputs of which few round to different bf16 numbers.
AGREE_OUT, AGREE_STATE = 1e-3, 2e-5


def say(text):
    print(f"[{time.monotonic() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


def git(*arguments):
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip()


def commit():
    """Of the working tree; "-dirty" where something that the command line is built from differs."""
    built_from = "CMakeLists.txt cmake include src tools tests/cases".split()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *built_from)
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


# ---- ours ---------------------------------------------------------------------------------------


class Ours:
    """Results of `flashkda bench`, put together."""

    def __init__(self, tool):
        self.tool = tool
        self.rows = {}  # key: what each process said
        self.first = None  # of the machine

    def bench(self, arguments, seconds, rounds, check):
        say(f"flashkda bench {arguments}")
        command = [self.tool, "bench", *arguments.split(), "--seconds", str(seconds)]
        command += ["--rounds", str(rounds)] + ([] if check else ["--no-check"])
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "rows.json"
            done = subprocess.run([*command, "--json", str(path)], stdout=subprocess.DEVNULL)
            if done.returncode:
                sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
            result = json.loads(path.read_text())
        self.first = self.first or result
        for row in result["rows"]:
            key = tuple(row[x] for x in ("name", "gate", "variant", "backend", "threads"))
            self.rows.setdefault(key, []).append(row)

    def finished(self):
        return [merged(rows) for rows in self.rows.values()]

    def rates(self, name):
        """{threads: median of that yardstick over all rounds of all rows}"""
        found = {}
        for row in (row for rows in self.rows.values() for row in rows):
            found.setdefault(row["threads"], []).extend(row[f"{name}_rounds"])
        return {n: statistics.median(x) for n, x in found.items() if x}


SERIES = ("ms", "sgemm_gflops", "sgemm_ratio", "memory_gbps", "memory_ratio", "speedup")


def merged(rows):
    """One row of several processes: every round of each, the medians of all, and of ratios the quartiles."""
    row = {key: x for key, x in rows[0].items() if not key.endswith("_rounds")}
    for name in SERIES:
        rounds = [x for one in rows for x in one[f"{name}_rounds"]]
        row[name] = statistics.median(rounds) if rounds else None
        if rounds:
            row[f"{name}_rounds"] = rounds
        if len(rounds) > 1 and name in ("sgemm_ratio", "memory_ratio", "speedup"):
            low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
            row[f"{name}_quartiles"] = [low, high]
    work = "state_gbps" if row["op"] == "decode" else "gflops"
    row[work] *= rows[0]["ms"] / row["ms"]
    if row["memory_ratio"]:
        row["floor_ms"] = row["memory_ratio"] * row["ms"]
    return row


def available(tool, name):
    """Can this machine run that backend?"""
    done = subprocess.run([tool, "info", "--json"], capture_output=True, text=True, check=True)
    return any(x["name"] == name and x["available"] for x in json.loads(done.stdout)["backends"])


def numpy_sgemm(threads):
    """The same product through NumPy's own OpenBLAS, in a process of its own: a second witness."""
    text = (
        "import numpy, time\n"
        "a, b = numpy.random.default_rng(7).random((2, 2048, 2048), dtype='f') - 0.5\n"
        "c, times = a @ b, []\n"
        "for _ in range(9):\n"
        "    begin = time.perf_counter(); numpy.matmul(a, b, out=c)\n"
        "    times.append(time.perf_counter() - begin)\n"
        "print(2 * 2048**3 / sorted(times)[4] / 1e9)\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    environment.pop("OPENBLAS_CORETYPE", None)
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


# ---- peers --------------------------------------------------------------------------------------


def load_peers():
    # No kernel from a hub, no model: the functions of the module are what is timed.
    os.environ.update(HF_HUB_OFFLINE="1", USE_HUB_KERNELS="0", TRANSFORMERS_VERBOSITY="error")
    import torch
    import transformers
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    torch.set_grad_enabled(False)
    functions = {
        "transformers_chunk": kimi.chunk_kimi_delta_attention,
        "transformers_recurrent": kimi.recurrent_kimi_delta_attention,
    }
    return functions, {"transformers": transformers.__version__, "torch": torch.__version__}


def timed(function, seconds):
    """Its first result, then the median of further runs: three at least, but of very slow ones one."""
    result = function()
    times, begin = [], time.perf_counter()
    while not times or (spent := time.perf_counter() - begin) < seconds or (
        len(times) < 3 and spent < 15
    ):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return result, statistics.median(times)


def difference(x, y):
    x, y = x.double(), y.double()
    return ((x - y).square().mean().sqrt() / y.square().mean().sqrt()).item()


def peer_prefill(tool, functions, T, gate, threads, seconds):
    """{peer: (ms, difference in o, in the state)} on one file's inputs, which ours runs on too."""
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as directory:
        source, target = (str(pathlib.Path(directory) / x) for x in ("in", "out"))
        size = f"--lens {T} --heads {HEADS} --dim {DIM} --gate {gate} --initial-state"
        for command in (["make", *size.split(), "-o", source], ["run", source, "-o", target]):
            subprocess.run([tool, *command], stdout=subprocess.DEVNULL, check=True)
        x, ours = load_file(source), load_file(target)
    rate = x["A_log"].float().exp().view(-1, 1)
    arguments = (
        *(x[name] for name in "qkv"),
        LOWER_BOUND * torch.sigmoid(rate * (x["g"].float() + x["dt_bias"].float())),
        torch.sigmoid(x["beta"].float()),
    )
    options = dict(
        initial_state=x["initial_state"].transpose(-1, -2).contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    torch.set_num_threads(threads)
    results = {}
    for name, function in functions.items():
        if T > PEER_LONGEST.get(name, T):
            continue
        say(f"{name}, T {T}, {gate} gates, {threads} threads")
        (out, state), ms = timed(lambda: function(*arguments, **options), seconds)
        state = state.transpose(-1, -2)
        results[name] = (ms, difference(out, ours["out"]), difference(state, ours["final_state"]))
    return results


def peer_decode(functions, N, threads, seconds):
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = (N, 1, HEADS, DIM)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(3))
    g, beta = -torch.rand(shape), torch.rand(shape[:3])
    state = torch.randn(N, HEADS, DIM, DIM)
    function = functions["transformers_recurrent"]
    say(f"transformers_recurrent, decode of {N}, {threads} threads")
    options = dict(initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    return timed(lambda: function(q, k, v, g, beta, **options), seconds)[1]


def add_peers(rows, tool, backend, threads, seconds):
    """Fills peers_ms of the rows of that shape on all threads. True if all agree with ours."""
    functions, versions = load_peers()
    agree, taken = True, {}

    def find(name, gate):
        for row in rows:
            plain = (row["variant"], row["backend"], row["threads"]) == ("", backend, threads)
            if plain and row["name"] == name and gate in (None, row["gate"]):
                return row
        sys.exit(f"no row {name}, {gate} gates, {backend}, {threads} threads")

    for T, gate in PEER_PREFILLS:
        row = find(f"T{T}_H{HEADS}", gate)
        slow = [x["transformers_recurrent"] * T / y for y, x in taken.items() if y < T]
        if any(ms > 1e3 * PEER_PATIENCE for ms in slow):
            say(f"T {T} of the peers left out: it would take {max(slow) / 1e3:.0f} s a call")
            continue
        results = peer_prefill(tool, functions, T, gate, threads, seconds)
        row["peers_ms"] = taken[T] = {name: x[0] for name, x in results.items()}
        row["peers_difference"] = {name: {"o": x[1], "state": x[2]} for name, x in results.items()}
        for name, (_, out, state) in results.items():
            if not (out <= AGREE_OUT and state <= AGREE_STATE):
                print(f"{name}, T {T}, {gate}: differs from ours by {out:.1e}, {state:.1e}")
                agree = False
    for N in PEER_DECODES:
        row = find(f"decode_N{N}_T1_H{HEADS}", None)
        row["peers_ms"] = {"transformers_recurrent": peer_decode(functions, N, threads, seconds)}
    return agree, versions


# ---- the record ---------------------------------------------------------------------------------


def rounded(x):
    """Five digits are more than any time has."""
    if isinstance(x, float):
        return float(f"{x:.5g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list) else x


def write(path, record):
    """One row a line, so that two records can be compared."""
    rows = ",\n".join("  " + json.dumps(rounded(row)) for row in record["rows"])
    head = {key: value for key, value in record.items() if key != "rows"}
    lines = [f" {json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in head.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + ',\n "rows": [\n' + rows + "\n ]\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", default=str(ROOT / "build/release/flashkda"))
    parser.add_argument("--times", type=int, default=3, help="to go round the main shapes (3)")
    parser.add_argument("--rounds", type=int, default=5, help="of a row in a process (5)")
    parser.add_argument("--seconds", type=float, default=0.8, help="for a row's rounds (0.8)")
    parser.add_argument("--no-peers", action="store_true", help="do not time transformers")
    parser.add_argument("--note", default="", help="recorded with the result")
    parser.add_argument("-o", "--output", help="instead of bench/results/cpu-<isa>.json")
    options = parser.parse_args()

    load_before = os.getloadavg()[0]
    if load_before > 0.5:
        say(f"the machine is busy (load {load_before:.1f}): do not record this as its speed")
    ours = Ours(options.tool)
    for index in range(options.times):
        for arguments in MAIN:
            ours.bench(arguments, options.seconds, options.rounds, check=index == 0)
        if index in (0, options.times - 1):
            ours.bench(DECODE, options.seconds, options.rounds, check=index == 0)
    backend = ours.first["rows"][0]["backend"]  # the machine's best: nothing else was asked for so far
    for arguments in OTHER + BESIDE_PEERS:
        name = arguments.partition("--backend ")[2]
        if not name or (name != backend and available(options.tool, name)):
            ours.bench(arguments, options.seconds, options.rounds, check=True)

    rows, sgemm, memory = ours.finished(), ours.rates("sgemm_gflops"), ours.rates("memory_gbps")
    threads = max(row["threads"] for row in rows)
    numpy_rates = {n: numpy_sgemm(n) for n in sgemm}
    agree, versions = True, {}
    if not options.no_peers:
        agree, versions = add_peers(rows, options.tool, backend, threads, 2 * options.seconds)
    for n, rate in numpy_rates.items():
        if n in sgemm and rate > 1.15 * sgemm[n]:
            say(f"NumPy's sgemm is faster on {n} threads: {rate:.0f} against {sgemm[n]:.0f} GFLOP/s")
    first = ours.first
    record = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": first["version"],
        "device": first["device"],
        "machine": first["machine"],
        "cpus": first["cpus"],
        "driver": None,
        "clocks_mhz": {},
        "copy_gbps": memory.get(threads),
        "memory_gbps": memory,
        "sgemm_gflops": sgemm,
        "sgemm_gflops_numpy": numpy_rates,
        "blas": {"core": first["openblas_core"], "config": first["openblas_config"]},
        "peers": versions,
        "rounds": options.rounds,
        "times": options.times,
        "load": [load_before, os.getloadavg()[0]],
        "note": options.note,
        "rows": rows,
    }
    path = pathlib.Path(options.output or ROOT / f"bench/results/{backend}.json")
    write(path, record)
    say(f"wrote {path}")
    return 0 if agree else 1


if __name__ == "__main__":
    START = time.monotonic()
    sys.exit(main())
