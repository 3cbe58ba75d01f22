"""Every recorded loss, one test each, where ../shared/reference is there."""

from tests.reference.losses import compare_losses
from tests.reference.records import Records


def test_losses__recorded(shared_reference):
    items = compare_losses(Records.read(shared_reference))
    assert len(items) >= 15
    assert {item.name: item.difference for item in items if not item.passed} == {}
