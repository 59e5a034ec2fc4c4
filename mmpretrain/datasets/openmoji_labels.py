"""What is known about an emoji from its code points: readable names, group, skin tone, kind."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

_TONE_OF_CODE_POINT = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}

_TONE = r"(?:medium-light|medium-dark|light|medium|dark) skin tone"
_DETAIL = re.compile(rf"{_TONE}|(?:red|curly|white|blond) hair|bald|beard|man|woman|person|girl|boy|adult|child")
# An emoji whose name lists who is in it, and one whose name ends with what sets a variant apart.
_LISTED = re.compile(r"(kiss|couple with heart|family|keycap) (?!mark)(.+)")
_VARIANT = re.compile(rf"(.+?) ((?:{_TONE}|(?:red|curly|white|blond) hair|bald|beard)(?: .+)?)")


class Labels(NamedTuple):
    """The labels of one picture; `kind` follows from `subgroup`, see `kind_of`."""

    group: str
    subgroup: str
    skin_tone: str
    kind: str


def canonical_key(code_points: str) -> str:
    """Code points as in a file name (`2764-FE0F`) without U+FE0F, which changes no picture (`2764`)."""
    return "-".join(part for part in code_points.upper().split("-") if part != "FE0F")


def readable(short_code: str) -> str:
    """Turn `:woman_firefighter_dark_skin_tone:` of the `emoji` package into words, whatever the language."""
    return " ".join(short_code.strip(":").replace("_", " ").split())


def english_name(key: str, short_code: str) -> str:
    """The English name with CLDR's punctuation, which the `emoji` package has dropped.

    `:woman_firefighter_dark_skin_tone:` becomes `woman firefighter: dark skin tone`, `:Germany:` becomes
    `flag: Germany`.
    """
    name = readable(short_code)
    if subgroup_of(key)[1] in ("country-flag", "subdivision-flag"):
        return f"flag: {name}"
    split = _LISTED.fullmatch(name) or _VARIANT.fullmatch(name)
    if split is None:
        return name
    head, details = split[1], split[2]
    return f"{head}: {details if head == 'keycap' else ', '.join(_DETAIL.findall(details))}"


def names_of(key: str, entry: Mapping[str, object], languages: Iterable[str]) -> dict[str, str]:
    """Language -> readable name, from one entry of `emoji.EMOJI_DATA`."""
    names = {code: readable(str(entry[code])) for code in sorted(languages) if entry.get(code)}
    return names | {"en": english_name(key, str(entry["en"]))}


@cache
def _subgroups() -> dict[str, tuple[str, str]]:
    """Code points -> (group, subgroup), from the table beside this file."""
    table: dict[str, tuple[str, str]] = {}
    text = files(__package__).joinpath("openmoji_groups.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        group, subgroup, *items = line.split()
        for item in items:
            first, _, last = item.partition("..")
            if last:
                table.update((f"{i:04X}", (group, subgroup)) for i in range(int(first, 16), int(last, 16) + 1))
            else:
                table[first] = (group, subgroup)
    return table


def subgroup_of(key: str) -> tuple[str, str]:
    """(group, subgroup) in Unicode's emoji list of the sequence without skin tones, else of its start."""
    parts = [part for part in key.split("-") if part not in _TONE_OF_CODE_POINT] or key.split("-")
    table = _subgroups()
    return table.get("-".join(parts)) or table.get(parts[0]) or ("unknown", "unknown")


def skin_tone_of(key: str) -> str:
    """`none`, one of the five tones, or `mixed` where two people differ."""
    tones = {_TONE_OF_CODE_POINT[part] for part in key.split("-") if part in _TONE_OF_CODE_POINT}
    return "mixed" if len(tones) > 1 else next(iter(tones), "none")


def kind_of(group: str, subgroup: str) -> str:
    """`flag`, `person`, `animal or food` or `other`: hands, faces, plants and dishes are `other`."""
    if group == "flags":
        return "flag"
    if subgroup == "family" or (subgroup.startswith("person") and subgroup != "person-symbol"):
        return "person"
    if subgroup.startswith(("animal-", "food-")) or subgroup == "drink":
        return "animal or food"
    return "other"


def labels_of(key: str) -> Labels:
    """All labels of the picture with canonical code points `key`."""
    group, subgroup = subgroup_of(key)
    return Labels(group, subgroup, skin_tone_of(key), kind_of(group, subgroup))
