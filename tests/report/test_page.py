import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from cats.cli import main
from cats.errors import DataError, FormatError, StorageError
from cats.history import History
from cats.report import Material, write_page
from cats.results import append_results
from tests.records import mlp_time, perplexity, profile, task_score

pytest.importorskip("matplotlib", reason="needs the extra report")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
ENVIRONMENT = {"device": "a <device> & more", "cats": "0.1.0", "time": "now"}


def quality(method, target, value, **changes):
    """A perplexity and the accuracy of two tasks and their mean, of one variant."""
    variant = method if target is None else f"{method}-{target * 100:g}"
    calibration = dict(text="web.txt", samples=500, length=1024, seed=7)
    common = {f"calibration_{name}": setting for name, setting in calibration.items()}
    common |= dict(model="tiny", dtype="float32", samples=8, environment=ENVIRONMENT) | changes
    reads = dict(
        realized_sparsity=target if target is not None or method == "dense" else 0.4,
        mlp_share=1 - (target or 0) * 2 / 3,
        token_bytes=round(1e9 * value),
    )
    yield perplexity(variant, 10 / value, text="wiki.txt", **reads, **common)
    errors = dict(difference=value - 0.7, difference_stderr=0.011, limit=None)
    for task in ("piqa", "sciq", "mean"):
        split = "" if task == "mean" else "validation"
        yield task_score(variant, value, task=task, split=split, **errors, **common)


def page_time(variant, s):
    measured = dict(low=18.0 - 9 * s, high=22.0 - 11 * s, limit_us=15.0 - 10 * s)
    return mlp_time(20.0 - 10 * s, variant=variant, sparsity=s, **measured)


@pytest.fixture
def folder(tmp_path):
    """Results of every kind, as the commands leave them."""
    rows = [("dense", None, 0.7), ("cats", 0.5, 0.68), ("cats", 0.9, 0.4), ("relu", None, 0.3)]
    append_results(tmp_path / "quality.jsonl", [r for row in rows for r in quality(*row)])
    times = [page_time("dense_eager", 0.0), *(page_time("cpu", s) for s in (0.0, 0.5, 0.9))]
    append_results(tmp_path / "mlp.jsonl", times)
    (tmp_path / "profile-cats.json").write_text(json.dumps(profile(0.2)))
    (tmp_path / "answers" / "dense").mkdir(parents=True)
    (tmp_path / "answers" / "dense" / "piqa.jsonl").write_text("not a result\n")
    return tmp_path


@pytest.fixture
def page(folder):
    path = folder / "report.html"
    write_page(Material.read([folder]), path, title="Tiny <report>")
    return path


def test_page_holds_every_table_with_errors_and_paired_differences(page):
    text = html.unescape(re.sub(r"<svg.*?</svg>", "", page.read_text(), flags=re.S))
    assert "piqa (validation, 8)" in text
    assert "<td>68.0 ± 2.0</td>" in text
    assert "<td>-2.0 ± 1.1</td>" in text
    assert "<td>cats-50</td><td>14.706</td><td>+2.9%</td><td>66.7%</td>" in text
    assert "Calibrated on 500 blocks of 1024 tokens of web.txt, seed 7." in text
    assert "Mistral-7B</td><td>69.94" in text
    assert "<td>cpu</td><td>50%</td><td>15</td><td>13.5 to 16.5</td><td>10</td>" in text


def test_page_is_self_contained_and_escaped(page):
    text = page.read_text()
    fetched = re.findall(r'(?:src|href)="(?!#)([^"]*)"|url\((?!#)([^)]*)\)|@import', text)
    assert not fetched
    assert "<script" not in text
    assert "Tiny &lt;report&gt;" in text
    assert "<report>" not in text
    assert "a &lt;device&gt; &amp; more" in text


class Tags(HTMLParser):
    """Checks that every tag is closed, and collects ids."""

    void = frozenset({"meta", "path", "use", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_tags_are_closed_and_ids_unique(page):
    tags = Tags()
    tags.feed(page.read_text())
    assert not tags.open
    assert len(tags.ids) == len(set(tags.ids)) > 0


def test_figures_take_their_ink_from_the_page(folder):
    figures = write_page(Material.read([folder]), folder / "report.html")
    assert len(figures) == 8
    for svg in figures.values():
        assert "currentColor" in svg
        assert "#000000" not in svg


def test_repeated_results_count_once_and_the_dense_one_stands_first(folder):
    again = list(quality("cats", 0.5, 0.69))
    append_results(folder / "results.jsonl", again)
    (group,) = Material.read([folder]).perplexities().values()
    assert [r.variant for r in group] == ["dense", "cats-50", "cats-90", "relu"]
    assert group[1].value == pytest.approx(10 / 0.69)


def test_other_weights_under_the_same_name_stand_apart(folder):
    other = list(quality("dense", None, 0.5, weights="abc"))
    before = Material.read([folder])
    append_results(folder / "results.jsonl", other)
    after = Material.read([folder])
    for old, new in (
        (before.tasks(), after.tasks()),
        (before.perplexities(), after.perplexities()),
    ):
        ((name, results),) = old.items()
        assert new[f"{name}, hashes unknown"] == results
        assert [r.weights for r in new[f"{name}, hashes abc"]][:1] == ["abc"]


def test_variants_stand_by_method_and_target_whatever_the_order_of_their_files(folder):
    rows = [("input", 0.2, 0.69), ("input", 0.6, 0.5), ("cats", 0.3, 0.69)]
    append_results(folder / "a.jsonl", [r for row in rows for r in quality(*row)])
    material = Material.read([folder])
    names = ["dense", "cats-30", "cats-50", "cats-90", "relu", "input-20", "input-60"]
    for group in (material.perplexities(), material.tasks()):
        (results,) = group.values()
        assert list(dict.fromkeys(r.variant for r in results)) == names


def test_perplexities_of_several_magnitudes_stay_apart(folder):
    append_results(folder / "a.jsonl", quality("cats", 0.95, 0.001))
    figures = write_page(Material.read([folder]), folder / "report.html")
    # 14, 15, 25 and 10,000 on a logarithmic scale: the label 1000 is there, 2000 is not
    assert "1000<" in figures["figure1"]
    assert "2000<" not in figures["figure1"]


def test_histories_in_a_folder_are_left_out(folder):
    before = len(Material.read([folder]).results)
    History(settings={}).save(folder / "run" / "history.jsonl")
    assert len(Material.read([folder]).results) == before
    with pytest.raises(FormatError, match="kind finetuning"):
        Material.read([folder / "run" / "history.jsonl"])


def test_one_point_is_a_row_of_a_table_and_no_figure(tmp_path):
    rows = [("dense", None, 0.7), ("cats", 0.5, 0.68)]
    append_results(tmp_path / "quality.jsonl", [r for row in rows for r in quality(*row)])
    figures = write_page(Material.read([tmp_path]), tmp_path / "report.html")
    assert figures == {}
    text = (tmp_path / "report.html").read_text()
    assert "<td>cats-50</td><td>14.706</td>" in text
    assert '<div class="figures">' not in text


def test_large_times_have_no_exponent(folder):
    slow = dict(variant="cpu", limit_us=16130.0, hidden_size=4096)
    times = [mlp_time(28180.4, sparsity=sparsity, **slow) for sparsity in (0.0, 0.5)]
    append_results(folder / "slow.jsonl", times)
    write_page(Material.read([folder]), folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "28,180" in text
    assert "e+04" not in text


def test_nothing_and_foreign_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="no results"):
        Material.read([tmp_path])
    with pytest.raises(StorageError, match="no such file"):
        Material.read([tmp_path / "absent.jsonl"])
    (tmp_path / "profile.json").write_text('{"version": 1, "kind": "thresholds"}')
    with pytest.raises(FormatError, match="expected a profile"):
        Material.read([tmp_path])
    (tmp_path / "profile.json").write_text('{"version": 2, "kind": "profile"}')
    with pytest.raises(FormatError, match="format version 2"):
        Material.read([tmp_path])


def test_command_writes_page_and_figures(folder, monkeypatch):
    output, figures = folder / "out" / "report.html", folder / "out" / "figures"
    arguments = ["cats", "report", folder, "-o", output, "--figures", figures]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert output.read_text().startswith("<!doctype html>")
    drawn = [path.read_text() for path in figures.glob("*.svg")]
    assert len(drawn) == 8
    # alone, a figure brings its colour of text for light and dark; on the page it does not
    assert all("prefers-color-scheme:dark" in svg for svg in drawn)
    assert "prefers-color-scheme" not in output.read_text()


# The page in a frame of some width. It reports the sizes and colours that a browser shows.
FRAME = """<!doctype html><body><iframe id="f" style="width:{width}px;height:900px"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const d = frame.contentDocument, root = d.documentElement;
  const wide = [...d.querySelectorAll("svg, h1, h2, h3, p, figure")]
    .filter(e => e.getBoundingClientRect().right > root.clientWidth + 1).length;
  document.body.innerHTML = "<pre>" + JSON.stringify({{
    width: root.clientWidth, scroll: root.scrollWidth, wide,
    svgs: [...d.querySelectorAll("svg")].map(e => e.getBoundingClientRect().height),
    cut: [...d.querySelectorAll(".wide")].map(e => e.scrollWidth > e.clientWidth),
    shadows: [...d.querySelectorAll(".wide")]
      .every(e => getComputedStyle(e).backgroundImage.includes("linear-gradient")),
    ink: frame.contentWindow.getComputedStyle(d.body).color,
    paper: frame.contentWindow.getComputedStyle(d.body).backgroundColor,
  }}) + "</pre>";
}};
frame.srcdoc = {page};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1300])
def test_chromium_shows_the_page_without_overflow(page, width, scheme):
    frame = page.with_name("frame.html")
    source = json.dumps(page.read_text()).replace("</", "<\\/")
    frame.write_text(FRAME.format(width=width, page=source))
    options = "--headless --no-sandbox --disable-gpu --window-size=1400,1000 --dump-dom"
    colours = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    command = [CHROMIUM, *options.split(), "--virtual-time-budget=5000", colours]
    command += [f"--user-data-dir={page.parent / 'chromium'}", frame.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(html.unescape(re.search(r"<pre>(\{.*?\})</pre>", run.stdout)[1]))
    assert seen["width"] > width - 20
    assert seen["scroll"] == seen["width"]
    assert seen["wide"] == 0
    # the first table fits on a phone, and a wider one shows a shadow
    assert not seen["cut"][0]
    assert seen["shadows"]
    assert len(seen["svgs"]) == 8
    assert all(100 < height < 700 for height in seen["svgs"])
    light = [sum(map(int, re.findall(r"\d+", seen[name])[:3])) for name in ("ink", "paper")]
    assert (light[0] > light[1]) == (scheme == "dark")
