"""What the rows of vmm.audit.events and vmm.audit.update_events share."""

from __future__ import annotations

from collections.abc import Mapping

from vmm.audit.registry import Event, Field, Serves, Unit

CORE: tuple[Unit, ...] = ("holdfast-core",)
HOST: tuple[Unit, ...] = ("holdfast-host",)

ACTION = Serves("FAU_GEN.1", "Administrative action relevant to a claimed SFR")
MANAGED = (Serves("FMT_MOF_EXT.1", "Attempt to invoke a management function"), ACTION)
ARGS = {"args": Field("map", "the call's arguments, as the API takes them")}


def read(type: str, title: str, meaning: str, object: str = "") -> Event:
    """Something that core shows: on record once it was read or refused."""
    return Event(
        type=type,
        title=title,
        meaning=meaning,
        producers=CORE,
        phases=("outcome",),
        object=object,
        serves=MANAGED,
    )


def change(
    type: str,
    title: str,
    meaning: str,
    object: str = "",
    *,
    producers: tuple[Unit, ...] = CORE,
    fields: Mapping[str, Field] | None = None,
    serves: tuple[Serves, ...] = MANAGED,
) -> Event:
    """Something that core is asked to do: on record before and after."""
    return Event(
        type=type,
        title=title,
        meaning=meaning,
        producers=producers,
        phases=("intent", "outcome"),
        object=object,
        fields=ARGS | dict(fields or {}),
        serves=serves,
    )
