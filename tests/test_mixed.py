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


def mixed_batch():
    tokens, images = batch(rows=6)
    tokens[2] = tokens[2].where(tokens[2] != IMAGE, 7)  # text has no picture
    return tokens, images[[0, 1, 3, 4, 5]]


def test_logits_equal_those_of_each_workflow_alone():
    iaa, (tokens, images) = model("a", "b", "c", "shared ends"), mixed_batch()
    mixed = iaa.logits(iaa(tokens, NAMES, images), NAMES)
    for row, name in enumerate(NAMES):
        own = None if name == "text" else images[row - (row > 2)][None]
        alone = iaa.logits(iaa(tokens[row : row + 1], name, own), name)[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)


def test_generated_tokens_equal_those_of_each_workflow_alone():
    iaa, (tokens, images) = model("a", "b", "c", "shared ends"), mixed_batch()
    prompts = [ids[: len(ids) - row % 3] for row, ids in enumerate(tokens.tolist())]
    alone = []
    for row, (prompt, name) in enumerate(zip(prompts, NAMES, strict=True)):
        own = None if name == "text" else images[row - (row > 2)][None]
        alone += generate(iaa, [prompt], own, name, 8)
    assert generate(iaa, prompts, images, NAMES, 8) == alone


def test_frozen_layers_run_once_and_insertion_layers_on_their_own_rows():
    iaa, (tokens, images) = model("b", "c"), mixed_batch()
    names, seen = ["c", "c", "text", "b", "b", "b"], []
    for layer in (iaa.llama.layers[0], iaa.adaptors["c"].layers[0], iaa.adaptors["b"].layers[0]):
        layer.register_forward_pre_hook(lambda _, args, layer=layer: seen.append(len(args[0])))
    iaa(tokens, names, images)
    assert seen == [6, 2, 3]


def test_last_only_spares_the_last_insertion_layers():
    """Those after the last place compute their rows' last token alone; it comes out the same."""
    iaa, (tokens, images) = model("b", "c"), mixed_batch()
    names, seen = ["c", "c", "text", "b", "b", "b"], []
    for name in ("b", "c"):
        feed = iaa.adaptors[name].layers[-1].ffn
        feed.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    wanted = iaa(tokens, names, images)[:, -1:]
    got = iaa(tokens, names, images, last_only=True)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)
    assert seen == [tokens.shape[1], tokens.shape[1], tokens.shape[1], tokens.shape[1]]
    iaa.llama.layers = iaa.llama.layers[:4]  # now the last place, 3, ends the pass
    wanted = iaa(tokens, names, images)[:, -1:]
    seen.clear()
    got = iaa(tokens, names, images, last_only=True)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)
    assert seen == [1, 1]


def test_what_does_not_fit_is_refused():
    iaa, (tokens, images) = model("c", "own_llm"), mixed_batch()
    with pytest.raises(ValueError, match="takes no image"):
        iaa(tokens, ["c", "c", "c", "text", "text", "text"], images)
    with pytest.raises(ValueError, match="for 2 rows, given 6"):
        iaa(tokens, ["c", "text"], images)
    with pytest.raises(ValueError, match="LLM of its own"):
        iaa(tokens, ["c"] * 3 + ["own_llm"] * 3, images)
