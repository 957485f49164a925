"""Analyses of a hooked Qwen2-VL (or Qwen2.5-VL, Qwen3-VL): one method per file, and what is built on the methods.

    cli/            the command line
    experiments/    a method over a data set, with its controls and intervals: in memory, or as a run in a folder
    *.py    runs/   the methods: (model, Inputs) -> a result     runs over data sets that can be killed, shared and resumed
    data/           examples and benchmark files
    common/         results on disk, reading through the vocabulary, sums, statistics
    views/          results -> figures and pages; never imports a model

A module imports only from the lines below its own, and all but the views may import `hooked_qwen2vl`. Methods and runs do not
import each other. `lint-imports` checks this (setup.cfg); a new module must be listed there. Earlier names: `hooked_qwen2vl.moved`.
"""

import hooked_qwen2vl  # noqa: F401 (makes modules importable by their earlier paths)
