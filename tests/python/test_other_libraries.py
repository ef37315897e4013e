"""Tensors of libraries that happen to be installed: CUDA torch, CuPy, JAX. Skipped where they are not."""

import flash_kda
import numpy as np
import pytest
import torch
from problems import Torch, bits, problem

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def supported_on_cuda():
    q = torch.zeros(1, 16, 1, 128, dtype=torch.bfloat16, device="cuda")
    return flash_kda.supports(q, q, q, q, q[..., 0])


@cuda
def test_cuda_tensors_are_answered():
    """They run, or the library's reason reaches the caller and nothing is written."""
    p = problem(T=40, K=128, V=128)
    tensors = [t.cuda() for t in p.tensors(Torch)]
    out = torch.full_like(tensors[2], 7)
    supported, reason = supported_on_cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call = lambda: flash_kda.fwd(*tensors, None, out, None, None, None)
        if supported:
            call()
        else:
            assert "CUDA" in reason
            with pytest.raises(RuntimeError, match="CUDA"):
                call()
    stream.synchronize()
    assert bool((out == 7).all()) != supported


@cuda
def test_devices_must_agree():
    p = problem(T=4, K=128, V=128)
    host = p.tensors(Torch)
    device = [t.cuda() for t in host]
    out = torch.zeros_like(device[2])
    with pytest.raises(ValueError, match="^k: device cpu, expected cuda:0 to match q$"):
        flash_kda.fwd(device[0], host[1], *device[2:], None, out, None, None, None)
    with pytest.raises(ValueError, match="^k: device cuda:0, expected cpu to match q$"):
        flash_kda.fwd(host[0], device[1], *host[2:], None, out, None, None, None)
    with pytest.raises(ValueError, match="^out: device cpu, expected cuda:0 to match q$"):
        flash_kda.fwd(*device, None, torch.zeros_like(host[2]), None, None, None)


@cuda
def test_pinned_memory_is_the_hosts():
    p = problem(T=20)
    expected = bits(p.fwd(Torch)[0])
    tensors = [t.pin_memory() for t in p.tensors(Torch)]
    out = torch.zeros_like(tensors[2]).pin_memory()
    flash_kda.fwd(
        *tensors, None, out, Torch.of(p.A_log), Torch.of(p.dt_bias), None, Torch.of(p.initial_state)
    )
    assert bits(out) == expected


@cuda
def test_cupy():
    cupy = pytest.importorskip("cupy")
    p = problem(T=4, K=128, V=128, dtype="float16")
    tensors = [cupy.asarray(t) for t in (p.q, p.k, p.v, p.g, p.beta)]
    with pytest.raises(ValueError, match="^out: device cpu, expected cuda:0 to match q$"):
        flash_kda.fwd(*tensors, None, p.v.copy(), None, None, None)
    supported, reason = flash_kda.supports(*tensors)
    if not supported:
        with pytest.raises(RuntimeError) as error:
            flash_kda.fwd(*tensors, None, cupy.empty_like(tensors[2]), None, None, None)
        assert reason in str(error.value)


def test_jax(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # else it takes most of a GPU's memory
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    p = problem(T=20)
    out, expected = np.zeros_like(p.v), np.zeros_like(p.v)
    tensors = [jax.device_put(t, cpu) for t in (p.q, p.k, p.v, p.g, p.beta)]
    flash_kda.fwd(*tensors, None, out, None, None, None)
    flash_kda.fwd(p.q, p.k, p.v, p.g, p.beta, None, expected, None, None, None)
    assert bits(out) == bits(expected)
    with pytest.raises(ValueError, match="^out: "):  # JAX arrays never change
        flash_kda.fwd(*tensors, None, tensors[2], None, None, None)
