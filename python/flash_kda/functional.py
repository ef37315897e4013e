"""chunk_kda and fused_recurrent_kda: flash-linear-attention's functions, on this library.

Arguments, defaults and meaning are those of fla.ops.kda (fla-core 0.6.0); what travels there in **kwargs
(A_log, dt_bias, chunk_size, transpose_state_layout) is named here, so that a misspelt name is an error.
torch.compile traces through both without a break.
"""

import warnings

import torch
from torch import Tensor

from . import _C, ops

# Everything but Dynamo brings tensors of its own or says that it is there, which the call in C sees.
tracing = torch.compiler.is_dynamo_compiling

# Tokens a sequence up to which the decode kernel takes them.
_MAX_DECODE = 8


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def backend_for(q: Tensor) -> str | None:
    """float64 is for torch.autograd.gradcheck and the like; only the reference computes in it."""
    return "reference" if q.dtype is torch.float64 else None


def check_gradients(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, gate) -> None:
    """Refuses before the forward what has no backward."""
    able, reason = ops.supports_gradients(
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, gate, backend_for(q)
    )
    if not able:
        raise NotImplementedError(
            f"an input requires grad, but gradients cannot be computed here: {reason}; "
            f"{ops.NO_BACKWARD}"
        )


def _v_first(state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError("transpose_state_layout: given together with state_v_first, its new name")
    warnings.warn(
        "transpose_state_layout is called state_v_first now", DeprecationWarning, stacklevel=3
    )
    return transpose_state_layout


def _check_neg_eigval(use_beta_sigmoid_in_kernel: bool) -> None:
    if not use_beta_sigmoid_in_kernel:
        raise ValueError(
            "allow_neg_eigval: True, expected use_beta_sigmoid_in_kernel=True with it "
            "(beta is 2 * sigmoid(beta) then)"
        )


def gate_of(use_gate_in_kernel, lower_bound, A_log, dt_bias):
    """(gate, A_log, dt_bias, lower_bound) as flash_kda.fwd() names them."""
    if not use_gate_in_kernel:
        return "direct", None, None, None
    if lower_bound is not None:
        return "bounded", A_log, dt_bias, lower_bound
    if A_log is None:
        raise ValueError(
            "A_log: None, expected a tensor with use_gate_in_kernel=True and no lower_bound"
        )
    return "softplus", A_log, dt_bias, None


def _intermediate_rows(q, cu_seqlens, cu_seqlens_cpu, chunk_size, use_graph) -> int:
    """Chunks of all sequences together: how many states there are."""
    T = q.shape[1]
    if cu_seqlens is None:
        return q.shape[0] * -(-T // chunk_size)
    if use_graph:  # an upper bound from shapes alone
        return -(-T // chunk_size) + max(cu_seqlens.shape[0] - 2, 0)
    bounds = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    return int(((bounds.diff() + (chunk_size - 1)) // chunk_size).sum())


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
):
    """Kimi Delta Attention over whole sequences; the function fla.ops.kda.chunk_kda.

        q, k           [B, T, H, K]   bfloat16; float16 and float32 on the CPU too
        v              [B, T, HV, V]  of the same dtype; HV a multiple of H
        g              [B, T, HV, K]  log-decay, or with use_gate_in_kernel the raw gate
        beta           [B, T, HV]     in [0, 1], or with use_beta_sigmoid_in_kernel its logit
        scale          of the output; None: K ** -0.5
        initial_state  [N, HV, K, V], or with state_v_first [N, HV, V, K]; float32 or bfloat16
        cu_seqlens     [N + 1] int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n+1]
                       of the one batch row (B = 1); None: N = B
        A_log [HV], dt_bias [HV * K]  of the gate in the kernel, which is
                       lower_bound * sigmoid(exp(A_log) * (g + dt_bias)) where lower_bound is given, else
                       -exp(A_log) * softplus(g + dt_bias)
        use_qk_l2norm_in_kernel       q and k are divided by sqrt(sum of squares + 1e-6)
        allow_neg_eigval              beta is 2 * sigmoid(beta)
        return_intermediate_states    a third result, the state before every chunk_size (64 or 32) tokens
                       of every sequence: [B, chunks, HV, K, V] in q's dtype. With cu_seqlens the number of
                       chunks is read from cu_seqlens_cpu, else from cu_seqlens, which waits for the GPU;
                       with use_graph it is a bound from the shapes, and rows beyond the chunks hold anything
        use_graph, max_num_seqs       every call can be captured in a CUDA graph, with or without
        safe_gate, disable_recompute  taken for compatibility: results do not depend on them

    Returns (out [B, T, HV, V], final_state or None); the final state is float32, in the layout of the
    initial one. Rows of out that belong to no sequence hold anything. Strides are free; tensors whose
    innermost dimension is not contiguous are copied.

    Differentiable by every floating-point input, through out and the final state. No second derivatives.
    float64 runs on the reference backend (for torch.autograd.gradcheck).

    Raises ValueError, TypeError or RuntimeError as flash_kda.fwd does, and NotImplementedError where
    gradients are needed that cannot be computed, or cp_context is given.
    """
    if not (
        return_intermediate_states or max_num_seqs is not None or cp_context is not None
        or transpose_state_layout is not None or chunk_size != 64
        or (safe_gate and lower_bound is None) or tracing()
    ):  # the usual call, all of it in C  # fmt: skip
        results = _C._prefill_results(
            q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens,
            use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel,
            allow_neg_eigval, state_v_first, output_final_state,
        )  # fmt: skip
        if results is not NotImplemented:
            return results

    if cp_context is not None:
        raise NotImplementedError("cp_context: context parallelism is not supported, expected None")
    if allow_neg_eigval:
        _check_neg_eigval(use_beta_sigmoid_in_kernel)
    gate, A_log, dt_bias, lower_bound = gate_of(use_gate_in_kernel, lower_bound, A_log, dt_bias)
    if safe_gate and gate == "softplus":
        raise ValueError("lower_bound: None, expected a number in [-5, 0) with safe_gate=True")
    if chunk_size != 64 and chunk_size != 32:
        raise ValueError(f"chunk_size: {chunk_size}, expected 32 or 64")
    if max_num_seqs is not None and use_graph and cu_seqlens is not None:
        if cu_seqlens.shape[0] - 1 != max_num_seqs:
            raise ValueError(
                f"cu_seqlens: {cu_seqlens.shape[0] - 1} sequences, expected max_num_seqs = "
                f"{max_num_seqs} (padded with empty ones)"
            )
    grad = torch.is_grad_enabled() and needs_grad(q, k, v, g, beta, initial_state, A_log, dt_bias)
    if grad:
        check_gradients(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, gate)

    if transpose_state_layout is not None:
        state_v_first = _v_first(state_v_first, transpose_state_layout)

    every = rows = 0
    if return_intermediate_states:
        every = chunk_size
        rows = _intermediate_rows(q, cu_seqlens, cu_seqlens_cpu, chunk_size, use_graph)
    out, final_state, states = ops.prefill(
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, gate,
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        "vk" if state_v_first else "kv", output_final_state, every, rows, every > 0,
        backend=backend_for(q), zero_out=grad and cu_seqlens is not None, dispatch=grad,
    )  # fmt: skip
    if not return_intermediate_states:
        return out, final_state
    if states is None:
        states = q.new_empty((0, *ops.state_shape(q, v, None, "vk" if state_v_first else "kv")[1:]))
    return out, final_state, states.unflatten(0, (q.shape[0], -1) if rows else (q.shape[0], 0))


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
):
    """Kimi Delta Attention, a few tokens a sequence; the function fla.ops.kda.fused_recurrent_kda.

    Arguments and results are those of chunk_kda(), which see; the order differs. Up to 8 tokens a
    sequence (without cu_seqlens) run on the decode kernel, others on the prefill kernel. The initial
    state is never written; flash_kda.decode() works on a state pool in place.
    """
    if not (cu_seqlens is not None or transpose_state_layout is not None or tracing()):
        # The usual call, all of it in C; it refuses more tokens than the decode kernel takes.
        results = _C._recurrent_results(
            q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, None,
            use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel,
            allow_neg_eigval, state_v_first, output_final_state,
        )  # fmt: skip
        if results is not NotImplemented:
            return results

    if allow_neg_eigval:
        _check_neg_eigval(use_beta_sigmoid_in_kernel)
    gate, A_log, dt_bias, lower_bound = gate_of(use_gate_in_kernel, lower_bound, A_log, dt_bias)
    grad = torch.is_grad_enabled() and needs_grad(q, k, v, g, beta, initial_state, A_log, dt_bias)
    if grad:
        check_gradients(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, gate)
    if transpose_state_layout is not None:
        state_v_first = _v_first(state_v_first, transpose_state_layout)
    layout = "vk" if state_v_first else "kv"

    if grad or cu_seqlens is not None or q.ndim != 4 or not 0 < q.shape[1] <= _MAX_DECODE:
        out, final_state, _ = ops.prefill(
            q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, gate,
            use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, layout,
            output_final_state, zero_out=cu_seqlens is not None, backend=backend_for(q),
            dispatch=grad,
        )  # fmt: skip
        return out, final_state
    return ops.recurrent(
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, gate,
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, layout,
        output_final_state, backend_for(q),
    )  # fmt: skip
