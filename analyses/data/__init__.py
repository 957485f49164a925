"""Questions about images: from folders, JSON lines, the embedded world, and the benchmarks' own files."""

from .examples import Example, examples

__all__ = ["Example", "examples"]
