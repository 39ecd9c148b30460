"""Which request holds which page of the cache, and which pages hold a known prefix."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def prefix_keys(ids: Sequence[int] | np.ndarray, page: int, salt: str) -> list[bytes]:
    """A key for each full page of a prompt; it depends on all ids up to the end of that page.

    Args:
      ids: of the prompt.
      page: ids per page.
      salt: prompts with different salts have different keys.
    """
    key = hashlib.blake2b(salt.encode(), digest_size=16).digest()
    data = np.asarray(ids, np.int32)
    keys = []
    for end in range(page, len(data) + 1, page):
        chunk = data[end - page : end].tobytes()
        key = hashlib.blake2b(key + chunk, digest_size=16).digest()
        keys.append(key)
    return keys


class Pages:
    """Allocates pages 1 to ``count``; page 0 belongs to no request.

    Pages with a known prefix are shared: each holder counts as one reference. Without references
    they are kept, up to a limit, until their memory is needed; the least recently used goes first.

    Args:
      count: number of pages.
      max_cached: largest number of pages kept without references.

    Example::

      pages = Pages(count=64, max_cached=16)
      held = pages.reserve(keys, total=5)  # None: not enough free pages
      pages.publish(held[0], keys[0])
      pages.release(held)
    """

    def __init__(self, count: int, max_cached: int):
        self.count = count
        self._max_cached = max_cached
        self._free = list(range(count, 0, -1))
        self._references = [0] * (count + 1)
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # without references, oldest first

    @property
    def used(self) -> int:
        """Pages that requests hold."""
        return self.count - len(self._free) - len(self._cached)

    @property
    def cached(self) -> int:
        """Pages with a known prefix that no request holds."""
        return len(self._cached)

    def known(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix."""
        found = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            found.append(page)
        return found

    def reserve(self, keys: Sequence[bytes], total: int) -> tuple[list[int], int] | None:
        """Hold the known pages of a prompt, and new ones up to ``total`` pages.

        Args:
          keys: of the pages that may be shared, at most ``total``.
          total: number of pages.

        Returns:
          The pages in order and how many of them were known; None, and nothing is held, if there
          are not enough free pages.
        """
        shared = self.known(keys)
        kept = sum(page in self._cached for page in shared)
        if total - len(shared) > len(self._free) + len(self._cached) - kept:
            return None
        for page in shared:
            self._hold(page)
        new = [self._allocate() for _ in range(total - len(shared))]
        return shared + new, len(shared)

    def share(self, key: bytes, own: int) -> int | None:
        """Hold the page of a prefix in place of the page ``own``; None if it is not known."""
        page = self._page_of.get(key)
        if page is None:
            return None
        self._hold(page)
        self.release([own])
        return page

    def publish(self, page: int, key: bytes) -> None:
        """Say that a page holds the prefix of ``key``; ignored if another page already does."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """End one reference to each page."""
        for page in reversed(pages):  # the end of a prefix is of no use without its start
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)
        while len(self._cached) > self._max_cached:
            self._free.append(self._forget())

    def _hold(self, page: int) -> None:
        self._references[page] += 1
        self._cached.pop(page, None)

    def _allocate(self) -> int:
        page = self._free.pop() if self._free else self._forget()
        self._references[page] = 1
        return page

    def _forget(self) -> int:
        """Take the least recently used page of those kept without references."""
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
