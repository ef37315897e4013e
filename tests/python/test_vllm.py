"""vLLM's keywords of flash_kda.fwd with that project's meaning: workspace and checkpoints.

vLLM's own build takes fwd(q, k, v, g, beta, scale, out, workspace, A_log, dt_bias, lower_bound,
initial_state, final_state, cu_seqlens, checkpoint_state, checkpoint_offsets, checkpoint_indptr): buffers
sized once for the largest batch, int32 or int64 cu_seqlens, betas that are columns of a wider projection,
and the state after tokens of its choice. Here everything after lower_bound goes by keyword.
"""

import flash_kda
import pytest
import torch
from problems import DEVICES, agree, error, tolerance_on

H, D = 4, 128
LOWER_BOUND = -5.0
MAX_TOKENS, MAX_SEQUENCES = 512, 8


class Engine:
    """Buffers as an engine has them: allocated once, for the largest batch that there will be."""

    def __init__(self, device):
        def empty(*shape, dtype):
            return torch.full(shape, 77 if dtype == torch.uint8 else torch.nan, dtype=dtype).to(
                device
            )

        self.device = device
        self.out = empty(1, MAX_TOKENS, H, D, dtype=torch.bfloat16)
        self.final = empty(MAX_SEQUENCES, H, D, D, dtype=torch.float32)
        self.checkpoints = empty(32, H, D, D, dtype=torch.float32)
        size = flash_kda.get_workspace_size(MAX_TOKENS, H, MAX_SEQUENCES)
        self.workspace = empty(size, dtype=torch.uint8)

    def prefill(self, b, **options):
        out, final = self.out[:, : b.T], self.final[: b.N]
        flash_kda.fwd(
            b.q, b.k, b.v, b.g, b.beta, D**-0.5, out, b.A_log, b.dt_bias, LOWER_BOUND,
            initial_state=b.initial, final_state=final, cu_seqlens=b.cu_seqlens,
            workspace=self.workspace, **options,
        )  # fmt: skip
        return out.clone(), final.clone()


class Batch:
    def __init__(self, lens, device, index=torch.int32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=torch.bfloat16):
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        self.lens, self.N, self.T = lens, len(lens), sum(lens)
        self.device, self.index = device, index
        self.q, self.k, self.v, self.g = (normal(1, self.T, H, D) for _ in range(4))
        self.projection = normal(1, self.T, 3 * H)
        self.beta = self.projection[..., H : 2 * H]  # rows are strided
        self.A_log = normal(H, dtype=torch.float32) * 0.5
        self.dt_bias = normal(H, D, dtype=torch.float32) * 0.5
        self.initial = normal(self.N, H, D, D, dtype=torch.float32)
        self.starts = [sum(lens[:n]) for n in range(self.N + 1)]
        self.cu_seqlens = self.integers(self.starts)

    def integers(self, values):
        return torch.tensor(values, dtype=self.index, device=self.device)

    def gold(self):
        wide = torch.float64
        q, k, v, g, beta = (x.to("cpu", wide) for x in (self.q, self.k, self.v, self.g, self.beta))
        out, final = torch.empty_like(v), torch.empty(self.initial.shape, dtype=wide)
        flash_kda.fwd(
            q, k, v, g, beta, None, out, self.A_log.cpu(), self.dt_bias.cpu(), LOWER_BOUND,
            self.initial.cpu(), final, self.cu_seqlens.cpu(), backend="reference",
        )  # fmt: skip
        return out, final

    def state_after(self, n, tokens):
        """The state of sequence n after so many tokens, by a call that ends there."""
        span = slice(self.starts[n], self.starts[n] + tokens)
        state = self.initial[n : n + 1].clone()
        flash_kda.fwd(
            *(x[:, span] for x in (self.q, self.k, self.v, self.g, self.beta)), None,
            torch.empty_like(self.v[:, span]), self.A_log, self.dt_bias, LOWER_BOUND, state, state,
        )  # fmt: skip
        return state[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_buffers_made_once_serve_every_batch(device, index):
    engine = Engine(device)
    for seed, lens in enumerate([[200, 0, 17, 64], [1] * MAX_SEQUENCES, [MAX_TOKENS]]):
        b = Batch(lens, device, index, seed)
        assert b.beta.stride(1) == 3 * H
        out, final = engine.prefill(b)
        gold_out, gold_final = b.gold()
        assert error(out.cpu(), gold_out) <= tolerance_on(device)
        assert error(final.cpu(), gold_final) <= tolerance_on(device)


def test_workspace_that_is_too_small_is_named():
    b, engine = Batch([100, 50], "cpu"), Engine("cpu")
    engine.workspace = engine.workspace[:1000]
    with pytest.raises(ValueError, match="workspace"):
        engine.prefill(b)
    assert engine.out.isnan().all() and engine.final.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_checkpoints(device, index):
    """checkpoint_indptr: any number a sequence, none included; outputs do not change."""
    b, engine = Batch([0, 17, 64, 65, 130], device, index), Engine(device)
    out, final = engine.prefill(b)
    offsets, owners, indptr = [], [], [0]
    for n, length in enumerate(b.lens):
        wanted = [] if n == 3 else [x for x in (16, 32, 64, 112) if x <= length]
        offsets += wanted
        owners += [n] * len(wanted)
        indptr.append(len(offsets))
    rows = engine.checkpoints[: len(offsets)]
    got = engine.prefill(
        b,
        checkpoint_state=rows,
        checkpoint_offsets=b.integers(offsets),
        checkpoint_indptr=b.integers(indptr),
    )
    assert agree(got[0], out) and agree(got[1], final)
    for state, n, offset in zip(rows, owners, offsets):
        assert agree(state, b.state_after(n, offset))
    assert engine.checkpoints[len(offsets) :].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_one_checkpoint_a_sequence(device):
    """The older form: checkpoint_offsets [N] and checkpoint_state [N,H,V,K]; 0 says "none" there."""
    b, engine = Batch([80, 40, 33, 64], device), Engine(device)
    out, final = engine.prefill(b)
    offsets = [48, 0, 32, 64]
    states = engine.checkpoints[: b.N]
    got = engine.prefill(b, checkpoint_state=states, checkpoint_offsets=b.integers(offsets))
    assert agree(got[0], out) and agree(got[1], final)
    for n, offset in enumerate(offsets):
        expected = b.state_after(n, offset) if offset else b.initial[n]
        assert agree(states[n], expected)


def test_offsets_that_are_no_multiple_of_16_are_refused():
    """On the CPU: on a GPU they lie in device memory, which the host does not read."""
    b, engine = Batch([80, 40], "cpu"), Engine("cpu")
    with pytest.raises(ValueError, match=r"checkpoint_offsets\[1\]: 24, expected -1 or a multiple"):
        engine.prefill(
            b, checkpoint_state=engine.checkpoints[:2], checkpoint_offsets=b.integers([16, 24])
        )
    assert engine.out.isnan().all() and engine.checkpoints.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_paged_states_without_staging(device):
    """The shorter way: read, write and checkpoint the pages of the cache where they lie."""
    b, engine = Batch([80, 48, 16], device), Engine(device)
    out, final = engine.prefill(b)
    pages = torch.full((20, H, D, D), torch.nan, device=device)
    read, write = b.integers([3, 9, 4]), b.integers([6, 9, 1])
    pages[read] = b.initial
    pages[4] = torch.nan  # a new request: what its page holds does not matter
    b.initial[2] = 0
    expected = engine.prefill(b)
    short = torch.empty_like(out)
    flash_kda.fwd(
        b.q, b.k, b.v, b.g, b.beta, None, short, b.A_log, b.dt_bias, LOWER_BOUND,
        initial_state=pages, final_state=pages, cu_seqlens=b.cu_seqlens, workspace=engine.workspace,
        initial_state_indices=read, final_state_indices=write,
        has_initial_state=torch.tensor([True, True, False], device=device),
        checkpoint_state=pages, checkpoint_offsets=b.integers([32, 64, 16]),
        checkpoint_indptr=b.integers([0, 2, 3, 3]), checkpoint_state_indices=b.integers([12, 13, 15]),
    )  # fmt: skip
    assert agree(short, expected[0]) and agree(pages[write], expected[1])
    for page, n, offset in [(12, 0, 32), (13, 0, 64), (15, 1, 16)]:
        assert agree(pages[page], b.state_after(n, offset))
    untouched = [i for i in range(20) if i not in (1, 3, 6, 9, 12, 13, 15)]
    assert pages[untouched].isnan().all()
