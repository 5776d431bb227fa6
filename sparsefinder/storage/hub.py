"""Is there anybody to download from? Asked once and quickly, so that a run without network fails in seconds."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request

from huggingface_hub import constants

from sparsefinder.errors import UserError

_PATIENCE = 5.0  # seconds; the hub's own client tries five times and gives up after 23 seconds


def reachable() -> bool:
    """Whether the Hugging Face hub answers at all; False in its offline mode (``HF_HUB_OFFLINE=1``).

    Only a failure to connect counts. Any answer, a refusal or a certificate that this check does not know included, is left
    to the hub's own client, which words such errors better.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def in_words(error: Exception) -> str:
    """What a loader of others raised, in one line: its type, and as much of its message as a line can take."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def refusal(label: str, error: Exception, failed: str, offline: str = "") -> UserError:
    """What to say where something could not be loaded.

    Args:
        label: What it is called in messages.
        error: What its loader raised.
        failed: What did not work, such as `` cannot be read on``.
        offline: What was not in the cache and what to do instead; empty where the hub was asked, or not needed.
    """
    if offline:
        return UserError(f"{label}: the Hugging Face hub cannot be reached, and {offline}")
    return UserError(f"{label}{failed} ({in_words(error)})")
