"""data.py: rows, batches, boxes, and whatever may break them."""

import errno
import gc
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from PIL import Image, ImageFile

import data
from clip import open_image
from data import UNSCORED, JsonlDataset, RowError, Sampler, encode_row
from tokenization.templates import IMAGE, render

CHATML = byte_tokenizer()


def make_row(*texts: str, image: str | None = "a.png", **more) -> dict:
    """A row whose speakers alternate; the first question gets <image> where there is one."""
    texts = (IMAGE * (image is not None) + texts[0], *texts[1:])
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": "x/train/1", "image": image, "workflow": "mm", "conversations": said} | more


def pixels(path: Path, size: tuple[int, int] | None) -> torch.Tensor:
    """A picture by its first pixel; read as training reads it."""
    red, green, blue = open_image(path, size).getpixel((0, 0))
    return torch.tensor([red, green, blue]).float()[:, None, None].expand(3, 4, 4) / 255


def dataset_of(lines: list[str | bytes | dict], folder: Path, end: bytes = b"\n") -> JsonlDataset:
    """A data set of these lines and one picture, which takes two tokens."""
    texts = [json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line
             for line in lines]
    texts = [text.encode() if isinstance(text, str) else text for text in texts]
    (folder / "rows.jsonl").write_bytes(end.join(texts))
    Image.new("RGB", (3, 2), "red").save(folder / "a.png")
    return JsonlDataset([folder / "rows.jsonl"], folder, CHATML, 2, pixels)


def collated(items: list) -> data.Batch:
    """A batch of fetched rows."""
    return data.collate(items, CHATML.pad_id, CHATML.image_id, 2)


# Rows


def test_targets_are_shifted_once():
    """targets[t] is the token after tokens[t] where scored; never a placeholder."""
    example = encode_row(make_row("Q", "yes no"), CHATML, image_tokens=2, system="")
    turns = [("user", "Q"), ("assistant", "yes no")]
    ids, scored = render(CHATML, turns, system="", image_tokens=2)
    assert example.tokens.tolist() == ids[:-1] and ids.count(CHATML.image_id) == 2
    following = zip(ids[1:], scored[1:], strict=True)
    assert example.targets.tolist() == [t if counts else UNSCORED for t, counts in following]
    wanted = [*b"yes no", CHATML.special("<|im_end|>")]
    assert [t for t in example.targets.tolist() if t != UNSCORED] == wanted
    assert example.positions.tolist() == list(range(len(ids) - 1)) and example.segments.max() == 1


@pytest.mark.parametrize("image", ["a.png", None])
def test_independent_questions_are_as_if_asked_alone(image):
    """Prefix + segment k has the tokens, targets, positions of a row with that question only."""
    pairs = [("What colour?", "red"), ("  12 shapes?", "no, 1"), ("Round?", "yes")]
    row = make_row(*(text for pair in pairs for text in pair), image=image, independent=True)
    packed = encode_row(row, CHATML, 5, system="Be kind.")
    segments = packed.segments.tolist()
    assert segments == sorted(segments) and max(segments) == 3
    for number, pair in enumerate(pairs, 1):
        alone = encode_row(make_row(*pair, image=image), CHATML, 5, system="Be kind.")
        seen = (packed.segments == 0) | (packed.segments == number)
        assert torch.equal(packed.tokens[seen], alone.tokens)
        assert torch.equal(packed.targets[seen], alone.targets)
        assert packed.positions[seen].tolist() == list(range(len(alone.tokens)))
    assert (packed.targets[packed.segments == 0] == UNSCORED).all()
    plain = encode_row(row, CHATML, 5, "plain")  # image, then a caption: there is no other question
    caption = b"red\n" if image else b"ed\n"  # nothing stands before its first letter
    assert bytes(plain.targets[plain.targets >= 0].tolist()) == caption


@pytest.mark.parametrize("independent", [False, True])
def test_long_rows_are_cut_at_the_end(independent):
    """What fits is as in the whole row; a row left unscored is refused."""
    row = make_row("Q", "one two three", "R", "four", independent=independent)
    whole = encode_row(row, CHATML, 4)
    length = len(whole.tokens) - 1
    cut = encode_row(row, CHATML, 4, max_tokens=length)
    assert cut.cut and not whole.cut and not encode_row(row, CHATML, 4, max_tokens=length + 1).cut
    for name in ("tokens", "targets", "positions", "segments"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)[:-1])
    with pytest.raises(RowError, match="no word of an answer within 20 tokens"):
        encode_row(row, CHATML, 4, max_tokens=20)


# Files


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n\r\n"])
def test_line_ends_and_unicode(tmp_path, end):
    """LF, CRLF, empty lines, a byte order mark, no last newline, U+2028 and U+0085 in a text."""
    texts = ["first", "zweite\u2028Zeile\u0085x", "третий", "👍"]
    rows = [make_row(text, "yes", image=None) for text in texts]
    first = b"\xef\xbb\xbf" + json.dumps(rows[0]).encode()
    dataset = dataset_of([first, *rows[1:]], tmp_path, end)
    assert [dataset.row(n)["conversations"][0]["value"] for n in range(len(dataset))] == texts
    assert dataset.lines["number"].tolist() == [1 + n * end.count(b"\n") for n in range(4)]


def test_several_files_are_one_data_set(tmp_path):
    """Rows of all files in order, each named by its own file; missing and empty files at once."""
    rows = [make_row(f"Q{n}", "A", image=None) for n in range(5)]
    names = [str(tmp_path / name) for name in ("one", "none", "two")]
    for name, part in zip(names, (rows[:2], [], [*rows[2:], {}]), strict=True):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in part))
    dataset = JsonlDataset(names, tmp_path, CHATML)
    assert [dataset.row(n) for n in range(5)] == rows and len(dataset) == len(dataset.lengths) == 6
    assert dataset[5][2][0].startswith(f"{names[2]}:4: ")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        JsonlDataset([*names, tmp_path / "nowhere.jsonl"], tmp_path)
    for content in ([], ["", "", ""]):
        with pytest.raises(ValueError, match="no rows in .*rows.jsonl"):
            dataset_of(content, tmp_path)


def test_fingerprint(tmp_path):
    """Of one and the same bytes a literal; a changed byte or size shows, at either end too."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 20)
    blocks = b"x" * 20 * data.BLOCKS  # a short file is in every block
    wanted = f"20 bytes, sha256 {hashlib.sha256(blocks).hexdigest()}"
    assert data.fingerprint([path]) == {str(path): wanted}
    seen, content = set(), bytearray(1_000_000)  # within 16 MiB no byte is left out
    for place in (None, 0, 65_535, 65_536, 333_333, 999_999):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        seen |= {*data.fingerprint([str(path)]).values()}
    path.write_bytes(content[:-1])
    assert len(seen | {*data.fingerprint([path]).values()}) == 7
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        data.fingerprint([tmp_path / "none.jsonl"])


def bad(*texts: str, **more) -> str:
    """A row with something wrong, as a line."""
    return json.dumps(make_row(*texts or ("Q", "A"), **more))


NO_ROW, TURNS = "not a row as in docs/data.md", "turns must be of human and gpt in turn"
BAD_ROWS = {
    "{": "Expecting property name",
    "[" * 100_000: "recursion",
    b"\xff\xfe{}": "can't decode",
    "[1]": NO_ROW,
    "{}": f"{NO_ROW}: KeyError('conversations')",
    bad(conversations=[3, 4]): NO_ROW,
    bad("Q"): TURNS,
    bad(conversations=[]): TURNS,
    bad(conversations=[{"from": "gpt", "value": "x"}]): TURNS,
    bad("Q", " "): "a turn has no text",
    json.dumps(make_row("Q", "A", image=None) | {"image": "a.png"}): "0 times '<image>'",
    json.dumps(make_row("Q", "A") | {"image": None}): "1 times '<image>': it must be once in the",
    bad("<image>\nQ", "A"): "2 times '<image>'",
    bad("Q", "A <image>"): "2 times '<image>'",
    bad("Q", "A <image>", image=None): "1 times '<image>'",
    bad("Q", "A", "<image>\nR", "B"): "2 times '<image>'",
    bad("Q", "A", "<image>\nR", "B", image=None): "1 times '<image>'",
    bad(image=None, images=["a.png"]): "a picture under 'images': it must be under 'image'",
    bad(image=None, Image="a.png"): "a picture under 'Image'",
    bad(image=None, video="a.mp4"): "a picture under 'video'",
    bad(image=None, media=[{"url": "http://example.invalid/a.JPG"}]): "a picture under 'media'",
    bad(image=7): "'image' must be a path, or null",
    bad(image=["a.png"]): "'image' must be a path, or null",
    bad(image=""): "'image' must be a path, or null",
    bad(boxes=[[0, 0, 1, 1]], width=3): f"{NO_ROW}: KeyError('height')",
    bad(boxes=[[0, 0, 1, 1]], width=2, height=3): "upright it has 3 x 2 pixels, its boxes are for "
                                                  "2 x 3",
    bad(image="b.png"): "'b.png' does not exist",
    bad(image="../rows.jsonl"): "is not below",
    bad(image="/etc/passwd"): "is not below",
    bad(image="link/passwd"): "is not below",
    bad(image="a\0.png"): "null byte",
    bad(image="."): "does not exist",
    bad(image="pipe"): "does not exist",
    bad(image="x" * 5000): "rows.jsonl:34: image 'xxx",
    bad(image="cut.png"): "cut.png: not a readable picture",
    bad(image="loop"): "does not exist",
    bad(image="rows.jsonl"): "rows.jsonl: not a readable picture",
}


def test_bad_rows_are_skipped_and_named(tmp_path):
    """Every kind of broken row gives way to the next good one, with file, line and reason."""
    good = make_row("Q", "A")
    dataset = dataset_of([*BAD_ROWS, good], tmp_path)
    os.symlink("/etc", tmp_path / "link")
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    noise.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    example, image, skipped = dataset.__getitem__(0)
    for number, (said, reason) in enumerate(zip(skipped, BAD_ROWS.values(), strict=True), 1):
        assert f"rows.jsonl:{number}: " in said and reason in said and "\n" not in said
    assert torch.equal(example.tokens, encode_row(good, CHATML, 2).tokens)
    assert image.shape == (3, 4, 4) and dataset.__getitem__(len(BAD_ROWS))[2] == []
    mostly_bad = dataset_of(["{..."] * data.MAX_SKIPPED + [good], tmp_path)
    with pytest.raises(
            ValueError, match="none of 100 consecutive rows can be used: .*rows.jsonl:1: "):
        mostly_bad.__getitem__(0)
    assert len(mostly_bad.__getitem__(1)[2]) == 99


def test_rows_with_the_tag_elsewhere_are_as_with_the_tag_in_front(tmp_path):
    """The picture comes ahead of its question; none of the tag's letters reaches the tokenizer."""
    texts = ["<image>\nWhat?", "<image> What?", "<image>\r\nWhat?", "What?\n<image>"]
    dataset = dataset_of([make_row("-", "A cat.") | {"conversations": [
        {"from": "human", "value": text}, {"from": "gpt", "value": "A cat."}]} for text in texts],
        tmp_path)
    tokens = [dataset[number][0].tokens.tolist() for number in range(4)]
    asked = bytes(token for token in tokens[0] if token < 256).decode()
    assert tokens == [tokens[0]] * 4 and "user\n\nWhat?\nassistant" in asked
    caption = make_row("", "A cat.")  # its question is "<image>\n" alone
    del caption["workflow"]
    plain = encode_row(data.check_row(caption), CHATML, 2, "plain")
    assert plain.tokens.tolist() == [258, 258, *b"A cat."]
    text = make_row("Q", "A", image=None)
    del text["image"]  # as in LLaVA's own records without a picture
    assert dataset_of([text], tmp_path)[0][1:] == (None, [])


def test_boxes_are_for_the_picture_as_it_is_opened(tmp_path):
    """A row whose boxes are for the stored pixels of a turned picture is skipped, and this said."""
    rows = [make_row("Q", "A", image="turned.jpg", boxes=[[0, 0, 1, 1]], width=width, height=height)
            for width, height in ((60, 40), (40, 60))]
    dataset, exif = dataset_of(rows, tmp_path), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert dataset[1][2] == []
    assert dataset[0][2] == [f"{tmp_path}/rows.jsonl:1: {tmp_path}/turned.jpg: upright it has "
                             "40 x 60 pixels, its boxes are for 60 x 40"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("fault", "said"), [
    (MemoryError(), "not enough memory to decode it"),
    (OSError("out of memory error when reading image file"), "not enough memory to decode it"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error")])
def test_only_a_broken_picture_is_skipped(tmp_path, monkeypatch, workers, fault, said):
    """Lack of memory and a failing disk stop the run with one line, also in a worker."""
    dataset = dataset_of([make_row("Q", "A")], tmp_path)

    def fail(*args, **more):
        raise fault

    at_disk = fault.args[:1] == (errno.EIO,)
    monkeypatch.setattr(*(Path, "read_bytes") if at_disk else (ImageFile.ImageFile, "load"), fail)
    with pytest.raises(OSError, match=said) as stopped:
        list(data.loader(dataset, [[0]], workers))
    assert "\n" not in str(stopped.value)
    del stopped
    gc.collect()  # its traceback holds the loader, which ends the worker


# Batches


@pytest.mark.parametrize(("rows", "batch_size", "window"), [
    (96, 8, 3), (97, 8, 4), (10, 4, 16), (3, 8, 16)])
def test_every_row_once_an_epoch(rows, batch_size, window):
    """After k epochs' worth of windows each row has come k times, up to the epoch just entered."""
    sampler, counts = Sampler(np.arange(rows) % 7, batch_size, seed=1, window=window), Counter()
    for step in range(rows * sampler.window):  # a whole number of windows and of epochs
        counts.update(sampler.rows(step))
    assert set(counts) == set(range(rows)) and set(counts.values()) == {batch_size * sampler.window}


def test_a_step_decides_its_rows():
    """The same seed gives the same rows, another seed or epoch others."""
    lengths = np.random.default_rng(0).integers(50, 900, 1000)
    sampler, again, other = (Sampler(lengths, 8, seed) for seed in (3, 3, 4))
    steps = [0, 17, 124, 125, 299]
    rows = [sampler.rows(step) for step in steps]
    assert [again.rows(step) for step in reversed(steps)] == rows[::-1]
    assert [other.rows(step) for step in steps] != rows
    epochs = [[sampler.rows(step) for step in range(n * 125, n * 125 + 125)] for n in (0, 1)]
    assert epochs[0] != epochs[1]


def test_rows_of_similar_length_go_together():
    """Padding of long-tailed lengths stays under 10 %; unsorted batches have over 30 %."""
    lengths = np.exp(np.random.default_rng(0).normal(5, 0.5, 20000)).astype(int)

    def padding(batches):
        filled = sum(len(b) * lengths[b].max() for b in batches)
        return 1 - sum(lengths[b].sum() for b in batches) / filled

    sampler = Sampler(lengths, 8, seed=0)
    assert padding([sampler.rows(step) for step in range(500)]) < 0.1
    assert padding(np.arange(20000).reshape(-1, 8)) > 0.3


def test_batch_of_mixed_rows(tmp_path):
    """Right padding, seen by none; positions and segments only where a row has several questions.
    """
    rows = [make_row("Q", "A"), make_row("Q", "A", "R", "B", independent=True),
            make_row("Text?", "C", image=None)]
    dataset = dataset_of(rows, tmp_path)
    items = [dataset[n] for n in range(3)]
    batch = collated(items)
    assert batch.images.shape == (2, 3, 4, 4) and batch.skipped == []
    assert batch.lengths.tolist() == [len(example.tokens) for example, _, _ in items]
    pads = {"tokens": CHATML.pad_id, "targets": UNSCORED, "positions": 0, "segments": -1}
    for line, (example, _, _) in enumerate(items):
        for name, pad in pads.items():
            found, wanted = getattr(batch, name)[line], getattr(example, name)
            assert torch.equal(found[: len(wanted)], wanted) and (found[len(wanted) :] == pad).all()
    assert batch.segments.amax(1).tolist() == [1, 2, 1]
    assert batch.scored == sum(int((e.targets != UNSCORED).sum()) for e, _, _ in items)
    moved = vars(batch.to("meta")).values()
    assert [v.device.type for v in moved if isinstance(v, torch.Tensor)] == ["meta"] * 6
    plain = collated([items[0], items[2]])
    assert plain.positions is None and plain.segments is None
    assert collated([items[2]]).images is None


def test_placeholders_must_match_images(tmp_path):
    """Both numbers are named where placeholders and pictures differ."""
    example, image, _ = dataset_of([make_row("Q", "A")], tmp_path)[0]
    for pixels, tokens, said in ((image, 3, "1 images of 3"), (None, 2, "0 images of 2")):
        with pytest.raises(ValueError, match=f"2 image placeholders for {said} tokens"):
            data.collate([(example, pixels, [])], 0, CHATML.image_id, tokens)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(tmp_path, workers):
    """Batches come in order, with or without workers, of an endless stream; closing ends it.

    What stops a run is one line, also where a worker found it.
    """
    rows = [make_row("Q" * (n + 1), "A") for n in range(6)]
    dataset = dataset_of([*rows, "{broken"], tmp_path)
    sampler = Sampler(dataset.lengths, 2, seed=0)
    before = torch.random.get_rng_state()
    batches = data.loader(dataset, (sampler.rows(step) for step in range(10**9)), workers)
    for step in range(5):
        batch = next(batches)
        wanted = collated([dataset[row] for row in sampler.rows(step)])
        for name in ("tokens", "targets", "images"):
            assert torch.equal(getattr(batch, name), getattr(wanted, name))
        assert batch.skipped == wanted.skipped
    assert torch.equal(torch.random.get_rng_state(), before)
    batches.close()
    assert multiprocessing.active_children() == []
    dataset = dataset_of(["{broken", "[]"], tmp_path)
    message = r"^none of 2 consecutive rows can be used: .*rows.jsonl:1: [^\n]*$"
    with pytest.raises(ValueError, match=message):
        list(data.loader(dataset, [[0], [1]], workers))


# Boxes


@pytest.mark.parametrize(("boxes", "size", "text"), [
    ([(100, 50, 300, 250)], (640, 480), "[0.16, 0.2, 0.47, 0.52]"),
    ([(0, 0, 640, 480)], (640, 480), "[0.0, 0.12, 1.0, 0.88]"),
    ([(-9, -9, 999, 999)], (480, 640), "[0.12, 0.0, 0.88, 1.0]"),
    ([(10, 20, 110, 220), (300, 100, 420, 400)], (427, 640),
     "[0.18, 0.03, 0.34, 0.34]; [0.63, 0.16, 0.82, 0.62]"),
    ([(5, 5, 5, 9), (9, 9, 5, 12), (700, 5, 800, 9), (1, 1, 2, 2)], (640, 480), ""),
])
def test_boxes_as_text(boxes, size, text):
    """Worked values; what is empty, reversed or outside is dropped."""
    assert data.boxes_to_text(boxes, *size) == text


def test_text_as_boxes():
    """Back in pixels, IoU 0.961 with the box it came from; compact and spaced, one and several."""
    (box,) = data.text_to_boxes("[0.16, 0.2, 0.47, 0.52]", 640, 480)
    assert box == pytest.approx((102.4, 48.0, 300.8, 252.8))
    assert data.iou(box, (100, 50, 300, 250)) == pytest.approx(0.961, abs=5e-4)
    several = "[0.78,0.33,1.0,0.86]; [ 0 , 0.1,0.5 ,1]. [0.1, 0.2, 0.3, 0.4]"
    assert len(data.text_to_boxes(several, 9, 9)) == 3


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (500, 500), (427, 641)])
def test_boxes_there_and_back(width, height):
    """Landscape, portrait, square, odd: within a rounding step of the side, then the same text."""
    first = [(0.2 * width, 0.1 * height, 0.7 * width, 0.9 * height), (0, 0, width, height)]
    text = data.boxes_to_text(first, width, height)
    boxes = data.text_to_boxes(text, width, height)
    for box, truth in zip(boxes, first, strict=True):
        assert max(abs(a - b) for a, b in zip(box, truth, strict=True)) <= 0.01 * max(width, height)
    assert data.boxes_to_text(boxes, width, height) == text


@pytest.mark.parametrize("text", [
    "", "no box", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4, 0.5]", "[0.5, 0.2, 0.3, 0.4]",
    "[0.1, 0.2, 0.1, 0.4]", "[-0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 1.01]", "[16, 20, 47, 52]",
    "[nan, 0, 1, 1]", "[0, 0, inf, 1]", "[1e-2, 0, 1, 1]", "[.1, .2, .3, .4]",
    "[0.1; 0.2; 0.3; 0.4]", "[0x0, 0, 1, 1]", "[\u0660.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 0.4",
    "[[" * 20000, "[0.1, " * 20000, "[" + "9" * 100000,
], ids=lambda text: text[:20])
def test_what_is_no_box(text):
    """Malformed, out of range and hostile answers name no box, and quickly so."""
    assert data.text_to_boxes(text, 640, 480) == []


def test_iou():
    """Literals: the same box, half, a corner, touching, apart, empty."""
    a = (0, 0, 2, 2)
    others = [a, (0, 0, 1, 2), (1, 1, 3, 3), (2, 0, 4, 2), (5, 5, 6, 6), (1, 1, 1, 1)]
    assert [data.iou(a, b) for b in others] == [1.0, 0.5, pytest.approx(1 / 7), 0.0, 0.0, 0.0]
