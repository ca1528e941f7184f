"""Sample keys."""

from __future__ import annotations

import pytest

from shards.keys import sample_key, unique_keys


@pytest.mark.parametrize(
    ("class_name", "path", "key"),
    [
        ("n01440764", "n01440764_18.JPEG", "n01440764_18"),
        ("n01440764", "ILSVRC2012_val_00000293.JPEG", "n01440764_ILSVRC2012_val_00000293"),
        ("cats", "my.best cat.v2.jpg", "cats_my_best_cat_v2"),
        ("cats", "images/1.jpg", "cats_images_1"),
        ("chats", "été.jpg", "chats_été"),
        ("chats", "e\u0301te\u0301.jpg", "chats_été"),
        ("a/b", "x.jpg", "a_b_x"),
    ],
)
def test_keys(class_name: str, path: str, key: str) -> None:
    assert sample_key(class_name, path) == key


def test_equal_keys_are_told_apart_in_order() -> None:
    names = ["a.jpg", "a.png", "a-2.jpg", "a.webp", "a b.jpg", "a_b.jpg"]
    keys = ["c_a", "c_a-2", "c_a-2-2", "c_a-3", "c_a_b", "c_a_b-2"]
    assert unique_keys(sample_key("c", name) for name in names) == keys
