"""scripts/gpu_summary.py, on logs made up for it: what must not pass does not."""

import importlib.util
import json
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).resolve().parents[2] / "scripts/gpu_summary.py"
spec = importlib.util.spec_from_file_location("gpu_summary", PATH)
gpu_summary = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_summary)

REFUSAL = 'backend: "sm90" cannot run this call: '


def results(sm90, portable="", **more):
    """What one case gave: a message is a skip."""
    pairs = (("sm90", sm90), ("portable", portable))
    return [
        {"backend": name, "verdict": "skip" if message else "pass", "message": message, **more}
        for name, message in pairs
    ]


@pytest.fixture
def logs(tmp_path):
    cases = [
        {"name": "a", "results": results("")},
        {"name": "b", "results": results(REFUSAL + "k: data 0x7f8a02, expected a multiple of 16")},
        {"name": "c", "results": results(REFUSAL + "has kernels for prefill and backward only")},
        {"name": "d", "results": results(REFUSAL + "d_out: absent, expected bfloat16")},
        {"name": "e", "results": results(*2 * ["K = 96, V = 64, expected each 64 or 128"])},
    ]
    ranges = [
        {"backend": name, "range": "weak", "half_out": 4e-3, "half_state": 2e-3}
        for name in ("sm90", "portable")
    ]
    write(tmp_path, "check", cases, ranges)
    (tmp_path / "device.csv").write_text("NVIDIA H100, 580.1, 1755, 2619, 1980, 2619\n")
    skip = '<testcase name="{}"><skipped message="no  \n{}"/></testcase>'
    (tmp_path / "python.xml").write_text(
        f'<testsuite><testcase name="x"/>{skip.format("y", "cupy")}{skip.format("z", "cupy")}</testsuite>'
    )
    (tmp_path / "python-fla.xml").write_text(
        f'<testsuite><testcase name="x"/>{skip.format("y", "cupy")}{skip.format("z", "layers")}</testsuite>'
    )
    for tool in gpu_summary.TOOLS:
        write(tmp_path, tool, cases[:3])
        (tmp_path / f"{tool}.log").write_text("========= ERROR SUMMARY: 0 errors\n")
        (tmp_path / f"{tool}.status").write_text("0\n")
    return tmp_path


def write(logs, name, cases, ranges=()):
    text = json.dumps({"cases": cases, "ranges": list(ranges)})
    (logs / f"{name}.json").write_text(text)


def change(logs, name, index, backend, **result):
    record = json.loads((logs / f"{name}.json").read_text())
    for one in record["cases"][index]["results"]:
        if one["backend"] == backend:
            one.update(result)
    write(logs, name, record["cases"], record["ranges"])


def summarise(logs, monkeypatch):
    target = logs / "summary.json"
    arguments = ["--backends", "sm90,portable", "--commit", "c", "--sanitized", "3"]
    arguments += ["--python", "python,python-fla"]
    monkeypatch.setattr(sys, "argv", ["gpu_summary.py", *arguments, str(logs), str(target)])
    return gpu_summary.main(), json.loads(target.read_text())


def test_all_is_well(logs, monkeypatch):
    status, summary = summarise(logs, monkeypatch)
    assert status == 0
    assert (summary["cases"], summary["passed"], summary["failed"], summary["skipped"]) == (10, 5, 0, 5)
    sm90, portable = (summary["backends"][name] for name in ("sm90", "portable"))
    assert sm90["passed"] == 1 and portable["passed"] == 4
    assert sm90["skipped_because"] == {
        "data, expected a multiple of 16": 1,
        "has kernels for prefill and backward only": 1,
        "d_out: absent, expected bfloat16": 1,
        "K, V, expected each 64 or 128": 1,
    }
    assert sm90["errors_by_gate"] == [{"range": "weak", "out": 4e-3, "state": 2e-3}]
    assert summary["sanitizers"] == dict.fromkeys(gpu_summary.TOOLS, 0)
    python = summary["python"]
    assert (python["passed"], python["failed"], python["skipped"]) == (2, 0, 4)
    assert python["skipped_because"] == {"no cupy": 3, "no layers": 1}
    assert python["packages"]["numpy"] and "fla-core" in python["packages"]


@pytest.mark.parametrize(
    "name, index, backend, result",
    [
        ("check", 0, "sm90", dict(verdict="fail", message="error 1")),
        ("check", 0, "sm90", dict(verdict="skip", message=REFUSAL + "has no kernel yet for K = 64")),
        ("check", 1, "portable", dict(verdict="skip", message="k: data 0x1, expected a multiple of 16")),
        ("memcheck", 2, "portable", dict(verdict="skip", message="has kernels for prefill and backward only")),
        ("racecheck", 0, "sm90", dict(verdict="fail", message="error 1")),
    ],
)
def test_what_must_not_pass(logs, monkeypatch, capsys, name, index, backend, result):
    change(logs, name, index, backend, **result)
    status, _ = summarise(logs, monkeypatch)
    assert status == 1 and backend in capsys.readouterr().out


def test_a_sanitizer_that_found_something(logs, monkeypatch):
    (logs / "initcheck.log").write_text("========= ERROR SUMMARY: 2 errors\n")
    status, summary = summarise(logs, monkeypatch)
    assert status == 1 and summary["sanitizers"]["initcheck"] == 2


def test_a_run_that_was_cut_short(logs, monkeypatch):
    (logs / "check.json").write_text('{"cases": [')
    status, summary = summarise(logs, monkeypatch)
    assert status == 1 and summary["passed"] == 0


def test_a_suite_that_did_not_end(logs, monkeypatch, capsys):
    (logs / "python-fla.xml").unlink()
    status, summary = summarise(logs, monkeypatch)
    assert status == 1 and summary["python"]["passed"] == 1
    assert "python-fla: nothing passed" in capsys.readouterr().out
