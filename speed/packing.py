"""A loaded model's matrices stored for fast inference on a CPU: packed for oneDNN, or as int8.

- `pack` exchanges every matrix of the frozen LLM and of the adaptors in place, once, at the start;
  a packed model cannot be trained or saved. Norms, embeddings and the vision tower stay.
- Adaptors and LLM are packed alike, so the text workflow keeps the bits of the packed LLM alone;
  another kernel rounds otherwise than the plain one, as another batch size does.

One token through all matrices of SmolLM2-135M took, in ms on one core of a Zen 4: `F.linear` in
fp32 46, in bf16 35; packed 38 and 20; int8 19 (what it saves is memory: half of bf16). 16 tokens,
on the same core busier: `F.linear` 138 and 75; packed 85 and 37.

Letters: B batch, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Linear, Llama

FEW = 4  # tokens up to which the int8 kernel beats a product with the weights made bf16 again
TOKENS = 16  # that oneDNN chooses its blocks for: as good for 1, and better for more, than 1


class PackedLinear(nn.Module):
    """A `Linear` without bias in oneDNN's blocks: `F.linear` puts a weight into these each time."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in x's dtype, which must be the weight's."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Int8Linear(nn.Module):
    """A `Linear` without bias as int8 weights, a scale for each output; activations stay bf16.

    Activations in int8 too (a scale a token, `torch._int_mm`) took 15 ms in place of 19 for one
    token, but raised perplexity by 2.0 %; weights alone raise it by 0.3 %.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        values = weight.detach().float()
        scale = (values.abs().amax(1).clamp(min=1e-30) / 127).to(weight.dtype)  # (outputs,)
        values = (values / scale.float()[:, None]).round().clamp(-127, 127)  # by what is kept of it
        self.register_buffer("weight", values.to(torch.int8))
        self.register_buffer("scale", scale)
        self.kernel = (  # the CPU's own for few tokens; its loop reads past rows of another length
            weight.shape[0] % 16 == weight.shape[1] % 32 == 0
            and weight.dtype == torch.bfloat16 and not weight.is_cuda)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in x's dtype."""
        rows = x.flatten(0, -2)  # (B T, inputs)
        if self.kernel and len(rows) <= FEW:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)  # (B T, outputs)
            return y.unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


def pack(model: nn.Module, int8: bool = False) -> None:
    """Exchange every matrix of the Llamas and adaptors in `model`, a tied head's too, for good.

    Without int8, a model stays as it is where oneDNN has no kernels for its dtype and device.
    """
    dtypes, device = {p.dtype for p in model.parameters()}, next(model.parameters()).device.type
    blocks = device == "cpu" and torch.backends.mkldnn.is_available()
    if torch.bfloat16 in dtypes:
        blocks = blocks and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if torch.float16 in dtypes:
        blocks = blocks and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if not int8 and not blocks:
        return
    stored = Int8Linear if int8 else PackedLinear
    for module in list(model.modules()):
        if isinstance(module, Llama) and module.head is None:
            module.head = stored(module.embedding.weight)
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and child.bias is None:
                setattr(module, name, stored(child.weight))
