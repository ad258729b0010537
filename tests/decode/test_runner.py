"""Models that remember otherwise than by keys and values, and what is kept between calls."""

import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BartConfig,
    GPT2Config,
    JetMoeConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import cats
from cats.decode.runner import release, runner_of
from cats.errors import BackendError, ConfigError, DataError, UnsupportedModelError
from tests.models import SIZES, make_ids, make_model

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def expected_tokens(model, ids, count=20, **inputs):
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    model.generation_config.eos_token_id = None
    return model.generate(ids, max_new_tokens=count, **inputs, **GREEDY)


# --- models that use their cache otherwise


class Looped(nn.Module):
    """Runs a layer twice, as models with shared layers do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *args, **kwargs):
        return self.layer(self.layer(x, *args, **kwargs), *args, **kwargs)


class Remembering(nn.Module):
    """Adds what it has seen before, which no cache of keys and values holds."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.last = None

    def forward(self, x):
        seen = torch.zeros_like(x[:, :1]) if self.last is None else self.last
        self.last = x[:, -1:] if x.shape[1] < 5 else None
        return self.inner(x + seen)


def looped():
    model = make_model()
    model.model.layers[1] = Looped(model.model.layers[1])
    return model


def remembering():
    model = make_model()
    model.model.layers[0].mlp = Remembering(model.model.layers[0].mlp)
    return model


def encoder_decoder():
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=257)
    ).eval()


def prompt_tuned():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        make_model(),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ).eval()


def prefix_tuned():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        make_model(),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ).eval()


def rwkv():
    return AutoModelForCausalLM.from_config(
        RwkvConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, context_length=64)
    ).eval()


def mamba():
    return AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, state_size=4)
    ).eval()


def recurrent_gemma():
    return AutoModelForCausalLM.from_config(
        RecurrentGemmaConfig(
            **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
            num_hidden_layers=3,
            num_attention_heads=2,
            lru_width=16,
        )
    ).eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize(
    "make",
    [
        looped,
        remembering,
        encoder_decoder,
        prompt_tuned,
        prefix_tuned,
        rwkv,
        mamba,
        recurrent_gemma,
    ],
    ids=lambda f: f.__name__,
)
def test_model_that_remembers_otherwise_is_refused_in_one_line(make):
    with pytest.raises(UnsupportedModelError, match=r"use model\.generate") as error:
        cats.generate(make(), make_ids(1, 8), max_new_tokens=4)
    assert "\n" not in str(error.value)


def test_model_that_fails_when_it_is_checked_is_refused_with_its_error():
    model = make_model()

    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError("no such expert")

    model.model.layers[0].mlp = Failing()
    with pytest.raises(UnsupportedModelError, match="KeyError: 'no such expert'"):
        cats.generate(model, make_ids(1, 8), max_new_tokens=4)


def test_absolute_positions_and_no_padding_are_right():
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=128)
    ).eval()
    ids = make_ids(1, 9)
    assert torch.equal(
        cats.generate(model, ids, max_new_tokens=20, **GREEDY), expected_tokens(model, ids)
    )


def test_weights_that_are_nowhere_are_named():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    with pytest.raises(UnsupportedModelError, match="meta device"):
        cats.generate(model, make_ids(1, 4), max_new_tokens=2)


# --- inputs beside ids and mask


def llava():
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**SIZES).to_dict(),
        image_token_index=255,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).eval()


def image_prompt(seed):
    ids = torch.cat([torch.full((1, 4), 255), make_ids(1, 12) % 200], 1)
    generator = torch.Generator().manual_seed(seed)
    pixels = 9 * torch.randn(1, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_images_reach_the_prompt():
    model, answers = llava(), []
    decoder = cats.Decoder(model)
    for seed in (1, 2):  # the same ids, another image
        inputs = image_prompt(seed)
        expected = expected_tokens(
            model, inputs["input_ids"], 8, pixel_values=inputs["pixel_values"]
        )
        answers.append(decoder.generate(inputs, max_new_tokens=8, **GREEDY))
        assert torch.equal(answers[-1], expected)
    assert not torch.equal(*answers)


@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids", "length", "inputs_embeds"])
def test_input_that_a_model_does_not_take_is_refused(name):
    inputs = {"input_ids": make_ids(1, 5), name: torch.zeros(1, 5)}
    with pytest.raises(DataError, match=name):
        cats.generate(make_model(), inputs, max_new_tokens=2)


def test_input_that_steps_would_need_as_well_is_refused():
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=128)
    ).eval()
    inputs = {"input_ids": make_ids(1, 5), "token_type_ids": torch.ones(1, 5, dtype=torch.long)}
    with pytest.raises(UnsupportedModelError, match="token_type_ids"):
        cats.generate(model, inputs, max_new_tokens=2)


# --- what is kept


def test_hooks_do_not_see_what_a_model_is_checked_with():
    model, seen = make_model(), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    cats.generate(model, make_ids(1, 9), max_new_tokens=3, **GREEDY)
    assert seen == [(1, 9), (1, 1), (1, 1)]


def test_written_weight_drops_the_prefix_but_not_the_trace():
    model, ids = make_model(), make_ids(1, 8)
    decoder = cats.Decoder(model)
    decoder.generate(ids, max_new_tokens=5, **GREEDY)
    runner, _ = runner_of(model, "auto")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    assert runner_of(model, "auto")[0] is runner
    assert torch.equal(
        decoder.generate(ids, max_new_tokens=5, **GREEDY), expected_tokens(model, ids, 5)
    )


@pytest.mark.parametrize("change", ["hook", "class", "config", "list", "tensor", "swapped hook"])
def test_change_of_structure_makes_a_new_runner(change, monkeypatch):
    model = make_model()
    mlp = model.model.layers[0].mlp
    mlp.settings, mlp.table = [1], torch.zeros(2)
    handle = model.model.norm.register_forward_hook(lambda m, args, out: None)
    runner, _ = runner_of(model, "eager")
    assert runner_of(model, "eager")[0] is runner
    if change == "hook":
        mlp.register_forward_pre_hook(lambda m, args: None)
    elif change == "swapped hook":
        handle.remove()
        model.model.norm.register_forward_hook(lambda m, args, out: 2 * out)
    elif change == "class":
        forward = type(mlp).forward
        monkeypatch.setattr(type(mlp), "forward", lambda self, x: 2 * forward(self, x))
    elif change == "config":
        model.config.final_logit_softcapping = 30.0
    elif change == "list":
        mlp.settings.append(2)
    else:
        mlp.table = torch.ones(2)
    assert runner_of(model, "eager")[0] is not runner


def test_replaced_forward_of_one_module_runs():
    model, ids = make_model(), make_ids(1, 8)
    cats.generate(model, ids, max_new_tokens=12, **GREEDY)
    mlp = model.model.layers[1].mlp
    old = mlp.forward
    mlp.forward = lambda x: old(x) * 0
    assert torch.equal(
        cats.generate(model, ids, max_new_tokens=12, **GREEDY), expected_tokens(model, ids, 12)
    )


def test_released_model_is_forgotten_and_decodes_again():
    model, ids = make_model(), make_ids(1, 8)
    first = cats.generate(model, ids, max_new_tokens=5, **GREEDY)
    runner = weakref.ref(runner_of(model, "auto")[0])
    cats.release(model)
    gc.collect()
    assert runner() is None
    release(model)  # nothing left to do
    assert torch.equal(cats.generate(model, ids, max_new_tokens=5, **GREEDY), first)


def test_model_is_not_kept_alive():
    model = make_model()
    cats.generate(model, make_ids(1, 8), max_new_tokens=5, **GREEDY)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_autocast_runs_as_in_transformers_and_named_engines_refuse_it():
    model, ids = make_model(), make_ids(1, 9)
    plain = cats.generate(model, ids, max_new_tokens=9, **GREEDY)
    with torch.autocast("cpu", torch.bfloat16):
        expected = expected_tokens(model, ids, 9)
        assert torch.equal(cats.generate(model, ids, max_new_tokens=9, **GREEDY), expected)
        with pytest.raises(BackendError, match="autocast"):
            cats.generate(model, ids, engine="compiled", max_new_tokens=9, **GREEDY)
    assert torch.equal(cats.generate(model, ids, max_new_tokens=9, **GREEDY), plain)


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model each"])
def test_threads_that_make_the_first_call_get_the_tokens_of_transformers(shared):
    ids = make_ids(1, 8)
    one = make_model(num_hidden_layers=4)
    models = [one] * 6 if shared else [make_model(num_hidden_layers=4) for _ in range(6)]
    expected = [expected_tokens(model, ids, 8) for model in models]
    answers = {}

    def work(i):
        answers[i] = cats.generate(models[i], ids, max_new_tokens=8, **GREEDY)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, model in enumerate(models):
        assert torch.equal(answers[i], expected[i])
        assert torch.equal(cats.generate(model, ids, max_new_tokens=8, **GREEDY), expected[i])


def test_wrapped_by_torch_compile_is_the_model_inside():
    model, ids = make_model(), make_ids(1, 8)
    compiled = torch.compile(model)
    assert torch.equal(
        cats.generate(compiled, ids, max_new_tokens=5, **GREEDY), expected_tokens(model, ids, 5)
    )


class Drifting(nn.Module):
    """Gives slightly more for one token than for several."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * (1.02 if x.shape[1] == 1 else 1.0)


def test_model_whose_steps_differ_by_little_is_refused():
    model = make_model()
    model.model.norm = Drifting(model.model.norm)
    with pytest.raises(UnsupportedModelError, match="does not remember"):
        cats.generate(model, make_ids(1, 4), max_new_tokens=2)


# --- what is nested, shared or hidden


class Steered(nn.Module):
    """Adds what it keeps in lists, dictionaries and objects, as libraries for steering do."""

    factor = 1.0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.vectors = [torch.zeros(16)]
        self.state = {"on": 1.0, "vector": torch.zeros(16)}
        self.settings = SimpleNamespace(scale=1.0)

    def forward(self, x):
        added = self.vectors[0] + self.state["on"] * self.state["vector"]
        return self.factor * self.settings.scale * self.inner(x) + added


def written(mlp):
    mlp.vectors[0].add_(2)


def replaced(mlp):
    mlp.vectors[0] = torch.ones(16)


def entry(mlp):
    mlp.state["vector"] = torch.ones(16)


def attribute(mlp):
    mlp.settings.scale = -2.0


def of_the_class(mlp):
    type(mlp).factor = -1.0


@pytest.mark.parametrize("change", [written, replaced, entry, attribute, of_the_class])
def test_nested_settings_that_change_are_seen(change, monkeypatch):
    model, ids = make_model(), make_ids(1, 12)
    mlp = model.model.layers[0].mlp = Steered(model.model.layers[0].mlp)
    decoder = cats.Decoder(model)
    before = decoder.generate(ids, max_new_tokens=12, **GREEDY)
    monkeypatch.setattr(Steered, "factor", 1.0)
    change(mlp)
    after = decoder.generate(ids, max_new_tokens=12, **GREEDY)
    assert not torch.equal(before, after)
    assert torch.equal(after, expected_tokens(model, ids, 12))


# the second is called by the first alone
@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k)),
        ("rotate_half", lambda x: -3 * x),
    ],
)
def test_function_that_is_replaced_in_its_file_is_seen(monkeypatch, name, replacement):
    from transformers.models.llama import modeling_llama

    model, ids = make_model(), make_ids(1, 12)
    before = cats.generate(model, ids, max_new_tokens=12, **GREEDY)
    monkeypatch.setattr(modeling_llama, name, replacement)
    assert not torch.equal(before, expected_tokens(model, ids, 12))
    assert torch.equal(
        cats.generate(model, ids, max_new_tokens=12, **GREEDY), expected_tokens(model, ids, 12)
    )


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_what_a_closure_decides_is_asked_again(kind):
    model, ids, scale = make_model(), make_ids(1, 12), [1.0]
    mlp = model.model.layers[0].mlp
    if kind == "hook":
        mlp.register_forward_hook(lambda m, args, out: out * scale[0])
    else:
        forward = mlp.forward
        mlp.forward = lambda x: forward(x) * scale[0]
    decoder = cats.Decoder(model)
    decoder.generate(ids, max_new_tokens=12, **GREEDY)
    scale[0] = -2.0
    assert torch.equal(
        decoder.generate(ids, max_new_tokens=12, **GREEDY), expected_tokens(model, ids, 12)
    )


def test_hooks_do_not_see_what_extras_are_checked_with():
    model, seen = llava(), []
    model.model.language_model.norm.register_forward_hook(lambda *_: seen.append(1))
    cats.generate(model, image_prompt(1), max_new_tokens=3, **GREEDY)
    assert len(seen) == 3


@pytest.mark.parametrize("caller", ["processor", "hook"])
def test_generation_inside_another_one_is_right(caller):
    model, draft, ids = make_model(), make_model(num_hidden_layers=1), make_ids(1, 9)
    expected, inner = expected_tokens(model, ids, 5), []

    def run(*_):
        inner.append(cats.generate(draft, ids[:, :4], max_new_tokens=2, **GREEDY))

    options = {}
    if caller == "hook":
        model.model.norm.register_forward_hook(run)
    else:
        options["logits_processor"] = [lambda ids, scores: (run(), scores)[1]]
    actual = cats.generate(model, ids, max_new_tokens=5, **options, **GREEDY)
    assert torch.equal(actual, expected)
    assert all(torch.equal(answer, expected_tokens(draft, ids[:, :4], 2)) for answer in inner)


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_mixture_whose_sizes_depend_on_values_is_right():
    model = AutoModelForCausalLM.from_config(
        JetMoeConfig(
            vocab_size=257,
            hidden_size=32,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ).eval()
    ids = make_ids(1, 9)
    assert torch.equal(
        cats.generate(model, ids, max_new_tokens=8, **GREEDY), expected_tokens(model, ids, 8)
    )


def test_decoder_of_an_encoder_decoder_counts_its_own_layers():
    model = AutoModelForCausalLM.from_config(
        BartConfig(
            vocab_size=257,
            d_model=16,
            encoder_layers=4,
            decoder_layers=2,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            is_decoder=True,
            is_encoder_decoder=False,
        )
    ).eval()
    ids = make_ids(1, 9)
    assert torch.equal(
        cats.generate(model, ids, max_new_tokens=8, **GREEDY), expected_tokens(model, ids, 8)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"generation_config": {"max_new_tokens": 3}},
        {"generation_config": 3},
        {"seed": 2**70},
        {"seed": -1},
        {"callback": 3},
    ],
    ids=str,
)
def test_option_of_a_wrong_kind_is_an_error(options):
    with pytest.raises(ConfigError):
        cats.generate(make_model(), make_ids(1, 4), **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_step_of_an_optimiser_drops_the_prefix(kind, fused):
    model, ids = make_model(), make_ids(1, 12)
    decoder = cats.Decoder(model)
    before = decoder.generate(ids, max_new_tokens=12, **GREEDY)
    runner, _ = runner_of(model, "auto")
    optimiser = kind(model.parameters(), lr=0.3, fused=fused)
    model(input_ids=ids, labels=ids.flip(1)).loss.backward()
    optimiser.step()
    after = decoder.generate(ids, max_new_tokens=12, **GREEDY)
    assert not torch.equal(after, before)
    assert torch.equal(after, expected_tokens(model, ids, 12))
    assert runner_of(model, "auto")[0] is runner  # nothing is traced anew


STRENGTH = 1.0
SETTINGS = {"strength": 1.0}


class Hidden(nn.Module):
    """Reads what no module holds."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        box = [1.0]
        self.box, self.function = box, lambda x: x * box[0]
        self.array = np.ones(1)

    def extra(self, x):
        return x

    def forward(self, x):
        scale = STRENGTH * SETTINGS["strength"] * float(self.array[0])
        return self.extra(self.function(self.inner(x))) * scale


def global_number(mlp, patch):
    patch.setattr("tests.decode.test_runner.STRENGTH", -2.0)


def global_dictionary(mlp, patch):
    patch.setitem(SETTINGS, "strength", -2.0)


def closure(mlp, patch):
    mlp.box[0] = -2.0
    del mlp.box


def array(mlp, patch):
    mlp.array[0] = -2.0


def method(mlp, patch):
    patch.setattr(Hidden, "extra", lambda self, x: -2 * x)


@pytest.mark.parametrize("change", [global_number, global_dictionary, closure, array, method])
def test_what_a_forward_pass_reads_elsewhere_is_seen(change, monkeypatch):
    model, ids = make_model(), make_ids(1, 12)
    mlp = model.model.layers[0].mlp = Hidden(model.model.layers[0].mlp)
    before = cats.generate(model, ids, max_new_tokens=12, **GREEDY)
    change(mlp, monkeypatch)
    after = cats.generate(model, ids, max_new_tokens=12, **GREEDY)
    assert not torch.equal(before, after)
    assert torch.equal(after, expected_tokens(model, ids, 12))


def test_attention_that_is_registered_later_is_seen():
    model, ids = make_model(), make_ids(1, 12)
    functions = AttentionInterface()
    old = functions["sdpa"]
    cats.generate(model, ids, max_new_tokens=12, **GREEDY)

    def other(module, query, *args, **kwargs):
        return old(module, -query, *args, **kwargs)

    AttentionInterface.register("sdpa", other)
    try:
        actual = cats.generate(model, ids, max_new_tokens=12, **GREEDY)
        assert torch.equal(actual, expected_tokens(model, ids, 12))
    finally:
        AttentionInterface.register("sdpa", old)


def test_released_model_makes_its_decoders_forget():
    model, ids = make_model(), make_ids(1, 12)
    decoder = cats.Decoder(model)
    decoder.generate(ids, max_new_tokens=12, **GREEDY)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)  # which torch does not count
    cats.release(model)
    assert torch.equal(
        decoder.generate(ids, max_new_tokens=12, **GREEDY), expected_tokens(model, ids, 12)
    )
