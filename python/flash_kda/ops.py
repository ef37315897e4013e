"""torch operators on libflashkda: torch.ops.flash_kda.prefill, .recurrent, .fwd and .decode.

Importing this module defines them (import flash_kda alone does not import torch):

    prefill(q, k, v, g, beta, ...) -> (out, final_state, checkpoint_state)  allocates what it returns
    recurrent(q, k, v, g, beta, ...) -> (out, final_state)                  1 to 8 tokens, decode kernel
    fwd(q, k, v, g, beta, scale, out, ...) -> ()                            flash_kda.fwd, in place
    decode(q, k, v, g, beta, state, ...) -> out                             flash_kda.decode, state in place

They run on CPU and CUDA tensors, trace under torch.compile and torch.export, and follow autocast: q, k and
v (and out) then take the autocast dtype, while gates, beta and states keep theirs. prefill has a derivative
(flash_kda.autograd), the others have none. Results that were not asked for are empty tensors.

prefill() and recurrent() here are the same operations for Python callers: plain tensors in eager mode go
straight to the C extension, because torch's dispatcher costs more than the rest of the call; everything
else (tracing, tensor subclasses, dispatch modes, functorch, autocast) goes through the operator. The usual
call, without copies and checkpoints, does not come here: functional.py makes it, results included, by one
call of C.
"""

import torch
from torch import Tensor

from . import _C, autograd

if not hasattr(torch.library, "register_fake"):
    raise ImportError(f"torch {torch.__version__}: flash_kda.ops needs 2.4 or newer")

_CONTIGUOUS = torch.contiguous_format
_FLOAT32 = torch.float32
is_compiling = torch.compiler.is_compiling

# What torch says about itself where its dispatcher would do nothing with plain tensors but call us: no
# dispatch mode, no tracing, no autocast, no functorch transform. The last one the short way in C does not ask:
# tensors that a transform wraps do not let their memory be read, and those that none wraps may be taken.
_PLAIN_STATE = (
    (torch._C._len_torch_dispatch_stack, 0),
    (torch._C._is_tracing, False),
    (torch._C._is_any_autocast_enabled, False),
    (torch._C._functorch.maybe_current_level, None),
)
_C._set_torch(
    Tensor, torch.is_grad_enabled, torch.empty_like, {"memory_format": _CONTIGUOUS},
    {"dtype": _FLOAT32}, _PLAIN_STATE[:-1],
)  # fmt: skip

_OPTIONS = """
    str gate="bounded", bool l2norm=True, bool beta_is_logit=True, bool allow_neg_eigval=False,
    str state_layout="vk"
"""
_INDICES = """
    Tensor? state_indices=None, Tensor? initial_state_indices=None, Tensor? final_state_indices=None,
    Tensor? has_initial_state=None
"""
_SCHEMAS = {
    "prefill": f"""(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, *, float? scale=None,
        Tensor? A_log=None, Tensor? dt_bias=None, float? lower_bound=None,
        Tensor? initial_state=None, Tensor? cu_seqlens=None, {_OPTIONS},
        bool output_final_state=False, SymInt checkpoint_every=0, SymInt checkpoint_rows=0,
        bool checkpoint_before=False, bool zero_out=False, bool batch_invariant=False,
        str? backend=None) -> (Tensor out, Tensor final_state, Tensor checkpoint_state)""",
    "fwd": f"""(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float? scale, Tensor(a!) out,
        Tensor? A_log, Tensor? dt_bias, float? lower_bound, Tensor? initial_state=None,
        Tensor(b!)? final_state=None, Tensor? cu_seqlens=None, *, {_OPTIONS}, {_INDICES},
        Tensor(c!)? checkpoint_state=None, Tensor? checkpoint_offsets=None,
        Tensor? checkpoint_indptr=None, SymInt checkpoint_every=0, bool checkpoint_before=False,
        Tensor? checkpoint_state_indices=None, bool batch_invariant=False, str? backend=None) -> ()""",
    "recurrent": f"""(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, *, float? scale=None,
        Tensor? A_log=None, Tensor? dt_bias=None, float? lower_bound=None,
        Tensor? initial_state=None, {_OPTIONS}, bool output_final_state=False, str? backend=None
        ) -> (Tensor out, Tensor final_state)""",
    "decode": f"""(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, *,
        {_INDICES}, Tensor? initial_state=None, Tensor? num_accepted_tokens=None, float? scale=None, Tensor? A_log=None,
        Tensor? dt_bias=None, float? lower_bound=None, {_OPTIONS}, bool write_state=True,
        bool batch_invariant=False, str? backend=None) -> Tensor""",
}


# ---- running ----------------------------------------------------------------------------------------


def _inner_contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _one_of(x: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype in dtypes else x.to(dtypes[0])


def _fitted(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens):
    """The tensors of a refused call, copied where their strides or dtypes are not the library's; None if
    there is nothing to copy."""
    f32, bf16 = torch.float32, torch.bfloat16
    given = q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens
    fitted = (
        _inner_contiguous(q),
        _inner_contiguous(k),
        _inner_contiguous(v),
        _inner_contiguous(_one_of(g, f32, q.dtype)),
        _inner_contiguous(_one_of(beta, f32, q.dtype)),
        _contiguous(_one_of(A_log, f32, bf16)),
        _contiguous(_one_of(dt_bias, f32, bf16)),
        _inner_contiguous(_one_of(initial_state, f32, bf16)),
        _contiguous(_one_of(cu_seqlens, torch.int64, torch.int32)),
    )
    return None if all(x is y for x, y in zip(given, fitted)) else fitted


def state_shape(q, v, cu_seqlens, state_layout):
    """[N, HV, V, K], or [N, HV, K, V] for state_layout 'kv'."""
    if q.ndim != 4 or v.ndim != 4:
        name, x, expected = ("q", q, "[B,T,H,K]") if q.ndim != 4 else ("v", v, "[B,T,HV,V]")
        raise ValueError(f"{name}: shape {list(x.shape)}, expected {expected}")
    B, _, HV, V = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (N, HV, V, q.shape[3]) if state_layout == "vk" else (N, HV, q.shape[3], V)


def state_dtype(v):
    """Of final states: float64 where the reference computes in it."""
    return torch.float64 if v.dtype is torch.float64 else _FLOAT32


def _checkpoints_like(q, v, rows, state_layout):
    return v.new_empty((rows, *state_shape(q, v, None, state_layout)[1:]))


def _direct(*tensors: Tensor | None) -> bool:
    """Whether torch's dispatcher would do nothing but call us."""
    return (
        not is_compiling()
        and all(function() == answer for function, answer in _PLAIN_STATE)
        and all(x is None or (type(x) is Tensor and not x.is_meta) for x in tensors)
    )


def _with_copies(run, *tensors):
    """run(*tensors), with copies where the library refuses them as they are. Nothing is written then."""
    try:
        return run(*tensors)
    except (TypeError, ValueError):
        fitted = _fitted(*tensors)
        if fitted is None:
            raise
    return run(*fitted)


def prefill(
    q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, gate, l2norm,
    beta_is_logit, allow_neg_eigval, state_layout, output_final_state, checkpoint_every=0,
    checkpoint_rows=0, checkpoint_before=False, zero_out=False, batch_invariant=False,
    backend=None, *, here=False, dispatch=False,
):  # fmt: skip
    """The operator prefill; final_state and checkpoint_state are None where they are not wanted.
    zero_out: rows of out that belong to no sequence are zero, not what the memory held. With `here` the
    operator is what calls, and the tensors are the real ones. With `dispatch` it is called in any case:
    gradients are needed."""
    if dispatch or not (here or _direct(q, k, v, g, beta, initial_state)):
        # torch.func's transforms want to see an autograd.Function before the dispatcher does.
        transformed = dispatch and torch._C._functorch.maybe_current_level() is not None
        run = autograd.recorded if transformed else torch.ops.flash_kda.prefill.default
        out, final, checkpoints = run(
            q, k, v, g, beta, scale=scale, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
            initial_state=initial_state, cu_seqlens=cu_seqlens, gate=gate, l2norm=l2norm,
            beta_is_logit=beta_is_logit, allow_neg_eigval=allow_neg_eigval,
            state_layout=state_layout, output_final_state=output_final_state,
            checkpoint_every=checkpoint_every, checkpoint_rows=checkpoint_rows,
            checkpoint_before=checkpoint_before, zero_out=zero_out,
            batch_invariant=batch_invariant, backend=backend,
        )  # fmt: skip
        return out, final if output_final_state else None, checkpoints if checkpoint_rows else None

    out = torch.empty_like(v, memory_format=_CONTIGUOUS)
    if zero_out:
        out.zero_()
    final = checkpoints = None
    if output_final_state:
        final = v.new_empty(state_shape(q, v, cu_seqlens, state_layout), dtype=state_dtype(v))
    options = dict(
        gate=gate, l2norm=l2norm, beta_is_logit=beta_is_logit, allow_neg_eigval=allow_neg_eigval,
        state_layout=state_layout, batch_invariant=batch_invariant, backend=backend,
    )  # fmt: skip
    if checkpoint_rows:
        checkpoints = _checkpoints_like(q, v, checkpoint_rows, state_layout)
        options["checkpoint_state"] = checkpoints
        options["checkpoint_every"] = checkpoint_every
        options["checkpoint_before"] = checkpoint_before

    def run(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens):
        _C.fwd(
            q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final,
            cu_seqlens, **options,
        )  # fmt: skip

    _with_copies(run, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)
    return out, final, checkpoints


def recurrent(
    q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, gate, l2norm, beta_is_logit,
    allow_neg_eigval, state_layout, output_final_state, backend=None, *, here=False,
):  # fmt: skip
    """The operator recurrent: prefill for 1 to 8 tokens a sequence, on the decode kernel."""
    if not here and not _direct(q, k, v, g, beta, initial_state):
        out, final = torch.ops.flash_kda.recurrent.default(
            q, k, v, g, beta, scale=scale, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
            initial_state=initial_state, gate=gate, l2norm=l2norm, beta_is_logit=beta_is_logit,
            allow_neg_eigval=allow_neg_eigval, state_layout=state_layout,
            output_final_state=output_final_state, backend=backend,
        )  # fmt: skip
        return out, final if output_final_state else None

    out = torch.empty_like(v, memory_format=_CONTIGUOUS)
    final = has_initial = None
    if initial_state is None or output_final_state:
        final = v.new_empty(state_shape(q, v, None, state_layout), dtype=state_dtype(v))
    if initial_state is None:  # read from nowhere, but the decode kernel wants a place
        initial_state = final
        has_initial = v.new_zeros(v.shape[0], dtype=torch.bool)

    def run(q, k, v, g, beta, A_log, dt_bias, initial_state, _):
        _C.decode(
            q, k, v, g, beta, final, out, has_initial_state=has_initial,
            initial_state=initial_state, scale=scale, A_log=A_log, dt_bias=dt_bias,
            lower_bound=lower_bound, gate=gate, l2norm=l2norm, beta_is_logit=beta_is_logit,
            allow_neg_eigval=allow_neg_eigval, state_layout=state_layout,
            write_state=output_final_state, backend=backend,
        )  # fmt: skip

    _with_copies(run, q, k, v, g, beta, A_log, dt_bias, initial_state, None)
    return out, final if output_final_state else None


def decode(
    q, k, v, g, beta, state, *, A_log=None, dt_bias=None, initial_state=None, **options
) -> Tensor:
    """flash_kda.decode, with copies of what the library does not take as it is; state is not copied."""
    out = torch.empty_like(v, memory_format=_CONTIGUOUS)

    def run(q, k, v, g, beta, A_log, dt_bias, initial_state, _):
        _C.decode(
            q, k, v, g, beta, state, out, A_log=A_log, dt_bias=dt_bias,
            initial_state=initial_state, **options,
        )  # fmt: skip

    _with_copies(run, q, k, v, g, beta, A_log, dt_bias, initial_state, None)
    return out


def supports(
    q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, gate,
    state_layout, allow_neg_eigval=False, beta_is_logit=True,
):  # fmt: skip
    """(True, '') or (False, reason): whether prefill() would take these tensors, copies included."""
    options = dict(
        gate=gate, state_layout=state_layout, allow_neg_eigval=allow_neg_eigval,
        beta_is_logit=beta_is_logit,
    )  # fmt: skip
    answer = _C.supports(
        q, k, v, g, beta, scale, None, A_log, dt_bias, lower_bound, initial_state, None, cu_seqlens,
        **options,
    )  # fmt: skip
    if answer[0]:
        return answer
    # One token of one sequence is copied as the whole would be; support does not depend on B, T or N.
    fitted = _fitted(
        q[:1, :1], k[:1, :1], v[:1, :1], g[:1, :1], beta[:1, :1], A_log, dt_bias,
        None if initial_state is None else initial_state[:1], None,
    )  # fmt: skip
    if fitted is None:
        return answer
    q, k, v, g, beta, A_log, dt_bias, initial_state, _ = fitted
    return _C.supports(
        q, k, v, g, beta, scale, None, A_log, dt_bias, lower_bound, initial_state, **options
    )


def supports_gradients(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, gate, backend):
    """(True, '') or (False, reason): is there a backward for these? What else is wrong with a call the call
    itself says."""
    if not _direct(q):
        return True, ""  # no memory to look at; the backward will tell
    answer = _C.supports(
        q, k, v, g, beta, scale, None, A_log, dt_bias, lower_bound, gate=gate, backend=backend,
        op="backward",
    )  # fmt: skip
    return answer if answer[1].startswith(("no backend", "backend")) else (True, "")


# ---- the operators ----------------------------------------------------------------------------------


def _prefill_kernel(
    q, k, v, g, beta, *, scale=None, A_log=None, dt_bias=None, lower_bound=None, initial_state=None,
    cu_seqlens=None, gate="bounded", l2norm=True, beta_is_logit=True, allow_neg_eigval=False,
    state_layout="vk", output_final_state=False, **options,
):  # fmt: skip
    results = prefill(
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, gate,
        l2norm, beta_is_logit, allow_neg_eigval, state_layout, output_final_state, here=True,
        **options,
    )  # fmt: skip
    return tuple(_absent(v) if x is None else x for x in results)


def _absent(v):
    """An operator's schema has no optional results."""
    return v.new_empty((0,), dtype=_FLOAT32)


def _prefill_fake(
    q, k, v, g, beta, *, initial_state=None, cu_seqlens=None, state_layout="vk",
    output_final_state=False, checkpoint_rows=0, **_,
):  # fmt: skip
    final = checkpoints = None
    if output_final_state:
        final = v.new_empty(state_shape(q, v, cu_seqlens, state_layout), dtype=state_dtype(v))
    if checkpoint_rows:
        checkpoints = _checkpoints_like(q, v, checkpoint_rows, state_layout)
    out = torch.empty_like(v, memory_format=_CONTIGUOUS)
    return tuple(_absent(v) if x is None else x for x in (out, final, checkpoints))


def _recurrent_kernel(
    q, k, v, g, beta, *, scale=None, A_log=None, dt_bias=None, lower_bound=None, initial_state=None,
    gate="bounded", l2norm=True, beta_is_logit=True, allow_neg_eigval=False, state_layout="vk",
    output_final_state=False, backend=None,
):  # fmt: skip
    out, final = recurrent(
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, gate, l2norm,
        beta_is_logit, allow_neg_eigval, state_layout, output_final_state, backend, here=True,
    )  # fmt: skip
    return out, _absent(v) if final is None else final


def _recurrent_fake(
    q, k, v, g, beta, *, initial_state=None, state_layout="vk", output_final_state=False, **_
):
    out, final, _ = _prefill_fake(
        q, k, v, g, beta, state_layout=state_layout, output_final_state=output_final_state
    )
    return out, final


def _fwd_kernel(*arguments, **options):
    _C.fwd(*arguments, **options)


def _fwd_fake(*arguments, **options):
    return None


def _decode_fake(q, k, v, g, beta, state, **_):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _tensors(arguments, options):
    return (x for x in (*arguments, *options.values()) if isinstance(x, Tensor))


def _autograd(name):
    def kernel(*arguments, **options):
        if torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(arguments, options)):
            raise NotImplementedError(
                f"torch.ops.flash_kda.{name} has no derivative: {NO_BACKWARD}"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.flash_kda, name).default(*arguments, **options)

    return kernel


NO_BACKWARD = "use torch.no_grad(), torch.inference_mode(), or tensors that do not require grad"

_KERNELS = {
    "prefill": (_prefill_kernel, _prefill_fake),
    "fwd": (_fwd_kernel, _fwd_fake),
    "recurrent": (_recurrent_kernel, _recurrent_fake),
    "decode": (decode, _decode_fake),
}


def _autocast(name, device):
    def kernel(q, k, v, *arguments, **options):
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return getattr(torch.ops.flash_kda, name).default(
                *(x.to(dtype) if x.is_floating_point() else x for x in (q, k, v)),
                *arguments,
                **options,
            )

    return kernel


_KEY, _KEYS = torch._C.DispatchKey, torch._C.DispatchKeySet
_AUTOCAST_KEYS = _KEYS(_KEY.AutocastCPU) | _KEYS(_KEY.AutocastCUDA)


def _define():
    library = torch.library.Library("flash_kda", "DEF")
    for name, schema in _SCHEMAS.items():
        kernel, fake = _KERNELS[name]
        library.define(name + " ".join(schema.split()), tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            library.impl(name, kernel, device)
        library.impl(name, autograd.prefill if name == "prefill" else _autograd(name), "Autograd")
        torch.library.register_fake(f"flash_kda::{name}", fake, lib=library)
    # fwd writes to memory of the caller, whose dtype autocast cannot change.
    for name in ("prefill", "recurrent", "decode"):
        library.impl(name, _autocast(name, "cpu"), "AutocastCPU")
        library.impl(name, _autocast(name, "cuda"), "AutocastCUDA")
    return library


_library = _define()  # the operators live as long as this object
