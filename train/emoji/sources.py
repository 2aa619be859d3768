"""The sources of the images: the package of each style, and the attribution that its licence requires."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """One emoji set as an npm package of icons."""

    package: str
    version: str
    title: str
    author: str
    licence: str
    url: str


SOURCES = {  # share-alike sets (OpenMoji, EmojiOne 1) are left out on purpose
    "noto": Source(
        "@iconify-json/noto", "1.2.9", "Noto Emoji", "Google", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"
    ),
    "blob": Source(
        "@iconify-json/noto-v1",
        "1.2.5",
        "Noto Emoji (version 1)",
        "Google",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    "fluent": Source(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "Fluent Emoji",
        "Microsoft",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "fluent flat": Source(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "Fluent Emoji Flat",
        "Microsoft",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "twemoji": Source(
        "@iconify-json/twemoji",
        "1.2.5",
        "Twemoji",
        "Twitter and contributors",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
    ),
    "emojione": Source(
        "@iconify-json/emojione",
        "1.2.3",
        "EmojiOne 2 (EmojiTwo)",
        "Emoji One",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    "fxemoji": Source(
        "@iconify-json/fxemoji",
        "1.2.2",
        "Firefox OS Emoji",
        "Mozilla",
        "Apache-2.0",
        "https://github.com/mozilla/fxemoji",
    ),
    "streamline": Source(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "Streamline Emojis",
        "Streamline (Webalys)",
        "CC-BY-4.0",
        "https://github.com/webalys-hq/streamline-vectors",
    ),
}

CAPTIONS = Source(
    "emojibase-data", "17.0.0", "Emojibase", "Miles Johnson", "MIT", "https://github.com/milesj/emojibase"
)
