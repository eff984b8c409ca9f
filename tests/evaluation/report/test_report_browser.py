"""The report in a real browser: nothing is fetched, nothing overflows, and its few controls work."""

import pytest
from chromium import Chromium, find_chromium
from report_runs import NASTY, POLICIES, build_runs, compare, write_videos

from longtake.evaluation.published import find_rows, load_published
from longtake.evaluation.report import figures, write_report
from longtake.evaluation.report.data import DARK, DARK_PAGE, LIGHT, ReportData

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: install chromium or google-chrome, or name one in CHROME"
)

SHOWN = "Array.from(document.querySelectorAll('{}')).filter(e => e.checkVisibility()).map(e => e.textContent)"
ROWS = "Array.from(document.querySelectorAll('#summary table')[0].tBodies[0].rows)"
HIDDEN = "document.querySelectorAll('[data-run=\"{}\"]').length > 9 && Array.from(document.querySelectorAll("
HIDDEN += "'[data-run=\"{}\"]')).every(e => getComputedStyle(e).display === 'none')"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = build_runs(16, num_prompts=4, num_seeds=1, num_windows=12, prompt=NASTY)
    videos = write_videos(folder, runs[:4], num_prompts=1)
    rows = find_rows(load_published(), seconds=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", lambda data, folder: [])
        comparison = compare(runs, num_resamples=100)
        return write_report(folder, ReportData(runs=runs, comparison=comparison, videos=videos, published=rows))


@pytest.fixture(scope="module")
def browser():
    started = Chromium(find_chromium())
    yield started
    started.close()


def click(browser, selector, shift="false"):
    event = f"new MouseEvent('click', {{bubbles: true, shiftKey: {shift}}})"
    browser.run(f"document.querySelector('{selector}').dispatchEvent({event})")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_fetched_and_nothing_overflows(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [f"file://{page}"]
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("document.title").startswith("Evaluation: full, "), "the prompt's script did not run"
    # Whatever is wider than the page scrolls inside a box of its own.
    wide = """Array.from(document.querySelectorAll('main *')).filter(e => e.checkVisibility() &&
        !e.closest('.scroll, pre, ul, select') && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))"""
    assert browser.run(wide) == []


def test_the_checks_themselves_see_faults(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<meta name=viewport content='width=device-width'><div style='width:2000px'>x</div>"
        "<img src='missing.png'><script>console.error('no'); fetch('http://127.0.0.1:9/'); undefined_name();</script>"
    )
    browser.open(path, width=390)
    assert browser.run("document.documentElement.scrollWidth") > 390
    assert {"http://127.0.0.1:9/", f"file://{tmp_path}/missing.png"} <= set(browser.requests)
    assert any("undefined_name" in message for message in browser.messages)


@pytest.mark.parametrize("width", [390, 1280])
def test_every_policy_is_named_in_the_legend_and_every_table(browser, page, width):
    browser.open(page, width=width)
    assert browser.run(SHOWN.format(".bar .run")) == list(POLICIES)
    assert browser.run(SHOWN.format("#summary tbody .label")) == list(POLICIES)
    assert set(browser.run(SHOWN.format("#curves figure .end"))) == set(POLICIES)
    lines = "document.querySelectorAll('#curves figure:not([hidden]) .line').length"
    assert browser.run(lines) == len(POLICIES)


def test_dark_colours_are_used_and_paper_stays_white(browser, page):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    line = "getComputedStyle(document.querySelector('.curves .line[data-run=\"1\"] path')).stroke"

    def colour(text):
        return "rgb({}, {}, {})".format(*(int(text[at : at + 2], 16) for at in (1, 3, 5)))

    browser.open(page, dark=True)
    assert browser.run(ground) == colour(DARK_PAGE) and browser.run(line) == colour(DARK[1])
    text = browser.run("getComputedStyle(document.body).color")
    assert sum(map(int, text[4:-1].split(", "))) > 600, "light text on the dark page"
    browser.open(page, dark=False)
    assert browser.run(ground) == "rgb(255, 255, 255)" and browser.run(line) == colour(LIGHT[1])
    browser.open(page, dark=True, media="print")
    assert browser.run(ground) == "rgb(255, 255, 255)" and browser.run(line) == colour(LIGHT[1])
    assert browser.run("getComputedStyle(document.querySelector('.bar')).display") == "none"


def test_a_press_on_a_head_sorts_the_table(browser, page):
    browser.open(page)
    column = f"{ROWS}.map(row => row.cells[1].dataset.v).map(Number)"
    names = f"{ROWS}.map(row => row.cells[0].dataset.v)"
    head = "#summary thead th:nth-child(2)"
    before = browser.run(column)
    click(browser, f"{head} button")
    assert browser.run(column) == sorted(before, reverse=True) != before
    assert browser.run(f"document.querySelector('{head}').ariaSort") == "descending"
    click(browser, f"{head} button")
    assert browser.run(column) == sorted(before)
    click(browser, "#summary thead th:nth-child(1) button")
    assert browser.run(names) == sorted(POLICIES)
    assert browser.run("document.querySelectorAll('#summary [aria-sort]').length") == 1
    # The one policy without a value of overall consistency stands last, whichever way the rest goes.
    click(browser, "#summary thead th:nth-child(6) button")
    assert browser.run(names)[-1] == "pack"
    click(browser, "#summary thead th:nth-child(6) button")
    assert browser.run(names)[-1] == "pack"


def test_the_legend_hides_and_shows_policies(browser, page):
    browser.open(page)
    click(browser, '[data-toggle="3"]')
    assert browser.run(HIDDEN.format(3, 3)) and not browser.run(HIDDEN.format(2, 2))
    pressed = "Array.from(document.querySelectorAll('[data-toggle]'), e => e.getAttribute('aria-pressed'))"
    assert browser.run(pressed)[3] == "false" and browser.run(pressed).count("true") == 15
    click(browser, '[data-toggle="3"]')
    assert not browser.run(HIDDEN.format(3, 3))
    click(browser, '[data-toggle="5"]', shift="true")
    assert browser.run(pressed).count("true") == 1 and browser.run(SHOWN.format("#summary tbody .label")) == [
        POLICIES[5]
    ]
    click(browser, "[data-all]")
    assert (
        browser.run(pressed).count("true") == 16
        and browser.run("document.querySelector('[data-all]').hidden") is not False
    )


def test_another_measure_can_be_chosen_and_read(browser, page):
    browser.open(page)
    shown = "Array.from(document.querySelectorAll('#curves figure:not([hidden])'), f => f.id)"
    assert browser.run(shown) == [browser.run("document.getElementById('measure').value")]
    browser.run(
        "(s => { s.selectedIndex = 2; s.dispatchEvent(new Event('change')); })(document.getElementById('measure'))"
    )
    assert browser.run(shown) == ["curve2"]
    browser.run("document.querySelector('#curve2').scrollIntoView({block: 'center', behavior: 'instant'})")
    left, top, width = browser.run(
        "(b => [b.left, b.top, b.width])(document.querySelector('#curve2 .area').getBoundingClientRect())"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + width / 2, y=top + 90)
    rows = browser.run("Array.from(document.querySelectorAll('#curve2 .readout .row'), e => e.textContent)")
    assert len(rows) == 16 and rows[0].startswith(POLICIES)
    values = [float(row[len(next(p for p in sorted(POLICIES, key=len)[::-1] if row.startswith(p))) :]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert browser.run("document.querySelector('#curve2 .readout b').textContent") in ("11 s", "13 s")


def test_bands_are_off_for_many_policies_until_asked_for(browser, page):
    browser.open(page)
    band = "getComputedStyle(document.querySelector('#curves figure:not([hidden]) .band')).display"
    assert browser.run(band) == "none"
    click(browser, "#bands")
    assert browser.run(band) == "inline"


def test_without_scripts_the_page_is_whole(browser, page):
    browser.open(page, scripts=False, width=390)
    # Scripts of the page are off; those of the test are not run in it then, so the picture tells.
    root = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]
    found = browser.call("DOM.querySelectorAll", nodeId=root, selector="#curves figure:not([hidden]) .line")
    assert len(found["nodeIds"]) == 16
    browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_what_can_be_used_with_a_pointer_can_be_used_with_keys_and_is_named(browser, page):
    browser.open(page)
    unnamed = """Array.from(document.querySelectorAll('button, select, input, a, [role=img], [role=region], img'))
        .filter(e => !(e.ariaLabel || e.alt || e.textContent.trim() || e.labels?.length)).length"""
    assert browser.run(unnamed) == 0
    assert browser.run("Array.from(document.querySelectorAll('.scroll')).every(e => e.tabIndex === 0)")
    assert browser.run("Array.from(document.querySelectorAll('table')).every(t => t.caption || false)")
    assert browser.run("document.documentElement.lang") == "en"
