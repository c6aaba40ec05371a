"""int8 weights in training: gradients, what is kept, ZeRO, resuming, and the text promise."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CLIP, LLAMA, LLAMA_TIED, talk, tiny_base, write_rows
from PIL import Image
from processes import processes
from safetensors.torch import load_file
from torch import nn

import train as training
from clip import Clip
from common.files import check_frozen, load_frozen, read_json
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Llama, set_recompute
from sample import Chat
from speed import packing
from speed.packing import Int8Linear, pack
from training.config import Config, StageConfig

TOKENS = torch.arange(40)[None]


def dequantised(weight: torch.Tensor) -> nn.Linear:
    """A plain linear layer with the values that `Int8Linear` stands for."""
    int8, plain = Int8Linear(weight), nn.Linear(*weight.shape[::-1], bias=False)
    plain.weight = nn.Parameter(int8.weight * int8.scale.float()[:, None], requires_grad=False)
    return plain


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [LLAMA, LLAMA_TIED], ids=["head", "tied"])
def test_gradients_are_those_of_the_dequantised_model(sizes, recompute, monkeypatch):
    """Within 1e-3 of all, by norm; autograd keeps no dequantised weight of a frozen layer."""
    gradients, kept = [], []
    for new in (dequantised, Int8Linear):
        torch.manual_seed(0)
        model = IAA(Llama(sizes), Clip(CLIP), 510)
        adaptor = Adaptor(AdaptorConfig((0, 2), own_head=False), sizes, CLIP.width)
        adaptor.init_from_frozen(model.llama)
        monkeypatch.setattr(packing, "Int8Linear", new)
        pack(model.llama, int8=True)
        model.adaptors["mm"] = adaptor
        set_recompute(model, recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = model.loss(TOKENS, TOKENS.roll(-1), "mm")
        loss.backward()
        gradients.append(torch.cat([w.grad.flatten() for name, w in adaptor.named_parameters()
                                    if not name.startswith("projector")]))
        float_matrices = {t.shape for t in kept if t.is_floating_point()}
        kept.clear()
    assert (gradients[1] - gradients[0]).norm() <= 1e-3 * gradients[0].norm() > 0
    assert (sizes.vocab_size, sizes.width) not in float_matrices  # the head's, which has no copy


def test_a_single_token_gets_its_gradient():
    """Where the kernel for few tokens would run, which has none."""
    layer, x = Int8Linear(torch.randn(32, 64)), torch.randn(1, 64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.has_kernel
    torch.testing.assert_close(x.grad, (layer.scale.float() @ layer.weight.float())[None])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of one stage with an int8 base, on a tiny base and four rows with a picture."""
    folder = tmp_path_factory.mktemp("int8")
    tiny_base(folder)
    Image.new("RGB", (40, 30), "red").save(folder / "1.png")
    row = {"image": "1.png", "conversations": talk("<image>\nWhat?", "A dog.")}
    write_rows(folder / "rows.jsonl", 4 * [row])
    stage = StageConfig("s", [f"{folder}/rows.jsonl"], steps=4, lr=1e-2, batch=4, micro_batch=1,
                        save_every=2)
    return Config(f"{folder}/run", f"{folder}/llama", f"{folder}/clip", str(folder), [stage],
                  insertion=2, own_head=False, dtype="fp32", frozen_dtype="int8",
                  shard_frozen=False, workers=0)


@pytest.fixture(scope="module")
def trained(config):
    """The adaptor's tensors of that run, on one process and never stopped."""
    return run(config, "whole")


def run(config, name):
    """The run in a folder of its own, and the tensors of its adaptor."""
    config = replace(config, out=f"{config.images}/{name}")
    training.train(config, None)
    return load_file(f"{config.out}/s/adaptor/adaptor.safetensors")


def test_text_is_the_int8_llm_bit_for_bit(config, trained):
    """After training, as `sample.py --quantize int8` opens it; the base's files are untouched."""
    chat = Chat.load(f"{config.images}/whole", "fp32", "cpu", "int8")
    llm = load_frozen(Llama, config.llm, torch.float32)
    pack(llm, int8=True)
    wanted = llm.logits(llm(llm.embedding(TOKENS), llm.rope(TOKENS, torch.float32)))
    assert torch.equal(chat.model.logits(chat.model(TOKENS)), wanted)
    check_frozen(Llama, config.llm)
    meta = read_json(Path(config.images, "whole/s/adaptor/config.json"))
    assert meta["base"]["llama"] == llm.sha256
    assert meta["settings"]["frozen_dtype"] == "int8"


def test_a_stopped_run_ends_with_the_same_bits(config, trained):
    """SIGTERM in the first step, then the same command."""
    training.SIGTERM.set()
    with pytest.raises(SystemExit):
        run(config, "stopped")
    training.SIGTERM.clear()
    assert all(torch.equal(trained[name], w) for name, w in run(config, "stopped").items())


@pytest.mark.parametrize("zero", range(4))
def test_two_ranks_train_as_one(config, trained, zero):
    """At every ZeRO stage, to rounding."""
    out = f"{config.images}/zero{zero}"
    ranked = replace(config, out=out, stage=[replace(config.stage[0], zero=zero)])
    with processes(2, training.train, ranked, None) as (_, result):
        assert [result(60)[1] for _ in range(2)] == [None, None]
    got = load_file(f"{out}/s/adaptor/adaptor.safetensors")
    for name, wanted in trained.items():
        torch.testing.assert_close(got[name], wanted, rtol=0, atol=1e-4)
