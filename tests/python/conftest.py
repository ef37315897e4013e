import os
import pathlib
import shutil
import subprocess
import sys

import pytest

# Tests run side by side; threads of torch that wait for each other spin. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from problems import LIBRARIES  # noqa: E402


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.name)
def library(request):
    return request.param


@pytest.fixture(scope="session")
def tool():
    """Path of the command line: FLASHKDA_TOOL, or `flashkda` on the PATH."""
    path = os.environ.get("FLASHKDA_TOOL") or shutil.which("flashkda")
    if not path:
        pytest.skip("set FLASHKDA_TOOL to the command line `flashkda`")
    return path


@pytest.fixture(scope="session")
def run_python():
    """Runs code in a fresh interpreter and returns what it printed."""

    def run(code, timeout=120, **environment):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def fresh_dynamo():
    """torch.compile without what other tests have compiled."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
