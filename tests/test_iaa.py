"""iaa.py: structures, exactness of the text workflow, what trains, generation, folders."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip import Clip, ClipConfig
from common.files import new_folder
from generate import choose, generate
from iaa import IAA, OFFICIAL_14_OF_32, Adaptor, AdaptorConfig, spread
from llama import Llama, LlamaConfig, set_recompute
from storage import add_adaptor, load_adaptor, load_base, load_iaa, load_tensors, save_adaptor
from training.zero import Replicated

REPOSITORY = Path(__file__).resolve().parent.parent
LLAMA = LlamaConfig(61, 24, 5, 6, 2, 10, 26, 64, rope_theta=100.0, tied=True)
CLIP = ClipConfig(20, 2, 4, 28, 4, 8)  # P = 4
IMAGE = 59  # the placeholder
BASE = {"llama": "aa" * 32, "clip": "bb" * 32}
CONFIGS = {
    "a": AdaptorConfig((0, 2, 3), "a"),
    "b": AdaptorConfig((0, 2, 3), "b"),
    "c": AdaptorConfig((0, 2, 3), "c"),
    "shared ends": AdaptorConfig((1, 4), "c", own_embedding=False, own_head=False),
    "projector only": AdaptorConfig((), "c", own_embedding=False, own_head=False),
    "own_llm": AdaptorConfig((), "c", own_embedding=False, own_head=False, own_llm=True),
}


def model(*names: str, changed: bool = True, tied: bool = True) -> IAA:
    """A tiny IAA with these adaptors of CONFIGS; `changed`: away from their frozen start."""
    torch.manual_seed(0)
    config = dataclasses.replace(LLAMA, tied=tied)
    iaa = IAA(Llama(config), Clip(CLIP), IMAGE)
    for key, parameter in iaa.named_parameters():  # layers outweigh the tied embedding's "again"
        scale = 0.1 if "embedding" in key else 0.4
        parameter.data.copy_(torch.randn_like(parameter) * scale + ("norm" in key))
    iaa.llama.embedding.weight.data[IMAGE] = 0  # never the likeliest answer
    for name in names:
        adaptor = Adaptor(CONFIGS[name], config, CLIP.width)
        adaptor.copy_frozen(iaa.llama)
        for parameter in adaptor.parameters() if changed else ():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        iaa.adaptors[name] = adaptor
    return iaa


def batch(rows: int = 2, text: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens (rows, 1 + P + text) with an image in each row, and the images."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 59, (rows, 5 + text), generator=generator)
    tokens[:, 1:5] = IMAGE
    return tokens, torch.randn(rows, 3, 8, 8, generator=generator)


def shifted(tokens: Tensor, scored: tuple[int, ...]) -> Tensor:
    """Targets: the next token at the `scored` columns, -100 elsewhere."""
    targets = torch.full_like(tokens, -100)
    targets[:, list(scored)] = tokens.roll(-1, 1)[:, list(scored)]
    return targets


def digest(module: torch.nn.Module) -> str:
    """SHA-256 over every tensor of the module."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def train(iaa: IAA, name: str, steps: int = 5) -> list[float]:
    """Some AdamW steps on one batch; the losses."""
    tokens, images = batch()
    targets, losses = shifted(tokens, (5, 8, 11)), []
    optimizer = torch.optim.AdamW(iaa.adaptors[name].parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = iaa.loss(tokens, targets, name, images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_logits(llama: Llama, tokens: Tensor) -> Tensor:
    """Logits of the bare Llama: no IAA in between."""
    x = llama.embedding(tokens)
    return llama.logits(llama(x, llama.rope(torch.arange(tokens.shape[1])[None], x.dtype)))


# Structures


@pytest.mark.parametrize("name", ["a", "b"])
def test_untouched_gates_leave_the_frozen_model(name):
    """Structures a and b start as the frozen model, bit for bit, with an image or without."""
    iaa = model(name, "projector only", changed=False)
    iaa.adaptors["projector only"].projector = iaa.adaptors[name].projector
    tokens, images = batch()
    for given in (None, images):
        frozen = iaa.logits(iaa(tokens, "projector only", given), "projector only")
        assert torch.equal(iaa.logits(iaa(tokens, name, given), name), frozen)
    assert torch.equal(iaa.logits(iaa(tokens, name), name), plain_logits(iaa.llama, tokens))


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_structure_equals_a_loop_by_hand(name):
    """With trained values, each structure equals Fig. 3 written out as one loop."""
    iaa = model(name)
    adaptor, tokens = iaa.adaptors[name], batch()[0]
    x = adaptor.embedding(tokens)
    rope = iaa.llama.rope(torch.arange(tokens.shape[1])[None], x.dtype)
    side = x  # a: insertion layer 0 follows frozen layer 0, so the side stream starts at its input
    for i, layer in enumerate(iaa.llama.layers):
        x = layer(x, rope)
        if i in (0, 2, 3):
            n = (0, 2, 3).index(i)
            inserted, gate = adaptor.layers[n], adaptor.gates[n].weight if adaptor.gates else None
            if name == "a":
                side = inserted(side, rope)
                x = x + side @ gate.T
            elif name == "b":
                x = x + inserted(x, rope) @ gate.T
            else:
                x = inserted(x, rope)
    wanted = adaptor.norm(x) @ adaptor.head.weight.T
    torch.testing.assert_close(iaa.logits(iaa(tokens, name), name), wanted, atol=1e-5, rtol=1e-5)


def test_insertion_layers_start_as_copies_in_their_own_storage():
    """An adaptor's tensors start equal to their frozen counterparts; none shares its memory."""
    iaa = model("c", changed=False)
    adaptor = iaa.adaptors["c"]
    frozen_layers = [iaa.llama.layers[i] for i in (0, 2, 3)]
    pairs = list(zip(adaptor.layers, frozen_layers, strict=True))
    pairs += [(adaptor.embedding, iaa.llama.embedding), (adaptor.norm, iaa.llama.norm)]
    for ours, frozen in pairs:
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, frozen.state_dict()[name])
    assert torch.equal(adaptor.head.weight, iaa.llama.embedding.weight)  # the frozen model is tied
    memory = [parameter.data_ptr() for parameter in iaa.parameters()]
    assert len(set(memory)) == len(memory)


def test_spread_literals():
    """From the first layer to the last, evenly; 14 of 32 is the official list; too many raise."""
    assert spread(8, 30) == (0, 4, 8, 12, 17, 21, 25, 29)
    assert spread(14, 32) == OFFICIAL_14_OF_32 == tuple(i for i in range(32) if i % 5 < 2)
    assert spread(0, 32) == () and spread(1, 32) == (0,) and spread(5, 5) == (0, 1, 2, 3, 4)
    for number, layers in ((8, 32), (22, 32), (31, 32)):
        places = spread(number, layers)
        assert len(set(places)) == number and places[-1] == layers - 1
    with pytest.raises(ValueError, match="insertion = 33: 0 to 32"):
        spread(33, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "d"}, "'d': a, b or c"),
        ({"insertion": (3, 1)}, r"\[3, 1\]: layer indices, ascending"),
        ({"insertion": (1, 1)}, "each once"),
        ({"insertion": (-1,)}, "ascending"),
        ({"own_llm": True}, "own_embedding = false"),
    ],
)
def test_impossible_adaptor_raises(settings, message):
    """A config that cannot be built says what is accepted."""
    with pytest.raises(ValueError, match=message):
        AdaptorConfig(**settings)


def test_insertion_beyond_the_last_layer_raises():
    """The index and the last layer stand in the message."""
    with pytest.raises(ValueError, match="after layer 5, but the LLM ends at 4"):
        Adaptor(AdaptorConfig((5,)), LLAMA, 20)


# Workflows


@pytest.mark.parametrize("tied", [True, False])
def test_text_workflow_is_plain_llama_bit_for_bit(tied):
    """Text logits equal the bare Llama's with 0, 1, 2 adaptors loaded, and after training one."""
    tokens = batch()[0]
    bare = model(tied=tied)
    wanted = plain_logits(bare.llama, tokens)
    assert torch.equal(bare.logits(bare(tokens)), wanted)
    for names in (("c",), ("c", "a")):
        iaa = model(*names, tied=tied)
        assert torch.equal(iaa.logits(iaa(tokens)), wanted)
        train(iaa, "c")
        assert torch.equal(iaa.logits(iaa(tokens)), wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_stays_frozen_while_the_adaptor_learns(name):
    """After 5 AdamW steps the base is the same, the loss fell, only the adaptor had gradients."""
    iaa = model(name, changed=False)
    before = digest(iaa.llama), digest(iaa.clip), digest(iaa.adaptors[name])
    losses = train(iaa, name)
    after = digest(iaa.llama), digest(iaa.clip), digest(iaa.adaptors[name])
    assert before[:2] == after[:2] and before[2] != after[2]
    assert losses[-1] < losses[0]
    parameters = dict(iaa.named_parameters())
    with_gradient = {key for key, parameter in parameters.items() if parameter.grad is not None}
    assert with_gradient == {key for key in parameters if key.startswith("adaptors.")}


def test_one_adaptor_does_not_touch_another():
    """Training one of two adaptors leaves the other's tensors and logits as they were."""
    iaa = model("c", "b")
    tokens, images = batch()
    before, wanted = digest(iaa.adaptors["b"]), iaa.logits(iaa(tokens, "b", images), "b")
    train(iaa, "c")
    assert digest(iaa.adaptors["b"]) == before
    assert torch.equal(iaa.logits(iaa(tokens, "b", images), "b"), wanted)


def test_own_llm_is_a_copy_that_leaves_text_exact():
    """The LLaVA baseline starts as the frozen LLM and trains a copy; text keeps its bits."""
    iaa = model("own_llm", changed=False)
    tokens = batch()[0]
    wanted = plain_logits(iaa.llama, tokens)
    assert torch.equal(iaa.logits(iaa(tokens, "own_llm"), "own_llm"), wanted)
    train(iaa, "own_llm")
    assert not torch.equal(iaa.logits(iaa(tokens, "own_llm"), "own_llm"), wanted)
    assert torch.equal(iaa.logits(iaa(tokens)), wanted)


def test_unknown_workflow_lists_the_known():
    """The message names what was asked for and what there is."""
    with pytest.raises(ValueError, match="no adaptor named 'mn'; there are: text, c, a"):
        model("c", "a")(batch()[0], "mn")


def test_text_takes_no_image():
    """An image in the text workflow is refused."""
    tokens, images = batch()
    with pytest.raises(ValueError, match="takes no image"):
        model()(tokens, "text", images)


def test_placeholders_that_do_not_fit_raise():
    """Both numbers stand in the message, too few or too many."""
    iaa, (tokens, images) = model("c"), batch()
    with pytest.raises(ValueError, match=r"8 image placeholders for 1 images of 4 tokens \(4\)"):
        iaa(tokens, "c", images[:1])
    tokens[0, 1] = 3
    with pytest.raises(ValueError, match=r"7 image placeholders for 2 images of 4 tokens \(8\)"):
        iaa(tokens, "c", images)


def test_features_stand_where_the_placeholders_stood():
    """Image n's P projected features fill its slots in order; the rest is the own embedding."""
    iaa, (tokens, images) = model("c"), batch()
    adaptor = iaa.adaptors["c"]
    x = iaa.place_images(adaptor.embedding(tokens), tokens, images, adaptor)
    torch.testing.assert_close(x[:, 1:5], adaptor.projector(iaa.clip(images)))
    others = [0, *range(5, 14)]
    assert torch.equal(x[:, others], adaptor.embedding(tokens)[:, others])


# Loss


@pytest.mark.parametrize("name", ["c", "projector only"])
def test_loss_equals_full_logits_cross_entropy(name):
    """The sum over scored positions is what all logits and ignore_index give."""
    iaa, (tokens, images) = model(name), batch()
    targets = shifted(tokens, (5, 6, 12))
    logits = iaa.logits(iaa(tokens, name, images), name).flatten(0, 1).float()
    wanted = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(iaa.loss(tokens, targets, name, images), wanted)


def test_loss_of_segments_is_the_sum_of_the_questions_alone():
    """Two questions behind one picture, blind to each other, cost what they cost one by one."""
    iaa, (tokens, images) = model("c"), batch(1)
    segments = torch.tensor([[0] * 6 + [1] * 3 + [2] * 5])
    positions = torch.tensor([[*range(9), *range(6, 11)]])
    targets = shifted(tokens, (7, 11, 12))
    packed = iaa.loss(tokens, targets, "c", images, positions, segments)
    columns = [[*range(9)], [*range(6), *range(9, 14)]]
    alone = [iaa.loss(tokens[:, c], targets[:, c], "c", images) for c in columns]
    torch.testing.assert_close(packed, sum(alone))


def test_a_batch_without_targets_costs_nothing():
    """No scored position: loss 0 with gradients of 0, not NaN."""
    iaa, (tokens, images) = model("c"), batch()
    loss = iaa.loss(tokens, torch.full_like(tokens, -100), "c", images)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in iaa.adaptors.parameters())


@pytest.mark.parametrize("name", ["c", "projector only", "own_llm"])
def test_loss_in_pieces_keeps_no_logits(name, monkeypatch):
    """6 scored positions by 2, by 4, or at once: one loss, one gradient; kept: all logits, or none.
    """
    tokens, images = batch()
    targets, found = shifted(tokens, (5, 8, 12)), []
    for rows in (6, 4, 2):
        monkeypatch.setattr("iaa.LOSS_ROWS", rows)
        iaa, kept = model(name).double(), []
        vocab = iaa.llama.config.vocab_size

        def keep(tensor, kept=kept):
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = iaa.loss(tokens, targets, name, images)
        logits = {shape for shape in kept if shape in [(n, vocab) for n in (2, 4, 6)]}
        assert logits == ({(6, vocab)} if rows == 6 else set())
        loss.backward()
        found.append([loss, *(p.grad for p in iaa.adaptors.parameters())])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert (a - b).abs().max() <= 1e-6 * a.abs().max()


@pytest.mark.parametrize("name", ["a", "c", "own_llm"])
def test_recompute_gives_equal_gradients(name):
    """Checkpointing every layer, frozen and inserted, changes no bit of a gradient."""
    tokens, images = batch()
    gradients = []
    for recompute in (False, True):
        iaa = model(name)
        set_recompute(iaa, recompute)
        iaa.loss(tokens, shifted(tokens, (5, 8)), name, images).backward()
        gradients.append([p.grad for p in iaa.adaptors.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["b", "c", "own_llm"])
def test_a_training_pass_waits_for_no_device(name):
    """On the meta device there is nothing to read: a pass that looked at a value would fail.

    But for the gradient of `masked_scatter`, whose length meta takes as given and a GPU counts.
    """
    iaa, (tokens, images) = model(name).to("meta"), batch()
    segments = torch.zeros_like(tokens, device="meta")
    targets = shifted(tokens, (5, 8))
    loss = iaa.loss(tokens.to("meta"), targets, name, images.to("meta"), segments=segments)
    loss.backward()
    norm = Replicated(None, dict(iaa.adaptors[name].named_parameters()), 1).clip(1.0)
    assert loss.is_meta and norm.is_meta


# Generation


def uncached_greedy(
    iaa: IAA, prompt: list[int], images: Tensor | None, name: str, tokens: int
) -> list[int]:
    """The whole sequence through the model for every new token."""
    ids = list(prompt)
    for _ in range(tokens):
        x = iaa(torch.tensor([ids]), name, images)
        ids.append(int(iaa.logits(x[:, -1], name).argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("name", [*CONFIGS, "text"])
def test_cached_greedy_equals_uncached(name):
    """Every structure, with an image (text: without), 12 tokens."""
    iaa = model(*([] if name == "text" else [name]))
    tokens, images = batch(1)
    images = None if name == "text" else images
    wanted = uncached_greedy(iaa, tokens[0].tolist(), images, name, 12)
    assert generate(iaa, tokens.tolist(), images, name, 12) == [wanted]
    assert len(set(wanted)) > 1  # more than one token repeated


def test_batch_of_different_lengths_equals_one_by_one():
    """Three prompts with images, padded on the left, answer as each alone; greedy and sampled."""
    iaa = model("c")
    tokens, images = batch(3)
    prompts = [tokens[0].tolist(), tokens[1, :8].tolist(), tokens[2, :11].tolist()]
    alone = [generate(iaa, [p], images[i : i + 1], "c", 10)[0] for i, p in enumerate(prompts)]
    assert generate(iaa, prompts, images, "c", 10) == alone
    sampled = generate(iaa, prompts, images, "c", 10, temperature=1.0, seed=7)
    for i, prompt in enumerate(prompts):
        alone = generate(iaa, [prompt], images[i : i + 1], "c", 10, temperature=1.0, seed=7 + i)
        assert alone == sampled[i : i + 1]


def test_padding_is_not_computed():
    """The layers see each prompt's own tokens, once, prompts of one length together."""
    iaa, seen = model("c"), []
    iaa.llama.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    generate(iaa, [[1] * 9, [2] * 3, [3] * 9], None, "c", 2)
    assert seen == [(1, 3), (2, 9), (3, 1)]


@torch.no_grad()
@pytest.mark.parametrize("name", [*CONFIGS, "text"])
def test_last_only_is_the_last_token(name):
    """Wherever the last insertion layer sits, the last token comes out the same, alone."""
    iaa = model(*([] if name == "text" else [name]))
    tokens, images = batch()
    images = None if name == "text" else images
    wanted = iaa(tokens, name, images)[:, -1:]
    got = iaa(tokens, name, images, last_only=True)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["a", "c", "text"])
def test_a_prompt_in_pieces_is_causal(name):
    """Tokens behind a filled cache see all of it and each other, without a mask being named."""
    iaa, (tokens, _) = model(*([] if name == "text" else [name])), batch()
    tokens = tokens % IMAGE  # no picture
    wanted, cache = iaa(tokens, name), iaa.new_cache(2, 14, name)
    parts = [iaa(piece, name, cache=cache) for piece in tokens.split((6, 7, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_features_may_stand_for_their_images():
    """What the tower made of the pictures gives the same bits as the pictures; it does not run."""
    iaa, (tokens, images) = model("c"), batch()
    wanted, features = iaa(tokens, "c", images), iaa.clip(images)
    iaa.clip.forward = None
    assert torch.equal(iaa(tokens, "c", features), wanted)
    assert generate(iaa, tokens.tolist(), features, "c", 4)


def test_generate_checks_its_prompts():
    """Nothing to answer, an empty prompt, too many images: a line that says so."""
    iaa, (tokens, images) = model("c"), batch()
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="no prompt given, or one without tokens"):
            generate(iaa, prompts)
    with pytest.raises(ValueError, match="placeholders for 1 images, given 2"):
        generate(iaa, tokens[:1].tolist(), images, "c", 4)


def test_a_mixed_batch_of_rows_with_and_without_image():
    """A row without placeholders needs no image of its own."""
    iaa = model("c")
    tokens, images = batch(2)
    prompts = [[5, 6, 7], tokens[1].tolist()]
    alone = generate(iaa, prompts[:1], None, "c", 6)
    alone += generate(iaa, prompts[1:], images[1:], "c", 6)
    assert generate(iaa, prompts, images[1:], "c", 6) == alone


def test_seed_decides():
    """The same seed gives the same tokens, another one others, and temperature 0 ignores it."""
    iaa, prompt = model("c"), [[1, 2, 3]]
    first, again, other = (generate(iaa, prompt, None, "c", 20, temperature=1.5, seed=seed)[0]
                           for seed in (3, 3, 4))
    assert first == again != other
    greedy = [generate(iaa, prompt, None, "c", 9, seed=seed) for seed in (3, 4)]
    assert greedy[0] == greedy[1]


def test_stop_tokens_and_callback():
    """A row ends before its stop token, others go on; the callback sees what is returned."""
    iaa = model("c")
    prompts, seen = [[1, 2, 3], [4, 5]], [[], []]
    free = generate(iaa, prompts, None, "c", 12)
    stop = free[0][4]
    wanted = [row[: row.index(stop)] if stop in row else row for row in free]
    got = generate(iaa, prompts, None, "c", 12, (stop,),
                       on_token=lambda row, token: seen[row].append(token))
    assert got == wanted == seen
    assert len(wanted[0]) <= 4 and free[0] != free[1]
    ended = generate(iaa, prompts, None, "c", 12, on_token=lambda row, token: row == 1)
    assert ended == [free[0], free[1][:1]]  # the callback may end a row


def test_context_overflow_raises():
    """A prompt and an answer that do not fit name the three numbers."""
    message = "prompt of 60 tokens .* 5 new ones exceed the context of 64"
    with pytest.raises(ValueError, match=message):
        generate(model(), [[1] * 60], max_tokens=5)
    assert len(generate(model(), [[1] * 60], max_tokens=4)[0]) == 4


def test_choose_top_p_and_temperature():
    """Greedy takes the peak; top_p keeps the least set of that mass; low temperature sharpens."""
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]])

    def counts(temperature, top_p):
        generators = [torch.Generator().manual_seed(0) for _ in range(4000)]
        generators[1:] = [generators[0]] * 3999  # one stream of draws
        drawn = choose(probs.log().expand(4000, 4), temperature, top_p, generators)
        return drawn.bincount(minlength=4) / 4000

    assert choose(probs.log(), 0, 1.0, []).tolist() == [1]
    torch.testing.assert_close(counts(1.0, 1.0), probs[0], atol=0.03, rtol=0)
    kept = torch.tensor([0, 2 / 3, 0, 1 / 3])
    torch.testing.assert_close(counts(1.0, 0.7), kept, atol=0.03, rtol=0)
    assert counts(1.0, 0.4)[1] == 1 and counts(1.0, 1e-9)[1] == 1
    assert counts(1e-38, 1.0)[1] == 1 and counts(5e-324, 0.5)[1] == 1  # greedy, not 0 / 0
    sharp = probs[0] ** 2 / (probs[0] ** 2).sum()
    torch.testing.assert_close(counts(0.5, 1.0), sharp, atol=0.03, rtol=0)


@torch.no_grad()
def test_a_cache_of_another_workflow_raises():
    """A cache for `text` has too few slots for an adaptor, and the other way round too many."""
    iaa = model("c")
    with pytest.raises(ValueError, match="5 slots of 9 tokens"):
        iaa(torch.ones(1, 3, dtype=torch.long), "c", cache=iaa.new_cache(1, 9))
    with pytest.raises(ValueError, match="cache has 8 slots, 5 layers ran"):
        iaa(torch.ones(1, 3, dtype=torch.long), cache=iaa.new_cache(1, 9, "c"))


# Saving and loading


def saved(iaa: IAA, name: str, folder: Path) -> Path:
    """The adaptor in a folder of its own."""
    with new_folder(folder) as temporary:
        about = {"prompt": {"template": "plain", "system": "Hi."}}
        save_adaptor(iaa.adaptors[name], temporary, BASE, about, torch.float32)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_round_trip(name, tmp_path):
    """Every configuration comes back with equal config, tensors and extra settings."""
    iaa = model(name)
    folder = saved(iaa, name, tmp_path / "mm")
    adaptor, meta = load_adaptor(folder, LLAMA, CLIP.width, BASE)
    assert adaptor.config == CONFIGS[name]
    assert meta["prompt"] == {"template": "plain", "system": "Hi."}
    assert digest(adaptor) == digest(iaa.adaptors[name])
    assert sorted(p.name for p in folder.iterdir()) == ["adaptor.safetensors", "config.json"]


def test_another_base_raises_naming_both(tmp_path):
    """The hash it was trained on and the hash at hand stand in the message."""
    folder = saved(model("c"), "c", tmp_path / "mm")
    message = r"mm was trained on llama a{16}\.\.\., this llama is c{16}"
    with pytest.raises(ValueError, match=message):
        load_adaptor(folder, LLAMA, CLIP.width, BASE | {"llama": "cc" * 32})


def drop(tensors):
    """One tensor less."""
    del tensors["layers.1.ffn.down.weight"]


def transpose(tensors):
    """One tensor of another shape."""
    tensors["projector.up.weight"] = tensors["projector.up.weight"].T.contiguous()


def add(tensors):
    """One tensor more."""
    tensors["stranger"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop, "1 tensors missing, such as layers.1.ffn.down.weight"),
        (transpose, r"projector.up.weight is \[20, 24\], should be \[24, 20\]"),
        (add, "tensor 'stranger' is not known"),
    ],
)
def test_wrong_tensors_raise_naming_them(harm, message, tmp_path):
    """A missing, mis-shaped or unknown tensor is an error that names it."""
    folder = saved(model("c"), "c", tmp_path / "mm")
    tensors = load_file(folder / "adaptor.safetensors")
    harm(tensors)
    save_file(tensors, folder / "adaptor.safetensors")
    with pytest.raises(ValueError, match=message):
        load_adaptor(folder, LLAMA, CLIP.width, BASE)


@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.999])
def test_truncated_file_raises(kept, tmp_path):
    """adaptor.safetensors cut short anywhere is an error that names the file."""
    folder = saved(model("c"), "c", tmp_path / "mm")
    data = (folder / "adaptor.safetensors").read_bytes()
    length = kept if isinstance(kept, int) else int(kept * len(data))
    (folder / "adaptor.safetensors").write_bytes(data[:length])
    with pytest.raises(ValueError, match="adaptor.safetensors: broken or cut short"):
        load_adaptor(folder, LLAMA, CLIP.width, BASE)


def test_missing_or_broken_files_raise(tmp_path):
    """No folder, no tensors, and a config.json that is not JSON: each names the file."""
    with pytest.raises(FileNotFoundError, match="nowhere/config.json: no such file"):
        load_adaptor(tmp_path / "nowhere", LLAMA, CLIP.width, BASE)
    folder = saved(model("c"), "c", tmp_path / "mm")
    (folder / "adaptor.safetensors").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="adaptor.safetensors"):
        load_adaptor(folder, LLAMA, CLIP.width, BASE)
    (folder / "config.json").write_text('{"adaptor": {')
    with pytest.raises(ValueError, match="config.json: not JSON"):
        load_adaptor(folder, LLAMA, CLIP.width, BASE)


def test_new_folder_leaves_nothing_on_failure(tmp_path):
    """A failure in the block leaves nothing, success a whole folder, which is never replaced."""
    target = tmp_path / "run" / "mm"
    with pytest.raises(RuntimeError), new_folder(target) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as temporary:
        (temporary / "one").write_text("one")
    with pytest.raises(FileExistsError, match="already"), new_folder(target):
        raise AssertionError("not reached")
    assert [p.name for p in target.rglob("*")] == ["one"]
    assert list(target.parent.iterdir()) == [target]


def test_a_file_may_hold_a_part(tmp_path):
    """The rest keeps its values and all go on training; strangers and shapes are still errors."""
    adaptor, path = model("c").adaptors["c"], tmp_path / "part.safetensors"
    before = {name: tensor.clone() for name, tensor in adaptor.state_dict().items()}
    save_file({"norm.weight": torch.full((24,), 2.0)}, path)
    with pytest.raises(ValueError, match="comes twice"):
        load_tensors(adaptor, [path, path], None, "cpu", partly=True)
    load_tensors(adaptor, [path], torch.float32, "cpu", partly=True)
    after = adaptor.state_dict()
    assert (after.pop("norm.weight") == 2).all()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert all(weight.requires_grad for weight in adaptor.parameters())
    with pytest.raises(ValueError, match="tensors missing, such as"):
        load_tensors(adaptor, [path], None, "cpu")
    for wrong, said in (({"stranger": torch.zeros(1)}, "is not known"),
                        ({"norm.weight": torch.zeros(3)}, r"is \[3\], should be \[24\]")):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=said):
            load_tensors(adaptor, [path], None, "cpu", partly=True)


@pytest.mark.parametrize("name", ["", "two words", "a.b", "1st", "text", "items", "c"])
def test_names_that_no_adaptor_can_have(name, tmp_path):
    with pytest.raises(ValueError, match="an adaptor cannot be named"):
        add_adaptor(model("c"), name, tmp_path / "nowhere", BASE)


def test_load_iaa_reads_a_whole_folder(tmp_path, write_base):
    """iaa.json names base and adaptors; the model that comes back answers as the saved one."""
    iaa = model("c", "b")
    write_base(tmp_path / "llm", iaa.llama, BASE["llama"])
    write_base(tmp_path / "vision", iaa.clip, BASE["clip"])
    for name in ("c", "b"):
        saved(iaa, name, tmp_path / name)
    index = {"llm": "llm", "vision": "vision", "image_token": IMAGE,
             "adaptors": {"mm": "c", "grounding": "b"}}
    (tmp_path / "iaa.json").write_text(json.dumps(index))
    loaded, about = load_iaa(tmp_path)
    tokens, images = batch()
    for theirs, ours in (("mm", "c"), ("grounding", "b")):
        wanted = generate(iaa, tokens.tolist(), images, ours, 8)
        assert generate(loaded, tokens.tolist(), images, theirs, 8) == wanted
    assert about["llm"] == tmp_path / "llm"
    assert about["prompts"]["mm"] == {"template": "plain", "system": "Hi."}
    assert not loaded.training and not [p for p in loaded.parameters() if p.requires_grad]
    for workflows in (["grounding"], ["text"], ["text", "mm"]):
        part, about = load_iaa(tmp_path, workflows=workflows)
        assert {*part.adaptors} == about["prompts"].keys() == {*workflows} - {"text"}
    with pytest.raises(ValueError, match="no adaptor named 'x'; there are: text, mm, grounding"):
        load_iaa(tmp_path, workflows=["mm", "x"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adaptor_is_loaded_in_its_llms_dtype(dtype, tmp_path, write_base):
    """However it was saved: packed matrices multiply what is of their own dtype alone."""
    iaa = model("c")
    saved(iaa, "c", tmp_path / "mm")  # fp32
    write_base(tmp_path / "llm", iaa.llama.to(dtype), BASE["llama"])
    write_base(tmp_path / "vision", iaa.clip, BASE["clip"])
    index = {"llm": "llm", "vision": "vision", "image_token": IMAGE, "adaptors": {"mm": "mm"}}
    (tmp_path / "iaa.json").write_text(json.dumps(index))
    loaded, _ = load_iaa(tmp_path)
    assert {w.dtype for w in loaded.adaptors["mm"].parameters()} == {loaded.llama.dtype} == {dtype}
    next((tmp_path / "llm").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="llm: no model-"):
        load_iaa(tmp_path)


def test_load_iaa_refuses_a_folder_of_another_kind(tmp_path):
    """A base folder that convert_weights.py did not write is named."""
    index = {"llm": ".", "vision": ".", "image_token": 1, "adaptors": {}}
    (tmp_path / "iaa.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'kind' is missing"):
        load_iaa(tmp_path)


@torch.no_grad()
def test_real_weights_keep_their_bits_and_their_sense():
    """SmolLM2-135M, where converted: plain Llama's bits beside an adaptor, and it knows Paris."""
    folder = REPOSITORY / "weights" / "smollm2"
    if not (folder / "config.json").is_file():
        pytest.skip("weights/smollm2 is not there: run the demo first")
    llama, _ = load_base(folder, torch.float32)
    iaa = IAA(llama, Clip(CLIP), llama.config.vocab_size - 1)
    prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    tokens = torch.tensor([prompt])
    wanted = plain_logits(llama, tokens)
    iaa.adaptors["mm"] = Adaptor(AdaptorConfig(spread(8, 30)), llama.config, CLIP.width)
    iaa.adaptors["mm"].copy_frozen(llama)
    assert torch.equal(iaa.logits(iaa(tokens)), wanted)
    assert 7042 in generate(iaa, [prompt], max_tokens=4)[0]  # " Paris"
