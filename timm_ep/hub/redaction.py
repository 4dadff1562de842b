"""Access tokens stay out of what is printed, written and published."""

import os
import re

__all__ = ["holds_secret", "redacted"]

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
