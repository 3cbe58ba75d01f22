"""A report opened in headless Chromium: does anything run over the page's edge, is any picture or plot empty."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-extensions"),
    "--disable-features=NetworkTimeServiceQuerying",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not on this machine")

# Of every picture: how much of it is white, as a plot's ground is, and how much has a colour, as lines and points have.
_PROBE = """<script>window.addEventListener("load", () => setTimeout(() => {
  const pictures = [...document.images].filter(image => !image.hidden).map(image => {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    if (!canvas.width) return {alt: image.alt, width: 0, white: 0, coloured: 0, right: 0};
    const pen = canvas.getContext("2d"); pen.drawImage(image, 0, 0);
    const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data;
    let white = 0, coloured = 0;
    for (let n = 0; n < pixels.length; n += 4) {
      const r = pixels[n], g = pixels[n + 1], b = pixels[n + 2];
      if (Math.min(r, g, b) > 250) white++;
      if (Math.max(r, g, b) - Math.min(r, g, b) > 40) coloured++;
    }
    const box = image.getBoundingClientRect(), all = pixels.length / 4;
    return {alt: image.alt, width: box.width, right: box.right, white: white / all, coloured: coloured / all};
  });
  const rows = [...document.querySelectorAll(".row")].map(row => new Set(
    [...row.querySelectorAll("img, canvas")].map(one => Math.round(one.getBoundingClientRect().top))).size);
  const columns = [...document.querySelectorAll(".columns")].map(one =>
    getComputedStyle(one).gridTemplateColumns.split(" ").length);
  parent.found(window.innerWidth, {page: document.documentElement.scrollWidth, window: window.innerWidth,
    pictures, rows, columns, cut: [...document.querySelectorAll(".columns .scroll")].filter(one =>
      one.scrollWidth > one.clientWidth + 1).map(one => one.textContent.slice(0, 80)),
    empty: [...document.querySelectorAll("figure, section")].filter(one => !one.textContent.trim()
      && !one.querySelector("img")).length});
}, 200));</script></body>"""
_OUTSIDE = """<!doctype html><title>waiting</title><script>const all = {}; function found(width, what) { all[width] = what;
  if (Object.keys(all).length == 2) document.title = "found:" + JSON.stringify(all); }</script>"""
NARROW_PX, WIDE_PX = 500, 1440


def look(page: Path | str) -> tuple[dict, dict]:
    """Return what Chromium lays out in a narrow and in a wide window: widths, pictures, the lines of each row of pictures."""
    text = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
    inner = html.escape(text.replace("</body>", _PROBE).replace('http-equiv="refresh"', "data-off"))
    frames = "".join(
        f'<iframe style="width:{px}px;height:900px;border:0" srcdoc="{inner}"></iframe>' for px in (NARROW_PX, WIDE_PX)
    )
    with TemporaryDirectory() as folder:
        Path(folder, "page.html").write_text(_OUTSIDE + frames, encoding="utf-8")
        more = (f"--user-data-dir={folder}/profile", f"--window-size={WIDE_PX + 60},1900", "--virtual-time-budget=8000")
        command = [CHROMIUM, *QUIET, *more, "--dump-dom", Path(folder, "page.html").as_uri()]
        dumped = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    found = json.loads(html.unescape(re.search(r"<title>found:(.*?)</title>", dumped, re.DOTALL)[1]))
    return found[str(NARROW_PX)], found[str(WIDE_PX)]


def check_page(page: Path | str) -> dict:
    """Assert that a report fits its window, wide and narrow, and shows nothing empty; returns the wide layout.

    Without Chromium the test that calls it is skipped from here on.
    """
    if CHROMIUM is None:
        pytest.skip("how the report is laid out needs Chromium, which is not on this machine")
    narrow, wide = look(page)
    for found in (narrow, wide):
        assert found["page"] <= found["window"], f"runs over the edge: {found['page']} px in {found['window']}"
        assert found["empty"] == 0
        for picture in found["pictures"]:
            assert picture["width"] > 0, f"no picture: {picture}"
            assert picture["right"] <= found["window"], f"runs over the edge: {picture}"
            assert picture["white"] < 0.7 or picture["coloured"] > 1e-4, f"an empty plot: {picture}"
        assert all(lines == 1 for lines in found["rows"]), "a case's pictures do not stand beside one another"
    assert not wide["cut"], f"half a page is too narrow for a table: {wide['cut']}"
    assert set(wide["columns"]) <= {2} and set(narrow["columns"]) <= {1}
    return wide
