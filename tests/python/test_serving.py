"""The serving engine of examples/, on the CPU: what it checks holds, and its checks can fail."""

import importlib.util
import json
import pathlib
import sys

import pytest

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "serving.py"


def load():
    spec = importlib.util.spec_from_file_location("serving", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


serving = load()


@pytest.fixture(autouse=True)
def one_thread():
    """Of torch's, which does small copies here: the library has threads of its own."""
    threads = serving.torch.get_num_threads()
    serving.torch.set_num_threads(1)
    yield
    serving.torch.set_num_threads(threads)


def serve(*arguments):
    return serving.serve(serving.parse(["--requests", "60", *arguments]))


MODES = {
    "decode": [],
    "mixed": ["--mixed"],
    "few_slots": ["--slots", "2"],
    "heads": ["--heads", "3", "--dim", "40", "--seed", "2"],
}


@pytest.mark.parametrize("mode", MODES)
def test_requests_are_as_they_are_alone(mode):
    row = serve(*MODES[mode])
    assert row["differing"] == [] and row["slots_lost"] == 0 and row["checked"]
    assert row["finished"] + row["cancelled"] == row["requests"] == 60
    assert row["finished"] and row["cancelled"] and row["cache_hits"] and row["cache_evicted"]
    assert row["most_at_once"] <= row["slots"]
    assert row["prompt_tokens"] and row["answer_tokens"] and row["tokens_per_s"] > 0
    assert (row["calls"] <= row["steps"]) == ("--mixed" in MODES[mode])


def test_command_line(tmp_path, capsys):
    path = tmp_path / "serving.json"
    assert serving.main(["--requests", "10", "--json", str(path)]) == 0
    assert "as it is alone, bit for bit" in capsys.readouterr().out
    for requests in ("10", "11"):  # the second takes the first one's place
        assert serving.main(["--requests", requests, "--mixed", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["date"] and record["device"] and not record["rows"][0]["differing"]
    rows = [(row["mode"], row["requests"]) for row in record["rows"]]
    assert rows == [("decode", 10), ("mixed", 11)]
    with pytest.raises(SystemExit):
        serving.parse(["--graphs"])
    with pytest.raises(SystemExit):
        serving.parse(["--step-tokens", "8"])


def test_a_lost_slot_is_noticed(monkeypatch, capsys):
    give = serving.Pool.give

    def forgetful(pool, slot):
        if len(pool.unused) != 3:
            give(pool, slot)

    monkeypatch.setattr(serving.Pool, "give", forgetful)
    assert serving.main(["--requests", "60"]) == 1
    capsys.readouterr()


@pytest.mark.parametrize("what", ["checkpoint", "start", "touch"])
def test_a_wrong_state_is_noticed(monkeypatch, what):
    if what == "checkpoint":  # given to others while it is still to be read
        monkeypatch.setattr(serving.PrefixCache, "stop_reading", lambda self, request: None)
        monkeypatch.setattr(serving.PrefixCache, "room", evict_anything)
    elif what == "start":  # a slot is taken over as its last owner left it
        monkeypatch.setattr(serving.Pool, "give", lambda pool, slot: pool.unused.append(slot))
        monkeypatch.setattr(serving.Model, "prefill", ignore_has_state(serving.Model.prefill))
    else:
        monkeypatch.setattr(serving.Engine, "admit", touch_a_state(serving.Engine.admit))
    assert serve("--requests", "80", "--step-tokens", "32")["differing"]


def evict_anything(cache):
    if len(cache.entries) >= serving.CACHED:
        for prefix, entry in cache.entries.items():
            if entry.ready:
                cache.drop(prefix)
                break
    return len(cache.entries) < serving.CACHED


def touch_a_state(admit):
    """A few bits of one running request, once."""

    def changed(engine, request):
        admit(engine, request)
        if request.id == 20:
            slot = engine.running[0].slot
            engine.pool.states.view(serving.torch.int32)[slot, 0] ^= 1 << 18

    return changed


def ignore_has_state(prefill):
    def changed(model, tokens, has_initial_state=None, **states):
        return prefill(model, tokens, **states)

    return changed
