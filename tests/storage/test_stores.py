"""What every store promises, asked of each of them: the folder, the bucket, and both together."""

import os
import subprocess
import sys

import pytest

from icl.storage import (
    InvalidKeyError,
    LocalStore,
    MirroredStore,
    MissingKeyError,
    S3Store,
    StorageError,
    check_key,
    open_store,
    store_from_environment,
)

HOSTILE = [
    "", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "a//b", "a/", "./a", "a/.hidden", "a\\b", "a\0b", "a\nb",
    "C:/x", "~/x", "a b", "ä", "a/\u202e", "$(id)", "a;b", "-rf", "a" * 201, "/".join(["a"] * 500), "a/.lock",
]  # fmt: skip


@pytest.fixture(params=["local", "s3", "s3 with prefix", "mirrored"])
def store(request, tmp_path):
    if request.param == "local":
        return LocalStore(tmp_path / "root")
    remote = S3Store(request.getfixturevalue("bucket"), "some/prefix" if "prefix" in request.param else "")
    return MirroredStore(LocalStore(tmp_path / "root"), remote) if request.param == "mirrored" else remote


def test_a_store_is_a_dictionary_of_bytes(store):
    assert store.list() == []
    values = {"icl/a/1.bin": b"one", "icl/a/10.bin": bytes(range(256)) * 7, "icl/ab/1.bin": b"", "icl/a/deep/x": b"2"}
    for key, value in values.items():
        store.put(key, value)
    assert {key: store.get(key) for key in values} == values
    assert store.list() == sorted(values)
    assert store.sizes("icl/a") == {
        "icl/a/1.bin": 3,
        "icl/a/10.bin": 1792,
        "icl/a/deep/x": 1,
    }  # icl/ab is another folder
    assert store.list("icl/none") == []
    store.put("icl/a/1.bin", b"replaced")
    assert store.get("icl/a/1.bin") == b"replaced"
    assert store.sizes("icl/a")["icl/a/1.bin"] == 8
    store.delete("icl/a/1.bin")
    store.delete("icl/a/1.bin")
    assert not store.exists("icl/a/1.bin")
    assert store.exists("icl/a/10.bin")
    assert "icl/a/1.bin" not in store.list("icl/a")
    with pytest.raises(MissingKeyError, match=r"there is no icl/a/1\.bin in"):
        store.get("icl/a/1.bin")
    store.recover("icl/a")
    assert store.flush(30.0) == ()
    assert store.list("icl/a") == ["icl/a/10.bin", "icl/a/deep/x"]


def test_a_file_that_grows_is_replaced_by_longer_ones_only(store):
    key = "icl/a/log.jsonl"
    for written, left in ((b"1\n", b"1\n"), (b"1\n2\n", b"1\n2\n"), (b"1\n", b"1\n2\n"), (b"1\n3\n", b"1\n3\n")):
        store.put_longer(key, written)
        assert store.flush(30.0) == ()
        assert store.get(key) == left
        assert store.sizes("icl/a") == {key: len(left)}
    with pytest.raises(InvalidKeyError):
        store.put_longer("../x", b"")


@pytest.mark.parametrize("key", HOSTILE)
def test_no_key_leaves_the_root_of_a_store(key, tmp_path):
    store = MirroredStore(LocalStore(tmp_path / "root"), LocalStore(tmp_path / "remote"))
    for act in (
        lambda: store.put(key, b"x"),
        lambda: store.get(key),
        lambda: store.delete(key),
        lambda: store.exists(key),
    ):
        with pytest.raises(InvalidKeyError) as caught:
            act()
        assert isinstance(caught.value, StorageError)
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)
    if key:
        with pytest.raises(InvalidKeyError):
            store.list(key)
    assert list(tmp_path.iterdir()) == []


def test_names_of_runs_and_checkpoints_are_keys():
    for key in ("icl/L2H4Minf-K8-seed0-0a1b2c3d/499999.safetensors", "icl/M-4_x=1,y+2@3/state-1.safetensors", "a"):
        assert check_key(key) == key


def test_files_of_other_programs_are_not_listed(tmp_path):
    store = LocalStore(tmp_path)
    store.put("icl/a/1", b"x")
    (tmp_path / "icl/a/.hidden").write_text("x")
    (tmp_path / "icl/a/with space").write_text("x")
    assert store.list() == ["icl/a/1"]


def test_the_environment_chooses_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = store_from_environment({})
    assert isinstance(local, LocalStore)
    assert str(local.root) == "checkpoints"
    assert store_from_environment({"LOCAL_ROOT": "", "AWS_BUCKET_NAME": ""}).list() == []
    both = store_from_environment({"LOCAL_ROOT": str(tmp_path / "x"), "AWS_BUCKET_NAME": "some-bucket"})
    assert isinstance(both, MirroredStore)
    assert str(both) == f"folder {tmp_path / 'x'} and s3://some-bucket"
    assert list(tmp_path.iterdir()) == []


def test_locations_are_folders_or_buckets():
    assert str(open_store("some/folder")) == "folder some/folder"
    assert str(open_store("s3://bucket/a/b/")) == "s3://bucket/a/b"
    assert str(open_store("s3://bucket")) == "s3://bucket"
    assert str(open_store("s3://user:plantedPW@bucket")) == "s3://bucket"
    with pytest.raises(InvalidKeyError, match="'http://host/x' is not a storage location"):
        open_store("http://user:plantedPW@host/x")
    for bad in ("", "s3://", "gs://bucket", "s3://bucket/../x"):
        with pytest.raises(InvalidKeyError):
            open_store(bad)


def test_importing_storage_needs_neither_boto3_nor_credentials():
    code = (
        "import sys, icl.storage, icl.checkpoints.run; icl.storage.S3Store('bucket'); assert 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": os.environ["PATH"]})
