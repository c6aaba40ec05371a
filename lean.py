"""Memory: operations that keep less of it for the backward pass, and what is freed used again.

Autograd would keep the probabilities of every attention (T a head and token) and silu(gate) of
every feed-forward: half of what a frozen layer holds. `SwiGLU` and `SoftmaxAttention` keep
their inputs alone (views of what they are parts of, in a batch of one) and compute these again,
which is cheap. `attend_on_cpu` is for processors; on a GPU torch's fused kernel does the same.

Letters: as in llama.py; R = B K rows of keys.
"""

import contextlib
import ctypes
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """q (R, G T, E), k (R, S, E), mask (B or 1, 1, T, S), True = visible -> (R, G T, S)."""
    if mask is None:  # causal, then S = T
        mask = torch.ones(1, 1, k.shape[1], k.shape[1], dtype=torch.bool).tril()
    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    scores.view(len(mask), -1, *mask.shape[2:]).add_(hidden)  # (B or 1, R G / B or R G, T, S)
    return scores.softmax(-1)


class SoftmaxAttention(Function):
    """softmax(q k / sqrt(E)) v of what the mask shows; a row of q is a query of any of G heads."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (R, G T, E), k and v (R, S, E), mask as `probabilities` -> (R, G T, E)."""
        ctx.save_for_backward(q, k, v, mask)
        return torch.bmm(probabilities(q, k, mask), v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradient of the output -> those of q, k, v."""
        q, k, v, mask = ctx.saved_tensors
        seen, scale = probabilities(q, k, mask), q.shape[-1] ** -0.5  # (R, G T, S)
        to_v = torch.bmm(seen.mT, grad)
        to_scores = torch._softmax_backward_data(torch.bmm(grad, v.mT), seen, -1, seen.dtype)
        to_q = torch.baddbmm(q, to_scores, k, beta=0, alpha=scale)  # 0: q's values are not used
        to_k = torch.baddbmm(k, to_scores.mT, q, beta=0, alpha=scale)
        return to_q, to_k, to_v, None


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, H, T, E), k and v (B, K, S, E), mask (B or 1, 1, T, S), None: causal -> (B, H, T, E).

    Matrix products and a softmax: for training, wherever there is a mask, and for short prompts.
    In bf16 on 2 cores beside other work, forward and backward with a mask took 18 ms so and 48 ms
    through `scaled_dot_product_attention`, at B 4, H 9, K 3, T 180, E 64; forward alone, causal,
    B 1: 3.4 ms against 4.2 at T 320, 9 against 13 at T 512, 31 against 20 at T 768.
    The G queries of a key head stand below each other, as rows of one product: nothing is repeated.
    """
    batch, heads, tokens, size = q.shape
    q = q.reshape(batch * k.shape[1], -1, size)  # (R, G T, E)
    y = SoftmaxAttention.apply(q, k.flatten(0, 1), v.flatten(0, 1), mask)  # (R, G T, E)
    return y.view(batch, heads, tokens, size)
