"""flash-linear-attention finds us by itself: on a machine without a GPU we are what makes it run.

Skipped where `fla` (fla-core with a triton that it can import) is not installed.
"""

import logging

import flash_kda
import numpy as np
import pytest
import torch
from problems import TOLERANCE, Torch, error, problem

kda = pytest.importorskip("fla.ops.kda", exc_type=ImportError)

IN_KERNEL = dict(
    use_gate_in_kernel=True,
    use_qk_l2norm_in_kernel=True,
    use_beta_sigmoid_in_kernel=True,
    state_v_first=True,
    safe_gate=True,
    lower_bound=-5.0,
)


@pytest.fixture
def calls(monkeypatch):
    """The calls of flash_kda.fwd, which still runs."""
    recorded = []
    run = flash_kda.fwd

    def counting(*arguments, **keywords):
        recorded.append((len(arguments), sorted(keywords)))
        return run(*arguments, **keywords)

    monkeypatch.setattr(flash_kda, "fwd", counting)
    return recorded


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "shape", [dict(B=2, T=70), dict(lens=[64, 0, 33, 1]), dict(T=40, state=False)], ids=str
)
def test_chunk_kda_calls_us(calls, caplog, guard, shape):
    p = problem(H=2, K=128, V=128, **shape)
    keywords = dict(
        A_log=Torch.of(p.A_log),
        dt_bias=Torch.of(p.dt_bias.reshape(-1)),
        initial_state=Torch.of(p.initial_state),
        output_final_state=True,
        cu_seqlens=Torch.of(p.cu_seqlens),
        **IN_KERNEL,
    )
    with guard(), caplog.at_level(logging.INFO):
        out, final = kda.chunk_kda(*p.tensors(Torch), **keywords)
    assert calls == [
        (7, ["A_log", "cu_seqlens", "dt_bias", "final_state", "initial_state", "lower_bound"])
    ]
    gold_out, gold_final = p.gold()
    assert error(out, gold_out) <= TOLERANCE["bfloat16"]
    assert error(final, gold_final) <= TOLERANCE["bfloat16"]


def test_naive_recurrence_agrees(calls):
    """FLA's own definition of the operator, in PyTorch, gives what our kernels give."""
    from fla.ops.kda.naive import naive_recurrent_kda

    p = problem(B=2, T=30, H=2, K=128, V=128)
    q, k, v, g, beta = (x.float() for x in p.tensors(Torch))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    A = Torch.of(p.A_log).exp()[:, None]
    g = -5 * torch.sigmoid(A * (g + Torch.of(p.dt_bias)))
    out, final = naive_recurrent_kda(
        q, k, v, g, beta.sigmoid(),
        initial_state=Torch.of(p.initial_state).transpose(2, 3),
        output_final_state=True,
    )  # fmt: skip
    ours, state = p.fwd(Torch)
    assert error(ours, out.numpy().astype(np.float64)) <= TOLERANCE["bfloat16"]
    assert error(state, final.transpose(2, 3).contiguous().numpy()) <= TOLERANCE["float32"]


def test_exceptions_reach_the_caller(calls):
    p = problem(B=1, T=20, H=2, K=128, V=128)
    with torch.no_grad(), pytest.raises(ValueError, match="lower_bound"):
        kda.chunk_kda(
            *p.tensors(Torch), A_log=Torch.of(p.A_log), **{**IN_KERNEL, "lower_bound": -9.0}
        )
