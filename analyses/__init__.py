"""Methods on a hooked Qwen2-VL, one a file, and what is built on them.

    cli/           the command line
    experiments/   a method over a data set, with its controls and intervals
    *.py           the methods: (model, Inputs) -> a result
    runs/          runs over data sets that can be killed, shared and resumed; the activation store
    data/          examples and benchmark files
    common/        results on disk, reading the vocabulary, statistics
    views/         results -> pictures and pages; knows no model

Imports point down this list, and from all of it to `hooked_qwen2vl`.
"""

import sys

from .moved import MovedModules

sys.meta_path.append(MovedModules())
