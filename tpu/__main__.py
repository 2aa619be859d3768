"""``python -m tpu``."""

from tpu.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
