import pytest

from cats.errors import ConfigError, StorageError
from cats.report import plots

pytest.importorskip("matplotlib", reason="needs the extra report")


def drawn():
    figure, axes = plots.panels(3)
    for axis in axes:
        plots.line(axis, [(0.0, 1.0, 0.5, 1.5)], label="a line", colour=plots.colour(0))
        plots.limit(axis, {1.0: 2.0, 0.0: 3.0})
        plots.label(axis, x="x", y="y", title=", ".join(["a long phrase"] * 9))
        plots.legend(axis)
    return figure, axes


def test_ids_of_two_figures_on_a_page_differ_and_ink_is_the_pages():
    first, second = (plots.svg(drawn()[0], name) for name in ("one", "two"))
    assert 'id="one-' in first
    assert 'id="one-' not in second
    assert "currentColor" in first
    assert plots.INK not in first
    assert "#000000" not in first


def test_figure_of_its_own_brings_its_ink_and_is_the_same_each_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        plots.save(drawn()[0], tmp_path / name)
    a, b = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert "prefers-color-scheme:dark" in a
    plots.save(drawn()[0], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == a
    assert a != b, "ids follow the name"


def test_pictures_are_svg_or_png(tmp_path):
    plots.save(drawn()[0], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        plots.save(drawn()[0], tmp_path / "a.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        plots.save(drawn()[0], tmp_path / "file" / "a.svg")


def test_three_panels_stand_two_in_a_row_without_an_empty_one():
    figure, axes = drawn()
    assert len(axes) == len(figure.axes) == 3


def test_long_title_is_broken_between_phrases():
    _, axes = drawn()
    lines = axes[0].get_title().split("\n")
    assert len(lines) > 1
    assert all(len(line) <= 61 for line in lines)
    assert all(line.endswith(",") for line in lines[:-1])


def test_limit_is_drawn_in_the_order_of_x_and_left_out_where_there_is_none():
    _, axes = plots.panels(1)
    plots.limit(axes[0], {})
    plots.legend(axes[0])
    assert not axes[0].get_lines()
    assert axes[0].get_legend() is None
    plots.limit(axes[0], {1.0: 2.0, 0.0: 3.0})
    assert axes[0].get_lines()[0].get_xdata().tolist() == [0.0, 1.0]
