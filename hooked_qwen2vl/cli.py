"""`python -m hooked_qwen2vl.cli` runs the command `hooked-qwen2vl`."""

from analyses.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
