"""The model and the run."""

import importlib.util
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _check_siblings() -> None:
    """Refuse a stranger's package under the name of one of ours (docs/design.md, "Names").

    Raises:
        ImportError: if `kernels`, `embeddings`, `pipelines` or `launch` resolves outside this
            checkout.
    """
    for name in ("kernels", "embeddings", "pipelines", "launch"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(
                f"gr needs its sibling package {name!r} in {_ROOT}, but cannot find it. "
                "Install the checkout (pip install --no-deps -e .) or run from its root."
            )
        found = Path(spec.origin).resolve().parent if spec.origin else None
        if found != _ROOT / name:
            raise ImportError(
                f"expected package {name!r} in {_ROOT / name}, found {found}: another distribution "
                "installs a package of that name. Uninstall it, or put "
                f"{_ROOT} first on PYTHONPATH."
            )


_check_siblings()
