import subprocess
import sys


def test_module_runs_the_command():
    run = subprocess.run([sys.executable, "-m", "cats", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "python -m cats" in run.stdout
