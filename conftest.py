"""Modules that only some machines can import are not searched for examples on the others."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("cupy") else ["kernels/cupy_backend"]
