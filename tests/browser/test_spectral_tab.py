"""The tab SPECTRAL in a real browser: curves, hover, slider, filter, without an error on the console."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from werkzeug import Response
from werkzeug.serving import make_server

from lightning_spectral.records import ALARMS_FILE, SPECTRAL_FILE, AlarmRecord, append_records, read_spectral
from lightning_spectral.records.looks import BUCKET_COLORS
from lightning_spectral.report.dark import contrast
from lightning_spectral.tensorboard.plugin import SpectralPlugin
from tests.analysis.synthetic import write_one, write_spectra, write_study
from tests.browser.test_report_page import chromium
from tests.tensorboard.test_plugin import tensorboard

pytestmark = pytest.mark.browser

REPORT = """
const node = document.createElement("script");
node.type = "application/json";
node.id = "probe-result";
node.textContent = JSON.stringify(result);
document.body.append(node);
"""

PAGE = """<!DOCTYPE html><head><base href="/plugin/"></head><body><script type="module">
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
const result = {errors};
const main = () => document.querySelector(".main");
const completed = () => Number(main()?.dataset.complete ?? 0);
async function after(change) {
  const before = completed();
  change();
  for (let k = 0; k < 400 && completed() === before; k += 1) await new Promise((go) => setTimeout(go, 25));
}
const lines = (chart) => [...document.querySelectorAll(`[data-chart="${chart}"] .line`)];
const charts = () => [...document.querySelectorAll("[data-chart]")].map((node) => node.dataset.chart);
const choose = (label, value) => {
  const box = document.querySelector(`select[aria-label="${label}"]`);
  box.value = value;
  box.dispatchEvent(new Event("change"));
};
try {
  const page = await import("./static/index.js");
  await after(() => page.render());
  STEPS
} catch (error) {
  errors.push(String(error.stack));
}
REPORT</script></body>"""


def look(logdir: Path, tmp_path: Path, steps: str, size: str = "1400,1200") -> dict:
    """What ``steps`` put into ``result`` after the page was drawn."""
    apps = SpectralPlugin(TBContext(logdir=str(logdir))).get_plugin_apps()
    page = PAGE.replace("REPORT", REPORT).replace("STEPS", steps)

    def app(environ, start_response):
        path = environ["PATH_INFO"].removeprefix("/plugin")
        own = apps["/static/*"] if path.startswith("/static/") else apps.get(path)
        if own is None:
            own = Response(page if path == "/page" else "", 200 if path == "/page" else 204, mimetype="text/html")
        return own(environ, start_response)

    return browse(app, tmp_path, size)


def browse(app, tmp_path: Path, size: str) -> dict:
    """The result that the page ``/page`` of a WSGI application leaves, without an error on the console."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
        command += ["--virtual-time-budget=20000", f"http://127.0.0.1:{server.server_port}/page"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and not _TENSORBOARDS_OWN.search(line)]
    assert said == [], "\n".join(said)
    found = re.search(r'<script type="application/json" id="probe-result">(.*?)</script>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    result = json.loads(found[1])
    assert result["errors"] == []
    return result


_TENSORBOARDS_OWN = re.compile("Multiple instances of Three.js|software WebGL|GL Driver Message")

AROUND = """<!DOCTYPE html><body style="margin: 0"><iframe id="tb" style="width: 1400px; height: 1000px"></iframe>
<script type="module">
const errors = [];
const result = {errors};
const outer = () => document.getElementById("tb").contentDocument;
const inner = () => outer()?.querySelector("iframe[src*=lightning_spectral]")?.contentDocument;
const boxes = () => [...(outer()?.querySelectorAll("tb-data-table-content-row[data-id] input[type=checkbox]") ?? [])];
async function until(what) {
  for (let k = 0; k < 600 && !what(); k += 1) await new Promise((go) => setTimeout(go, 25));
  if (!what()) throw new Error(`not within 15 s: ${what}`);
}
const tab = (name) => [...outer().querySelectorAll(".plugin-name")].find((n) => n.textContent.trim() === name).click();
const tick = (place) => boxes()[place].dispatchEvent(
  new MouseEvent("click", {bubbles: true, cancelable: true, detail: 1}));
const shown = () => inner()?.querySelectorAll('[data-chart="hard_rank.tail"] .line').length;
const open = (where) => document.getElementById("tb").contentWindow.location.replace(where);
try {
  STEPS
} catch (error) {
  errors.push(String(error.stack));
}
REPORT</script></body>"""


def look_at_tensorboard(logdir: Path, tmp_path: Path, steps: str) -> dict:
    """The same in the whole of TensorBoard, behind a page of its own origin."""
    page = AROUND.replace("REPORT", REPORT).replace("STEPS", steps)
    with tensorboard(logdir) as url:

        def app(environ, start_response):
            path = environ["PATH_INFO"]
            if path == "/page":
                return Response(page, mimetype="text/html")(environ, start_response)
            sent = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)) or None
            kind = {"Content-Type": environ.get("CONTENT_TYPE", "")}
            try:
                request = urllib.request.Request(f"{url}{path}?{environ['QUERY_STRING']}", sent, kind)
                answer = urllib.request.urlopen(request, timeout=30)
            except urllib.error.HTTPError as error:
                answer = error
            kept = {
                name: answer.headers[name] for name in ("Content-Type", "Content-Encoding") if name in answer.headers
            }
            return Response(answer.read(), answer.status, kept)(environ, start_response)

        return browse(app, tmp_path, "1500,1100")


def test_one_run(tmp_path: Path) -> None:
    run = write_one(tmp_path / "runs", "muon", 0.9, 128, layers=3)
    write_spectra(run, 128)
    records = read_spectral(run).records
    bad = [replace(record, step=120, status="undersampled") for record in records if record.step == 100]
    append_records(run / SPECTRAL_FILE, bad)
    alarm = AlarmRecord("muon_128_0", "train", 60, "hard_rank", "post", "tail", 3.0, 128.0, "width", 0.05, "tail fell")
    append_records(run / ALARMS_FILE, [alarm])
    result = look(
        tmp_path / "runs",
        tmp_path,
        """
        result.charts = charts();
        result.colors = lines("hard_rank.all").map((line) => line.getAttribute("stroke"));
        result.points = lines("hard_rank.all")[0].getAttribute("d").match(/[ML]/g).length;
        result.levels = document.querySelectorAll('[data-chart="hard_rank.all"] .level').length;
        result.hollow = document.querySelectorAll('[data-chart="hard_rank.all"] .hollow').length;
        result.alarm = document.querySelector('[data-chart="hard_rank.all"] .alarm title').textContent;
        const hover = document.querySelector('[data-chart="hard_rank.all"] .hover');
        const box = hover.getBoundingClientRect();
        for (let down = 0; down < box.height; down += 8) {
          hover.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + 8, clientY: box.top + down}));
          if (!document.querySelector(".tooltip").hidden) break;
        }
        result.tip = document.querySelector(".tooltip").innerText;
        const slider = document.querySelector(".slider input");
        result.last = document.querySelector(".slider output").textContent;
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        result.first = document.querySelector(".slider output").textContent;
        result.notes = [...document.querySelectorAll('[data-chart="spectrum"] .note')].map((node) => node.textContent);
        const heat = document.querySelector('[data-chart="layers.muon_128_0"]');
        const area = heat.getBoundingClientRect();
        heat.dispatchEvent(new MouseEvent("mousemove", {clientX: area.left + 120, clientY: area.top + 10}));
        result.cell = document.querySelector(".tooltip").innerText;
        const before = lines("hard_rank.all")[0].getAttribute("d");
        await after(() => choose("x axis", "tokens"));
        await after(() => choose("y axis", "untrained"));
        result.label = [...document.querySelectorAll('[data-chart="hard_rank.all"] .label')].map((n) => n.textContent);
        result.moved = lines("hard_rank.all")[0].getAttribute("d") !== before;
        const box_ = document.querySelector(".flags input");
        await after(() => { box_.checked = true; box_.dispatchEvent(new Event("change")); });
        result.ticks = [...document.querySelectorAll('[data-chart="hard_rank.all"] .tick')].map((n) => n.textContent);
        await after(() => choose("metric", "asymmetry"));
        result.asymmetry = lines("asymmetry.all").length;
        result.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
        """,
    )
    assert {"hard_rank.all", "soft_rank.all", "loss.all", "layers.muon_128_0", "spectrum"} <= set(result["charts"])
    assert result["colors"] == [BUCKET_COLORS[bucket] for bucket in ("pooled", "head", "mid", "tail")]
    assert result["points"] == 7  # every window is drawn as it was measured
    assert result["levels"] == 4  # the untrained network, by bucket
    assert result["hollow"] == 4  # the undersampled window
    assert result["alarm"] == "tail fell"
    untrained = [r.hard_rank for r in records if r.step == 0 and r.bucket == "tail"]
    assert "step 0" in result["tip"]
    assert "hard rank" in result["tip"]
    assert "of width D = 128" in result["tip"]
    assert (result["first"], result["last"]) == ("step 20", "step 100")
    assert [note.split()[0] for note in result["notes"]] == ["hard", "soft"]
    assert "layer_02, step 0" in result["cell"]
    shown = float(result["cell"].splitlines()[1].removeprefix("hard rank "))
    assert shown == pytest.approx(untrained[2], rel=1e-3)  # shown with four digits
    assert "training tokens" in result["label"]
    assert "hard rank / untrained" in result["label"]
    assert result["moved"]
    assert "0" in result["ticks"]  # the untrained network has its place on a logarithmic axis
    assert result["asymmetry"] == 4
    assert result["wide"] <= 0


def test_twelve_runs_and_an_exponent(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, (128, 256, 512), seeds=(0, 1), layers=2)
    result = look(
        tmp_path / "runs",
        tmp_path,
        """
        result.charts = charts();
        result.lines = lines("hard_rank.tail").length;
        result.colors = [...new Set(lines("hard_rank.tail").map((line) => line.getAttribute("stroke")))].length;
        result.beta = lines("beta.tail").map((line) => line.getAttribute("stroke"));
        result.bands = document.querySelectorAll('[data-chart="beta.tail"] .band').length;
        const filter = document.querySelector('[aria-label="filter runs"]');
        await after(() => { filter.value = "muon_(128|256)_0"; filter.dispatchEvent(new Event("input")); });
        result.filtered = lines("hard_rank.all").map((line) => line.getAttribute("stroke-dasharray"));
        result.rows = document.querySelectorAll(".runs li").length;
        await after(() => choose("charts", "each"));
        result.each = charts().filter((name) => name.startsWith("hard_rank."));
        for (const place of [0, 1]) {
          document.querySelectorAll(".runs input")[place].click();
          await new Promise((go) => setTimeout(go, 500));
        }
        result.none = main().innerText;
        """,
    )
    assert {f"hard_rank.{bucket}" for bucket in ("pooled", "head", "mid", "tail")} <= set(result["charts"])
    assert sum(name.startswith("layers.") for name in result["charts"]) == 6
    assert result["lines"] == 12
    assert result["colors"] == 6  # hue by optimizer, lightness by width; seeds alike
    assert result["beta"] == ["#E69F00", "#0072B2"]
    assert result["bands"] == 2
    assert result["rows"] == 2
    assert sorted(map(str, result["filtered"])) == ["7 3"] * 4 + ["None"] * 4
    assert len(result["each"]) == 4
    assert result["none"] == "No run is selected."


def test_dots_are_the_untrained_network_alone_and_twelve_seeds_have_twelve_colors(tmp_path: Path) -> None:
    """Three runs share a chart, told apart by dashes of which none looks like the level; twelve have no levels."""
    write_study(tmp_path / "runs", {"muon": 0.9}, (128,), seeds=tuple(range(12)), layers=1)
    result = look(
        tmp_path / "runs",
        tmp_path,
        """
        const words = () => document.querySelector(".main section p").textContent;
        result.colors = [...new Set(lines("hard_rank.tail").map((line) => line.getAttribute("stroke")))].length;
        result.many = words();
        result.levels = document.querySelectorAll('[data-chart="hard_rank.tail"] .level').length;
        const filter = document.querySelector('[aria-label="filter runs"]');
        await after(() => { filter.value = "_[012]$"; filter.dispatchEvent(new Event("input")); });
        const all = (kind) => [...document.querySelectorAll(`[data-chart="hard_rank.all"] ${kind}`)];
        const dashes = (kind) => all(kind).map((node) => node.getAttribute("stroke-dasharray"));
        result.dashes = [...new Set(dashes(".line"))];
        result.dots = [...new Set(dashes(".level"))];
        result.few = words();
        """,
    )
    assert result["colors"] == 12
    assert result["levels"] == 0
    assert "Dotted" not in result["many"]
    assert len(result["dashes"]) == 3
    assert len(result["dots"]) == 1
    assert not set(result["dashes"]) & set(result["dots"])
    assert "Dotted: the untrained network." in result["few"]


def test_lines_and_their_names_can_be_seen_in_the_dark_theme_and_a_saved_chart_keeps_its_colors(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9}, (64, 128, 256), layers=1)
    result = look(
        tmp_path / "runs",
        tmp_path,
        """
        const styles = () => {
          const of = (kind, what) => [...document.querySelectorAll(`[data-chart] ${kind}`)].map((node) => getComputedStyle(node)[what]);
          return {lines: of(".line", "stroke"), names: of(".end", "fill"), page: getComputedStyle(document.body).backgroundColor};
        };
        document.documentElement.classList.remove("dark");
        result.bright = styles();
        document.documentElement.classList.add("dark");
        result.dark = styles();
        result.attributes = [...document.querySelectorAll("[data-chart] .line")].map((node) => node.getAttribute("stroke"));
        """,  # noqa: E501
    )
    bright, dark = result["bright"], result["dark"]
    assert _hex(bright["page"]) == "#ffffff"
    assert _hex(dark["page"]) == "#303030"
    assert len(dark["lines"]) > 4
    assert len(dark["names"]) > 3
    assert min(contrast(_hex(color), "#303030") for color in dark["lines"]) >= 2.95  # 8 bits a channel
    assert min(contrast(_hex(color), "#303030") for color in dark["names"]) >= 4.4
    assert [_hex(color) for color in bright["lines"]] == [color.lower() for color in result["attributes"]]


def _hex(color: str) -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in re.findall(r"\d+", color)[:3])


def test_a_logdir_without_runs_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    result = look(tmp_path / "runs", tmp_path, "result.text = main().innerText;")
    assert result["text"].startswith("No run folder (one with a run.json) lies below the logdir.")


def test_tensorboards_own_selectors_choose_the_runs(tmp_path: Path) -> None:
    """Ticks of Time Series, ticks of Scalars (in the address), and the filter of either."""
    for run in write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, (128, 256), seeds=(0, 1), layers=2):
        EventFileWriter(str(run / "logs" / "tensorboard")).close()
    result = look_at_tensorboard(
        tmp_path / "runs",
        tmp_path,
        """
        open("/#timeseries");
        await until(() => boxes().length === 8);
        tick(1);
        await until(() => !boxes()[1].checked);
        tab("Spectral");
        await until(() => shown() === 7);
        result.first = inner().querySelector(".count small").textContent;
        inner().querySelectorAll(".runs input")[0].click();  // the list of the tab goes on from there
        await until(() => shown() === 6);
        tab("Time Series");
        await new Promise((go) => setTimeout(go, 200));
        tick(1);
        tick(7);
        await until(() => boxes()[1].checked && !boxes()[7].checked);
        tab("Spectral");
        await until(() => inner().querySelectorAll(".runs input")[1].checked);
        result.boxes = [...inner().querySelectorAll(".runs input")].map((box) => box.checked);
        const ticks = {"muon_128_0/logs/tensorboard": false, "muon_256_0/logs/tensorboard": true};
        open("about:blank");
        await until(() => !outer()?.querySelector("tb-webapp"));
        open(`/?runFilter=muon.*tensorboard$#lightning_spectral&runSelectionState=${btoa(JSON.stringify(ticks))}`);
        await until(() => inner()?.querySelectorAll('[data-chart="hard_rank.all"] .line').length === 3 * 4);
        result.filter = inner().querySelector("input[type=text]").value;
        result.listed = [...inner().querySelectorAll(".runs .name")].map((node) => node.textContent);
        """,
    )
    assert result["first"] == "7 of 8 runs drawn"
    assert result["boxes"] == [False, True, True, True, True, True, True, False]
    assert result["filter"] == "muon.*tensorboard$"
    assert result["listed"] == ["muon_128_0", "muon_128_1", "muon_256_0", "muon_256_1"]


def test_300_runs_open_within_three_seconds_of_the_processors(tmp_path: Path) -> None:
    """Of browser and plugin together, beyond what a browser with one run takes."""
    first = write_one(tmp_path / "one", "muon", 0.9, 128, layers=4, steps=range(0, 200, 20))
    for place in range(300):
        folder = tmp_path / "many" / f"run_{place:03d}"
        folder.mkdir(parents=True)
        for file in first.iterdir():
            (folder / file.name).write_text(file.read_text().replace('"muon_128_0"', f'"run_{place}"'))
    taken = {}
    for logdir in ("one", "many"):
        before = seconds_of_processors()
        count = "result.count = document.querySelector('.count small').textContent; result.charts = charts();"
        result = look(tmp_path / logdir, tmp_path, count)
        taken[logdir] = seconds_of_processors() - before
    assert result["count"] == "12 of 300 runs drawn"
    assert {f"hard_rank.{bucket}" for bucket in ("pooled", "head", "mid", "tail")} <= set(result["charts"])
    assert taken["many"] - taken["one"] < 3, taken


def seconds_of_processors() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
