"""What is on this machine, and what this package would do with it.

    python -m flash_kda.env            to read, and to put into a report of a problem
    python -m flash_kda.env --json     the same for programs

Needs nothing but the package: with NumPy it also says which backend CPU tensors would get and why, with a CUDA
build of torch and a GPU which one CUDA tensors would get.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import pathlib
import platform
import re

import flash_kda

# Whom tensors may come from, and who may call.
PACKAGES = (
    "numpy", "ml-dtypes", "torch", "triton", "cupy", "jax", "fla-core", "flash-linear-attention",
    "transformers", "sglang", "vllm",
)  # fmt: skip
SWITCHES = (
    "FLASHKDA_BACKEND", "FLASHKDA_CPU_ISA", "FLASHKDA_NUM_THREADS", "FLASHKDA_LOG",
    "FLA_FLASH_KDA", "FLA_DISABLE_BACKEND_DISPATCH", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
# What the CPU kernels ask for.
FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "asimd",
    "bf16",
)  # fmt: skip
# cuDeviceGetAttribute()
_MAJOR, _MINOR = 75, 76


def packages() -> dict[str, str | None]:
    """Versions; None: not installed."""
    found = {}
    for one in importlib.metadata.distributions():
        name = (one.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("cupy-cuda"):
            name = "cupy"
        found.setdefault(name, one.version)  # the first on the path is what gets imported
    return {name: found.get(name) for name in PACKAGES}


def _lines(path):
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def cpu() -> dict:
    """The processor, of its features those that kernels use, and the threads that calls may use."""
    fields = {}
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "features": [x for x in FEATURES if x in flags],
        "threads": flash_kda.get_num_threads(),
    }


def cuda() -> dict:
    """Driver and devices as the driver itself tells them; `problem` says what is missing."""
    version = [re.search(r"\b\d{3}(\.\d+)+\b", x) for x in _lines("/proc/driver/nvidia/version")]
    result = {"driver": next((x[0] for x in version if x), None), "version": None, "devices": []}
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as problem:
        return {**result, "problem": str(problem)}
    number, name = ctypes.c_int(), ctypes.create_string_buffer(256)

    def ask(function, *arguments):
        status = getattr(driver, function)(ctypes.byref(number), *arguments)
        if status:
            raise RuntimeError(f"{function}: error {status}")
        return number.value

    try:
        version = ask("cuDriverGetVersion")
        result["version"] = f"{version // 1000}.{version % 1000 // 10}"
        if status := driver.cuInit(0):
            raise RuntimeError(f"cuInit: error {status}")
        for i in range(ask("cuDeviceGetCount")):
            device = ask("cuDeviceGet", i)
            driver.cuDeviceGetName(name, len(name), device)
            major, minor = (
                ask("cuDeviceGetAttribute", which, device) for which in (_MAJOR, _MINOR)
            )
            text = name.value.decode(errors="replace")
            result["devices"].append({"name": text, "capability": f"{major}.{minor}"})
    except (RuntimeError, AttributeError) as problem:
        result["problem"] = str(problem)
    return result


def _answer(op, *tensors, **options):
    """The plan of a call: its backend, and for every other one why not."""
    try:
        lines = flash_kda.plan(*tensors, op=op, **options).splitlines()
    except (RuntimeError, TypeError, ValueError) as problem:
        return {"backend": None, "plan": [str(problem)]}
    chosen = next(x for x in lines if x.startswith("backend: "))
    return {"backend": chosen.split()[1], "plan": lines}


def _choices(empty, dtype):
    """For a prefill, a decode and a backward on tensors of empty(shape, dtype)."""
    x, beta = empty((1, 4096, 32, 128), dtype), empty((1, 4096, 32), dtype)
    y, one = empty((8, 1, 32, 128), dtype), empty((8, 1, 32), dtype)
    pool = empty((8, 32, 128, 128))
    return {
        "prefill of 4096 tokens": _answer("prefill", x, x, x, x, beta),
        "decode of 8 sequences": _answer("decode", y, y, y, y, one, state=pool),
        "backward of 4096 tokens": _answer("backward", x, x, x, x, beta),
    }


def choices(devices) -> dict:
    """By device: what would run for 32 heads of 128, and why; or why that cannot be said."""
    result = {}
    try:
        import numpy as np
    except ImportError:
        result["cpu"] = "NumPy is not installed"
    else:
        result["cpu"] = _choices(lambda shape, dtype=np.float32: np.empty(shape, dtype), np.float32)
    if not devices:
        return result
    try:
        import torch

        if not torch.cuda.is_available():
            raise ImportError(f"torch {torch.__version__} sees no CUDA device")
    except ImportError as problem:
        result["cuda"] = str(problem)
    else:
        result["cuda"] = _choices(
            lambda shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="cuda"),
            torch.bfloat16,
        )
    return result


def collect() -> dict:
    """All of it."""
    driver = cuda()
    return {
        "flash_kda": flash_kda.__version__,
        "location": str(pathlib.Path(flash_kda.__file__).parent),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages(),
        "environment": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "cpu": cpu(),
        "cuda": driver,
        "backends": [
            {"name": name, "available": available, "reason": reason}
            for name, available, reason in flash_kda.backends()
        ],
        "choices": choices(driver["devices"]),
    }


def text(found) -> str:
    """For people."""
    processor, driver = found["cpu"], found["cuda"]
    lines = [
        f"flash_kda    {found['flash_kda']}, {found['location']}",
        f"Python       {found['python']}, {found['system']}",
        "packages     " + ", ".join(f"{n} {v}" for n, v in found["packages"].items() if v),
        "not there    " + ", ".join(n for n, v in found["packages"].items() if not v),
        f"processor    {processor['name']}, {processor['cpus']} CPUs, {processor['threads']} threads: "
        + " ".join(processor["features"]),
        f"CUDA driver  {driver['driver'] or '-'}, CUDA {driver['version'] or '-'}"
        + (f": {driver['problem']}" if "problem" in driver else ""),
        *(
            f"GPU {i}        {x['name']}, compute capability {x['capability']}"
            for i, x in enumerate(driver["devices"])
        ),
        *(f"{name}={value}" for name, value in found["environment"].items()),
        "",
        "backends, in order of preference",
        *(
            f"  {x['name']:<12} {'available' if x['available'] else 'not available: ' + x['reason']}"
            for x in found["backends"]
        ),
    ]
    for device, asked in found["choices"].items():
        if isinstance(asked, str):
            lines += ["", f"{device}: {asked}"]
            continue
        for what, answer in asked.items():
            lines += [
                "",
                f"{device}, {what}, 32 heads of 128",
                *(f"  {line}" for line in answer["plan"]),
            ]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m flash_kda.env", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    found = collect()
    print(json.dumps(found, indent=1) if options.json else text(found))


if __name__ == "__main__":
    main()
