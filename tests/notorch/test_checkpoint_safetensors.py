"""The safetensors reader: what it reads equals what the reference library wrote, and damage is named."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoint_fixtures import SHARED, header_of, safetensors_bytes, write_checkpoint, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.safetensors_reader import Checkpoint, TensorRef, read_header

TENSORS = {"b": ("F32", (2, 3)), "a": ("BF16", (5,)), "scalar": ("I64", ()), "empty": ("F16", (0, 4))}
GOLDEN = (
    b"\x3b\x00\x00\x00\x00\x00\x00\x00"
    b'{"w":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]}}   '
    b"\x00\x3c\x00\xc0"
)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_golden_bytes_are_read(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", GOLDEN)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors == {
        "w": TensorRef(
            name="w", file="model.safetensors", dtype="F16", shape=(1, 2), offset=8 + 0x3B, n_bytes=4
        )
    }
    assert bytes(checkpoint.bytes("w")) == b"\x00\x3c\x00\xc0"


def test_what_the_reference_library_writes_is_read_back(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float16).reshape(2, 3), "y": np.array([7], dtype=np.int64)}
    (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(arrays, {"format": "np"}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors["x"].dtype == "F16" and checkpoint.tensors["y"].dtype == "I64"
    for name, array in arrays.items():
        assert bytes(checkpoint.bytes(name)) == array.tobytes()
        assert checkpoint.tensors[name].shape == array.shape


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_one_file_and_many_hold_the_same_tensors(tmp_path: Path, shards: int) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TENSORS, shards=shards))
    assert {n: (r.dtype, r.shape) for n, r in checkpoint.tensors.items()} == TENSORS
    for name, ref in checkpoint.tensors.items():
        start = ref.offset
        assert (
            bytes(checkpoint.bytes(name)) == (tmp_path / ref.file).read_bytes()[start : start + ref.n_bytes]
        )


def test_symlinks_as_in_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blob = write(tmp_path / "blob", safetensors_bytes(header_of(TENSORS)))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert Checkpoint.open(tmp_path / "snapshot").tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_link_to_nothing_is_named_with_its_aim(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("../../blobs/0a1b")
    assert f"{name} is a link to ../../blobs/0a1b, which is not there (download it again)" in refusal(
        tmp_path
    )


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "truncated: it has 0 bytes"),
        (b"\x01\x00", "truncated"),
        ((2**60).to_bytes(8, "little") + b"{}", "its header alone needs 1152921504606846984"),
        (safetensors_bytes({}, raw=b"[1]"), "does not start with '{'"),
        (safetensors_bytes({}, raw=b"   "), "does not start with '{'"),
        (safetensors_bytes({}, 0, raw=b"{"), "not valid JSON"),
        (safetensors_bytes({}, 0, raw=b'{"\xff":1}'), "not valid JSON"),
        (safetensors_bytes({}, 0, raw=b'{"a":' * 100_000), "nested too deeply"),
        (safetensors_bytes({}, 0, raw=b'{"w":NaN}'), "NaN is not a JSON number"),
        (safetensors_bytes({}, 0, raw=b'{"w":' + b"9" * 10_000 + b"}"), "not valid JSON"),
        (safetensors_bytes({}, 0, raw=b'{"w":1,"w":1}'), "key 'w' stands twice"),
        (safetensors_bytes({"w": 1}, 0), "exactly dtype, shape and data_offsets"),
        (safetensors_bytes(entry(extra=1), 8), "exactly dtype, shape and data_offsets"),
        (safetensors_bytes(entry(dtype="F31"), 8), "dtype 'F31'; known are BOOL"),
        (safetensors_bytes(entry(dtype=["F32"]), 8), "dtype ['F32']"),
        (safetensors_bytes(entry(shape=[-2]), 8), "sizes >= 0"),
        (safetensors_bytes(entry(shape=[2.0]), 8), "sizes >= 0"),
        (safetensors_bytes(entry(shape=[True, 2]), 8), "sizes >= 0"),
        (safetensors_bytes(entry(shape=[1] * 1000), 8), "sizes >= 0"),
        (safetensors_bytes(entry(shape=[2**62, 2**62]), 8), "sizes >= 0"),
        (safetensors_bytes(entry(shape=[3]), 8), "has 8 bytes, but F32 of shape [3] needs 12"),
        (safetensors_bytes(entry(data_offsets=[8, 0]), 8), "must be [begin, end]"),
        (safetensors_bytes(entry(data_offsets=[0, 8, 9]), 8), "must be [begin, end]"),
        (safetensors_bytes(entry(), 7), "truncated: tensor 'w' ends at byte"),
        (safetensors_bytes(entry(), 9), "1 bytes after its last tensor (download it again)"),
        (safetensors_bytes(entry(data_offsets=[4, 12]), 12), "leaves a hole after the header"),
        (
            safetensors_bytes(entry() | {"v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12),
            "tensor 'v' overlaps 'w'",
        ),
        (safetensors_bytes({"__metadata__": {"a": 1}}, 0), "__metadata__ must map strings"),
    ],
)  # fmt: skip
def test_damaged_files_are_named_with_the_values(tmp_path: Path, data: bytes, words: str) -> None:
    path = write(tmp_path / "model.safetensors", data)
    message = refusal(tmp_path)
    assert words in message and str(path) in message


def test_the_cap_on_headers_holds_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)  # sparse
    tracemalloc.start()
    assert "at most 100000000 are read" in refusal(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "lacks weight_map"),
        ([], "lacks weight_map"),
        ({}, "lacks weight_map"),
        ({"a": "../model-1.safetensors"}, "same directory"),
        ({"a": "/etc/passwd"}, "same directory"),
        ({"a": "sub\\x.safetensors"}, "same directory"),
        ({"a": "pytorch_model.bin"}, "same directory"),
        ({"a": 3}, "same directory"),
        ({"a": "absent.safetensors"}, "absent.safetensors is missing"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "tensor 'c' in one.safetensors, which"),
        ({"b": "one.safetensors"}, "one.safetensors holds tensor 'a'"),
    ],
)  # fmt: skip
def test_a_wrong_index_is_named(tmp_path: Path, weight_map: Any, words: str) -> None:
    tensors = {"a": ("F32", (1,)), "b": ("F32", (1,))}
    write(tmp_path / "one.safetensors", safetensors_bytes(header_of(tensors)))
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    assert words in refusal(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    write(tmp_path / "pytorch_model.bin", b"\x80\x02")
    assert "'pytorch_model.bin' but no safetensors; other formats are never loaded (convert it" in refusal(
        tmp_path
    )


def test_an_empty_directory_and_no_directory_are_told_apart(tmp_path: Path) -> None:
    words = "holds neither model.safetensors nor model.safetensors.index.json (give the directory that holds"
    assert words in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "absent")


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "is not a regular file" in refusal(tmp_path)


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TENSORS))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="when it was opened"):
        checkpoint.bytes("a")


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Flip some bits, cut the end, or put foreign bytes in."""
    kind = draw(st.sampled_from(["flip", "cut", "replace", "insert"]))
    at = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    foreign = draw(st.binary(min_size=1, max_size=12))
    return data[:at] + foreign + data[at + (len(foreign) if kind == "replace" else 0) :]


WHOLE = safetensors_bytes(header_of(TENSORS))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=damage(WHOLE))
def test_a_damaged_file_opens_consistently_or_is_refused(tmp_path: Path, data: bytes) -> None:
    """Whatever opens is also sound to the reference library, and every tensor lies inside the file."""
    path = write(tmp_path / "model.safetensors", data)
    tracemalloc.start()
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
    reference = dict(safetensors.deserialize(data))
    assert reference.keys() == tensors.keys()
    for name, ref in tensors.items():
        assert list(ref.shape) == reference[name]["shape"]
        assert data[ref.offset : ref.offset + ref.n_bytes] == bytes(reference[name]["data"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_index_opens_the_same_tensors_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2)
    whole = Checkpoint.open(tmp_path).tensors
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(data.draw(damage(index.read_bytes())))
    try:
        found = Checkpoint.open(tmp_path).tensors
    except CheckpointError:
        return
    assert found == whole


@pytest.mark.skipif(not (SHARED / "models/books-28m").exists(), reason="the shared models are not here")
def test_a_real_sharded_checkpoint_agrees_with_its_own_metadata() -> None:
    directory = SHARED / "models/books-28m"
    tensors = Checkpoint.open(directory).tensors
    metadata = json.loads((directory / "model.safetensors.index.json").read_text())["metadata"]
    assert sum(ref.n_bytes for ref in tensors.values()) == metadata["total_size"]
