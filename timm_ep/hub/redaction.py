"""Access tokens stay out of what is printed, written and published, and folders out of what is published."""

import os
import re
import shlex

__all__ = ["holds_secret", "redacted", "without_folder", "without_folders"]

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8  # characters of what may be a token; less is a placeholder, and a part of innocent words
_SECRETS = (
    re.compile(r"(?<![A-Za-z0-9])(?:hf_oauth_[\w.-]{8,}|(?:hf|api_org)_[A-Za-z0-9]{26,})"),  # the Hub's tokens: 34
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # user and password in a URL
)


def redacted(text: str) -> str:
    """`text` with `***` for the Hub's tokens, whatever the environment holds as one, and the passwords of URLs."""
    for secret in (os.environ.get(name, "").strip() for name in _VARIABLES):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    for pattern in _SECRETS:
        text = pattern.sub("***", text)
    return text


def holds_secret(text: str) -> bool:
    """Whether `redacted` would change it."""
    return redacted(text) != text


# From where an absolute path begins (a word or an item of it, what follows `local-dir:` or `hfds/`) to its last name.
_FOLDERS = re.compile(r"""(?:^|(?<=[=",\[:'({])|(?<=[,:] )|(?<=hfds/))(?:file://)?~?/(?!/)(?:[^",/]+/+)+(?=[^",/])""")


def without_folder(text: str) -> str:
    """A value with the last name alone of each absolute path in it: the folders are of one machine."""
    return _FOLDERS.sub("", text)


def without_folders(command: str) -> str:
    """The same of every word of a command; where it has none, or is no command at all, the text as it is."""
    try:
        words = shlex.split(command)
    except ValueError:  # whoever wrote it, not the trainer
        return without_folder(command)
    changed = [without_folder(word) for word in words]
    return command if changed == words else shlex.join(changed)
