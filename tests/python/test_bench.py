"""flash_kda.bench: what needs no GPU. The clocks are the host's, or stand-ins for torch.cuda."""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import sys
import types

import flash_kda
import pytest
import torch
from flash_kda import _C, bench

SMALL = [
    dataclasses.replace(bench.prefill([48], 2), D=64),
    dataclasses.replace(bench.prefill((20, 7, 0, 33), 2, "ragged4"), HV=4, D=64),
    dataclasses.replace(bench.prefill([16] * 3, 2), D=64),
    dataclasses.replace(bench.mixed([20, 33], 3, 2), D=64),
    dataclasses.replace(bench.decode(2, H=2), D=64),
    dataclasses.replace(bench.decode(3, H=2, state="bf16", variant="bf16state"), D=64),
    dataclasses.replace(bench.decode(3, 8, H=2, store="none", variant="spec8_out"), D=64),
    dataclasses.replace(bench.decode(3, 8, H=2, store="all", variant="spec8"), D=64),
    dataclasses.replace(bench.decode(3, H=2, HV=4, layout="kv", variant="kv"), D=64),
]
HEAD = {"commit", "date", "device", "driver", "clocks_mhz", "copy_gbps", "sgemm_gflops", "rows"}
ROW = {
    "name": str,
    "op": str,
    "N": int,
    "lens": list,
    "H": int,
    "HV": int,
    "K": int,
    "V": int,
    "gate": str,
    "backend": str,
    "variant": str,
    "dtype": str,
    "plan": str,
    "ms": float,
    "floor_ms": float,
    "peers_ms": dict,
    "error_o": float,
    "error_state": (float, type(None)),
    "host_us": float,
}


class Clock(bench.HostClock):
    """Small copies and few rounds: nobody reads these times."""

    l2 = 4096

    def __init__(self):
        super().__init__(torch)

    def calls(self, functions, seconds):
        for function in functions[:3]:
            function()
        return 0.5

    graph = calls


def options(*arguments):
    return bench.parse(["--commit", "abc", *arguments])


def find(name, variant=""):
    return next(s for s in bench.shapes_of(["all"]) if (s.name, s.variant) == (name, variant))


# ---- shapes and bytes ---------------------------------------------------------------------------


def test_every_row_of_the_plan_is_there():
    assert [shape.name for shape in bench.shapes_of(["paper", "serving", "long"])] == [
        *("T8192_H96", "ragged6_H96", "8x1024_H96"),
        *("T8192_H64", "ragged6_H64", "8x1024_H64"),
        *("T8192_H32", "T8192_H12", "T2048_H12", "64x128_H32", "16384+40x100_H32"),
        *("2x2048+64x1_H32", "1x8192+32x1_H32"),
        *("T65536_H8", "T131072_H4"),
    ]
    decode = bench.shapes_of(["decode"])
    assert [s.N for s in decode if s.variant == ""] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]
    assert [s.N for s in decode if s.variant == "bf16state"] == [1, 8, 32, 64, 128, 256, 1024]
    assert {s.variant for s in decode} >= {"spec8", "spec8_out", "spec8_last", "kv", "gva4"}
    assert [n for n in bench.PEER_ROWS if n.startswith("decode")] == [
        f"decode_N{N}_T1_H32" for N in (1, 8, 32, 128, 256)
    ]
    keys = [(s.name, s.variant) for s in bench.shapes_of(["all"])]
    assert len(set(keys)) == len(keys)
    assert set(bench.PEER_ROWS) <= {name for name, _ in keys}
    with pytest.raises(SystemExit, match="expected paper"):
        bench.shapes_of(["papers"])


@pytest.mark.parametrize(
    "name, floor",  # ms at 3 TB/s, as the design's table gives them
    [
        ("T8192_H96", 0.34),
        ("ragged6_H96", 0.36),
        ("8x1024_H96", 0.37),
        ("T8192_H64", 0.23),
        ("ragged6_H64", 0.24),
        ("T8192_H32", 0.11),
        ("T8192_H12", 0.04),
        ("T2048_H12", 0.011),
        ("64x128_H32", 0.21),
        ("16384+40x100_H32", 0.34),
        ("T65536_H8", 0.23),
    ],
)
def test_floors(name, floor):
    assert find(name).bytes() / 3e9 == pytest.approx(floor, rel=0.07)


def test_bytes_of_a_prefill():
    shape = find("ragged6_H96")
    tokens, heads = 8192, 96
    q_k_v_g_out, beta = 5 * 128 * 2, 2
    states = 2 * 6 * heads * 128 * 128 * 4
    expected = tokens * heads * (q_k_v_g_out + beta) + heads * 129 * 4 + states + 7 * 8
    assert shape.tokens == tokens and shape.bytes() == expected


@pytest.mark.parametrize(
    "variant, states, size", [("", 2, 4), ("bf16state", 2, 2), ("spec8_out", 1, 4), ("spec8", 9, 4)]
)
def test_bytes_of_a_decode(variant, states, size):
    shape = find("decode_N32_T8_H32" if "spec" in variant else "decode_N32_T1_H32", variant)
    one = 32 * 32 * 128 * 128 * size
    rest = shape.bytes() - states * one
    assert shape.state_bytes() == one
    tokens = 8 if "spec" in variant else 1
    assert tokens * 32 * 32 * 1280 < rest < tokens * 32 * 32 * 1300 + 32 * 129 * 4


def test_bytes_count_grouped_heads_once():
    shape = bench.Shape("gva", (100,), H=2, HV=8)
    inputs = 100 * (2 * 2 * 128 + 8 * (3 * 128 + 1)) * 2
    assert shape.bytes() == inputs + 8 * 129 * 4 + 2 * 8 * 128 * 128 * 4


def test_gate_strengths():
    """Mean log-decay of a token: a few hundredths of one for weak gates, several for strong."""
    problem = bench.make_problem(SMALL[0], Clock())
    means = {}
    for gate in bench.GATES:
        problem.set_gate(gate)
        raw = problem.tensors[0]["g"].float() + problem.dt_bias
        means[gate] = (bench.LOWER_BOUND * torch.sigmoid(raw)).mean().item()
    assert -0.01 < means["weak"] < 0 and -1 < means["medium"] < -0.1 and -4 < means["strong"] < -2


# ---- a whole run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    arguments = options("--json-dir", str(directory), "--json", str(directory / "all.json"))
    return bench.run(Clock(), SMALL, arguments), directory


def test_run(finished):
    run, _ = finished
    assert run.failures == []
    assert len(run.rows) == 4 * 3 + 5
    for row in run.rows:
        assert row["error_o"] <= 2.5e-3, row
        assert row["error_state"] is None or row["error_state"] <= 2.5e-3, row
    assert [row["error_state"] for row in run.rows].count(None) == 1  # spec8_out


def test_records(finished):
    _, directory = finished
    rows = []
    for name in ("prefill-cpu.json", "decode-cpu.json", "all.json"):
        record = json.loads((directory / name).read_text())
        assert set(record) >= HEAD
        assert record["commit"] == "abc" and record["sgemm_gflops"] is None
        assert record["first_call_ms"] > 0
        for row in record["rows"]:
            for key, kind in ROW.items():
                assert isinstance(row[key], kind), key
            assert row["floor_ms"] == pytest.approx(row["bytes"] / record["copy_gbps"] / 1e6, 1e-4)
            assert sum(row["lens"]) > 0 and len(row["lens"]) == row["N"]
            assert ("copy_ms" in row) == ("between_ms" in row) == row["name"].startswith("decode")
            assert ("two_calls_ms" in row) == (row["variant"] == "mixed")
        rows.append(record["rows"])
    assert rows[0] + rows[1] == rows[2]


@pytest.mark.parametrize(
    "name, change",
    [
        ("out", lambda x: x * 1.05),
        ("out", lambda x: x.index_fill(1, torch.tensor([3]), math.nan)),
        ("state", lambda x: x.mT),
    ],
)
def test_errors_are_noticed(name, change):
    """A wrong output, a missing one and a transposed state fail the run."""
    run = bench.Bench(Clock(), options("--gates", "medium"))
    run.ours(SMALL[:1])
    (((_, samples),),) = run.samples.values()
    samples[-1][name] = change(samples[-1][name])
    run.gold()
    assert len(run.failures) == 1 and run.failures[0].startswith("T48_H2  medium cpu-")


def test_several_backends(peers):
    """Every row once for each, on the same inputs and against the same gold; FLA is timed once."""
    calls = []

    def counted(**keywords):
        calls.append(keywords["q"].shape)
        return fake_chunk_kda(**keywords)

    counted.__signature__ = inspect.signature(fake_chunk_kda)
    names, shapes = ["cpu-scalar", "reference"], [SMALL[i] for i in (1, 2, 3, 4, 7)]
    arguments = ("--backend", ",".join(names), "--gates", "weak,strong")
    run = peers(*arguments, chunk_kda=counted, shapes=shapes)
    assert run.failures == []
    for shape in shapes:
        rows = [r for r in run.rows if (r["name"], r["variant"]) == (shape.name, shape.variant)]
        gates = ["medium"] if shape.op == "decode" else ["weak", "strong"]
        assert [(r["backend"], r["gate"]) for r in rows] == [(b, g) for b in names for g in gates]
        for gate in gates:
            ours, gold = [r for r in rows if r["gate"] == gate]
            assert gold["error_o"] <= ours["error_o"] <= 5e-3
            assert ours["peers_ms"] == gold["peers_ms"]
            assert ours.get("peers_error") == gold.get("peers_error")
    prefills = [s for s in shapes if s.op == "prefill" and not s.variant]
    copies = [bench.make_problem(shape, Clock()).copies for shape in prefills]
    assert len(calls) == sum(2 * (1 + min(3, n)) for n in copies)


def test_a_backend_that_cannot_run_a_row_is_left_out(monkeypatch):
    monkeypatch.setattr(bench, "can_run", lambda problem: problem.backend != "cpu-scalar")
    names = ["cpu-scalar", "reference"]
    assert bench.backends_of(SMALL[0], Clock(), names) == names[1:]
    assert bench.backends_of(SMALL[0], Clock(), names[:1]) == names[:1]  # whose refusal is reported
    assert bench.backends_of(SMALL[0], Clock(), []) == [None]


def test_a_backend_that_is_none(capsys):
    run = bench.run(Clock(), SMALL[:2], options("--backend", "cpu-scalar,nonsense"))
    assert not run.rows and len(run.failures) == 2 and '"nonsense"' in run.failures[0]
    capsys.readouterr()


def test_a_failing_row_leaves_the_others(capsys):
    bad = dataclasses.replace(SMALL[0], name="too wide", D=300)
    run = bench.run(Clock(), [bad, SMALL[2]], options("--gates", "strong"))
    assert len(run.rows) == 1 and len(run.failures) == 1
    assert run.failures[0].startswith("too wide: ")
    capsys.readouterr()


def test_copies_do_not_share_memory():
    for shape in SMALL:
        problem = bench.make_problem(shape, bench.HostClock(torch))
        assert problem.copies >= 2
        pointers = [x[name].data_ptr() for x in problem.tensors for name in ("q", "v", "out")]
        assert len(set(pointers)) == len(pointers)
        if shape.op == "decode":
            slots = torch.cat([x.flatten() for x in problem.indices])
            assert sorted(slots.tolist()) == list(range(len(problem.pool)))


# ---- FLA ----------------------------------------------------------------------------------------


def fake_chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
    safe_gate=False, lower_bound=None, state_v_first=False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    assert use_qk_l2norm_in_kernel and use_gate_in_kernel and use_beta_sigmoid_in_kernel
    assert output_final_state and safe_gate and state_v_first
    assert kwargs["dt_bias"].ndim == 1 and set(kwargs) == {"A_log", "dt_bias"}
    out, final = torch.empty_like(v), torch.empty_like(initial_state)
    _C.fwd(
        q, k, v, g, beta, scale, out, kwargs["A_log"], kwargs["dt_bias"], lower_bound,
        initial_state, final, cu_seqlens,
    )  # fmt: skip
    return out, final


def fake_recurrent(
    q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, inplace_final_state=True,
    state_v_first=False, ssm_state_indices=None, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, lower_bound=None, out=None,
):  # fmt: skip
    assert use_qk_l2norm_in_kernel and use_gate_in_kernel and use_beta_sigmoid_in_kernel
    assert inplace_final_state and state_v_first
    _C.decode(
        q, k, v, g, beta, initial_state, out, A_log=A_log, dt_bias=dt_bias,
        lower_bound=lower_bound, state_indices=ssm_state_indices,
    )  # fmt: skip


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.setattr(bench, "PEER_ROWS", tuple(shape.name for shape in SMALL[:5]))

    def run(*arguments, chunk_kda=fake_chunk_kda, shapes=SMALL):
        monkeypatch.setattr(bench, "load_fla", lambda: (chunk_kda, fake_recurrent, "0.0"))
        return bench.run(Clock(), shapes, options("--compare", "--no-prewarm", *arguments))

    return run


def test_peers(peers, tmp_path):
    run = peers("--json-dir", str(tmp_path))
    assert run.failures == []
    assert run.head["versions"]["fla-core"] == "0.0"
    for row in run.rows:
        timed = row["name"] in bench.PEER_ROWS and not row["variant"]
        assert set(row["peers_ms"]) == ({"fla"} if timed else set())
        if timed:  # the same library behind the stand-in: the same errors
            error = row["peers_error"]["fla"]
            assert (error["o"], error["state"]) == (row["error_o"], row["error_state"])
    record = json.loads((tmp_path / "prefill-cpu.json").read_text())
    assert record["rows"][0]["peers_ms"] == {"fla": 0.5}


def test_peers_must_not_be_ourselves(peers, capsys):
    def dispatched(*arguments, **keywords):
        flash_kda.fwd(*arguments)

    run = peers(chunk_kda=dispatched)
    assert any("this would not be FLA's time" in text for text in run.failures)
    assert not any(row["peers_ms"] for row in run.rows if bench.op_of(row) == "prefill")
    assert flash_kda.fwd is _C.fwd
    capsys.readouterr()


def test_peers_budget(peers, capsys):
    run = peers("--peers-budget", "0")
    assert run.failures == [] and not any(row["peers_ms"] for row in run.rows)
    assert "--peers-budget is used up" in capsys.readouterr().err


def test_without_fla(monkeypatch, capsys):
    def missing():
        raise ImportError("No module named 'fla'")

    monkeypatch.setattr(bench, "load_fla", missing)
    run = bench.run(Clock(), SMALL[:1], options("--compare", "--no-prewarm", "--quick"))
    assert run.failures == [] and "FLA is left out" in capsys.readouterr().err


def test_the_old_name_of_the_layout():
    def old(q, transpose_state_layout=False):
        pass

    assert bench.v_first(old) == {"transpose_state_layout": True}
    assert bench.v_first(fake_chunk_kda) == {"state_v_first": True}


# ---- the device's clock, on a stand-in for torch.cuda -------------------------------------------


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeCuda.log.append("event")

    def elapsed_time(self, end):
        return 2.0


class FakeGraph:
    def replay(self):
        FakeCuda.log.append("replay")


class FakeCuda:
    log: list = []
    Event, CUDAGraph = FakeEvent, FakeGraph
    Stream = current_stream = lambda *_: types.SimpleNamespace(wait_stream=lambda _: None)
    set_device = _sleep = lambda *_: None
    get_device_properties = lambda *_: types.SimpleNamespace(name="Fake", L2_cache_size=4096)
    stream = graph = contextlib.nullcontext

    @staticmethod
    def synchronize():
        FakeCuda.log.append("sync")


def test_cuda_clock():
    cuda = types.SimpleNamespace(**{k: v for k, v in vars(FakeCuda).items() if k[:2] != "__"})
    cuda.synchronize = FakeCuda.synchronize
    clock = bench.CudaClock(types.SimpleNamespace(cuda=cuda, device=torch.device), 0)
    assert (clock.name, clock.l2) == ("Fake", 4096)
    log = FakeCuda.log
    functions = [lambda i=i: log.append(i) for i in range(3)]
    assert clock.calls(functions, 0.02) == 2.0
    calls = [x for x in log if isinstance(x, int)]
    assert calls == [0, 1, 2] * 2 + [i % 3 for i in range(10)]  # warm-up, one round, 20 ms at 2 ms
    assert log[3] == "sync" and log[-1] == "sync" and log.count("event") == 2 * 13
    log.clear()
    assert clock.graph(functions, 0.02) == 2.0 / 18  # six rounds of three: at least 16 calls
    assert [x for x in log if isinstance(x, int)] == [0, 1, 2] * 12  # warm-up, capture
    assert log.count("replay") == 1 + 1 + 10


# ---- tables and plots ---------------------------------------------------------------------------

RECORD = {
    "commit": "1234abc",
    "date": "2026-11-22T12:00:00+00:00",
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "clocks_mhz": {"sm": 1755},
    "copy_gbps": 3000.0,
    "sgemm_gflops": None,
    "rows": [
        {"name": "T8192_H96", "variant": "", "gate": "strong", "backend": "portable", "ms": 1.25,
         "floor_ms": 0.34, "peers_ms": {"fla": 3.75}, "error_o": 4.1e-3, "error_state": 2.2e-3,
         "peers_error": {"fla": {"o": 4.4e-3, "state": 2e-3}}, "host_us": 8.04},
        {"name": "decode_N32_T8_H32", "variant": "spec8_out", "gate": "medium", "floor_ms": 0.02,
         "backend": "portable", "ms": 0.05, "peers_ms": {}, "error_o": 1.7e-3, "error_state": None,
         "host_us": 9.0, "copy_ms": 0.04},
    ],
}  # fmt: skip


def test_markdown():
    text = bench.markdown(RECORD)
    assert "NVIDIA H100 80GB HBM3, driver 580.1, SM clock 1755 MHz, copy rate 3000 GB/s" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1] == (
        "| T8192_H96 | strong | portable | 1.2500 | 0.3400 | 27 % | 3.7500 | 3.00 | 4.1e-03"
        " | 2.2e-03 | 4.4e-03 | 8.0 |"
    )
    assert rows[3] == (
        "| decode_N32_T8_H32 spec8_out | medium | portable | 0.0500 | 0.0200 | 80 % |  |  | 1.7e-03"
        " |  |  | 9.0 |"
    )
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_tables_from_files(tmp_path, capsys):
    paths = []
    for i, row in enumerate(RECORD["rows"]):
        paths.append(str(tmp_path / f"{i}.json"))
        bench.write_record(paths[-1], {**RECORD, "rows": [row]})
    assert bench.main(["--from", *paths]) == 0
    assert capsys.readouterr().out == bench.markdown(RECORD)
    target = tmp_path / "table.md"
    assert bench.main(["--from", *paths, "--markdown", str(target)]) == 0
    assert target.read_text() == bench.markdown(RECORD)


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is optional")
def test_plot(finished, tmp_path):
    for name, record in (("a.png", RECORD), ("b.png", finished[0].record())):
        bench.plot(record, tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_nan_is_no_number_in_json(tmp_path):
    record = {"driver": None, "rows": [{"error_o": math.nan, "ms": 1 / 3}]}
    bench.write_record(tmp_path / "x.json", record)
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["rows"] == [{"error_o": None, "ms": 0.333333}]


@pytest.mark.parametrize(
    "name, short",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "rtxa6000"),
        ("something else", "something-else"),
    ],
)
def test_short_device(name, short):
    assert bench.short_device(name) == short


def test_command_line_without_a_gpu(run_python):
    code = "from flash_kda import bench\ntry: bench.main([])\nexcept SystemExit as e: print(e)"
    if not torch.cuda.is_available():
        assert "no CUDA device" in run_python(code)
    hidden = "import sys\nsys.modules['torch'] = None\n" + code
    assert run_python(hidden) == "flash_kda.bench needs torch with CUDA"
    with pytest.raises(SystemExit):
        bench.parse(["--gates", "feeble"])


def test_import_brings_no_torch(run_python):
    code = "import sys, flash_kda.bench\nprint({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    assert run_python(code) == "set()"
    assert sys.modules["flash_kda.bench"] is bench


def test_commit_from_the_environment(monkeypatch):
    monkeypatch.setenv("FLASHKDA_COMMIT", "feed123")
    assert bench.commit() == "feed123"


def test_compiling_ahead_may_fail(monkeypatch, capsys):
    """No GPU here, or no FLA: it is reported, with the reason, and nothing else happens."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    started = bench.start_prewarm([bench.prefill([1024], 2), bench.prefill([64] * 3, 2)])
    assert [what for what, _, _ in started] == ["H 2, ragged False"] * 2
    bench.finish_prewarm(started, 120)
    text = capsys.readouterr().err
    assert text.startswith("compiling FLA for H 2, ragged False: 1; ") and "Error" in text


def test_compiling_ahead_in_shares(monkeypatch):
    """Each process launches its share of a kernel's candidates, and others until one has run."""
    modules = {
        name: types.ModuleType(name) for name in ("triton.runtime", "triton.runtime.autotuner")
    }

    class Autotuner:
        broken = ()

        def prune_configs(self, keywords):
            return range(7)

        def run(self, clock):
            launched = []

            def launch(candidate):
                launched.append(candidate)
                if candidate in self.broken:
                    raise RuntimeError

            for candidate in self.prune_configs({}):
                with contextlib.suppress(RuntimeError):
                    assert clock(lambda c=candidate: launch(c), quantiles=(0.5, 0.2)) == [1.0, 1.0]
            return launched

    active = types.SimpleNamespace()
    modules["triton.runtime"].driver = types.SimpleNamespace(active=active)
    modules["triton.runtime.autotuner"].Autotuner = Autotuner
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("FLA_CACHE_RESULTS", "1")
    bench.compile_without_timing(1, 3)
    tuner = Autotuner()
    assert tuner.run(active.get_benchmarker()) == [1, 4]
    tuner.broken = (1, 4, 0)
    assert tuner.run(active.get_benchmarker()) == [1, 4, 0, 1, 2]
