"""chunk_kda and fused_recurrent_kda on CPU tensors, against the token recurrence in double precision."""

import inspect

import flash_kda
import numpy as np
import pytest
import torch
from problems import TOLERANCE, Torch, bits, error, problem, tolerance

pytestmark = pytest.mark.filterwarnings("error")


def flags(p):
    """FLA's names for the options of a problem."""
    options = p.options
    gate = options.get("gate", "bounded")
    result = dict(
        use_qk_l2norm_in_kernel=options.get("l2norm", True),
        use_gate_in_kernel=gate != "direct",
        use_beta_sigmoid_in_kernel=options.get("beta_is_logit", True),
        allow_neg_eigval=options.get("allow_neg_eigval", False),
        lower_bound=-5.0 if gate == "bounded" else None,
    )
    if gate != "direct":
        result.update(A_log=Torch.of(p.A_log), dt_bias=Torch.of(p.dt_bias.reshape(-1)))
    return result


def call(function, p, v_first=True, **options):
    """(out, final_state, ...) with states [N,HV,V,K] on both sides, whatever the layout of the call."""
    initial = Torch.of(p.initial_state)
    if initial is not None and not v_first:
        initial = initial.transpose(-1, -2).contiguous()
    options = {**flags(p), **options}
    out, *states = function(
        *p.tensors(Torch), initial_state=initial, cu_seqlens=Torch.of(p.cu_seqlens),
        output_final_state=True, state_v_first=v_first, **options,
    )  # fmt: skip
    return out, *(x if v_first else x.transpose(-1, -2).contiguous() for x in states)


def check(p, out, final):
    gold_out, gold_final = p.gold()
    dtype = str(out.dtype).removeprefix("torch.")
    assert error(out, gold_out) <= tolerance(dtype, gold_out.size)
    assert final.dtype == torch.float32
    assert error(final, gold_final) <= TOLERANCE["float32"]


PROBLEMS = [
    dict(B=2, T=70, HV=4),
    dict(T=33, gate="softplus", dtype="float32"),
    dict(B=2, T=65, HV=6, gate="direct", K=32, V=80),
    dict(T=40, allow_neg_eigval=True, state=False),
    dict(T=40, l2norm=False, beta_is_logit=False, gate="direct", dtype="float16"),
    dict(lens=[20, 0, 41], HV=4, gate="softplus"),
]


@pytest.mark.parametrize("v_first", [True, False], ids=["vk", "kv"])
@pytest.mark.parametrize("function", [flash_kda.chunk_kda, flash_kda.fused_recurrent_kda])
@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
def test_against_gold(function, shape, v_first):
    p = problem(**shape)
    if not p.options.get("l2norm", True):
        p.k /= 8  # else the recurrence grows without bounds
    check(p, *call(function, p, v_first))


@pytest.mark.parametrize("T", [1, 2, 8])
@pytest.mark.parametrize("v_first", [True, False], ids=["vk", "kv"])
@pytest.mark.parametrize("state", [True, False])
def test_few_tokens(T, v_first, state):
    """What runs on the decode kernel."""
    p = problem(B=3, T=T, HV=4, gate="softplus", state=state)
    before = None if p.initial_state is None else p.initial_state.copy()
    out, final = call(flash_kda.fused_recurrent_kda, p, v_first)
    check(p, out, final)
    if state:
        assert p.initial_state.tobytes() == before.tobytes()
        initial = Torch.of(before)
        out_only, none = flash_kda.fused_recurrent_kda(
            *p.tensors(Torch), initial_state=initial, state_v_first=True, **flags(p)
        )
        assert none is None and bits(out_only) == bits(call(flash_kda.fused_recurrent_kda, p)[0])
        half, _ = flash_kda.fused_recurrent_kda(
            *p.tensors(Torch), initial_state=initial.bfloat16(), output_final_state=True,
            state_v_first=True, **flags(p),
        )  # fmt: skip
        assert error(half, p.gold()[0]) <= 1e-2


@pytest.mark.parametrize("chunk_size", [64, 32])
@pytest.mark.parametrize("v_first", [True, False], ids=["vk", "kv"])
@pytest.mark.parametrize(
    "shape", [dict(B=2, T=150, HV=4), dict(lens=[64, 0, 130, 1]), dict(T=0)], ids=str
)
def test_intermediate_states(shape, v_first, chunk_size):
    p = problem(**shape)
    lens = np.diff(p.cu_seqlens) if p.cu_seqlens is not None else [p.q.shape[1]] * p.q.shape[0]
    rows = sum(-(-int(n) // chunk_size) for n in lens)
    out, final, states = call(
        flash_kda.chunk_kda, p, v_first, return_intermediate_states=True, chunk_size=chunk_size
    )
    assert states.dtype == out.dtype
    assert states.shape == (p.q.shape[0], rows // p.q.shape[0], *p.state_shape[1:])
    gold = np.full((rows, *p.state_shape[1:]), np.nan)
    p.gold(
        checkpoint_state=gold, checkpoint_every=chunk_size, checkpoint_before=True
    ) if rows else 0
    assert error(states.reshape(gold.shape), gold) <= TOLERANCE["bfloat16"]
    check(p, out, final) if rows else None
    if p.cu_seqlens is None:
        return
    lengths = dict(return_intermediate_states=True, chunk_size=chunk_size)
    cpu = call(flash_kda.chunk_kda, p, v_first, cu_seqlens_cpu=Torch.of(p.cu_seqlens), **lengths)
    assert bits(cpu[2]) == bits(states)
    bound = call(flash_kda.chunk_kda, p, v_first, use_graph=True, max_num_seqs=p.N, **lengths)
    assert bound[2].shape[1] == -(-p.q.shape[1] // chunk_size) + p.N - 1
    assert bits(bound[2][:, :rows]) == bits(states)


def test_layouts_of_memory():
    """Strided inputs are taken as they are, copied where the innermost dimension is not contiguous."""
    p = problem(B=2, T=40, HV=4)
    q, k, v, g, beta = p.tensors(Torch)
    expected = call(flash_kda.chunk_kda, p)
    initial = Torch.of(p.initial_state)
    options = dict(output_final_state=True, state_v_first=True, **flags(p))

    def channels_first(x):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    for convert in (
        channels_first,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], -1)[..., 0],
    ):
        inputs = [convert(x) for x in (q, k, v, g, beta)]
        state = convert(initial)
        assert not inputs[0].is_contiguous()
        out, final = flash_kda.chunk_kda(*inputs, initial_state=state, **options)
        assert out.is_contiguous() and bits(out) == bits(expected[0])
        assert bits(final) == bits(expected[1])
        few = [x[:, :3] for x in inputs]
        out, final = flash_kda.fused_recurrent_kda(*few, initial_state=state, **options)
        again = [x[:, :3].contiguous() for x in (q, k, v, g, beta)]
        same = flash_kda.fused_recurrent_kda(*again, initial_state=initial, **options)
        assert bits(out) == bits(same[0]) and bits(final) == bits(same[1])
        out, _ = flash_kda.fused_recurrent_kda(
            *few, initial_state=state, **{**options, "output_final_state": False}
        )
        assert bits(out) == bits(same[0])


def test_dtypes_that_are_converted():
    p = problem(T=20, dtype="float32")
    q, k, v, g, beta = p.tensors(Torch)
    expected = call(flash_kda.chunk_kda, p)[0]
    options = dict(initial_state=Torch.of(p.initial_state), state_v_first=True, **flags(p))
    options["A_log"], options["dt_bias"] = options["A_log"].double(), options["dt_bias"].double()
    out, _ = flash_kda.chunk_kda(q, k, v, g.double(), beta.double(), **options)
    assert bits(out) == bits(expected)
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int16)
    out, _ = flash_kda.chunk_kda(q, k, v, g, beta, cu_seqlens=cu_seqlens, **options)
    assert bits(out) == bits(expected)


def test_parameters_and_subclasses():
    p = problem(T=20)
    expected = call(flash_kda.chunk_kda, p)

    class Subclass(torch.Tensor):
        pass

    tensors = [x.as_subclass(Subclass) for x in p.tensors(Torch)]
    options = flags(p)
    options["A_log"] = torch.nn.Parameter(options["A_log"])
    with torch.no_grad():
        out, final = flash_kda.chunk_kda(
            *tensors, initial_state=Torch.of(p.initial_state), output_final_state=True,
            state_v_first=True, **options,
        )  # fmt: skip
    assert bits(out) == bits(expected[0]) and bits(final) == bits(expected[1])


@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_gradients_only_where_they_are_asked_for(name):
    function = getattr(flash_kda, name)
    p = problem(T=5)
    tensors = p.tensors(Torch)
    plain = function(*tensors, **flags(p))[0]
    assert not plain.requires_grad
    for i in range(5):
        inputs = list(tensors)
        inputs[i] = inputs[i].clone().requires_grad_()
        out = function(*inputs, **flags(p))[0]
        assert out.requires_grad
        out.sum().backward()
        assert inputs[i].grad.shape == inputs[i].shape and inputs[i].grad.abs().sum() > 0
        with torch.no_grad():
            assert not function(*inputs, **flags(p))[0].requires_grad
        with torch.inference_mode():
            function(*inputs, **flags(p))
    for extra in ("A_log", "dt_bias", "initial_state"):
        options = {**flags(p), "initial_state": Torch.of(p.initial_state), "state_v_first": True}
        options[extra] = torch.nn.Parameter(options[extra])
        assert function(*tensors, **options)[0].requires_grad
    half_made = tensors[0].clone().requires_grad_() * 2
    assert function(half_made, *tensors[1:], **flags(p))[0].requires_grad


def test_wrong_arguments():
    p = problem(T=5)
    tensors, options = p.tensors(Torch), flags(p)
    chunk, recurrent = flash_kda.chunk_kda, flash_kda.fused_recurrent_kda

    def refused(function, match, exception=ValueError, **changed):
        with pytest.raises(exception, match=match):
            function(*tensors, **{**options, **changed})

    for function in (chunk, recurrent):
        refused(function, "unexpected keyword argument 'use_qk_l2norm'", TypeError, use_qk_l2norm=1)
        refused(function, "A_log: None", lower_bound=None, A_log=None)
        refused(
            function, "allow_neg_eigval: True", allow_neg_eigval=True,
            use_beta_sigmoid_in_kernel=False,
        )  # fmt: skip
        refused(function, "lower_bound: -6", lower_bound=-6.0)
        refused(function, "initial_state: shape", initial_state=torch.zeros(1, 2, 64, 63))
        refused(function, "initial_state: shape", initial_state=torch.zeros(2, 2, 64, 64))
        refused(function, "transpose_state_layout", state_v_first=True, transpose_state_layout=True)
        with pytest.raises(ValueError, match=r"k: shape \[1,5,2,32\], expected \[1,5,2,64\]"):
            function(tensors[0], tensors[1][..., :32], *tensors[2:], **options)
        with pytest.raises(ValueError, match="shape .*expected"):
            function(*(x[0] for x in tensors), output_final_state=True, **options)
    refused(chunk, "safe_gate", lower_bound=None, safe_gate=True)
    refused(chunk, "chunk_size: 48", chunk_size=48)
    refused(chunk, "cp_context", NotImplementedError, cp_context=object())
    refused(
        chunk, "max_num_seqs = 3", use_graph=True, max_num_seqs=3,
        cu_seqlens=torch.tensor([0, 2, 5]),
    )  # fmt: skip


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_the_old_name_of_state_v_first(name):
    function = getattr(flash_kda, name)
    p = problem(T=5, K=32)
    arguments = dict(initial_state=Torch.of(p.initial_state), output_final_state=True, **flags(p))
    expected = function(*p.tensors(Torch), state_v_first=True, **arguments)
    with pytest.warns(DeprecationWarning, match="state_v_first") as warned:
        result = function(*p.tensors(Torch), transpose_state_layout=True, **arguments)
    assert warned[0].filename == __file__
    assert [bits(x) for x in result] == [bits(x) for x in expected]


def test_signatures():
    """No *args, no **kwargs; the positional ones are those of fla-core 0.6.0, in its order."""
    names = {}
    for function in (flash_kda.chunk_kda, flash_kda.fused_recurrent_kda):
        parameters = inspect.signature(function).parameters.values()
        assert not {p.kind for p in parameters} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}  # fmt: skip
        names[function.__name__] = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names["chunk_kda"] == [
        "q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state",
        "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel",
        "allow_neg_eigval", "safe_gate", "lower_bound", "disable_recompute",
        "return_intermediate_states", "state_v_first", "cu_seqlens", "cu_seqlens_cpu",
        "cp_context", "use_graph", "max_num_seqs",
    ]  # fmt: skip
    assert names["fused_recurrent_kda"] == [
        "q", "k", "v", "g", "beta", "A_log", "dt_bias", "scale", "initial_state",
        "output_final_state", "use_qk_l2norm_in_kernel", "use_gate_in_kernel",
        "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "lower_bound", "state_v_first",
        "cu_seqlens",
    ]  # fmt: skip


def test_rows_of_no_sequence():
    """fused_recurrent_kda's out is zero there, as FLA's is."""
    p = problem(lens=[3, 4], state=False)
    out, _ = flash_kda.fused_recurrent_kda(
        *p.tensors(Torch), cu_seqlens=torch.tensor([0, 3, 5]), **flags(p)
    )
    assert (out[:, 5:] == 0).all() and (out[:, :5] != 0).any()


def test_torch_is_imported_late(run_python):
    printed = run_python(
        """
import sys, flash_kda
from flash_kda import *
assert "torch" not in sys.modules
assert {"chunk_kda", "fused_recurrent_kda", "ops", "integrations"} <= set(dir(flash_kda))
flash_kda.chunk_kda
assert "torch" in sys.modules
from flash_kda import fused_recurrent_kda
print(flash_kda.fused_recurrent_kda is fused_recurrent_kda)
try:
    flash_kda.chunk_kdb
except AttributeError as problem:
    print(problem)
"""
    )
    assert printed == "True\nmodule 'flash_kda' has no attribute 'chunk_kdb'"


def test_no_warnings_on_import(run_python):
    code = "import torch, warnings; warnings.simplefilter('error'); import flash_kda.ops"
    assert run_python(code) == ""
