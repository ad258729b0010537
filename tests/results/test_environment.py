import json

from cats.results.environment import environment, hash_sources


def test_environment_names_device_versions_and_sources():
    named = environment("cpu")
    assert named["device"]
    assert named["threads"] >= 1
    assert named["version_torch"]
    assert len(named["kernel_sources"]) == 64
    assert json.loads(json.dumps(named)) == named


def test_source_hash_follows_the_sources(tmp_path):
    source = tmp_path / "kernel.cu"
    hashes = []
    for text in ("a", "b", "a"):
        source.write_text(text)
        hashes.append(hash_sources(tmp_path))
    assert hashes[0] == hashes[2] != hashes[1]


def test_sources_outside_a_checkout_may_be_named(monkeypatch):
    monkeypatch.setenv("CATS_COMMIT", "abc123")
    assert environment("cpu")["commit"] == "abc123"
    assert environment("cpu", commit="def456")["commit"] == "def456"
