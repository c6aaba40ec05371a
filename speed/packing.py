"""A loaded model's matrices stored for fast inference: in a library's own layout, or as int8.

- fp32 on a CPU: where fp16 holds the values (of bf16 it does, but for tiny ones), fp16 weights for
  FBGEMM, which computes in fp32: half the bytes to read per token. Else oneDNN's layout.
- int8: a scale for each output, one byte per weight, to infer and to train by. Activations are not
  quantised: in int8 too they raised perplexity by 2.0 %, weights alone do by 0.3 % (SmolLM2-135M).
- The LLM and the adaptors are packed alike, so the text workflow keeps the bits of the packed LLM
  alone. Another kernel rounds otherwise than the plain one, as another batch size does.
- The operators are private to torch. A model that is not packed differs by rounding only.

Letters: N tokens, of whatever batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Linear, Llama

FEW = 8  # tokens up to which the int8 kernel beats a product with dequantised weights


def onednn_computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies matrices of `dtype` on `device` with the processor's own speed."""
    there = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return there and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., inputs) times a weight (outputs, inputs), packed or not, in one dtype."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class Dequantised(torch.autograd.Function):
    """The product with int8 weights, dequantised as they are used. Only x gets a gradient.

    What it saves for the backward pass is the int8 weight. Autograd by itself would save the
    dequantised one, and so keep a whole LLM in the compute dtype until then.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x (N, inputs), weight (outputs, inputs), scale (outputs,) -> (N, outputs)."""
        ctx.save_for_backward(weight, scale)
        linear = onednn_linear if onednn_computes(x.dtype, x.device) else F.linear
        return linear(x, weight.to(x.dtype)).mul_(scale.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the output (N, outputs) -> that of x (N, inputs)."""
        weight, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


class Int8Linear(nn.Module):
    """A `Linear` without bias as int8 weights with a scale for each output. They stay frozen."""

    def __init__(self, weight: Tensor):
        super().__init__()
        values = weight.detach().float()
        scale = (values.abs().amax(1).clamp(min=1e-30) / 127).bfloat16()  # (outputs,)
        values = (values / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", values.to(torch.int8))
        self.register_buffer("scale", scale)
        aligned = weight.shape[0] % 16 == weight.shape[1] % 32 == 0  # else the kernel reads beyond
        self.has_kernel = aligned and weight.device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in x's dtype."""
        rows = x.flatten(0, -2)  # (N, inputs)
        if self.has_kernel and len(rows) <= FEW and not x.requires_grad:
            # It is vectorised for bf16 activations alone, on processors without bf16 too.
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).to(x.dtype)
        else:
            y = Dequantised.apply(rows, self.weight, self.scale)
        return y.unflatten(0, x.shape[:-1])


class PackedLinear(nn.Module):
    """A `Linear` without bias in the faster of a library's layouts that hold its values.

    FBGEMM's has fp16 weights and computes in fp32. Else it is oneDNN's, which `F.linear` makes anew
    at each call.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        weight, engines = weight.detach(), torch.backends.quantized.supported_engines
        if weight.dtype == torch.float32 and "fbgemm" in engines and (
                # Half of the smallest fp16 number: of bf16 values only tiny ones change.
                (weight.half().float() - weight).abs().max() <= 2**-25):
            self.weight = torch.ops.quantized.linear_prepack_fp16(weight, None)
            self.product = torch.ops.quantized.linear_dynamic_fp16
        else:  # the layout for 16 tokens, which is good for one, and for a prompt
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
            self.product = onednn_linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in x's dtype, which must be the weight's."""
        return self.product(x, self.weight)


def pack(model: nn.Module, int8: bool = False) -> None:
    """Replace every matrix of the Llamas and adaptors in `model`, which cannot be saved afterwards.

    A tied head becomes a matrix of its own. Linear layers with a bias stay, and so do embeddings.
    Without int8, a model stays as it is where oneDNN has no kernels for its dtype and device.
    """
    weight, new = next(model.parameters()), Int8Linear if int8 else PackedLinear
    if not int8 and not onednn_computes(weight.dtype, weight.device):
        return
    # Without the matrices themselves: the list would keep all old ones until the end.
    for module in [each for each in model.modules() if not isinstance(each, Linear)]:
        if isinstance(module, Llama) and module.head is None:
            module.head = new(module.embedding.weight)
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and child.bias is None:
                setattr(module, name, new(child.weight))
