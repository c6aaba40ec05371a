"""sample.py: streaming, JSON, chat commands, workflows, boxes, errors; on tiny random models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip
import dialogue
import sample
from common.files import new_folder
from generate import prefill
from iaa import Adaptor, AdaptorConfig
from storage import save_adaptor
from tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
IMAGE_ID = 258  # of the tiny base


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_run):
    """The folder of a run with the adaptors mm and grounding, random weights, one token a byte."""
    root = tmp_path_factory.mktemp("run")
    tiny_run(root)
    return root


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "navy").save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


@pytest.fixture
def script(monkeypatch):
    """Have the model say given answers, one a question, the last for ever; collects each call."""

    def install(*answers):
        calls, left = [], list(answers)

        def generate(model, prompts, images, workflow, *settings, cache):
            calls.append({"ids": prompts[0], "images": images, "workflow": workflow})
            answer = left.pop(0) if len(left) > 1 else left[0]
            for token in answer.encode() if isinstance(answer, str) else answer:
                if token is KeyboardInterrupt:
                    raise KeyboardInterrupt
                settings[-1](0, token)  # on_token

        monkeypatch.setattr("dialogue.generate", generate)
        return calls

    return install


def feed(monkeypatch, *lines):
    """Type `lines` at the prompt, then the end of input; an exception among them is raised."""
    left = list(lines)

    def read(prompt):
        print(prompt, end="")
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def fails(capsys, *argv):
    """The one line on stderr of a command that must exit with code 1."""
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(a) for a in argv])
    message = stopped.value.code  # a text: Python prints it on stderr and exits with 1
    assert isinstance(message, str) and "\n" not in message
    assert capsys.readouterr().out == ""
    return message


def test_stream_pieces_add_up_and_split_no_character(run, script):
    """Bytes of two- to four-byte characters come singly; the joined pieces are the answer."""
    said = "  \n Süß, 猫 und 🐱!  Zwei  Wörter. \n "
    script(said)
    pieces = []
    answer = sample.Chat.load(run).ask("q", pieces.append)
    assert "".join(pieces) == answer.answer == said.strip()
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)
    assert len(pieces) > 10 and answer.tokens == len(said.encode())


def test_half_characters(run, script):
    """A broken character inside an answer shows as U+FFFD; one that the end cuts is left out."""
    script([0x61, 0xE7, 0x62, 0xF0, 0x9F])
    pieces = []
    answer = sample.Chat.load(run).ask("q", pieces.append)
    assert "".join(pieces) == answer.answer == "a\ufffdb"


def test_random_model_streams_its_answer(run, picture, capsys):
    """What is printed is the answer that `ask` returns, on real generation of random bytes."""
    argv = ["--model", run, "--image", picture, "--prompt", "what?", "--max-tokens", 20,
            "--temperature", 1]
    sample.main([str(a) for a in argv])
    chat = sample.Chat.load(run, max_tokens=20, temperature=1.0)
    chat.image = Image.open(picture)
    assert capsys.readouterr().out == chat.ask("what?").answer + "\n"


def test_the_tower_runs_once_a_picture(run, picture):
    """Over the turns of a dialogue, and when the same pixels come again; another picture counts."""
    chat, seen = sample.Chat.load(run, max_tokens=2), []
    chat.model.clip.register_forward_pre_hook(lambda *_: seen.append(1))
    for path in (picture, picture):
        chat.image = Image.open(path).convert("RGB")
        chat.ask("one")
        chat.ask("two")
    assert len(seen) == 1
    chat.image = Image.new("RGB", (40, 30), "red")
    chat.ask("three")
    assert len(seen) == 2


def test_a_turn_reads_only_what_is_new(run, picture, tmp_path):
    """The answers are those of a chat without memory, and the cache holds what its ids say.

    Turns under two workflows, about two pictures, after a reset, after answers that were stopped
    between tokens and within a pass, and under another adaptor by a forgotten one's name.
    """
    kept, fresh = (sample.Chat.load(run, max_tokens=4, temperature=1.0, seed=1) for _ in range(2))
    passes, stops, patches = [], [], clip.SIZES["tiny"].patches

    def layer(_, args):
        passes.append(args[0].shape[1])
        if len(passes) in stops:
            raise KeyboardInterrupt

    kept.model.llama.layers[1].register_forward_pre_hook(layer)

    def known(text):
        """Tokens of its prompt that the chat did not read again."""
        passes.clear(), stops.clear()
        fresh.image, fresh.chosen, fresh.turns = kept.image, kept.chosen, list(kept.turns)
        fresh.memory, answer = None, kept.ask(text)
        assert answer.answer == fresh.ask(text).answer
        memory, length, first = kept.memory, kept.memory.cache.length, passes[0]
        cache = kept.model.new_cache(1, length, memory.workflow)
        with torch.inference_mode():
            prefill(kept.model, [memory.ids[:length]], memory.images, memory.workflow, cache)
        torch.testing.assert_close(memory.cache.data[..., :length, :], cache.data)
        return len(memory.ids) - answer.tokens - first

    def stopped(text, on_text=lambda piece: None):
        with pytest.raises(KeyboardInterrupt):
            kept.ask(text, on_text)

    def stop(piece):
        raise KeyboardInterrupt

    kept.image = Image.open(picture).convert("RGB")
    assert known("one") == 0
    prompt = kept.memory.cache.length - 3
    assert known("two") >= prompt
    kept.chosen = "grounding"
    assert known("three") == 0 and known("four") > patches
    kept.turns, kept.chosen = [], "text"  # as /reset and /workflow do
    assert known("five") == 0 and known("six") > 0
    kept.chosen = None
    stopped("seven", stop)
    assert known("eight") > patches
    kept.turns, kept.image = [], Image.new("RGB", (40, 30), "red")
    assert known("nine") == 0
    kept.turns = []
    assert known("ten") > patches  # the picture stays read
    for stops[:] in ([1], [3]):  # in a prompt, in an answer
        passes.clear()
        stopped("eleven")
        kept.turns = kept.turns[:2]
        assert known("twelve") > patches
    other = Adaptor(AdaptorConfig((0, 2)), kept.model.llama.config, kept.model.clip.config.width)
    with new_folder(tmp_path / "other") as folder:
        prompt = {"prompt": {"template": "chatml", "system": None}}
        save_adaptor(other, folder, {"llama": "llama", "clip": "clip"}, prompt, torch.float32)
    for chat in (kept, fresh):
        chat.drop_adaptor("mm")
        chat.load_adaptor("mm", tmp_path / "other")
    assert known("thirteen") == 0


def test_int8_answers(run, picture, capsys, monkeypatch):
    """`--quantize int8` stores the matrices so, and answers."""
    loaded, pack = [], dialogue.pack
    monkeypatch.setattr("dialogue.pack", lambda *given: loaded.append(given[0]) or pack(*given))
    sample.main(["--model", str(run), "--image", str(picture), "--prompt", "what?", "--json",
                 "--quantize", "int8", "--max-tokens", "4", "--temperature", "2"])
    assert json.loads(capsys.readouterr().out)["tokens"] <= 4
    assert any(type(m).__name__ == "Int8Linear" for m in loaded[0].llama.modules())
    assert [*loaded[0].adaptors] == ["mm"]  # no other answers this one question


def test_a_start_builds_nothing_at_random(run):
    """A model comes up without torch's compiler, which nn.Embedding's own start would import."""
    code = (f"import sys, sample; sample.Chat.load({str(run)!r}); "
            "print({'torch._dynamo', 'sympy'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_same_seed_same_answer(run, picture):
    """A seed fixes every answer of a dialogue, another seed changes it."""

    def answers(seed):
        chat = sample.Chat.load(run, max_tokens=12, temperature=1.5, top_p=0.95, seed=seed)
        chat.image = Image.open(picture)
        return [chat.ask("one").answer, chat.ask("two").answer]

    assert answers(3) == answers(3) != answers(4)


def test_json(run, picture, script, capsys):
    """One object on stdout; boxes, in pixels, only where the answer names them."""
    script("It is [0.25, 0.25, 0.5, 0.5]")
    argv = ["--model", str(run), "--image", str(picture), "--prompt", "wo? ü", "--json",
            "--workflow"]
    sample.main([*argv, "grounding"])
    got = json.loads(capsys.readouterr().out)
    assert set(got) == set(dialogue.Answer.__dataclass_fields__)
    assert (got["workflow"], got["prompt"], got["tokens"]) == ("grounding", "wo? ü", 28)
    assert got["boxes"] == [[10, 5, 20, 15]]  # 40 x 30 on a square of 40: 5 pixels above
    assert got["seconds_to_first_token"] >= 0 and got["tokens_per_s"] > 0
    sample.main([*argv, "text"])
    assert "boxes" not in json.loads(capsys.readouterr().out)  # text has not seen the picture


def test_empty_answer(run, script, capsys):
    """A model that stops at once gives an empty answer, and valid JSON without a speed."""
    script("")
    sample.main(["--model", str(run), "--prompt", "hm", "--json"])
    got = json.loads(capsys.readouterr().out)
    assert (got["answer"], got["tokens"], got["tokens_per_s"]) == ("", 0, None)


def test_default_workflow(run, picture, script):
    """mm with a picture, text without."""
    calls = script("yes")
    chat = sample.Chat.load(run)
    chat.ask("no picture")
    chat.image = Image.open(picture)
    chat.ask("picture")
    assert [call["workflow"] for call in calls] == ["text", "mm"]


def test_workflow_changes_within_a_dialogue(run, picture, script, monkeypatch, capsys):
    """Placeholders stand in the first turn under an adaptor, leave it under text, come back."""
    calls = script("one", "two", "three")
    feed(monkeypatch, "first", "/workflow text", "second", "/workflow grounding", "third")
    sample.main(["--model", str(run), "--image", str(picture)])
    patches = clip.SIZES["tiny"].patches
    assert [call["workflow"] for call in calls] == ["mm", "text", "grounding"]
    assert [call["ids"].count(IMAGE_ID) for call in calls] == [patches, 0, patches]
    assert [call["images"] is None for call in calls] == [False, True, False]
    text = Tokenizer.load(run / "llama").decode(calls[2]["ids"])
    assert text == ("system\nBox.\nuser\n\nfirst\nassistant\none\n"
                    "user\nsecond\nassistant\ntwo\nuser\nthird\nassistant\n")
    assert calls[2]["ids"].index(IMAGE_ID) < calls[2]["ids"].index(ord("f"))
    assert "grounding> three\n" in capsys.readouterr().out


def test_chat_commands(run, picture, script, monkeypatch, capsys):
    """/help, unknown commands, bad pictures and workflows go on; a new picture starts afresh."""
    calls = script("fine")
    feed(monkeypatch, "", "/help", "/nonsense", "/image /nowhere.png",
         "/image ~nobody-of-that-name/a.png", f"/image '{picture}'", "look", f"/image {picture}",
         "again", "/workflow sound", "/reset", "anew", "/quit", "never asked")
    sample.main(["--model", str(run)])
    said = capsys.readouterr()
    assert said.out.count(sample.HELP) == 2 and "unknown: /nonsense\n" in said.out
    assert "/nowhere.png: no such file" in said.err
    assert "~nobody-of-that-name/a.png: no such file" in said.err
    assert "no adaptor named 'sound'; there are: text, mm, grounding" in said.err
    assert "40 x 30 pixels; workflow mm" in said.out
    assert len(calls) == 3
    asked = zip(calls, ("look", "again", "anew"), strict=True)
    sizes = {len(call["ids"]) - len(question) for call, question in asked}
    assert len(sizes) == 1  # each without a history


def test_adaptors_come_and_go(run, script, monkeypatch, capsys):
    """/load makes a workflow of a folder, /drop forgets it; names and folders are looked at."""
    calls = script("fine")
    feed(monkeypatch, f"/load more '{run / 'grounding'}'", "/workflow more", "hello", "/drop more",
         "hello", "/workflow more", f"/load mm {run / 'grounding'}", f"/load items {run / 'mm'}",
         f"/load other {run / 'nowhere'}", "/drop text", "/load alone", "/quit")
    sample.main(["--model", str(run)])
    said = capsys.readouterr()
    assert [call["workflow"] for call in calls] == ["more", "text"]
    assert "Box." in Tokenizer.load(run / "llama").decode(calls[0]["ids"])  # its own system message
    assert "workflow more loaded\n" in said.out and "workflow more dropped\n" in said.out
    assert [line.split(":")[0] for line in said.err.splitlines()] == [
        "no adaptor named 'more'; there are", "an adaptor cannot be named 'mm'",
        "an adaptor cannot be named 'items'", f"{run / 'nowhere' / 'config.json'}",
        "text is the frozen LLM"]
    assert "unknown: /load alone\n" in said.out


def test_int8_adaptor_joins_an_int8_chat(run):
    """What is loaded while a chat runs is stored as the rest of it."""
    chat = sample.Chat.load(run, torch.bfloat16, int8=True, max_tokens=2)
    chat.load_adaptor("more", run / "mm")
    kinds = [{type(m).__name__ for m in chat.model.adaptors[n].modules()} for n in ("mm", "more")]
    assert "Int8Linear" in kinds[0] and kinds[0] == kinds[1]
    chat.chosen = "more"
    assert chat.ask("what?").workflow == "more"


def test_history_survives_the_first_picture(run, picture, script, monkeypatch):
    """A chat that began without a picture keeps its turns when one is shown, ahead of the first."""
    calls = script("hello")
    feed(monkeypatch, "hi", f"/image {picture}", "and this?")
    sample.main(["--model", str(run)])
    ids = calls[1]["ids"]
    assert calls[1]["workflow"] == "mm"
    assert "hi\nassistant\nhello" in Tokenizer.load(run / "llama").decode(ids)
    assert ids.index(IMAGE_ID) < ids.index(ord("h"), ids.index(IMAGE_ID))


def test_ctrl_c_stops_the_answer_only(run, script, monkeypatch, capsys):
    """Within an answer it keeps what came, at the prompt it leaves."""
    calls = script([*b"half an ans", KeyboardInterrupt], "whole")
    feed(monkeypatch, "one", "two", KeyboardInterrupt(), "never asked")
    sample.main(["--model", str(run)])
    assert "half an ans [stopped]" in capsys.readouterr().out
    kept = Tokenizer.load(run / "llama").decode(calls[1]["ids"])
    assert len(calls) == 2 and "half an ans" in kept


def test_ctrl_c_ends_a_single_question(run, script):
    """Without a chat, Ctrl-C ends the program, without a traceback."""
    script([*b"half", KeyboardInterrupt])
    with pytest.raises(SystemExit, match="stopped"):
        sample.main(["--model", str(run), "--prompt", "one"])


@pytest.mark.parametrize("size, box, drawn", [
    ((100, 50), "[0.1, 0.4, 0.5, 0.6]", (10, 15, 50, 35)),  # landscape: 25 pixels of border above
    ((50, 100), "[0.4, 0.1, 0.6, 0.5]", (15, 10, 35, 50)),  # portrait: 25 to the left
    ((50, 100), "[0.0, 0.5, 1.0, 1.0]", (0, 50, 50, 100)),  # reaches into the border: cut there
    ((600, 500), "[0.1, 0.2, 0.5, 0.6]", (60, 70, 300, 310)),  # large: not enlarged
])
def test_boxes_are_drawn_where_they_are(run, tmp_path, script, size, box, drawn):
    """The outline, found by its colour, spans the box, on the enlarged picture."""
    script(f"Here: {box}.")
    path, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", size, "white").save(path)
    sample.main(["--model", str(run), "--image", str(path), "--prompt", "where?",
                 "--boxes", str(out)])
    picture = Image.open(out)
    scale = picture.width // size[0]
    assert picture.size == (size[0] * scale, size[1] * scale) and max(picture.size) >= 448
    assert picture.point(lambda v: 255 - v).getbbox() == tuple(v * scale for v in drawn)
    x, y = ((drawn[0] + drawn[2]) * scale // 2, (drawn[1] + drawn[3]) * scale // 2)
    assert picture.getpixel((x, y)) == (255, 255, 255)  # an outline, not a patch
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_boxes_are_drawn_on_the_upright_picture(run, tmp_path, script):
    """A picture that its EXIF turns by a quarter is drawn turned."""
    script("[0.0, 0.0, 1.0, 1.0]")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (600, 500)).save(tmp_path / "in.jpg", exif=exif)
    sample.main(["--model", str(run), "--image", str(tmp_path / "in.jpg"), "--prompt", "q",
                 "--boxes", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (500, 600)


def test_no_box_is_said(run, picture, tmp_path, script, capsys):
    """An answer without a box, or with one beside the picture, writes no file and says so."""
    for said in ("I see none.", "[0.9, 0.1, 0.2, 0.3]", "[0.1, 0.0, 0.2, 0.12]"):
        script(said)
        out = tmp_path / "o.png"
        sample.main(["--model", str(run), "--image", str(picture), "--prompt", "q",
                     "--boxes", str(out)])
        assert "no box in the answer" in capsys.readouterr().err and not out.exists()


def test_errors_are_one_line(run, picture, tmp_path, capsys):
    """Every mistake: one line, exit code 1, nothing on stdout."""
    (tmp_path / "text.png").write_text("not a picture")
    ask = ("--model", run, "--prompt", "hello")
    assert "nowhere.png: no such file" in fails(capsys, *ask, "--image", tmp_path / "nowhere.png")
    assert "not a readable picture" in fails(capsys, *ask, "--image", tmp_path / "text.png")
    said = fails(capsys, *ask, "--workflow", "x")
    assert "no adaptor named 'x'; there are: text, mm, grounding" in said
    assert "train.py --config" in fails(capsys, "--model", tmp_path / "none", "--prompt", "hello")
    assert "--image" in fails(capsys, *ask, "--boxes", tmp_path / "b.png")
    ask_of = (*ask, "--image", picture, "--boxes")
    assert ".png or .jpg" in fails(capsys, *ask_of, tmp_path / "b.xyz")
    assert "no such folder" in fails(capsys, *ask_of, tmp_path / "no" / "b.png")
    assert "not fp32" in fails(capsys, *ask, "--quantize", "int8", "--dtype", "fp32")
    assert "--json needs --prompt" in fails(capsys, "--model", run, "--json")
    assert "empty" in fails(capsys, "--model", run, "--prompt", " ")
    for option, value in (("--max-tokens", 0), ("--temperature", -1), ("--temperature", "nan"),
                          ("--top-p", 0), ("--top-p", 1.5), ("--seed", -1)):
        assert f"{option} {value}" in fails(capsys, *ask, option, value)


def test_prompt_longer_than_the_context(run, capsys):
    """The message holds both numbers; a prompt that just leaves room gets a shorter answer."""
    message = fails(capsys, "--model", run, "--prompt", "x" * 400)
    assert "context of 400" in message
    taken = int(message.split(" takes ")[1].split()[0])
    assert taken > 400
    sample.main(["--model", str(run), "--prompt", "x" * (400 - (taken - 400) - 3), "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] <= 3  # a token a letter here


def test_failed_question_leaves_the_history(run, script):
    """A prompt that does not fit does not join the history."""
    script("ok")
    chat = sample.Chat.load(run)
    chat.ask("short")
    with pytest.raises(ValueError, match="context"):
        chat.ask("x" * 500)
    assert chat.turns == [("user", "short"), ("assistant", "ok")]


@pytest.mark.parametrize(("file", "keys", "value", "message"), [
    ("iaa.json", ["llm"], 5, "llm = 5: expected str"),
    ("iaa.json", ["image_token"], "16", "image_token = '16': expected int"),
    ("iaa.json", ["adaptors"], ["mm"], "adaptors = ['mm']: expected dict[str, str]"),
    ("iaa.json", ["adaptors", "mm"], None, "adaptors.mm = None: expected str"),
    ("iaa.json", ["adaptors", "mm"], "nowhere", "nowhere/config.json: no such file"),
    ("iaa.json", ["vision"], "llama", "the vision tower a Llama"),
    ("iaa.json", ["llm"], "clip", "the LLM is a Clip"),
    ("llama/tokenizer.json", ["kind"], "bpe", "kind = 'bpe': tiktoken or sentencepiece"),
    ("llama/tokenizer.json", ["special_tokens"], [], "special_tokens = []: expected dict"),
    ("mm/config.json", ["prompt"], "chatml", "prompt = 'chatml': expected dict[str, str | None]"),
    ("mm/config.json", ["prompt", "system"], 1, "prompt.system = 1: expected str | None"),
    ("mm/config.json", ["prompt", "template"], "llama9", "template 'llama9': there are"),
    ("mm/config.json", ["base"], [], "base = []: expected dict[str, str]"),
    ("mm/config.json", ["base"], {}, "was trained on llama unknown"),
    ("mm/config.json", ["adaptor", "insertion"], 3, "adaptor.insertion = 3: expected tuple"),
    ("mm/config.json", ["adaptor", "depth"], 3, "unknown key 'depth' in"),
    ("mm/config.json", ["adaptor", "structure"], "d", "adaptor: structure = 'd': a, b or c"),
    ("llama/config.json", ["sha256"], None, "sha256 = None: expected str"),
    ("llama/config.json", ["kind"], ["llama"], "kind = ['llama']: expected str"),
    ("llama/config.json", ["config"], [], "config = []: expected"),
    ("llama/config.json", ["config", "width"], "48", "config.width = '48': expected int"),
    ("llama/config.json", ["config", "rope_scaling"], {"factor": "8"}, "factor = '8': expected"),
    ("llama/config.json", ["config", "heads"], 5, "config: heads = 5 is not a multiple"),
    ("clip/config.json", ["config", "mean"], 0.5, "config.mean = 0.5: expected tuple"),
    ("clip/config.json", ["config", "mean"], [0.5], "config.mean = [0.5]: expected tuple"),
])
def test_damaged_settings_are_one_line(run, picture, tmp_path, capsys, file, keys, value, message):
    """A hand-edited file of the model's folder: the message names the place and what is right."""
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / file
    settings = json.loads(path.read_text())
    place = settings
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(settings))
    said = fails(capsys, "--model", tmp_path / "copy", "--image", picture, "--prompt", "hello",
                 "--max-tokens", 1)
    assert message in said


def test_prompt_settings_left_out_are_the_defaults(run, picture, tmp_path, script):
    """An adaptor without a template or a system message takes the tokenizer's own."""
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "mm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt": {}}))
    calls = script("yes")
    for folder in (run, tmp_path / "copy"):
        chat = sample.Chat.load(folder)
        chat.image = Image.open(picture)
        chat.ask("what?")
    assert calls[0]["ids"] == calls[1]["ids"]


def test_cropped_pictures_have_no_boxes(run, picture, tmp_path, script, capsys):
    """Where the tower sees a crop, an answer's box has no place: --boxes is refused, JSON empty."""
    script("It is [0.25, 0.25, 0.5, 0.5]")
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "clip" / "config.json"
    settings = json.loads(path.read_text())
    settings["config"]["aspect"] = "crop"
    path.write_text(json.dumps(settings))
    ask = ("--model", tmp_path / "copy", "--image", picture, "--prompt", "where?")
    assert "crops pictures" in fails(capsys, *ask, "--boxes", tmp_path / "out.png")
    sample.main([*map(str, ask), "--json"])
    assert "boxes" not in json.loads(capsys.readouterr().out)
