"""A tiny model, its tokenizer with a chat template, and a live server over both."""

import threading
import time
from contextlib import contextmanager

import torch

import cats
from cats.serving.models import serve_models
from cats.serving.run import listen, make_server
from cats.serving.settings import Settings
from tests.models import make_ids, make_model, make_tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>"]
VOCABULARY = 257 + len(SPECIALS)
END = 258
CONTEXT = 400
# The form of Qwen and Hermes.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\nCall ' ~ tools | tojson ~ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{% if message.content or not loop.first %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson ~ '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_chat_tokenizer(template=TEMPLATE):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = template
    return tokenizer


def make_chat_model(*, sparse=False, **changes):
    torch.manual_seed(0)
    model = make_model(**dict(vocab_size=VOCABULARY, eos_token_id=END) | changes)
    if sparse:
        cats.sparsify_(model, cats.calibrate(model, [make_ids()], target_sparsity=0.5))
        cats.fuse_(model)
    return model


def make_models(model=None, tokenizer=None, **options):
    """What a server of tests serves; ``tiny`` is its name."""
    options = dict(name="tiny", rows=4, context=CONTEXT, queue=8) | options
    return serve_models(model or make_chat_model(), tokenizer or make_chat_tokenizer(), **options)


@contextmanager
def serving(models, **settings):
    """A live server on a free port; gives its address, and ends with all its threads."""
    settings = Settings(port=0, **settings)
    listener = listen(settings)
    server = make_server(models, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        models.close()
        assert not thread.is_alive(), "the server has not stopped"
