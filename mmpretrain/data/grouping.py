"""Which samples the members of a shard make, and which of them damage has cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mmpretrain.data.events import Cause, DataEvent
from mmpretrain.data.tar import Damage, Member

_CHANGED = "if the shard was changed on purpose, delete its .idx.npz"


class Place(NamedTuple):
    """Where the bytes of one field lie, and their xxh3_64."""

    offset: int
    size: int
    checksum: int


Samples = dict[str, dict[str, Place]]  # key -> field -> place
Content = dict[str, dict[str, tuple[int, int]]]  # key -> field -> (size, checksum)


class Grouped(NamedTuple):
    """The samples that can be delivered, what was lost, and the content of lost samples that was once known.

    `nameless`: how many of the events have no key, though a sample may be lost there.
    """

    samples: Samples
    events: list[DataEvent]
    lost: Content
    nameless: int


class _Hole(NamedTuple):
    """A damaged place between a member of the sample `before` and one of the sample `after`."""

    damage: Damage
    before: str | None
    after: str | None


def key_of(name: str) -> tuple[str, str] | None:
    """Return key and field of a member, None if it belongs to no sample.

    The key is the path up to the first dot of its base name, the field is the rest in lower case. Members without
    a field, and those in or called `__x__`, make no sample: the rules of the webdataset format. Nor do hidden
    files (`a/.DS_Store`), of which webdataset makes samples called `a/`.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    top = name.split("/", 1)[0]
    if not stem or not dot or (len(top) >= 4 and top.startswith("__") and top.endswith("__")):
        return None
    return folder + slash + stem, extension.lower()


def group(found: Iterable[tuple[Member, int] | Damage], shard: str, known: Content | None = None) -> Grouped:
    """Make samples of members (each with its checksum); members of one key are joined wherever they lie.

    Of a field that a key has twice the first counts, the other is a "duplicate" event. A damaged place costs the
    sample that lies on both sides of it, or whose member it names; where that is not told, those of its two
    neighbours that lack a field which most samples have there. Other samples stay, whatever their fields. `known` is
    what an index of the same shard knew before; members that changed or went since cost their samples, too, unless
    the whole shard was rewritten.
    """
    samples, holes, events = _join(found, shard)
    losses = None if known is None else _compare(samples, known, bool(holes), shard)
    whole = set[str]()
    if known is not None and losses is not None:
        whole = {key for key, fields in samples.items() if key in known and _content(fields) == known[key]}
    sets = Counter(frozenset(fields) for fields in samples.values())
    dropped, nameless = set[str](), 0
    for hole in holes:
        cost = [key for key in _cost(hole, samples, sets) if key not in whole]
        dropped.update(cost)
        guess = (_named(hole.damage.name) or (None,))[0]
        keys: list[str | None] = [*cost] or [None if guess in whole else guess]
        events += [DataEvent(shard, hole.damage.offset, key, hole.damage.cause, hole.damage.detail) for key in keys]
        # Where one shard was put behind another, the samples on both sides are whole.
        between = hole.before is not None and (hole.after is not None or hole.damage.offset == hole.damage.end)
        nameless += keys == [None] and not (hole.damage.mark and between)
    if known is not None and losses is not None:
        events += [event for event in losses if event.key not in dropped]
        dropped.update(event.key for event in losses if event.key is not None)
        dropped |= _renamed(samples, known, dropped)
    events.sort(key=lambda event: len(samples) if event.offset is None else event.offset)
    kept = {key: fields for key, fields in samples.items() if key not in dropped}
    lost = {} if known is None or losses is None else {key: known[key] for key in known if key in dropped}
    return Grouped(kept, events, lost, nameless)


def _join(found: Iterable[tuple[Member, int] | Damage], shard: str) -> tuple[Samples, list[_Hole], list[DataEvent]]:
    samples: Samples = {}
    holes: list[_Hole] = []
    events: list[DataEvent] = []
    before, waiting = None, 0  # holes from `waiting` on have not met the member behind them
    for item in found:
        if isinstance(item, Damage):
            holes.append(_Hole(item, before, None))
            continue
        member, checksum = item
        if (named := key_of(member.name)) is None:
            continue
        key, field = named
        for i in range(waiting, len(holes)):
            holes[i] = holes[i]._replace(after=key)
        before, waiting = key, len(holes)
        if field in ("__key__", "__url__"):
            events.append(DataEvent(shard, member.offset, key, "refused", f"a field called {field}; rename it"))
        elif field in samples.setdefault(key, {}):
            events.append(DataEvent(shard, member.offset, key, "duplicate", f"a second {field}; the first is read"))
        else:
            samples[key][field] = Place(member.offset, member.size, checksum)
    return {key: fields for key, fields in samples.items() if fields}, holes, events


def _named(name: str | None) -> tuple[str, str] | None:
    return None if name is None else key_of(name)


def _cost(hole: _Hole, samples: Samples, sets: Counter[frozenset[str]]) -> list[str]:
    """Return the keys of the samples that a damaged place has cost, as far as that can be told.

    `sets`: how many samples have each set of fields.
    """
    cost: dict[str, None] = {}
    damage, before, after = hole
    named = _named(damage.name)
    if (suspect := _named(damage.suspect)) is not None:
        return [suspect[0]]
    if named is not None and (damage.certain or named[0] in samples) and named[1] not in samples.get(named[0], {}):
        cost[named[0]] = None
        if damage.alone:
            return list(cost)
    if before is not None and before == after:
        cost[before] = None
    elif not cost or not damage.certain:
        cost |= dict.fromkeys(_incomplete(before, after, samples, sets))
    return list(cost)


def _incomplete(before: str | None, after: str | None, samples: Samples, sets: Counter[frozenset[str]]) -> list[str]:
    """Return which of two neighbours lacks a field that lay between them."""
    usual = sets.most_common(1)[0][0] if sets else frozenset()
    order = next((list(fields) for fields in samples.values() if fields.keys() == usual), [])
    found = []
    for key in (before, after):
        if key not in samples or not (lacks := usual - samples[key].keys()):
            continue
        seen = [order.index(field) for field in samples[key] if field in usual]
        ranks = [order.index(field) for field in lacks]
        # In the usual order it would come behind the other fields of the first, before those of the second.
        if not seen or (max(ranks) > seen[-1] if key == before else min(ranks) < seen[0]):
            found.append(key)
    # A set of fields that other samples have, too, says less than one that is the only of its kind.
    return [key for key in found if sets[frozenset(samples[key])] == 1] or found


def _content(fields: Mapping[str, Place]) -> dict[str, tuple[int, int]]:
    return {field: (place.size, place.checksum) for field, place in fields.items()}


def _compare(samples: Samples, known: Content, damaged: bool, shard: str) -> list[DataEvent] | None:
    """Return what went or changed since `known`; None if less than half of the shard is as it was: rewritten."""
    total = sum(map(len, samples.values()))
    changed: dict[str, list[str]] = {}  # key -> fields
    same, gone, had = 0, Counter[str](), Counter[str]()
    for key, fields in samples.items():
        then = known.get(key, {})
        had.update(then.keys())
        gone.update(then.keys() - fields.keys())
        for field, (size, checksum) in _content(fields).items():
            same += then.get(field) == (size, checksum)
            if field in then and then[field] != (size, checksum):
                changed.setdefault(key, []).append(field)
    if 2 * same < total:
        return None
    # A field that most samples of a sound shard have with other bytes was written anew, such as resized pictures.
    counts = Counter(field for names in changed.values() for field in names)
    anew = set[str]() if damaged else {field for field, count in counts.items() if count > 1 and 2 * count > had[field]}
    events: dict[str, DataEvent] = {}
    for key, names in changed.items():
        for field in (name for name in names if name not in anew):
            detail = f"{field} has other bytes than the index knows; {_CHANGED}"
            events[key] = DataEvent(shard, samples[key][field].offset, key, "checksum", detail)
    # A field that most samples of a sound shard have lost was taken out on purpose.
    lost = {field for field, count in gone.items() if damaged or 2 * count <= had[field]}
    for key, fields in samples.items():
        if missing := sorted((known.get(key, {}).keys() - fields.keys()) & lost):
            detail = f"{', '.join(missing)} was in this sample; {_CHANGED}"
            events.setdefault(key, _missing(shard, key, detail))
    # A sound shard that only lost whole samples was made shorter on purpose.
    if damaged or events:
        events |= {
            key: _missing(shard, key, f"it was in this shard; {_CHANGED}") for key in known if key not in samples
        }
    return list(events.values())


def _missing(shard: str, key: str, detail: str) -> DataEvent:
    cause: Cause = "missing"
    return DataEvent(shard, None, key, cause, detail)


def _renamed(samples: Samples, known: Content, dropped: set[str]) -> set[str]:
    """Return new samples that hold a lost member's bytes: a damaged name, not a new sample."""
    lost = {content for key in known if key in dropped for content in known[key].values() if content[0]}
    new = (key for key in samples if key not in known)
    return {key for key in new if not lost.isdisjoint(_content(samples[key]).values())}
