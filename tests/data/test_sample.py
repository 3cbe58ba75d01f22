"""One slice as it lies in a shard."""

import blosc2
import numpy as np
import pytest

from meddino.core.errors import ShardError
from meddino.data.sample import SliceInfo, decode_slice, encode_slice


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


def test_encode_slice__a_volume_is_refused():
    with pytest.raises(ValueError, match=r"int16 \[rows, cols\], not int16 \[2, 3, 3\]"):
        encode_slice(np.zeros((2, 3, 3), dtype=np.int16))


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


def test_slice_info__survives_json_and_names_what_is_wrong():
    info = SliceInfo("v", 3, 7.5, (0.7, 0.8), 2.5, "set", "blosc2")
    assert SliceInfo.from_json(info.to_json(), "here") == info
    with pytest.raises(ShardError, match="here: not the description of a slice"):
        SliceInfo.from_json(b'{"volume_id": "v"}', "here")
