"""The range of a volume's values, and the type in which a corpus holds them."""

import numpy as np
import pytest

from meddino.data.stored_values import stored_type, value_range


def test_value_range__percentiles_or_the_types_range():
    values = np.arange(1001, dtype=np.float32)
    assert value_range("mr", values) == pytest.approx((5.0, 995.0))
    assert value_range("image", values.astype(np.uint16)) == (0, 65535)
    assert value_range("image", np.array([3, 200], dtype=np.uint8)) == (0, 255)
    mostly_dark = np.zeros(1000)
    mostly_dark[0] = 7
    assert value_range("mr", mostly_dark) == (0, 7)


def test_stored_type__its_own_or_the_nearest_that_a_corpus_holds():
    kept = {name: str(stored_type(np.dtype(name))) for name in ("uint8", "uint16", "int16", "int8", "int32", "float64")}
    assert kept == {
        "uint8": "uint8",
        "uint16": "uint16",
        "int16": "int16",
        "int8": "int16",
        "int32": "float32",
        "float64": "float32",
    }
