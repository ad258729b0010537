import subprocess
import sys

import cats


def test_import_and_command_line_do_not_import_torch():
    code = "import sys, cats.cli; print(*(m in sys.modules for m in ('torch', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_public_name_is_there():
    assert all(getattr(cats, name) is not None for name in cats.__all__)
