import os

# cuBLAS warns without it in deterministic mode, in which the tests run; read when CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
