"""Pages: references, reuse of prefixes, least recently used pages first; against a simple model."""

import random

import pytest

from llama_jax.serve.pages import Pages, prefix_keys


def test_keys_depend_on_everything_before():
    ids = list(range(50))
    keys = prefix_keys(ids, 16, "")
    assert len(keys) == 3  # two ids are left over
    assert prefix_keys(ids[:40], 16, "") == keys[:2]
    assert len({*keys, *prefix_keys(ids, 16, "adapter"), *prefix_keys([7, *ids[1:]], 16, "")}) == 9
    assert prefix_keys(ids[16:], 16, "")[0] not in keys


def test_a_known_prefix_is_shared():
    pages = Pages(8, max_cached=8)
    first, known = pages.reserve([b"a", b"b"], 3)
    assert (known, pages.used) == (0, 3)
    pages.publish(first[0], b"a")
    pages.publish(first[1], b"b")
    second, known = pages.reserve([b"a", b"b", b"c"], 4)
    assert (second[:2], known, pages.used) == (first[:2], 2, 5)
    assert not set(second[2:]) & set(first)
    pages.release(first)
    assert (pages.used, pages.cached) == (4, 0)
    pages.release(second)
    assert (pages.used, pages.cached) == (0, 2)
    assert pages.known([b"a", b"x"]) == first[:1]


def test_the_end_of_the_least_recently_used_prefix_goes_first():
    pages = Pages(6, max_cached=6)
    for name in (b"a", b"b"):
        keys = [name + b"%d" % i for i in range(3)]
        held, _ = pages.reserve(keys, 3)
        for page, key in zip(held, keys, strict=True):
            pages.publish(page, key)
        pages.release(held)
    pages.release(pages.reserve([b"a0", b"a1"], 2)[0])  # used again
    held, _ = pages.reserve([], 2)
    known = [key for key in (b"a0", b"a1", b"a2", b"b0", b"b1", b"b2") if pages.known([key])]
    assert known == [b"a0", b"a1", b"b0", b"b1"]
    assert pages.reserve([b"b0", b"b1", b"b2"], 5) is None  # four pages are left, two of them b's
    assert (pages.used, pages.cached) == (2, 4)


def test_limit_of_pages_kept():
    pages = Pages(8, max_cached=2)
    held, _ = pages.reserve([], 4)
    for i, page in enumerate(held):
        pages.publish(page, b"%d" % i)
    pages.release(held)
    assert (pages.cached, pages.used) == (2, 0)
    assert pages.known([b"0", b"1", b"2"]) == held[:2]


def test_another_request_computed_the_same_page_first():
    pages = Pages(8, max_cached=8)
    first, second = pages.reserve([b"a"], 2)[0], pages.reserve([b"a"], 2)[0]
    assert pages.share(b"a", second[0]) is None  # not known yet
    pages.publish(first[0], b"a")
    second[0] = pages.share(b"a", second[0])
    assert (second[0], pages.used) == (first[0], 3)
    pages.publish(second[1], b"a")  # a known prefix stays where it is
    pages.release(first)
    pages.release(second)
    assert (pages.used, pages.cached) == (0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_random_use(seed):
    """A page that a request holds is never given to another one, and no page is lost."""
    rng = random.Random(seed)
    pages = Pages(count := rng.randint(4, 20), max_cached=rng.randint(0, 20))
    running: list[tuple[list[int], int, list[bytes]]] = []
    written: dict[int, bytes | None] = {}
    for _ in range(300):
        if rng.random() < 0.5:
            prompt = [rng.choice("ab") for _ in range(rng.randint(0, 6))]
            keys = ["".join(prompt[: i + 1]).encode() for i in range(len(prompt))]
            total = len(keys) + rng.randint(0, 2)
            if (got := pages.reserve(keys, total)) is None:
                assert total - len(pages.known(keys)) > count - pages.used - pages.cached
                continue
            held, known = got
            assert len(held) == len(set(held)) == total
            assert 0 not in held
            assert [written[p] for p in held[:known]] == keys[:known]
            for page in held[known:]:
                assert all(page not in other for other, *_ in running)
                written[page] = None
            for i in range(known, len(keys)):
                held[i] = pages.share(keys[i], held[i]) or held[i]
                written[held[i]] = keys[i]
                pages.publish(held[i], keys[i])
            running.append((held, known, keys))
        elif running:
            held, _, keys = running.pop(rng.randrange(len(running)))
            assert [written[p] for p in held[: len(keys)]] == keys
            pages.release(held)
        assert pages.used == len({p for held, *_ in running for p in held})
        assert pages.used + pages.cached <= count
    for held, *_ in running:
        pages.release(held)
    assert pages.used == 0
    assert pages.reserve([], count) is not None
