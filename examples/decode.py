"""A prompt by prefill, then token by token by decode, in PyTorch: what generating text does.

A batch of requests of different lengths is prefilled into slots of a state pool, in one call; then every
step decodes one token of each. Afterwards the same tokens go through one prefill: the outputs agree.
On a GPU (--device cuda) the decode step is captured in a CUDA graph.
"""

import argparse

import torch

import flash_kda

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--device", default="cpu")
device = parser.parse_args().device

H, D, SLOTS, STEPS = 4, 128, 8, 12
LENS = [40, 7, 19]
N = len(LENS)
dtype = torch.bfloat16
torch.manual_seed(0)

# The layer's parameters, and the projections of every token that there will be: [N, T, H, D].
A_log, dt_bias = torch.randn(H, device=device) / 2, torch.randn(H, D, device=device) / 2
T = max(LENS) + STEPS
q, k, v, g = (torch.randn(N, T, H, D, device=device).to(dtype) for _ in range(4))
beta = torch.randn(N, T, H, device=device).to(dtype)
gate = dict(A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0)


def prompts(x, lens):
    """The first tokens of each request, one after the other: [1, sum(lens), ...]."""
    return torch.cat([row[:n] for row, n in zip(x, lens)])[None].contiguous()


def prefill(lens, **states):
    tokens = [prompts(x, lens) for x in (q, k, v, g, beta)]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    out = torch.empty_like(tokens[2])
    flash_kda.fwd(*tokens, None, out, **gate, cu_seqlens=cu_seqlens, **states)
    return out[0].split(lens)


pool = torch.zeros(SLOTS, H, D, D, device=device)
slots = torch.tensor([5, 0, 3], device=device)
prompt_out = prefill(LENS, final_state=pool, final_state_indices=slots)

# One step: the tokens are copied into the step's own memory, so that it can be a CUDA graph.
step_in = [torch.empty_like(x[:, :1]) for x in (q, k, v, g, beta)]
step_out = torch.empty_like(step_in[2])


def step():
    flash_kda.decode(*step_in, pool, step_out, state_indices=slots, **gate)


if device == "cpu":
    run = step
else:
    flash_kda.warmup(torch.device(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    run = graph.replay

position = torch.tensor(LENS, device=device)
requests = torch.arange(N, device=device)
outs = []
for _ in range(STEPS):
    for x, y in zip(step_in, (q, k, v, g, beta)):
        x.copy_(y[requests, position][:, None])
    run()
    outs.append(step_out.clone())
    position += 1
outs = torch.cat(outs, dim=1)

final = torch.empty(N, H, D, D, device=device)
expected = prefill([n + STEPS for n in LENS], final_state=final)


def difference(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


worst = max(difference(torch.cat([a, b]), c) for a, b, c in zip(prompt_out, outs, expected))
state = difference(pool[slots], final)
print(
    f"{N} requests, {STEPS} steps on {device}: out {worst:.1e}, state {state:.1e} from one prefill"
)
assert worst < 1e-2 and state < 1e-2
