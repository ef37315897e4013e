"""bench/backward.py as it runs on a GPU, on the CPU's clock with sizes of no interest."""

import importlib.util
import json
import pathlib
import types

import flash_kda
import pytest
import torch
from flash_kda import bench

path = pathlib.Path(__file__).parents[2] / "bench" / "backward.py"
spec = importlib.util.spec_from_file_location("bench_backward", path)
assert spec and spec.loader
backward = importlib.util.module_from_spec(spec)
spec.loader.exec_module(backward)

SHAPES = [
    bench.Shape("T70_H2", (70,), 2, D=32),
    bench.Shape("ragged_H2", (33, 0, 20), 2, D=32),
]


def stand_in(
    q, k, v, g, beta, initial_state=None, state_v_first=False, use_gate_in_kernel=False,
    use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, safe_gate=False, **options,
):  # fmt: skip
    """FLA's chunk_kda, as good as ours but for the gradient by v."""
    assert state_v_first and safe_gate and options["dt_bias"].ndim == 1
    out, final = flash_kda.chunk_kda(
        q, k, 1.01 * v, g, beta, initial_state=initial_state, state_v_first=True,
        use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        **options,
    )  # fmt: skip
    return out, final


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "load_fla", lambda: (stand_in, None, "0.0"))

    def run(shapes=SHAPES, **options):
        file = tmp_path / "record.json"
        options = {**dict(
            gates=["weak", "strong"], seconds=0.001, json=file, compare=True, no_prewarm=True,
            peers=["T70_H2"], peers_budget=100, commit="abc", note="", backend=[], go_on=False,
        ), **options}  # fmt: skip
        training = backward.run(bench.HostClock(torch), shapes, types.SimpleNamespace(**options))
        return training, json.loads(file.read_text())

    return run


def test_rows(run):
    training, record = run()
    assert training.failures == []
    assert [(row["name"], row["gate"]) for row in record["rows"]] == [
        (shape.name, gate) for shape in SHAPES for gate in ("weak", "strong")
    ]
    for row in record["rows"]:
        assert row["op"] == "backward" and row["backend"] == row["forward_backend"]
        assert min(row["ms"], row["forward_ms"], row["backward_ms"], row["floor_ms"]) > 0
        assert row["workspace_bytes"] > 0
        found = row["errors"]
        assert set(found) == {f"d_{name}" for name in (*backward.NAMES, "initial_state")}
        assert all(0 < x < 5e-3 for x in found.values())
        assert row["rounding"].keys() == found.keys()
        assert all(1e-5 < x < 1e-1 for x in row["rounding"].values())
        assert row["error_o"] == max(found[f"d_{name}"] for name in "q k v g beta".split())
        assert ("fla" in row["peers_ms"]) == (row["name"] == "T70_H2")
    theirs, ours = record["rows"][0]["peers_errors"]["fla"], record["rows"][0]["errors"]
    assert theirs["d_v"] > 2 * ours["d_v"] and theirs["d_q"] > 2 * ours["d_q"]
    assert record["versions"]["fla-core"] == "0.0"


def test_errors_that_are_too_large_are_reported(run, monkeypatch):
    right = backward.Step.differentiated

    def wrong(self, c, out, **options):
        found = right(self, c, out, **options)
        return {**found, "q": 1.05 * found["q"]}

    monkeypatch.setattr(backward.Step, "differentiated", wrong)
    training, _ = run()
    assert [text.split(": ")[1].split()[0] for text in training.failures] == ["d_q"] * 4


def test_continued(run, monkeypatch):
    """Only what is missing is measured, errors and FLA's part included; another commit's record is refused."""
    timed = []
    time_it = backward.Training.timed
    monkeypatch.setattr(
        backward.Training, "timed", lambda *a: timed.append((a[1].shape.name, a[2])) or time_it(*a)
    )
    everything = [(shape.name, gate) for shape in SHAPES for gate in ("weak", "strong")]
    _, first = run(gates=["weak"], compare=False)
    _, second = run(go_on=True)
    assert timed == [x for x in everything if x[1] == "weak"] + [
        x for x in everything if x[1] == "strong"
    ]
    assert second["continued"] == [first["date"]]
    assert [(row["name"], row["gate"]) for row in second["rows"]] == everything
    for row in second["rows"]:
        before = [x for x in first["rows"] if (x["name"], x["gate"]) == (row["name"], row["gate"])]
        assert all(x["ms"] == row["ms"] and x["errors"] == row["errors"] for x in before)
        assert ("fla" in row["peers_ms"]) == (row["name"] == "T70_H2")
    timed.clear()
    training, third = run(go_on=True, gates=["strong"])  # nothing, and nothing is lost
    assert timed == [] and not training.samples
    assert sorted(map(str, third["rows"])) == sorted(map(str, second["rows"]))
    with pytest.raises(SystemExit, match="commit abc, expected def"):
        run(go_on=True, commit="def")


def test_peers_of_other_rows_later(run, capsys):
    """As where FLA takes too long for one run: none of ours is timed anew, and what FLA had is kept."""
    _, first = run()
    ragged = [row for row in first["rows"] if row["name"] == "ragged_H2"]
    assert len(ragged) == 2 and not any(row["peers_ms"] for row in ragged)
    later = dict(shapes=SHAPES[1:], go_on=True, peers=["ragged_H2"])
    _, second = run(**later, peers_budget=-1)
    assert "--peers-budget is used up" in capsys.readouterr().err
    assert sorted(map(str, second["rows"])) == sorted(map(str, first["rows"]))
    training, third = run(**later)
    assert training.failures == [] and len(third["rows"]) == len(first["rows"])
    for row in third["rows"]:
        (before,) = (x for x in first["rows"] if training.key(x) == training.key(row))
        assert all(row[name] == before[name] for name in ("ms", "backward_ms", "errors"))
        if row["name"] == "ragged_H2":
            assert row["peers_ms"]["fla"] > 0 and row["peers_errors"]["fla"].keys() == row["errors"].keys()
        else:
            assert row == before


@pytest.mark.parametrize("option", ["--rows", "--peers"])
def test_rows_that_there_are_not(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["backward.py", "--device", "cuda", option, "T8192_H32,T1_H1"])
    with pytest.raises(SystemExit):
        backward.main()
    assert "T1_H1: expected rows of T8192_H32" in capsys.readouterr().err


def test_every_row_that_can(run, monkeypatch):
    """A GPU has two rows of the backend table; both are timed on the same inputs, and one FLA beside both."""
    monkeypatch.setattr(bench, "backends_of", lambda *_: ["cpu-scalar", "reference"])
    training, record = run(shapes=SHAPES[:1], gates=["weak"])
    assert training.failures == []
    assert [row["backend"] for row in record["rows"]] == ["cpu-scalar", "reference"]
    assert [row["forward_backend"] for row in record["rows"]] == ["cpu-scalar", "reference"]
    assert len({row["peers_ms"]["fla"] for row in record["rows"]}) == 1
