"""Makes text from others safe for messages, terminals and files."""

from __future__ import annotations

import re
from typing import Any

_MOST_SHOWN = 80

_TOKENS = re.compile(
    r"\b(?:hf_|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abprs]-|sk-|AKIA|ASIA)[\w-]{12,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"  # a JSON web token
)
_IN_ADDRESS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^/\s'\"]+@")
_WORDS = "KEY|TOKEN|SECRET|PASSW|PWD|JWT|CREDENTIAL|AUTH|COOKIE"
_NAMED = re.compile(
    rf"(\b[A-Z0-9_]*(?:{_WORDS})[A-Z0-9_]*=)[^\s,;]+"  # NAME=value, as in a list of environment variables
    rf"|([?&][\w-]*(?i:{_WORDS})[\w-]*=)[^\s,;&]+"  # a parameter of an address
)
HIDDEN = "***"


def scrubbed(text: str) -> str:
    """`text` without what looks like a secret: user and password of addresses, NAME=value where the name says so,
    strings in the form of well-known services' tokens."""
    text = _IN_ADDRESS.sub(rf"\1{HIDDEN}@", text)
    text = _NAMED.sub(lambda match: (match[1] or match[2]) + HIDDEN, text)
    return _TOKENS.sub(HIDDEN, text)


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey or hide, except tabs and ends of lines."""
    return "".join(
        character
        if character in "\n\t" or character.isprintable()
        else character.encode("unicode_escape").decode()
        for character in text
    )


def one_line(text: str) -> str:
    """The same, in one line."""
    return printable(" ".join(text.splitlines()))


def say(text: str) -> None:
    """Prints to stdout what may hold words of files or names."""
    print(printable(text), flush=True)


def shown(value: Any) -> str:
    """A value as a message shows it: as Python writes it, the middle left out if it is long."""
    return shortened(repr(value), _MOST_SHOWN)


def shortened(text: str, most: int = 200) -> str:
    """`text`, the middle left out if it has more than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"
