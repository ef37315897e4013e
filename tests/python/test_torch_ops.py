"""torch.ops.flash_kda: registration, compilation, export, autocast, modes. CPU tensors."""

import warnings

import flash_kda
import pytest
import torch
import torch._dynamo.testing
from flash_kda import ops
from problems import Torch, bits, problem
from test_functional import flags
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.flash_kda


def prefill_arguments(p, **options):
    names = dict(
        A_log=p.A_log, dt_bias=p.dt_bias, initial_state=p.initial_state, cu_seqlens=p.cu_seqlens
    )
    return tuple(p.tensors(Torch)), {
        **{name: Torch.of(x) for name, x in names.items() if x is not None},
        **p.options,
        **options,
    }


PREFILLS = {
    "plain": (dict(T=20), {}),
    "states": (dict(B=2, T=70, HV=4, gate="softplus"), dict(output_final_state=True)),
    "kv": (dict(T=20, K=32, V=32), dict(output_final_state=True, state_layout="kv")),
    "no_initial": (dict(T=20, state=False), dict(output_final_state=True, backend="cpu-scalar")),
    "ragged": (dict(lens=[5, 0, 33]), dict(output_final_state=True, zero_out=True)),
    "checkpoints": (
        dict(B=2, T=70, gate="direct"),
        dict(checkpoint_every=32, checkpoint_rows=6, checkpoint_before=True),
    ),
    "empty": (dict(T=0), dict(output_final_state=True)),
}


@pytest.mark.parametrize("name", PREFILLS)
def test_opcheck_prefill(name):
    shape, options = PREFILLS[name]
    arguments = prefill_arguments(problem(**shape), **options)
    torch.library.opcheck(OPS.prefill.default, *arguments)


@pytest.mark.parametrize(
    "options", [{}, dict(state=True, checkpoints=True), dict(pool=True)], ids=str
)
def test_opcheck_fwd(options):
    p = problem(lens=[20, 0, 41], K=32)
    out = torch.zeros_like(Torch.of(p.v))
    keywords = {"cu_seqlens": Torch.of(p.cu_seqlens)}
    if options.get("state"):
        keywords["initial_state"] = Torch.of(p.initial_state)
        keywords["final_state"] = torch.zeros(p.state_shape)
    if options.get("checkpoints"):
        keywords["checkpoint_state"] = torch.zeros(5, *p.state_shape[1:])
        keywords["checkpoint_every"] = 32
    if options.get("pool"):
        keywords["initial_state"] = torch.zeros(7, *p.state_shape[1:])
        keywords["state_indices"] = torch.tensor([4, 2, 0])
        keywords["final_state"] = torch.zeros(7, *p.state_shape[1:])
        keywords["has_initial_state"] = torch.tensor([True, False, True])
    arguments = (*p.tensors(Torch), None, out, Torch.of(p.A_log), Torch.of(p.dt_bias), -5.0)
    torch.library.opcheck(OPS.fwd.default, arguments, keywords)


@pytest.mark.parametrize("state", [False, True])
def test_opcheck_recurrent(state):
    p = problem(B=2, T=2, HV=4, gate="softplus", state=state)
    arguments = prefill_arguments(p, output_final_state=True)
    torch.library.opcheck(OPS.recurrent.default, *arguments)


@pytest.mark.parametrize("pool", [False, True])
def test_opcheck_decode(pool):
    p = problem(B=3, T=2, HV=4, gate="softplus")
    keywords = {"gate": "softplus", "A_log": Torch.of(p.A_log), "dt_bias": Torch.of(p.dt_bias)}
    state = Torch.of(p.initial_state)
    if pool:
        state = torch.zeros(9, *p.state_shape[1:])
        keywords["state_indices"] = torch.tensor([[4, 2], [0, -1], [1, 3]], dtype=torch.int32)
        keywords["num_accepted_tokens"] = torch.tensor([1, 1, 2])
    torch.library.opcheck(OPS.decode.default, (*p.tensors(Torch), state), keywords)


@pytest.mark.parametrize("name", PREFILLS)
def test_the_operator_and_the_direct_way_agree(name):
    shape, options = PREFILLS[name]
    p = problem(**shape)
    arguments, keywords = prefill_arguments(p, **options)
    direct = ops.prefill(
        *arguments,
        scale=None,
        **{
            **dict.fromkeys(("A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")),
            **dict(gate="bounded", l2norm=True, beta_is_logit=True, allow_neg_eigval=False),
            **dict(state_layout="vk", output_final_state=False),
            **keywords,
        },
    )
    for got, expected in zip(OPS.prefill(*arguments, **keywords), direct):
        assert got.shape == (0,) if expected is None else bits(got) == bits(expected)


def test_fwd_and_decode_write_in_place():
    p = problem(B=2, T=3)
    inputs, A_log, dt_bias = p.tensors(Torch), Torch.of(p.A_log), Torch.of(p.dt_bias)
    out, final = p.fwd(Torch)
    written, state = torch.zeros_like(inputs[2]), torch.zeros(p.state_shape)
    arguments = (*inputs, None, written, A_log, dt_bias, None)
    assert OPS.fwd(*arguments, initial_state=Torch.of(p.initial_state), final_state=state) is None
    assert bits(written) == bits(out) and bits(state) == bits(final)
    pool = Torch.of(p.initial_state.copy())
    expected_pool = Torch.of(p.initial_state.copy())
    result = OPS.decode(*inputs, pool, A_log=A_log, dt_bias=dt_bias)
    expected = flash_kda.decode(*inputs, expected_pool, A_log=A_log, dt_bias=dt_bias)
    assert bits(result) == bits(expected) and bits(pool) == bits(expected_pool)
    result = OPS.decode(
        *inputs, torch.empty_like(pool), A_log=A_log, dt_bias=dt_bias, initial_state=pool
    )
    assert bits(result) == bits(flash_kda.decode(*inputs, pool, A_log=A_log, dt_bias=dt_bias))


def test_the_short_way_is_for_the_usual_call():
    """One call of C with its results: plain tensors as they are, and everything else is left to ops.py."""
    p = problem(B=2, T=4)
    q, k, v, g, beta = p.tensors(Torch)
    state = Torch.of(p.initial_state)
    names = dict(
        q=q, k=k, v=v, g=g, beta=beta, scale=None, A_log=Torch.of(p.A_log),
        dt_bias=Torch.of(p.dt_bias), lower_bound=-5.0, initial_state=state, cu_seqlens=None,
        use_gate_in_kernel=True, l2norm=True, beta_is_logit=True, allow_neg_eigval=False,
        state_v_first=True, output_final_state=True,
    )  # fmt: skip

    def short(**changed):
        arguments = {**names, **changed}.values()
        prefill = flash_kda._C._prefill_results(*arguments)
        recurrent = flash_kda._C._recurrent_results(*arguments)
        return prefill is not NotImplemented, recurrent is not NotImplemented

    out, final = flash_kda._C._prefill_results(*names.values())
    assert [bits(out), bits(final)] == [bits(x) for x in p.fwd(Torch)]
    out, final = flash_kda._C._recurrent_results(*names.values())
    expected = flash_kda.fused_recurrent_kda(
        *p.tensors(Torch), initial_state=state, output_final_state=True, state_v_first=True, **flags(p)
    )  # fmt: skip
    assert [bits(out), bits(final)] == [bits(x) for x in expected]
    assert short() == (True, True)
    assert short(output_final_state=False) == (True, True)
    assert short(initial_state=state.bfloat16(), output_final_state=False) == (True, True)
    assert short(initial_state=state.bfloat16()) == (True, True)
    assert short(initial_state=None) == (True, False)
    assert short(initial_state=None, output_final_state=False) == (True, False)
    assert short(initial_state=None, state_v_first=False) == (True, False)
    assert short(lower_bound=None) == short(use_gate_in_kernel=False) == (True, True)
    assert short(v=v.transpose(1, 2).contiguous().transpose(1, 2)) == (True, True)
    no = False, False
    for flag in ("output_final_state", "use_gate_in_kernel", "state_v_first"):
        assert short(**{flag: 1}) == no
    assert short(allow_neg_eigval=True) == (True, True)
    assert short(allow_neg_eigval=True, beta_is_logit=False) == no
    assert short(initial_state=state[:1]) == no
    assert short(v=v[0]) == short(v=v[0], initial_state=None) == no
    assert short(lower_bound=-9.0) == no and short(lower_bound=None, A_log=None) == no
    assert short(v=v.double()) == no
    assert short(q=torch.nn.Parameter(q)) == no
    needs_grad = Torch.of(p.A_log).requires_grad_()
    assert short(A_log=needs_grad) == short(g=g.clone().requires_grad_()) == no
    with torch.no_grad():
        assert short(A_log=needs_grad) == (True, True)
    assert short(k=k.to("meta")) == no
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert short() == no
    with torch.autocast("cpu", torch.bfloat16):
        assert short() == no


    def transformed(x):
        assert short(q=x) == no
        return x.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace(transformed, q, check_trace=False)
    torch.vmap(transformed)(torch.stack([q, q]))
    torch.func.grad(transformed)(q)
    torch.func.jvp(transformed, (q,), (q,))
    assert short() == (True, True)


# ---- compilation ----------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Both functions around a little arithmetic, as a model calls them."""

    def __init__(self, p, function, **options):
        super().__init__()
        self.function, self.options = function, {**flags(p), **options}
        for name in ("A_log", "dt_bias"):
            if name in self.options:
                self.register_buffer(name, self.options.pop(name))

    def forward(self, q, k, v, g, beta, initial_state=None, cu_seqlens=None):
        buffers = dict(self.named_buffers())
        results = self.function(
            q * 2, k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
            output_final_state=True, **buffers, **self.options,
        )  # fmt: skip
        return results[0] + 1, *results[1:]


LAYERS = {
    "chunk": (flash_kda.chunk_kda, dict(B=2, T=40), dict(state_v_first=True)),
    "chunk_kv": (flash_kda.chunk_kda, dict(T=40, K=32, V=32, gate="direct"), {}),
    "intermediate": (
        flash_kda.chunk_kda,
        dict(B=2, T=70, gate="softplus"),
        dict(return_intermediate_states=True, state_v_first=True),
    ),
    "ragged": (
        flash_kda.chunk_kda,
        dict(lens=[20, 0, 41]),
        dict(state_v_first=True, return_intermediate_states=True, use_graph=True),
    ),
    "recurrent": (flash_kda.fused_recurrent_kda, dict(B=2, T=1), dict(state_v_first=True)),
    "recurrent_no_state": (flash_kda.fused_recurrent_kda, dict(T=3, state=False), {}),
    "recurrent_long": (flash_kda.fused_recurrent_kda, dict(T=30, state=False), {}),
}


def layer_and_inputs(name):
    function, shape, options = LAYERS[name]
    p = problem(**shape)
    inputs = (*p.tensors(Torch), Torch.of(p.initial_state), Torch.of(p.cu_seqlens))
    return Layer(p, function, **options), inputs


def same(results, expected, name):
    # Rows beyond the chunks of a bound hold anything.
    rows = 2 if name == "ragged" else None
    assert len(results) == len(expected)
    for x, y in zip(results, expected):
        x, y = (z[:, :rows] if z.ndim == 5 else z for z in (x, y))
        assert x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_without_a_break(fresh_dynamo, name, guard):
    layer, inputs = layer_and_inputs(name)
    with guard():
        expected = layer(*inputs)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        same(compiled(*inputs), expected, name)


def test_compiles_for_all_lengths(fresh_dynamo):
    """Dynamic shapes: no graph of its own for each length or batch."""
    layer, _ = layer_and_inputs("chunk")
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for B, T in (
        (3, 40),
        (5, 17),
        (7, 130),
        (9, 33),
        (11, 5),
    ):  # no size that another dimension has
        p = problem(B=B, T=T)
        inputs = (*p.tensors(Torch), Torch.of(p.initial_state))
        with torch.no_grad():
            same(compiled(*inputs), layer(*inputs), "chunk")
    assert graphs.frame_count <= 2


def test_compiled_operators_in_place(fresh_dynamo):
    p = problem(B=2, T=2)
    A_log, dt_bias = Torch.of(p.A_log), Torch.of(p.dt_bias)

    def step(q, k, v, g, beta, pool, out):
        first = OPS.decode(q, k, v, g, beta, pool, A_log=A_log, dt_bias=dt_bias)
        OPS.fwd(q, k, v, g, beta, None, out, A_log, dt_bias, None, pool, pool)
        return first + pool.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        pool, out = Torch.of(p.initial_state.copy()), torch.zeros_like(Torch.of(p.v))
        results.append([bits(x) for x in (function(*p.tensors(Torch), pool, out), pool, out)])
    assert results[0] == results[1]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["chunk", "chunk_kv", "intermediate", "recurrent"])
def test_export(fresh_dynamo, tmp_path, name, strict):
    layer, inputs = layer_and_inputs(name)
    inputs = tuple(x for x in inputs if x is not None)
    expected = layer(*inputs)
    exported = torch.export.export(layer, inputs, strict=strict)
    same(exported.module()(*inputs), expected, name)
    torch.export.save(exported, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    same(loaded.module()(*inputs), expected, name)


def test_export_with_a_length_that_varies(fresh_dynamo):
    layer, inputs = layer_and_inputs("chunk")
    inputs = tuple(x for x in inputs if x is not None)
    T = torch.export.Dim("T", min=16, max=4096)
    shapes = [{1: T}] * 5 + [None]
    exported = torch.export.export(layer, inputs, dynamic_shapes=(*shapes,))
    p = problem(B=2, T=99)
    inputs = (*p.tensors(Torch), Torch.of(p.initial_state))
    same(exported.module()(*inputs), layer(*inputs), "chunk")


# ---- modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_fake_and_meta_tensors(name):
    layer, inputs = layer_and_inputs(name)
    expected = layer(*inputs)

    def described(results):
        return [(x.shape, x.dtype, x.stride()) for x in results]

    with FakeTensorMode() as mode:
        fake = [None if x is None else mode.from_tensor(x) for x in inputs]
        fake_layer = layer_and_inputs(name)[0]
        for buffer, x in list(fake_layer.named_buffers()):
            setattr(fake_layer, buffer, mode.from_tensor(x))
        results = fake_layer(*fake)
    assert described(results) == described(expected)
    meta = [None if x is None else x.to("meta") for x in inputs]
    results = layer.to("meta")(*meta)
    assert described(results) == described(expected) and results[0].is_meta


def test_autocast():
    """q, k, v and out take autocast's dtype, whatever they were; gates, beta and states keep theirs."""
    p = problem(T=40, dtype="float32")
    inputs = p.tensors(Torch)
    half = [x.bfloat16() for x in inputs[:3]] + inputs[3:]
    options = dict(
        initial_state=Torch.of(p.initial_state), output_final_state=True, state_v_first=True
    )
    for function, rows in ((flash_kda.chunk_kda, 40), (flash_kda.fused_recurrent_kda, 4)):
        expected = function(*(x[:, :rows] for x in half), **options, **flags(p))
        with torch.autocast("cpu", torch.bfloat16):
            results = function(*(x[:, :rows] for x in inputs), **options, **flags(p))
        assert results[0].dtype == torch.bfloat16 and results[1].dtype == torch.float32
        assert [bits(x) for x in results] == [bits(x) for x in expected]
    compiled = torch.compile(flash_kda.chunk_kda, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        results = compiled(*inputs, **options, **flags(p))
    expected = flash_kda.chunk_kda(*half, **options, **flags(p))
    assert [bits(x) for x in results] == [bits(x) for x in expected]


def test_operators_refuse_gradients():
    p = problem(T=4)
    inputs = p.tensors(Torch)
    inputs[0] = inputs[0].clone().requires_grad_()
    state = Torch.of(p.initial_state)
    calls = [
        lambda: OPS.fwd(*inputs, None, torch.empty_like(inputs[2]), None, None, None),
        lambda: OPS.decode(*inputs, state),
        lambda: OPS.recurrent(*inputs),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="no derivative.*no_grad"):
            call()
        with torch.no_grad():
            call()


def test_vmap_and_tracing_see_the_operator():
    """Where eager mode's short cut would look past a transformation, it is not taken."""
    p = problem(B=2, T=5)
    inputs = [x[:, None] for x in p.tensors(Torch)]  # [2, 1, T, ...]
    expected = flash_kda.chunk_kda(*p.tensors(Torch), **flags(p))[0]
    out = torch.vmap(lambda *x: flash_kda.chunk_kda(*x, **flags(p))[0])(*inputs)
    assert bits(out[:, 0]) == bits(expected)
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda *x: flash_kda.chunk_kda(*x, **flags(p))[0]
    )(*p.tensors(Torch))
    assert any(node.target is OPS.prefill.default for node in graph.graph.nodes)


def test_errors_of_the_library_pass_through():
    p = problem(T=5)
    inputs = p.tensors(Torch)
    with pytest.raises(ValueError, match=r"k: shape \[1,5,2,32\], expected \[1,5,2,64\]"):
        OPS.prefill(inputs[0], inputs[1][..., :32], *inputs[2:])
    with pytest.raises(ValueError, match="gate: 'sigmoid'"):
        OPS.prefill(*inputs, gate="sigmoid")
    with pytest.raises(TypeError, match="v: dtype float32"):
        OPS.prefill(*inputs[:2], inputs[2].float(), *inputs[3:])
