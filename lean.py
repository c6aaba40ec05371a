"""A CPU's attention; operations that keep less for the backward pass; freed memory used again.

Autograd would keep the probabilities of every attention (T a head and token) and silu(gate) of
every feed-forward: half of what a frozen layer holds. `SwiGLU` and `SoftmaxAttention` keep
their inputs alone (views of what they are parts of, in a batch of one) and compute these again,
which is cheap. `attend_on_cpu` is for processors, prompts too; a GPU has torch's fused kernel.

Letters: as in llama.py; R = B K rows of keys; of a block of queries: t tokens, s keys up to its
end, n of them with a bias.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 128  # tokens that ask at once in attention
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def set_memory_use() -> None:
    """How the C library and oneDNN use memory in training; before the first tensor.

    Not for a chat: what loading freed would stay, 0.36 GB of the demo's model.
    """
    # glibc gives a large tensor's pages back to Linux when it is freed, which has the next one's
    # filled with zeros. Kept, they made a step of the demo's grounding 1.2 times as fast.
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # oneDNN keeps its kernels, on a CPU some 30 for each length of rows: 1024, the default, took
    # gigabytes in a long run of varying lengths.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "256")


class SwiGLU(Function):
    """silu(gate) * up, of the two halves of one tensor."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        """(..., 2F) -> (..., F)."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        """The gradient of (..., F) -> that of (..., 2F), written straight into its halves."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        to_gate, to_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return out


def probabilities(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Softmax of the scores: q (R, t G, E), k (R, s, E) -> (R, t G, s).

    bias (B or 1, t G, n): 0 or -inf, added to the scores of the last n keys.
    """
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    by_mask = scores.view(len(bias), -1, *scores.shape[1:])  # (B or 1, K or R, t G, s)
    by_mask[..., -bias.shape[-1] :] += bias[:, None]
    return scores.softmax(-1)


class SoftmaxAttention(Function):
    """softmax(q k / sqrt(E)) v, nothing later seen; rows of q are queries of G heads, by token.

    Queries go in blocks of BLOCK tokens, and no key that comes after a block is scored for it.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (R, T G, E), k and v (R, S, E), mask as `attention_mask` -> (R, T G, E)."""
        ctx.save_for_backward(q, k, v, mask)
        return torch.cat([torch.bmm(probabilities(q[:, rows], k[:, :seen], bias), v[:, :seen])
                          for rows, seen, bias in blocks(q, k, mask)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradient of the output -> those of q, k, v."""
        q, k, v, mask = ctx.saved_tensors
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, seen, bias in blocks(q, k, mask):
            shown = probabilities(q[:, rows], k[:, :seen], bias)  # (R, t G, s)
            to_v[:, :seen] += torch.bmm(shown.mT, grad[:, rows])
            to_shown = torch.bmm(grad[:, rows], v[:, :seen].mT)
            to_scores = torch._softmax_backward_data(to_shown, shown, -1, shown.dtype)
            to_scores *= q.shape[-1] ** -0.5
            to_q[:, rows] = torch.bmm(to_scores, k[:, :seen])
            to_k[:, :seen] += torch.bmm(to_scores.mT, q[:, rows])
        return to_q, to_k, to_v, None


def spans(tokens: int) -> list[tuple[int, int]]:
    """The blocks of `tokens` queries: first of each, and one past its last."""
    return [(first, min(first + BLOCK, tokens)) for first in range(0, tokens, BLOCK)]


def blocks(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, int, Tensor]]:
    """Of each block of queries: its rows of q, the keys up to its end, their bias."""
    tokens = k.shape[1] if mask is None else mask.shape[2]
    groups, past = q.shape[1] // tokens, k.shape[1] - tokens
    for first, end in spans(tokens):
        if mask is None:  # all that came before the block is visible
            visible = q.new_ones(1, end - first, end - first, dtype=torch.bool).tril()
        else:
            visible = mask[:, 0, first:end, : past + end]
        bias = q.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        bias = bias.repeat_interleave(groups, 1)  # (B or 1, t G, n)
        yield slice(first * groups, end * groups), past + end, bias


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, H, T, E), k and v (B, K, S, E), mask (B or 1, 1, T, S), None: causal -> (B, H, T, E).

    Matrix products and a softmax. In bf16 on 2 cores, forward and backward with a mask took 28 ms
    so and 68 ms through `scaled_dot_product_attention`, at B 8, H 9, K 3, T 342, E 64 (41 ms with
    all queries in one block); forward alone, causal, B 1: 1.3 ms against 1.7 at T 320, 8 against 12
    at T 1024, 107 against 152 at T 4096. In fp32 it is behind (1.9 against 1.7, 15 against 12, 217
    against 140), which did not seem worth a second path.
    The G queries that share a key head are rows of one product: nothing is repeated.
    """
    batch, heads, tokens, size = q.shape
    q = q.view(batch, k.shape[1], -1, tokens, size).transpose(2, 3)  # (B, K, T, G, E)
    groups = q.shape[3]
    q = q.reshape(batch * k.shape[1], tokens * groups, size)  # (R, T G, E)
    y = SoftmaxAttention.apply(q, k.flatten(0, 1), v.flatten(0, 1), mask)  # (R, T G, E)
    y = y.view(batch, -1, tokens, groups, size).transpose(1, 2).flatten(2, 3)  # (B, T, H, E)
    return y.transpose(1, 2)
