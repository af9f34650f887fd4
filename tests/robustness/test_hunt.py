"""A sample of the hunt, as in CI: a few attacks of each kind on what SECURITY.md promises (see `attacks.py`)."""

from __future__ import annotations

from collections import Counter

import attacks
import hunt
import pytest


@pytest.mark.parametrize("kind", attacks.KINDS)
def test_sample(kind, capsys):
    assert hunt.main(["--sample", "--only", kind]) == 0, capsys.readouterr().out
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows if row[:1] == [kind]] == ["0", "0"] and rows[-1][2] != "0"


def test_a_hole_is_told(monkeypatch, capsys):
    monkeypatch.setitem(attacks.KINDS, "paths", (lambda *_: Counter({"refused": 3, "HOLE: x": 1}), 1))
    assert hunt.main(["--sample", "--only", "paths"]) == 1
    assert "paths: HOLE: x" in capsys.readouterr().out
