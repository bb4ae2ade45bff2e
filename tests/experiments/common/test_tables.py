"""Tables as text."""

from experiments.common import tables


def test_a_table_aligns_and_shows_what_is_missing():
    table = tables.of_records([{"what": "w2", "ms": 1.23456}, {"what": "floor"}])
    assert table.splitlines() == ["what     ms", "-----------", "w2     1.23", "floor     -"]
