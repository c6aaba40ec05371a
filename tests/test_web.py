"""python -m web: the page in a real headless Chromium, over a tiny model with given words."""

import json
import shutil
import socket
import threading
import time
import urllib.request

import pytest
from conftest import tiny_run
from PIL import Image

import sample

gradio = pytest.importorskip("gradio", reason="install it as requirements/web.txt says")
webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium==4.51.0")
from web import __main__ as web  # noqa: E402

BOX, BLIND = "[0.25, 0.25, 0.75, 0.75]", "I see no picture."
SAID = r"Array.from(document.querySelectorAll('[role=log]'), e => e.innerText.match(/\S.*/g))"
MESSAGE = "document.querySelector('.toast-wrap')?.innerText ?? ''"
PICTURE = "document.querySelector('[data-testid=image] img')?.src ?? ''"
WIDTH = "document.querySelector('[data-testid=image] img')?.naturalWidth"
LOADED = "performance.getEntriesByType('resource').map(entry => entry.name)"


@pytest.fixture
def browser(tmp_path):
    """Chromium, with an empty profile."""
    if not shutil.which("chromedriver"):
        pytest.skip("no browser here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for setting in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                    "disable-background-networking", "disable-component-update", "disable-sync",
                    f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{setting}")
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        driver.implicitly_wait(60)  # for an element to appear
        yield driver


def test_page(browser, tmp_path, monkeypatch):
    """A picture, both answers as they come, the box; a second tab meanwhile; what is no picture."""
    gate = threading.Event()  # opens after the first letter of the first answer

    def generate(model, prompts, images, workflow, *settings):
        for n, byte in enumerate((BLIND if images is None else BOX).encode()):
            assert n == 0 or gate.wait(60)
            settings[-1](0, byte)  # on_token

    def enter(selector, keys):
        browser.find_element("css selector", selector).send_keys(str(keys))

    def wait(script, wanted):
        seen, until = None, time.monotonic() + 60
        while not (seen == wanted or wanted and isinstance(seen, str) and wanted in seen):
            assert time.monotonic() < until, f"{script}: {seen}"
            time.sleep(0.1)
            seen = browser.execute_script(f"return {script}")
        return seen

    monkeypatch.setattr(sample, "generate", generate)  # all around it is the product's
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: None)  # `main` returns
    tiny_run(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        with pytest.raises(SystemExit, match="Address already in use"):
            web.main(["--model", str(tmp_path / "run"), "--port", str(port)])
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing listens
    web.main(["--model", str(tmp_path / "run"), "--port", str(port)])
    browser.get(f"http://127.0.0.1:{port}/")
    browser.switch_to.new_window("tab")
    browser.get(f"http://127.0.0.1:{port}/")
    second, first = browser.window_handles

    Image.new("RGB", (40, 30), "navy").save(tmp_path / "navy.png")
    enter("input[type=file]", tmp_path / "navy.png")
    wait(PICTURE, ".webp")  # opened by the server
    enter("textarea", "where is it?\n")
    wait(SAID, [["where is it?", "["], ["where is it?"]])  # it streams
    browser.switch_to.window(second)
    monkeypatch.setattr(web, "PATIENCE_S", 0.5)
    enter("textarea", "and I?\n")
    wait(MESSAGE, "the model was busy for 0.5 s; ask again later")
    monkeypatch.setattr(web, "PATIENCE_S", 30.0)
    gate.set()
    enter("textarea", "\n")  # the question is still there
    wait(SAID, [["and I?", BLIND], ["and I?", BLIND]])  # of its own history only
    browser.switch_to.window(first)
    wait(SAID, [["where is it?", BOX], ["where is it?", BLIND]])
    wait(WIDTH, 480)  # enlarged, to be drawn on
    drawn = Image.open(wait(PICTURE, ".webp").split("file=")[1]).convert("RGB")
    assert drawn.getpixel((122, 180))[0] > 150 > 50 > drawn.getpixel((240, 180))[0]

    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    for name, words in (("notes.png", "notes.png: not a readable picture (JPEG, PNG, "),
                        ("large.png", 'exceed the maximum allowed size of 20.0 Mb: "large.png"')):
        enter("input[type=file]", tmp_path / name)
        wait(MESSAGE, words)
        wait(PICTURE, "")
    # A client may name any file; only what was uploaded is shown.
    body = {"data": [{"path": str(tmp_path / "navy.png"), "orig_name": "n"}], "session_hash": "0"}
    look = f"http://127.0.0.1:{port}/gradio_api/run/look"
    with urllib.request.urlopen(urllib.request.Request(
            look, json.dumps(body).encode(), {"Content-Type": "application/json"})) as answer:
        assert json.loads(answer.read())["data"][2] is None  # the picture
    loaded = browser.execute_script(f"return {LOADED}")
    assert all(f"//127.0.0.1:{port}/" in name for name in loaded)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    gradio.close_all()
