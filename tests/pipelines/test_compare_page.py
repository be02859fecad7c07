"""The page and the plots of runs side by side: safe, one file, colours for all eyes, in a browser."""

import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from pipelines.compare import page
from pipelines.compare.tables import table
from tests.pipelines import browser
from tests.pipelines.made_runs import compared, data_of, write_run

HOSTILE = "<!--<script>alert(1)<\\script>&\"'\u2028$x_1$ naïve 犬"


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three runs of one store, the second the best."""
    folder = tmp_path_factory.mktemp("runs") / "three"
    for n, quality in enumerate((0.6, 1.0, 0.8)):
        write_run(folder / f"run{n}", quality=quality, seed=n, rate=1e-4 * (1 + n))
    return folder


def test_forty_long_runs_make_a_page_of_a_few_megabytes(tmp_path):
    write_run(tmp_path / "0", steps=600, log_every=1, eval_every=2)
    for n in range(1, 40):
        shutil.copytree(tmp_path / "0", tmp_path / str(n))
    found = compared(tmp_path)
    assert len(page.render(found["groups"], [])) < 6 << 20
    assert len(found["groups"][0].rows) == 40


def test_names_and_settings_never_become_markup_or_script(tmp_path):
    name = HOSTILE.replace("/", "")
    write_run(tmp_path / name, init="</script><script>alert(2)</script>", target="<b>bold</b>")
    write_run(tmp_path / "plain\x1b[2J\nname", init="fitted")
    found = compared(tmp_path)
    html = page.render(found["groups"], found["notes"])
    assert html.count("<script") == 2
    assert html.count("</script") == 2
    assert "<!--" not in html
    assert "<b>bold" not in html
    shown = [run["name"] for run in data_of(html)["groups"][0]["runs"]]
    assert name.replace("\u2028", "\\u2028") in shown
    text = table(found)
    assert "plain\\x1b[2J\\nname" in text
    assert "\x1b" not in text


def test_the_page_asks_no_network_and_names_no_place_outside(three):
    html = page.render(compared(three)["groups"], [])
    assert not re.findall(r"(?:https?:)?//[a-z]", html.replace("http://www.w3.org/2000/svg", ""))
    assert not re.findall(r"<(?:link|img|iframe)|@import|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_plots_of_a_run(three, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    files = [Path(place) for place in compared(three / "run1", out=str(tmp_path / "page.html"))["written"]]
    assert [place.name for place in files] == ["page.html", "page.png", "page.svg"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(files[2]).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("runs", "named", "others"), [(16, 16, ""), (17, 8, "9 others, in the page by name")]
)
def test_a_plot_of_many_runs_names_and_colours_those_that_can_be_told_apart(tmp_path, runs, named, others):
    plots = pytest.importorskip("pipelines.compare.plots", reason="the extra `plot` is not installed")
    for n in range(runs):
        write_run(tmp_path / f"run{n}", steps=4, eval_every=2, quality=1 - n / 100)
    figure = plots._figure(compared(tmp_path)["groups"])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split()[0] for label in labels[1 : named + 1]] == [str(n + 1) for n in range(named)]
    assert labels[named + 1 :] == ([others] if others else [])
    for axis in figure.axes:
        curves = [line for line in axis.get_lines() if len(line.get_xdata()) > 1]
        looks = {(line.get_color(), str(line.get_linestyle())) for line in curves}
        assert len(curves) == runs
        assert len(looks) == named + bool(others)


@pytest.mark.slow
def test_plots_of_many_runs_whatever_their_names(three, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    write_run(tmp_path / "runs" / HOSTILE, reached=30, eval_every=None, K=3)
    write_run(tmp_path / "runs" / "other", K=3, store="b" * 64, target="another")
    pages = [str(tmp_path / name) for name in ("a.html", "b.html")]
    written = [compared(three, tmp_path / "runs", out=place)["written"] for place in pages]
    written = [{Path(place).read_bytes() for place in places} for places in written]
    assert len(written[0]) == 3
    assert written[0] == written[1], "the same runs give the same files"


def srgb(text):
    """[3] of "#rrggbb"."""
    return [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def colours():
    """{"light", "dark": ([8, 3] sRGB, paper)} of page.css."""
    css = (page._FOLDER / "page.css").read_text()
    found = dict(re.findall(r"--(c\d|paper): light-dark\((#[0-9a-f]{6}, #[0-9a-f]{6})\)", css))
    pairs = {name: pair.split(", ") for name, pair in found.items()}
    rgb = {name: [srgb(text) for text in pair] for name, pair in pairs.items()}
    curves = np.array([rgb[f"c{n}"] for n in range(page.COLOURS)])
    return {scheme: (curves[:, i], np.array(rgb["paper"][i])) for i, scheme in enumerate(("light", "dark"))}


def linear(rgb):
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE Lab of linear sRGB, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = np.clip(rgb, 0, 1) @ to_xyz.T / np.array([0.95047, 1, 1.08883])
    x, y, z = np.moveaxis(np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear sRGB.
SEEN = {
    "normal": np.eye(3),
    "protan": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deutan": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritan": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("vision", SEEN)
def test_colours_of_curves_are_told_apart_with_any_colour_vision(scheme, vision):
    curves, paper = (linear(np.asarray(part)) for part in colours()[scheme])
    seen = lab(curves @ np.asarray(SEEN[vision]).T)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 1e9 * np.eye(len(seen))
    assert apart.min() > 25, "a difference of 2.3 is just noticeable"
    bright, ground = (part @ np.array([0.2126, 0.7152, 0.0722]) for part in (curves, paper))
    contrast = (np.maximum(bright, ground) + 0.05) / (np.minimum(bright, ground) + 0.05)
    assert contrast.min() >= 3.0, "WCAG 2.1, graphics"


def test_plots_have_the_colours_of_the_page():
    plots = pytest.importorskip("pipelines.compare.plots", reason="the extra `plot` is not installed")
    np.testing.assert_array_equal([*map(srgb, plots.PALETTE)], colours()["light"][0])


needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_every_curve_and_marks_the_best(three, tmp_path):
    compared(three, out=str(tmp_path / "page.html"), plots=False)

    async def at(shown):
        curves = {i: await shown.js(f"document.querySelectorAll('#{i} .curve').length") for i in CHARTS}
        assert curves == dict.fromkeys(CHARTS, 3)
        assert await shown.js("document.querySelectorAll('#length .star').length") == 3
        assert await shown.js("document.querySelector('#length .marked').dataset.key") == "0"
        entries = "[...document.querySelectorAll('#entries .name')].map((e) => e.textContent)"
        assert await shown.js(entries) == ["run1", "run2", "run0"]
        assert await shown.js("document.querySelector('tr.best th').textContent") == "run1"
        assert not await shown.js("document.documentElement.scrollWidth > innerWidth"), "nothing is cut off"
        return shown.problems, shown.asked

    for n, (width, dark) in enumerate(((1400, False), (380, True))):
        problems, asked = browser.look(tmp_path / "page.html", tmp_path / f"p{n}", at, width=width, dark=dark)
        assert problems == []
        assert asked == [(tmp_path / "page.html").as_uri()], "it asks for nothing but itself"


CHARTS = ("length", "acc", "held-out-loss", "training-loss", "training-acc", "gradient", "rate")


@pytest.mark.slow
@needs_chromium
def test_forty_heads_of_a_sweep_are_told_apart(tmp_path):
    for n in range(40):
        rate, seed = (n // 8 + 1) * 1e-4, n % 8
        place = tmp_path / "sweep" / f"learning_rate={rate:g},seed={seed},ttt_steps=7"
        write_run(place, steps=40, quality=1 - n / 50, seed=seed, rate=rate)
    compared(tmp_path / "sweep", out=str(tmp_path / "page.html"), plots=False)

    async def at(shown):
        curves = {i: await shown.js(f"document.querySelectorAll('#{i} .curve').length") for i in CHARTS}
        assert curves == dict.fromkeys(CHARTS, 40)
        names = "[...document.querySelectorAll('#entries .name')].map((e) => e.textContent)"
        assert len(set(await shown.js(names))) == 40
        cut = "[...document.querySelectorAll('#entries .name')].filter((e) => e.scrollWidth > e.clientWidth)"
        assert await shown.js(f"{cut}.length") == 0, "every name is there to its end"
        parents = "[...document.querySelectorAll('#length .curve')].map((e) => e.parentElement"
        looks = f"{parents}.className.baseVal)"
        assert len(set(await shown.js(looks))) == 40, "no two curves look alike"
        await shown.js("document.querySelector('[data-show=best]').click()")
        assert await shown.js("document.querySelectorAll('#length .curve').length") == 5
        assert not await shown.js("document.documentElement.scrollWidth > innerWidth")
        return shown.problems

    for n, width in enumerate((1400, 380)):
        assert browser.look(tmp_path / "page.html", tmp_path / f"p{n}", at, width=width) == []


@pytest.mark.slow
@needs_chromium
def test_a_page_is_used_by_mouse_and_by_keyboard(three, tmp_path):
    (group,) = compared(three, out=str(tmp_path / "page.html"), plots=False)["groups"]
    best = group.rows[0].run.best

    async def at(shown):
        box = (
            "(() => {const r = document.querySelector('#length .marked .star').getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]})()"
        )
        x, y = await shown.js(box)
        await shown.mouse("mouseMoved", x, y)
        tip = "document.querySelector('#length .tip').textContent"
        assert f"{best.values['length_greedy']:.3f}" in await shown.js(tip)
        near = "[...document.querySelectorAll('#entries .near .name')].map((e) => e.textContent)"
        assert await shown.js(near) == ["run1"]
        await shown.js("document.querySelector('#length svg').focus()")
        await shown.press("End", "End", "ArrowDown")
        assert await shown.js(near) == ["run2"]
        await shown.press("ArrowLeft")
        row = group.rows[1].run
        assert f"{row.evaluated.mean['length_greedy_by_k'][-2, -1]:.3f}" in await shown.js(tip)
        await shown.press("+")
        assert not await shown.js("document.getElementById('reset').disabled")
        await shown.press("0", "Escape")
        assert await shown.js("document.getElementById('reset').disabled")
        # What is searched for stays; what is switched off has no curve.
        await shown.js("document.getElementById('search').focus()")
        await shown.press(*"0.0003")
        hidden = "[...document.querySelectorAll('#entries li')].map((e) => e.hidden)"
        assert await shown.js(hidden) == [True, False, True]
        await shown.js("document.querySelector('[data-show=best]').click()")
        assert await shown.js("document.querySelectorAll('#training-loss .curve').length") == 1
        await shown.js("document.querySelector('[data-show=all]').click()")
        return await shown.js("document.querySelectorAll('table.runs thead button').length"), shown.problems

    columns, problems = browser.look(tmp_path / "page.html", tmp_path / "profile", at)
    assert columns > 10
    assert problems == []


@pytest.mark.slow
@needs_chromium
def test_a_browser_runs_nothing_of_a_hostile_name_and_shows_it(tmp_path):
    write_run(tmp_path / "runs" / HOSTILE, init="</script><script>window.ran = 1</script>", K=3)
    write_run(tmp_path / "runs" / "<img src=x onerror=window.ran=1>", reached=0, store="b" * 64)
    compared(tmp_path / "runs", out=str(tmp_path / "page.html"), plots=False)

    async def at(shown):
        await shown.js(
            "(() => {const s = document.getElementById('group'); s.value = 1;"
            " s.dispatchEvent(new Event('change'))})()"
        )
        return await shown.js("typeof window.ran"), await shown.js("document.body.innerText"), shown.problems

    ran, text, problems = browser.look(tmp_path / "page.html", tmp_path / "profile", at)
    assert ran == "undefined"
    assert "<img src=x onerror=window.ran=1>" in text
    assert "nothing measured yet" in text
    assert problems == []
