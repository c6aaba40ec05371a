"""A page to try a model, python -m web --model RUN: two workflows of one LLM, side by side.

The first answer is an adaptor's, which sees the picture; its boxes are drawn there. The second is
the text workflow's: the frozen LLM. A browser tab has its own history; all tabs share one model.
"""

import argparse
import io
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from clip import open_image
from common.files import one_line
from data import GROUNDING_PROMPT, path_below
from iaa import TEXT
from sample import Chat, boxes_on, draw_boxes
from tokenization.templates import IMAGE, without_tags

PATIENCE_S = 30.0  # a question waits so long for those of other tabs
EXAMPLES = [["data/easy-vqa/test/7.png", "mm", "what color is the shape?"],
            ["data/easy-vqa/test/7.png", "grounding", GROUNDING_PROMPT.format("the shape")]]


def new_chats(chat: Chat, path: Path | None = None) -> list[Chat]:
    """A tab's chats over the one model: one sees the picture, one is the text workflow's."""
    images = [] if path is None else [open_image(path)]
    return [replace(chat, images=images, turns=[]), replace(chat, chosen=TEXT, turns=[])]


def stream(thread: ThreadPoolExecutor, chat: Chat, question: str) -> Iterator[str]:
    """The answer so far, ten times a second; CancelledError: no answer began in PATIENCE_S."""
    with io.StringIO() as said:  # once it is closed, the next piece of the answer raises ValueError
        asked, end = thread.submit(chat.ask, question, said.write), time.monotonic() + PATIENCE_S
        try:
            while not asked.done():
                time.sleep(0.1)
                yield said.getvalue()
                if time.monotonic() > end:
                    asked.cancel()  # does nothing to a question under way
            yield asked.result().answer
        finally:
            asked.cancel()


def serve(chat: Chat, host: str, port: int) -> None:
    """The page over a loaded model, until Ctrl-C."""
    os.environ["no_proxy"] = "*"  # Gradio asks its own address, and would ask a proxy for it
    import gradio as gr  # here: where it is missing, `main` says so in one line
    thread, workflows = ThreadPoolExecutor(1), [*chat.model.adaptors]

    def look(file: dict | None) -> dict:
        """A new picture, or none, starts new histories. A bad one is none."""
        try:
            pair = new_chats(chat, file and path_below(Path(picture.GRADIO_CACHE), file["path"]))
        except (ValueError, OSError) as error:
            gr.Warning(str(error).replace(file["path"], file["orig_name"]), duration=None)
            pair = new_chats(chat)
        return {chats: pair, picture: next(iter(pair[0].images), None), **dict.fromkeys(columns)}

    def answer(text: str, workflow: str, pair: list[Chat] | None) -> Iterator[dict]:
        """The answer of each chat, one after the other, piece by piece."""
        pair, questions = pair or new_chats(chat), (text, without_tags(text))
        pair[0].chosen = workflow
        shown = [[{"role": role, "content": said.removeprefix(IMAGE)}
                  for role, said in [*one.turns, ("user", text)]] for one in pair]
        yield {chats: pair, question: "", columns[0]: shown[0], columns[1]: shown[1]}
        try:
            for one, column, turns, asks in zip(pair, columns, shown, questions, strict=True):
                for said in stream(thread, one, asks):
                    yield {column: [*turns, {"role": "assistant", "content": said}]}
                for image in one.images:
                    yield {picture: draw_boxes(image, boxes_on(image, said))}
        except (ValueError, OSError, CancelledError) as error:
            gr.Warning(str(error) or f"the model was busy for {PATIENCE_S:g} s; ask again later")
            yield {question: text if one is pair[0] else ""}  # else the adaptor has answered it

    with gr.Blocks(title="IAA", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        chats = gr.State()  # of the tab; None before its first event
        with gr.Row():
            picture = gr.Image(sources=["upload", "clipboard"], label="Picture", scale=3)
            columns = [gr.Chatbot(label=label, scale=3, render_markdown=False, buttons=[])
                       for label in ("The chosen workflow", "Text workflow: the frozen LLM")]
        workflow = gr.Radio(workflows, value=next(iter(workflows), None), label="Workflow")
        question = gr.Textbox(label="Question", submit_btn="Ask", stop_btn="Stop")
        everything, events = [chats, question, picture, *columns], [picture.upload, picture.clear]
        if rows := [row for row in EXAMPLES if Path(row[0]).is_file() and row[1] in workflows]:
            events.append(gr.Examples(rows, [picture, workflow, question]).load_input_event.then)
        asked = question.submit(answer, [question, workflow, chats], everything,
                                concurrency_limit=None, show_progress="hidden")
        question.stop(None, cancels=asked)
        for number, column in enumerate(columns):  # an answer under way joins its old chat only
            column.clear(lambda pair, n=number: pair.insert(n, replace(pair.pop(n), turns=[])),
                         chats, cancels=asked)
        for event in events:  # preprocess: Gradio would open the picture, and say less of errors
            event(look, picture, everything, cancels=asked, preprocess=False)
    print(f"open http://{host}:{port}", flush=True)
    page.launch(server_name=host, server_port=port, share=False, quiet=True, show_error=True,
                max_file_size="20mb", footer_links=[])


@one_line("python -m web")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A page to try a model.", allow_abbrev=False)
    parser.add_argument("--model", default="runs/demo", help="folder of a run [%(default)s]")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for all [%(default)s]")
    parser.add_argument("--port", type=int, default=7860, help="[%(default)s]")
    parser.add_argument("--quantize", choices=["int8"], help="as of sample.py")
    args = parser.parse_args(argv)
    socket.create_server((args.host, args.port)).close()  # a port in use fails now
    serve(Chat.load(args.model, quantize=args.quantize, max_tokens=256), args.host, args.port)


if __name__ == "__main__":
    main()
