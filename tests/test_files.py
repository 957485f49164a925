"""Files are written whole or not at all."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hooked_qwen2vl.files import remove_unfinished, whole_file

ROOT = Path(__file__).parents[1]


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as file:
        file.write_text("one")
        assert not path.exists() and file.suffix == ".txt"
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one" and [one.name for one in path.parent.iterdir()] == ["a.txt"]
    with whole_file(str(path)) as file:
        file.write_text("three")
        assert path.read_text() == "one"
    with pytest.raises(FileExistsError), whole_file(path, exclusive=True) as file:
        file.write_text("four")
    assert path.read_text() == "three" and [one.name for one in path.parent.iterdir()] == ["a.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    code = f"""
import os
from hooked_qwen2vl.files import whole_file
with whole_file({str(tmp_path / "a")!r}) as file:
    file.write_text("half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == -9
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    own = tmp_path / f".writing-{socket.gethostname()}-{os.getpid()}-x"
    own.write_text("this process is still at it")
    remove_unfinished(tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {"a", own.name}


def test_nobody_else_renames_what_it_wrote():
    """One way to do it: no other module replaces or renames files."""
    renames = re.compile(r"os\.(replace|rename|link)\(|\.rename\(Path|\.replace\((self\.)?(path|file|state)\)")
    found = [
        path.name for folder in ("analyses", "hooked_qwen2vl") for path in (ROOT / folder).rglob("*.py") if renames.search(path.read_text())
    ]
    assert found == ["files.py"]
