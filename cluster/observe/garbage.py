"""The garbage collector, told what stays. A collection holds the interpreter for as long as it walks.

CPython's own setting looks at every 700 further objects, which a hundred calls make, and now and then at all that
were ever made: modules, tokenizers and tables that live as long as the process. In a gateway with 256 streams that was
30 ms in one piece. What a start or a load has made is frozen instead, and the young are looked at more rarely; what
calls leave is freed without the collector, but for the rare cycle.
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 10_000
"""Of so many new ones a look takes about a millisecond."""


def settle() -> None:
    """What there is now stays: no collection walks over it again. For the end of a start or of a load."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 50, 10)
    gc.enable()
