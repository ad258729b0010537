import pytest

from cats.serving.stops import StopCutter


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", [], "one two three"),
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two thr", ["three"], "one two thr"),
        ("aaaab", ["aab"], "aa"),
        ("ababac", ["abac", "x"], "ab"),
    ],
)
def test_text_ends_where_the_first_stop_string_begins(text, stops, expected, size):
    cutter = StopCutter(stops)
    pieces = [cutter.add(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(pieces) + cutter.end() == expected
    assert cutter.stopped == (expected != text)


def test_what_may_become_a_stop_string_is_held_back_and_nothing_else():
    cutter = StopCutter(["END"])
    assert [cutter.add(c) for c in "aEbEN"] == ["a", "", "Eb", "", ""]
    assert cutter.end() == "EN"
