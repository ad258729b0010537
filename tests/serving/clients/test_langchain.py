"""LangChain's client, in the environment of ``make test-clients``."""

import openai
import pytest

from tests.serving.clients.what import SCHEMA, TOOL, check_pet

langchain_openai = pytest.importorskip("langchain_openai", reason="runs by `make test-clients`")
HumanMessage = pytest.importorskip("langchain_core.messages").HumanMessage


@pytest.fixture
def make(address):
    def make(**options):
        options = {"model": "tiny", "temperature": 0, "max_tokens": 8} | options
        return langchain_openai.ChatOpenAI(
            base_url=f"{address}/v1", api_key="any", max_retries=0, **options
        )

    return make


def test_answers_streams_and_log_probabilities(make):
    answer = make().invoke("Hi")
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(make(stream_usage=True).stream("Hi"))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [each["output_tokens"] for each in usage] == [answer.usage_metadata["output_tokens"]]
    model = make(logprobs=True, top_logprobs=2, n=2)
    content = model.invoke("Hi").response_metadata["logprobs"]["content"]
    assert len(content[0]["top_logprobs"]) == 2
    (choices,) = model.generate([[HumanMessage("Hi")]]).generations
    assert len(choices) == 2


def test_questions_are_asked_together(make):
    model = make()
    questions = ["One", "Two", "Three"]
    together = [answer.content for answer in model.batch(questions)]
    assert together == [model.invoke(question).content for question in questions]


def test_schemas_and_tools(make, no_spaces):
    schema = SCHEMA | {"title": "pet", "description": "A pet."}
    options = dict(max_tokens=100, logit_bias=no_spaces)
    model = make(**options).with_structured_output(schema, method="json_schema", strict=True)
    check_pet(model.invoke("Hi"))
    with_tools = make(**options).bind_tools([TOOL], tool_choice="required")
    (call,) = with_tools.invoke("Hi").tool_calls[:1]
    assert call["name"] == "feed"
    check_pet(call["args"])
    whole = None
    for chunk in with_tools.stream("Hi"):
        whole = chunk if whole is None else whole + chunk
    check_pet(whole.tool_calls[0]["args"])


def test_errors_keep_their_kind(make):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        make(model="other").invoke("Hi")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        make(temperature=3).invoke("Hi")
