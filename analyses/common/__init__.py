"""Code that several methods use: results on disk, reading through the vocabulary, statistics."""
