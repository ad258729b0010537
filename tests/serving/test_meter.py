import pytest

from cats.serving.meter import Meter


def test_the_speed_is_that_of_the_last_second():
    meter = Meter(is_sparse=False)
    assert meter.add(1, 10.0, [])["tokens_per_second"] is None
    assert meter.add(3, 10.5, [])["tokens_per_second"] == pytest.approx(4)
    assert meter.add(4, 11.0, [])["tokens_per_second"] == pytest.approx(3)
    # the first of these chunks is a second old
    assert meter.add(5, 11.5, [])["tokens_per_second"] == pytest.approx(2)


def test_a_token_that_is_counted_takes_no_part_in_the_speed():
    meter, reads = Meter(is_sparse=True), []
    shown = meter.add(1, 0.0, reads)
    assert shown == {"tokens": 1, "tokens_per_second": None, "weights_read": None}
    now = 0.0
    for token in range(1, 30):
        if token % 8 == 7:
            reads.append((token + 1, 0.6))
        now += 0.5 if token % 8 == 7 else 0.1
        shown = meter.add(token + 1, now, reads)
        if token > 1:
            assert shown["tokens_per_second"] == pytest.approx(10)
    assert shown["weights_read"] == 0.6
