"""What becomes of memory that is free again."""

import ctypes

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8

# How much may lie free at the top of the heap, and from which size on a piece gets memory of its own: more than a tile
# needs, so that no request has to take memory from the system page by page and give it back again.
TRIM_BYTES = 4 << 20
MMAP_BYTES = 1 << 20


def give_back_what_is_free() -> None:
    """Before any thread starts: one heap for all, and what is free at its end goes back to the system.

    Left alone, glibc keeps a heap for each thread that ever allocated beside another, and large pictures leave each of
    them as large as it ever was. Nothing is asked of other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl has none, macOS neither; Windows needs a library's name
        return
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
    mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def give_back_from_within() -> None:
    """Also what lies free between pieces in use, as crowds of large pictures leave it; takes some milliseconds."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
