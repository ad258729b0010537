from cats import processes
from cats.processes import from_first_process, in_order, join_processes, rank_and_number


def test_one_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes() == rank_and_number() == (0, 1)
    assert from_first_process(7) == 7
    assert in_order([3, 1, 2]) == [3, 1, 2]


def test_parts_of_unequal_length_are_put_in_the_order_of_one_process(monkeypatch):
    pieces = list("abcdefgh")

    def all_gather_object(parts, own):
        parts[:] = [pieces[rank::3] for rank in range(3)]

    monkeypatch.setattr(processes, "rank_and_number", lambda: (1, 3))
    monkeypatch.setattr(processes.dist, "all_gather_object", all_gather_object)
    assert in_order(pieces[1::3]) == pieces
