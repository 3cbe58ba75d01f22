"""One slice as it lies in a shard."""

import json

import blosc2
import numpy as np
import pytest

from meddino.core.errors import ShardError
from meddino.data.sample import DTYPES, SliceInfo, decode_slice, encode_slice


@pytest.mark.parametrize("codec", ["blosc2", "png16"])
@pytest.mark.parametrize("shape", [(1, 1), (73, 47), (512, 512)])
def test_encode_slice__is_lossless(codec, shape):
    hu = np.random.default_rng(0).integers(-32768, 32768, shape).astype(np.int16)
    assert np.array_equal(decode_slice(encode_slice(hu, codec), codec, *shape, "here"), hu)
    assert encode_slice(hu, codec) == encode_slice(hu.copy(), codec)


def test_encode_slice__is_one_block_whatever_the_processors_cache(monkeypatch):
    hu = np.zeros((1024, 1024), dtype=np.int16)
    data = encode_slice(hu)
    assert blosc2.ndarray_from_cframe(data).blocks == (1024, 1024)
    monkeypatch.setitem(blosc2.cpu_info, "l2_cache_size", 2**18)
    assert encode_slice(hu) == data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_encode_slice__keeps_every_stored_type_grey_and_colour(dtype, shape):
    values = np.random.default_rng(0).uniform(0, 255, shape).astype(dtype)
    decoded = decode_slice(encode_slice(values), "blosc2", *shape[:2], "here", dtype, *shape[2:])
    assert decoded.dtype == values.dtype
    assert np.array_equal(decoded, values)
    with pytest.raises(ShardError, match=r"the index says .* \[5, 7"):
        decode_slice(encode_slice(values), "blosc2", *shape[:2], "here", "uint8" if dtype == "int16" else "int16", *shape[2:])


@pytest.mark.parametrize(("values", "codec"), [(np.zeros((2, 3, 5), np.int16), "blosc2"), (np.zeros((2, 3), bool), "blosc2"),
    (np.zeros((2, 3), np.uint8), "png16")])  # fmt: skip
def test_encode_slice__what_is_no_slice_is_refused(values, codec):
    with pytest.raises(ValueError, match=str(values.dtype)):
        encode_slice(values, codec)


@pytest.mark.parametrize("codec", ["blosc2", "png16"])
@pytest.mark.parametrize("harm", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x00" * len(data)])
def test_decode_slice__damaged_bytes_name_the_sample(codec, harm):
    data = encode_slice(np.arange(400, dtype=np.int16).reshape(20, 20), codec)
    with pytest.raises(ShardError, match="shard 7, sample x: damaged slice data"):
        decode_slice(harm(data), codec, 20, 20, "shard 7, sample x")


@pytest.mark.parametrize("codec", ["blosc2", "png16"])
def test_decode_slice__another_size_than_the_indexs_is_refused(codec):
    data = encode_slice(np.zeros((20, 30), dtype=np.int16), codec)
    with pytest.raises(ShardError, match="the index says"):
        decode_slice(data, codec, 30, 20, "here")
    with pytest.raises(ShardError, match="at most"):
        decode_slice(data, codec, 2**20, 2**20, "here")


def test_slice_info__is_json_with_the_names_of_the_index():
    info = json.loads(SliceInfo("v", 3, None, None, None, "set", "blosc2", "image").to_json())
    assert info == {
        "volume_id": "v", "z_index": 3, "z_mm": None, "spacing_mm": None, "thickness_mm": None, "dataset": "set",
        "codec": "blosc2", "modality": "image",
    }  # fmt: skip
