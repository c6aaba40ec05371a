"""Score a model, and show what the paper claims first: text-only answers are the frozen model's.

    python eval.py easy-vqa data/easy-vqa --model runs/demo   the demo's table
    python eval.py text README.md --model runs/demo           the text workflow against plain Llama

easy-VQA: every question is answered greedily, as if asked alone; right means the expected word.
Grounding: precision at IoU 0.5 of the answer's first box. Answers are written as they come to
`answers-easy-vqa.jsonl` in the model's folder.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError

from ask import Asker, Question
from chat import IMAGE, Tokenizer
from data import JsonlDataset, iou, text_to_boxes
from files import read_json
from iaa import IAA, TEXT, load_base, load_iaa

KINDS = ("colour", "shape", "yes/no")
IDENTICAL = "text-only logits identical to the base model"


def question_kind(answer: str) -> str:
    """The table's row for an expected answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("rectangle", "circle", "triangle") else "colour"


def single_questions(row: dict) -> list[tuple[str, str, str]]:
    """(picture, question, answer) of every question of a row."""
    turns = [turn["value"].removeprefix(IMAGE) for turn in row["conversations"]]
    return [(row["image"], q, a) for q, a in zip(turns[::2], turns[1::2], strict=True)]


def chosen_questions(dataset: JsonlDataset, limit: int, seed: int) -> list[tuple[str, str, str]]:
    """(picture, question, answer) of all questions about pictures drawn by `seed`, up to `limit`.

    Drawn by picture: what is asked about one picture shares the work of looking at it.
    """
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    found = []
    for i in order:
        if len(found) >= limit:
            break
        found += single_questions(dataset.row(i))
    return found[:limit]


def easy_vqa(data: Path, asker: Asker, limit: int, seed: int, out: TextIO) -> dict:
    """Counts of right answers by kind and of grounded pictures, `limit` of each at most."""
    asked = chosen_questions(JsonlDataset([data / "test-questions.jsonl"], data), limit, seed)
    right, total = Counter(), Counter()
    questions = [Question(f"{n}", text, data / image) for n, (image, text, _) in enumerate(asked)]
    for i, answer in asker.ask(questions, "mm", 8):
        image, question, expected = asked[i]
        kind, ok = question_kind(expected), answer == expected
        total[kind] += 1
        right[kind] += ok
        said = {"image": image, "question": question, "expected": expected, "answer": answer}
        out.write(json.dumps(said) + "\n")
    result = {"right": dict(right), "total": dict(total), "commonest": commonest(data, asked)}
    if "grounding" in asker.model.adaptors:
        dataset = JsonlDataset([data / "test-boxes.jsonl"], data)
        rows = [dataset.row(i) for i in range(min(limit, len(dataset)))]
        hits = 0
        texts = [row["conversations"][0]["value"].removeprefix(IMAGE) for row in rows]
        questions = [Question(row["id"], text, data / row["image"])
                     for row, text in zip(rows, texts, strict=True)]
        for i, answer in asker.ask(questions, "grounding", 48):
            box = rows[i]["boxes"][0]
            boxes = text_to_boxes(answer, rows[i]["width"], rows[i]["height"])
            overlap = iou(boxes[0], box) if boxes else 0.0
            hits += overlap >= 0.5
            said = {"image": rows[i]["image"], "question": texts[i], "expected": box,
                    "answer": answer, "iou": round(overlap, 3)}
            out.write(json.dumps(said) + "\n")
        result["grounding"] = {"hits": hits, "total": len(rows)}
    return result


def commonest(data: Path, asked: list) -> dict[str, int]:
    """How many of the asked questions the commonest training answer of their kind gets right."""
    counts = defaultdict(Counter)
    dataset = JsonlDataset([data / "train-questions.jsonl"], data)
    for i in range(len(dataset)):
        for _, _, answer in single_questions(dataset.row(i)):
            counts[question_kind(answer)][answer] += 1
    guess = {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}
    return dict(Counter(question_kind(a) for _, _, a in asked if guess[question_kind(a)] == a))


@torch.inference_mode()
def text_identical(
    model: IAA, llm: Path, text: str, tokenizer: Tokenizer, length: int = 512
) -> tuple[bool, int]:
    """Whether the text workflow's logits are those of a Llama loaded afresh; tokens read."""
    plain, _ = load_base(llm, model.llama.dtype, str(model.llama.embedding.weight.device))
    ids = tokenizer.encode(text)
    same = True
    for start in range(0, len(ids), length):
        tokens = torch.tensor([ids[start : start + length]], device=plain.embedding.weight.device)
        expected = plain.embedding(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        expected = plain(expected, plain.rope(positions, plain.dtype))
        same &= torch.equal(plain.logits(expected), model.logits(model(tokens, TEXT), TEXT))
    return same, len(ids)


def print_table(result: dict, model_folder: Path) -> None:
    """The demo's table."""
    print(f"\n{'held-out easy-VQA':<24}{'right':>8}{'commonest answer':>20}{'asked':>12}")
    for kind in (*KINDS, "all"):
        kinds = KINDS if kind == "all" else (kind,)
        right, total, guess = (sum(result[part].get(k, 0) for k in kinds)
                               for part in ("right", "total", "commonest"))
        if total:
            print(f"{kind:<24}{right / total:>8.1%}{guess / total:>20.1%}{total:>12}")
    if "grounding" in result:
        hits, total = result["grounding"]["hits"], result["grounding"]["total"]
        print(f"{'grounding, IoU 0.5':<24}{hits / total:>8.1%}{'':>20}{total:>12}")
    same, tokens = result["text"]
    print(f"{IDENTICAL}: {'yes' if same else 'NO'} ({tokens} tokens of real text)")
    for stage in read_json(model_folder / "config.json")["stage"]:
        log = model_folder / stage["name"] / "log.jsonl"
        if log.is_file():
            seconds = sum(json.loads(line)["seconds"] for line in log.read_text().splitlines())
            print(f"{'stage ' + stage['name']:<30}{seconds / 60:>6.1f} min")
    print(f"{'evaluation':<30}{result['seconds'] / 60:>6.1f} min")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Score a model.", allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=["easy-vqa", "text"])
    add("data", type=Path, help="easy-vqa: folder that convert_data.py wrote; text: a text file")
    add("--model", type=Path, default=Path("runs/demo"), help="folder with iaa.json [%(default)s]")
    add("--limit", type=int, default=1000, help="questions and pictures asked [%(default)s]")
    add("--batch-tokens", type=int, default=2048, help="tokens at once, about [%(default)s]")
    add("--seed", type=int, default=0, help="choice of the questions [%(default)s]")
    args = parser.parse_args()
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, info = load_iaa(args.model, None, device)
        tokenizer = Tokenizer.load(info["llm"])
        if args.what == "text":
            same, tokens = text_identical(model, info["llm"], args.data.read_text(), tokenizer)
            print(f"{IDENTICAL}: {'yes' if same else 'NO'} ({tokens} tokens)")
            return
        began = time.perf_counter()
        with open(args.model / "answers-easy-vqa.jsonl", "w", buffering=1) as out:
            asker = Asker(model, tokenizer, info["prompts"], args.batch_tokens)
            result = easy_vqa(args.data, asker, args.limit, args.seed, out)
        text = Path(__file__).with_name("README.md").read_text()
        result["text"] = text_identical(model, info["llm"], text, tokenizer)
        result["seconds"] = time.perf_counter() - began
        print_table(result, args.model)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
