"""What the updater asks of the fetcher (vmm/update/fetch.py), over vmm.wire's frames.

One connection a job, one download after another: the request ``fetch``, then the bytes as data frames, END, and the
result.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

METHOD = "fetch"


class FetchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Get what lies at ``url`` from byte ``offset`` on, at most ``limit`` bytes.

    ``proxy`` is an http or https URL or empty; ``ca`` is PEM that replaces the system's authorities, or empty;
    ``timeout`` is in seconds, until the answer begins.
    """

    url: Annotated[str, msgspec.Meta(max_length=2048)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    limit: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    proxy: Annotated[str, msgspec.Meta(max_length=2048)] = ""
    ca: Annotated[str, msgspec.Meta(max_length=256 << 10)] = ""
    timeout: Annotated[float, msgspec.Meta(gt=0, le=600)] = 60.0


class FetchResult(msgspec.Struct, frozen=True):
    """The HTTP ``status`` (data came with 200 and 206 only), and the file's ``total`` bytes, -1 if not told."""

    status: int
    total: int = -1
