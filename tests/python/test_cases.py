"""The project's case table through the Python package: every case's data and double-precision gold come
from `flashkda check --save`, and the bits must be those of `flashkda run` on the same file.
"""

import json
import math
import os
import shutil
import struct
import subprocess

import flash_kda
import ml_dtypes
import numpy as np
import pytest
from problems import LIBRARIES, bits

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOOL = os.environ.get("FLASHKDA_TOOL") or shutil.which("flashkda")
FLAGS = (
    "l2norm",
    "beta_is_logit",
    "allow_neg_eigval",
    "batch_invariant",
    "checkpoint_before",
    "write_state",
)


def listed():
    if not TOOL:
        return []
    done = subprocess.run([TOOL, "check", "--list", "--json"], capture_output=True, check=True)
    return json.loads(done.stdout)


CASES = {case["name"]: case for case in listed()}


def left_to_c(name):
    """The command line computes every gradient, not one; where a NaN spreads to, and what adds up over many thousands
    of tokens, is the C tests' matter."""
    case = CASES[name]
    tokens = sum(case["lens"]) if "lens" in case else case["B"] * case["T"]
    large = tokens * case["HV"] * case["K"] * case["V"] > 30_000_000
    return large or name.startswith(("backward/only_", "backward/nan_"))


def refused(name):
    """Cases in which the call must be refused; they have no gold."""
    return "/out_of_range" in name or "/negative_" in name


def test_table_is_there(tool):
    assert len(CASES) > 500
    assert {case["op"] for case in CASES.values()} == {"prefill", "decode", "summary", "backward"}
    assert sum(map(refused, CASES)) < len(CASES) / 20


def read(path):
    """(tensors, metadata) of a .safetensors file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(bytearray(data[begin:end]), DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors, metadata


def options_of(metadata):
    options = {"gate": metadata["gate"], "state_layout": metadata["state_layout"]}
    options |= {name: metadata[name] == "1" for name in FLAGS if name in metadata}
    if int(metadata.get("checkpoint_every", 0)):
        options["checkpoint_every"] = int(metadata["checkpoint_every"])
    return options


def run(library, tensors, metadata, **more):
    """The call of the file. Returns {output: (before, after)}."""
    gold = {n[5:]: x for n, x in tensors.items() if n.startswith("gold.")}
    inputs = {n: x.copy() for n, x in tensors.items() if not n.startswith("gold.")}
    op = metadata["op"]
    io = inputs["v"].dtype
    dtypes = {
        "out": io,
        "checkpoint_state": np.float32,
        "final_state": NAMES.get(metadata.get("final_state_dtype", ""), np.float32),
    }
    if op == "backward":
        dtypes = {f"d_{n}": x.dtype for n, x in inputs.items() if n not in ("A_log", "dt_bias")}
    outputs = {}
    for name, values in gold.items():
        if name == "final_state" and metadata.get("in_place") == "1":
            outputs[name] = inputs["initial_state"]
        elif name in inputs:
            outputs[name] = inputs.pop(name)
        else:
            outputs[name] = np.full(values.shape, np.nan, dtypes.get(name, np.float32))
    before = {name: x.copy() for name, x in outputs.items()}
    given = {name: library.of(x) for name, x in inputs.items()}
    if metadata.get("in_place") == "1":
        given["final_state"] = given["initial_state"]
    given |= {n: library.of(x) for n, x in outputs.items() if n not in given}
    numbers = {
        "lower_bound": float(metadata["lower_bound"]),
        "scale": float(metadata.get("scale", 0)) or None,
    }
    options = options_of(metadata) | more
    absent = {"A_log": None, "dt_bias": None}
    if op == "prefill":
        flash_kda.fwd(**{**absent, **given, **numbers, **options})
    elif op == "backward":
        absent |= {"d_out": None}
        flash_kda.backward(**{**absent, **given, **numbers, **options})
    elif op == "decode":
        absent["state"] = None
        assert flash_kda.decode(**{**absent, **given, **numbers, **options}) is given["out"]
    else:
        del numbers["scale"]
        flash_kda.experimental.summary(**{**absent, **given, **numbers, **options})
    untouched = {n: x for n, x in tensors.items() if n in inputs and x is not outputs.get(n)}
    for name, x in untouched.items():
        if inputs[name] is not outputs.get("final_state"):
            assert bits(inputs[name]) == bits(x), f"{name} changed"
    return {name: (before[name], outputs[name]) for name in outputs}


def tolerance(*dtypes):
    own = {"bfloat16": 2.5e-3, "float16": 1e-3}
    return max(own.get(np.dtype(d).name, 2e-5) for d in dtypes)


def judge(name, before, result, gold, io, limit=None):
    """RMS(result - gold) / RMS(gold) over what the call writes; the rest must be as it was."""
    x, start = result.astype(np.float64), before.astype(np.float64)
    same = np.array_equal
    kept = (gold == start) | (np.isnan(gold) & np.isnan(start))
    unchanged = (x == start) | (np.isnan(x) & np.isnan(start))
    written = ~(kept & unchanged)
    x, gold = x[written], gold[written]
    assert same(np.isfinite(x), np.isfinite(gold)), f"{name}: not finite where gold is"
    finite = np.isfinite(gold)
    x, gold = x[finite], gold[finite]
    power, difference = float((gold**2).sum()), float(((x - gold) ** 2).sum())
    limit = limit or tolerance(io, result.dtype)
    if name.startswith("d_") and gold.size:  # as in tests/cases/verify.c
        power = max(power, 1e-60 * gold.size) if power > 0 else 0
        rounding = float(((gold.astype(result.dtype).astype(np.float64) - gold) ** 2).sum())
        limit = max(limit, 1.1 * math.sqrt(rounding / power) if power > 0 else 0)
    error = math.sqrt(difference / power if power > 0 else difference)
    assert error <= limit, f"{name}: error {error:.2e}, at most {limit:.2e}"


@pytest.mark.skipif(not TOOL, reason="set FLASHKDA_TOOL to the command line `flashkda`")
@pytest.mark.parametrize("name", [n for n in CASES if not refused(n) and not left_to_c(n)])
def test_case(name, tmp_path):
    path, output = tmp_path / "case.safetensors", tmp_path / "output.safetensors"
    subprocess.run([TOOL, "check", "--case", name, "--save", path], capture_output=True, check=True)
    tensors, metadata = read(path)
    assert metadata["case"] == name
    results = [run(library, tensors, metadata) for library in LIBRARIES]
    for result in results:
        for field, (before, after) in result.items():
            io, limit = tensors["v"].dtype, None
            if field == "final_state" and "state_limit" in metadata:
                limit = max(tolerance(io, after.dtype), float(metadata["state_limit"]))
            judge(field, before, after, tensors[f"gold.{field}"], io, limit)
    torch_result, numpy_result = results
    for field in torch_result:
        assert bits(torch_result[field][1]) == bits(numpy_result[field][1]), field

    # The command line writes the same bits. Its fresh outputs begin as zeros, ours as NaN: where ours
    # are still NaN and gold says so too, nothing was written.
    subprocess.run([TOOL, "run", path, "-o", output], capture_output=True, check=True)
    other, _ = read(output)
    assert set(other) == set(torch_result)
    for field, (_, after) in torch_result.items():
        if field in tensors or metadata.get("in_place") == "1" and field == "final_state":
            assert bits(other[field]) == bits(after), field
        else:
            written = ~(np.isnan(after) & np.isnan(tensors[f"gold.{field}"]))
            assert bits(other[field][written]) == bits(after[written]), field
    path.unlink()
    output.unlink()
