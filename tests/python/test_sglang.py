"""SGLang's way of calling flash_kda.fwd, and the shorter way that does the same on its state pool.

SGLang's prefill backend gathers states from the pool, makes inputs contiguous, turns activated betas back
into logits, calls fwd by position up to lower_bound, and scatters the states. docs/integrations/sglang.md
shows what can be left out; the tests hold both ways against gold.
"""

import flash_kda
import numpy as np
import pytest
import torch
from problems import DEVICES, agree, error, tolerance_on

H, D, SLOTS = 4, 128, 12
LOWER_BOUND = -5.0
LENS = [130, 1, 64, 300]  # SGLang falls back to Triton below 64 tokens and above 2048; we need not


class Batch:
    """What a linear attention layer of SGLang holds when it calls its KDA backend."""

    def __init__(self, device, lens=LENS, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=torch.bfloat16):
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        T = sum(lens)
        # q, k and v are slices of one projection, as after the short convolution
        self.qkv = normal(1, T, 3 * H * D)
        self.q, self.k, self.v = (x.unflatten(-1, (H, D)) for x in self.qkv.chunk(3, dim=-1))
        self.g = normal(1, T, H, D)
        self.beta_logit = normal(1, T, H)
        self.beta = self.beta_logit.float().sigmoid()  # the layer activates it
        self.A_log = normal(1, 1, H, 1, dtype=torch.float32) * 0.5
        self.dt_bias = normal(H * D, dtype=torch.float32) * 0.5
        self.pool = normal(SLOTS, H, D, D, dtype=torch.float32)
        self.cache_indices = torch.tensor([7, 2, 11, 0][: len(lens)], device=device).int()
        self.query_start_loc = torch.tensor([0, *np.cumsum(lens)], device=device).int()
        self.lens = lens

    def gold(self, **options):
        """(out, the states of the batch) in double precision."""
        wide = torch.float64
        q, k, v, g = (x.to("cpu", wide) for x in (self.q, self.k, self.v, self.g))
        initial = self.pool[self.cache_indices.long()].cpu()
        out, final = torch.empty_like(v), torch.empty(initial.shape, dtype=wide)
        flash_kda.fwd(
            q, k, v, g, self.beta.to("cpu", wide), None, out, self.A_log.cpu(),
            self.dt_bias.cpu(), LOWER_BOUND, initial, final, self.query_start_loc.cpu(),
            beta_is_logit=False, backend="reference", **options,
        )  # fmt: skip
        return out, final


def sglangs_way(b: Batch, beta_is_raw=False):
    """The calls that SGLang makes, in its order."""
    q, k, v, g = (x.contiguous() for x in (b.q, b.k, b.v, b.g))
    beta = b.beta_logit if beta_is_raw else b.beta.float().clamp(1e-7, 1 - 1e-7).logit()
    initial_state = b.pool[b.cache_indices].contiguous()
    final_state = torch.empty_like(initial_state)
    out = torch.empty_like(v)
    flash_kda.fwd(
        q,
        k,
        v,
        g,
        beta.to(torch.bfloat16).contiguous(),
        D**-0.5,
        out,
        b.A_log.reshape(-1).float().contiguous(),
        b.dt_bias.reshape(H, -1).float().contiguous(),
        LOWER_BOUND,
        initial_state=initial_state,
        final_state=final_state,
        cu_seqlens=b.query_start_loc.to(torch.int64),
    )
    b.pool[b.cache_indices] = final_state
    return out


def shorter_way(b: Batch, **options):
    """The same on what the layer has."""
    out = torch.empty(b.v.shape, dtype=b.v.dtype, device=b.v.device)
    flash_kda.fwd(
        b.q, b.k, b.v, b.g, b.beta, None, out, b.A_log, b.dt_bias, LOWER_BOUND,
        initial_state=b.pool, final_state=b.pool, state_indices=b.cache_indices,
        cu_seqlens=b.query_start_loc, beta_is_logit=False, **options,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [sglangs_way, shorter_way], ids=["sglangs", "shorter"])
def test_prefill_on_the_state_pool(device, way):
    b = Batch(device)
    gold_out, gold_states = b.gold()
    before = b.pool.clone()
    assert not b.q.is_contiguous()
    out = way(b)
    # SGLang rounds the logits that it makes to bfloat16: its betas are off by up to 2**-9
    limit = 1e-2 if way is sglangs_way else tolerance_on(device)
    indices = b.cache_indices.long()
    assert error(out.cpu(), gold_out) <= limit
    assert error(b.pool[indices].cpu(), gold_states) <= limit
    others = [i for i in range(SLOTS) if i not in indices.tolist()]
    assert torch.equal(b.pool[others], before[others])


@pytest.mark.parametrize("device", DEVICES)
def test_both_ways_give_the_same(device):
    """With raw betas, which SGLang passes on as they are, nothing is lost on the way."""
    long, short = Batch(device), Batch(device)
    short.beta = short.beta_logit
    out = sglangs_way(long, beta_is_raw=True)
    other = torch.empty_like(out)
    flash_kda.fwd(
        short.q, short.k, short.v, short.g, short.beta, None, other, short.A_log, short.dt_bias,
        LOWER_BOUND, short.pool, short.pool, short.query_start_loc, state_indices=short.cache_indices,
    )  # fmt: skip
    assert agree(out, other) and agree(long.pool, short.pool)


@pytest.mark.parametrize("device", DEVICES)
def test_new_requests_start_from_zero(device):
    """SGLang clears a slot before its first use; has_initial_state makes that unnecessary."""
    cleared, dirty = Batch(device), Batch(device)
    fresh = torch.tensor([True, False, False, True], device=device)
    cleared.pool[cleared.cache_indices[fresh]] = 0
    dirty.pool[dirty.cache_indices[fresh]] = torch.nan
    out = shorter_way(cleared)
    assert agree(shorter_way(dirty, has_initial_state=~fresh), out)
    assert agree(dirty.pool[dirty.cache_indices], cleared.pool[cleared.cache_indices])


@pytest.mark.parametrize("device", DEVICES)
def test_states_for_the_prefix_cache(device):
    """What SGLang takes the Triton kernel for: the state before every 64 tokens, one row a chunk."""
    b = Batch(device)
    pool = b.pool.clone()
    chunks = [-(-n // 64) for n in b.lens]
    states = torch.full((1, sum(chunks), H, D, D), torch.nan, device=device)
    out = shorter_way(b, checkpoint_state=states, checkpoint_every=64, checkpoint_before=True)
    again = Batch(device)
    assert agree(shorter_way(again), out)  # they cost no other results
    row = 0
    for n, count in enumerate(chunks):
        assert torch.equal(states[0, row], pool[b.cache_indices[n]])
        row += count
    # the state before token 256 of the last request is where a request with that prefix goes on
    begin = int(b.query_start_loc[3])
    suffix = Batch(device)
    suffix.pool[5] = states[0, row - chunks[3] + 4]
    rest = slice(begin + 256, None)
    tail = torch.empty(suffix.v[:, rest].shape, dtype=out.dtype, device=device)
    flash_kda.fwd(
        suffix.q[:, rest], suffix.k[:, rest], suffix.v[:, rest], suffix.g[:, rest],
        suffix.beta[:, rest], None, tail, suffix.A_log, suffix.dt_bias, LOWER_BOUND,
        suffix.pool, suffix.pool, beta_is_logit=False,
        state_indices=torch.tensor([5], device=device),
    )  # fmt: skip
    for got, expected in [(tail, out[:, rest]), (suffix.pool[5], b.pool[0])]:
        assert agree(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_decode_and_speculation_on_the_same_pool(device):
    """Decode of one token a request, then of 4 drafted tokens, of which each request accepts some."""
    b = Batch(device, [1, 1, 1, 1])
    one = [x.transpose(0, 1) for x in (b.q, b.k, b.v, b.g, b.beta)]
    prefilled = Batch(device, [1, 1, 1, 1])
    expected = shorter_way(prefilled).transpose(0, 1)
    out = flash_kda.decode(
        *one, b.pool, A_log=b.A_log, dt_bias=b.dt_bias, lower_bound=LOWER_BOUND,
        beta_is_logit=False, state_indices=b.cache_indices,
    )  # fmt: skip
    assert error(out.cpu(), expected.double().cpu()) <= 2 * tolerance_on(device)
    assert error(b.pool.cpu(), prefilled.pool.double().cpu()) <= tolerance_on(device)

    # verify: every request has a slot for the state after each drafted token
    N, drafts = 2, 4
    s = Batch(device, [drafts] * N)
    columns = torch.arange(2, 2 + N * drafts, device=device).reshape(N, drafts)
    start = torch.tensor([[0], [1]], device=device).expand(N, drafts)
    tokens = [x.reshape(N, drafts, *x.shape[2:]) for x in (s.q, s.k, s.v, s.g, s.beta)]
    pool = s.pool.clone()
    options = dict(A_log=s.A_log, dt_bias=s.dt_bias, lower_bound=LOWER_BOUND, beta_is_logit=False)
    out = flash_kda.decode(
        *tokens, pool, initial_state_indices=start, final_state_indices=columns, **options
    )
    assert torch.equal(pool[:2], s.pool[:2])  # the committed states are still there
    # the next step starts from the state of the last accepted token: no copy, no replay
    accepted = torch.tensor([3, 1], device=device)
    more = flash_kda.decode(
        *(x[:, :1].contiguous() for x in tokens), pool.clone(), num_accepted_tokens=accepted,
        initial_state_indices=columns, final_state_indices=start, **options,
    )  # fmt: skip
    for n in range(N):
        taken = [x[n : n + 1, : int(accepted[n])].contiguous() for x in tokens]
        state = s.pool[n : n + 1].clone()
        replay = flash_kda.decode(*taken, state, **options)
        assert agree(replay, out[n : n + 1, : int(accepted[n])])
        first = [x[n : n + 1, :1].contiguous() for x in tokens]
        assert agree(flash_kda.decode(*first, state, **options), more[n : n + 1])
