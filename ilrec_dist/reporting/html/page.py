"""The frame of a page that opens anywhere, alone and offline.

What came from data or configuration must be escaped by the caller of
`html_page`; the page's own policy forbids scripts and every foreign address.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ilrec_dist import __version__
from ilrec_dist.reporting.html.style import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# The part of an address after #, the title, and the HTML.
Section = tuple[str, str, str]


def html_page(title: str, header: str, sections: Sequence[Section], note: str = "") -> str:
    """The page: its title, HTML under it, links
    to the sections that have content, and these.
    """
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{slug}">{escape(name)}</a>' for slug, name, _ in shown)
    body = "".join(
        f'<section aria-labelledby="{slug}"><h2 id="{slug}">{escape(name)}</h2>{html}</section>'
        for slug, name, html in shown
    )
    footer = f"Written by ILRec-dist {escape(__version__)}.{' ' if note else ''}{escape(note)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · ILRec-dist</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>{header}"
        f'<nav aria-label="Sections">{links}</nav></header>{body}'
        f"<footer>{footer}</footer></main></body></html>\n"
    )
