"""Several Python threads, a released GIL, and fork."""

import os
import threading
import time

import flash_kda
import numpy as np
import pytest
from problems import Torch, bits, problem


def test_gil_is_released(library):
    """While one thread is inside a call, another goes on counting."""
    p = problem(T=4096, H=4, K=128, V=128, dtype="float32")
    p.fwd(library, backend="cpu")
    counted, inside = [0], threading.Event()
    done = threading.Event()

    def count():
        inside.wait()
        while not done.is_set():
            counted[0] += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    duration = 0.0
    calls = 0
    try:
        arguments = (*p.tensors(library), None, library.of(np.empty_like(p.v)), None, None, None)
        inside.set()
        before = counted[0]
        begin = time.perf_counter()
        while duration < 0.3:  # calls of tens of milliseconds each
            flash_kda.fwd(*arguments)
            calls += 1
            duration = time.perf_counter() - begin
    finally:
        done.set()
        thread.join()
    assert duration / calls > 0.002, "calls too short to tell"
    # With the GIL held the counter would advance only between calls, when the interpreter switches.
    assert counted[0] - before > 2 * calls


def test_threads_at_once(library):
    """Different problems from several threads give what they give alone."""
    problems = [problem(lens=[10 + 7 * i, 33], H=1 + i % 3, seed=i) for i in range(6)]
    expected = [[bits(x) for x in p.fwd(library)] for p in problems]
    failures = []

    def work(i):
        for _ in range(10):
            if [bits(x) for x in problems[i].fwd(library)] != expected[i]:
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_errors_belong_to_their_thread():
    p = problem(T=5)
    messages = {}

    def work(name):
        for _ in range(50):
            try:
                flash_kda.fwd(
                    *p.tensors(Torch), None, Torch.of(p.v.copy()), None, None, None, backend=name
                )
            except ValueError as e:
                messages.setdefault(name, set()).add(str(e))

    threads = [threading.Thread(target=work, args=(f"absent-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, texts in messages.items():
        assert len(texts) == 1 and name in texts.pop()
    assert len(messages) == 4


@pytest.mark.filterwarnings("ignore:.*fork")  # forking with threads about is the point
@pytest.mark.parametrize("inside", ["thread", "main"])
def test_fork(inside):
    """A child made by fork() computes, whoever used the pool before."""
    p = problem(T=200, H=4, K=128, V=128)
    expected = bits(p.fwd()[0])
    if inside == "thread":
        thread = threading.Thread(target=p.fwd)
        thread.start()
        thread.join()
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if bits(p.fwd()[0]) == expected else 3)
        except BaseException:
            os._exit(4)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert bits(p.fwd()[0]) == expected


def test_short_threads_do_not_leak():
    """The workspace of a thread goes with it."""
    p = problem(T=64, H=4, K=128, V=128)

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def burst(count):
        for _ in range(count):
            thread = threading.Thread(target=p.fwd)
            thread.start()
            thread.join()

    burst(20)
    before = resident()
    burst(200)
    assert resident() - before < 8 << 20
