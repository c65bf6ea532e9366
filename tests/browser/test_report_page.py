"""The report in a real browser: it loads alone, without an error, and every figure has marks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lightning_spectral.cli import main
from lightning_spectral.report.dark import BACKGROUND, contrast
from lightning_spectral.report.figures import FIGURES
from tests.report.test_page import rows_of, write_whole_study

pytestmark = pytest.mark.browser

_PROBE = """
<script>
window.errors = [];
window.addEventListener("error", event => window.errors.push(String(event.message)));
window.addEventListener("load", () => {
  const figures = {};
  for (const figure of document.querySelectorAll("figure[data-figure]")) {
    const choice = figure.parentElement.querySelector(`input.${figure.className.replace("f", "v")}`);
    if (choice) choice.checked = true;  // a view over another axis is shown when it is chosen
    const box = figure.querySelector("svg").getBoundingClientRect();
    const marks = [...figure.querySelectorAll("path, use, text")].filter(mark => {
      const own = mark.getBoundingClientRect();
      return own.width + own.height > 0;
    });
    const name = `${figure.dataset.figure} ${figure.className}`;
    figures[name] = {width: box.width, height: box.height, marks: marks.length};
  }
  const box = document.querySelector("figure svg [id$='patch_1'] path");
  const ink = document.querySelector("figure svg [id*='matplotlib.axis_1'] text");
  const cells = [...document.querySelectorAll("[data-csv]")].map(
    cell => [cell.dataset.csv, cell.dataset.row, cell.dataset.column, cell.textContent]);
  const result = document.createElement("script");
  result.type = "application/json";
  result.id = "probe-result";
  result.textContent = JSON.stringify({
    tables: [...document.querySelectorAll("table")].map(table => table.getBoundingClientRect().right),
    colors: [getComputedStyle(document.body).backgroundColor, getComputedStyle(box).fill, getComputedStyle(ink).fill],
    figures, cells, errors: window.errors, requests: performance.getEntriesByType("resource").length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    alert: document.querySelector("[role=alert]")?.getBoundingClientRect().top});
  document.body.append(result);
});
</script>
"""


def chromium() -> str:
    """The browser; a machine without one may skip, the gate may not."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium on the gate: apt-get install chromium")
        pytest.skip("no chromium here")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    write_whole_study(root / "runs")
    assert main(["report", str(root / "runs"), "--out", str(root / "out")]) == 0
    return root / "out"


def seen(page: str, tmp_path: Path, width: int = 1200, *, dark: bool = False) -> dict[str, Any]:
    """What a browser makes of a page, in a window of this width, on a bright or a dark screen."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</head>", _PROBE + "</head>"))
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert console == []
    found = re.search(r'<script type="application/json" id="probe-result">(.*?)</script>', done.stdout, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_no_table_is_cut_off_in_print(report: Path, tmp_path: Path) -> None:
    """The rules of print on a window as wide as A4 within its margins: 186 mm at 96 dots an inch."""
    page = (report / "report.html").read_text()
    assert "@media screen and (prefers-color-scheme: dark)" in page  # paper is white
    assert page.count("@media print {") == 1
    result = seen(page.replace("@media print {", "@media all {"), tmp_path, 703)
    assert len(result["tables"]) > 3
    assert max(result["tables"]) <= 703
    assert result["overflow"] <= 0
    assert max(seen(page, tmp_path, 703)["tables"]) > 703  # on a screen one scrolls


def test_figures_are_dark_on_a_dark_screen_and_white_on_a_bright_one(report: Path, tmp_path: Path) -> None:
    page = (report / "report.html").read_text()
    text = [seen(page, tmp_path, dark=dark)["colors"] for dark in (False, True)]
    (bright_page, bright_box, bright_ink), (dark_page, dark_box, dark_ink) = [
        ["#" + "".join(f"{int(channel):02x}" for channel in re.findall(r"\d+", color)[:3]) for color in colors]
        for colors in text
    ]
    assert bright_page == bright_box == "#ffffff"
    assert dark_page == dark_box == BACKGROUND
    assert contrast(bright_ink, bright_box) > 4.5
    assert contrast(dark_ink, dark_box) > 4.5


def test_the_page_in_chromium(report: Path, tmp_path: Path) -> None:
    result = seen((report / "report.html").read_text(), tmp_path)
    assert result["errors"] == []
    assert result["requests"] == 0
    assert result["overflow"] <= 0
    assert result["alert"] < 900  # the warnings stand on the first screen
    # the curves of one run and a table of exponents have pages of their own
    assert {name.split()[0] for name in result["figures"]} == set(FIGURES) - {"one_run", "estimates"}
    for key, figure in result["figures"].items():
        assert figure["marks"] > 20, key
        assert figure["width"] > 900, key
        assert figure["height"] > 100, key
    assert len(result["cells"]) > 100
    tables = {name: rows_of(report / name) for name in {cell[0] for cell in result["cells"]}}
    for name, row, column, shown in result["cells"]:
        value = tables[name][int(row)][column]
        digits = len(shown.partition(".")[2])
        assert shown == (f"{float(value):.{digits}f}" if value else "-")
