"""Compiled kernels on disk."""

import pytest

from tests.ops.cases import needs_nvrtc

SOURCE = "embedding/embedding.cu"
DEFINES = {"DTYPE": 0, "WIDTH": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CATS_CACHE_DIR", str(tmp_path))


@needs_nvrtc
def test_second_compilation_comes_from_disk(monkeypatch, tmp_path):
    from cuda.bindings import nvrtc

    from cats.ops.cuda.compiler import compile_kernel

    code = compile_kernel(SOURCE, DEFINES, (9, 0))
    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", lambda *_: pytest.fail("compiled again"))
    assert compile_kernel(SOURCE, DEFINES, (9, 0)) == code
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


@needs_nvrtc
def test_other_options_are_another_entry(tmp_path):
    from cats.ops.cuda.compiler import compile_kernel

    codes = {
        compile_kernel(SOURCE, DEFINES, (9, 0)),
        compile_kernel(SOURCE, DEFINES | {"WIDTH": 16}, (9, 0)),
        compile_kernel(SOURCE, DEFINES, (8, 0)),
    }
    assert len(codes) == len(list(tmp_path.rglob("*.cubin"))) == 3


@needs_nvrtc
@pytest.mark.parametrize("damage", [lambda entry: entry[:-100], lambda entry: b"", lambda _: b"x"])
def test_damaged_entry_is_compiled_again(damage, tmp_path):
    from cats.ops.cuda.compiler import compile_kernel

    code = compile_kernel(SOURCE, DEFINES, (9, 0))
    (path,) = tmp_path.rglob("*.cubin")
    path.write_bytes(damage(path.read_bytes()))
    assert compile_kernel(SOURCE, DEFINES, (9, 0)) == code


@needs_nvrtc
def test_unwritable_cache_warns_and_compiles(tmp_path, monkeypatch):
    from cats.ops.cuda.compiler import compile_kernel

    (tmp_path / "file").touch()
    monkeypatch.setenv("CATS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="CATS_CACHE_DIR"):
        assert compile_kernel(SOURCE, DEFINES, (9, 0))
