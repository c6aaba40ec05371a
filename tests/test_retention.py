"""retention.py: zero for the text workflow, not zero for what was trained."""

import math

import pytest
import torch

from iaa import IAA, Adaptor, AdaptorConfig
from evaluation.text_retention import compare, perplexity, windows
from tokenization.tokenizer import Tokenizer

TEXT = "Some text that is long enough for two windows of the comparison. " * 9


@pytest.fixture
def model(tiny_base, tmp_path):
    """A tiny model with adaptors: mm, and llava with an LLM of its own, a little changed."""
    llama, clip = tiny_base(tmp_path)
    iaa = IAA(llama, clip, 258)
    for name, config in (("mm", AdaptorConfig((0, 2))),
                         ("llava", AdaptorConfig((), own_embedding=False, own_head=False,
                                                 own_llm=True))):
        iaa.adaptors[name] = Adaptor(config, llama.config, clip.config.width)
        iaa.adaptors[name].copy_frozen(llama)
    with torch.no_grad():
        for weight in iaa.adaptors["llava"].parameters():
            weight += 0.05 * torch.randn_like(weight)
    return iaa.eval(), tmp_path / "llama"


def test_text_is_kept_and_llava_is_not(model):
    """The text workflow: exactly zero and every answer; a trained LLM: neither."""
    table = compare(*model, ["text", "llava"], [TEXT], 8)
    assert table["text"]["logit difference"] == 0.0
    assert table["text"]["equal answers, %"] == 100.0 and table["text"]["answers"] == 2
    assert table["text"]["perplexity"] == table["base"]["perplexity"]
    assert table["llava"]["logit difference"] > 0.01
    assert table["llava"]["perplexity"] != table["base"]["perplexity"]
    assert table["llava"]["equal answers, %"] < 100
    assert table["text"]["tokens"] == len(TEXT)


def test_one_changed_weight_is_noticed(model):
    """The frozen LLM itself, altered in memory, is not what stands on disk."""
    iaa, llm = model
    with torch.no_grad():
        iaa.llama.layers[1].ffn.down.weight[0, 0] += 0.5
    assert compare(iaa, llm, ["text"], [TEXT], 1)["text"]["logit difference"] > 0


def test_perplexity_by_hand(model):
    """A text of one window: the mean of minus log p over its tokens but the first."""
    iaa, llm = model
    ids = Tokenizer.load(llm).encode("a short text")
    with torch.no_grad():
        probs = iaa.logits(iaa(torch.tensor([ids]))).softmax(-1)[0]
    expected = math.exp(-sum(math.log(probs[i, ids[i + 1]]) for i in range(len(ids) - 1))
                        / (len(ids) - 1))
    table = compare(iaa, llm, ["text"], ["a short text"], 4)
    assert table["base"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert perplexity(iaa, Tokenizer.load(llm), "a short text") == table["base"]["perplexity"]
    assert "answers" not in table["text"]  # too short to be continued


def test_windows_start_as_texts_do(model):
    """Pieces of 512 tokens a text; with a start token, each behind it; no text is an error."""
    tokenizer = Tokenizer.load(model[1])
    assert [len(ids) for ids in windows(tokenizer, ["x" * 600, "y", "zz"])] == [512, 88, 2]
    tokenizer.bos_id = 256
    assert [ids[:2] for ids in windows(tokenizer, ["y", ""])] == [[256, ord("y")]]
    with pytest.raises(ValueError, match="no text"):
        compare(*model, ["text"], ["", "y"], 1)
