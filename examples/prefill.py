"""Prefill of two sequences of one batch: 5 and 11 tokens, 2 heads, K = V = 64."""

import numpy as np

import flash_kda

T, H, D = 16, 2, 64
rng = np.random.default_rng(0)
q, k, v, g = (rng.standard_normal((1, T, H, D), dtype=np.float32) for _ in range(4))
beta = rng.standard_normal((1, T, H), dtype=np.float32)
cu_seqlens = np.array([0, 5, T], dtype=np.int32)  # where each sequence begins, and the end

out = np.empty_like(v)
final_state = np.empty((2, H, D, D), dtype=np.float32)  # [N, H, V, K]
flash_kda.fwd(
    q, k, v, g, beta,
    scale=D**-0.5,
    out=out,
    A_log=np.zeros(H, dtype=np.float32),
    dt_bias=np.zeros((H, D), dtype=np.float32),
    lower_bound=-5.0,
    final_state=final_state,
    cu_seqlens=cu_seqlens,
)
print("out", out.shape, "rms", float(np.sqrt(np.mean(out**2))))

# The first sequence alone gives the same numbers.
alone = np.empty_like(v[:, :5])
flash_kda.fwd(
    q[:, :5], k[:, :5], v[:, :5], g[:, :5], beta[:, :5],
    scale=D**-0.5, out=alone, A_log=None, dt_bias=None, lower_bound=-5.0,
)
assert np.array_equal(alone, out[:, :5])
