"""A long row of random uses of one model; after each it does what plain transformers does.

``CATS_OPERATIONS=2000 python -m pytest tests/test_any_use.py`` runs a longer one; ``CATS_SEED``
chooses another.
"""

import copy
import os
import random
import threading

import pytest
import torch

import cats
from cats.errors import BackendError, CatsError, UnsupportedModelError
from cats.model import CatsActivation
from tests.models import assert_same_tokens, logits, make_ids, make_model

OPERATIONS = int(os.environ.get("CATS_OPERATIONS", "100"))
SEED = int(os.environ.get("CATS_SEED", "0"))
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 2


class Plain:
    """The model as plain transformers has it; thresholds are hooks, written independently of cats.

    Attributes:
        model: With the same weights as the one under test.
        thresholds: Of each layer, or None where it is dense.
    """

    def __init__(self, model):
        self.model = copy.deepcopy(model)
        self.thresholds = [None] * LAYERS
        for index, layer in enumerate(self.model.model.layers):
            layer.mlp.act_fn.register_forward_hook(
                lambda m, args, out, index=index: self._drop(index, out)
            )

    def _drop(self, index, out):
        threshold = self.thresholds[index]
        return out if threshold is None else torch.where(out.abs() >= threshold, out, 0.0)

    def generate(self, ids, mask=None, **options):
        self.model.generation_config.eos_token_id = None
        mask = torch.ones_like(ids) if mask is None else mask
        return self.model.generate(ids, attention_mask=mask, **options, **GREEDY)


class Uses:
    """One model, its plain twin, a decoder that lives on, and every operation by its name."""

    def __init__(self, seed, folder):
        torch.manual_seed(seed)
        self.random, self.folder = random.Random(seed), folder
        self.model = make_model(num_hidden_layers=LAYERS).to(DEVICE)
        self.plain = Plain(self.model)
        self.decoder, self.text = cats.Decoder(self.model), None
        self.hook = None

    @property
    def sparse(self):
        return cats.model.is_sparse(self.model)

    @property
    def fused(self):
        return any(True for _ in cats.fusion.fused_mlps(self.model))

    def ids(self, rows=1, length=None):
        length = length or self.random.randint(1, 30)
        return make_ids(rows, length, seed=self.random.randrange(2**31)).to(DEVICE)

    def check(self):
        ids = self.ids(2, 12)
        torch.testing.assert_close(
            logits(self.model, ids), logits(self.plain.model, ids), rtol=1e-3, atol=1e-3
        )
        self.generate()

    def generate(self):
        ids, count = self.ids(), self.random.randint(1, 12)
        expected = self.plain.generate(ids, max_new_tokens=count)
        actual = cats.generate(self.model, **without_padding(ids), max_new_tokens=count, **GREEDY)
        assert_same_tokens(self.plain.model, actual, expected, tie=1e-3)

    def generate_batch(self):
        ids, mask = self.ids(3, 9), torch.ones(3, 9, dtype=torch.long, device=DEVICE)
        for row in range(3):
            mask[row, : self.random.randrange(9)] = 0
        expected = self.plain.generate(ids, mask, max_new_tokens=8)
        options = dict(attention_mask=mask, max_new_tokens=8, **GREEDY)
        actual = cats.generate(self.model, ids, **options)
        assert_same_tokens(self.plain.model, actual, expected, mask, tie=1e-3)

    def converse(self):
        new = self.ids(length=self.random.randint(1, 6))
        if self.text is None or self.text.shape[1] > 300:
            self.text = new
        text = torch.cat([self.text, new], 1)
        if self.random.random() < 0.3:  # an earlier turn is edited
            text[0, self.random.randrange(text.shape[1])] = self.random.randrange(256)
        expected = self.plain.generate(text, max_new_tokens=10)
        actual = self.decoder.generate(**without_padding(text), max_new_tokens=10, **GREEDY)
        assert_same_tokens(self.plain.model, actual, expected, tie=1e-3)
        self.text = expected

    def stream(self):
        ids, count = self.ids(), self.random.randint(1, 12)
        expected = self.plain.generate(ids, max_new_tokens=12)[0, ids.shape[1] :].tolist()
        stream = self.decoder.stream(**without_padding(ids), max_new_tokens=12, **GREEDY)
        tokens = [int(next(stream)) for _ in range(count)]  # and is dropped
        row = torch.cat([ids, torch.tensor([tokens], device=DEVICE)], 1)
        ended = torch.cat([ids, torch.tensor([expected[:count]], device=DEVICE)], 1)
        assert_same_tokens(self.plain.model, row, ended, tie=1e-3)

    def write_a_weight(self):
        layer = self.random.randrange(LAYERS)
        name = self.random.choice(
            ["mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj"]
        )
        factor = self.random.choice([-1.0, 0.5, 1.5])
        for model in (self.model, self.plain.model):
            with torch.no_grad():
                model.model.layers[layer].get_submodule(name).weight.mul_(factor)

    def replace_a_weight(self):
        layer = self.random.randrange(LAYERS)
        for model in (self.model, self.plain.model):
            linear = model.model.layers[layer].self_attn.v_proj
            linear.weight = torch.nn.Parameter(linear.weight.detach().flip(0).clone())

    def load_weights(self):
        state = {n: -t if "up_proj" in n else t for n, t in self.model.state_dict().items()}
        self.model.load_state_dict(state)
        plain = self.plain.model
        plain.load_state_dict(
            {n: -t if "up_proj" in n else t for n, t in plain.state_dict().items()}
        )

    def sparsify(self):
        with cats_dense(self):
            config = cats.calibrate(
                self.model, [self.ids(4, 32)], target_sparsity=self.random.choice([0.2, 0.5, 0.8])
            )
        cats.sparsify_(self.model, config)
        self.plain.thresholds = [
            float(config.thresholds[f"model.layers.{i}.mlp"]) for i in range(LAYERS)
        ]

    def write_a_threshold(self):
        acts = [m for m in self.model.modules() if isinstance(m, CatsActivation)]
        if acts:
            index = self.random.randrange(LAYERS)
            value = self.random.choice([0.0, 0.01, 0.3])
            acts[index].threshold.fill_(value)
            self.plain.thresholds[index] = value

    def densify(self):
        cats.densify_(self.model)
        self.plain.thresholds = [None] * LAYERS

    def fuse(self):
        if self.sparse:
            cats.fuse_(self.model)

    def unfuse(self):
        cats.unfuse_(self.model)

    def refuse(self):
        config = cats.calibrate(make_model(num_hidden_layers=1), [make_ids()], target_sparsity=0.5)
        wrong = {f"elsewhere.{name}": tensors for name, tensors in config.tensors.items()}
        of_another_model = cats.CatsConfig(method="cats", target_sparsity=0.5, tensors=wrong)
        with pytest.raises(CatsError):
            cats.sparsify_(self.model, of_another_model)

    def save_and_load(self):
        if not self.sparse:
            return
        self.unhook()
        path = self.folder / str(self.random.randrange(2**31))
        self.model.save_pretrained(path)
        self.model = cats.from_pretrained(path).to(DEVICE)
        self.decoder, self.text = cats.Decoder(self.model), None

    def copy(self):
        self.unhook()
        self.model = copy.deepcopy(self.model)
        self.decoder, self.text = cats.Decoder(self.model), None

    def train(self):
        if self.fused:
            with pytest.raises(BackendError):
                self.model(self.ids(2, 8)).logits.sum().backward()
            cats.unfuse_(self.model).zero_grad()
        ids, losses = self.ids(2, 16), []
        for model in (self.model, self.plain.model):
            model.train()
            loss = model(ids, labels=ids).loss
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.05 * parameter.grad)
                    parameter.grad = None
            model.eval()
            losses.append(float(loss.detach()))
        assert abs(losses[0] - losses[1]) < 1e-3
        with torch.no_grad():  # rounding must not add up over the row
            names = dict(self.plain.model.named_parameters())
            for name, parameter in self.model.named_parameters():
                torch.testing.assert_close(parameter, names[name], rtol=1e-3, atol=1e-4)
                names[name].copy_(parameter)

    def move(self):
        self.model.to(torch.float64)
        self.model.to("cpu")
        self.generate_somewhere()
        self.model.to(DEVICE, torch.float32)

    def generate_somewhere(self):
        out = cats.generate(self.model, self.ids().cpu(), max_new_tokens=3, **GREEDY)
        assert out.device.type == "cpu"

    def hook_or_unhook(self):
        if self.hook is None:
            self.hook = [
                model.model.norm.register_forward_hook(lambda m, args, out: -out)
                for model in (self.model, self.plain.model)
            ]
        else:
            self.unhook()

    def unhook(self):
        for handle in self.hook or ():
            handle.remove()
        self.hook = None

    def release(self):
        cats.release(self.model)
        self.decoder.reset()

    def lose(self):
        """A model that cannot be decoded any more says so, and the loss is undone."""
        layers = self.model.model.layers
        self.model.model.layers = torch.nn.ModuleList([torch.nn.Identity()] * LAYERS)
        with pytest.raises((UnsupportedModelError, CatsError)):
            cats.generate(self.model, self.ids(), max_new_tokens=2)
        self.model.model.layers = layers


def without_padding(ids):
    """Prompts whose mask says that no id is padding, not even the id of padding."""
    return {"inputs": ids, "attention_mask": torch.ones_like(ids)}


class cats_dense:  # noqa: N801 (a context)
    """The model of some uses as a dense one, which calibration asks for."""

    def __init__(self, uses):
        self.uses = uses

    def __enter__(self):
        if self.uses.sparse:
            self.uses.densify()

    def __exit__(self, *_):
        pass


ANSWERS = ["generate", "generate_batch", "converse", "converse", "stream"]
WEIGHTS = ["write_a_weight", "replace_a_weight", "load_weights"]
SPARSITY = ["sparsify", "write_a_threshold", "densify", "fuse", "fuse", "unfuse", "refuse"]
OTHERS = ["save_and_load", "copy", "train", "move", "hook_or_unhook", "release", "lose"]
# what stands twice comes twice as often
NAMES = [*ANSWERS, *WEIGHTS, *SPARSITY, *OTHERS]


@pytest.mark.filterwarnings("ignore:no sparse backend is live")
def test_any_row_of_uses_gives_what_plain_transformers_gives(tmp_path):
    uses = Uses(SEED, tmp_path)
    done = []
    for _ in range(OPERATIONS):
        name = uses.random.choice(NAMES)
        done.append(name)
        try:
            getattr(uses, name)()
            uses.check()
        except Exception as error:
            row = " ".join(done[-12:])
            raise AssertionError(
                f"after {len(done)} uses (seed {SEED}), ending in {row}"
            ) from error


@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
def test_eight_threads_on_one_model_get_the_tokens_of_one(fused):
    torch.manual_seed(SEED)
    model = make_model(num_hidden_layers=LAYERS).to(DEVICE)
    if fused:
        ids = make_ids(8).to(DEVICE)
        cats.fuse_(cats.sparsify_(model, cats.calibrate(model, [ids], target_sparsity=0.5)))
    model.generation_config.eos_token_id = None
    errors = []

    def work(seed):
        choose = random.Random(seed)
        decoder = cats.Decoder(model)
        try:
            for _ in range(max(3, OPERATIONS // 25)):
                rows = choose.choice([1, 1, 1, 2])
                ids = make_ids(rows, choose.randint(1, 40), seed=choose.randrange(2**31))
                ids, count = ids.to(DEVICE), choose.randint(1, 20)
                if choose.random() < 0.5:
                    answer = decoder.generate(
                        **without_padding(ids), max_new_tokens=count, **GREEDY
                    )
                else:
                    stream = cats.Decoder(model).stream(
                        **without_padding(ids), max_new_tokens=count, **GREEDY
                    )
                    answer = torch.cat([ids, torch.stack(list(stream), 1).to(DEVICE)], 1)
                results.append((ids, count, answer))
        except Exception as error:  # an assertion in a thread would be lost
            errors.append(error)

    results = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for ids, count, answer in results:
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **GREEDY
        )
        assert_same_tokens(model, answer, expected, tie=1e-3)
