"""The Dockerfile, without Docker: its linter, what it copies, and the command that it runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from cats.cli import app

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
# the wheel of the linter lies beside Python, whatever the path is
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no wheel for this platform")
def test_the_linter_finds_nothing():
    run = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


def instructions(name):
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [line.partition(" ")[2] for line in lines if line.startswith(f"{name} ")]


def test_only_what_is_copied_goes_to_the_builder():
    copied = {
        name
        for line in instructions("COPY")
        if not line.startswith("--from=")
        for name in line.split()[:-1]
    }
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_runs_a_command_that_exists_and_is_no_root():
    (entry,), (arguments,) = instructions("ENTRYPOINT"), instructions("CMD")
    command, name, *options = json.loads(entry) + json.loads(arguments)
    assert command == "cats"
    serve = get_command(app).commands[name]
    parsed = serve.make_context(name, options).params
    assert (parsed["model"], parsed["host"]) == ("smollm2", "0.0.0.0")
    made = re.search(r"calibrate smollm2 .*-o (\S+)", "\n".join(instructions("RUN")))[1]
    assert str(parsed["thresholds"]) == made
    assert made.startswith("/opt/cats/"), "what the last stage copies"
    assert f"EXPOSE {parsed['port']}" in DOCKERFILE.read_text()
    assert f":{parsed['port']}/health" in instructions("HEALTHCHECK")[0]
    assert re.fullmatch(r"[1-9]\d*", instructions("USER")[-1])


def test_the_image_installs_extras_that_exist_in_pinned_releases():
    (extras,) = re.findall(r"'\.\[(.*)\]'", DOCKERFILE.read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras.split(","))
    installs = re.findall(r"pip install (.*?)(?: \\| &&|$)", DOCKERFILE.read_text(), flags=re.M)
    assert len(installs) == 3
    assert all("-c constraints.txt" in install for install in installs)
