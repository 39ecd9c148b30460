"""The entries of tests/mutations/*.toml match the current source."""

from collections import Counter

import mutations


def test_no_entry_is_stale():
    entries = mutations.load()
    assert len(entries) >= 100
    assert not {m.name: problem for m in entries if (problem := m.problem())}
    assert not [name for name, n in Counter(m.name for m in entries).items() if n > 1]
