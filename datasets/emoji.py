"""Write the emoji of a font, in colour on a white background, as PNG files CLASS_CODEPOINTS.png, for training.

The classes are the nine groups of Unicode's emoji-test.txt: activities, animals, flags, food, objects, people, smileys,
symbols and travel. For example, the red apple is food_1f34e.png. All skin-tone variants of an emoji belong to the same
split: either all are held out, or none.
"""

import math
import re
import sys
from pathlib import Path

from _common import split_parser, write_split
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from guided_diffusion.errors import InputError, check_at_least, run

FONT = "NotoColorEmoji.ttf"  # Pillow searches the system's font folders for this file name
FONT_SIZE = 109  # the only bitmap size in NotoColorEmoji.ttf
TABLE = "/usr/share/unicode/emoji/emoji-test.txt"
EMOJI = re.compile(r"([0-9A-F ]+?) *; fully-qualified")
SKIN_TONES = set("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
COLOUR_SELECTOR = "\ufe0f"  # selects the coloured form, which is the only form in NotoColorEmoji.ttf


def main():
    args = create_argparser().parse_args()
    check_at_least(1, size=args.size)
    font, emoji = open_font(args.font), read_table(args.table)
    write_split(args, draw_all(font, emoji, args.size), r"[a-z]+_[0-9a-f-]+\.png")


def open_font(path):
    try:
        font = ImageFont.truetype(path, FONT_SIZE)
    except OSError as e:
        raise InputError(
            f"--font {path}: cannot be used ({e}): install the Debian package fonts-noto-color-emoji, or give the path "
            f"of its {FONT}"
        ) from None
    if font.layout_engine == ImageFont.Layout.BASIC:
        print("warning: Pillow lacks raqm, so flags, skin tones and other sequences are left out", file=sys.stderr)
    return font


def read_table(path):
    """Read emoji-test.txt. Return (class, emoji, index of the group) of each emoji; skin tones share a group."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise InputError(
            f"--table {path}: {e.strerror}: install the Debian package unicode-data, or give the path of emoji-test.txt"
        ) from None
    emoji, group = [], -1
    for line in lines:
        if line.startswith("# group: "):
            class_name = line.split()[2].lower()  # "Food & Drink" becomes food
        elif match := EMOJI.match(line):
            text = "".join(chr(int(code, 16)) for code in match[1].split()).replace(COLOUR_SELECTOR, "")
            group += SKIN_TONES.isdisjoint(text)  # skin-tone variants follow their base emoji
            emoji.append((class_name, text, group))
    if not emoji:
        raise InputError(f"--table {path}: no emoji found: give the path of Unicode's emoji-test.txt")
    return emoji


def draw_all(font, emoji, size):
    """Yield (file name, index of the group, image) for each emoji that the font has.

    Emoji that look identical, such as the flags of Norway and Bouvet Island, are written only once, so that no picture
    is in both the training set and the held-out set.
    """
    seen = set()
    for class_name, text, group in tqdm(emoji, unit=" emoji"):
        image = draw(font, text)
        if image is None or hash(image.tobytes()) in seen:
            continue
        seen.add(hash(image.tobytes()))
        codes = "-".join(f"{ord(character):x}" for character in text)
        yield f"{class_name}_{codes}.png", group, image.resize((size, size), Image.LANCZOS)


def draw(font, text):
    """Draw an emoji centred on a white square. Return None if the font lacks the emoji or draws several glyphs."""
    width = font.getlength("\U0001f600")  # all emoji have the same width
    side = math.ceil(width)
    image = Image.new("RGB", (2 * side, 2 * side), "white")
    ImageDraw.Draw(image).text((side, side), text, font=font, embedded_color=True, anchor="mm")
    ink = ImageOps.invert(image).getbbox()
    if ink is None or font.getlength(text) > 1.5 * width:
        return None
    left, top = (ink[0] + ink[2] - side) // 2, (ink[1] + ink[3] - side) // 2
    return image.crop((left, top, left + side, top + side))


def create_argparser():
    parser = split_parser(__doc__, size=64)
    parser.add_argument("--font", default=FONT, help=f"path of a colour emoji font (default: the system's {FONT})")
    parser.add_argument("--table", default=TABLE, help=f"path of Unicode's emoji-test.txt (default: {TABLE})")
    return parser


if __name__ == "__main__":
    run(main)
