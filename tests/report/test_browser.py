"""The page in a headless browser: nothing overflows a phone, every figure is drawn, nothing is fetched, few sheets."""

from __future__ import annotations

import html as escaping
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from retrofit.recipe.load import dump_recipe, load_recipe
from retrofit.report.render import html
from tests.report.made_up import run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCRIPT = """<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const drawn = [...page.querySelectorAll("figure")].map(one => {
    const box = (one.querySelector("svg") || one.querySelector("table")).getBoundingClientRect();
    return [box.width, box.height, one.querySelectorAll("svg path, td").length];
  });
  const pinned = [...page.querySelectorAll("table.pinned tr")].map(one => {
    const box = one.lastElementChild.getBoundingClientRect();
    return [box.left, box.right, one.lastElementChild.scrollWidth - one.lastElementChild.clientWidth];
  });
  for (const one of page.querySelectorAll("details")) one.open = true;
  const tables = [...page.querySelectorAll("table")].map(one => {
    const around = one.parentElement, style = frame.contentWindow.getComputedStyle(around);
    return [around.getBoundingClientRect().right, style.overflowX];
  });
  const fetched = frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name);
  document.querySelector("pre").textContent = JSON.stringify({wide: root.scrollWidth, drawn, pinned, tables, fetched});
};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
@pytest.mark.parametrize("width", [360, 375, 1280])
def test_a_page_fits_its_screen_and_asks_for_nothing(tmp_path: Path, width: int) -> None:
    file = tmp_path / "frame.html"
    framed = f'<iframe style="border:0;width:{width}px;height:900px"></iframe>'
    page = escaping.escape(html(run()), quote=True)
    file.write_text(f"<!doctype html><pre></pre>{framed}{SCRIPT}".replace(
        "</script>", 'frame.srcdoc = document.querySelector("template").dataset.page;</script>'
    ).replace("<pre>", f'<template data-page="{page}"></template><pre>', 1), encoding="utf-8")  # fmt: skip
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = re.findall(r"<pre>(\{.*?\})</pre>", done.stdout)
    assert found, "the page did not load"
    seen = json.loads(found[0])
    assert seen["wide"] <= width
    assert len(seen["drawn"]) == 18
    assert all(w > 100 and h > 40 and marks > 3 for w, h, marks in seen["drawn"])
    assert len(seen["pinned"]) == 18
    assert all(0 <= left < right <= width for left, right, _ in seen["pinned"]), "every ratio is in view"
    assert not any(cut > 0 for *_, cut in seen["pinned"])
    assert len(seen["tables"]) > 18, "those of folded sections too"
    for right, overflow in seen["tables"]:
        assert right <= width
        assert overflow == "auto", "a table that is wider moves in its own box"
    assert seen["fetched"] == []
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def printed(tmp_path: Path, page: str, name: str) -> bytes:
    """The page as PDF."""
    file, pdf = tmp_path / f"{name}.html", tmp_path / f"{name}.pdf"
    file.write_text(page, encoding="utf-8")
    subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--no-pdf-header-footer", f"--print-to-pdf={pdf}", file.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip
    return pdf.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
def test_everything_prints_on_five_pages_and_so_do_folded_tables(tmp_path: Path) -> None:
    page = html(run(recipe_yaml=dump_recipe(load_recipe("quickstart"))))
    whole = printed(tmp_path, page, "whole")
    assert len(re.findall(rb"/Type\s*/Page[^s]", whole)) <= 5
    unfolded = printed(tmp_path, page.replace("<details", "<details open"), "open")
    without = printed(tmp_path, re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL), "without")
    assert abs(len(whole) - len(unfolded)) < 0.05 * (len(unfolded) - len(without)), "folded or not prints alike"
