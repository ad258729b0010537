import pytest

from tests import models


@pytest.fixture
def model():
    return models.make_model()


@pytest.fixture
def tokenizer():
    return models.make_tokenizer()


@pytest.fixture
def data_dir(tmp_path):
    """Tiny data in the columns of PIQA, SciQ and ARC-easy, some splits absent."""
    return models_data(tmp_path / "data")


def models_data(folder):
    datasets = pytest.importorskip("datasets", reason="needs the extra eval")
    words = ["red", "green", "blue", "black", "white", "grey", "brown", "pink"]

    def save(task, split, make_row):
        rows = [make_row(i, word) for i, word in enumerate(words)]
        (folder / task).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / task / f"{split}.parquet")

    def piqa(i, word):
        choices = {"sol1": f"use {word}", "sol2": f"use no {word} at all"}
        return {"goal": f"paint it {word}", **choices, "label": i % 2}

    def sciq(i, word):
        wrong = {"distractor1": "a", "distractor2": "bb", "distractor3": "ccc"}
        question = {"question": f"what is {word}?", "support": f"{word} is a colour"}
        return {**question, **wrong, "correct_answer": "a colour"}

    def arc_easy(i, word):
        choices = {"text": [word, "none"], "label": ["A", "B"]}
        question = {"id": str(i), "question": f"which is {word}?", "choices": choices}
        return {**question, "answerKey": "AB"[i % 2]}

    save("piqa", "validation", piqa)
    save("sciq", "validation", sciq)
    save("arc_easy", "test", arc_easy)
    save("arc_easy", "validation", arc_easy)
    return folder
