"""Gradients of chunk_kda: against torch autograd through the token recurrence in double precision, which
shares nothing with the library, and what users of autograd rely on. CPU tensors.
"""

import flash_kda
import pytest
import torch
from flash_kda import ops
from torch.utils.checkpoint import checkpoint

INPUTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def activated(q, k, v, g, beta, A_log, dt_bias, *, gate, l2norm, beta_is_logit, neg, lower_bound):
    """Equations (1) to (3)."""
    if l2norm:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if gate != "direct":
        x = g + dt_bias.view(v.shape[2], -1)
        A = A_log.exp()[:, None]
        g = (
            lower_bound * torch.sigmoid(A * x)
            if gate == "bounded"
            else -A * torch.nn.functional.softplus(x)
        )
    if beta_is_logit:
        beta = torch.sigmoid(beta) * (2 if neg else 1)
    return q, k, v, g.clamp(-100, 0), beta


def naive(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens=None, **options):
    """Equations (4) to (7), token by token; states [N, HV, V, K]."""
    q, k, v, g, beta = activated(q, k, v, g, beta, A_log, dt_bias, **options)
    group = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    spans = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        spans = [(0, begin, end) for begin, end in zip(bounds, bounds[1:])]
    outs, finals = [], []
    for n, (b, begin, end) in enumerate(spans):
        S = initial_state[n]
        rows = []
        for t in range(begin, end):
            S = S * g[b, t].exp()[:, None, :]
            u = beta[b, t, :, None] * (v[b, t] - torch.einsum("hvk,hk->hv", S, k[b, t]))
            S = S + u[:, :, None] * k[b, t, :, None, :]
            rows.append(q.shape[-1] ** -0.5 * torch.einsum("hvk,hk->hv", S, q[b, t]))
        outs.append(torch.stack(rows) if rows else v[b, :0])
        finals.append(S)
    out = torch.cat(outs)[None] if cu_seqlens is not None else torch.stack(outs)
    return out, torch.stack(finals)


def inputs(dtype=torch.float64, B=1, T=21, H=1, HV=2, K=5, V=3, lens=None, gate="bounded", seed=0,
           parameters=torch.float32, beta_is_logit=True):  # fmt: skip
    """Leaf tensors by name. Values are what `dtype` holds."""
    generator = torch.Generator().manual_seed(seed)
    N = B if lens is None else len(lens)
    T = T if lens is None else sum(lens)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    g = -normal(B, T, HV, K).abs() if gate == "direct" else normal(B, T, HV, K)
    beta = normal(B, T, HV)
    x = dict(
        q=normal(B, T, H, K), k=normal(B, T, H, K), v=normal(B, T, HV, V), g=g,
        beta=beta if beta_is_logit else beta.sigmoid(), A_log=normal(HV, scale=0.4),
        dt_bias=normal(HV * K, scale=0.4), initial_state=normal(N, HV, V, K),
    )  # fmt: skip
    kinds = dict(A_log=parameters, dt_bias=parameters, initial_state=torch.float32)
    if dtype == torch.float64:
        kinds = {}
    if gate == "direct":
        del x["A_log"], x["dt_bias"]
    return {name: t.to(kinds.get(name, dtype)).requires_grad_() for name, t in x.items()}


def options_of(gate="bounded", l2norm=True, beta_is_logit=True, neg=False, lower_bound=-5.0):
    return dict(
        gate=gate, l2norm=l2norm, beta_is_logit=beta_is_logit, neg=neg, lower_bound=lower_bound
    )


def kda(x, cu_seqlens=None, *, gate="bounded", l2norm=True, beta_is_logit=True, neg=False,
        lower_bound=-5.0, **more):  # fmt: skip
    return flash_kda.chunk_kda(
        **x, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=l2norm, use_gate_in_kernel=gate != "direct",
        use_beta_sigmoid_in_kernel=beta_is_logit, allow_neg_eigval=neg,
        lower_bound=lower_bound if gate == "bounded" else None, **more,
    )  # fmt: skip


def gradients(outputs, x, seed=1):
    """Of a random linear function of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    loss = sum((w.to(o.dtype) * o).sum() for w, o in zip(weights, outputs))
    return dict(zip(x, torch.autograd.grad(loss, list(x.values()))))


def error(result, gold):
    return float((result.double() - gold).square().mean().sqrt() / gold.square().mean().sqrt())


PROBLEMS = {
    "bounded": (dict(B=2), {}),
    "softplus": (dict(T=37), dict(gate="softplus")),
    "direct": (dict(T=18, gate="direct"), dict(gate="direct")),
    "gva": (dict(B=2, H=2, HV=6), {}),
    "ragged": (dict(lens=[7, 0, 1, 20], HV=3), {}),
    "plain": (dict(beta_is_logit=False), dict(l2norm=False, beta_is_logit=False)),
    "neg": (dict(T=19), dict(neg=True, lower_bound=-0.5)),
    "vk": (dict(T=19, K=4, V=6), {}),
}


def compared(name, dtype, **shape):
    """(our gradients, those of the recurrence in double precision) for every input."""
    make, options = PROBLEMS[name]
    x = inputs(dtype, **{**make, **shape})
    gold = {n: t.detach().double().requires_grad_() for n, t in x.items()}
    cu_seqlens = None
    if "lens" in make:
        cu_seqlens = torch.tensor([0, *make["lens"]]).cumsum(0)
    v_first = name == "vk"
    given = dict(x)
    if not v_first:
        given["initial_state"] = x["initial_state"].transpose(-1, -2)
    out, final = kda(given, cu_seqlens, **options, output_final_state=True, state_v_first=v_first)
    ours = gradients((out, final if v_first else final.transpose(-1, -2)), x)
    absent = dict.fromkeys({"A_log", "dt_bias"} - set(x))
    theirs = gradients(
        naive(**gold, **absent, cu_seqlens=cu_seqlens, **options_of(**options)), gold
    )
    assert all(ours[n].dtype == x[n].dtype and ours[n].shape == x[n].shape for n in x)
    return ours, theirs


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_is_autograd_of_the_recurrence(name):
    ours, theirs = compared(name, torch.float64)
    for n in ours:
        assert error(ours[n], theirs[n]) <= 1e-12, n


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32(name):
    ours, theirs = compared(name, torch.float32)
    for n in ours:
        assert error(ours[n], theirs[n]) <= 2e-5, n


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16(parameters):
    # the loss is taken of rounded outputs here and of exact ones there, with the same weights
    ours, theirs = compared("gva", torch.bfloat16, K=32, V=32, T=40, parameters=parameters)
    for n in ours:
        assert error(ours[n], theirs[n]) <= 4e-3, n


@pytest.mark.parametrize("name", ["bounded", "softplus", "direct", "gva", "ragged", "neg"])
def test_gradcheck(name):
    make, options = PROBLEMS[name]
    make = dict(make, K=3, V=2, **({} if "lens" in make else {"T": 5}))
    if "lens" in make:
        make["lens"] = [3, 0, 2]
    x = inputs(**make)
    cu_seqlens = torch.tensor([0, *make["lens"]]).cumsum(0) if "lens" in make else None

    def function(*tensors):
        return kda(dict(zip(x, tensors)), cu_seqlens, **options, output_final_state=True,
                   state_v_first=True)  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(x.values()))


PREFILL = dict(lower_bound=-5.0, output_final_state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_prefill_with_gradients(dtype):
    x = inputs(dtype, T=20, K=16, V=16)
    tokens = tuple(x.pop(name) for name in INPUTS[:5])
    torch.library.opcheck(torch.ops.flash_kda.prefill.default, tokens, {**x, **PREFILL})


@pytest.mark.parametrize(
    "wanted", [(True,) * 8, (True, False, True, False, False, True, False, True)]
)
def test_opcheck_backward(wanted):
    x = {n: t.detach() for n, t in inputs(torch.float32, lens=[9, 0, 8], K=16, V=16).items()}
    tokens = tuple(x.pop(name) for name in INPUTS[:5])
    d_out, d_final = torch.randn_like(tokens[2]), torch.randn_like(x["initial_state"])
    torch.library.opcheck(
        torch.ops.flash_kda.backward.default,
        (d_out, d_final, *tokens),
        {**x, "wanted": wanted, "lower_bound": -5.0, "cu_seqlens": torch.tensor([0, 9, 9, 17])},
    )


@pytest.mark.parametrize("name", INPUTS)
def test_only_what_requires_grad_is_computed(name, monkeypatch):
    x = inputs(torch.float32, T=20)
    every = gradients(kda(x, output_final_state=True, state_v_first=True), x)
    asked = []
    original = ops.autograd._C.backward

    class Recorder:
        @staticmethod
        def backward(*arguments, **options):
            asked.append({n.removeprefix("d_") for n in options if n.startswith("d_")})
            return original(*arguments, **options)

    monkeypatch.setattr(ops.autograd, "_C", Recorder)
    only = {n: t.detach().requires_grad_(n == name) for n, t in x.items()}
    outputs = kda(only, output_final_state=True, state_v_first=True)
    one = gradients(outputs, {name: only[name]})
    assert asked == [{name}]
    assert torch.equal(one[name], every[name])


def test_one_output_or_the_other():
    x = inputs(torch.float32, T=20)

    def of(out_counts, final_counts):
        out, final = kda(x, output_final_state=True, state_v_first=True)
        loss = (out.square().sum() if out_counts else 0) + (
            final.square().sum() if final_counts else 0
        )
        return dict(zip(x, torch.autograd.grad(loss, list(x.values()), allow_unused=True)))

    both, first, second = of(True, True), of(True, False), of(False, True)
    assert (second["q"] == 0).all()  # no state depends on it
    for name in x:
        assert error(first[name] + second[name], both[name].double()) <= 1e-5, name
    out, final = kda(x, state_v_first=True)
    assert final is None
    for a, b in zip(torch.autograd.grad(out.square().sum(), list(x.values())), first.values()):
        assert torch.equal(a, b)


def test_threads_do_not_change_a_bit():
    x = inputs(torch.bfloat16, lens=[33, 0, 70, 5, 16], H=3, HV=6, K=24, V=40)
    cu_seqlens = torch.tensor([0, 33, 33, 103, 108, 124])
    before = flash_kda.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            flash_kda.set_num_threads(threads)
            given = dict(x, initial_state=x["initial_state"].transpose(-1, -2))
            results.append(gradients(kda(given, cu_seqlens, output_final_state=True), x))
    finally:
        flash_kda.set_num_threads(before if before > 1 else 0)
    for other in results[1:]:
        assert all(torch.equal(other[n], results[0][n]) for n in x)


def test_rows_of_no_sequence():
    x = inputs(torch.float32, lens=[7, 9], K=16, V=16)
    out, _ = kda(x, torch.tensor([0, 7, 12]), state_v_first=True)
    assert (out[:, 12:] == 0).all()
    for name, d in zip(x, torch.autograd.grad(out.sum(), list(x.values()))):
        if name in INPUTS[:5]:
            assert (d[:, 12:] == 0).all() and (d[:, :12] != 0).any(), name


def test_any_strides():
    x = inputs(torch.float32, T=20, K=16, V=16)
    plain = gradients(kda(x, state_v_first=True)[:1], x)
    moved = {
        n: t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for n, t in x.items()
    }
    out, _ = kda(moved, state_v_first=True)
    strided = gradients((out,), moved)
    assert all(torch.equal(strided[n], plain[n]) for n in x)
    out, _ = kda(x, state_v_first=True)
    expanded = torch.autograd.grad(out.sum(), x["q"])[0]  # d_out has strides of 0
    out, _ = kda(x, state_v_first=True)
    assert torch.equal(expanded, torch.autograd.grad(out, x["q"], torch.ones_like(out))[0])


# ---- what is refused ------------------------------------------------------------------------------


def test_second_derivatives_are_refused():
    x = inputs(torch.float32, T=8)
    out, _ = kda(x, state_v_first=True)
    first = torch.autograd.grad(out.sum(), x["q"], create_graph=True)[0]
    assert first.requires_grad  # so that nothing goes on silently without it
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


def test_freed_graph_is_refused():
    x = inputs(torch.float32, T=8)
    loss = kda(x, state_v_first=True)[0].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_inputs_are_noticed():
    x = inputs(torch.float32, T=8)
    k = x["k"] * 1
    loss = kda(dict(x, k=k), state_v_first=True)[0].sum()
    k.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backends_without_gradients_say_so_before_the_forward(monkeypatch):
    monkeypatch.setattr(
        ops._C, "supports", lambda *a, **o: (False, "no backend can run this call: made up"),
        raising=False,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="requires grad.*made up.*no_grad"):
        kda(inputs(torch.float32, T=8), state_v_first=True)


# ---- around it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    x = inputs(torch.float32, T=40, K=16, V=16)
    plain = gradients(kda(x, output_final_state=True, state_v_first=True), x)

    def function(*tensors):
        return kda(dict(zip(x, tensors)), output_final_state=True, state_v_first=True)

    outputs = checkpoint(function, *x.values(), use_reentrant=reentrant)
    if not reentrant:
        again = gradients(outputs, x)
    else:  # works with backward() only
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        sum((w.float() * o).sum() for w, o in zip(weights, outputs)).backward()
        again = {n: t.grad for n, t in x.items()}
    assert all(torch.equal(again[n], plain[n]) for n in x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def function(x, cu_seqlens=None):
        x = dict(x, q=x["q"] * 2)
        return kda(x, cu_seqlens, output_final_state=True, state_v_first=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33):
        x = inputs(torch.float32, T=T, K=16, V=16)
        plain = gradients(function(x), x)
        traced = gradients(compiled(x), x)
        assert all(torch.equal(traced[n], plain[n]) for n in x)


def test_autocast():
    x = inputs(torch.float32, T=20, K=16, V=16)
    low = {n: t.detach().bfloat16() if n in "qkv" else t.detach() for n, t in x.items()}
    low = {n: t.requires_grad_() for n, t in low.items()}
    expected = gradients(kda(low, output_final_state=True, state_v_first=True), low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = kda(x, output_final_state=True, state_v_first=True)
    assert outputs[0].dtype == torch.bfloat16
    got = gradients(outputs, x)
    for n in x:
        assert got[n].dtype == torch.float32
        assert torch.equal(got[n], expected[n].float()), n


def test_func_grad():
    x = inputs(torch.float32, T=20, K=16, V=16)
    names = ("q", "g", "A_log", "initial_state")
    fixed = {n: t.detach() for n, t in x.items()}

    def loss(*tensors):
        out, final = kda(
            {**fixed, **dict(zip(names, tensors))}, output_final_state=True, state_v_first=True
        )
        return (out * out).sum() + final.sum()

    ours = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(fixed[n] for n in names))
    theirs = torch.autograd.grad(loss(*(x[n] for n in names)), [x[n] for n in names])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, *(fixed[n] for n in names[1:])).sum())(
            fixed["q"]
        )


def test_training_step_moves_every_parameter():
    """A KDA head learns to recall: the loss falls."""
    torch.manual_seed(0)
    T, K = 48, 16
    embed = torch.nn.Embedding(12, K)
    projections = torch.nn.ModuleDict({n: torch.nn.Linear(K, K) for n in "qkvg"})
    beta = torch.nn.Linear(K, 1)
    A_log, dt_bias = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(K))
    parameters = [
        *embed.parameters(),
        *projections.parameters(),
        *beta.parameters(),
        A_log,
        dt_bias,
    ]
    optimizer = torch.optim.Adam(parameters, 0.02)
    tokens = torch.randint(0, 12, (4, T // 2), generator=torch.Generator().manual_seed(3)).repeat(
        1, 2
    )
    losses = []
    for _ in range(30):
        h = embed(tokens)
        x = {n: projections[n](h)[:, :, None] for n in "qkvg"}
        out, _ = kda(dict(x, beta=beta(h), A_log=A_log, dt_bias=dt_bias))
        logits = out[:, :, 0] @ embed.weight.T
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
