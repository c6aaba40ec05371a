"""lean.py: the gradients of autograd, without what autograd keeps."""

import pytest
import torch
import torch.nn.functional as F

from lean import SwiGLU, attend_on_cpu
from llama import attention_mask

torch.manual_seed(0)
SEGMENTS = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 1, 2, -1, -1]])


def plain_attention(q, k, v, mask):
    """The definition, every key head repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~(causal if mask is None else mask), float("-inf")).softmax(-1) @ v


def gradients(function, inputs, *more):
    """The function's value, and the gradients of a weighted sum of it."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs, *more)
    weights = torch.arange(value.numel()).view(value.shape).sin().to(value.dtype)
    return value.detach(), torch.autograd.grad((value * weights).sum(), inputs)


@pytest.mark.parametrize("block", [128, 4])
@pytest.mark.parametrize("past, segments", [(0, None), (0, SEGMENTS), (3, None), (0, SEGMENTS[:1])],
                         ids=["causal", "segments", "behind a cache", "one mask for all"])
def test_attention_has_the_gradients_of_its_definition(past, segments, block, monkeypatch):
    """Value and gradients of q, k, v in fp64, rows of another mask each, pads among them.

    All queries in one block, and in two, the second of half its size.
    """
    monkeypatch.setattr("lean.BLOCK", block)
    q = torch.randn(2, 6, 6, 4, dtype=torch.float64)
    k, v = (torch.randn(2, 2, past + 6, 4, dtype=torch.float64) for _ in "kv")
    mask = attention_mask(6, past, segments)
    found, wanted = (gradients(f, (q, k, v), mask) for f in (attend_on_cpu, plain_attention))
    torch.testing.assert_close(found, wanted)


def test_swiglu_has_the_gradients_of_its_definition():
    """silu(first half) * second half, in fp64."""
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    found = gradients(SwiGLU.apply, [x])
    wanted = gradients(lambda x: F.silu(x[..., :4]) * x[..., 4:], [x])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("block", [128, 2])
def test_bf16_rounds_no_more_than_autograd_does(block, monkeypatch):
    """Both functions' gradients in bf16 are those in fp32, but for a few of its roundings."""
    monkeypatch.setattr("lean.BLOCK", block)
    q = torch.randn(2, 6, 6, 4).bfloat16().float()
    for function, inputs in ((lambda q, k: attend_on_cpu(q, k, k, None), (q, q[:, :2])),
                             (SwiGLU.apply, (q,))):
        exact = gradients(function, inputs)[1]
        found = gradients(function, [x.bfloat16() for x in inputs])[1]
        for x, wanted in zip(found, exact, strict=True):
            assert x.dtype == torch.bfloat16
            torch.testing.assert_close(x.float(), wanted, rtol=0, atol=0.02 * wanted.abs().max())


@pytest.mark.parametrize("name, most", [("attention", 3), ("swiglu", 1)])
def test_inputs_are_all_that_is_kept(name, most):
    """Not the probabilities, nor silu(gate): tensors that autograd saves are the inputs' size."""
    q = torch.randn(2, 6, 50, 4, requires_grad=True)
    work = {"attention": lambda: attend_on_cpu(q, q[:, :2], q[:, 2:4], None),
            "swiglu": lambda: SwiGLU.apply(q)}[name]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        work()
    assert len(saved) == most and all(x.numel() <= q.numel() for x in saved)
