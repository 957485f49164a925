"""What the methods share: results on disk, reading the vocabulary, statistics."""
