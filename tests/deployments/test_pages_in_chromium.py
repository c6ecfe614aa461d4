"""The pages in a real Chromium: what a person does on them, and that they ask nobody else for anything."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import threading
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
LONG = "Count from 1 to 90."
LENGTH = "(document.querySelector('.sample .body')?.textContent ?? '').length"
TIMEOUT_MS = 100_000
expect = playwright.expect
expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = next(filter(None, map(shutil.which, NAMES)), own if Path(own).is_file() else None)
        if found is None:
            pytest.skip(f"no Chromium on this machine (none of {', '.join(NAMES)}, nor playwright's own)")
        chromium = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, server):
    """Opens a page of the server; at the end nothing may have been complained of, or asked of another host."""
    complaints: list[str] = []
    contexts = []

    def open_at(path: str, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: None if ours(r.url) else complaints.append(f"asked {r.url}"))
        page.goto(server.url + path)
        if path == "/":
            page.wait_for_selector("#model option", state="attached")
        return page

    def ours(url: str) -> bool:
        return url.startswith((server.url + "/", "data:"))

    open_at.complaints = complaints
    yield open_at
    for context in contexts:
        context.close()
    assert complaints == []
    server.wait_idle()


def ask(page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answers(page, turn: int = -1) -> list[str]:
    """The texts of a turn's samples, once all are whole."""
    page.wait_for_selector("#send:visible")
    return page.locator(".samples").all()[turn].locator(".body").all_inner_texts()


def no_sideways_scroll(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_an_answer_streams(open_page, server):
    page, length = open_page("/"), 0
    with server.steps(0):
        ask(page, LONG)
        for _ in range(6):
            server.executor.allow(10)
            page.wait_for_function(f"() => ({LENGTH}) > {length}")
            length = page.evaluate(LENGTH)
    assert answers(page)[0].startswith("1, 2, 3, 4")
    assert page.evaluate(LENGTH) > length
    assert "tokens" in page.locator(".stats").inner_text()


def test_stop_button_and_escape_end_the_request(open_page, server):
    page = open_page("/")
    for stop in (lambda: page.click("#stop-button"), lambda: page.keyboard.press("Escape")):
        with server.steps(60):
            ask(page, LONG)
            expect(page.locator(".sample .body").last).to_contain_text("4, 5")
            stop()
            assert not answers(page)[0].endswith("90")
            assert "ended: stopped" in page.locator(".sample footer").last.inner_text()
            server.wait(lambda stats: not stats["unfinished"])


def test_samples_side_by_side_and_one_picked(open_page):
    page = open_page("/", viewport={"width": 1200, "height": 800})
    page.fill("#n", "3")
    page.fill("#temperature", "1.5")
    ask(page, "Return a JSON object with fields title, year, city.")
    texts = answers(page)
    assert len(texts) == 3
    assert len(set(texts)) > 1, "drawn at a high temperature, they should differ"
    boxes = [sample.bounding_box() for sample in page.locator(".sample").all()]
    assert boxes[0]["y"] == boxes[1]["y"] == boxes[2]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]

    page.locator(".sample").nth(1).get_by_role("button", name="Go on from this one").click()
    assert page.locator(".sample.chosen").count() == 1
    page.keyboard.press("3")  # the keyboard picks another
    assert page.locator(".sample").nth(2).get_attribute("class") == "sample chosen"
    page.fill("#n", "1")
    page.fill("#temperature", "0")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is 47 + 38?")
    history = sent.value.post_data_json["messages"]
    assert [message["role"] for message in history] == ["user", "assistant", "user"]
    assert "".join(history[1]["content"].split()) == "".join(texts[2].split())
    assert "85" in answers(page)[0]


def test_keyboard(open_page):
    page = open_page("/")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("What is 47")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("+ 38?")
    assert page.input_value("#prompt") == "What is 47\n+ 38?"
    page.fill("#prompt", "What is 47 + 38?")
    page.keyboard.press("Enter")
    assert answers(page) == ["47 + 38 = 85"]
    page.keyboard.press("ArrowUp")
    assert page.input_value("#prompt") == "What is 47 + 38?"
    page.keyboard.press("Control+k")
    assert page.locator(".sample").count() == 0
    assert page.locator(".empty").is_visible()
    shown = page.locator("#settings").is_visible()
    page.keyboard.press("Control+,")
    assert page.locator("#settings").is_visible() != shown


def test_settings_are_sent_and_kept(open_page):
    page = open_page("/", viewport={"width": 1200, "height": 800})
    page.fill("#system", "Answer in JSON.")
    page.fill("#max_tokens", "40")
    page.select_option("#model", "tiny-alias")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is 3 + 4?")
    body = sent.value.post_data_json
    assert body["model"] == "tiny-alias"
    assert body["max_tokens"] == 40
    assert body["messages"][0] == {"role": "system", "content": "Answer in JSON."}
    assert answers(page) == ['{"answer": 7}']
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.input_value("#system") == "Answer in JSON."
    assert page.input_value("#max_tokens") == "40"


def test_what_the_server_refuses_is_shown(open_page):
    page = open_page("/", viewport={"width": 1200, "height": 800})
    page.fill("#max_tokens", "100000")
    ask(page, "Hi")
    said = page.locator(".error[role=alert]").inner_text()
    assert "max_tokens" in said or "context" in said
    assert len(open_page.complaints) == 1
    assert "400" in open_page.complaints.pop()  # Chromium's own line about the status


@pytest.mark.parametrize("path", ["/", "/engine", "/docs"])
def test_dark_on_a_phone(open_page, path):
    page = open_page(path, viewport={"width": 390, "height": 780}, color_scheme="dark", has_touch=True)
    if path == "/":
        ask(page, LONG)
        assert len(answers(page)) == 1
        box = page.locator("#prompt").bounding_box()
        assert box["y"] + box["height"] <= 780
    else:
        page.wait_for_selector(".tile" if path == "/engine" else ".route")
    assert no_sideways_scroll(page)
    inside = page.evaluate(
        "[...document.querySelectorAll('header *')].every(e => e.getBoundingClientRect().right <= 390)"
    )
    assert inside, "the header fits"
    dark, light = lightness(page), lightness(open_page(path, color_scheme="light"))
    assert dark < 60 < 200 < light


@pytest.mark.parametrize("path", ["/", "/engine", "/docs"])
def test_every_page_leads_to_the_others(open_page, path):
    page = open_page(path)
    for name, title in (("Engine", "Manta engine"), ("API", "Manta API"), ("Chat", "Manta")):
        page.click(f"nav >> text={name}")
        expect(page).to_have_title(title)
        assert page.locator("nav [aria-current]").inner_text() == name


def lightness(page) -> float:
    """The background's mean channel, 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return (red + green + blue) / 3


def test_engine_page_while_busy_and_after(open_page, server):
    done = threading.Event()
    body = {"prompt": LONG * 6, "max_tokens": 100, "ignore_eos": True, "n": 3, "temperature": 1}

    def load() -> None:
        while not done.is_set():
            server.http.post("/v1/completions", json=body).raise_for_status()

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(load) for _ in range(3)]
        try:
            page = open_page("/engine", viewport={"width": 1200, "height": 900})
            page.select_option("#period", "250")
            expect(page.locator("#blocks-text")).to_contain_text(re.compile(r"[1-9]\d* owned, [1-9]\d* of them shared"))
            expect(page.locator("#requests td").first).to_be_visible()
            colours = page.evaluate(
                """() => {
                  const canvas = document.getElementById("blocks");
                  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                  const found = new Set();
                  for (let i = 0; i < data.length; i += 4) if (data[i + 3]) found.add(String(data.slice(i, i + 3)));
                  return found.size;
                }"""
            )
            assert colours >= 3, "free, owned and shared blocks look different"
        finally:
            done.set()
    assert all(load.exception() is None for load in loads)
    expect(page.locator("#blocks-text")).to_contain_text(" 0 owned")
    expect(page.locator("#requests td")).to_have_count(0)


def test_docs_page_lists_every_route(open_page, server):
    page = open_page("/docs")
    page.wait_for_selector(".route")
    api = server.http.get("/openapi.json").json()
    assert page.locator(".route").count() == sum(len(methods) for methods in api["paths"].values())
    chat = page.locator(".route", has_text="/v1/chat/completions")
    chat.locator("summary").click()
    assert re.search(r"messages\s+object\[\]\s+required", chat.locator("table").inner_text())
    assert "the tenant, for fair shares" in chat.locator("table").inner_text()
