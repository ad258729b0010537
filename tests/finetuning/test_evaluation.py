from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import cats
from cats.errors import TrainingError
from cats.finetuning import Blocks, Pairs
from cats.finetuning.evaluation import evaluate_answers, evaluate_loss, final_answer
from cats.finetuning.trainer import divergence


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_loss_of_pairs_counts_answers_only(make, tokenizer, accelerator):
    model = make()
    pairs = Pairs.of_texts(tokenizer, [("ab", "cde"), ("f", "g"), ("hijk", "lm")])
    loss, share = evaluate_loss(model, pairs, batch_size=2, accelerator=accelerator)
    total, count = 0.0, 0
    for i in range(3):
        row = pairs[i]
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0]
        log = logits.log_softmax(-1)
        for t in range(len(pairs.prompts[i]), len(row["input_ids"])):
            total -= float(log[t - 1, row["input_ids"][t]])
            count += 1
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert 0.3 < share < 0.7


def test_size_of_batches_is_free(make, ids, accelerator):
    model = make()
    results = [
        evaluate_loss(model, Blocks(ids), batch_size=n, accelerator=accelerator) for n in (1, 5, 24)
    ]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-6)


def test_nan_is_an_error(make, ids, accelerator):
    model = make()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="NaN"):
        evaluate_loss(model, Blocks(ids), batch_size=8, accelerator=accelerator)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 4 and 5\n#### 1,234", "1234"),
        ("#### 3\n#### -7.5.", "-7.5"),
        (" yes \n", "yes"),
        ("#### none", "#### none"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_right_answers_are_counted(make, tokenizer, accelerator):
    model = make()
    prompts = ["ab", "c", "defg"]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt + "\n")["input_ids"]])
        new = cats.generate(model, ids, max_new_tokens=3, engine="eager")[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    expected[1] += "wrong"
    pairs = Pairs.of_texts(tokenizer, [*zip(prompts, ["x" + e for e in expected], strict=True)])
    pairs.references[:] = expected
    share = evaluate_answers(
        model, tokenizer, pairs, batch_size=2, max_new_tokens=3, accelerator=accelerator
    )
    assert share == pytest.approx(2 / 3)


def test_batches_of_answers_are_the_same_in_any_number_of_processes(make, tokenizer, monkeypatch):
    model = make()
    pairs = Pairs.of_texts(tokenizer, [("a" * (7 * n % 11 + 1), "x") for n in range(9)])

    def batches(processes):
        found = []

        def generate(model, tokenizer, prompts, *_):
            found.append(prompts)
            return [""] * len(prompts)

        monkeypatch.setattr("cats.finetuning.evaluation._generate", generate)
        for rank in range(processes):
            accelerator = SimpleNamespace(
                process_index=rank,
                num_processes=processes,
                device="cpu",
                autocast=nullcontext,
                reduce=lambda total, _: total,
            )
            evaluate_answers(
                model, tokenizer, pairs, batch_size=2, max_new_tokens=1, accelerator=accelerator
            )
        return sorted(found)

    assert batches(2) == batches(1)


def test_answers_end_where_a_served_model_stops(make, tokenizer, accelerator):
    model = make("dense")
    pairs = Pairs.of_texts(tokenizer, [("ab", "x")])
    ids = torch.tensor([pairs.prompts[0]])
    answer = cats.generate(model, ids, max_new_tokens=3, engine="eager")[0, ids.shape[1] :]
    pairs.references[:] = [tokenizer.decode(answer[:1])]
    shares = []
    for end in (256, [256, int(answer[0])]):
        model.generation_config.eos_token_id = end
        shares.append(
            evaluate_answers(
                model, tokenizer, pairs, batch_size=1, max_new_tokens=3, accelerator=accelerator
            )
        )
    assert shares == [0, 1]


def test_divergence_is_that_of_its_definition():
    student, teacher = torch.randn(2, 5, 11)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(divergence(student, teacher), (p * (p / q).log()).sum())
    assert divergence(teacher, teacher) == 0
