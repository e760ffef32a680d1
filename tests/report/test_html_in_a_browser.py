"""The page of a report in a real browser: a headless Chromium, skipped where there is none."""

import json
import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from compress.report import html
from compress.results.report import Prediction
from tests.report.test_files import made
from tests.report.test_html import EVIL, large

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
LINES = "\n".join(f"line {number}" for number in range(1000))


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """The page of five candidates and 500 examples, in a folder with a space in its name."""
    return written(tmp_path_factory.mktemp("a folder"), *(large(number) for number in range(1, 6)))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The page of a candidate with few examples and timings."""
    return written(tmp_path_factory.mktemp("one"), large(examples=30, points=2))


@pytest.fixture
def visit(browser):
    """Opens a page; returns it with what it asked for and what it complained of."""
    contexts = []

    def visited(file, meter=False, **look):
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **look}))
        page = contexts[-1].new_page()
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: page.said.append(dialog.message))
        if meter:
            page.meter = contexts[-1].new_cdp_session(page)
            page.meter.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        return page

    yield visited
    for context in contexts:
        context.close()


def written(tmp_path, *reports):
    file = tmp_path / "report.html"
    file.write_text(html.render(reports), encoding="utf-8")
    return file


def names(page):
    return page.locator(".example h3 bdi").all_inner_texts()


def test_it_opens_in_two_seconds_and_asks_for_nothing(visit, five):
    page = visit(five, meter=True)
    spent = {metric["name"]: metric["value"] for metric in page.meter.send("Performance.getMetrics")["metrics"]}["TaskDuration"]
    assert 0.05 < spent < 2, "seconds of a core, all plots drawn: of the clock they'd tell what else the machine does"
    assert page.locator(".chart svg").count() == 5 and len(names(page)) == 20
    assert page.said == [] and page.asked == [five.as_uri()]


@pytest.mark.parametrize(("scheme", "width"), [("light", 380), ("dark", 1200)])
def test_everybody_can_read_it(visit, one, scheme, width):
    page = visit(one, color_scheme=scheme, viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach((one, number) => { one.open = number < 30; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    violations = Axe().run(page).response["violations"]
    assert [(violation["id"], [node["html"] for node in violation["nodes"]]) for violation in violations] == []


LONG = f"{'a_name_of_' * 20}candidate"


@pytest.mark.parametrize("number", [1, 4])
def test_on_a_telephone_no_column_is_cut_and_no_name_broken_inside_a_word(visit, tmp_path, number):
    """At 390 px nothing is to be scrolled sideways but code, and a name's every piece stands on one line."""
    reports = [large(each, examples=2, points=2) for each in range(1, number)]
    last = large(number, examples=2, points=2)
    page = visit(written(tmp_path, *reports, last.model_copy(update={"recipe": LONG})), viewport={"width": 390, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth).length") == 0
    cells = "[...document.querySelectorAll('td, tbody th')].filter((one) => one.getBoundingClientRect().right > 390).length"
    assert page.evaluate(cells) == 0
    lines = """[...document.querySelectorAll('[data-name]:not(.many thead *)')].flatMap((one) => [...one.childNodes]).filter((node) => {
        const range = document.createRange();
        range.selectNodeContents(node);
        return node.nodeType === Node.TEXT_NODE && node.data.trim() && !/\\s/.test(node.data.trim()) && range.getClientRects().length > 1;
    }).map((node) => node.data)"""
    assert page.evaluate(lines) == []


def test_plots_follow_the_scheme(visit, one):
    page = visit(one, color_scheme="light")
    colour = "getComputedStyle(document.querySelector('.chart svg .role-axis-label text')).fill"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-drawn=dark]", state="attached")
    assert page.evaluate(colour) != light


def test_sorting_searching_and_choosing_by_the_keyboard(visit, five):
    page = visit(five)
    data = {p.id: p for p in large(1).predictions}
    loss = sorted(data, key=lambda name: data[name].candidate_score - data[name].baseline_score)
    assert names(page) == loss[:20]
    page.locator("#sort").focus()
    page.keyboard.press("ArrowDown")
    assert names(page) == loss[::-1][:20], "gained most"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "the first example's prompt, from the keyboard too"
    assert page.locator(".example details").first.get_attribute("open") is not None
    page.locator("#search").focus()
    page.keyboard.type("TEST-49")
    assert sorted(names(page)) == sorted(name for name in data if "test-49" in name)
    assert page.locator("#count").inner_text() == "11 of 11 examples with “TEST-49”"
    page.locator("#search").fill("no such words")
    assert names(page) == []
    page.locator("#search").fill("")
    page.locator("#candidate").select_option("candidate-3")
    data = {p.id: p for p in large(3).predictions}
    assert names(page)[0] == max(data, key=lambda name: data[name].candidate_score - data[name].baseline_score)
    page.locator("#more").focus()
    page.keyboard.press("Enter")
    assert len(names(page)) == 40
    assert page.evaluate("document.activeElement.className") == "example", "reading goes on with the first new one"


def test_axes_are_chosen_and_every_number_is_saved(visit, five, tmp_path):
    page = visit(five)
    page.locator('[data-chart="tradeoff"] select').nth(1).select_option("latency_p50 [batch 4, prompt 128] (ms, lower is better)")
    assert page.locator('[data-chart="tradeoff"] svg .role-mark').get_by_text("latency_p50 [batch 4, prompt 128] (ms").count() == 1
    with page.expect_download() as saved:
        page.locator("#save").click()
    saved.value.save_as(tmp_path / "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert len(numbers["reports"]) == 5 and len(numbers["examples"]) == 500
    assert numbers["reports"][0]["sides"][1] == json.loads(large(1).candidate.model_dump_json())


def test_outputs_are_text_whatever_they_hold(visit, tmp_path):
    texts = {"markup": EVIL, "hebrew": "שלום <b>עולם</b>", "emoji": "👩\u200d👩\u200d👧 ok", "long": LINES, "empty": "", "missing": None}
    predictions = [
        Prediction(id=name, prompt=EVIL, references=[EVIL], baseline="one", candidate=text, baseline_score=50, candidate_score=None if text is None else 40)
        for name, text in texts.items()
    ]  # fmt: skip
    page = visit(written(tmp_path, made(f"{EVIL} שלום", predictions=predictions, decided_by=EVIL)))
    assert page.said == [] and page.locator("img").count() == page.locator(".example b").count() == 0
    ours = page.locator(".outputs > div:nth-child(2) > .text")
    assert dict(zip(names(page), ours.all_inner_texts(), strict=True)) == {
        "markup": EVIL.replace("\x1b", "\N{REPLACEMENT CHARACTER}"), "hebrew": texts["hebrew"], "emoji": texts["emoji"], "long": LINES,
        "empty": "empty", "missing": "no output",
    }  # fmt: skip
    assert names(page)[-1] == "missing", "what has no score comes last"
    assert "rougeL 50 to missing" in page.locator(".example").last.inner_text()
    right = page.locator(".outputs .text", has_text="שלום")
    assert right.evaluate("element => getComputedStyle(element).direction") == "rtl"
    assert right.evaluate("element => getComputedStyle(element.closest('article')).direction") == "ltr"
    fold = page.get_by_role("button", name="Show all 1,000 lines")
    folded = page.locator(".text.folded")
    assert folded.bounding_box()["height"] < 300
    fold.press("Enter")
    assert folded.count() == 0 and page.get_by_role("button", name="Show less").get_attribute("aria-expanded") == "true"
