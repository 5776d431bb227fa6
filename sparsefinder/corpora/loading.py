"""A split through ``datasets``, downloaded or from its cache; what goes wrong there, in one line."""

from __future__ import annotations

from typing import Any

from sparsefinder.storage import hub


def load_split(label: str, path: str, name: str | None, split: str, local: bool = False, **options: Any) -> Any:
    """The rows of a split, downloaded or from the cache of ``datasets``.

    Args:
        label: The corpus, for messages.
        path: Name of the data set on the hub, or a reader of files.
        name: Its configuration; None for the only one.
        split: In the syntax of ``datasets``.
        local: Whether it is read from files that are here, so that nothing is downloaded.
        **options: Handed to ``datasets.load_dataset``.

    Raises:
        UserError: It cannot be loaded, in one line.
    """
    from datasets import DownloadConfig, load_dataset  # half a second to import, and only needed here
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

    disable_progress_bar()
    set_verbosity(CRITICAL)  # what its readers log as an error they also raise, and it is said once
    online = local or hub.reachable()
    if not online:
        options["download_config"] = DownloadConfig(local_files_only=True, max_retries=0)
    try:
        return load_dataset(path, name, split=split, **options)
    except Exception as error:  # ConnectionError, DatasetNotFoundError, hub errors, those of readers: no common type
        absent = f"{path} is not in its cache; connect, or use corpus=docstrings or corpus=text"
        raise hub.refusal(label, error, " cannot be loaded", "" if online else absent) from error
