"""Questions about pictures: asked many at once, answered greedily as if each were asked alone.

    a row     | system message, picture | question 1 | question 2 |  then | token of 1 | of 2 |
    segments  | 0  0  0  0  0  0  0  0  | 1  1  1  1 | 2  2  2    |       | 1          | 2    |

- Questions about one picture stand side by side behind one prefix, each blind to the others,
  positions restarting behind the prefix: what `independent` rows are in training. The picture,
  most of a prompt, is seen and read once, however many questions there are about it.
- A step of decoding appends one column for each question that is still open, to all rows at once.
- Rows of similar length make a batch, as many as fit a number of tokens.

Letters: B rows, T new columns, S columns so far, V vocabulary, P image tokens.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokenization.templates import exchange, opening, template_of
from clip import open_image, preprocess
from iaa import IAA
from llama import attention_mask
from tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A question about a picture; `image` is a file, or a file's content."""

    key: str  # its name, unique in a benchmark
    text: str
    image: Path | bytes
    workflow: str = "mm"  # that answers it
    facts: dict = field(default_factory=dict)  # what scoring needs, saved beside the answer

    def picture(self) -> Image.Image:
        """The picture as RGB. ValueError names the question."""
        file = io.BytesIO(self.image) if isinstance(self.image, bytes) else self.image
        try:
            return open_image(file)
        except (ValueError, OSError) as error:
            said = str(error).replace(repr(file), "<embedded picture>")
            raise ValueError(f"question {self.key}: {said}") from None


@dataclass
class Row:
    """A picture's prefix and questions, as token ids."""

    image: Path | bytes
    prefix: list[int]
    questions: list[list[int]]
    indices: list[int]  # of the questions, in the list that was asked

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.questions))


@torch.inference_mode()
def answer_rows(
    model: IAA,
    rows: list[Row],
    images: Tensor,  # (B, 3, S, S)
    workflow: str,
    max_tokens: int,  # of an answer
    stop: tuple[int, ...],  # ids that end an answer; not returned
    pad_id: int,  # any but the image's
) -> list[list[list[int]]]:
    """The greedy answer, as token ids, of each question of each row."""
    table = []  # of each row, its columns: (token, segment, position)
    open_questions = []  # (row, question, its last column)
    for r, row in enumerate(rows):
        start = len(row.prefix)
        columns = [(token, 0, i) for i, token in enumerate(row.prefix)]
        for q, question in enumerate(row.questions):
            columns += [(token, q + 1, start + i) for i, token in enumerate(question)]
            open_questions.append((r, q, len(columns) - 1))
        table.append(columns)
    answers = [[[] for _ in row.questions] for row in rows]
    pad = (pad_id, -1, 0)  # a segment that no question sees
    most = max(len(row.questions) for row in rows)
    cache = model.new_cache(len(rows), max(map(len, table)) + most * (max_tokens - 1), workflow)
    device = model.llama.device
    segments = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    for _ in range(max_tokens):
        longest = max(map(len, table))
        padded = [columns + [pad] * (longest - len(columns)) for columns in table]
        tokens, new, positions = torch.tensor(padded, device=device).unbind(-1)  # (B, T)
        segments = torch.cat((segments, new), 1)  # (B, S)
        mask = attention_mask(longest, cache.length, segments, device)  # (B, 1, T, S)
        x = model(tokens, workflow, images, positions, mask, cache)  # (B, T, D)
        images = None  # they stand in the cache now
        of_row, of_question, column = zip(*open_questions, strict=True)
        logits = model.logits(x[list(of_row), list(column)], workflow)  # (open, V)
        table, open_questions = [[] for _ in rows], []
        for r, q, token in zip(of_row, of_question, logits.argmax(-1).tolist(), strict=True):
            if token in stop:
                continue
            answers[r][q].append(token)
            position = len(rows[r].prefix) + len(rows[r].questions[q]) + len(answers[r][q]) - 1
            open_questions.append((r, q, len(table[r])))
            table[r].append((token, q + 1, position))
        if not open_questions:
            break
    return answers


class Asker:
    """A model that answers lists of questions, in batches of at most `batch_tokens` tokens."""

    def __init__(self, model: IAA, tokenizer: Tokenizer, prompts: dict, batch_tokens: int):
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.batch_tokens = batch_tokens

    def rows(self, questions: Sequence[Question], workflow: str, max_tokens: int) -> list[Row]:
        """A row for each picture, or several where its questions exceed a batch; short ones first.

        ValueError for a prompt that leaves no room in the context for `max_tokens` more.
        """
        settings, patches = self.prompts[workflow], self.model.clip.config.patches
        context = self.model.llama.config.context
        form = template_of(self.tokenizer, settings["template"])
        prefix = opening(self.tokenizer, form, settings["system"], patches)
        by_image, rows = {}, []
        for index, question in enumerate(questions):
            ids, _ = exchange(self.tokenizer, form, question.text, None, "")
            if len(prefix) + len(ids) + max_tokens > context:
                raise ValueError(f"question {question.key}: {len(prefix) + len(ids)} tokens and "
                                 f"{max_tokens} for the answer exceed the context of {context}")
            row = by_image.get(question.image)
            if row is None or len(row) + len(ids) > self.batch_tokens:
                row = by_image[question.image] = Row(question.image, prefix, [], [])
                rows.append(row)
            row.questions.append(ids)
            row.indices.append(index)
        return sorted(rows, key=len)

    def ask(
        self, questions: Sequence[Question], workflow: str, max_tokens: int
    ) -> Iterator[tuple[int, str]]:
        """(index of a question, its answer), a batch at a time; all are asked, in any order."""
        rows, clip = self.rows(questions, workflow, max_tokens), self.model.clip.config
        device = self.model.llama.device
        while rows:
            fitting = max(1, self.batch_tokens // len(rows[-1]))
            batch = [rows.pop() for _ in rows[-fitting:]]  # the longest
            pictures = [preprocess(questions[row.indices[0]].picture(), clip) for row in batch]
            answers = answer_rows(self.model, batch, torch.stack(pictures).to(device), workflow,
                                  max_tokens, self.tokenizer.stop_ids, self.tokenizer.pad_id)
            for row, said in zip(batch, answers, strict=True):
                for index, ids in zip(row.indices, said, strict=True):
                    yield index, self.tokenizer.decode(ids).strip()
