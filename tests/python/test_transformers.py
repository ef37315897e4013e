"""transformers' native Kimi-Linear models on our kernels, against their own PyTorch functions.

Small models with random weights, on the CPU, in bfloat16 also on a GPU; bench/integrations.py has larger
ones, with times.
"Stock" is transformers' PyTorch implementation, also where flash-linear-attention is installed (whose Triton
kernels do not run without a GPU).
"""

import contextlib
import copy
import importlib
import importlib.util
import itertools
import pathlib
import textwrap

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

import flash_kda.integrations.transformers as integration  # noqa: E402
from flash_kda import _C, ops  # noqa: E402
from problems import DEVICES, wrap_functions  # noqa: E402

KIMI = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
MODULES = {"kimi_linear": KIMI}
with contextlib.suppress(ImportError):
    MODULES["glm5_next"] = importlib.import_module(
        "transformers.models.glm5_next.modeling_glm5_next"
    )
FUNCTIONS = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
VOCABULARY = 512
KDA_LAYERS = 3

SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
    num_hidden_layers=KDA_LAYERS + 1, num_attention_heads=2, num_key_value_heads=2,
    kv_lora_rank=32, v_head_dim=32, qk_nope_head_dim=32, num_experts_per_tok=2,
    linear_head_dim=64, linear_num_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    initializer_range=0.2,  # large, so that greedy decoding does not fall into a loop
    mlp_layer_types=["dense"] * KDA_LAYERS + ["sparse"],
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for more, and a busy machine makes torch's threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def switched_off():
    yield
    integration.disable()


@pytest.fixture
def calls(monkeypatch):
    """How often our prefill and decode were called; they still run."""
    count = {"prefill": 0, "decode": 0}

    def counted(kind, run):
        kind = "prefill" if kind == "prefill" else "decode"

        def call(*arguments, **keywords):
            results = run(*arguments, **keywords)
            # The operator calls a second time; another call follows NotImplemented.
            count[kind] += results is not NotImplemented and not keywords.get("here")
            return results

        return call

    monkeypatch.setattr(ops, "decode", counted("decode", ops.decode))
    undo = wrap_functions(counted)
    yield count
    undo()


@contextlib.contextmanager
def stock():
    """Only transformers' PyTorch functions."""
    integration.disable()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in itertools.product(MODULES.values(), FUNCTIONS):
            patch.setattr(module, name, integration.reference(getattr(module, name)))
        yield


@contextlib.contextmanager
def ours(**options):
    integration.enable(**options)
    yield
    integration.disable()


def kimi_linear():
    config = transformers.KimiLinearConfig(
        **SIZES, qk_rope_head_dim=16, num_local_experts=4,
        layer_types=["linear_attention"] * KDA_LAYERS + ["full_attention"],
    )  # fmt: skip
    return transformers.KimiLinearForCausalLM(config)


def glm5_next():
    text = dict(
        **SIZES, q_lora_rank=48, n_routed_experts=4, index_topk=64, index_head_dim=32,
        index_n_heads=2, hc_mult=2,
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=32, num_heads=2, image_size=28, out_hidden_size=128,
        intermediate_size=32, projection_intermediate_size=32,
    )  # fmt: skip
    tokens = {
        f"{kind}_token_id": VOCABULARY - 1 - i
        for i, kind in enumerate(
            ("image", "video", "image_start", "image_end", "video_start", "video_end")
        )
    }
    config = transformers.Glm5NextConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Glm5NextForConditionalGeneration(config)


BUILD = {"kimi_linear": kimi_linear, "glm5_next": glm5_next}
EVERY_MODEL = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(name not in MODULES, reason=f"this transformers has no {name}"),
    )
    for name in BUILD
]
_built = {}


def build(name="kimi_linear"):
    """A model in float32, made once."""
    if name not in _built:
        torch.manual_seed(0)
        _built[name] = BUILD[name]().eval()
        _built[name].generation_config.eos_token_id = None
    return _built[name]


def tokens(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY - 10, shape, generator=generator)


def generate(model, ids, n, **options):
    return model.generate(ids, max_new_tokens=n, do_sample=False, **options)[:, ids.shape[1] :]


def logits(model, ids, **options):
    with torch.inference_mode():
        return model(ids, **options).logits


def difference(x, y):
    """RMS(x - y) / RMS(y)."""
    return float((x.double() - y.double()).norm() / y.double().norm())


# ---- generation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n", [("kimi_linear", 256), ("glm5_next", 96)])
def test_greedy_tokens_are_stocks(name, n, calls):
    if name not in MODULES:
        pytest.skip(f"this transformers has no {name}")
    model, prompt = build(name), tokens(1, 21)
    with stock():
        expected = generate(model, prompt, n)
        assert calls == {"prefill": 0, "decode": 0}
    assert len(expected[0].unique()) > n // 2, "greedy decoding loops: the comparison says little"
    with ours():
        got = generate(model, prompt, n)
    print(f"{name}: {n} tokens, {calls}")
    assert calls == {"prefill": KDA_LAYERS, "decode": KDA_LAYERS * (n - 1)}
    assert torch.equal(got, expected)


def test_comparison_sees_a_small_error(monkeypatch):
    """The test above can fail: an error of a hundredth in one kernel's output changes the tokens."""
    model, prompt = build(), tokens(1, 21)
    with stock():
        expected = generate(model, prompt, 256)
    decode = ops.decode
    monkeypatch.setattr(ops, "decode", lambda *a, **b: decode(*a, **b) * 1.01)
    with ours():
        assert not torch.equal(generate(model, prompt, 256), expected)


@pytest.mark.parametrize("fused_gate", [True, False])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_logits_are_stocks(name, fused_gate):
    model, ids = build(name), tokens(2, 75)
    with stock():
        expected = logits(model, ids)
    with ours(fused_gate=fused_gate):
        assert difference(logits(model, ids), expected) <= 2e-5


def test_fused_gate_is_used_unless_refused(monkeypatch):
    seen = []
    prefill = _C._prefill_results

    def looking(*arguments):
        seen.append((arguments[11], arguments[3].dtype, arguments[8]))  # gate in the kernel, g, bound
        return prefill(*arguments)

    monkeypatch.setattr(_C, "_prefill_results", looking)
    for name, fused, expected in [
        ("kimi_linear", True, (True, torch.float32, None)),
        ("kimi_linear", False, (False, torch.float32, None)),
        ("glm5_next", True, (True, torch.float32, -5.0)),
    ]:
        if name in MODULES:
            with ours(fused_gate=fused):
                logits(build(name), tokens(1, 5))
            assert seen == [expected] * KDA_LAYERS
            seen.clear()


def test_generation_with_cache_equals_generation_without(calls):
    model, prompt = build(), tokens(2, 9)
    with ours():
        cached = generate(model, prompt, 24)
        assert calls["decode"] == KDA_LAYERS * 23
        assert torch.equal(generate(model, prompt, 24, use_cache=False), cached)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_left_padded_batch(name):
    """Each row generates what it generates alone."""
    model = build(name)
    prompts = [tokens(n, seed=n) for n in (23, 9, 1)]
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    with ours():
        batch = generate(model, ids, 24, attention_mask=mask)
        for row, prompt in zip(batch, prompts):
            assert torch.equal(generate(model, prompt[None], 24)[0], row)
    with stock():
        assert torch.equal(generate(model, ids, 24, attention_mask=mask), batch)


def test_beam_search():
    """The cache's states are reordered between steps."""
    model, prompt = build(), tokens(2, 12)
    options = dict(num_beams=3, num_return_sequences=2)
    with stock():
        expected = generate(model, prompt, 20, **options)
    with ours():
        assert torch.equal(generate(model, prompt, 20, **options), expected)


def test_chunked_prefill():
    """Pieces through a cache, one of them a single token, give the logits of one call."""
    model, ids = build(), tokens(2, 100)
    with ours():
        expected = logits(model, ids, use_cache=False)
        cache = transformers.DynamicCache(config=model.config)
        pieces = [
            logits(model, piece, past_key_values=cache)
            for piece in ids.split([37, 1, 16, 40, 6], dim=1)
        ]
        assert difference(torch.cat(pieces, dim=1), expected) <= 2e-5
        generated = generate(model, ids, 16)
        assert torch.equal(generate(model, ids, 16, prefill_chunk_size=33), generated)
    with stock():
        assert torch.equal(generate(model, ids, 16), generated)


def test_decode_works_on_the_caches_states_in_place(monkeypatch):
    model, ids = build(), tokens(1, 8)
    addresses = []
    decode = ops.decode

    def looking(q, k, v, g, beta, state, **options):
        addresses.append(state.data_ptr())
        return decode(q, k, v, g, beta, state, **options)

    monkeypatch.setattr(ops, "decode", looking)
    with ours():
        cache = transformers.DynamicCache(config=model.config)
        logits(model, ids, past_key_values=cache)
        states = [cache.layers[i].recurrent_states[0] for i in range(KDA_LAYERS)]
        before = [x.clone() for x in states]
        logits(model, ids[:, :1], past_key_values=cache)
        assert addresses == [x.data_ptr() for x in states]
        for i in range(KDA_LAYERS):
            assert cache.layers[i].recurrent_states[0] is states[i]
            assert not torch.equal(states[i], before[i])


# ---- packed sequences -------------------------------------------------------------------------------


def packed(lens):
    ids = tokens(1, sum(lens))
    positions = torch.cat([torch.arange(n) for n in lens])[None]
    bounds = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
    return ids, positions, bounds


@pytest.mark.parametrize("keyword", ["cu_seqlens", "cu_seq_lens_q"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences(keyword, dtype):
    model = build()
    ids, positions, bounds = packed([5, 1, 40, 17, 2])
    with ours():
        alone = [logits(model, ids[:, i:j], use_cache=False) for i, j in itertools.pairwise(bounds)]
        together = logits(
            model, ids, position_ids=positions, use_cache=False, **{keyword: bounds.to(dtype)}
        )
        assert difference(together, torch.cat(alone, dim=1)) <= 2e-5
        leaking = logits(model, ids, position_ids=positions, use_cache=False)
    assert difference(leaking, torch.cat(alone, dim=1)) > 0.01
    with stock():
        expected = [
            logits(model, ids[:, i:j], use_cache=False) for i, j in itertools.pairwise(bounds)
        ]
    assert difference(together, torch.cat(expected, dim=1)) <= 2e-5


def test_padding_free_collator():
    """What transformers' own collator makes of a list of sequences."""
    model = build()
    sequences = [tokens(n, seed=n) for n in (7, 30, 3)]
    collate = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )
    batch = collate([{"input_ids": x.tolist()} for x in sequences])
    batch.pop("labels")
    with ours():
        together = logits(model, batch.pop("input_ids"), use_cache=False, **batch)
        alone = [logits(model, x[None], use_cache=False) for x in sequences]
    assert difference(together, torch.cat(alone, dim=1)) <= 2e-5


def test_seq_idx_alone_is_an_error():
    with ours(), pytest.raises(ValueError, match="seq_idx.*cu_seqlens"):
        logits(build(), tokens(1, 4), seq_idx=torch.zeros(1, 4, dtype=torch.int32))


def test_packed_convolution():
    """Against the convolution of each sequence; columns before the first token are a cache's."""
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    lens = [2, 1, 9, 3]
    x = torch.randn(1, 6, 3 + sum(lens))
    index = torch.cat([torch.full((n,), i) for i, n in enumerate(lens)])[None].int()
    with ours():
        got = KIMI.causal_conv1d_fn(x, weight, bias=bias, activation="silu", seq_idx=index)
    plain = KIMI.causal_conv1d_fn
    pieces = x[..., :3], *x[..., 3:].split(lens, dim=2)
    first = plain(torch.cat(pieces[:2], dim=2), weight, bias=bias, activation="silu")
    rest = [plain(p, weight, bias=bias, activation="silu") for p in pieces[2:]]
    assert difference(got, torch.cat([first, *rest], dim=2)) <= 1e-6


# ---- precision --------------------------------------------------------------------------------------


def bfloat16_model(name):
    if (name, "bf16") not in _built:
        torch.manual_seed(0)
        # Of a usual size of weights, and without experts: a token that is routed elsewhere because of a
        # rounding error hides every other error.
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIZES, "initializer_range", 0.05)
            patch.setitem(SIZES, "mlp_layer_types", ["dense"] * (KDA_LAYERS + 1))
            _built[name, "bf16"] = BUILD[name]().eval().bfloat16()
    return _built[name, "bf16"]


LENS = (90, 33, 6)


def alone(model, sequences):
    return [logits(model, x[None], use_cache=False)[0] for x in sequences]


def left_padded(model, sequences):
    width = max(len(x) for x in sequences)
    pads = [width - len(x) for x in sequences]
    ids = torch.stack([torch.nn.functional.pad(x, (n, 0)) for x, n in zip(sequences, pads)])
    mask = torch.stack([(torch.arange(width, device=ids.device) >= n).long() for n in pads])
    outs = logits(model, ids, attention_mask=mask, use_cache=False)
    return [out[n:] for out, n in zip(outs, pads)]


def through_cache(first, rest):
    """The first tokens, then pieces of `rest` tokens."""

    def run(model, sequences):
        outs = []
        for x in sequences:
            cache = transformers.DynamicCache(config=model.config.get_text_config())
            pieces = [x[:first], *x[first:].split(rest)]
            outs += [logits(model, p[None], past_key_values=cache)[0] for p in pieces if len(p)]
        return outs

    return run


def packed_together(model, sequences):
    lens = [len(x) for x in sequences]
    device = sequences[0].device
    bounds = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lens])[None]
    options = dict(position_ids=positions, cu_seqlens=bounds, use_cache=False)
    return [logits(model, torch.cat(sequences)[None], **options)[0]]


FORMS = {
    "alone": alone,
    "left_padded": left_padded,
    "decode": through_cache(4, 1),
    "chunked": through_cache(37, 20),
    "packed": packed_together,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name, form", [(n, f) for n in MODULES for f in FORMS if (n, f) != ("glm5_next", "packed")]
)
def test_bfloat16_error_is_stocks(name, form, device, calls):
    """Teacher-forced, against float32 with the same weights: at most 1.2 times stock's error."""
    model = copy.deepcopy(bfloat16_model(name)).to(device)
    gold = copy.deepcopy(model).float()
    sequences = [tokens(n, seed=n).to(device) for n in LENS]
    with stock():
        expected = torch.cat(alone(gold, sequences))
        # without FLA's and causal_conv1d's kernels stock cannot take packed sequences
        stocks = FORMS["alone" if form == "packed" else form](model, sequences)
        stocks = difference(torch.cat(stocks), expected)
    assert calls == {"prefill": 0, "decode": 0}
    with ours():
        error = difference(torch.cat(FORMS[form](model, sequences)), expected)
    assert calls["prefill"] > 0 and (calls["decode"] > 0) == (form == "decode")
    print(
        f"{name}, {form} on {device}: logits off by {error:.2e}, stock's by {stocks:.2e}, "
        f"ratio {error / stocks:.2f}"
    )
    assert error <= 1.2 * stocks


def test_autocast(calls):
    """Projections in bfloat16 of a float32 model, gates fused: as far from float32 as stock."""
    model, ids = copy.deepcopy(bfloat16_model("kimi_linear")).float(), tokens(1, 80)
    with stock():
        expected = logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            stocks = difference(logits(model, ids), expected)
    with ours(), torch.autocast("cpu", torch.bfloat16):
        assert difference(logits(model, ids), expected) <= 1.2 * stocks
    assert calls["prefill"] == KDA_LAYERS


# ---- training ---------------------------------------------------------------------------------------


def gradients_of(model, *arguments, **options):
    model.zero_grad()
    model(*arguments, **options).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("fused_gate", [True, False])
def test_gradients_are_stocks(fused_gate, calls):
    """The backward kernels' (on the CPU), of every parameter."""
    model, ids = build(), tokens(2, 40)
    with stock():
        expected = gradients_of(model, ids, labels=ids)
        assert calls["prefill"] == 0
    with ours(fused_gate=fused_gate):
        got = gradients_of(model, ids, labels=ids)
    assert calls == {"prefill": KDA_LAYERS, "decode": 0}
    assert got.keys() == expected.keys() and any("A_log" in name for name in got)
    for name, x in got.items():
        # transformers' log(1 + exp(x)) in float32 is good to 1e-5 where the gate is weak
        assert difference(x, expected[name]) <= 1e-4, name


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_gradients_error_is_stocks(device, calls):
    """Of each parameter, against float32 with the same weights: at most 1.3 times stock's error, or 1e-2."""
    model, ids = copy.deepcopy(bfloat16_model("kimi_linear")).to(device), tokens(2, 80).to(device)
    with stock():
        gold = gradients_of(copy.deepcopy(model).float(), ids, labels=ids)
        stocks = gradients_of(model, ids, labels=ids)
    assert calls["prefill"] == 0
    with ours():
        got = gradients_of(model, ids, labels=ids)
    assert calls["prefill"] == KDA_LAYERS and got.keys() == gold.keys()
    for name, x in got.items():
        limit = max(1.3 * difference(stocks[name], gold[name]), 1e-2)
        assert difference(x, gold[name]) <= limit, name


def test_gradients_of_packed_sequences():
    """The sum of those of each sequence, which transformers alone does not give on the CPU."""
    model = build()
    ids, positions, bounds = packed([5, 30, 9])
    spans = list(itertools.pairwise(bounds.tolist()))
    labels = torch.cat([torch.nn.functional.pad(ids[:, i + 1 : j], (1, 0), value=-100) for i, j in spans], dim=1)  # fmt: skip
    with stock():
        expected = None
        for i, j in spans:
            found = gradients_of(model, ids[:, i:j], labels=ids[:, i:j], use_cache=False)
            share = (j - i - 1) / sum(j - i - 1 for i, j in spans)
            found = {n: share * x for n, x in found.items()}
            expected = found if expected is None else {n: expected[n] + found[n] for n in found}
    with ours():
        got = gradients_of(
            model, ids, labels=labels, position_ids=positions, cu_seqlens=bounds, use_cache=False
        )
    for name, x in got.items():
        assert difference(x, expected[name]) <= 1e-4, name


@pytest.mark.parametrize("kernels", [True, False], ids=["backward", "no_backward"])
def test_frozen_gate_and_trained_projection(kernels, monkeypatch, calls):
    """As with adapters on q: gates come raw from a frozen gate into a call that needs gradients. Where there
    is no backward, it is left to transformers."""
    if not kernels:
        monkeypatch.setattr(ops, "supports_gradients", lambda *a: (False, "no backend"))
    integration._find_refusal.cache_clear()
    model, ids = build(), tokens(1, 20)
    projection = model.model.layers[0].self_attn.q_proj.weight

    def gradient():
        model.requires_grad_(False)
        projection.requires_grad_(True)
        try:
            (found,) = torch.autograd.grad(model(ids, labels=ids).loss, projection)
        finally:
            model.requires_grad_(True)
        return found

    with stock():
        expected = gradient()
    with ours():
        assert difference(gradient(), expected) <= 1e-4
    assert calls["prefill"] == (KDA_LAYERS if kernels else 0)
    integration._find_refusal.cache_clear()


# ---- what stays with transformers -------------------------------------------------------------------


def test_packed_sequences_that_stock_would_mix_up_are_refused():
    q, k, v, rest = arguments(T=9, K=300)
    bounds = torch.tensor([0, 4, 9])
    with ours(), pytest.raises(ValueError, match="cu_seqlens: transformers' PyTorch functions"):
        KIMI.chunk_kimi_delta_attention(q, k, v, **rest, cu_seqlens=bounds)


def arguments(B=1, T=5, heads=2, K=32, V=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(B, T, heads, n).to(dtype) for n in (K, K, V))
    g = -torch.nn.functional.softplus(normal(B, T, heads, K))
    return q, k, v, dict(g=g, beta=normal(B, T, heads).sigmoid().to(dtype))


def test_refused_tensors_run_as_before(calls, caplog):
    """A head of 300 channels is more than the kernels take; said once."""
    integration._find_refusal.cache_clear()
    q, k, v, rest = arguments(K=300)
    with stock():
        expected = KIMI.chunk_kimi_delta_attention(q, k, v, **rest)[0]
    with ours(), torch.no_grad():
        for _ in range(2):
            out, state = KIMI.chunk_kimi_delta_attention(q, k, v, **rest)
            assert torch.equal(out, expected) and state is None
    assert calls == {"prefill": 0, "decode": 0}
    assert len([r for r in caplog.records if "300" in r.getMessage()]) == 1


@pytest.mark.parametrize("T", [1, 5, 8, 9, 70])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
def test_functions_take_what_stock_takes(T, state):
    """Called by themselves: the state that is given stays as it is."""
    q, k, v, rest = arguments(B=2, T=T, V=48)
    q = q.transpose(2, 3).contiguous().transpose(2, 3)  # as the convolution leaves it
    initial = None
    if state is not None:
        initial = torch.randn(2, 2, 32, 48, generator=torch.Generator().manual_seed(1)).to(state)
    kept = None if initial is None else initial.clone()
    for name, norm, final in itertools.product(FUNCTIONS, (True, False), (True, False)):
        options = dict(
            **rest, initial_state=initial, output_final_state=final, use_qk_l2norm_in_kernel=norm
        )
        scaled = k if norm else k / 8
        with stock():
            expected = getattr(KIMI, name)(q, scaled, v, **options)
        with ours():
            got = getattr(KIMI, name)(q, scaled, v, **options)
        assert difference(got[0], expected[0]) <= 2e-5
        assert (got[1] is None) == (not final)
        if final:
            assert got[1].dtype == torch.float32 and difference(got[1], expected[1]) <= 2e-5
        assert initial is None or torch.equal(initial, kept)


# ---- compilation ------------------------------------------------------------------------------------


def test_compiled_without_a_graph_break():
    """Prefill and decode on a static cache, as generate() compiles them."""
    torch.manual_seed(0)
    model = bfloat16_model("kimi_linear")
    ids = tokens(1, 20)

    def run(forward):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        outs = [forward(ids, past_key_values=cache, use_cache=True).logits[:, -1:]]
        for i in range(3):
            position = torch.tensor([[20 + i]])
            options = dict(past_key_values=cache, use_cache=True, position_ids=position)
            outs.append(forward(ids[:, i : i + 1], **options).logits)
        return torch.cat(outs, dim=1)

    with ours(), torch.no_grad():
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        assert difference(run(compiled), run(model.forward)) <= 1e-6
    torch._dynamo.reset()


def test_export_keeps_transformers_functions(calls):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, g, beta):
            return KIMI.chunk_kimi_delta_attention(q, k, v, g=g, beta=beta)[0]

    q, k, v, rest = arguments()
    with ours(), torch.no_grad():
        program = torch.export.export(Layer(), (q, k, v, rest["g"], rest["beta"]))
    assert calls == {"prefill": 0, "decode": 0}
    assert "flash_kda" not in str(program.graph)


# ---- switching --------------------------------------------------------------------------------------


def test_disable_restores_everything():
    def everything():
        return [
            getattr(owner, name)
            for module in MODULES.values()
            for owner in [module, *(x for x in vars(module).values() if isinstance(x, type))]
            for name in (*FUNCTIONS, "causal_conv1d_fn", "forward")
            if hasattr(owner, name)
        ]

    before = everything()
    assert not integration.is_enabled()
    assert integration.enable() == list(MODULES)
    assert integration.is_enabled()
    changed = sum(x is not y for x, y in zip(before, everything()))
    assert changed == 5 * len(MODULES)
    integration.enable()  # again changes nothing that disable() would not undo
    integration.disable()
    assert not integration.is_enabled()
    assert all(x is y for x, y in zip(before, everything()))


def test_without_transformers(monkeypatch):
    monkeypatch.setattr(integration, "_MODELS", {"kimi_quadratic": ("A", "B")})
    with pytest.raises(ImportError, match=r"transformers: version .* has none of kimi_quadratic"):
        integration.enable()
    monkeypatch.setattr(integration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="transformers: not installed"):
        integration.enable()
    assert not integration.is_enabled()


FLA_STUB = """
def chunk_kda(q, k, v, g, beta, initial_state=None, output_final_state=False,
              use_qk_l2norm_in_kernel=False, cu_seqlens=None):
    raise RuntimeError("0 active drivers")
fused_recurrent_kda = chunk_kda
"""

PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
if {fla!r} is None:
    sys.modules["fla"] = None  # cannot be imported
else:
    sys.path.insert(0, {fla!r})
assert "transformers" not in sys.modules

def switch_on():
    import flash_kda.integrations.transformers as integration
    integration.enable()
    return integration

if {first}:
    integration = switch_on()
from transformers import KimiLinearConfig, KimiLinearForCausalLM
config = KimiLinearConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=1, num_key_value_heads=1, kv_lora_rank=16, qk_rope_head_dim=8,
    v_head_dim=16, qk_nope_head_dim=16, linear_head_dim=16, linear_num_heads=2,
    layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense"] * 2,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3)
torch.manual_seed(0)
model = KimiLinearForCausalLM(config).eval()
ids = torch.arange(2, 12)[None]
if not {first}:
    integration = switch_on()
run = lambda: model.generate(ids, max_new_tokens=8, do_sample=False)[0, 10:].tolist()
from flash_kda import ops
count = 0
decode = ops.decode
def counting(*a, **b):
    global count
    count += 1
    return decode(*a, **b)
ops.decode = counting
tokens = run()
model(ids, labels=ids).loss.backward()  # with FLA and no GPU
integration.disable()
try:
    stock = run()
except RuntimeError as error:
    stock = str(error)
print(count, tokens, stock, sep=";")
"""


@pytest.mark.parametrize(
    "fla, first",
    [(False, True), (True, True), (True, False)],  # without FLA, afterwards: all tests above
    ids=["without_fla-before_import", "with_fla-before_import", "with_fla-after_import"],
)
def test_with_and_without_fla(first, fla, tmp_path, run_python):
    """Where FLA is installed and there is no GPU, transformers alone fails inside of Triton."""
    (tmp_path / "fla/ops/kda").mkdir(parents=True)
    for package, text in {"fla": "", "fla/ops": "", "fla/ops/kda": FLA_STUB}.items():
        (tmp_path / package / "__init__.py").write_text(textwrap.dedent(text))
    out = run_python(PROGRAM.format(fla=str(tmp_path) if fla else None, first=first))
    count, got, expected = out.splitlines()[-1].split(";")
    print(f"{count} calls of our decode: {got}; without us: {expected}")
    assert int(count) == 7
    if fla:
        assert "active drivers" in expected
    else:
        assert got == expected


THROUGH_FLA = """
import sys
import torch
torch.set_num_threads(1)
import flash_kda.integrations.fla
flash_kda.integrations.fla.register()
sys.path.insert(0, {here!r})
from problems import wrap_functions
count = {{}}
def counting(kind, run):
    def call(*a, **b):
        results = run(*a, **b)
        count[kind] = count.get(kind, 0) + (results is not NotImplemented)
        return results
    return call
wrap_functions(counting)
from transformers import KimiLinearConfig, KimiLinearForCausalLM
config = KimiLinearConfig(**{sizes!r})
torch.manual_seed(0)
model = KimiLinearForCausalLM(config).eval()
ids = torch.arange(2, 12)[None]
run = lambda: model.generate(ids, max_new_tokens=8, do_sample=False)[0, 10:].tolist()
tokens = run()
before = dict(count)
import flash_kda.integrations.transformers
flash_kda.integrations.transformers.enable()
print(before, tokens, run(), sep=";")
"""


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla is not installed")
def test_through_flas_functions(run_python):
    """What transformers offers by itself: it takes FLA's functions, and these are ours after register()."""
    sizes = {**SIZES, "qk_rope_head_dim": 16, "mlp_layer_types": ["dense"] * (KDA_LAYERS + 1)}
    sizes["layer_types"] = ["linear_attention"] * KDA_LAYERS + ["full_attention"]
    out = run_python(THROUGH_FLA.format(sizes=sizes, here=str(pathlib.Path(__file__).parent)))
    count, through_fla, direct = out.splitlines()[-1].split(";")
    print(f"through FLA's functions: {count}, {through_fla}; enable(): {direct}")
    assert sum(eval(count).values()) == KDA_LAYERS * 8
    assert through_fla == direct
