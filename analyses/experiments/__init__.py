"""Methods over a data set, with controls and intervals: in memory, or as a run in a folder that can be resumed."""
