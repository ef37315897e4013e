"""examples/train.py: it learns, its curve is that of the token recurrence, and a resumed run goes on as if nothing
had been in between."""

import importlib.util
import json
import pathlib

import pytest
from problems import why_no_cuda

path = pathlib.Path(__file__).parents[2] / "examples" / "train.py"
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's rms_norm under autocast

spec = importlib.util.spec_from_file_location("train", path)
assert spec and spec.loader
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

SMALL = "--dim 32 --heads 2 --head-dim 16 --length 24 --batch 2 --lr 1e-2".split()


def test_learns():
    losses = train.main([*SMALL, "--steps", "40"])
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_stopped_and_continued(tmp_path):
    """A curve ends where the time is up; what a record has is not run again."""
    file = tmp_path / "record.json"
    arguments = [
        *SMALL,
        "--steps",
        "5",
        "--compare",
        "--json",
        str(file),
        "--save",
        str(tmp_path / "half"),
    ]
    train.main([*arguments, "--kdas", "flash_kda", "--limit", "1e-9"])
    first = json.loads(file.read_text())
    assert len(first["losses"]["flash_kda"]) == 2
    train.main([*arguments, "--kdas", "flash_kda,naive", "--continue"])
    second = json.loads(file.read_text())
    assert second["losses"]["flash_kda"] == first["losses"]["flash_kda"]
    assert len(second["losses"]["naive"]) == 5 and second["distance"]["flash_kda_naive"] < 1e-3
    with pytest.raises(SystemExit, match="settings"):
        train.main([*arguments, "--seed", "1", "--continue"])


def test_bfloat16_autocast():
    losses = train.main([*SMALL, "--steps", "6"])
    lower = train.main([*SMALL, "--steps", "6", "--bf16"])
    assert lower != losses and train.distance(lower, losses) < 0.1


def test_compare(tmp_path, capsys):
    """Curves of the same seed stay together, and stopping half way changes nothing."""
    record, kept = tmp_path / "record.json", tmp_path / "run.pt"
    train.main([*SMALL, "--steps", "8", "--compare", "--json", str(record), "--save", str(kept)])
    record = json.loads(record.read_text())
    distance = record["distance"]
    assert distance["resumed"] == 0
    assert distance["flash_kda_naive"] < 1e-3 and distance["naive_naive64"] < 1e-3
    assert record["losses"]["naive"][0] == pytest.approx(record["losses"]["flash_kda"][0], abs=1e-4)
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.skipif(bool(why_no_cuda()), reason=why_no_cuda())
def test_compare_on_cuda(tmp_path):
    """In bfloat16, on the gradients' kernels: the curve of the recurrence, and of a run stopped half way."""
    record = tmp_path / "record.json"
    sizes = (
        "--dim 128 --heads 2 --head-dim 64 --length 80 --batch 4 --long-length 256 --long-batch 2"
    )
    arguments = ["--device", "cuda", *sizes.split(), "--steps", "16", "--kdas", "flash_kda,naive"]
    train.main([*arguments, "--compare", "--json", str(record), "--save", str(tmp_path / "run.pt")])
    record = json.loads(record.read_text())
    losses = record["losses"]["flash_kda"]
    assert losses[-1] < 0.9 * losses[0]
    assert record["distance"]["flash_kda_naive"] < 0.03 * losses[0]
    assert record["distance"]["resumed"] < 1e-3
    assert record["long"]["tokens_per_second"]["flash_kda"] > 0
