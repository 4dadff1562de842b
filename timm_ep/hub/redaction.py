"""Access tokens stay out of what is printed, written and published, and folders out of what is published."""

import os
import re
import shlex

__all__ = ["holds_secret", "redacted", "without_folders"]

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECRETS = (
    re.compile(r"(?<![A-Za-z0-9])(?:hf_oauth_[\w.-]{8,}|(?:hf|api_org)_[A-Za-z0-9]{16,})"),  # the Hub's tokens
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # user and password in a URL
)


def redacted(text: str) -> str:
    """`text` with `***` for the Hub's tokens, whatever the environment holds as one, and the passwords of URLs."""
    for secret in filter(None, map(os.environ.get, _VARIABLES)):
        text = text.replace(secret, "***")
    for pattern in _SECRETS:
        text = pattern.sub("***", text)
    return text


def holds_secret(text: str) -> bool:
    """Whether `redacted` would change it."""
    return redacted(text) != text


# From a slash that begins a path, not one inside of a path or an address, to its last one; lists and JSON end it.
_FOLDERS = re.compile(r"(?<![\w/.~-])~?/(?:[^'\",\[\]{}/]+/)+(?=[^'\",\[\]{}/])")


def without_folders(text: str) -> str:
    """A command, or one word of it, with only the last name of each absolute path: whose folders are of one machine."""
    try:
        words = shlex.split(text)
    except ValueError:  # no command line
        words = [text]
    return shlex.join(_FOLDERS.sub("", word) for word in words) if len(words) > 1 else _FOLDERS.sub("", text)
