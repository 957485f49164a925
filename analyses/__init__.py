"""Methods on a hooked Qwen2-VL (or Qwen2.5-VL, Qwen3-VL), one a file, and what is built on them.

    cli/            the command line
    experiments/    a method over a data set, with its controls and intervals: in memory, or a run in a folder
    *.py    runs/   the methods: (model, Inputs) -> a result     runs over data sets that can be killed, shared and resumed
    data/           examples and benchmark files
    common/         results on disk, reading the vocabulary, sums, statistics
    views/          results -> pictures and pages; knows no model

Imports point down this list, and from all of it but the views to `hooked_qwen2vl`; methods and runs do not know each
other. `lint-imports` holds it (setup.cfg), and a new module must be given its place there. `hooked_qwen2vl.moved` has earlier names.
"""

import hooked_qwen2vl  # noqa: F401, which finds modules by the paths they had before
