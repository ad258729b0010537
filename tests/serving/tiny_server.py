"""A server of a tiny random sparse model, in a process of its own.

python -m tests.serving.tiny_server              prints its address, and runs until a signal
python -m tests.serving.tiny_server COMMAND...   runs a command, which finds the address in
                                                 CATS_TEST_SERVER, and ends as it ends
"""

import logging
import os
import subprocess
import sys

import torch

from cats.serving.run import run
from cats.serving.settings import Settings
from tests.serving.live import make_chat_model, make_models, serving


def main():
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # a line for each request
    models = make_models(make_chat_model(sparse=True), rows=16, context=512, queue=64)
    if command := sys.argv[1:]:
        with serving(models) as address:
            environment = os.environ | {"CATS_TEST_SERVER": address}
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    run(models, Settings(port=0), on_start=lambda address: print(address, flush=True))


if __name__ == "__main__":
    main()
