"""The console in a real Chromium, over real services: what it shows, how soon, and for whom."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from tests.browser import CONTRAST, browser, executable
from tests.e2e.conftest import free_ports

HERE = "127.0.0.1"
KEY = "a-key-of-the-tests"
ENGINE = ["--engine", "emulated", "--engine-prefill-tokens-per-s", "20000", "--engine-decode-step-s", "0.005"]
ENGINE += ["--engine-arena-bytes", "64M", "--node-heartbeat-s", "0.25"]
NODES = {"d1": ("decode", "home"), "d2": ("decode", "home"), "p1": ("prefill", "home"), "p2": ("prefill", "away")}
SHOTS = os.environ.get("CONSOLE_SCREENSHOTS", "")
"""A folder, for a person who wants to look at them."""

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(executable() is None, reason="no Chromium here: the console was NOT tested"),
]


@pytest.fixture
async def console(cluster):
    """Two regions behind a router that asks for a key."""
    names = ["router", *NODES]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    cluster.router_url = f"http://{HERE}:{ports['router']}"
    flags = ["--bind", f"{HERE}:{ports['router']}", "--model", "bytes", "--router-api-keys", KEY, "--threshold", "512"]
    cluster._add("router", ["prfaas.services", "router", *flags, *cluster._secret], cluster.router_url)
    for name, (role, region) in NODES.items():
        flags = ["--name", name, "--region", region, "--bind", f"{HERE}:{ports[name]}", "--kv-bind", f"{HERE}:0"]
        flags += ["--routers", cluster.router_url]
        command = ["prfaas.services", role, *flags, *cluster._secret, *ENGINE]
        cluster._add(name, command, f"http://{HERE}:{ports[name]}")
    await cluster.wait_for(lambda m: sum(n for k, n in m["prfaas_router_nodes"].items() if "usable" in k) == len(NODES))
    return cluster


@pytest.fixture
async def page(console, tmp_path):
    async with browser(tmp_path) as page:
        await page.look()
        await page.open(console.router_url + "/console")
        yield page
        assert page.problems == []
        assert page.origins == {console.router_url}


async def enter_key(page, key=KEY):
    await page.until("!document.getElementById('key-form').hidden && document.activeElement.id === 'key'")
    page.problems.clear()  # the 401 that made it ask
    await page.write(key)
    await page.key("Enter")


async def ask(console, tokens, route="offload"):
    """One answer; the id of its request."""
    body = {"model": "emulated", "prompt": [65] * tokens, "max_tokens": 4, "temperature": 0}
    headers = {"authorization": f"Bearer {KEY}", "x-prfaas-pin-route": route}
    async with console.session.post(console.router_url + "/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        return response.headers["x-request-id"]


def shown(text):
    return f"document.body.innerText.includes({json.dumps(text)})"


async def shoot(page, name):
    if SHOTS:
        await page.screenshot(Path(SHOTS) / f"{name}.png")


async def test_the_cluster_its_decisions_and_a_request(console, page):
    """Nodes by region and role, thresholds, links, why requests went where; one that is followed, by the keyboard
    alone, shows its parts and its layers, and the address brings it back."""
    await enter_key(page)
    await page.until(shown("live"))
    for text in ("away: prefill", "home: decode", "home: prefill", "THRESHOLD, HOME".lower(), "emulated"):
        await page.until(shown(text))
    request_id = await ask(console, 2000)
    await ask(console, 30, "home")
    await page.until(shown(request_id[:12]))
    await page.until(shown("pinned"))
    await page.until(shown("away → home"))
    link = f"[...document.querySelectorAll('#list a')].find(a => a.textContent === '{request_id[:12]}')"
    await page.value("document.getElementById('requests').focus()")
    while not await page.value(f"document.activeElement === {link}"):
        await page.key("Tab")
    await page.key("Enter")
    await page.until(shown("2,000 + 4 tokens"))
    await page.until(shown("prefill on p2, decode on d"))
    assert await page.value("document.querySelectorAll('#waterfall rect').length") >= 8 * 2
    assert "arrived at" in await page.value("document.querySelector('#waterfall svg').getAttribute('aria-label')")
    await shoot(page, "light")
    address = await page.value("location.href")
    await page.open(address.replace("/console#", "/console?again#"))
    await page.until(shown("2,000 + 4 tokens"))


async def test_a_node_that_dies_and_a_router_that_is_gone_are_told(console, page):
    """In words, not by colour alone."""
    await enter_key(page)
    await page.until(shown("live"))
    console.processes["d2"].stop()
    await page.until("![...document.querySelectorAll('th')].some(e => e.textContent === 'd2')")
    console.processes["router"].kill()
    await page.until("document.getElementById('live').classList.contains('stale')")
    page.problems.clear()
    console.processes["router"].start()
    await page.until("document.getElementById('live').textContent === 'live'")
    page.problems.clear()


async def test_nothing_without_the_key(console, page):
    """A wrong one is asked for again; the page itself holds nothing of the cluster."""
    await enter_key(page, "wrong")
    await page.until("document.getElementById('live').textContent === 'the router refuses this key'")
    assert not await page.value(shown("d1"))
    await enter_key(page)
    await page.until(shown("home: decode"))


async def test_it_can_be_read(console, page):
    """Contrast as WCAG AA asks, in both schemes; on a phone nothing is wider than it but tables that scroll; headings,
    labels and the language are there for those who listen."""
    await enter_key(page)
    request_id = await ask(console, 2000)
    await page.until(shown(request_id[:12]))
    await page.value(f"location.hash = '#request={request_id}'")
    await page.until("document.querySelectorAll('#waterfall rect').length > 8")
    for phone, dark in itertools.product((False, True), repeat=2):
        await page.look(width=390 if phone else 1280, height=844 if phone else 900, dark=dark, phone=phone)
        assert await page.value(CONTRAST) == []
        assert await page.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        await shoot(page, f"{'phone' if phone else 'wide'}-{'dark' if dark else 'light'}")
    assert await page.value("document.documentElement.lang") == "en"
    assert await page.value("[...document.querySelectorAll('svg')].every(e => e.getAttribute('aria-label'))")
    assert await page.value("[...document.querySelectorAll('table')].every(e => e.querySelector('th[scope]'))")
    assert await page.value("document.querySelectorAll('button').length") == 0
