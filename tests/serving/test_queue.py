import pytest

from cats.serving.errors import ApiError
from cats.serving.queue import Queue


def test_rows_and_queue_are_the_limit():
    queue = Queue(rows=2, limit=1)
    queue.enter(2)
    assert (queue.open, queue.waiting) == (2, 0)
    queue.enter(1)
    assert queue.waiting == 1
    with pytest.raises(ApiError, match="all places are taken: 3 answers decode or wait") as caught:
        queue.enter(1)
    assert caught.value.status == 429
    assert caught.value.headers["Retry-After"] == "1"
    queue.leave(2)
    queue.enter(2)


def test_more_answers_than_there_can_be_are_refused_for_good():
    with pytest.raises(ApiError, match=r"4 answers were asked for.* holds 3 in all") as caught:
        Queue(rows=2, limit=1).enter(4)
    assert caught.value.status == 400


def test_the_time_to_wait_is_that_of_earlier_answers():
    queue = Queue(rows=2, limit=0)
    for seconds in (10, 20):
        queue.enter(1)
        queue.leave(1, seconds)
    queue.enter(2)
    with pytest.raises(ApiError) as caught:
        queue.enter(1)
    # 15 seconds each, two at a time
    assert caught.value.headers["Retry-After"] == "8"
