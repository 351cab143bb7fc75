"""An OpenAI-compatible server on the handlers of `transformers serve`; see docs/serve.md.

The modules below need what `require()` asks for; nothing here imports them before.
"""

from importlib.util import find_spec

PACKAGES = ("transformers", "fastapi", "uvicorn", "openai", "prometheus_client")
INSTALL = "pip install transformers accelerate pillow fastapi uvicorn openai prometheus_client"
OLDEST = (5, 15)  # the first whose chat handler parses answers by build_response_parser


def require() -> None:
    """Raises ImportError, saying in one line what is missing or too old."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(f"serve needs {', '.join(missing)}: {INSTALL}")
    from restore_ext.hf.compat import VERSION

    if VERSION < OLDEST:
        wanted, got = (".".join(map(str, version)) for version in (OLDEST, VERSION))
        raise ImportError(
            f"serve needs transformers >= {wanted}, got {got}: "
            f'pip install "transformers>={wanted},<6"'
        )
