"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build/html` from the root of the repository."""

import inspect
import re
import sys
from typing import Any

from numpy.typing import ArrayLike
from sphinx.util.typing import stringify_annotation

project = "pyro_pixels"
author = "the pyro_pixels authors"
html_title = "pyro_pixels"
html_theme = "furo"
language = "en_GB"
exclude_patterns = ["_build"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
mathjax_path = "mathjax/tex-chtml.js"  # within _static, where sphinx-mathjax-offline puts it: no network is needed
nb_execution_mode = "force"  # notebooks run at every build, with small sizes
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100


ARRAY_LIKE = stringify_annotation(ArrayLike, "smart")
attributes: dict[str, list[str]] = {}


def before_napoleon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Gives a NamedTuple's field the comment behind it in the source, and escapes shapes such as (*S, K)."""
    if lines and lines[0].startswith("Alias for field number"):
        module, kind, field = name.rsplit(".", 2)
        source = inspect.getsource(getattr(sys.modules[module], kind))
        found = re.search(rf'^    {field}: [^#\n]*(?:# (.*)|\n    """(.*)""")$', source, re.M)
        lines[:] = [found.group(1) or found.group(2)] if found else []
    lines[:] = [re.sub(r"\(\*(?=\w)", r"(\*", line) for line in lines]
    attributes[name] = list(lines)


def after_napoleon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Puts back attributes' docstrings, in which napoleon takes what stands before a colon for a type."""
    if what in ("attribute", "data", "property"):
        lines[:] = attributes[name]


def shorten_signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """numpy's ArrayLike by its name; sphinx spells out its members."""
    return (signature or "").replace(ARRAY_LIKE, "~numpy.typing.ArrayLike") or None, returns


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
