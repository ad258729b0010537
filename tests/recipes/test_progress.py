from cats.recipes import Progress
from cats.recipes.progress import duration


def test_silence_gives_the_items_and_takes_every_call(capsys):
    progress = Progress()
    progress.say("a line")
    assert list(progress.track([1, 2], "counting")) == [1, 2]
    with progress.count("answers", 2) as advance, progress.stage() as show:
        advance()
        show("timing")
    assert capsys.readouterr() == ("", "")


def test_times_are_said_in_words():
    assert [duration(s) for s in (0.1, 40, 180, 9000)] == ["1 s", "40 s", "3 min", "2.5 h"]
