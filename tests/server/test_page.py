"""The page at /express in a real browser (Debian's chromium), against a real server."""

from __future__ import annotations

import json
import re

import pytest
from browser import Browser

pytestmark = [pytest.mark.server, pytest.mark.ops]


@pytest.fixture(scope="module")
def server(small_server):
    return small_server


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    return tmp_path_factory.mktemp("screenshots")


@pytest.fixture()
def page(server):
    with Browser() as browser:
        browser.open(f"{server.url}/express")
        browser.until("document.getElementById('state').textContent === 'connected'")
        yield browser


def text(page, name):
    return page.run(f"document.getElementById('{name}').textContent")


def test_the_keyboard_alone_runs_a_prompt_both_ways(page, screenshots):
    """Tab to the prompt, fill in the long one, run, and read both answers."""
    reached = []
    for _ in range(12):
        page.key("Tab")
        reached.append(page.run("document.activeElement.id || document.activeElement.tagName"))
    order = [name for name in reached if name in ("prompt", "memory", "tokens", "run", "long")]
    assert order == ["prompt", "memory", "tokens", "run", "long"]
    page.run("document.getElementById('long').focus()")
    page.key("Enter")
    assert "chapel on day 55" in page.run("document.getElementById('prompt').value")
    page.run("document.getElementById('tokens').value = 24; document.getElementById('run').focus()")
    page.key("Enter")
    page.until("document.getElementById('run').disabled")
    assert text(page, "form-state") == "Running both …"
    seen = page.until(
        "(() => { const text = (id) => document.getElementById(id).textContent;"
        " const n = (id) => Number(text(id).replace(',', ''));"
        " return n('held') > 0 && n('exact') > n('held') && [n('held'), n('exact')]; })()", 120,
    )  # fmt: skip
    assert seen[0] < seen[1], "live: fewer slots are held than exact attention would"
    assert "times fewer than exact attention would" in text(page, "summary")
    page.screenshot(screenshots / "running.png")
    page.until("!document.getElementById('run').disabled", 180)
    assert text(page, "bounded") and text(page, "full")
    peak, exact = re.findall(r"\d[\d,]*", text(page, "bounded-usage"))[:2]
    assert peak == "255" and int(exact.replace(",", "")) > 1300
    # The wide layers leave room unused that exact attention would not take.
    assert re.match(r"peak [\d,]+ tokens, exact attention [\d,]+ \(0.77 times\), 0 compactions",
                    text(page, "full-usage"))  # fmt: skip
    page.until("document.querySelectorAll('#rows tr').length >= 2")
    rows = page.run("[...document.querySelectorAll('#rows tr')].map((row) => row.innerText)")
    assert any("exact" in row for row in rows[:2]) and any("\t255\t" in row for row in rows[:2])
    page.screenshot(screenshots / "light.png")
    page.dark(True)
    page.screenshot(screenshots / "dark.png")
    print(f"screenshots are in {screenshots}")


def test_a_prompt_can_be_pinned(page):
    """Rounded up, as everywhere; the exact answer keeps all."""
    page.run("document.getElementById('long').click()")
    page.run("document.getElementById('tokens').value = 4")
    page.run("document.getElementById('pinned').value = 40")
    page.run("document.getElementById('run').click()")
    page.until("!document.getElementById('run').disabled", 180)
    assert text(page, "bounded-usage").endswith("first 48 tokens kept exactly")
    assert " 0 compactions" in text(page, "full-usage")


def test_a_refusal_is_shown_in_words(page):
    page.run("document.getElementById('memory').removeAttribute('min')")
    page.run("document.getElementById('memory').value = 5")
    page.run("document.getElementById('run').click()")
    page.until("document.getElementById('bounded-usage').className === 'error'", 120)
    assert "express.memory_tokens=5 is not allowed" in text(page, "bounded-usage")
    page.until("!document.getElementById('run').disabled", 120)


def test_nothing_comes_from_elsewhere_and_nothing_is_blocked(page, server):
    resources = page.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert resources and all(name.startswith(server.url + "/v1/express/") for name in resources)
    problems = [
        entry for entry in page.console
        if entry.get("entry", {}).get("level") == "error" or "exceptionDetails" in entry
    ]  # fmt: skip
    assert not problems, problems


def test_assistive_technology_finds_names_for_everything(page):
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    seen = []
    for node in nodes:
        role, name = (node.get(key, {}).get("value") for key in ("role", "name"))
        if node.get("ignored"):
            continue
        seen.append((role, name))
        if role in ("textbox", "spinbutton", "combobox", "button", "image", "region", "table"):
            assert name, f"a {role} has no name"
    names = {name for role, name in seen if role in ("textbox", "spinbutton", "combobox")}
    assert {
        "Prompt",
        "Memory (tokens)",
        "Pinned tokens",
        "Most output tokens",
        "Profile",
        "Send as",
    } <= names
    assert [name for role, name in seen if role == "heading"][:2] == [
        "Express: KV caches of constant size", "KV memory now",
    ]  # fmt: skip
    assert sum(role == "status" for role, _ in seen) == 2, "changes are announced"
    assert page.run("document.documentElement.lang") == "en"


CONTRAST = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const back = (element) => {
    for (; element; element = element.parentElement) {
      const found = channels(getComputedStyle(element).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ['SCRIPT', 'TITLE', 'OPTION'].includes(element.tagName)) continue;
    const a = light(channels(getComputedStyle(element).color)), b = light(back(element));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push(element.tagName + ' ' + element.id + ' ' + ratio.toFixed(2));
  }
  return low;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_both_schemes(page, dark):
    page.dark(dark)
    page.run("document.getElementById('state').className = 'error'")
    assert page.run(CONTRAST) == []


def test_it_fits_a_phone(page):
    page.call(
        "Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2,
        mobile=True,
    )  # fmt: skip
    wide = page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{wide} pixels have to be scrolled sideways"


def test_the_policy_keeps_foreign_scripts_out(page):
    page.run("const s = document.createElement('script'); s.textContent = 'window.evil = 1';"
             "document.body.append(s)")  # fmt: skip
    assert page.run("window.evil") is None, json.dumps(page.console)
