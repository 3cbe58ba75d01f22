import numpy as np

from meddino.data.content import ContentHash


def hashed(volume: np.ndarray) -> str:
    content = ContentHash(volume.shape)
    for plane in volume:
        content.add(plane)
    return content.hexdigest()


def test_content_hash__of_values_and_shape_and_nothing_else():
    volume = np.random.default_rng(0).integers(-1024, 3000, (3, 4, 6)).astype(np.int16)
    name = hashed(volume)
    assert len(name) == 32
    assert hashed(np.asfortranarray(volume)) == name  # memory order
    assert hashed(volume.reshape(3, 6, 4)) != name
    assert hashed(volume[::-1]) != name
    changed = volume.copy()
    changed[2, 3, 5] += 1
    assert hashed(changed) != name
