"""A method over a data set, with its controls and intervals: in memory, or in a folder that can be gone on with."""
