"""Sentences around a class name, `{}` marking its place; a config may give any other list."""

from __future__ import annotations

PLAIN = ("{}",)
"""The class name alone."""

PHOTO = ("a photo of a {}.",)
"""One sentence for photographs."""

GENERAL = (
    "{}",
    "a photo of a {}.",
    "a picture of the {}.",
    "a close-up of a {}.",
    "a drawing of a {}.",
    "one {} among other things.",
    "an image that shows a {}.",
)
"""Seven sentences for pictures of any kind."""

ICON = ("{}", "an icon of {}", "an emoji of {}", "a flat drawing of {}", "a symbol that means {}")
"""Sentences for emoji, icons and pictograms."""

DIGIT = ("{}", "the digit {}", "the number {}", "a handwritten {}")
"""Sentences for written digits and letters."""

SATELLITE = ("{}", "a satellite image of {}.", "an aerial photo of {}.", "{} seen from above.")
"""Sentences for land seen from the air."""
