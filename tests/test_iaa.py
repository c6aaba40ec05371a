"""iaa.py: structures, exactness of the text workflow, what trains, the loss, folders."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP, LLAMA, LLAMA_TIED, flip_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip import Clip
from common.files import new_folder, write_json
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
    "a": AdaptorConfig((0, 2, 3), "a"),
    "b": AdaptorConfig((0, 2, 3), "b"),
    "c": AdaptorConfig((0, 2, 3), "c"),
    "frozen_ends": AdaptorConfig((1, 3), "c", **NOTHING_OWN),
    "projector": AdaptorConfig((), "c", **NOTHING_OWN),
    "own_llm": AdaptorConfig((), "c", **NOTHING_OWN, own_llm=True),
}
each_structure = pytest.mark.parametrize("name", ["a", "b", "c"])
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
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


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


# Structures


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


@each_structure
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


@pytest.mark.parametrize(("settings", "message"), [
    ({"structure": "d"}, "'d': a, b or c"),
    ({"insertion": (3, 1)}, r"\[3, 1\]: layer indices, ascending"),
    ({"insertion": (1, 1)}, "each once"),
    ({"insertion": (-1,)}, "ascending"),
    ({"own_llm": True}, "own_embedding = false"),
    ({"insertion": (4,)}, "after layer 4, but the LLM ends at 3"),
])
def test_impossible_adaptor_raises(settings, message):
    """A config that cannot be built says what is accepted."""
    with pytest.raises(ValueError, match=message):
        Adaptor(AdaptorConfig(**settings), LLAMA, CLIP.width)


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


@torch.no_grad()
def test_a_cache_of_another_workflow_raises():
    """A cache for `text` has too few slots for an adaptor, and the other way round too many."""
    iaa, tokens = model("c"), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="4 slots of 9 tokens"):
        iaa(tokens, "c", cache=iaa.new_cache(1, 9))
    with pytest.raises(ValueError, match="cache has 7 slots, but 4 layers ran"):
        iaa(tokens, cache=iaa.new_cache(1, 9, "c"))


# Workflows


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
    """An unknown workflow, a picture for `text`, placeholders that do not fit: both sides named."""
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


def test_features_stand_where_the_placeholders_stood():
    """Image n's P projected features fill its slots in order; the rest is the own embedding."""
    iaa, (tokens, images) = model("c"), batch()
    adaptor = iaa.adaptors["c"]
    x = iaa.place_images(adaptor.embedding(tokens), tokens, images, adaptor)
    torch.testing.assert_close(x[:, 1 : 1 + P], adaptor.projector(iaa.clip(images)))
    others = [0, *range(1 + P, tokens.shape[1])]
    assert torch.equal(x[:, others], adaptor.embedding(tokens)[:, others])


# Loss


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
    """6 scored positions by 2, by 4, or at once: one loss, that of all logits, and one gradient.

    In pieces no logits are kept for the backward pass.
    """
    tokens, images = batch()
    targets, found = scored(tokens, 1, 4, 7), []
    for rows in (6, 4, 2):
        monkeypatch.setattr("iaa.LOSS_ROWS", rows)
        iaa, kept = model(name).double(), []

        def keep(tensor, kept=kept):
            kept.append(tuple(tensor.shape))
            return tensor

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


# Saving and loading


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


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@pytest.mark.parametrize(("harm", "message"), [
    (lambda t: t.pop("layers.1.ffn.down.weight"),
     'Missing key.* "layers.1.ffn.down.weight"'),
    (lambda t: t.update({"norm.weight": torch.ones(3)}), r"size mismatch for norm.weight: .*\[3\]"),
    (lambda t: t.update(stranger=torch.ones(1)), 'Unexpected key.* "stranger"'),
])
def test_wrong_tensors_raise_naming_them(harm, message, tmp_path):
    """A missing, mis-shaped or unknown tensor is an error that names it."""
    path = save(model("c"), "c", tmp_path / "mm") / "adaptor.safetensors"
    tensors = load_file(path)
    harm(tensors)
    save_file(tensors, path)
    edit(path.parent / "config.json", sha256=None)  # as older adaptors have none
    with pytest.raises(ValueError, match=f"adaptor.safetensors: .*{message}") as error:
        load(path.parent)
    assert "\n" not in str(error.value)


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


@pytest.fixture
def folder(tmp_path, write_base):
    """A saved model: workflows mm (structure c) and grounding (b)."""
    iaa = model("c", "b")
    write_base(tmp_path / "llm", iaa.llama, BASE["llama"])
    write_base(tmp_path / "vision", iaa.clip, BASE["clip"])
    save(iaa, "c", tmp_path / "c"), save(iaa, "b", tmp_path / "b")
    write_json(tmp_path / "iaa.json", {"llm": "llm", "vision": "vision", "image_token": IMAGE,
                                       "adaptors": {"mm": "c", "grounding": "b"}})
    return tmp_path


def test_load_iaa_reads_a_whole_folder(folder):
    """The model that comes back computes as the saved one, in the dtype that is asked for."""
    iaa, (loaded, tokenizer) = model("c", "b"), load_iaa(folder, torch.float32)
    tokens, images = batch()
    for theirs, ours in (("mm", "c"), ("grounding", "b")):
        assert torch.equal(logits(loaded, theirs, tokens, images),
                           logits(iaa, ours, tokens, images))
    assert tokenizer == folder / "llm" and loaded.base == BASE
    assert not loaded.training and not [p for p in loaded.parameters() if p.requires_grad]
    for workflows in (["grounding"], ["text"], ["text", "mm"]):
        part, _ = load_iaa(folder, torch.bfloat16, workflows=workflows)
        assert {*part.adaptors} == {*workflows} - {"text"}
        assert {weight.dtype for weight in part.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="no adaptor named 'x'; there are: text, mm, grounding"):
        load_iaa(folder, torch.float32, workflows=["mm", "x"])


def drop_a_tensor(path: Path) -> None:
    """Write the file again without its first tensor."""
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


@pytest.mark.parametrize(("kind", "first"), [
    ("llm", "embedding.weight"), ("vision", "class_token")])
def test_broken_frozen_models_are_one_line(folder, kind, first):
    """Each half-right folder of a frozen model is named, with what is wrong in it."""
    weights, settings = folder / kind / "model-00001-of-00001.safetensors", folder / kind
    settings, other = settings / "config.json", "clip" if kind == "llm" else "llama"
    for harm, message in (
        (lambda: drop_a_tensor(weights), f"{folder / kind}/model-.*: .*Missing key.* \"{first}\""),
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
            load_iaa(folder, torch.float32)
        assert "\n" not in str(error.value)
