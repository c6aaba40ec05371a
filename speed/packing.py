"""A loaded model's matrices stored for fast inference: in oneDNN's own layout, or as int8.

- `pack` exchanges every matrix of the frozen LLM and of the adaptors in place. They can
  no more be trained or saved. Norms, embeddings, projectors and the vision tower stay.
- The LLM and the adaptors are packed alike, so the text workflow keeps the bits of the packed LLM
  alone. Another kernel rounds otherwise than the plain one, as another batch size does.
- The operators are private to torch. A model that is not packed gives the same answers.
"""

import torch
from torch import Tensor, nn

from speed.int8 import Int8Linear, exchange_matrices, onednn_computes, onednn_linear


class PackedLinear(nn.Module):
    """A `Linear` without bias in oneDNN's layout, which `F.linear` makes anew at each call."""

    def __init__(self, weight: Tensor):
        super().__init__()
        # The layout depends on a number of tokens. That for 16 is good for one, and for a prompt.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in x's dtype, which must be the weight's."""
        return onednn_linear(x, self.weight)


def pack(model: nn.Module, int8: bool = False) -> None:
    """Exchange every matrix of the Llamas and adaptors in `model`, a tied head's too, for good.

    Without int8, a model stays as it is where oneDNN has no kernels for its dtype and device.
    """
    weight = next(model.parameters())
    if not int8 and not onednn_computes(weight.dtype, weight.device):
        return
    exchange_matrices(model, Int8Linear if int8 else PackedLinear)
