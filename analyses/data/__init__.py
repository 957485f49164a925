"""Questions about images: from folders, JSON lines, the embedded world, and the files of benchmarks."""

from .examples import Example, examples

__all__ = ["Example", "examples"]
