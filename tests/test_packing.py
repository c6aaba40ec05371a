"""packing.py: the same numbers from packed weights, nearly the same from int8, nothing left out."""

import pytest
import torch
import torch.nn.functional as F

from clip import Clip, ClipConfig
from generate import generate
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Linear, Llama, LlamaConfig
from speed.packing import Int8Linear, PackedLinear, pack

CONFIG = LlamaConfig(61, 24, 3, 6, 2, 10, 26, 64, rope_theta=100.0, tied=True)
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def model(dtype: torch.dtype, packed: bool = False, int8: bool = False) -> IAA:
    """A tiny model with an adaptor; the same weights each time."""
    torch.manual_seed(0)
    iaa = IAA(Llama(CONFIG), Clip(ClipConfig(20, 2, 4, 28, 4, 8)), 59)
    iaa.adaptors["mm"] = Adaptor(AdaptorConfig((0, 2), "b"), CONFIG, 20)
    iaa = iaa.requires_grad_(False).to(dtype).eval()
    if packed:
        pack(iaa, int8)
    return iaa


def logits(iaa: IAA, workflow: str) -> torch.Tensor:
    """Of 9 fixed tokens."""
    with torch.inference_mode():
        return iaa.logits(iaa(torch.arange(9)[None], workflow), workflow).float()


def test_every_matrix_is_exchanged():
    """LLM, tied head, insertion layers, gates, own head; not the projector, which has biases."""
    iaa = model(torch.float32, packed=True)
    kinds = [type(module) for module in iaa.modules()]
    assert kinds.count(PackedLinear) == 3 * 4 + 1 + 2 * 4 + 2 + 1
    assert kinds.count(Linear) == 2
    assert type(iaa.llama.head) is PackedLinear


@each_dtype
@pytest.mark.parametrize("workflow", ["text", "mm"])
def test_packed_equals_plain(workflow, dtype):
    """The same logits, to the rounding of the dtype."""
    packed = model(dtype, True)
    if not any(isinstance(m, PackedLinear) for m in packed.modules()):
        pytest.skip(f"oneDNN has no kernels in {dtype} on this processor: nothing is packed")
    wanted, got = logits(model(dtype), workflow), logits(packed, workflow)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03 * float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=1e-5)


@each_dtype
def test_text_is_the_packed_llm_alone_bit_for_bit(dtype):
    """With an adaptor loaded, text logits are those of the bare Llama, packed as well."""
    iaa, bare = model(dtype, True), model(dtype).llama
    pack(bare)
    with torch.inference_mode():
        x = bare.embedding(torch.arange(9)[None])
        wanted = bare.logits(bare(x, bare.rope(torch.arange(9)[None], dtype))).float()
    assert torch.equal(logits(iaa, "text"), wanted)


@pytest.mark.parametrize("int8", [False, True])
def test_a_batch_in_bf16(int8):
    """Rows together and alone, to bf16's rounding: its likeliest tokens may tie."""
    iaa, tokens = model(torch.bfloat16, True, int8), torch.arange(27).view(3, 9)
    with torch.inference_mode():
        together = iaa.logits(iaa(tokens, "mm"), "mm").float()
        alone = [iaa.logits(iaa(row[None], "mm"), "mm").float() for row in tokens]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0,
                               atol=0.03 * float(together.abs().max()))


@pytest.mark.parametrize("int8", [False, True])
def test_a_batch_answers_as_one_by_one(int8):
    """Prompts of different lengths, 8 tokens."""
    iaa, prompts = model(torch.float32, True, int8), [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10, 11]]
    alone = [generate(iaa, [prompt], None, "mm", 8)[0] for prompt in prompts]
    assert generate(iaa, prompts, None, "mm", 8) == alone


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])  # by the int8 kernel, and by weights made bf16
@each_dtype
def test_int8_is_the_rounded_weight(tokens, dtype):
    """Each output is that of the weight rounded to 255 steps of its row's largest entry."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    x = torch.randn(2, tokens, 64, generator=generator).to(dtype)
    step = (weight.float().abs().amax(1, keepdim=True) / 127).to(dtype).float()
    rounded = (weight.float() / step).round().clamp(-127, 127) * step
    assert (rounded - weight.float()).abs().max() <= step.max()
    got = Int8Linear(weight)(x)
    assert got.dtype == dtype and got.shape == (2, tokens, 48)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(got.float(), F.linear(x.float(), rounded), atol=tolerance, rtol=0.01)


def test_a_row_of_zeros_stays_zero():
    """No division by nothing."""
    assert torch.equal(Int8Linear(torch.zeros(3, 8))(torch.ones(1, 8)), torch.zeros(1, 3))
