"""python -m flash_kda.env: what is there, what would be chosen, and that little has to be there."""

import json
import platform

import flash_kda
import numpy as np
import torch
from flash_kda import env
from problems import cuda_backends

RUN = """
import json, runpy, sys
for name in {hidden}:
    sys.modules[name] = None
sys.argv = ["env", *{options}]
runpy.run_module("flash_kda.env", run_name="__main__")
"""


def test_json(run_python):
    found = json.loads(run_python(RUN.format(hidden=[], options=["--json"])))
    assert found["flash_kda"] == flash_kda.__version__
    assert found["packages"]["numpy"] == np.__version__
    # the one says what it was built for, the other may not
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == platform.python_version()
    assert [tuple(x.values()) for x in found["backends"]] == flash_kda.backends()
    assert found["cpu"]["name"] and found["cpu"]["threads"] == flash_kda.get_num_threads()
    x, beta = np.empty((1, 4096, 32, 128), np.float32), np.empty((1, 4096, 32), np.float32)
    answers = found["choices"]["cpu"]
    assert (
        answers["prefill of 4096 tokens"]["plan"] == flash_kda.plan(x, x, x, x, beta).splitlines()
    )
    best = next(
        name for name, available, _ in flash_kda.backends() if name.startswith("cpu-") and available
    )
    assert {x["backend"] for x in answers.values()} == {best}
    assert ("cuda" in found["choices"]) == bool(found["cuda"]["devices"])
    if torch.cuda.is_available():
        assert found["cuda"]["devices"][0]["name"] == torch.cuda.get_device_name(0)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(0))
        assert found["cuda"]["devices"][0]["capability"] == capability
        assert found["cuda"]["driver"] and found["cuda"]["version"]
        best = cuda_backends()[0]
        assert found["choices"]["cuda"]["prefill of 4096 tokens"]["backend"] == best
    else:
        assert "problem" in found["cuda"] or not found["cuda"]["devices"]


def test_text_and_environment(run_python):
    out = run_python(RUN.format(hidden=[], options=[]), FLASHKDA_BACKEND="cpu-scalar")
    assert "FLASHKDA_BACKEND=cpu-scalar" in out and "cpu, prefill of 4096 tokens" in out
    assert out.count("backend: cpu-scalar") == 3
    for name, _, reason in flash_kda.backends():
        assert name in out and reason in out


def test_a_refusal_is_an_answer(run_python):
    options = dict(FLASHKDA_BACKEND="of-tomorrow")
    found = json.loads(run_python(RUN.format(hidden=[], options=["--json"]), **options))
    answer = found["choices"]["cpu"]["decode of 8 sequences"]
    assert answer["backend"] is None and "of-tomorrow" in answer["plan"][0]


def test_with_the_package_alone(run_python):
    found = json.loads(run_python(RUN.format(hidden=["numpy", "torch"], options=["--json"])))
    assert found["choices"]["cpu"] == "NumPy is not installed"
    assert [x["name"] for x in found["backends"]] == [name for name, _, _ in flash_kda.backends()]


class Driver:
    """libcuda with two devices; the second does not say what it can do."""

    asked = 0

    def __getattr__(self, name):
        def call(*arguments):
            if name == "cuInit":
                return 0
            if name == "cuDeviceGetName":
                arguments[0].value = b"GPU of a test"
                return 0
            values = {"cuDriverGetVersion": 13010, "cuDeviceGetCount": 2, "cuDeviceGet": 0}
            if name == "cuDeviceGetAttribute":
                self.asked += 1
                values[name] = {75: 9, 76: 0}[arguments[1]]
                if self.asked > 2:
                    return 1
            arguments[0]._obj.value = values[name]
            return 0

        return call


def test_what_the_driver_tells(monkeypatch):
    monkeypatch.setattr(env.ctypes, "CDLL", lambda name: Driver())
    found = env.cuda()
    assert found["version"] == "13.1"
    assert found["devices"] == [{"name": "GPU of a test", "capability": "9.0"}]
    assert found["problem"] == "cuDeviceGetAttribute: error 1"
