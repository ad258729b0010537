from pathlib import Path

import pytest

from cats.checkpoint import load_dense
from cats.data import token_blocks
from cats.metrics import perplexity
from tests import models

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--block", 32, "--tokens", 512)


@pytest.fixture
def begun(tmp_path):
    """Folder of a tiny model whose tokenizer begins each text with <bos>."""
    models.make_model(vocab_size=models.VOCABULARY + 1).save_pretrained(tmp_path / "begun")
    models.make_tokenizer(begins=True).save_pretrained(tmp_path / "begun")
    return tmp_path / "begun"


def test_blocks_begin_as_the_tokenizer_begins_a_text_or_as_the_option_says(
    command_json, begun, text
):
    model, tokenizer = load_dense(begun), models.make_tokenizer(begins=True)
    perplexities = {}
    for option, bos in ((None, True), ("--bos", True), ("--no-bos", False)):
        report = command_json("evaluate", begun, "--text", text, *SMALL, *filter(None, [option]))
        blocks = token_blocks(tokenizer, Path(text).read_text(), length=32, limit=16, bos=bos)
        assert report["bos"] is bos
        assert report["perplexity_dense"] == pytest.approx(
            perplexity(model, blocks.split(4)), rel=1e-5
        )
        perplexities[option] = report["perplexity_dense"]
    assert perplexities[None] == perplexities["--bos"] != perplexities["--no-bos"]


def test_statistics_and_thresholds_tell_how_blocks_begin(
    command, command_json, begun, text, tmp_path
):
    common = ("calibrate", begun, "--text", text, *SMALL, "--eval-tokens", 64)
    reports = [command_json(*common, option) for option in ("--bos", "--no-bos")]
    assert [report["bos"] for report in reports] == [True, False]
    assert reports[0]["calibration_hash"] != reports[1]["calibration_hash"]
    resumed = (*common, "--statistics", tmp_path / "s")
    assert command(*resumed)[0] == 0
    code, _, err = command(*resumed, "--no-bos")
    assert code == 1
    assert "(--bos)" in err


def test_profile_begins_blocks(command_json, begun, text):
    plain, begins = (command_json("profile", begun, text, *SMALL, o) for o in ("--no-bos", "--bos"))
    assert (plain["bos"], begins["bos"]) == (False, True)
    assert plain["layers"] != begins["layers"]


def test_tasks_are_not_begun_by_the_option(command, checkpoint):
    code, _, err = command("evaluate", checkpoint, "--tasks", "sciq", "--no-bos")
    assert code == 1
    assert "--bos/--no-bos is of perplexity, not of --tasks" in err


def test_begin_that_the_tokenizer_does_not_have_is_refused(command, checkpoint, text):
    code, _, err = command("evaluate", checkpoint, "--text", text, *SMALL, "--bos")
    assert code == 1
    assert err.startswith("error: the tokenizer has no beginning-of-sequence token: leave out")
