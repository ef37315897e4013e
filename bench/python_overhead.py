#!/usr/bin/env python3
"""What a call from Python costs beyond the C call that it makes.

Method: the same call is made n times from a Python loop, and n times from a C loop inside the extension
(`_C._time_calls`, which builds the argument struct once and calls fkda_prefill or fkda_decode with it).
The difference of the two, less the Python loop itself, is the overhead: matching the arguments, reading
the tensors, releasing the GIL, keeping the workspace. The two loops alternate, and of each the fastest of
`--repeats` rounds of about a millisecond is taken: other work on the machine can only add to it, and
some rounds are too short to meet any. The garbage collector is off, as in timeit. The problem is tiny (no
tokens, or one token of one small head on one thread) so that the kernel's own time does not drown the
difference. On CUDA the C call returns when the kernel is queued; rounds are short enough that the queue
never fills, and each begins with the device idle.

The functions that allocate their results (chunk_kda, fused_recurrent_kda; gradients off) are compared with the
C call on results that exist, and the time that torch takes to allocate them is said too.
"""

import argparse
import datetime
import gc
import json
import pathlib
import platform
import subprocess
import time

import flash_kda
import numpy as np
from flash_kda import _C


def problems(library):
    def zeros(*shape):
        return library(np.zeros(shape, np.float32))

    for name, T in (("prefill T=0", 0), ("prefill T=1", 1)):
        q, k, v, g, out = (zeros(1, T, 1, 64) for _ in range(5))
        yield (
            f"{name}, 6 tensors",
            "fwd",
            (q, k, v, g, zeros(1, T, 1), None, out, None, None, None),
            {},
        )
        yield (
            f"{name}, as FLA calls it, 11 tensors",
            "fwd",
            (q, k, v, g, zeros(1, T, 1), 0.125, out),
            dict(
                A_log=zeros(1),
                dt_bias=zeros(1, 64),
                lower_bound=-5.0,
                initial_state=zeros(1, 1, 64, 64),
                final_state=zeros(1, 1, 64, 64),
                cu_seqlens=library(np.array([0, T])),
            ),
        )
    q, k, v, g, out = (zeros(1, 1, 1, 64) for _ in range(5))
    index = library(np.zeros(1, np.int32))
    state = zeros(4, 1, 64, 64)
    yield (
        "decode, pool, 8 tensors",
        "decode",
        (q, k, v, g, zeros(1, 1, 1), state, out),
        dict(state_indices=index),
    )


def torch_problems(convert):
    """(text, function, arguments, keywords, what the C loop calls instead: name, arguments, keywords; what
    is allocated): functions that allocate their results and then make that call."""
    import torch

    def zeros(*shape):
        return convert(np.zeros(shape, np.float32))

    H, D = 1, 64
    for function, T, c_name in (
        (flash_kda.chunk_kda, 0, "fwd"),
        (flash_kda.chunk_kda, 1, "fwd"),
        (flash_kda.fused_recurrent_kda, 1, "decode"),
    ):
        q, k, v, g, out = (zeros(1, T, H, D) for _ in range(5))
        common = (q, k, v, g, zeros(1, T, H))
        gate = dict(A_log=zeros(H), dt_bias=zeros(H, D), lower_bound=-5.0)
        state, final = (
            torch.zeros(1, H, D, D, dtype=torch.float32, device=q.device) for _ in range(2)
        )
        flags = dict(
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, state_v_first=True,
        )  # fmt: skip
        c_call = ((*common, None, out), dict(initial_state=state, final_state=final, **gate))
        if c_name == "decode":
            c_call = ((*common, final, out), dict(initial_state=state, **gate))
        yield (
            f"{function.__name__} T={T}, 8 tensors, 2 results",
            function,
            common,
            dict(initial_state=state, output_final_state=True, **gate, **flags),
            (c_name, *c_call),
            (out, final),
        )


def python_loop(function, arguments, keywords):
    """A function that makes the call n times, written out as a caller would write it, and says how long it took."""
    given = [f"a{i}" for i in range(len(arguments))] + [f"{name}={name}" for name in keywords]
    names = dict(function=function, clock=time.perf_counter, **keywords)
    names.update((f"a{i}", x) for i, x in enumerate(arguments))
    text = f"""
def loop(n, {", ".join(f"{name}={name}" for name in names)}):
    begin = clock()
    for _ in range(n):
        function({", ".join(given)})
    return clock() - begin
"""
    exec(text, names)
    return names["loop"]


CUDA_CALLS = 200  # in a round: fewer than a stream's queue holds


def allocation(results):
    """Microseconds that torch takes to allocate what is like these, one after the other."""
    import torch

    loops = [python_loop(torch.empty_like, (x,), {}) for x in results]
    return 1e6 * min(sum(loop(100) for loop in loops) for _ in range(500)) / 100


def measure(function, arguments, keywords, c_name, c_arguments, c_keywords, n, repeats, wait):
    whole, c_call, loop = [], [], []
    python = python_loop(function, arguments, keywords)
    python(n)
    for _ in range(repeats):
        wait()
        whole.append(python(n) / n)
        wait()
        c_call.append(_C._time_calls(n, c_name, *c_arguments, **c_keywords) / n)
        begin = time.perf_counter()
        for _ in range(n):
            pass
        loop.append((time.perf_counter() - begin) / n)
    whole, c_call, loop = (1e6 * min(x) for x in (whole, c_call, loop))
    return {
        "python_us": round(whole, 3),
        "c_us": round(c_call, 3),
        "overhead_us": round(whole - c_call - loop, 3),
    }


def processor():
    """The processor's name as the kernel gives it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def commit():
    """Of the working tree that this file lies in; empty outside of one."""
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=100, help="calls in a round")
    parser.add_argument("--repeats", type=int, default=1000, help="rounds")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    options = parser.parse_args()

    gc.disable()
    flash_kda.set_num_threads(1)
    libraries = {"numpy": lambda a: a}
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    try:
        import torch

        libraries = {"torch": torch.from_numpy, **libraries}
        versions["torch"] = torch.__version__
        if torch.cuda.is_available() and any(
            available and not name.startswith(("cpu-", "reference"))
            for name, available, _ in flash_kda.backends()
        ):
            libraries["torch cuda"] = lambda a: torch.from_numpy(a).to(
                "cuda", torch.bfloat16 if a.dtype == np.float32 else None
            )
            versions["gpu"] = torch.cuda.get_device_name()
    except ImportError:
        print("torch is not installed: NumPy only")

    rows = []
    print(f"{'':>10}{'call':<44}{'Python':>10}{'C':>10}{'overhead':>10}  (us a call)")
    for library, convert in libraries.items():
        cuda = library == "torch cuda"
        cases = [
            (text, getattr(flash_kda, name), arguments, keywords, (name, arguments, keywords), ())
            for text, name, arguments, keywords in problems(convert)
        ]
        if library != "numpy":
            torch.set_grad_enabled(False)
            cases += torch_problems(convert)
        for text, function, arguments, keywords, c_call, results in cases:
            result = measure(
                function,
                arguments,
                keywords,
                *c_call,
                min(options.calls, CUDA_CALLS) if cuda else options.calls,
                options.repeats,
                torch.cuda.synchronize if cuda else lambda: None,
            )
            if results:
                result["allocation_us"] = round(allocation(results), 3)
            rows.append({"library": library, "name": text, **result})
            print(
                f"{library:>10}{'  ' + text:<44}{result['python_us']:>10.2f}{result['c_us']:>10.2f}"
                f"{result['overhead_us']:>10.2f}"
                + (f", {result['allocation_us']:.2f} of it allocation" if results else "")
            )
    if options.json:
        recorded = {
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "version": flash_kda.__version__,
            "versions": versions,
            "device": processor(),
            "rows": rows,
        }
        with open(options.json, "w") as file:
            json.dump(recorded, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
