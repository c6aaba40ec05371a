"""packing.py: the same numbers from packed weights, nearly the same from int8, nothing left out."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA_TIED

from clip import Clip, ClipConfig
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Linear, Llama
from speed.packing import FEW, Int8Linear, PackedLinear, onednn_linear, pack

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_way = pytest.mark.parametrize("int8", [False, True], ids=["packed", "int8"])
TOKENS = torch.arange(9)[None]


def model(dtype: torch.dtype) -> IAA:
    """A tiny model with an adaptor; the same weights each time, as a bf16 file has them."""
    torch.manual_seed(0)
    iaa = IAA(Llama(LLAMA_TIED), Clip(ClipConfig(20, 2, 4, 28, 4, 8)), 510)
    iaa.adaptors["mm"] = Adaptor(AdaptorConfig((0, 2), "b"), LLAMA_TIED, 20)
    return iaa.requires_grad_(False).bfloat16().to(dtype).eval()


def packed(dtype: torch.dtype, int8: bool = False) -> IAA:
    """The same model, packed."""
    iaa = model(dtype)
    pack(iaa, int8)
    return iaa


def logits(iaa: IAA, workflow: str) -> torch.Tensor:
    """Of TOKENS, in fp32."""
    return iaa.logits(iaa(TOKENS, workflow), workflow).float()


def test_every_matrix_is_exchanged():
    """LLM, tied head, insertion layers, gates, own head; not the projector, which has biases."""
    kinds = [type(module) for module in packed(torch.float32).modules()]
    assert kinds.count(PackedLinear) == 4 * 4 + 1 + 2 * 4 + 2 + 1
    assert kinds.count(Linear) == 2


@pytest.mark.parametrize(("weight", "fp16"), [
    (torch.randn(48, 64).bfloat16().float(), True),
    (torch.randn(48, 64), False), (torch.full((48, 64), 2.0**17), False)])
def test_fp16_is_only_for_values_that_it_holds(weight, fp16):
    """Those of an fp32 file would lose bits, large ones everything."""
    layer, x = PackedLinear(weight), torch.randn(2, 5, 64)
    assert (layer.product is not onednn_linear) == fp16
    torch.testing.assert_close(layer(x), F.linear(x, weight))


@each_dtype
@each_way
@pytest.mark.parametrize("workflow", ["text", "mm"])
def test_logits_are_nearly_the_plain_ones(workflow, int8, dtype):
    """To the rounding of the dtype, or by a few percent of the largest: int8 has 8 bits."""
    wanted, got = logits(model(dtype), workflow), logits(packed(dtype, int8), workflow)
    tolerance = 0.05 if int8 else 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(got, wanted, atol=tolerance * float(wanted.abs().max()), rtol=1e-5)


@each_dtype
@each_way
def test_text_is_the_packed_llm_alone_bit_for_bit(int8, dtype):
    """With an adaptor loaded, text logits are those of the bare Llama, packed as well."""
    bare = model(dtype).llama
    pack(bare, int8)
    wanted = bare.logits(bare(bare.embedding(TOKENS), bare.rope(TOKENS, dtype))).float()
    assert torch.equal(logits(packed(dtype, int8), "text"), wanted)


@pytest.mark.parametrize("tokens", [1, FEW // 2, 40])
@each_dtype
def test_int8_is_the_rounded_weight(tokens, dtype):
    """Each output is that of the weight rounded to 255 steps of its row's largest entry."""
    weight = torch.randn(48, 64).to(dtype)
    x = torch.randn(2, tokens, 64).to(dtype)
    step = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16().float()
    rounded = (weight.float() / step).round().clamp(-127, 127) * step
    assert (rounded - weight.float()).abs().max() <= 0.76 * step.max()
    got = Int8Linear(weight)(x)
    assert got.dtype == dtype and got.shape == (2, tokens, 48)
    in_bf16 = dtype == torch.bfloat16 or 2 * tokens <= FEW
    torch.testing.assert_close(got.float(), F.linear(x.float(), rounded), rtol=0.01,
                               atol=0.15 if in_bf16 else 1e-4)


def test_the_kernel_is_not_given_shapes_that_it_reads_beyond():
    """Outputs in sixteens, inputs in thirty-twos; a row of zeros stays zero."""
    assert Int8Linear(torch.randn(32, 64)).has_kernel
    assert not Int8Linear(torch.randn(30, 64)).has_kernel
    assert torch.equal(Int8Linear(torch.zeros(3, 8))(torch.ones(1, 8)), torch.zeros(1, 3))
