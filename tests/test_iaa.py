"""iaa.py: structures, exactness of the text workflow, what trains, the loss, folders."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP, LLAMA, LLAMA_TIED, edit, flip_bits, tiny_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip import Clip
from common.files import new_folder, sha256_of
from iaa import (
    IAA,
    Adaptor,
    AdaptorConfig,
    check_adaptor_name,
    evenly_spaced_layers,
    load_adaptor,
    load_iaa,
    load_tensors,
    official_layers,
)
from llama import Llama, LlamaConfig, set_recompute

IMAGE, P = 511, CLIP.patches  # the placeholder, and how many an image takes
BASE = {"llama": "aa" * 32, "clip": "bb" * 32}
PROMPT = {"template": "plain", "system": "Hi."}
NOTHING_OWN = {"own_embedding": False, "own_head": False}
CONFIGS = {
    **{structure: AdaptorConfig((0, 2, 3), structure) for structure in "abc"},
    "frozen_ends": AdaptorConfig((1, 3), "c", **NOTHING_OWN),
    "projector": AdaptorConfig((), "c", **NOTHING_OWN),
    "own_llm": AdaptorConfig((), "c", **NOTHING_OWN, own_llm=True),
}
each_adaptor = pytest.mark.parametrize("name", CONFIGS)


def model(*names: str, changed: bool = True, sizes: LlamaConfig = LLAMA_TIED) -> IAA:
    """A tiny IAA with these adaptors of CONFIGS; `changed`: away from their frozen start."""
    torch.manual_seed(0)
    iaa = IAA(Llama(sizes), Clip(CLIP), IMAGE)
    for key, parameter in iaa.named_parameters():
        scale = 0.1 if "embedding" in key else 0.3
        parameter.data.copy_(torch.randn_like(parameter) * scale + ("norm" in key))
    for name in names:
        adaptor = iaa.adaptors[name] = Adaptor(CONFIGS[name], sizes, CLIP.width)
        adaptor.init_from_frozen(iaa.llama)
        for parameter in adaptor.parameters() if changed else ():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return iaa


def batch(rows: int = 2, text: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens (rows, 1 + P + text) with an image in each row, and the images."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, IMAGE, (rows, 1 + P + text), generator=generator)
    tokens[:, 1 : 1 + P] = IMAGE
    return tokens, torch.randn(rows, 3, CLIP.image_px, CLIP.image_px, generator=generator)


def logits(iaa: IAA, name: str, tokens: Tensor, images: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) of a workflow."""
    return iaa.logits(iaa(tokens, name, images), name)


def plain_logits(llama: Llama, tokens: Tensor) -> Tensor:
    """Logits of the bare Llama: no IAA in between."""
    x = llama.embedding(tokens)
    return llama.logits(llama(x, llama.rope(torch.arange(tokens.shape[1])[None], x.dtype)))


def scored(tokens: Tensor, *columns: int) -> Tensor:
    """Targets: the next token at these columns of the text, -100 elsewhere."""
    targets, columns = torch.full_like(tokens, -100), [1 + P + column for column in columns]
    targets[:, columns] = tokens.roll(-1, 1)[:, columns]
    return targets


def digest(module: torch.nn.Module) -> str:
    """SHA-256 over every tensor of the module."""
    return sha256_of({}, module.state_dict().items())


def train(iaa: IAA, name: str) -> list[float]:
    """Five AdamW steps on one batch; the losses."""
    tokens, images = batch()
    optimizer, losses = torch.optim.AdamW(iaa.adaptors[name].parameters(), lr=1e-2), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = iaa.loss(tokens, scored(tokens, 1, 4, 6), name, images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["a", "b"])
def test_untouched_gates_leave_the_frozen_model(name):
    """Structures a and b start as the frozen model, bit for bit, with an image or without."""
    iaa = model(name, "projector", changed=False)
    iaa.adaptors["projector"].projector = iaa.adaptors[name].projector
    tokens, images = batch()
    frozen = logits(iaa, "projector", tokens, images)
    assert torch.equal(logits(iaa, name, tokens, images), frozen)
    words = tokens % IMAGE  # no placeholder
    assert torch.equal(logits(iaa, name, words), plain_logits(iaa.llama, words))


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_structure_equals_a_loop_by_hand(name):
    """With trained values, each structure equals Fig. 3 written out as one loop."""
    iaa, tokens = model(name), batch()[0] % IMAGE
    adaptor = iaa.adaptors[name]
    x = side = adaptor.embedding(tokens)  # a: the side stream starts at frozen layer 0's input
    rope = iaa.llama.rope(torch.arange(tokens.shape[1])[None], x.dtype)
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
    torch.testing.assert_close(logits(iaa, name, tokens), wanted, atol=1e-5, rtol=1e-5)


def test_insertion_layers_start_as_copies_in_their_own_storage():
    """An adaptor's tensors start equal to their frozen counterparts; none shares its memory."""
    iaa = model("c", changed=False)
    adaptor = iaa.adaptors["c"]
    pairs = [(adaptor.layers[n], iaa.llama.layers[i]) for n, i in enumerate((0, 2, 3))]
    pairs += [(adaptor.embedding, iaa.llama.embedding), (adaptor.norm, iaa.llama.norm)]
    assert all(digest(ours) == digest(frozen) for ours, frozen in pairs)
    assert torch.equal(adaptor.head.weight, iaa.llama.embedding.weight)  # the frozen model is tied
    memory = [parameter.data_ptr() for parameter in iaa.parameters()]
    assert len(set(memory)) == len(memory)


def test_evenly_spaced_layers_literals():
    """From the first layer to the last, evenly; 14 of 32 is the official list; too many raise."""
    assert evenly_spaced_layers(8, 30) == (0, 4, 8, 12, 17, 21, 25, 29)
    assert evenly_spaced_layers(14, 32) == official_layers(32) == (
        0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31)
    assert [evenly_spaced_layers(n, 5) for n in (0, 1, 5)] == [(), (0,), (0, 1, 2, 3, 4)]
    for number in (8, 22, 31):
        layers = evenly_spaced_layers(number, 32)
        assert len(set(layers)) == number and layers[-1] == 31
    with pytest.raises(ValueError, match="insertion = 33: from 0 to 32, the number of frozen lay"):
        evenly_spaced_layers(33, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", [*CONFIGS, "text"])
def test_cached_passes_are_causal(name):
    """Tokens in pieces through a cache give one uncached pass; a later token changes no bit."""
    iaa = model(*{name} - {"text"})
    tokens, images = batch()
    images = None if name == "text" else images
    wanted, cache = iaa(tokens, name, images), iaa.new_cache(2, tokens.shape[1], name)
    assert len(cache.data) == 4 + len(getattr(iaa.adaptor(name), "layers", ()))
    parts = [iaa(piece, name, images if n == 0 else None, cache=cache)
             for n, piece in enumerate(tokens.split((P + 2, 7, 1), 1))]
    near = 1e-5 * float(wanted.abs().max())  # the states are large: 157 in structure c
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=near, rtol=0)
    tokens[:, -3] = (tokens[:, -3] + 1) % IMAGE
    changed = iaa(tokens, name, images)
    assert torch.equal(changed[:, :-3], wanted[:, :-3])
    assert (changed[:, -3:] != wanted[:, -3:]).any(-1).all()


@pytest.mark.parametrize("sizes", [LLAMA, LLAMA_TIED], ids=["own head", "tied"])
def test_text_workflow_is_plain_llama_bit_for_bit(sizes):
    """Text logits equal the bare Llama's with 0, 1, 2 adaptors loaded, and after training one."""
    tokens, bare = batch()[0], model(sizes=sizes)
    wanted = plain_logits(bare.llama, tokens)
    assert torch.equal(logits(bare, "text", tokens), wanted)
    for names in (("c",), ("c", "a"), ("own_llm",)):
        iaa = model(*names, sizes=sizes)
        assert torch.equal(logits(iaa, "text", tokens), wanted)
        train(iaa, names[0])
        assert torch.equal(logits(iaa, "text", tokens), wanted)


@each_adaptor
def test_only_the_trained_adaptor_changes(name):
    """After 5 steps the loss fell; base and other adaptor are as before and had no gradient."""
    iaa = model(name, changed=False)
    iaa.adaptors["other"] = model("b").adaptors["b"]
    tokens, images = batch()
    parts = {"llama": iaa.llama, "clip": iaa.clip, **iaa.adaptors}
    before = {part: digest(module) for part, module in parts.items()}
    if name == "own_llm":  # the LLaVA baseline starts as the frozen LLM
        words = tokens % IMAGE
        assert torch.equal(logits(iaa, name, words), plain_logits(iaa.llama, words))
    wanted = logits(iaa, "other", tokens, images)
    losses = train(iaa, name)
    assert losses[-1] < losses[0]
    assert {part for part in parts if digest(parts[part]) != before[part]} == {name}
    assert torch.equal(logits(iaa, "other", tokens, images), wanted)
    keys = dict(iaa.named_parameters())
    assert {key for key in keys if keys[key].grad is not None} == {
        key for key in keys if key.startswith(f"adaptors.{name}.")}


@torch.no_grad()
def test_what_cannot_be_computed_raises():
    """An unknown workflow, a picture for `text`; placeholders or a cache that do not fit."""
    iaa, (tokens, images) = model("c", "a"), batch()
    fewer = tokens.clone()
    fewer[0, 1] = 3
    cache = iaa.new_cache(2, 2 * tokens.shape[1], "c")
    for given, message in (
        ((tokens, "mn"), "no adaptor named 'mn'; there are: text, c, a"),
        ((tokens, "text", images), "takes no image"),
        ((tokens, "c"), r"18 image placeholders for 0 images of 9 tokens \(0\)"),
        ((tokens % IMAGE, "c", images), r"0 image placeholders for 2 images of 9 tokens \(18\)"),
        ((tokens, "c", images[:1]), r"18 image placeholders for 1 images of 9 tokens \(9\)"),
        ((fewer, "c", images), r"17 image placeholders for 2 images of 9 tokens \(18\)"),
    ):
        with pytest.raises(ValueError, match=message):
            iaa(*given)
    iaa(tokens % IMAGE, "c", cache=cache)
    with pytest.raises(ValueError, match="18 image placeholders for 0 images"):
        iaa(tokens, "c", cache=cache)
    iaa(tokens[:, 1:2], "c", cache=cache)  # decoding: the model has chosen this token itself
    for workflow, cache, message in (
        ("c", iaa.new_cache(1, 9), "4 slots of 9 tokens"),  # of another workflow
        ("text", iaa.new_cache(1, 9, "c"), "cache has 7 slots, but 4 layers ran"),
        ("text", iaa.new_cache(1, 2), "4 slots of 2 tokens, asked for slot 0 up to token 3"),
    ):
        with pytest.raises(ValueError, match=message):
            iaa(tokens[:1, -3:], workflow, cache=cache)
    with pytest.raises(MemoryError, match="no memory for a KV cache of 1 x 1000000000000 tokens"):
        iaa.new_cache(1, 10**12)  # on a CPU torch has no kind of its own for it


def test_loss_of_segments_is_the_sum_of_the_questions_alone():
    """Two questions behind one picture, blind to each other, cost what they cost one by one."""
    iaa, (tokens, images) = model("c"), batch(1)
    prefix = 1 + P + 1
    segments = torch.tensor([[0] * prefix + [1] * 3 + [2] * 5])
    positions = torch.tensor([[*range(prefix + 3), *range(prefix, prefix + 5)]])
    targets = scored(tokens, 2, 6, 7)
    packed = iaa.loss(tokens, targets, "c", images, positions, segments)
    columns = [[*range(prefix + 3)], [*range(prefix), *range(prefix + 3, prefix + 8)]]
    alone = [iaa.loss(tokens[:, c], targets[:, c], "c", images) for c in columns]
    torch.testing.assert_close(packed, sum(alone))


@pytest.mark.parametrize("name", ["c", "projector", "own_llm"])
def test_loss_in_pieces_keeps_no_logits(name, monkeypatch):
    """By 2, by 4, or at once: one loss, that of all logits, one gradient; pieces keep no logits."""
    tokens, images = batch()
    targets, found = scored(tokens, 1, 4, 7), []
    for rows in (6, 4, 2):
        monkeypatch.setattr("iaa.LOSS_ROWS", rows)
        iaa, kept = model(name).double(), []
        keep = partial(lambda kept, tensor: kept.append(tuple(tensor.shape)) or tensor, kept)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = iaa.loss(tokens, targets, name, images)
        wide = {shape for shape in kept if shape in [(n, LLAMA.vocab_size) for n in (2, 4, 6)]}
        assert wide == ({(6, LLAMA.vocab_size)} if rows == 6 else set())
        loss.backward()
        found.append([loss, *(p.grad for p in iaa.adaptors.parameters())])
    everything = logits(iaa, name, tokens, images).flatten(0, 1).float()
    wanted = F.cross_entropy(everything, targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(found[0][0], wanted)
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
        iaa.loss(tokens, scored(tokens, 1, 4), name, images).backward()
        gradients.append([p.grad for p in iaa.adaptors.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def save(iaa: IAA, name: str, folder: Path) -> Path:
    """The adaptor in a folder of its own."""
    with new_folder(folder) as temporary:
        iaa.adaptors[name].prompt = PROMPT
        iaa.adaptors[name].save(temporary, BASE, {"lr": 1}, torch.float32)
    return folder


def load(folder: Path, base: dict[str, str] = BASE) -> Adaptor:
    """The adaptor in a folder."""
    iaa = model()
    iaa.llama.sha256, iaa.clip.sha256 = base["llama"], base["clip"]
    return load_adaptor(iaa, folder)


@each_adaptor
def test_save_and_load_round_trip(name, tmp_path):
    """Every configuration comes back with equal config, tensors and prompt, frozen."""
    iaa = model(name)
    folder = save(iaa, name, tmp_path / "mm")
    adaptor = load(folder)
    assert (adaptor.config, adaptor.prompt) == (CONFIGS[name], PROMPT)
    assert digest(adaptor) == digest(iaa.adaptors[name])
    assert not adaptor.training and not any(p.requires_grad for p in adaptor.parameters())
    assert sorted(p.name for p in folder.iterdir()) == ["adaptor.safetensors", "config.json"]


def test_broken_adaptors_are_one_line(tmp_path):
    """Another base, a file cut short anywhere or missing, no JSON, no folder."""
    folder = save(model("c"), "c", tmp_path / "mm")
    with pytest.raises(ValueError, match=r"mm was trained on llama a{16}\.\.\., but this llama is "
                                         r"c{16}\.\.\."):
        load(folder, BASE | {"llama": "cc" * 32})
    whole = (folder / "adaptor.safetensors").read_bytes()
    for kept in (0, 5, len(whole) // 2, len(whole) - 1):
        (folder / "adaptor.safetensors").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="adaptor.safetensors: "):
            load(folder)
    (folder / "adaptor.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adaptor.safetensors: no such file"):
        load(folder)
    (folder / "config.json").write_text('{"adaptor": {')
    with pytest.raises(ValueError, match="config.json: not JSON"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="nowhere/config.json: no such file"):
        load(tmp_path / "nowhere")


def test_one_changed_bit_is_noticed(tmp_path):
    """Anywhere in an adaptor's tensors, or a setting that fits as well: the file is named."""
    folder = save(model("c"), "c", tmp_path / "mm")
    path, config = folder / "adaptor.safetensors", folder / "config.json"
    for _ in flip_bits(path):
        with pytest.raises(ValueError, match=f"^{path}, or config.json beside it, has changed"):
            load(folder)
    edit(config, adaptor=json.loads(config.read_text())["adaptor"] | {"insertion": [0, 1, 3]})
    with pytest.raises(ValueError, match="or config.json beside it, has changed since it was"):
        load(folder)
    edit(config, sha256=None)  # an older adaptor has none, and loads as it is
    assert load(folder).config.insertion == (0, 1, 3)


def test_a_part_of_the_tensors(tmp_path):
    """A stage may begin from some of them only, such as the projector, where that is asked for."""
    iaa = model("projector", "c")
    adaptor, source = iaa.adaptors["c"], iaa.adaptors["projector"].projector
    before, folder = adaptor.state_dict(), save(iaa, "projector", tmp_path / "first")
    assert digest(adaptor.projector) != digest(source)
    load_tensors(adaptor, folder, torch.float32, "cpu", strict=False)
    after = adaptor.state_dict()
    assert digest(adaptor.projector) == digest(source)
    assert all(torch.equal(after[n], before[n]) for n in after if not n.startswith("projector."))
    assert all(weight.requires_grad for weight in adaptor.parameters())
    with pytest.raises(ValueError, match="adaptor.safetensors: .*Missing key"):
        load_tensors(adaptor, folder, torch.float32, "cpu")
    with pytest.raises(ValueError, match="no such tensor in this adaptor: embedding.weight"):
        load_tensors(iaa.adaptors["projector"], save(iaa, "c", tmp_path / "c"), torch.float32,
                     "cpu", strict=False)


@pytest.mark.parametrize("name", ["", "two words", "a.b", "1st", "text", "items", "train"])
def test_names_that_no_adaptor_can_have(name):
    """What is no identifier, has a meaning of its own, or is an attribute of torch's."""
    with pytest.raises(ValueError, match="an adaptor cannot be named"):
        check_adaptor_name(name)


def test_load_iaa_reads_a_whole_folder(tmp_path):
    """The model that comes back computes as the saved one, in the dtype that is asked for."""
    iaa, (loaded, tokenizer) = tiny_run(tmp_path), load_iaa(tmp_path, torch.float32)
    tokens, images = batch()
    tokens = tokens.clamp(max=257) + (tokens == IMAGE)  # this run's placeholder is 258
    for name in ("mm", "grounding"):
        wanted = logits(iaa, name, tokens, images)
        assert torch.equal(logits(loaded, name, tokens, images), wanted)
    assert tokenizer == tmp_path / "llama" and loaded.base == iaa.base
    assert not loaded.training and not [p for p in loaded.parameters() if p.requires_grad]
    for workflows in (["grounding"], ["text"], ["text", "mm"]):
        part, _ = load_iaa(tmp_path, torch.bfloat16, workflows=workflows)
        assert {*part.adaptors} == {*workflows} - {"text"}
        assert {weight.dtype for weight in part.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="no adaptor named 'x'; there are: text, mm, grounding"):
        load_iaa(tmp_path, torch.float32, workflows=["mm", "x"])


def drop_a_tensor(path: Path) -> None:
    """Write the file again without its first tensor."""
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


@pytest.mark.parametrize(("kind", "first", "other"), [
    ("llama", "embedding.weight", "clip"), ("clip", "class_token", "llama")])
def test_broken_frozen_models_are_one_line(tmp_path, kind, first, other):
    """Each half-right folder of a frozen model is named, with what is wrong in it."""
    tiny_run(tmp_path)
    folder = tmp_path / kind
    weights, settings = folder / "model-00001-of-00001.safetensors", folder / "config.json"
    for harm, message in (
        (lambda: drop_a_tensor(weights), f"{folder}/model-.*: .*Missing key.* \"{first}\""),
        (lambda: weights.write_bytes(weights.read_bytes()[:-9]), f"{weights}: "),
        (weights.unlink, r"config.json: these sizes need \d+ .* model-\*.safetensors .* have 0"),
        (lambda: edit(settings, config={"width": 48}), "config.json: config.* missing"),
        (lambda: edit(settings, config=[]), "config.json: config = "),
        (lambda: edit(settings, config={}, kind=other), f"config.json: a model of kind '{other}'"),
        (lambda: settings.write_text("{"), "config.json: not JSON"),
        (settings.unlink, "config.json: no such file"),
    ):
        harm()
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_iaa(tmp_path, torch.float32)
        assert "\n" not in str(error.value)
