from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmpretrain.evaluation.report import write_report
from tests.evaluation.report_example import example

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# The lowest contrast of any text with what lies behind it (WCAG's ratio), and that text.
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function paint(colours) {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function luminance(rgb) {
  const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
let worst = [99, "nothing"], count = 0;
for (const element of document.querySelectorAll("body *:not(svg, svg *, .hidden)")) {
  const text = [...element.childNodes].filter(n => n.nodeType == 3).map(n => n.data.trim()).join("");
  const style = getComputedStyle(element);
  if (!text || style.fontSize == "0px" || !element.getClientRects().length) continue;
  const behind = [];
  for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
  const [a, b] = [paint(behind), paint([...behind, style.color])].map(luminance);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  count += 1;
  if (ratio < worst[0]) worst = [ratio, text];
}
return [...worst, count];
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, example())
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((found for name in names if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium and chromedriver on the PATH (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield started
    started.quit()


def show(browser: Any, address: str, width: int, scheme: str) -> None:
    """Open a page in a window of `width` CSS pixels, light or dark."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    browser.get(address)


def test_opens_without_network_or_errors(browser: Any, report: str) -> None:
    browser.get_log("performance")
    show(browser, report, 1280, "light")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert requests[0] == report
    assert all(url.startswith("data:") for url in requests[1:])
    assert browser.get_log("browser") == []


def test_gallery_is_there_and_pictures_load(browser: Any, report: str) -> None:
    show(browser, report, 1280, "light")
    queries = browser.find_elements("css selector", "#text-queries article")
    assert len(queries) == 8
    assert all(len(query.find_elements("css selector", "ol li img")) == 5 for query in queries)
    assert queries[0].find_element("css selector", "h3").text == "a handwritten zero, number 0"
    right = browser.find_elements("css selector", "#text-queries .is-right .tick")
    assert 1 <= len(right) <= 8
    assert all(tick.is_displayed() and tick.accessible_name == "right" for tick in right)
    widths = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert min(widths) >= 48
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(drawn) == 5
    assert min(drawn) > 150


def test_config_unfolds_by_keyboard(browser: Any, report: str) -> None:
    show(browser, report, 1280, "light")
    config = browser.find_element("css selector", "details pre")
    assert not config.is_displayed()
    browser.find_element("css selector", "details summary").send_keys("\ue007")  # Enter: no mouse needed
    assert config.is_displayed()
    assert "embed_dim: 32" in config.text


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report in which everything is one long word or a large number."""
    word = "W" * 150
    gallery = example(20).gallery
    assert gallery is not None
    path = tmp_path_factory.mktemp("wide") / "report.html"
    numbers = {f"{word}/{word}/recall@1{ending}": 0.123456 for ending in ("", "/ci_low", "/ci_high", "/chance")}
    numbers |= {f"{word}/cost{ending}": 123_456_789.0 for ending in ("", "/ci_low", "/ci_high", "/chance")}
    write_report(
        path,
        example()._replace(
            title=word,
            metrics=numbers,
            config_yaml=word * 9,
            versions={word: word},
            card=dict.fromkeys(("name", "licence", "attribution", "url"), f"https://{word}"),
            gallery=gallery._replace(captions=[f"{word}{n}" for n in range(20)], generated=[word for _ in range(20)]),
        ),
    )
    return path.as_uri()


@pytest.mark.parametrize(
    ("content", "width"),
    [("report", 1280), ("report", 768), ("report", 380), ("report", 320), ("wide", 1280), ("wide", 380)],
)
def test_page_never_scrolls_sideways(browser: Any, width: int, content: str, request: pytest.FixtureRequest) -> None:
    show(browser, request.getfixturevalue(content), width, "light")
    browser.execute_script("document.querySelector('details').open = true")
    # Nothing is cut off unseen either: everything with a size ends inside the window.
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('main *, header *')]"
        ".filter(e => !e.closest('svg, .hidden, .matrix th, .clip'))"
        ".filter(e => e.getBoundingClientRect().right > arguments[0] + 1).map(e => e.outerHTML.slice(0, 80))",
        width,
    )
    assert beyond == []
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_text_has_contrast_in_light_and_dark(browser: Any, report: str, width: int, scheme: str) -> None:
    show(browser, report, width, scheme)
    ratio, text, count = browser.execute_script(CONTRAST)
    assert count > 200
    assert ratio >= 4.5, text


def test_dark_page_is_dark_and_its_figures_too(browser: Any, report: str) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        show(browser, report, 1280, scheme)
        colours[scheme] = browser.execute_script(
            "const line = document.querySelector('#training svg path[style*=\"--series-1\"]');"
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(line).stroke]"
        )
    assert all(light != dark for light, dark in zip(colours["light"], colours["dark"]))


def test_prints(browser: Any, report: str) -> None:
    show(browser, report, 1280, "dark")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")


def test_empty_report_opens(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    write_report(path, example()._replace(metrics={}, history=[], gallery=None, card=None))
    show(browser, path.as_uri(), 380, "dark")
    assert browser.find_element("css selector", "h1").is_displayed()
    assert browser.get_log("browser") == []
