"""Block sizes of the TPU attention kernels by chip, and how many keys and queries VMEM holds."""

from pallas_kernels import dispatch

LANES = 128
_VMEM_MIB = {"TPU v5 lite": 128, "TPU v5e": 128, "TPU v6 lite": 128, "TPU v6e": 128}
"""Per chip; 64 for v5p, TPU7x and chips that are not listed."""

_TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")
"""Chips whose two cores are one device and share the parallel axes of a grid."""

_WIDE = ("TPU v6 lite", "TPU v6e", "TPU7x")
"""Chips with matrix units of 256 by 256, half of which is idle for H = 128: there the softmax is
the limit, and it takes fewer cycles per row if a step has 1024 rows."""


def sizes(T: int, S: int, H: int, G: int, itemsize: int, documents: bool):
    """The last eight fields of :class:`KernelConfig`.

    Blocks are 512 by 512: with smaller ones the matrix unit waits for the row statistics of the
    softmax, with larger ones the masked half of a diagonal block grows. On chips with wide matrix
    units, up to four query heads of a key head make the 1024 rows of a step; if G is 1, blocks are
    1024 by 1024 for at least 4096 keys without documents (with documents, more of a large block
    would be masked). Blocks are smaller if padding would add more than an eighth, or if they do not
    fit in VMEM.

    Args:
      T: number of queries.
      S: number of keys.
      H: head dimension.
      G: query heads per key head.
      itemsize: bytes per number of q, k and v.
      documents: whether there are segment ids.

    Raises:
      NotImplementedError: the float32 gradients of S keys do not fit in VMEM.
    """
    kind = dispatch.device_kind()
    capacity = _VMEM_MIB.get(kind, 64) << 20
    choices = [(1, 512, 512)]  # heads, largest block of queries and of keys
    if kind in _WIDE and S >= 4096 and not documents:
        choices.insert(0, (1, 1024, 1024))
    if kind in _WIDE and (heads := max(n for n in (1, 2, 3, 4) if G % n == 0)) > 1:
        choices.insert(0, (heads, 512 if heads == 2 else 256, 512))
    for heads, max_q, max_k in choices:
        block_q, block_k = _block(T, max_q), _block(S, max_k)
        if chunks := _chunks(T, S, H, itemsize, heads, block_q, block_k, capacity * 7 // 8):
            interpret = dispatch.platform() == "cpu"
            return heads, block_q, block_k, *chunks, capacity * 15 // 16, interpret
    raise NotImplementedError(
        f"{S} keys: their float32 gradients do not fit {capacity >> 20} MiB of VMEM; "
        "shard the sequence over more devices"
    )


def _chunks(
    T: int, S: int, H: int, itemsize: int, heads: int, block_q: int, block_k: int, budget: int
) -> tuple[int, int, int] | None:
    """Keys in VMEM at a time in the forward kernel, queries and keys in the backward kernel.

    The sums count arrays that the pipeline loads or stores twice (double buffering), others once.
    None: not even one block fits.
    """
    T, S = T + -T % block_q, S + -S % block_k
    lanes = max(H, LANES)
    scores = 4 * heads * block_q * block_k

    def forward(chunks):
        keys = S // chunks
        held = lanes * (4 * itemsize * keys + (itemsize + 8) * keys * (chunks == 1))
        return held + heads * block_q * lanes * (5 * itemsize + 8 + 12 + 4) + 4 * scores

    def backward(chunks_q, chunks_k):
        queries, keys = T // chunks_q, S // chunks_k
        rows = 160 * (heads * queries + keys)  # row statistics and ids, padded to 8 sublanes
        of_q = queries * lanes * (heads * (9 * itemsize + 4) + 8)
        of_k = keys * lanes * (9 * itemsize + 8) + S * lanes * 8
        return of_q + of_k + rows + 5 * scores

    fit_forward = [n for n in _divisors(S // block_k) if forward(n) <= budget]
    pairs = [(n, m) for n in _divisors(T // block_q) for m in _divisors(S // block_k)]
    # Fewest loads; among those all keys at once, which are then rotated in the kernel.
    pairs.sort(key=lambda pair: (pair[0] * pair[1], pair[1]))
    fit_backward = [pair for pair in pairs if backward(*pair) <= budget]
    if not fit_forward or not fit_backward:
        return None
    chunks_q, chunks_k = fit_backward[0]
    return S // fit_forward[0], T // chunks_q, S // chunks_k


def _block(n: int, largest: int) -> int:
    for block in (1024, 512, 256):
        if block <= largest and -n % block <= n // 8:
            return block
    return LANES


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def idle_core(programs: int) -> bool:
    """Whether a core of the chip has no work if the parallel axes have this number of programs."""
    return programs < 2 and dispatch.device_kind() in _TWO_CORES
