"""What the Responses API keeps: how much, and for whom."""

from __future__ import annotations

import pytest

from deployments.http.responses_store import ResponseNotFound, ResponseStore


def test_the_store_is_bounded():
    store = ResponseStore(max_kept=3, max_bytes=2000)
    for number in range(5):
        store.put({"id": f"r{number}"}, [{"role": "user", "content": "x"}])
    assert len(store) == 3
    with pytest.raises(ResponseNotFound):
        store.get("r1")
    store.put({"id": "big"}, [{"role": "user", "content": "x" * 1900}])
    assert len(store) <= 2
    store.put({"id": "too big"}, [{"role": "user", "content": "x" * 9000}])
    assert len(store) == 0


def test_an_owner_sees_only_its_own():
    store = ResponseStore()
    store.put({"id": "r"}, [{"role": "user", "content": "ann's"}], owner="ann")
    for act in (store.get, store.delete):
        with pytest.raises(ResponseNotFound, match="'r' is not kept"):
            act("r", "bob")
    assert store.get("r", "ann") == ({"id": "r"}, [{"role": "user", "content": "ann's"}])
    store.delete("r", "ann")
    assert len(store) == 0
