"""The programs below examples/ run, and what they print of themselves holds; so does bench/integrations.py."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from problems import DEVICES

ROOT = pathlib.Path(__file__).parents[2]


WITHOUT = """
import runpy, sys
hidden, *sys.argv = sys.argv[1:]
sys.modules[hidden] = None
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(name, *arguments, timeout=300, without=None):
    """What the program printed, where the package `without` cannot be imported. One torch thread: a busy machine
    makes more of them wait for each other."""
    code = ["-c", WITHOUT, without] if without else []
    done = subprocess.run(
        [sys.executable, *code, ROOT / name, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(module):
    """`module` is looked for, not imported: FLA's import takes seconds."""
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


def test_numpy():
    assert re.search(r"^out \(1, 16, 2, 64\) rms 0\.\d+$", run("examples/prefill.py"), re.M)


@pytest.mark.parametrize("device", DEVICES)
def test_torch(device):
    out = run("examples/decode.py", "--device", device)
    assert re.search(
        rf"^3 requests, 12 steps on {device}: out \S+, state \S+ from one prefill$", out
    )


@needs("transformers")
@pytest.mark.parametrize("device", DEVICES)
def test_transformers(device):
    # FLA, which transformers would take by itself, tunes its kernels for minutes.
    options = ("--device", device, "--prompt", "70", "--tokens", "8")
    out = run("examples/kimi_linear.py", *options, without="fla")
    for name in ("transformers", "flash_kda"):
        assert re.search(rf"^{name} +prefill +\S+ ms +decode +\S+ ms a token$", out, re.M)
    same = re.search(r"^(\d+) of 8 generated tokens are the same$", out, re.M)
    assert device != "cpu" or same[1] == "8"


@needs("fla")
def test_fla_on_the_cpu():
    out = run("examples/fla_model.py")
    assert re.search(r"^chunk_kda of 64 tokens and fused_recurrent_kda of 32", out)


@needs("fla")
@pytest.mark.parametrize("device", DEVICES[1:])
def test_fla_model_on_a_gpu(device):
    """FLA tunes its kernels first."""
    if importlib.util.find_spec("fla.models") is None:
        pytest.skip("flash-linear-attention is not installed, only fla-core")
    out = run("examples/fla_model.py", "--device", device, "--prompt", "256", timeout=600)
    difference = float(re.search(r"^logits of the first token differ by (\S+)$", out, re.M)[1])
    assert difference < 2e-2


@needs("transformers")
def test_integrations_benchmark(tmp_path):
    """On the CPU, with sizes of no interest: every row is made, and by whom it says."""
    path = tmp_path / "record.json"
    options = ("--device", "cpu", "--tiny", "--seconds", "0.001", "-o", path)
    run("bench/integrations.py", *options, "--models", "kimi_linear")
    record = json.loads(path.read_text())
    rows = {row["name"].removeprefix("kimi_linear_"): row for row in record["rows"]}
    assert record["device"] == "cpu" and record["versions"]["transformers"]
    for name, calls in {
        "prefill_T40": {"prefill": 2, "decode": 0},
        "layer_prefill_T40": {"prefill": 1, "decode": 0},
        "decode_N3": {"prefill": 0, "decode": 2},
        "layer_decode_N1": {"prefill": 0, "decode": 1},
    }.items():
        row = rows[name]
        assert row["calls"] == calls
        assert row["ms"] > 0 and row["peers_ms"]["transformers"] > 0
    assert 0 < rows["error"]["error"] < 0.1
