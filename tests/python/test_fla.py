"""flash-linear-attention on this library: found by itself, and through register().

Runs with whatever fla-core `import fla` finds; scripts/test.sh repeats it for several versions. On a machine
without a GPU FLA's own kernels cannot run at all, so a result here can only be ours; calls are counted too.
"""

import inspect
import logging
import sys
import types

import flash_kda
import numpy as np
import pytest
import torch
from problems import (
    TOLERANCE,
    Torch,
    bits,
    error,
    problem,
    tolerance_on,
    why_no_cuda,
    wrap_functions,
)
from test_functional import flags

kda = pytest.importorskip("fla.ops.kda", exc_type=ImportError)

from fla.ops.kda.naive import naive_recurrent_kda  # noqa: E402
from flash_kda.integrations import fla as integration  # noqa: E402

V_FIRST = (
    "state_v_first"
    if "state_v_first" in inspect.signature(kda.chunk_kda).parameters
    else "transpose_state_layout"  # 0.5.0
)
IN_KERNEL = {
    "use_gate_in_kernel": True,
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "safe_gate": True,
    "lower_bound": -5.0,
    V_FIRST: True,
}


def counted(monkeypatch, owner, name):
    """The calls of owner.name, which still runs: (number of positional arguments, keywords)."""
    recorded = []
    run = getattr(owner, name)

    def counting(*arguments, **keywords):
        recorded.append((len(arguments), sorted(keywords)))
        return run(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counting)
    return recorded


# ---- by itself ------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    return counted(monkeypatch, flash_kda, "fwd")


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "shape", [dict(B=2, T=70), dict(lens=[64, 0, 33, 1]), dict(T=40, state=False)], ids=str
)
def test_chunk_kda_calls_us(calls, guard, shape):
    p = problem(H=2, K=128, V=128, **shape)
    keywords = dict(
        A_log=Torch.of(p.A_log),
        dt_bias=Torch.of(p.dt_bias.reshape(-1)),
        initial_state=Torch.of(p.initial_state),
        output_final_state=True,
        cu_seqlens=Torch.of(p.cu_seqlens),
        **IN_KERNEL,
    )
    with guard():
        out, final = kda.chunk_kda(*p.tensors(Torch), **keywords)
    assert calls == [
        (7, ["A_log", "cu_seqlens", "dt_bias", "final_state", "initial_state", "lower_bound"])
    ]
    gold_out, gold_final = p.gold()
    assert error(out, gold_out) <= TOLERANCE["bfloat16"]
    assert error(final, gold_final) <= TOLERANCE["bfloat16"]


def test_naive_recurrence_agrees(calls):
    """FLA's own definition of the operator, in PyTorch, gives what our kernels give."""
    p = problem(B=2, T=30, H=2, K=128, V=128)
    out, final = naive(p)
    ours, state = p.fwd(Torch)
    assert error(ours, out) <= TOLERANCE["bfloat16"]
    assert error(state, final) <= TOLERANCE["float32"]


def test_exceptions_reach_the_caller(calls):
    p = problem(B=1, T=20, H=2, K=128, V=128)
    A_log, dt_bias = Torch.of(p.A_log), Torch.of(p.dt_bias)
    with torch.no_grad(), pytest.raises(ValueError, match="lower_bound"):
        kda.chunk_kda(
            *p.tensors(Torch), A_log=A_log, dt_bias=dt_bias, **{**IN_KERNEL, "lower_bound": -9.0}
        )
    assert len(calls) == 1


# ---- registered -----------------------------------------------------------------------------------------


def naive(p):
    """FLA's naive_recurrent_kda on a problem: (out, final_state [N,HV,V,K]) as NumPy arrays."""
    q, k, v, g, beta = (x.float() for x in p.tensors(Torch))
    if p.options.get("l2norm", True):
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    gate = p.options.get("gate", "bounded")
    if gate != "direct":
        A, raw = Torch.of(p.A_log).exp()[:, None], g + Torch.of(p.dt_bias)
        softplus = torch.nn.functional.softplus
        g = -5 * torch.sigmoid(A * raw) if gate == "bounded" else -A * softplus(raw)
    if p.options.get("beta_is_logit", True):
        beta = beta.sigmoid() * (2 if p.options.get("allow_neg_eigval") else 1)
    bounds = [0, q.shape[1]] if p.cu_seqlens is None else p.cu_seqlens.tolist()
    outs, finals = [], []
    for n, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        state = None
        if p.initial_state is not None:
            state = Torch.of(p.initial_state).transpose(2, 3)
            state = state[n : n + 1] if p.cu_seqlens is not None else state
        out, final = naive_recurrent_kda(
            *(x[:, begin:end] for x in (q, k, v, g, beta)), initial_state=state, output_final_state=True
        )  # fmt: skip
        outs.append(out)
        finals.append(final.transpose(2, 3))
    return (
        torch.cat(outs, 1).numpy().astype(np.float64),
        torch.cat(finals).contiguous().numpy().astype(np.float64),
    )


class Registered:
    def __init__(self):
        self.calls = []  # "prefill" or "recurrent", whatever runs here
        self.how = integration.register()


@pytest.fixture
def registered():
    result = Registered()

    def counted(kind, run):
        def call(*arguments, **keywords):
            results = run(*arguments, **keywords)
            if results is not NotImplemented:
                result.calls.append(kind)
            return results

        return call

    undo = wrap_functions(counted)
    yield result
    undo()
    integration.unregister()


PROBLEMS = {
    "fla_takes_it_too": dict(K=128, V=128),
    "softplus": dict(gate="softplus", K=128, V=128),
    "activated": dict(gate="direct", K=128, V=128),
    "activated_all": dict(gate="direct", l2norm=False, beta_is_logit=False),
    "gva": dict(H=2, HV=6, K=128, V=128),
    "d64": dict(K=64, V=64),
    "neg_eigval": dict(K=128, V=128, allow_neg_eigval=True),
    "float32": dict(dtype="float32", K=48, V=80),
    "ragged": dict(lens=[20, 0, 9, 33], gate="softplus"),
    "no_state": dict(gate="softplus", state=False),
}


@pytest.mark.parametrize("v_first", [True, False], ids=["vk", "kv"])
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
@pytest.mark.parametrize("what", PROBLEMS)
def test_registered(registered, what, name, T, v_first):
    shape = PROBLEMS[what]
    p = problem(**shape) if "lens" in shape else problem(B=2, T=T, **shape)
    if not p.options.get("l2norm", True):
        p.k /= 8
    state = Torch.of(p.initial_state)
    if state is not None and not v_first:
        state = state.transpose(2, 3)
    out, final = getattr(kda, name)(
        *p.tensors(Torch), initial_state=state, output_final_state=True,
        cu_seqlens=Torch.of(p.cu_seqlens), **{V_FIRST: v_first}, **flags(p),
    )  # fmt: skip
    few = name == "fused_recurrent_kda" and T == 1 and "lens" not in shape
    assert registered.calls == ["recurrent" if few else "prefill"]
    if not v_first:
        final = final.transpose(2, 3).contiguous()
    gold_out, gold_final = naive(p)
    dtype = str(out.dtype).removeprefix("torch.")
    assert error(out, gold_out) <= TOLERANCE[dtype]
    assert error(final, gold_final) <= TOLERANCE["float32"]


@pytest.mark.skipif(bool(why_no_cuda()), reason=why_no_cuda())
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("what", [what for what in PROBLEMS if what != "float32"])
def test_registered_on_cuda(registered, what, T):
    """The same on the GPU, where FLA's own kernels would run; and chunk_kda as FLA finds it by itself."""
    shape = PROBLEMS[what]
    p = problem(**shape) if "lens" in shape else problem(B=2, T=T, **shape)
    if not p.options.get("l2norm", True):
        p.k /= 8
    tensors, options = p.tensors(Torch), {**flags(p), "initial_state": Torch.of(p.initial_state)}
    options["cu_seqlens"] = Torch.of(p.cu_seqlens)
    tensors = [x.cuda() for x in tensors]
    options = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    gold_out, gold_final = naive(p)
    for name in ("chunk_kda", "fused_recurrent_kda"):
        out, final = getattr(kda, name)(
            *tensors, output_final_state=True, **{V_FIRST: True}, **options
        )
        few = name == "fused_recurrent_kda" and T == 1 and "lens" not in shape
        assert registered.calls.pop() == ("recurrent" if few else "prefill")
        assert registered.calls == []
        assert error(out.cpu(), gold_out) <= tolerance_on("cuda")
        assert error(final.cpu(), gold_final) <= tolerance_on("cuda")


@pytest.mark.skipif(bool(why_no_cuda()), reason=why_no_cuda())
def test_chunk_kda_calls_us_on_cuda(calls):
    p = problem(B=2, T=70, H=2, K=128, V=128)
    tensors = dict(A_log=p.A_log, dt_bias=p.dt_bias.reshape(-1), initial_state=p.initial_state)
    tensors = {name: Torch.of(x).cuda() for name, x in tensors.items()}
    with torch.no_grad():
        out, final = kda.chunk_kda(
            *(x.cuda() for x in p.tensors(Torch)), **tensors, output_final_state=True, **IN_KERNEL
        )
    assert len(calls) == 1
    gold_out, gold_final = p.gold()
    assert error(out.cpu(), gold_out) <= tolerance_on("cuda")
    assert error(final.cpu(), gold_final) <= tolerance_on("cuda")


@pytest.mark.parametrize("v_first", [True, False], ids=["vk", "kv"])
def test_intermediate_states(registered, v_first):
    p = problem(B=2, T=150, K=128, V=128)
    initial = Torch.of(p.initial_state)
    with torch.inference_mode():
        out, final, states = kda.chunk_kda(
            *p.tensors(Torch), initial_state=initial if v_first else initial.transpose(2, 3),
            output_final_state=True, return_intermediate_states=True, **{V_FIRST: v_first}, **flags(p),
        )  # fmt: skip
    assert registered.calls == ["prefill"]
    assert states.shape == (2, 3, 2, 128, 128) and states.dtype == torch.bfloat16
    states = states if v_first else states.transpose(3, 4)
    assert bits(states[:, 0]) == bits(initial.bfloat16())
    for chunk in (
        1,
        2,
    ):  # the state at the start of the chunk is the final one of what comes before
        before = problem(B=2, T=150, K=128, V=128)
        for field in ("q", "k", "v", "g", "beta"):
            setattr(before, field, getattr(p, field)[:, : 64 * chunk])
        assert error(states[:, chunk], before.gold()[1]) <= TOLERANCE["bfloat16"]


def declined(registered, name="chunk_kda", **changed):
    """Whether the call went on to FLA, whose kernels cannot run here."""
    p = problem(T=5, K=128, V=128)
    tensors = dict(zip(("q", "k", "v", "g", "beta"), p.tensors(Torch)))
    registered.calls.clear()
    with pytest.raises((RuntimeError, TypeError, AttributeError, AssertionError, ValueError)):
        getattr(kda, name)(**{**tensors, **flags(p), **changed})
    return registered.calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="FLA's kernels run on a GPU")
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_what_goes_on_to_fla(registered, monkeypatch, name):
    with monkeypatch.context() as patch:  # gradients, on a device without a backward
        patch.setattr(flash_kda.ops, "supports_gradients", lambda *_: (False, "made up"))
        assert declined(registered, name, A_log=torch.nn.Parameter(torch.zeros(2)))
    assert declined(registered, name, k=torch.zeros(1, 5, 2, 64, dtype=torch.bfloat16))
    assert declined(registered, name, lower_bound=-7.0)
    assert declined(registered, name, beta=torch.zeros(1, 5, 2, 128, dtype=torch.bfloat16))
    if name == "chunk_kda":
        context = types.SimpleNamespace(cu_seqlens=None)
        assert declined(registered, name, cp_context=context)
        assert declined(registered, name, an_option_of_tomorrow=1)
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    assert declined(registered, name)
    monkeypatch.delenv("FLA_FLASH_KDA")


@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_gradients(registered, name):
    """FLA's function trains on our kernels."""
    p = problem(T=20, HV=4, K=128, V=128, dtype="float32")

    def gradients(function):
        given = dict(zip(("q", "k", "v", "g", "beta"), p.tensors(Torch)))
        given |= {n: x for n, x in flags(p).items() if n in ("A_log", "dt_bias")}
        given = {n: x.clone().requires_grad_() for n, x in given.items()}
        out, _ = function(**{**flags(p), **given})
        return torch.autograd.grad(out.square().sum(), list(given.values()))

    through_fla = gradients(getattr(kda, name))
    assert set(registered.calls) == {"prefill"}  # once by us, once by the operator
    ours = gradients(flash_kda.chunk_kda)
    assert all(torch.equal(a, b) for a, b in zip(through_fla, ours))


@pytest.mark.skipif(torch.cuda.is_available(), reason="FLA's kernels run on a GPU")
def test_registering_and_unregistering():
    originals = kda.chunk_kda, kda.fused_recurrent_kda
    elsewhere = types.ModuleType("elsewhere")
    elsewhere.recurrent = kda.fused_recurrent_kda
    sys.modules["elsewhere"] = elsewhere
    p = problem(T=5)
    try:
        how = integration.register()
        assert how == integration.register()
        assert how["chunk_kda"] == "registry"
        for name, original in zip(how, originals):
            assert (getattr(kda, name) is original) == (how[name] == "registry")
        assert elsewhere.recurrent is kda.fused_recurrent_kda
        elsewhere.recurrent(*p.tensors(Torch), **flags(p))
        integration.unregister()
        assert (kda.chunk_kda, kda.fused_recurrent_kda) == originals
        assert elsewhere.recurrent is originals[1]
        for function in originals:
            with pytest.raises((RuntimeError, AttributeError)):
                function(*p.tensors(Torch), **flags(p))
        assert integration.register() == how
        kda.chunk_kda(*p.tensors(Torch), **flags(p))
    finally:
        integration.unregister()
        del sys.modules["elsewhere"]


def test_supports_says_why():
    p = problem(T=5)
    arguments = dict(zip(("q", "k", "v", "g", "beta"), p.tensors(Torch)), **flags(p))
    assert integration.supports("chunk_kda", **arguments) == (True, "")
    assert integration.supports("fused_recurrent_kda", **arguments) == (True, "")
    assert integration.supports("chunk_kda", cp_context=1, **arguments)[1] == "context parallelism"
    arguments["q"] = arguments["q"][..., :48]
    good, reason = integration.supports("chunk_kda", **arguments)
    assert not good and reason.startswith("k: shape")


def test_fla_logs_the_route(registered, caplog):
    """FLA says each route once a process: taken from its log where this is the first."""
    p = problem(T=5)
    with caplog.at_level(logging.INFO):
        kda.chunk_kda(*p.tensors(Torch), **flags(p))
    assert len(registered.calls) == 1
    assert all("libflashkda" in m for m in caplog.messages if "->" in m and "reject" not in m)


OLD_TORCH = """
import torch._dynamo.eval_frame
def innermost(function):  # torch 2.10 and older: as far as the chain goes, wraps() copies included
    while hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    return function
torch._dynamo.eval_frame.innermost_fn = innermost
"""
ROUTES = """
import torch, flash_kda.integrations.fla, fla.ops.kda
print(flash_kda.integrations.fla.register())
q = torch.randn(1, 5, 2, 64)
arguments = q, q, q, -q.abs(), q[..., 0].sigmoid()
calls = []
def counted(kind, run):
    def call(*a, **k):
        calls.append(kind)
        return run(*a, **k)
    return call
flash_kda._C._prefill_results = counted("prefill", flash_kda._C._prefill_results)
flash_kda._C._recurrent_results = counted("recurrent", flash_kda._C._recurrent_results)
for name in ("chunk_kda", "fused_recurrent_kda"):
    try:
        getattr(fla.ops.kda, name)(*arguments, scale=1.0)
    except Exception:
        pass
print(len(calls))
"""


def test_where_the_dispatcher_cannot_fire(run_python):
    """Some versions put torch.compiler.disable around a function that it has already been around. Older
    versions of torch then unwrap both, and FLA's dispatcher with them: register() rebinds instead."""
    how, count = run_python(OLD_TORCH + ROUTES).splitlines()[-2:]
    version = __import__("fla").__version__
    assert count == "2"
    assert ("'chunk_kda': 'rebound'" in how) == (version in ("0.5.1", "0.5.2"))


def test_dispatch_switched_off(monkeypatch):
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1")
    originals = kda.chunk_kda, kda.fused_recurrent_kda
    assert integration.register() == {"chunk_kda": "off", "fused_recurrent_kda": "off"}
    assert (kda.chunk_kda, kda.fused_recurrent_kda) == originals


@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_signatures(name):
    """Ours takes what FLA's takes, with its defaults; in the newest version's order."""
    theirs = [
        p
        for p in inspect.signature(getattr(kda, name)).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    ours = inspect.signature(getattr(flash_kda, name)).parameters
    for p in theirs:
        if p.name != "transpose_state_layout":
            assert ours[p.name].default == p.default
    if "use_graph" in inspect.signature(kda.chunk_kda).parameters:  # 0.6.0
        positional = [x.name for x in ours.values() if x.kind is x.POSITIONAL_OR_KEYWORD]
        assert positional == [p.name for p in theirs]
