import subprocess
import sys
from platform import libc_ver

import pytest

# Threads that allocate side by side; then glibc tells of every heap it has.
PROGRAM = """
import ctypes, sys, threading
from app.memory import give_back_what_is_free
if sys.argv[1] == "yes":
    give_back_what_is_free()
allocate = ctypes.CDLL(None).malloc
everybody = threading.Barrier(4)
def work():
    everybody.wait()
    allocate(1000)
    everybody.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="asks glibc")
@pytest.mark.parametrize(("asked", "heaps"), [("yes", 1), ("no", 5)])
def test_threads_share_one_heap(asked: str, heaps: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, asked], capture_output=True, text=True, check=True)
    assert done.stderr.count("Arena ") == heaps, done.stderr


# As a request does: some buffers of a tile's size, and all of them free again. Prints the page faults of each.
REQUESTS = """
import resource, sys
from app.memory import give_back_what_is_free
if sys.argv[1] == "yes":
    give_back_what_is_free()
def count_faults(requests):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(requests):
        buffers = [bytearray(90_000) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
count_faults(10)
print(count_faults(100) / 100)
"""


@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="asks glibc")
def test_what_a_request_frees_is_there_for_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", REQUESTS, "yes"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1


# Pieces that are free again, below one that isn't. Prints how many bytes the system got back.
PINNED = """
from psutil import Process
from app.memory import give_back_from_within, give_back_what_is_free
give_back_what_is_free()
pieces = [bytearray(500_000) for _ in range(200)]
last = bytearray(500_000)
del pieces
before = Process().memory_info().rss
give_back_from_within()
print(before - Process().memory_info().rss)
"""


@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="asks glibc")
def test_what_is_free_below_something_else_is_given_back_where_asked() -> None:
    done = subprocess.run([sys.executable, "-c", PINNED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80_000_000
