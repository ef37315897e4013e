"""The names, order and defaults that other projects call us by."""

import ast
import inspect
import pathlib

import flash_kda
import numpy as np
import pytest
from problems import Torch, bits, problem

FWD = [
    "q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound",
    "initial_state", "final_state", "cu_seqlens",
]  # fmt: skip
FWD_OPTIONS = {
    "gate": "bounded",
    "l2norm": True,
    "beta_is_logit": True,
    "allow_neg_eigval": False,
    "state_layout": "vk",
    "state_indices": None,
    "initial_state_indices": None,
    "final_state_indices": None,
    "has_initial_state": None,
    "checkpoint_state": None,
    "checkpoint_offsets": None,
    "checkpoint_indptr": None,
    "checkpoint_every": 0,
    "checkpoint_before": False,
    "checkpoint_state_indices": None,
    "batch_invariant": False,
    "workspace": None,
    "backend": None,
}
DECODE = ["q", "k", "v", "g", "beta", "state", "out"]
DECODE_OPTIONS = {
    "state_indices": None,
    "initial_state_indices": None,
    "final_state_indices": None,
    "has_initial_state": None,
    "initial_state": None,
    "num_accepted_tokens": None,
    "scale": None,
    "A_log": None,
    "dt_bias": None,
    "lower_bound": None,
    "gate": "bounded",
    "l2norm": True,
    "beta_is_logit": True,
    "allow_neg_eigval": False,
    "state_layout": "vk",
    "write_state": True,
    "batch_invariant": False,
    "workspace": None,
    "backend": None,
}


def split(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert len(positional) + len(options) == len(list(parameters))  # no *args, no **kwargs
    return positional, options


@pytest.mark.parametrize(
    "function, names, required, expected",
    [(flash_kda.fwd, FWD, 10, FWD_OPTIONS), (flash_kda.decode, DECODE, 6, DECODE_OPTIONS)],
    ids=["fwd", "decode"],
)
def test_names_order_defaults(function, names, required, expected):
    positional, options = split(function)
    assert [p.name for p in positional] == names
    assert [p.default for p in positional[:required]] == [inspect.Parameter.empty] * required
    assert [p.default for p in positional[required:]] == [None] * (len(names) - required)
    assert {p.name: p.default for p in options} == expected
    if function is flash_kda.fwd:
        assert [p.name for p in options] == list(expected)


@pytest.mark.parametrize("function", [flash_kda.supports, flash_kda.plan])
def test_questions_take_what_fwd_takes(function):
    positional, options = split(function)
    assert [p.name for p in positional] == FWD
    assert [p.default for p in positional[5:]] == [None] * 8
    extra = {"op": "prefill", "state": None, "num_accepted_tokens": None, "write_state": True}
    assert {p.name: p.default for p in options} == {**FWD_OPTIONS, **extra}


def test_workspace_size_signature():
    assert str(inspect.signature(flash_kda.get_workspace_size)) == "(T_total, H, N=1)"


@pytest.mark.parametrize("module", [flash_kda, flash_kda.experimental])
def test_stubs_agree(module):
    """The .pyi file says what the functions say."""
    stub = ast.parse(pathlib.Path(module.__file__).with_suffix(".pyi").read_text())
    functions = {f.name: f for f in stub.body if isinstance(f, ast.FunctionDef)}
    assert set(functions) == {n for n in module.__all__ if callable(getattr(module, n))}
    for name, node in functions.items():
        positional, options = split_any(getattr(module, name))
        a = node.args
        assert [p.name for p in positional] == [x.arg for x in a.posonlyargs + a.args], name
        assert [p.name for p in options] == [x.arg for x in a.kwonlyargs], name
        defaults = [ast.literal_eval(d) for d in a.defaults]
        assert [p.default for p in positional[len(positional) - len(defaults) :]] == defaults, name
        assert [p.default for p in options] == [ast.literal_eval(d) for d in a.kw_defaults], name


def split_any(function):
    parameters = inspect.signature(function).parameters.values()
    return (
        [p for p in parameters if p.kind is not p.KEYWORD_ONLY],
        [p for p in parameters if p.kind is p.KEYWORD_ONLY],
    )


def test_documented():
    for name in flash_kda.__all__:
        if callable(getattr(flash_kda, name)):
            assert len(getattr(flash_kda, name).__doc__) > 30, name


def test_fla_and_sglang_calls_agree(library):
    """The two ways in which other projects call fwd give what an all-keyword call gives."""
    p = problem(lens=[20, 0, 41], K=128, V=128)
    one = library.of
    arguments = p.tensors(library)
    results = []
    for style in ("fla", "sglang", "keywords"):
        out, final = np.full_like(p.v, np.nan), np.full(p.state_shape, np.nan, np.float32)
        states = {
            "initial_state": one(p.initial_state),
            "final_state": one(final),
            "cu_seqlens": one(p.cu_seqlens),
        }
        scale, A_log, dt_bias = 0.125, one(p.A_log), one(p.dt_bias)
        if style == "fla":
            returned = flash_kda.fwd(
                *arguments,
                scale,
                one(out),
                A_log=A_log,
                dt_bias=dt_bias,
                lower_bound=-5.0,
                **states,
            )
        elif style == "sglang":
            returned = flash_kda.fwd(*arguments, scale, one(out), A_log, dt_bias, -5.0, **states)
        else:
            names = dict(zip(("q", "k", "v", "g", "beta"), arguments))
            returned = flash_kda.fwd(
                **states, lower_bound=-5.0, dt_bias=dt_bias, A_log=A_log, out=one(out),
                scale=scale, **names,
            )  # fmt: skip
        assert returned is None
        assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(final).all()
        results.append((bits(out), bits(final)))
    assert results[0] == results[1] == results[2]


def test_argument_errors():
    p = problem(T=3)
    tensors, out = p.tensors(Torch), Torch.of(p.v.copy())
    with pytest.raises(TypeError, match=r"fwd\(\) got an unexpected keyword argument 'typo'"):
        flash_kda.fwd(*tensors, None, out, None, None, None, typo=1)
    with pytest.raises(TypeError, match=r"missing required argument 'lower_bound'"):
        flash_kda.fwd(*tensors, None, out, None, None)
    with pytest.raises(TypeError, match=r"multiple values for argument 'q'"):
        flash_kda.fwd(*tensors, None, out, None, None, None, q=tensors[0])
    with pytest.raises(TypeError, match=r"at most 13 positional arguments \(14 given\)"):
        flash_kda.fwd(*tensors, None, out, None, None, None, None, None, None, "bounded")
    with pytest.raises(TypeError, match=r"decode\(\) missing required argument 'state'"):
        flash_kda.decode(*tensors)
    with pytest.raises(TypeError, match=r"get_workspace_size\(\) got an unexpected keyword"):
        flash_kda.get_workspace_size(16, 2, n=3)


def test_keywords_made_at_run_time():
    """Names that are equal to ours without being the same string objects."""
    p = problem(T=5)
    out = np.full_like(p.v, np.nan)
    arguments = dict(zip(FWD, [*p.tensors(Torch), None, Torch.of(out), None, None, None]))
    fresh = {"".join(list(name)): value for name, value in arguments.items()}
    flash_kda.fwd(**fresh, **{"".join(["l2", "norm"]): True})
    assert np.isfinite(out.astype(np.float32)).all()
