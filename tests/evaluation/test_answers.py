import math

import pytest

from cats.errors import DataError, FormatError, StorageError
from cats.evaluation.answers import Answers, Question, paired_difference


def answers(scores, task="piqa", hashes=None):
    return Answers(
        task=task,
        split="test",
        settings={"limit": None},
        environment={"device": "cpu"},
        questions=[
            Question(
                key=f"{task}/{i}",
                prompt_hash=hashes[i] if hashes else str(i),
                answer=[[-1.5, False]],
                scores={"acc": float(score)},
            )
            for i, score in enumerate(scores)
        ],
    )


def test_score_is_the_mean_with_its_standard_error():
    score = answers([1, 0, 1, 1]).score("acc")
    assert score.value == 0.75
    assert score.stderr == pytest.approx(math.sqrt(0.25 / 4))
    assert score.questions == 4


def test_paired_difference_of_equal_answers_has_no_error():
    first = answers([1, 0, 1, 1])
    assert paired_difference(first, first, "acc").value == 0
    assert paired_difference(first, first, "acc").stderr == 0


def test_paired_difference_is_second_minus_first_question_by_question():
    difference = paired_difference(answers([1, 1, 1, 0]), answers([0, 1, 1, 0]), "acc")
    assert difference.value == -0.25
    # one question of four changed: its variance, not that of two independent samples
    assert difference.stderr == pytest.approx(math.sqrt(0.25 / 4))


def test_different_questions_are_not_paired():
    with pytest.raises(DataError, match="different questions"):
        paired_difference(answers([1, 0]), answers([1]), "acc")
    with pytest.raises(DataError, match="different questions"):
        paired_difference(answers([1]), answers([1], hashes=["other"]), "acc")


def test_saved_answers_are_read_back(tmp_path):
    first = answers([1, 0, 1])
    first.save(tmp_path / "piqa.jsonl")
    assert Answers.load(tmp_path / "piqa.jsonl") == first


def test_damaged_absent_and_newer_files_are_errors(tmp_path):
    path = tmp_path / "piqa.jsonl"
    with pytest.raises(StorageError, match="cannot be read"):
        Answers.load(path)
    answers([1, 0]).save(path)
    text = path.read_text()
    path.write_text(text[:-5])
    with pytest.raises(FormatError, match="not a file of answers"):
        Answers.load(path)
    path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(FormatError, match="format 2"):
        Answers.load(path)
