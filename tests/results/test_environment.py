import importlib
import json

# the package has a function of the same name
found = importlib.import_module("cats.results.environment")


def test_environment_names_device_versions_and_sources():
    named = found.environment("cpu")
    assert named["device"]
    assert named["threads"] >= 1
    assert named["version_torch"]
    assert len(named["kernel_sources"]) == 64
    assert json.loads(json.dumps(named)) == named


def test_source_hash_follows_the_sources(tmp_path, monkeypatch):
    package = tmp_path / "cats"
    (package / "ops").mkdir(parents=True)
    source = package / "ops" / "kernel.cu"
    monkeypatch.setattr(found, "_SOURCES", package)
    hashes = []
    for text in ("a", "b", "a"):
        source.write_text(text)
        hashes.append(found.kernel_source_hash.__wrapped__())
    assert hashes[0] == hashes[2] != hashes[1]


def test_sources_outside_a_checkout_may_be_named(monkeypatch):
    found._commit.cache_clear()
    monkeypatch.setenv("CATS_COMMIT", "abc123")
    try:
        assert found.environment("cpu")["commit"] == "abc123"
    finally:
        found._commit.cache_clear()
