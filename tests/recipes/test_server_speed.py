"""The server beside its engine, at a tiny size."""

from cats.recipes.server_speed import Case, measure
from cats.report.serving import table
from cats.results import Result, ServedFirstToken, ServedRate, ServingOverhead
from tests.serving.live import make_chat_model, make_chat_tokenizer


def test_rates_overhead_and_waits_of_each_number_of_streams():
    case = Case(name="tiny", streams=(1, 3), prompt_length=4, new_tokens=6, rounds=2)
    results = list(measure(make_chat_model(), make_chat_tokenizer(), case))
    kinds = [ServedRate, ServedRate, ServingOverhead, ServedFirstToken]
    assert [type(result) for result in results] == kinds * 2
    assert [result.streams for result in results] == [1] * 4 + [3] * 4
    for result in results:
        assert Result.from_json(result.to_json()) == result
    engine, server, overhead, first = results[4:]
    assert (engine.by, server.by) == ("engine", "server")
    assert overhead.value > -50
    assert 0 < first.low <= first.value <= first.p95 <= first.p99
    # all tokens came after the first ones
    assert server.value < 3 * 6 / (first.low / 1e3)
    shown = table(results).markdown()
    assert f"| 3 | {engine.value:.1f} | {server.value:.1f} |" in shown
