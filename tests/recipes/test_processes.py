from cats.recipes.processes import from_first_process, join_processes, rank_and_number


def test_one_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes() == rank_and_number() == (0, 1)
    assert from_first_process(7) == 7
