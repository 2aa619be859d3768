"""``python -m diffuse_jax`` is the ``diffuse-jax`` command."""

from diffuse_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
