"""chunk_kda, fused_recurrent_kda, torch.ops.flash_kda and FLA's layer on CUDA tensors.

Gold is the call in double precision on the CPU (backend "reference"). FLA's own parts are skipped where
`fla` is not installed.
"""

import functools
import importlib
import math
import types

import flash_kda
import pytest
import torch
import torch.utils.checkpoint
from flash_kda import ops
from problems import error, problem, torch_of, wrap_functions
from test_cuda import (
    DECODE_TOLERANCE,
    REASON,
    TOLERANCE,
    gradient_tolerance,
    on_device,
    same_bits,
)

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

OPS = torch.ops.flash_kda
FLA_TOLERANCE = 5e-3  # what FLA's tests ask of its kernels, against its recurrence in PyTorch


def flags(p, with_tensors=True):
    """FLA's names for the options of a problem; without tensors no array is touched."""
    gate = p.options.get("gate", "bounded")
    result = dict(
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=gate != "direct",
        use_beta_sigmoid_in_kernel=p.options.get("beta_is_logit", True),
        allow_neg_eigval=p.options.get("allow_neg_eigval", False),
        lower_bound=-5.0 if gate == "bounded" else None,
        output_final_state=True,
    )
    if with_tensors:
        result.update(cu_seqlens=on_device(p.cu_seqlens))
    if with_tensors and gate != "direct":
        result.update(A_log=on_device(p.A_log), dt_bias=on_device(p.dt_bias.reshape(-1)))
    return result


def tensors(p):
    return [on_device(x) for x in (p.q, p.k, p.v, p.g, p.beta)]


def call(function, p, v_first=True, **options):
    """(out, final_state, ...) with states [N,HV,V,K] on both sides."""
    initial = on_device(p.initial_state)
    if initial is not None and not v_first:
        initial = initial.transpose(-1, -2).contiguous()
    options = {**flags(p), **options}
    out, *states = function(*tensors(p), initial_state=initial, state_v_first=v_first, **options)
    return out, *(x if v_first else x.transpose(-1, -2).contiguous() for x in states)


def check(p, out, final, limit):
    gold_out, gold_final = p.gold()
    assert error(out.cpu(), gold_out) <= limit
    assert error(final.cpu(), gold_final) <= limit


PROBLEMS = [
    dict(B=2, T=70, HV=4, K=128, V=128),
    dict(T=33, K=64, V=128, gate="softplus"),
    dict(B=2, T=65, HV=6, K=128, V=64, gate="direct"),
    dict(T=40, K=128, V=128, allow_neg_eigval=True, state=False),
    dict(lens=[20, 0, 41], HV=4, K=64, V=64, gate="softplus"),
]


@pytest.mark.parametrize("v_first", [True, False], ids=["vk", "kv"])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
def test_against_gold(name, shape, v_first):
    p = problem(**shape)
    check(p, *call(getattr(flash_kda, name), p, v_first), TOLERANCE)


@pytest.mark.parametrize("v_first", [True, False], ids=["vk", "kv"])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("T", [1, 5])
def test_few_tokens(T, state, v_first):
    p = problem(B=3, T=T, HV=4, K=128, V=128, gate="softplus", state=state)
    out, final = call(flash_kda.fused_recurrent_kda, p, v_first)
    check(p, out, final, DECODE_TOLERANCE)
    if state:  # bfloat16 states in: read at that, kept in float32
        half = on_device(p.initial_state).bfloat16()
        again, _ = flash_kda.fused_recurrent_kda(
            *tensors(p), initial_state=half, state_v_first=True, **flags(p)
        )
        assert error(again.cpu(), p.gold()[0]) <= 1e-2


def test_decode_reads_from_a_pool_of_its_own():
    """initial_state of another size and dtype, under the same indices; the pool is only written."""
    p = problem(B=5, T=2, HV=4, K=128, V=128)
    indices = torch.tensor([6, 2, -1, 0, 5], device="cuda")
    read = torch.full((7, 4, 128, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
    used = [n for n in range(5) if n != 2]
    read[indices[used]] = on_device(p.initial_state)[used].bfloat16()
    before = read.clone()
    pool = torch.full((9, 4, 128, 128), torch.nan, device="cuda")
    both = read.float()
    names = dict(A_log=on_device(p.A_log), dt_bias=on_device(p.dt_bias), state_indices=indices)
    expected = flash_kda.decode(*tensors(p), both, **names)
    out = flash_kda.decode(*tensors(p), pool, initial_state=read, **names)
    torch.cuda.synchronize()
    assert same_bits(out[used], expected[used]) and same_bits(read, before)
    assert same_bits(pool[indices[used]], both[indices[used]])
    rest = [i for i in range(9) if i not in indices[used].tolist()]
    assert torch.isnan(pool[rest]).all()
    only = flash_kda.decode(*tensors(p), None, initial_state=read, write_state=False, **names)
    assert same_bits(only[used], expected[used])


@pytest.mark.parametrize("shape", [dict(B=2, T=150), dict(lens=[64, 0, 130, 1])], ids=str)
def test_intermediate_states(shape):
    p = problem(K=128, V=128, **shape)
    out, final, states = call(flash_kda.chunk_kda, p, return_intermediate_states=True)
    check(p, out, final, TOLERANCE)
    lens = [150, 150] if p.cu_seqlens is None else [64, 0, 130, 1]
    assert states.shape == ((2, 3) if p.cu_seqlens is None else (1, 5)) + p.state_shape[1:]
    flat, row, begin = states.flatten(0, 1), 0, 0
    for n, length in enumerate(lens):
        for t in range(0, length, 64):
            if t == 0:
                assert same_bits(flat[row], on_device(p.initial_state)[n].bfloat16())
            else:  # the final state of what comes before
                b, at = (n, 0) if p.cu_seqlens is None else (0, begin)
                inputs = [x[b : b + 1, at : at + t] for x in tensors(p)]
                options = {**flags(p), "cu_seqlens": None}
                initial = on_device(p.initial_state)[n : n + 1]
                _, prefix = flash_kda.chunk_kda(
                    *inputs, initial_state=initial, state_v_first=True, **options
                )
                assert error(flat[row].float().cpu(), prefix[0].double().cpu()) <= TOLERANCE
            row += 1
        begin += length
    bound = call(
        flash_kda.chunk_kda, p, return_intermediate_states=True, use_graph=True, max_num_seqs=p.N
    )
    assert same_bits(bound[2].flatten(0, 1)[:row], flat[:row])


def test_operators():
    p = problem(B=2, T=70, K=128, V=128)
    arguments = tensors(p)
    options = dict(
        A_log=on_device(p.A_log), dt_bias=on_device(p.dt_bias),
        initial_state=on_device(p.initial_state), output_final_state=True,
    )  # fmt: skip
    expected = call(flash_kda.chunk_kda, p)
    for got, wanted in zip(OPS.prefill(*arguments, **options), expected):
        assert same_bits(got, wanted)
    torch.library.opcheck(OPS.prefill.default, arguments, options)
    few = [x[:, :2].contiguous() for x in arguments]
    torch.library.opcheck(OPS.recurrent.default, few, options)
    del options["output_final_state"], options["initial_state"]
    torch.library.opcheck(OPS.decode.default, (*few, on_device(p.initial_state)), options)
    written = (*arguments, None, torch.zeros_like(arguments[2]), None, None, None)
    torch.library.opcheck(OPS.fwd.default, written)
    half = [x.half() for x in arguments]
    with pytest.raises(RuntimeError, match="float16.*bfloat16"):
        flash_kda.chunk_kda(*half)


def test_autocast():
    """float32 projections under autocast run in bfloat16, as a matrix product there does."""
    p = problem(T=40, K=128, V=128)
    expected = call(flash_kda.chunk_kda, p)
    inputs = [x.float() for x in tensors(p)]
    options = dict(initial_state=on_device(p.initial_state), state_v_first=True, **flags(p))
    with pytest.raises(RuntimeError, match="float32.*bfloat16"):
        flash_kda.chunk_kda(*inputs, **options)
    with torch.autocast("cuda", torch.bfloat16):
        out, final = flash_kda.chunk_kda(*inputs, **options)
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert error(out.cpu(), expected[0].double().cpu()) <= TOLERANCE


@pytest.mark.parametrize("name, T", [("chunk_kda", 150), ("fused_recurrent_kda", 1)])
def test_cuda_graph(name, T):
    """Captured with its allocations, replayed on other data: the bits of the call itself."""
    flash_kda.warmup("cuda")
    function = getattr(flash_kda, name)
    p = problem(B=2, T=T, K=128, V=128)
    inputs, state = tensors(p), on_device(p.initial_state)
    options = dict(state_v_first=True, **flags(p))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = function(*inputs, initial_state=state, **options)
    for seed in (1, 2):
        other = problem(B=2, T=T, K=128, V=128, seed=seed)
        for to, x in zip(inputs, tensors(other)):
            to.copy_(x)
        state.copy_(on_device(other.initial_state))
        graph.replay()
        torch.cuda.synchronize()
        expected = function(*inputs, initial_state=state, **options)
        for got, wanted in zip(results, expected):
            assert same_bits(got, wanted)


def test_cuda_graph_of_varying_lengths():
    """use_graph: cu_seqlens padded with empty sequences; other lengths need no new capture."""
    flash_kda.warmup("cuda")
    T, N = 128, 4
    p = problem(lens=[T, 0, 0, 0], K=128, V=128)
    inputs, state, lengths = tensors(p), on_device(p.initial_state), on_device(p.cu_seqlens)
    options = {**flags(p), "state_v_first": True, "use_graph": True, "max_num_seqs": N}
    options.update(cu_seqlens=lengths, return_intermediate_states=True)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = flash_kda.chunk_kda(*inputs, initial_state=state, **options)
    for lens in ([70, 58, 0, 0], [1, 2, 64, 61]):
        lengths.copy_(torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()]))
        graph.replay()
        torch.cuda.synchronize()
        expected = flash_kda.chunk_kda(*inputs, initial_state=state, **options)
        rows = sum(-(-n // 64) for n in lens)
        assert same_bits(results[0], expected[0]) and same_bits(results[1], expected[1])
        assert same_bits(results[2][:, :rows], expected[2][:, :rows])


def test_compiled(fresh_dynamo):
    """torch.compile with its default backend, and with CUDA graphs."""
    p = problem(B=2, T=70, K=128, V=128)
    inputs, state, options = tensors(p), on_device(p.initial_state), flags(p)

    def layer(q, k, v, g, beta, state):
        out, final = flash_kda.chunk_kda(
            q, k, v, g, beta, initial_state=state, state_v_first=True, **options
        )
        last, final = flash_kda.fused_recurrent_kda(
            *(x[:, :1] for x in (q, k, v, g, beta)), initial_state=final, state_v_first=True, **options
        )  # fmt: skip
        return out + 1, last, final

    with torch.no_grad():
        expected = layer(*inputs, state)
        for mode in (None, "reduce-overhead"):
            compiled = torch.compile(layer, fullgraph=True, mode=mode)
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                results = [x.clone() for x in compiled(*inputs, state)]
            for got, wanted in zip(results, expected):
                assert same_bits(got, wanted)


def test_the_stream_of_the_call():
    p = problem(T=100, K=128, V=128)
    expected = call(flash_kda.chunk_kda, p)
    inputs, state, options = tensors(p), on_device(p.initial_state), flags(p)
    kept = [x.clone() for x in inputs]
    for x in inputs:
        x.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, x in zip(inputs, kept):
            to.copy_(x, non_blocking=True)
        out, final = flash_kda.chunk_kda(
            *inputs, initial_state=state, state_v_first=True, **options
        )
    stream.synchronize()
    assert same_bits(out, expected[0]) and same_bits(final, expected[1])


# ---- gradients --------------------------------------------------------------------------------------------

NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def leaves(p, device="cuda", dtype=None, wanted=NAMES):
    """What gradients are taken by; `dtype` in the place of every one of theirs."""
    given = {n: getattr(p, n) for n in NAMES}
    given = {n: torch_of(x).to(device, dtype) for n, x in given.items() if x is not None}
    return {n: x.clone().requires_grad_(n in wanted) for n, x in given.items()}


def run_leaves(p, x, **options):
    flag = {**flags(p, with_tensors=False), **options}
    if p.cu_seqlens is not None:
        flag["cu_seqlens"] = torch_of(p.cu_seqlens).to(x["q"].device)
    x = dict(x)
    if "dt_bias" in x:
        x["dt_bias"] = x["dt_bias"].flatten()
    return flash_kda.chunk_kda(**x, state_v_first=True, **flag)


def gradients(p, x, outputs=None, **options):
    """Of a random linear function of the outputs, by what of x requires them."""
    out, final = outputs or run_leaves(p, x, **options)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(o.shape, generator=generator).bfloat16() for o in (out, final)]
    wanted = {n: t for n, t in x.items() if t.requires_grad}
    d = [w.to(o.device, o.dtype) for w, o in zip(weights, (out, final))]
    return dict(zip(wanted, torch.autograd.grad((out, final), list(wanted.values()), d)))


def same_gradients(x, y):
    return x.keys() == y.keys() and all(same_bits(x[n], y[n]) for n in x)


@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
def test_gradients_against_gold(shape):
    """Those of chunk_kda in float64, which the CPU's tests hold against autograd of the recurrence."""
    p = problem(**shape)
    ours = gradients(p, leaves(p))
    gold = gradients(p, leaves(p, "cpu", torch.float64))
    assert ours.keys() == gold.keys()
    for n, x in ours.items():
        assert error(x.cpu(), gold[n]) <= gradient_tolerance(x), n


@pytest.mark.parametrize("wanted", [("v",), ("q", "A_log"), ("beta", "initial_state"), ("g", "k")])
def test_only_what_requires_grad(wanted):
    p = problem(T=100, HV=4, K=128, V=128)
    every = gradients(p, leaves(p))
    some = gradients(p, leaves(p, wanted=wanted))
    assert same_gradients(some, {n: every[n] for n in NAMES if n in wanted})


def test_no_gradients_in_float32():
    """bfloat16 only: said before the forward."""
    p = problem(T=20, K=64, V=64)
    with pytest.raises(NotImplementedError, match="requires grad.*float32, expected bfloat16"):
        run_leaves(p, leaves(p, dtype=torch.float32))


def test_gradients_under_autocast():
    p = problem(T=70, K=128, V=128)
    low = leaves(p)
    wide = {n: x.detach().float().requires_grad_() for n, x in low.items()}
    expected = gradients(p, dict(low, g=wide["g"], beta=wide["beta"]))
    with torch.autocast("cuda", torch.bfloat16):
        outputs = run_leaves(p, wide)
    got = gradients(p, wide, outputs)
    for n, x in got.items():
        assert x.dtype == torch.float32 and torch.equal(x, expected[n].float()), n


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    p = problem(B=2, T=70, K=128, V=128)
    x = leaves(p)
    expected = gradients(p, x)

    def function(*tensors):
        return run_leaves(p, dict(zip(x, tensors)))

    outputs = torch.utils.checkpoint.checkpoint(function, *x.values(), use_reentrant=reentrant)
    if not reentrant:
        assert same_gradients(gradients(p, x, outputs), expected)
        return
    generator = torch.Generator().manual_seed(5)
    d = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    torch.autograd.backward(outputs, d)
    assert same_gradients({n: t.grad for n, t in x.items()}, expected)


def test_gradients_compiled(fresh_dynamo):
    """torch.compile with its default backend, with CUDA graphs, and for any T."""
    p = problem(B=2, T=70, K=128, V=128)
    x = leaves(p)
    expected = gradients(p, x)

    def function(*tensors):
        x = dict(zip(NAMES, tensors))
        return run_leaves(p, dict(x, q=x["q"] * 1))

    for options in ({}, {"mode": "reduce-overhead"}, {"dynamic": True}):
        compiled = torch.compile(function, fullgraph=True, **options)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            got = gradients(p, x, compiled(*x.values()))
            assert same_gradients(got, expected), options


def test_operators_of_gradients():
    p = problem(lens=[33, 0, 40], HV=4, K=64, V=64)
    x = leaves(p)
    tokens = [x[n] for n in NAMES[:5]]
    options = {n: x[n] for n in NAMES[5:]} | dict(cu_seqlens=on_device(p.cu_seqlens))
    torch.library.opcheck(OPS.prefill.default, tokens, {**options, "output_final_state": True})
    plain = [t.detach() for t in tokens]
    options = {n: t.detach() for n, t in options.items()}
    d_out, d_final = torch.randn_like(plain[2]), torch.randn_like(options["initial_state"])
    for wanted in ((True,) * 8, (True, False, True, False, False, True, False, True)):
        torch.library.opcheck(
            OPS.backward.default, (d_out, d_final, *plain), {**options, "wanted": wanted}
        )


def test_training_step_in_a_cuda_graph():
    """Forward, backward and what they allocate captured once, replayed on other data."""
    flash_kda.warmup("cuda")
    p = problem(B=2, T=150, K=128, V=128)
    x = leaves(p)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    weight = torch.randn(p.v.shape, device="cuda").bfloat16()

    def step():
        out, final = run_leaves(p, x)
        return torch.autograd.grad((out * weight).sum() + final.sum(), list(x.values()))

    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        other = leaves(problem(B=2, T=150, K=128, V=128, seed=seed))
        with torch.no_grad():
            for n, t in x.items():
                t.copy_(other[n])
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert all(same_bits(a, b) for a, b in zip(replayed, step()))


def test_second_derivatives_are_refused():
    p = problem(T=20, K=64, V=64)
    x = leaves(p)
    first = torch.autograd.grad(run_leaves(p, x)[0].sum(), x["q"], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


# ---- flash-linear-attention -------------------------------------------------------------------------------


def take_the_first(monkeypatch):
    """Triton's tuning takes the first candidate that runs: FLA has dozens, each of which takes a second to compile."""
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    bench, prune = autotuner._bench, autotuner.prune_configs

    def candidates(self, *arguments, **keywords):
        self.found = self.cache_results = False  # such a choice is nothing to keep
        return prune(self, *arguments, **keywords)

    def first(self, *arguments, **keywords):
        if self.found:
            return [math.inf] * 3
        times = bench(self, *arguments, **keywords)
        self.found = min(times) < math.inf
        return times

    monkeypatch.setattr(autotuner, "prune_configs", candidates)
    monkeypatch.setattr(autotuner, "_bench", first)


@pytest.fixture
def fla(monkeypatch):
    """FLA's module of the layer, registered; .seen is what our functions were called for."""
    take_the_first(monkeypatch)
    pytest.importorskip("fla.ops.kda", exc_type=ImportError)
    layers = pytest.importorskip("fla.layers.kda", exc_type=ImportError)
    integration = importlib.import_module("flash_kda.integrations.fla")
    seen = []

    def looking(kind, run):
        def call(*arguments, **keywords):
            results = run(*arguments, **keywords)
            if results is not NotImplemented:
                seen.append((kind, arguments, results))
            return results

        return call

    undo = wrap_functions(looking)
    integration.register()
    yield types.SimpleNamespace(layer=layers.KimiDeltaAttention, seen=seen)
    integration.unregister()
    undo()


def naive(arguments):
    """FLA's recurrence in PyTorch on the arguments of ops.prefill or ops.recurrent."""
    from fla.ops.kda.naive import naive_recurrent_kda

    q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial = arguments[:10]
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    A = A_log.float().exp().reshape(-1, 1)
    raw_gate = g + dt_bias.float().reshape(A.shape[0], -1)
    softplus = torch.nn.functional.softplus
    g = -A * softplus(raw_gate) if lower_bound is None else lower_bound * (A * raw_gate).sigmoid()
    out, final = naive_recurrent_kda(
        q, k, v, g, beta.sigmoid(), scale=scale,
        initial_state=None if initial is None else initial.transpose(2, 3), output_final_state=True,
    )  # fmt: skip
    return out, final.transpose(2, 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_v_heads=8),
        dict(head_dim=64),
        dict(safe_gate=True, lower_bound=-5.0),
    ],
    ids=str,
)
def test_layer_of_fla(fla, options):
    """FLA's own KimiDeltaAttention on this library: prefill and one decoded token, with its cache."""
    from fla.models.utils import Cache

    torch.manual_seed(0)
    layer = fla.layer(
        **{"hidden_size": 512, "head_dim": 128, "num_heads": 4, "layer_idx": 0, **options}
    )
    layer = layer.to("cuda", torch.bfloat16).eval()
    x = torch.randn(2, 101, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        cache = Cache()
        first, _, cache = layer(x[:, :100], past_key_values=cache, use_cache=True)
        second, _, cache = layer(x[:, 100:], past_key_values=cache, use_cache=True)
        whole, _, _ = layer(x)
    assert [name for name, _, _ in fla.seen] == ["prefill", "recurrent", "prefill"]
    for _, arguments, (out, final, *_) in fla.seen:
        gold_out, gold_final = naive(arguments)
        assert error(out.float().cpu(), gold_out.double().cpu()) <= FLA_TOLERANCE
        if final is not None:
            assert error(final.cpu(), gold_final.double().cpu()) <= FLA_TOLERANCE
    # The layer in pieces, through its cache, is the layer at once.
    pieces = torch.cat([first, second], 1)
    assert error(pieces.float().cpu(), whole.double().cpu()) <= 2 * FLA_TOLERANCE


def naive_chunk_kda(monkeypatch):
    """Puts FLA's recurrence in PyTorch into the place of our chunk_kda."""
    functional = flash_kda.functional

    @functools.wraps(functional.chunk_kda)
    def run(q, k, v, g, beta, A_log, dt_bias, lower_bound=None, **options):
        assert options["use_gate_in_kernel"] and options["use_beta_sigmoid_in_kernel"]
        out, _ = naive((q, k, v, g, beta, None, A_log, dt_bias, lower_bound, None))
        return out.to(v.dtype), None

    monkeypatch.setattr(functional, "chunk_kda", run)


@pytest.mark.parametrize(
    "options", [{}, dict(num_v_heads=8), dict(safe_gate=True, lower_bound=-5.0)], ids=str
)
def test_layer_of_fla_trains(fla, options, monkeypatch):
    """Gradients of every parameter of FLA's KimiDeltaAttention, beside those through its recurrence."""
    torch.manual_seed(0)
    layer = fla.layer(
        **{"hidden_size": 512, "head_dim": 128, "num_heads": 4, "layer_idx": 0, **options}
    )
    layer = layer.to("cuda", torch.bfloat16).train()
    x = torch.randn(2, 100, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn_like(x)

    def step():
        out, _, _ = layer(x)
        parameters = dict(layer.named_parameters(), x=x)
        found = torch.autograd.grad((out * weight).sum(), list(parameters.values()))
        return dict(zip(parameters, found))

    ours = step()
    assert {name for name, _, _ in fla.seen} == {"prefill"}
    seen = len(fla.seen)
    naive_chunk_kda(monkeypatch)
    theirs = step()
    assert len(fla.seen) == seen
    for name, d in ours.items():
        assert error(d.float().cpu(), theirs[name].double().cpu()) <= 4 * FLA_TOLERANCE, name


def test_model_of_fla_trains(fla):
    """FLA's KDA language model learns a sequence by heart on our kernels."""
    models = pytest.importorskip("fla.models", exc_type=ImportError)
    torch.manual_seed(0)
    config = models.KDAConfig(
        hidden_size=256, num_hidden_layers=2, num_heads=2, head_dim=128, vocab_size=64,
        intermediate_size=512, fuse_cross_entropy=False, fuse_norm=False, fuse_swiglu=False, use_cache=False,
    )  # fmt: skip
    model = models.KDAForCausalLM(config).to("cuda", torch.bfloat16).train()
    ids = torch.randint(0, 64, (2, 96), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert {name for name, _, _ in fla.seen} == {"prefill"} and len(fla.seen) >= 24
    assert losses[-1] < 0.8 * losses[0], losses


def test_fla_trains_on(fla):
    """With gradients FLA's kernels step aside where there is a backward here, and only there."""
    integration = importlib.import_module("flash_kda.integrations.fla")
    p = problem(T=20, K=128, V=128)
    inputs = dict(zip(("q", "k", "v", "g", "beta"), tensors(p)))
    inputs["q"].requires_grad_()
    assert integration.supports("chunk_kda", **inputs) == ops.supports_gradients(
        *inputs.values(), None, None, None, None, "direct", None
    )
    with torch.no_grad():
        assert integration.supports("chunk_kda", **inputs) == (True, "")
