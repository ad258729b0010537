"""Calls of tools: how templates write them, and how they are read, asked for and answered."""

import json

import pytest

from cats.serving.errors import ApiError
from cats.serving.grammar import Grammars
from cats.serving.messages import Function
from cats.serving.prompts import Prompts
from cats.serving.tool_format import ToolFormat
from cats.serving.tool_reader import CallPart, ToolReader
from cats.serving.tools import grammar_of
from tests.serving.live import END, TEMPLATE, VOCABULARY, make_chat_tokenizer
from tests.serving.test_chat import ask, chunks, refusal, text_of

HEAD = "{%- if tools %}{{ tools | tojson }}{% endif %}"
LOOP = "{%- for message in messages %}"
TURN = LOOP + "<|im_start|>{{ message.role }}\n{{ message.content }}"
CALLS = "{%- for call in message.tool_calls or [] %}"
ENDS = "{% endfor %}<|im_end|>\n{% endfor %}"
PROMPT = "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OBJECT = '{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}}'
# A bare object, one per answer, as Llama 3.1 writes it.
BARE = (
    HEAD
    + TURN
    + "{%- if message.tool_calls %}{%- if message.tool_calls | length > 1 %}"
    + "{{ raise_exception('one call at a time') }}{% endif %}"
    + "{%- set call = message.tool_calls[0] %}"
    + OBJECT.replace("KEY", "parameters")
    + "{% endif %}<|im_end|>\n{% endfor %}"
    + PROMPT
)
# A list of objects with ids of nine characters, as Mistral writes it.
LIST = (
    HEAD
    + TURN
    + "{%- if message.tool_calls %}[TOOL_CALLS] ["
    + CALLS
    + "{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    + OBJECT.replace("KEY", "arguments").removesuffix("}")
    + ', "id": "{{ call.id }}"}'
    + "{%- if not loop.last %}, {% endif %}{% endfor %}]{% endif %}<|im_end|>\n{% endfor %}"
    + PROMPT
)
# A name and then arguments, as DeepSeek writes them.
PAIR = (
    HEAD
    + TURN
    + CALLS
    + "<call>{{ call.function.name }}<sep>{{ call.function.arguments | tojson }}</call>"
    + ENDS
    + PROMPT
)
XML = (
    HEAD
    + TURN
    + CALLS
    + "<f={{ call.function.name }}>{% for k, v in call.function.arguments.items() %}"
    + "<{{ k }}>{{ v }}{% endfor %}"
    + ENDS
    + PROMPT
)


def format_of(template):
    return ToolFormat.of(Prompts(make_chat_tokenizer(template), context=256))


def read(tool_format, text, size=3, **options):
    """Text, and ``(name, arguments)`` of each call, of an answer that comes in pieces."""
    reader = ToolReader(tool_format, **options)
    found = []
    for i in range(0, len(text), size):
        found += reader.add(text[i : i + size])
    found += reader.end()
    calls = []
    for part in found:
        if isinstance(part, CallPart):
            if part.name is not None:
                calls.append([part.name, part.arguments])
                assert len(calls) - 1 == part.index
            else:
                calls[part.index][1] += part.arguments
    texts = "".join(part for part in found if isinstance(part, str))
    return texts, [tuple(call) for call in calls]


def test_the_form_of_calls_is_found_in_the_template():
    hermes = format_of(TEMPLATE)
    assert (hermes.opener, hermes.closer) == ("<tool_call>\n", "\n</tool_call>")
    assert hermes.between == "\n</tool_call>\n<tool_call>\n"
    assert hermes.arguments_key == "arguments"
    bare = format_of(BARE)
    assert (bare.opener, bare.between, bare.closer) == ("", None, "")
    assert bare.arguments_key == "parameters"
    listed = format_of(LIST)
    assert (listed.opener, listed.between, listed.closer) == ("[TOOL_CALLS] [", ", ", "]")
    assert listed.id_length == 9
    pair = format_of(PAIR)
    assert (pair.opener, pair.separator, pair.closer) == ("<call>", "<sep>", "</call>")
    assert (pair.between, pair.arguments_key) == ("</call><call>", None)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TURN + ENDS[12:] + PROMPT, "knows no tools"),
        (XML, "in a form that this server cannot read"),
    ],
)
def test_templates_without_calls_that_can_be_read_are_refused(template, words):
    with pytest.raises(ApiError, match=words):
        format_of(template)


TWO = [("cat", '{"a": {"b": "}\\""}}'), ("dog_2", "{}")]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            TEMPLATE,
            'Well.\n<tool_call>\n{"name": "cat", "arguments": {"a": {"b": "}\\""}}}\n</tool_call>\n'
            '<tool_call>\n{"name": "dog_2", "arguments": {}}\n</tool_call>',
        ),
        # other spaces, other order of the keys
        (
            TEMPLATE,
            'Well. <tool_call>{"name":"cat","arguments":{"a": {"b": "}\\""}}}</tool_call>'
            '<tool_call>{"arguments": {}, "name": "dog_2"}</tool_call>',
        ),
        (
            LIST,
            'Well.[TOOL_CALLS] [{"name": "cat", "arguments": {"a": {"b": "}\\""}}, "id": "x"}, '
            '{"name": "dog_2", "arguments": {}}]',
        ),
        (PAIR, 'Well.<call>cat<sep>{"a": {"b": "}\\""}}</call><call>dog_2<sep>{}</call>'),
    ],
    ids=["hermes", "spaces", "list", "pair"],
)
def test_calls_are_read_wherever_the_text_is_cut(template, text, size):
    assert read(format_of(template), text, size) == ("Well.", TWO)


@pytest.mark.parametrize("size", [1, 1000])
def test_a_bare_object_is_a_call_only_where_the_answer_begins_with_it(size):
    bare = format_of(BARE)
    call = '{"name": "cat", "parameters": {"a": 1}}'
    assert read(bare, call, size) == ("", [("cat", '{"a": 1}')])
    assert read(bare, f"See {call}", size) == (f"See {call}", [])
    assert read(bare, '{"age": 3} is an object', size) == ('{"age": 3} is an object', [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "a <tool_call> is a mark",
        "a <tool_call",
        '<tool_call>{"age": 3}</tool_call>',
        "<tool_call>\n[1, 2]",
        '{"name": "cat", "arguments": {}}',
    ],
)
def test_what_looks_like_a_call_and_is_none_stays_text(text):
    assert read(format_of(TEMPLATE), text) == (text, [])


def test_arguments_that_are_cut_off_are_given_as_they_are():
    text = '<tool_call>{"name": "cat", "arguments": {"a": 1'
    assert read(format_of(TEMPLATE), text) == ("", [("cat", '{"a": 1')])


def test_arguments_that_are_written_as_text_are_unpacked():
    text = '<tool_call>{"name": "cat", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert read(format_of(TEMPLATE), text) == ("", [("cat", '{"a": 1}')])


def test_a_reader_with_a_limit_is_full_after_so_many_calls():
    text = '<tool_call>{"name": "cat", "arguments": {}}</tool_call>' * 2
    assert read(format_of(TEMPLATE), text, limit=1) == ("", [("cat", "{}")])


# --- grammars

FUNCTIONS = [
    Function(name="cat", parameters={"type": "object", "properties": {"a": {"type": "integer"}}}),
    Function(name="dog"),
]


@pytest.mark.parametrize("template", [TEMPLATE, BARE, LIST, PAIR])
def test_forced_answers_are_calls_in_the_form_of_the_template(template):
    tokenizer = make_chat_tokenizer(template)
    tool_format = format_of(template)
    grammars = Grammars(tokenizer, vocabulary=VOCABULARY, ends=[END])
    grammar = grammar_of(tool_format, FUNCTIONS, tokenizer, single=False, forced=True)
    matcher = grammars.matcher(grammar, "tools")
    head, foot = tool_format.head("cat"), tool_format.foot
    good = tool_format.opener.lstrip() + head + '{"a": 12}' + foot + tool_format.closer
    ids = tokenizer(good.rstrip())["input_ids"]
    assert matcher.validate_tokens(ids) == len(ids)
    assert read(tool_format, good) == ("", [("cat", '{"a": 12}')])
    bad = tokenizer("Well.")["input_ids"]
    assert matcher.validate_tokens(bad) == 0
    unknown = tokenizer(good.replace("cat", "cow"))["input_ids"]
    assert matcher.validate_tokens(unknown) < len(unknown)


def test_strict_calls_follow_their_schema_after_any_text():
    tokenizer = make_chat_tokenizer()
    tool_format = format_of(TEMPLATE)
    grammars = Grammars(tokenizer, vocabulary=VOCABULARY, ends=[END])
    grammar = grammar_of(tool_format, FUNCTIONS, tokenizer, single=False, forced=False)
    matcher = grammars.matcher(grammar, "tools")

    def taken(text):
        ids = tokenizer(text)["input_ids"]
        return matcher.validate_tokens(ids) == len(ids)

    assert taken("Any text at all.")
    assert taken('Well.\n<tool_call>\n{"name": "cat", "arguments": {"a": 1}}\n</tool_call> More.')
    assert not taken('Well.\n<tool_call>\n{"name": "cat", "arguments": {"a": "x"}}')
    assert not taken('Well.\n<tool_call>\n{"name": "cow", "arguments": {}}')


# --- over HTTP

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"sky": {"enum": ["blue", "grey"]}},
                "required": ["sky"],
                "additionalProperties": False,
            },
        },
    }
]
FORCED = dict(tools=TOOLS, max_tokens=120, temperature=1, seed=1)


def test_a_required_call_has_arguments_of_the_schema(client):
    choice = ask(client, tool_choice="required", parallel_tool_calls=False, **FORCED)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["sky"] in ("blue", "grey")
    assert choice["message"]["content"] is None


def test_a_named_call_is_streamed_in_parts(client):
    named = {"type": "function", "function": {"name": "weather"}}
    whole = ask(client, tool_choice=named, **FORCED)["choices"][0]
    parts = chunks(client, tool_choice=named, **FORCED)
    deltas = [
        delta
        for part in parts
        for choice in part["choices"]
        for delta in choice["delta"].get("tool_calls", ())
    ]
    assert deltas[0]["function"] == {"name": "weather", "arguments": ""}
    assert deltas[0]["id"].startswith("call_")
    arguments = "".join(delta["function"]["arguments"] for delta in deltas)
    assert arguments == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert len(deltas) > 3
    assert all("id" not in delta for delta in deltas[1:])
    assert parts[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert text_of(parts) == ""


def test_without_a_call_an_answer_with_tools_is_text(client):
    plain = ask(client, tools=TOOLS)["choices"][0]
    assert "tool_calls" not in plain["message"]
    assert plain["finish_reason"] == "length"
    # the template shows the tools to the model
    prompts = [ask(client, **asked)["usage"]["prompt_tokens"] for asked in ({}, {"tools": TOOLS})]
    assert prompts[0] + 50 < prompts[1]
    none = ask(client, tools=TOOLS, tool_choice="none")
    assert none["choices"] == ask(client)["choices"]


def test_results_of_tools_go_back_to_the_model(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "blue"},
    ]
    ask(client, messages=messages, tools=TOOLS, max_tokens=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(tools=TOOLS * 2), "two functions have the same name"),
        (
            dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "cow"}}),
            "cow, which is none of the tools: weather",
        ),
        (
            dict(tools=TOOLS, tool_choice="required", response_format={"type": "json_object"}),
            "cannot be used where a tool has to be called",
        ),
        (
            dict(
                tools=[
                    {"type": "function", "function": {"name": "x", "parameters": {"type": "y"}}}
                ],
                tool_choice="required",
            ),
            "no grammar can be made of it",
        ),
    ],
)
def test_tools_that_cannot_be_right_are_refused(client, changes, words):
    assert words in refusal(client, **changes)["message"]
