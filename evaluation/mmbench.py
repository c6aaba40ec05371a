"""MMBench: its table read into questions, and the table of answers that its server scores.

Source: LLaVA (prompt, form of the submission).
"""

import base64
import binascii
import csv
import re
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

from evaluation.ask import Question
from data import ONE_LETTER
from common.files import new_file
from evaluation.scoring import FULL_TURN, Record, Table, score_mmbench

BY_LETTER = {"en": ONE_LETTER, "cn": "\n请直接回答选项字母。"}
UNSCORED_TEST = "test, scored by MMBench's server"


def read_mmbench(data: Path, images: Path | None, language: str) -> list[Question]:
    """A TSV of dev or test, rotations included; a picture may be the index of the row that has it.

    An empty cell is missing; options end at the first that is. Without answers, it is a test file.
    """
    csv.field_size_limit(1 << 27)  # a picture is one cell
    rows = []
    with open(data, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        try:
            wrong = {"index", "question", "A", "B", "image"} - set(table.fieldnames or [])
            if wrong:
                raise ValueError(f"column {min(wrong)!r} is missing: not an MMBench TSV")
            for row in table:
                if None in row or None in row.values():
                    raise ValueError(f"line {table.line_num}: cells missing or too many (cut off?)")
                rows.append(row | {"index": int(row["index"])})
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{data}: {error}") from None
    pictures = {row["index"]: row["image"] for row in rows}
    decoded, found = {}, []
    for row in rows:
        cell = row["image"]
        if len(cell) <= 64:
            cell = pictures.get(int(cell) if cell.isdecimal() else None, "")
        try:
            if cell not in decoded:
                decoded[cell] = base64.b64decode(cell, validate=True)
        except binascii.Error:
            decoded[cell] = b""
        if not decoded[cell]:
            raise ValueError(f"{data}: row {row['index']}: its picture is not base64, "
                             "nor the index of a row with one")
        found.append(mmbench_question(row, decoded[cell], language))
    return found


def mmbench_question(row: dict, picture: bytes, language: str) -> Question:
    """A row as LLaVA asks it: hint, question, options, all by lines."""
    options = {}
    for letter in "ABCD":
        if not row.get(letter):
            break
        options[letter] = row[letter]
    hint = row["hint"] + "\n" if row.get("hint") else ""
    choices = "".join(f"\n{letter}. {text}" for letter, text in options.items())
    facts = {"index": row["index"], "question": row["question"], "options": options,
             "expected": row.get("answer") or None, "category": row.get("category", ""),
             "l2-category": row.get("l2-category") or row.get("L2-category", ""),
             "split": row.get("split", "")}
    text = hint + row["question"] + choices + BY_LETTER[language]
    return Question(str(row["index"]), text, picture, facts=facts)


def score_or_count(records: list[Record]) -> Table:
    """MMBench's score; only a count of questions where the file has no answers (test)."""
    if all(record["expected"] for record in records):
        return score_mmbench(records)
    return {UNSCORED_TEST: {"asked": len({r["index"] % FULL_TURN for r in records})}}


def mmbench_submission(records: list[Record], folder: Path) -> str:
    """Write the table that MMBench's server scores, as LLaVA writes it; say where it is."""
    table = [["index", "question", "A", "B", "C", "D", "prediction", "split"]]
    for r in sorted(records, key=lambda record: record["index"]):
        options = [r["options"].get(letter, "") for letter in "ABCD"]
        table.append([r["index"], r["question"], *options, r["answer"], r["split"]])
    path = folder / "submission.xlsx"
    write_xlsx(path, table)
    return f"written for MMBench's server: {path}"


def write_xlsx(path: Path, table: list[list]) -> None:
    """A workbook of one sheet: numbers as numbers, all else as text.

    pandas knows a workbook by the name xl/workbook.xml.
    """
    schema = "http://schemas.openxmlformats.org"
    main, package = f"{schema}/spreadsheetml/2006/main", f"{schema}/package/2006"
    office = f"{schema}/officeDocument/2006/relationships"
    kinds = "application/vnd.openxmlformats-officedocument.spreadsheetml"

    def cell(value) -> str:
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        text = escape(re.sub(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", value))
        return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'

    def link(kind: str, target: str) -> str:
        return (f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
                f'Type="{office}/{kind}" Target="{target}"/></Relationships>')

    rows = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in table)
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kinds}.sheet.main+xml"/>'
        f'<Override PartName="/xl/sheet.xml" ContentType="{kinds}.worksheet+xml"/></Types>',
        "_rels/.rels": link("officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": link("worksheet", "sheet.xml"),
        "xl/sheet.xml": f'<worksheet xmlns="{main}"><sheetData>{rows}</sheetData></worksheet>',
    }
    with new_file(path) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in parts.items():
            file.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{text}')
