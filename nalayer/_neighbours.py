"""Make sure that ``kernels`` is the folder beside this package.

Another published package is imported as ``kernels`` too. Depending on how Python was started,
or on what was installed last, it can stand in front of ours.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def require_own_kernels() -> None:
    """Raise ImportError unless ``import kernels`` finds the package beside ``nalayer``.

    Raises
    ------
    ImportError
        Naming the file that was found and what to do.
    """
    expected = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
    try:
        spec = find_spec("kernels")
    except ValueError:  # a module without a spec was put in its place by hand
        spec = None
    found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if found != expected:
        raise ImportError(
            f"nalayer needs its own package 'kernels' at {expected}, but 'import kernels' finds "
            f"{found or 'no such file'}. Another package of that name is in front of it: start "
            "Python from the project's root with 'python -m ...', install the project with "
            "'pip install -e .' in a virtual environment of its own, and remove the other "
            "package there with 'pip uninstall kernels'."
        )
