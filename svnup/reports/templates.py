"""Pages by jinja2 templates, which lie in svnup/assets; jinja2 is imported only to make one."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template


def asset(name: str) -> str:
    """The text of a file of svnup/assets."""
    return (files("svnup.assets") / name).read_text(encoding="utf-8")


def render(name: str, **values: Any) -> str:
    """A page by the template of this name; whatever is put into it is escaped, unless it is markup."""
    return _template(name).render(values)


@cache
def _template(name: str) -> Template:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breaks"] = _breaks
    return environment.get_template(name)


def _breaks(text: str) -> str:
    """A text that may break at its joints, such as a long name at its underscores."""
    from markupsafe import Markup

    from svnup.reports.svg import pieces

    return Markup("<wbr>").join(pieces(text)).replace(Markup(" <wbr>"), Markup(" "))
