"""Rows of several workflows in one batch: same tokens, frozen layers once, one cache."""

import pytest
import torch
from test_iaa import IMAGE, batch, model

from generate import generate
from mixed import rows_by_name


def test_rows_by_name():
    assert rows_by_name(["text", "mm", "mm"]) == [("text", slice(0, 1)), ("mm", slice(1, 3))]
    with pytest.raises(ValueError, match="side by side"):
        rows_by_name(["mm", "text", "mm"])


NAMES = ["c", "c", "text", "b", "a", "shared ends"]  # other insertion layers, other structures


def words():
    """Tokens (6, 14) without a picture."""
    return batch(rows=6)[0] % IMAGE


def test_logits_equal_those_of_each_workflow_alone():
    iaa, tokens = model("a", "b", "c", "shared ends"), words()
    mixed = iaa.logits(iaa(tokens, NAMES), NAMES)
    for row, name in enumerate(NAMES):
        alone = iaa.logits(iaa(tokens[row : row + 1], name), name)[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)


def test_generated_tokens_equal_those_of_each_workflow_alone():
    iaa, (tokens, images) = model("a", "b", "c", "shared ends"), batch(rows=6)
    tokens[2], images = words()[2], images[[0, 1, 3, 4, 5]]  # text has no picture
    prompts = [ids[: len(ids) - row % 3] for row, ids in enumerate(tokens.tolist())]
    alone = []
    for row, (prompt, name) in enumerate(zip(prompts, NAMES, strict=True)):
        own = None if name == "text" else images[row - (row > 2)][None]
        alone += generate(iaa, [prompt], own, name, 8)
    assert generate(iaa, prompts, images, NAMES, 8) == alone


def test_frozen_layers_run_once_and_insertion_layers_on_their_own_rows():
    iaa, seen = model("b", "c"), []
    for layer in (iaa.llama.layers[0], iaa.adaptors["c"].layers[0], iaa.adaptors["b"].layers[0]):
        layer.register_forward_pre_hook(lambda _, args, layer=layer: seen.append(len(args[0])))
    iaa(words(), ["c", "c", "text", "b", "b", "b"])
    assert seen == [6, 2, 3]


def test_last_only_is_the_last_token():
    """Whether an insertion layer ends the pass, as after five layers cut to four, or a frozen one.
    """
    iaa, tokens, names = model("b", "c"), words(), ["c", "c", "text", "b", "b", "b"]
    for layers in (5, 4):
        iaa.llama.layers = iaa.llama.layers[:layers]
        got, wanted = iaa(tokens, names, last_only=True), iaa(tokens, names)[:, -1:]
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    iaa, (tokens, images) = model("c", "own_llm"), batch(rows=6)
    with pytest.raises(ValueError, match="takes no image, nor does a batch"):
        iaa(tokens, ["c", "c", "c", "text", "text", "text"], images)
    with pytest.raises(ValueError, match="for 2 rows, given 6"):
        iaa(tokens, ["c", "text"])
    with pytest.raises(ValueError, match="LLM of its own"):
        iaa(tokens, ["c"] * 3 + ["own_llm"] * 3)
