"""The tab SPECTRAL with what is not as usual: long names, no numbers, one window, no runs, a theme that changes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_spectral.report.dark import contrast
from tests.analysis.synthetic import let_diverge, write_one, write_study
from tests.browser.test_spectral_tab import _hex, look, look_at_tensorboard

pytestmark = pytest.mark.browser

LONG = "my_experiment_with_lr_0.003_and_wd_0.01_and_warmup_2000_on_fineweb_edu_10B_seed_"

NAMES = [
    (
        [f"ffn_multiplier-{m}_optimizer-{o}_seed-{s}" for m in (2, 4) for o in ("AdamW", "Muon") for s in (0, 1)],
        [f"{m} {o} {s}" for m in (2, 4) for o in ("AdamW", "Muon") for s in (0, 1)],
    ),
    ([LONG + "0", LONG + "1"], ["seed 0", "seed 1"]),
    (["runs/muon", "runs/adamw"], ["muon", "adamw"]),
    (["a/run", "a/run_x/b"], ["run", "run x b"]),
    (["short"], ["short"]),
    (["o" * 40], ["o" * 10 + "..." + "o" * 9]),
    ([], []),
]


def test_short_names(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    given = json.dumps([names for names, _ in NAMES])
    steps = f"""
      const {{shortNames}} = await import("./static/names.js");
      result.names = {given}.map((names) => [...shortNames(names).values()]);
    """
    assert look(tmp_path / "runs", tmp_path, steps)["names"] == [short for _, short in NAMES]


def test_three_runs_with_very_long_names(tmp_path: Path) -> None:
    for seed in range(3):
        write_one(tmp_path / "runs", "muon", 0.9, 128, seed, layers=2, labels={"exp": f"{LONG}{seed}"})
    result = look(
        tmp_path / "runs",
        tmp_path,
        """
        const box = (node) => node.getBoundingClientRect();
        const legends = [...document.querySelectorAll(".legend")];
        result.legends = legends.map((legend) => [...legend.children].map((run) => run.textContent));
        result.titles = [...legends[0].children].map((run) => run.title);
        result.dashes = [...legends[0].querySelectorAll("path")].map((node) => node.getAttribute("stroke-dasharray"));
        result.drawn = [...new Set(lines("hard_rank.all").map((line) => line.getAttribute("stroke-dasharray")))];
        result.tops = ["hard_rank.all", "soft_rank.all"].map((name) => box(document.querySelector(`[data-chart="${name}"]`)).top);
        result.list = Math.max(...[...document.querySelectorAll(".runs li")].map((node) => box(node).height));
        result.captions = [...document.querySelectorAll("figure")].map((node) => box(node.firstChild).width - box(node.lastChild).width);
        result.swatches = [...document.querySelectorAll(".swatch")].filter((node) => !node.hidden).length;
        result.wide = main().scrollWidth - main().clientWidth;
        """,  # noqa: E501
    )
    assert len(result["legends"]) == 2  # of the ranks and of the losses: once, not once a chart
    assert max(len(name) for name in result["legends"][0]) <= 22
    assert len(set(result["legends"][0])) == 3
    assert all(LONG in title for title in result["titles"])
    assert result["dashes"] == result["drawn"]
    assert result["tops"][0] == result["tops"][1]  # side by side
    assert result["list"] < 50  # two lines at most, of names of 100 letters
    assert max(result["captions"]) <= 0
    assert result["swatches"] == 0  # colours are buckets here
    assert result["wide"] <= 0


def test_labels_of_twelve_runs_differ_and_can_be_read(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, (128, 256, 512), seeds=(0, 1), layers=1)
    result = look(
        tmp_path / "runs",
        tmp_path,
        """
        document.documentElement.classList.remove("dark");
        const ends = [...document.querySelectorAll('[data-chart="hard_rank.tail"] .end')];
        result.labels = ends.map((node) => node.textContent);
        result.places = ends.map((node) => Number(node.getAttribute("y")));
        const read = [...document.querySelectorAll(".chart .end")].map((node) => getComputedStyle(node).fill);
        const captions = [...document.querySelectorAll("figcaption span")].map((node) => getComputedStyle(node).color);
        result.colors = [...read, ...captions];
        """,
    )
    assert len(set(result["labels"])) == 12
    places = sorted(result["places"])
    assert min(after - before for before, after in pairwise(places)) >= 11
    assert min(contrast(_hex(color), "#ffffff") for color in result["colors"]) >= 4.4  # 8 bits a channel


def test_runs_without_numbers_are_named_and_leave_the_others_their_labels(tmp_path: Path) -> None:
    let_diverge(write_one(tmp_path / "runs" / "a", "muon", 0.9, 128, layers=2), 0)
    let_diverge(write_one(tmp_path / "runs" / "b", "muon", 0.9, 128, layers=2), 60)
    result = look(
        tmp_path / "runs",
        tmp_path,
        """
        result.said = document.querySelector(".main .message").textContent;
        const ends = [...document.querySelectorAll('[data-chart="hard_rank.all"] .end')];
        result.labels = ends.map((node) => node.textContent);
        const pixel = (name, share) => {
          const heat = document.querySelector(`[data-chart="layers.${name}"]`);
          const copy = new OffscreenCanvas(heat.width, heat.height).getContext("2d", {willReadFrequently: true});
          copy.drawImage(heat, 0, 0);
          const at = copy.getImageData(heat.width * share, 20, 1, 1).data;
          return `rgb(${at[0]}, ${at[1]}, ${at[2]})`;
        };
        result.empty = [pixel("a/muon_128_0", 0.5), pixel("b/muon_128_0", 0.8)];
        result.filled = pixel("b/muon_128_0", 0.25);
        result.line = getComputedStyle(document.body).getPropertyValue("--line").trim();
        """,
    )
    assert result["said"] == "No window has a number: a/muon_128_0 (status: nonfinite, not_matched)."
    assert sorted(result["labels"]) == ["ALL", "HEAD", "MID", "TAIL"]
    assert [_hex(color) for color in result["empty"]] == [result["line"]] * 2
    assert _hex(result["filled"]) != result["line"]


def test_one_window_and_no_runs(tmp_path: Path) -> None:
    write_one(tmp_path / "runs", "muon", 0.9, 128, steps=(0,), layers=2)
    (tmp_path / "none").mkdir()
    ticks = """
      const bottom = [...document.querySelectorAll('[data-chart="hard_rank.all"] .tick[text-anchor="middle"]')];
      result.ticks = bottom.map((node) => node.textContent);
      result.side = document.querySelector(".side").hidden;
    """
    one, none = (look(tmp_path / name, tmp_path, ticks) for name in ("runs", "none"))
    assert one["ticks"] == ["0"]  # no step -0.5
    assert (one["side"], none["side"]) == (False, True)


def test_the_theme_menu_of_tensorboard_changes_the_ink_of_heat_maps_at_once(tmp_path: Path) -> None:
    write_one(tmp_path / "runs", "muon", 0.9, 128, layers=2)
    result = look_at_tensorboard(
        tmp_path / "runs",
        tmp_path,
        """
        const heat = () => inner()?.querySelector("canvas.heat");
        const theme = async (name) => {
          outer().querySelector("[aria-label='Menu for changing light or dark theme']").click();
          const choice = () => [...outer().querySelectorAll("[role^=menuitem]")].find((node) => node.textContent.includes(name));
          await until(choice);
          choice().click();
        };
        const ink = () => {  // of the names of layers: the pixel that is farthest from the page
          const {data} = heat().getContext("2d").getImageData(0, 0, 180, 100);
          const pixels = [...Array(data.length / 4).keys()].filter((k) => data[4 * k + 3] > 250);
          return pixels.length ? [...data.slice(4 * pixels[0], 4 * pixels[0] + 3)] : null;
        };
        open("/#lightning_spectral");
        await until(heat);
        for (const [name, dark] of [["Light", false], ["Dark", true]]) {
          await theme(name);
          await until(() => inner().documentElement.classList.contains("dark") === dark);
          const before = heat();
          await until(() => heat() && (heat() !== before || result.Light === undefined));
          result[name] = ink();
        }
        const button = outer().querySelector("[aria-label='Menu for changing light or dark theme']").getBoundingClientRect();
        result.button = [button.left / 1400, button.top];
        """,  # noqa: E501
    )
    inks = [_hex(str(result[name])) for name in ("Light", "Dark")]
    assert contrast(inks[0], "#ffffff") > 4.5
    assert contrast(inks[1], "#303030") > 4.5
    assert result["button"][0] > 0.7  # at the top right, as the documentation says
    assert result["button"][1] < 60
