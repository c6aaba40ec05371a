"""sample.py: generation, streaming, chat, boxes, errors; on tiny random models."""

import json
import shlex
import shutil

import pytest
import torch
from conftest import last_line, tiny_run
from PIL import Image

import sample
from clip import open_image
from iaa import load_iaa
from sample import Chat, generate, sample_token
from tokenization.templates import TEMPLATES

IMAGE_ID, P = 258, 9  # of the tiny base
SHOWN = [7, *[IMAGE_ID] * P, *b"what is it?"]  # a prompt with a picture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with the adaptors mm and grounding, random weights, one token a byte."""
    root = tmp_path_factory.mktemp("run")
    tiny_run(root)
    return root


@pytest.fixture(scope="module")
def model(run):
    """The run's model in fp32."""
    return load_iaa(run, torch.float32)[0]


@pytest.fixture
def picture(tmp_path):
    """The path of a picture, with a space in it."""
    Image.new("RGB", (40, 30), "navy").save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def open_chat(run, *images, **options) -> Chat:
    """A chat in fp32."""
    return Chat.load(run, "fp32", "cpu", images=[open_image(image) for image in images], **options)


def spelt(ids) -> str:
    """The text of a prompt, # for each picture and no special tokens."""
    text = bytes(ord("#") if token == IMAGE_ID else token for token in ids
                 if token == IMAGE_ID or token < 256).decode()
    return text.replace("#" * P, "#")


class OnADevice(torch.Tensor):
    """Logits that must be on the CPU before they are drawn from: a seed draws the same there."""

    softmax = None

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_sample_token():
    """Greedy takes the peak; top_p keeps the least set of that mass; low temperature sharpens."""
    probs, generator = torch.tensor([[0.1, 0.5, 0.15, 0.25]]), torch.Generator().manual_seed(0)

    def shares(temperature, top_p):
        logits = probs.log().expand(1000, 4).as_subclass(OnADevice)
        return sample_token(logits, temperature, top_p, [generator] * 1000).bincount(
            minlength=4) / 1000

    assert sample_token(probs.log(), 0, 1.0, []).tolist() == [1]
    sharp = probs[0] ** 2 / (probs[0] ** 2).sum()
    for temperature, top_p, wanted in (
        (1.0, 1.0, probs[0]), (1.0, 0.7, torch.tensor([0, 2 / 3, 0, 1 / 3])), (0.5, 1.0, sharp)):
        torch.testing.assert_close(shares(temperature, top_p), wanted, atol=0.05, rtol=0)
    for temperature, top_p in ((1.0, 0.4), (1.0, 1e-9), (1e-38, 1.0), (5e-324, 0.5)):
        assert shares(temperature, top_p)[1] == 1  # greedy, not 0 / 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_one_line(temperature):
    """Neither a crash nor an answer of token 0; finite ones of any size are no error."""
    inf = float("inf")
    for wrong in ([float("nan"), 1.0], [inf, 1.0], [-inf, 1.0], [inf, -inf]):
        with pytest.raises(ValueError, match="^the model's logits are not finite: .*--dtype$"):
            sample_token(torch.tensor([[0.0, *wrong]]), temperature, 1.0, [torch.Generator()])
    large = torch.full((1, 9), torch.finfo(torch.float32).max)  # their sum is infinite
    assert sample_token(large, temperature, 1.0, [torch.Generator()]) < 9


@torch.no_grad()
@pytest.mark.parametrize("workflow", ["mm", "text"])
def test_cached_greedy_equals_uncached(model, workflow):
    """The whole sequence through the model for every new token gives the same 12 tokens."""
    shown = None if workflow == "text" else torch.randn(1, 3, 18, 18)
    ids = list(b"hello" if workflow == "text" else SHOWN)
    answer = generate(model, [ids], shown, workflow, 12)[0]
    for token in answer:
        x = model(torch.tensor([ids]), workflow, shown)
        assert token == model.logits(x[:, -1], workflow).argmax()
        ids.append(token)
    assert len(answer) == 12 and len(set(answer)) > 1


def test_batch_equals_one_by_one(model):
    """Ragged prompts with 1, 0, 2 and 5 pictures answer as each alone; greedy and sampled."""
    place, images = [IMAGE_ID] * P, torch.randn(8, 3, 18, 18)
    prompts = [SHOWN, [*b"hi"], [*place, *b"or", *place], [*b"where", *(place + [7]) * 5]]
    shown = [images[:1], None, images[1:3], images[3:]]
    for options in ({}, {"temperature": 1.0, "top_p": 0.9}):
        alone = [generate(model, [prompt], pixels, "mm", 10, seed=7 + row, **options)[0]
                 for row, (prompt, pixels) in enumerate(zip(prompts, shown, strict=True))]
        assert generate(model, prompts, images, "mm", 10, seed=7, **options) == alone
        assert len({tuple(answer) for answer in alone}) == 4
    texts = [[*b"hello you"], [*b"hi"]]
    alone = [generate(model, [text], max_tokens=10)[0] for text in texts]
    assert generate(model, texts, max_tokens=10) == alone


def test_stop_tokens_and_callback(model):
    """A row ends before its stop token, others go on; the callback sees what is returned."""
    prompts, seen = [[1, 2, 3], [4, 5]], [[], []]
    options = {"workflow": "mm", "max_tokens": 12, "temperature": 1.0}
    free = generate(model, prompts, **options)
    stop = free[0][4]
    wanted = [row[: row.index(stop)] if stop in row else row for row in free]
    got = generate(model, prompts, stop=(stop,), **options,
                   on_token=lambda row, token: seen[row].append(token))
    assert got == wanted == seen and len(wanted[0]) <= 4 and free[0] != free[1]


def test_what_cannot_be_generated(model):
    """No prompt, an empty one, one that is too long: one line."""
    for prompts, message in (([], "a prompt is empty, or there"), ([[1], []], "a prompt is empty"),
                             ([[1] * 396], r"396 tokens \+ 5 new ones exceed the context of 400")):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, max_tokens=5)
    assert len(generate(model, [[1] * 396], max_tokens=4)[0]) == 4


@pytest.fixture
def script(monkeypatch):
    """Have the model say given answers, one a question, the last for ever; collects each call."""

    def install(*answers):
        calls, left = [], list(answers)

        def speak(model, prompts, images, workflow, *settings):
            calls.append({"ids": prompts[0], "images": images, "workflow": workflow})
            answer = left.pop(0) if len(left) > 1 else left[0]
            for token in answer.encode() if isinstance(answer, str) else answer:
                if token is KeyboardInterrupt:
                    raise KeyboardInterrupt
                settings[-1](0, token)  # on_token

        monkeypatch.setattr(sample, "generate", speak)
        return calls

    return install


def feed(monkeypatch, *lines):
    """Type `lines` at the prompt, then the end of input; an exception among them is raised."""
    left = iter([*lines, EOFError()])

    def typed(prompt):
        print(prompt, end="")
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)


def main(run, *argv):
    """The command, in fp32."""
    sample.main(["--model", str(run), "--dtype", "fp32", *map(str, argv)])


def fails(capsys, run, *argv):
    """The one line on stderr of a command that must exit with code 1."""
    message = last_line(main, run, *argv)
    assert capsys.readouterr().out == ""
    return message


def test_same_seed_same_answer(run, picture, capsys):
    """A seed fixes every answer of a chat, another seed changes it; what is printed is `ask`'s."""

    def answers(seed, heat=1.5):
        chat = open_chat(run, picture, max_tokens=12, temperature=heat, top_p=0.95, seed=seed)
        return [chat.ask("one").answer, chat.ask("one").answer]

    assert answers(3) == answers(3) != answers(4) and len({*answers(3)}) == 2
    assert answers(3, 0.0) == answers(4, 0.0)
    capsys.readouterr()
    main(run, "--image", picture, "--prompt", "one", "--max-tokens", 12, "--temperature", 1.5,
         "--top-p", 0.95, "--seed", 3)
    assert capsys.readouterr().out == answers(3)[0] + "\n"


def test_pictures_and_workflow_change_between_turns(run, picture, tmp_path, script, monkeypatch):
    """Without a picture text, with one mm, else the chosen one. History and pictures stay.

    A picture stays where its question had it, and is not in the prompt under text.
    """
    calls = script("one", "two <image>", "three", "four", "five")
    dragged = tmp_path / "it's a.png"
    Image.new("RGB", (100, 50), "white").save(dragged)
    feed(monkeypatch, "first", f"/image {picture}", "second", "/workflow text", "third",
         f"/image {shlex.quote(str(dragged))}", "/workflow grounding", f"/image {picture}",
         "See <image>, <image>", "/reset", "fifth")
    main(run)
    assert [call["workflow"] for call in calls] == ["text", "mm", "text", *["grounding"] * 2]
    shown = [0 if call["images"] is None else len(call["images"]) for call in calls]
    assert shown == [0, 1, 0, 3, 0]
    assert torch.equal(calls[3]["images"][0], calls[1]["images"][0])
    assert torch.equal(calls[3]["images"][0], calls[3]["images"][2])
    assert not torch.equal(*calls[3]["images"][:2])
    history = ("user\nfirst\nassistant\none\nuser\n{}second\nassistant\ntwo\nuser\nthird\n"
               "assistant\n")
    assert [spelt(calls[n]["ids"]) for n in (2, 3, 4)] == [
        f"system\n{TEMPLATES['chatml'].default_system}\n" + history.format(""),
        "system\nBox.\n" + history.format("#\n") + "three\nuser\nSee #, #\nassistant\n",
        "system\nBox.\nuser\nfifth\nassistant\n"]


def test_chat_commands(run, picture, script, monkeypatch, capsys):
    """/help, unknown commands, bad pictures and workflows go on; tags must fit the pictures."""
    calls = script("fine")
    feed(monkeypatch, "", "/help", "/nonsense", "/image /nowhere.png", "/workflow sound",
         "/image ~nobody-of-that-name/a.png", f"/image '{picture}'", "a <image> b <image>", "look",
         "<image>?", "/workflow text", f"/image {picture}", "<image>?", "/quit", "never asked")
    main(run)
    said = capsys.readouterr()
    assert said.out.count(sample.HELP) == 2 and "unknown: /nonsense\n" in said.out
    assert "40 x 30 pixels; workflow mm" in said.out and "mm> fine\n" in said.out
    for line in ("/nowhere.png: no such file", "~nobody-of-that-name/a.png: no such file",
                 "no adaptor named 'sound'; there are: text, mm, grounding",
                 "2 times <image> in a question about 1 new pictures: leave it out. To"):
        assert line in said.err
    assert said.err.count("1 times <image> in a question about 0 new pictures") == 2
    assert len(calls) == 1


def test_ctrl_c(run, script, monkeypatch, capsys):
    """Within an answer it keeps what came, at the prompt it leaves; one question ends in a line."""
    calls = script([*b"half an ans", KeyboardInterrupt], "whole")
    feed(monkeypatch, "one", "two", KeyboardInterrupt(), "never asked")
    main(run)
    assert "half an ans [stopped]" in capsys.readouterr().out
    assert "half an ans" in spelt(calls[1]["ids"]) and len(calls) == 2
    script([*b"half", KeyboardInterrupt])
    with pytest.raises(SystemExit, match="stopped"):
        main(run, "--prompt", "one")


def test_prompt_longer_than_the_context(run, capsys, script):
    """The message holds both numbers; what just leaves room gets a shorter answer; no history."""
    message = fails(capsys, run, "--prompt", "x" * 400)
    taken = int(message.split("a prompt of ")[1].split()[0])
    assert "context of 400" in message and taken > 400
    main(run, "--prompt", "x" * (800 - taken - 3), "--json")
    assert json.loads(capsys.readouterr().out)["tokens"] <= 3  # a token a letter here
    chat = open_chat(run, max_tokens=2)
    said = chat.ask("short").answer
    with pytest.raises(ValueError, match="context"):
        chat.ask("x" * 500)
    assert chat.turns == [("user", "short"), ("assistant", said)]


def test_json(run, picture, script, capsys):
    """One object on stdout, the answer trimmed; boxes, in pixels, only where it names them."""
    script("\n Süß [0.25, 0.25, 0.5, 0.5] 🐱 ", "[0.25, 0.25, 0.5, 0.5]", [0x61, 0xE7])
    argv = ["--image", picture, "--prompt", "wo? ü", "--json", "--workflow"]
    main(run, *argv, "grounding")
    got = json.loads(capsys.readouterr().out)
    assert got.pop("seconds_to_first_token") >= 0 and got.pop("tokens_per_s") > 0
    assert got == {"workflow": "grounding", "prompt": "wo? ü", "tokens": 36,
                   "answer": "Süß [0.25, 0.25, 0.5, 0.5] 🐱",
                   "boxes": [[10, 5, 20, 15]]}  # 40 x 30 on a square of 40: 5 pixels above
    main(run, *argv, "text")
    assert "boxes" not in json.loads(capsys.readouterr().out)  # text has not seen the picture
    main(run, *argv, "mm")
    assert json.loads(capsys.readouterr().out)["answer"] == "a"  # the end cut a character


@pytest.mark.parametrize(("size", "box", "drawn"), [
    ((100, 50), "[0.1, 0.4, 0.5, 0.6]", (10, 15, 50, 35)),  # landscape: 25 pixels of border above
    ((50, 100), "[0.4, 0.1, 0.6, 0.5]", (15, 10, 35, 50)),  # portrait: 25 to the left
    ((50, 100), "[0.0, 0.5, 1.0, 1.0]", (0, 50, 50, 100)),  # reaches into the border: cut there
    ((600, 500), "[0.1, 0.2, 0.5, 0.6]", (60, 70, 300, 310)),  # large: not enlarged
])
def test_boxes_are_drawn_where_they_are(run, tmp_path, picture, script, size, box, drawn):
    """On the last of two pictures, upright and enlarged, the outline spans the box."""
    script(f"Here: {box}.")
    path, out, exif = tmp_path / "in.png", tmp_path / "out.png", Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", size[::-1], "white").save(path, exif=exif)
    main(run, "--image", picture, "--image", path, "--prompt", "where?", "--boxes", out)
    image = Image.open(out)
    scale = image.width // size[0]
    assert image.size == (size[0] * scale, size[1] * scale) and max(image.size) >= 448
    assert image.point(lambda v: 255 - v).getbbox() == tuple(v * scale for v in drawn)
    x, y = ((drawn[0] + drawn[2]) * scale // 2, (drawn[1] + drawn[3]) * scale // 2)
    assert image.getpixel((x, y)) == (255, 255, 255)  # an outline, not a patch


def test_no_box_no_file(run, picture, tmp_path, script, capsys):
    """Without a box on the picture no file is written; one that cannot be written is a line."""
    out, command = tmp_path / "out.png", ("--image", picture, "--prompt", "q", "--boxes")
    for said in ("I see none.", "[0.9, 0.1, 0.2, 0.3]", "[0.1, 0.0, 0.2, 0.12]"):
        script(said)
        main(run, *command, out)
        assert "no box in the answer" in capsys.readouterr().err and not out.exists()
    script("[0.0, 0.0, 1.0, 1.0]")
    for wrong, message in (("b.xyz", "unknown file extension: .xyz"), ("no/b.png", "no/b.png")):
        with pytest.raises(SystemExit, match=message):
            main(run, *command, tmp_path / wrong)


def test_errors_are_one_line(run, picture, tmp_path, capsys):
    """Every mistake: one line, exit code 1, nothing on stdout."""
    (tmp_path / "text.png").write_text("not a picture")
    prompt = ("--prompt", "hello")
    for argv, message in (
        ((*prompt, "--image", tmp_path / "nowhere.png"), "nowhere.png: no such file"),
        ((*prompt, "--image", tmp_path / "text.png"), "not a readable picture"),
        ((*prompt, "--workflow", "x"), "no adaptor named 'x'; there are: text, mm, grounding"),
        ((*prompt, "--model", tmp_path / "none"), "run.sh demo makes one"),
        ((*prompt, "--boxes", tmp_path / "b.png"), "--image"),
        ((*prompt, "--max-tokens", 0), "--max-tokens: 1 or more"),
        *(((*prompt, *wrong), f"{wrong[0]}: ") for wrong in (
            ("--temperature", -1), ("--temperature", "nan"), ("--top-p", 0), ("--top-p", 1.5),
            ("--seed", -1))),
    ):
        assert message in fails(capsys, run, *argv)


@pytest.mark.parametrize(("file", "keys", "value", "message"), [
    ("iaa.json", ["adaptors"], ["mm"], "adaptors = ['mm']: expected dict[str, str]"),
    ("iaa.json", ["image_token"], 10**9, "image_token = 1000000000: the LLM has tokens 0 to 259"),
    ("llama/config.json", ["config", "layers"], 10**6, "need 3328000000 bytes of weights at least"),
    ("clip/config.json", ["config", "mean"], [0.5], "three finite numbers each"),
    ("llama/config.json", ["sha256"], None, "sha256 = None: expected str"),
    ("mm/config.json", ["prompt"], "chatml", "prompt = 'chatml': expected dict[str, str | None]"),
    ("mm/config.json", ["prompt", "template"], "llama9", "template 'llama9': there are"),
    ("mm/config.json", ["base"], {}, "was trained on llama unknown"),
    ("mm/config.json", ["adaptor", "structure"], "d", "adaptor: structure = 'd': a, b or c")])
def test_damaged_settings_are_one_line(run, picture, tmp_path, capsys, file, keys, value, message):
    """A hand-edited file of the model's folder: the message names the place and what is right."""
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / file
    place = settings = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    if file.startswith("mm"):
        del settings["sha256"]  # as older adaptors have none
    path.write_text(json.dumps(settings))
    assert message in fails(capsys, tmp_path / "copy", "--image", picture, "--prompt", "hello",
                            "--max-tokens", 1)


def test_text_needs_no_adaptor(tmp_path):
    """A run whose adaptors are gone still answers text: only what is asked for is read."""
    tiny_run(tmp_path)
    for name in ("mm", "grounding"):
        shutil.rmtree(tmp_path / name)
    chat = Chat.load(tmp_path, "fp32", workflows=["text"], max_tokens=3)
    assert chat.ask("Hi.").workflow == "text"
