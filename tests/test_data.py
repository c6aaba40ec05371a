"""data.py: rows, batches, boxes, and whatever may break them."""

import errno
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, talk, write_rows
from PIL import Image, ImageFile

import data
from clip import open_image
from data import UNSCORED, JsonlDataset, RowError, Sampler, check_row, encode_row
from tokenization.templates import IMAGE

CHATML = byte_tokenizer()
START, END, P = 256, 257, [258, 258]  # ids of <|im_start|>, <|im_end|>, and a picture of two tokens
COLOURS = {"a.png": 200, "b.png": 40, "c.png": 80, "d.png": 120, "e.png": 160}  # shades of red
FIVE = [*COLOURS]


def make_row(*texts: str, image: str | list | None = "a.png", **more) -> dict:
    """A row whose speakers alternate; without a tag, pictures open the first question."""
    if not any("<image>" in text for text in texts):
        texts = (IMAGE * (len(image) if isinstance(image, list) else image is not None) + texts[0],
                 *texts[1:])
    return {"id": "x/train/1", "image": image, "conversations": talk(*texts)} | more


def pixels(path: Path, size: tuple[int, int] | None) -> torch.Tensor:
    """A picture by its first pixel; read as training reads it."""
    red, green, blue = open_image(path, size).getpixel((0, 0))
    return torch.tensor([red, green, blue])[:, None, None].expand(3, 4, 4)


def dataset_of(lines: list[str | bytes | dict], folder: Path, end: bytes = b"\n") -> JsonlDataset:
    """A data set of these lines and five pictures, each of which takes two tokens."""
    texts = [json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line
             for line in lines]
    texts = [text.encode() if isinstance(text, str) else text for text in texts]
    (folder / "rows.jsonl").write_bytes(end.join(texts))
    for name, red in COLOURS.items():
        Image.new("RGB", (3, 2), (red, 0, 0)).save(folder / name)
    return JsonlDataset([folder / "rows.jsonl"], folder, CHATML, 2, pixels)


def collated(items: list) -> data.Batch:
    """A batch of fetched rows."""
    return data.collate(items, CHATML.pad_id)


def answers(example: data.Example) -> list[int]:
    """The targets that are scored."""
    return [token for token in example.targets.tolist() if token != UNSCORED]


def test_tokens_and_targets_of_several_pictures():
    """Literal ids; targets are the next tokens of answers and their ends alone.

    A line end follows pictures that open a question; others stand as they are written.
    """
    row = make_row("<image> \r\n<image>Compare.", "Alike.", "And\n<image> here, <image>?", "No",
                   image=FIVE[:4])
    ids = [START, *b"user\n", *P, 10, *P, 10, *b"Compare.", END, 10, START, *b"assistant\n",
           *b"Alike.", END, 10, START, *b"user\nAnd\n", *P, *b" here, ", *P, *b"?", END, 10,
           START, *b"assistant\n", *b"No", END]
    example = encode_row(row, CHATML, 2, system="")
    assert example.tokens.tolist() == ids[:-1] and (example.pictures, example.cut) == (4, False)
    assert answers(example) == [*b"Alike.", END, *b"No", END]
    shifted = torch.tensor(ids[1:])
    assert torch.equal(example.targets, shifted.where(example.targets != UNSCORED, UNSCORED))
    assert example.positions.tolist() == list(range(len(ids) - 1)) and example.segments.max() == 1
    plain = encode_row(row, CHATML, 2, "plain")
    assert (plain.tokens.tolist(), plain.pictures) == ([*P, *P, *b"Alike."], 2)
    # A question of the tag alone; columns that other rows have; a tag in the system message.
    caption = make_row("<image>", "A cat.", boxes=None, width=None, independent=None)
    tokens = encode_row(data.check_row(caption), CHATML, 2, system="<image>").tokens.tolist()
    assert data.frame_of(caption) is None
    assert tokens == [START, *b"user\n", *P, 10, END, 10, START, *b"assistant\nA cat."]


@pytest.mark.parametrize("image", ["a.png", FIVE[:2], None])
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
        assert packed.pictures == alone.pictures
    assert (packed.targets[packed.segments == 0] == UNSCORED).all()
    plain = encode_row(row, CHATML, 5, "plain")  # image, then a caption: there is no other question
    assert bytes(answers(plain)) == (b"red\n" if image else b"ed\n")  # nothing is ahead of the "r"
    nested = make_row("<im<image>age>Q", "A", independent=True)  # taking one tag out makes another
    assert encode_row(nested, CHATML, 5).pictures == 1
    with pytest.raises(data.RowError, match="no word of an answer within 99 tokens"):
        encode_row(row | {"image": FIVE * 9}, CHATML, 5, max_tokens=99)
    behind = {"from": "human", "value": "What colour?\n" + IMAGE * packed.pictures}
    row["conversations"][0] = behind  # these come first for all, wherever their tags stand
    assert torch.equal(encode_row(row, CHATML, 5, system="Be kind.").tokens, packed.tokens)


@pytest.mark.parametrize("independent", [False, True])
def test_long_rows_are_cut_at_the_end(tmp_path, independent):
    """What fits is as in the whole row, but for a part of a picture; no answer left: refused."""
    texts = ("one", "two <image>, <image>", "<image>\nthree") if not independent else (
        IMAGE * 4 + "one", "two", "three")
    row = make_row(texts[0], "A", texts[1], "B", texts[2], "C", independent=independent,
                   image=FIVE[:4 if independent else 3])
    dataset = dataset_of([row], tmp_path)
    whole, first = dataset[0][0], dataset[0][0].targets.tolist().index(ord("A")) + 1
    for length in range(first, len(whole.tokens) + 1):
        dataset.max_tokens = length
        example, images, _ = dataset[0]
        kept, left_out = len(example.tokens), whole.tokens[:length].tolist().count(258) % 2
        assert kept == length - left_out and example.cut == (kept < len(whole.tokens))
        assert len([] if images is None else images) == example.pictures
        assert example.tokens.tolist().count(258) == 2 * example.pictures
        for name in ("tokens", "targets", "positions", "segments"):
            assert torch.equal(getattr(example, name), getattr(whole, name)[:kept])
    with pytest.raises(RowError, match=f"no word of an answer within {first - 1} tokens"):
        encode_row(row, CHATML, 2, max_tokens=first - 1)


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
    del rows[0]["image"]  # as in LLaVA's own records without a picture
    names = [str(tmp_path / name) for name in ("one", "none", "two")]
    for name, part in zip(names, (rows[:2], [], [*rows[2:], {}]), strict=True):
        write_rows(Path(name), part)
    dataset = JsonlDataset(names, tmp_path, CHATML)
    assert [dataset.row(n) for n in range(5)] == rows and len(dataset) == len(dataset.lengths) == 6
    assert dataset[0][1] is None and dataset[5][2][0].startswith(f"{names[2]}:4: ")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        JsonlDataset([*names, tmp_path / "nowhere.jsonl"], tmp_path)
    with pytest.raises(ValueError, match="no rows in .*rows.jsonl"):
        dataset_of(["", "", ""], tmp_path)


def test_fingerprint(tmp_path):
    """Of one and the same bytes a literal; a changed byte or size shows, at either end too."""
    path, seen, content = tmp_path / "rows.jsonl", set(), bytearray(1_000_000)
    path.write_bytes(b"x" * 20)
    blocks = b"x" * 20 * data.BLOCKS  # a short file is in every block
    wanted = f"20 bytes, sha256 {hashlib.sha256(blocks).hexdigest()}"
    assert data.fingerprint([path]) == {str(path): wanted}
    for place in (0, 65_535, 65_536, 333_333, 999_999):  # within 16 MiB no byte is left out
        content[place] ^= 1
        path.write_bytes(content)
        seen |= {*data.fingerprint([str(path)]).values()}
    path.write_bytes(content[:-1])
    assert len(seen | {*data.fingerprint([path]).values()}) == 6


def bad(*texts: str, **more) -> str:
    """A row with something wrong, as a line."""
    return json.dumps(make_row(*texts or ("Q", "A"), **more))


NO_ROW = "not a row as in docs/data.md"
NO_PATH = "'image' must be a path, a list of paths, or null"
BAD_ROWS = {
    "{": "Expecting property name",
    "[" * 100_000: "recursion",
    b"\xff\xfe{}": "can't decode",
    "[1]": NO_ROW,
    bad(conversations=[3, 4]): NO_ROW,
    bad("Q"): "turns must be of human and gpt in turn",
    bad(conversations=[]): "turns must be of human and gpt in turn",
    bad("Q", " "): "a turn has no text",
    json.dumps(make_row("Q", "A", image=None) | {"image": FIVE[:2]}):
        "2 pictures, but '<image>' 0 times in questions and 0 in answers: each picture needs one",
    json.dumps(make_row("Q", "A") | {"image": None}): "0 pictures, but '<image>' 1 times in quest",
    bad("Q", "A <image>"): "1 pictures, but '<image>' 0 times in questions and 1 in answers",
    bad("<image>", "A", "<image>\nR", "B"): "1 pictures, but '<image>' 2 times in questions",
    bad(image=None, images=["a.png"]): "a picture under 'images': it must be under 'image'",
    bad(image=None, media=[{"url": "http://example.invalid/a.JPG"}]): "a picture under 'media'",
    bad(image=7): NO_PATH,
    bad(image=[]): NO_PATH,
    bad(image=["a.png", ""]): NO_PATH,
    bad(boxes=[[0, 0, 1, 1]], width=3): f"{NO_ROW}: KeyError('height')",
    bad(image=["a.png", "z.png"]): "'z.png' does not exist",
    bad(image="../rows.jsonl"): "is not below",
    bad(image="link/passwd"): "is not below",
    bad(image="a\0.png"): "null byte",
    bad(image="pipe"): "does not exist",
    bad(image="x" * 5000): "rows.jsonl:24: image 'xxx",
    bad(image="cut.png"): "cut.png: not a readable picture",
    bad(image="loop"): "does not exist",
    bad(image="turned.jpg", boxes=[], width=60, height=40): "turned.jpg: upright it has 40 x 60",
    bad(image=None, conversations=[talk("Q")[0] | {"image": "a.png"}, *talk("A", first=1)]):
        "a picture under 'image': it must be under 'image'",
    bad("Q", "A", independent="false"): "'independent' must be true or false",
}


def test_bad_rows_are_skipped_and_named(tmp_path):
    """Every kind of broken row gives way to the next good one, with file, line and reason."""
    good = make_row("Q", "A", image=["a.png", "turned.jpg"], boxes=[[0, 0, 1, 1]], width=40,
                    height=60)  # boxes are for the last picture, upright
    dataset, exif = dataset_of([*BAD_ROWS, good], tmp_path), Image.Exif()
    os.symlink("/etc", tmp_path / "link")
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    noise.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    example, images, skipped = dataset[0]
    for number, (said, reason) in enumerate(zip(skipped, BAD_ROWS.values(), strict=True), 1):
        assert f"rows.jsonl:{number}: " in said and reason in said and "\n" not in said
    assert torch.equal(example.tokens, encode_row(good, CHATML, 2).tokens)
    assert images.shape == (2, 3, 4, 4) and dataset[len(BAD_ROWS)][2] == []
    mostly_bad = dataset_of(["{..."] * data.MAX_SKIPPED + [good], tmp_path)
    with pytest.raises(
            ValueError, match="none of 100 consecutive rows can be used: .*rows.jsonl:1: "):
        mostly_bad[0]
    assert len(mostly_bad[1][2]) == 99


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
    assert "\n" not in str(stopped.value) and multiprocessing.active_children() == []


@pytest.mark.parametrize(("rows", "batch_size", "window"), [
    (96, 8, 3), (97, 8, 4), (21, 8, 16), (10, 4, 16), (3, 8, 16)])
def test_every_row_once_an_epoch_and_a_batch(rows, batch_size, window):
    """In whole epochs all rows come equally often, in a batch once, where there are enough."""
    sampler, counts = Sampler(np.arange(rows) % 7, batch_size, seed=1, window=window), Counter()
    for step in range(rows * sampler.window):  # a whole number of windows and of epochs
        batch = sampler.rows(step)
        assert len(set(batch)) == min(batch_size, rows)
        counts.update(batch)
    assert set(counts) == set(range(rows)) and set(counts.values()) == {batch_size * sampler.window}


def test_a_step_decides_its_rows():
    """The same seed gives the same rows, another seed or epoch others."""
    lengths = np.random.default_rng(0).integers(50, 900, 1000)
    rows, again, other = ([Sampler(lengths, 8, seed, 1).rows(step) for step in (*range(250), 0)]
                          for seed in (3, 3, 4))
    assert rows == again != other and rows[0] == rows[250] and rows[:125] != rows[125:250]


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
    """0, 1, 2 and 5 pictures, cut and uncut: a row in a batch is as alone, padded on the right."""
    rows = [make_row("Text?", "C", image=None), make_row("What is this?\n<image>", "A"),
            make_row("Q", "A", "R", "B", independent=True, image=FIVE[1:3]),
            make_row("<image>Q <image>", "A", "<image> <image>", "B", "R, <image>", "C",
                     image=FIVE[::-1])]
    dataset = dataset_of(rows, tmp_path)
    items = [dataset[n] for n in range(4)]
    dataset.max_tokens = len(items[3][0].tokens) - 20  # its fifth picture is left out
    items.append(dataset[3])
    batch = collated(items)
    assert [example.pictures for example, _, _ in items] == [0, 1, 2, 5, 4] and batch.cut == 1
    shown = [COLOURS[name] for name in (*FIVE[:3], *FIVE[::-1], *FIVE[:0:-1])]
    assert batch.images[:, 0, 0, 0].tolist() == shown and batch.images.shape == (12, 3, 4, 4)
    assert (batch.tokens == 258).sum(1).tolist() == [0, 2, 4, 10, 8]
    assert not (batch.targets == 258).any()
    assert batch.lengths.tolist() == [len(example.tokens) for example, _, _ in items]
    pads = {"tokens": CHATML.pad_id, "targets": UNSCORED, "positions": 0, "segments": -1}
    for line, (example, _, _) in enumerate(items):
        for name, pad in pads.items():
            found, wanted = getattr(batch, name)[line], getattr(example, name)
            assert torch.equal(found[: len(wanted)], wanted) and (found[len(wanted) :] == pad).all()
    assert batch.segments.amax(1).tolist() == [1, 1, 2, 1, 1] and batch.skipped == []
    assert batch.scored == sum(len(answers(example)) for example, _, _ in items)
    moved = vars(batch.to("meta")).values()
    assert [v.device.type for v in moved if isinstance(v, torch.Tensor)] == ["meta"] * 6
    plain = collated(items[:2])  # causal text needs no mask
    assert plain.positions is None and plain.segments is None
    assert collated(items[:1]).images is None


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(tmp_path, workers):
    """Batches in order, of an endless stream; closing ends it; what stops a run is one line."""
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
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("boxes", "size", "text"), [
    ([(100, 50, 300, 250)], (640, 480), "[0.16, 0.2, 0.47, 0.52]"),
    ([(0, 0, 640, 480)], (640, 480), "[0.0, 0.12, 1.0, 0.88]"),
    ([(-9, -9, 999, 999)], (480, 640), "[0.12, 0.0, 0.88, 1.0]"),
    ([(10, 20, 110, 220), (300, 100, 420, 400)], (427, 640),
     "[0.18, 0.03, 0.34, 0.34]; [0.63, 0.16, 0.82, 0.62]"),
    ([(5, 5, 5, 9), (9, 9, 5, 12), (700, 5, 800, 9), (1, 1, 2, 2)], (640, 480), "")])
def test_boxes_as_text(boxes, size, text):
    """Worked values, what is empty, reversed or outside is dropped; back in pixels within 1 %."""
    assert data.boxes_to_text(boxes, *size) == text
    for box, truth in zip(data.text_to_boxes(text, *size), boxes if text else (), strict=True):
        inside = [min(max(v, 0), size[n % 2]) for n, v in enumerate(truth)]
        assert box == pytest.approx(inside, abs=0.01 * max(size)) and data.iou(box, inside) > 0.94
    assert data.boxes_to_text(data.text_to_boxes(text, *size), *size) == text


@pytest.mark.parametrize("text", [
    "", "no box", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4, 0.5]", "[0.5, 0.2, 0.3, 0.4]",
    "[0.1, 0.2, 0.1, 0.4]", "[-0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 1.01]", "[16, 20, 47, 52]",
    "[nan, 0, 1, 1]", "[0, 0, inf, 1]", "[1e-2, 0, 1, 1]", "[.1, .2, .3, .4]",
    "[0.1; 0.2; 0.3; 0.4]", "[0x0, 0, 1, 1]", "[\u0660.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 0.4",
    "[[" * 20000, "[0.1, " * 20000, "[" + "9" * 100000,
], ids=lambda text: text[:20])
def test_what_is_no_box(text):
    """Malformed, out of range and hostile answers name no box, and quickly so; others beside do."""
    several = "[0.78,0.33,1.0,0.86]; [ 0 , 0.1,0.5 ,1]. "
    assert len(data.text_to_boxes(several + text, 640, 480)) == 2


def test_iou():
    """Literals: the same box, half, a corner, touching, apart, empty."""
    a = (0, 0, 2, 2)
    others = [a, (0, 0, 1, 2), (1, 1, 3, 3), (2, 0, 4, 2), (5, 5, 6, 6), (1, 1, 1, 1)]
    assert [data.iou(a, b) for b in others] == [1.0, 0.5, pytest.approx(1 / 7), 0.0, 0.0, 0.0]


@pytest.mark.parametrize("place", ["row", "turn"])
def test_a_second_picture_under_another_key(place):
    """It is refused beside a picture of the row's own, too."""
    record = {"image": "0.png", "conversations": talk("<image>\nWhat?", "A cat", "This?", "A dog")}
    if place == "row":
        record["images"] = ["0.png", "1.png"]
    else:
        record["conversations"][2]["image"] = "1.png"
    with pytest.raises(RowError, match="a picture under 'image"):
        check_row(record)
