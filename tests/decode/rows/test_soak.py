"""The soak at a tiny size, and that it sees what it is to see."""

import pytest

from cats.decode.rows.lines import Line
from tests.decode.rows.soak import soak


def test_many_sessions_with_cancels_errors_and_faults_of_memory():
    ended = soak(80, memory_faults=0.02)
    assert ended["length"] > 20
    assert ended["faults of memory"] > 0
    assert ended["cancelled"] > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_wrong_token_is_seen(monkeypatch):
    # a prompt that begins like a line gets one slot too many
    monkeypatch.setattr(
        Line, "shared_with", lambda self, prompt: min(len(self.tokens), len(prompt) - 1)
    )
    with pytest.raises(AssertionError):
        soak(40, memory_faults=0)
