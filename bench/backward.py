"""Prefill and backward on the CPU, timed in one process, with their errors against double precision.

    python bench/backward.py                                          # a table
    python bench/backward.py --json bench/results/backward-cpu.json

Wants flash_kda installed, or FLASHKDA built into PYTHONPATH; NumPy. A time is the median of --repeat calls after one. The
error of a gradient is RMS(x - gold) / RMS(gold), gold being the reference in float64 on one head.
"""

import argparse
import datetime
import json
import platform
import subprocess
import time

import flash_kda
import numpy as np

SHAPES = [
    dict(T=2048, H=8),
    dict(T=8192, H=8),
    dict(T=2048, H=8, lens=[300, 47, 1048, 63, 271, 319]),
    dict(T=2048, H=8, HV=32),
    dict(T=2048, H=8, gate="softplus"),
]
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
D = 128


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
    """Largest over the gradients, on one head of q and k."""
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


def git(*arguments):
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", help="write a record")
    args = parser.parse_args()
    plan = flash_kda.plan(*(problem(16, 1)[0][n] for n in NAMES[:5]), op="backward")
    backend = next(line.split()[1] for line in plan.splitlines() if line.startswith("backend:"))
    print(f"{backend}, {flash_kda.get_num_threads()} threads")
    print(f"{'':22}{'gate':10}{'forward ms':>12}{'backward ms':>12}{'ratio':>8}{'worst error':>14}")
    rows = []
    for shape in SHAPES:
        row = {**measure(shape, args.repeat), "backend": backend}
        rows.append(row)
        print(f"{row['name']:22}{row['gate']:10}{row['forward_ms']:12.1f}{row['ms']:12.1f}"
              f"{row['ms'] / row['forward_ms']:8.2f}{max(row['errors'].values()):14.1e}")  # fmt: skip
    if args.json:
        record = {"commit": git("rev-parse", "--short=12", "HEAD"),
                  "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                  "device": platform.processor() or platform.machine(), "rows": rows}  # fmt: skip
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
