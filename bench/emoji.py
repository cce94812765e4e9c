"""The colour emoji of Google's Noto font (SIL Open Font License 1.1) as a folder of PNGs, a
sub-folder for each class.

    apt-get install fonts-noto-color-emoji; pip install fonttools pillow
    python bench/emoji.py emoji                        3,926 pictures of 136 x 128 pixels, seconds
    python train.py --data emoji --size 16 --classes --out runs/emoji      50 minutes of one core
    python sample.py --ckpt runs/emoji --n 80
    python bench/emoji.py runs/emoji assets/emoji.png

The last command draws sixteen samples of each class, and eight beside the training picture that is
nearest in pixels. It prints what it wrote.
"""

from pathlib import Path

import compare
import numpy as np
import torch

import data
import train
from formats import command
from formats.files import UserError
from formats.png import image_grid, write_png

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FACES = "1F600-1F644 1F910-1F917 1F920-1F92F 1F970-1F97A 1F9D0 1FAE0-1FAE8 2639-263A"
HANDS = (
    "261D 270A-270D 1F446-1F450 1F485 1F4AA 1F590-1F596 1F64C 1F64F 1F918-1F91F 1F90C 1F90F 1F932 "
    "1F933 1F9B5 1F9B6 1F9BB 1FAF0-1FAF8"
)
PEOPLE = "1F3FB-1F3FF 2640 2642 1F466-1F469 1F9D1"  # skin tones and genders, wherever they stand


def among(code, ranges):
    """Whether a code point lies in one of the ranges."""
    for part in ranges.split():
        low, _, high = part.partition("-")
        if int(low, 16) <= code <= int(high or low, 16):
            return True
    return False


def kind(codes):
    """The class of an emoji by its code points."""
    if len(codes) > 1 and (among(codes[0], "1F1E6-1F1FF") or codes[-1] == 0xE007F):
        return "flags"
    if among(codes[0], HANDS):
        return "hands"
    if any(among(code, PEOPLE) for code in codes):
        return "people"
    return "faces" if among(codes[0], FACES) else "things"


def code_points(font):
    """{glyph: code points}, of glyphs of one code point and of ligatures."""
    codes = {name: [code] for code, name in font.getBestCmap().items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    sequence = []
                    for name in (first, *ligature.Component):
                        sequence += codes.get(name, [0])
                    codes.setdefault(ligature.LigGlyph, sequence)
    return codes


def extract(folder):
    """The font's pictures as PNGs."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError:
        raise UserError("pip install fonttools to read the font") from None
    if not Path(FONT).exists():
        raise UserError(f"no {FONT}: apt-get install fonts-noto-color-emoji")
    font = TTFont(FONT)
    codes = code_points(font)
    written = 0
    for name, glyph in font["CBDT"].strikeData[0].items():
        if name in codes:
            file = "-".join(f"{code:x}" for code in codes[name]) + ".png"
            target = Path(folder, kind(codes[name]), file)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(glyph.imageData)
            written += 1
    print(f"{written} pictures in {folder}")


def show(run, picture):
    """A PNG of a run's samples.npz: a row for each class, and eight beside their nearest."""
    config = train.load_checkpoint(run)["config"]
    pictures = data.load(config.data, size=config.size).train[:].permute(0, 2, 3, 1)
    with np.load(Path(run, "samples.npz")) as file:
        x = file["arr_0"]
        labels = file["labels"]
    some = torch.from_numpy(x[:8])
    apart = torch.cdist(some.flatten(1).float(), pictures.flatten(1).float())
    pairs = torch.stack([some, pictures[apart.argmin(1)]], 1).flatten(0, 1)
    rows = [x[labels == i][:16] for i in np.unique(labels)]
    write_png(picture, image_grid(np.concatenate([*rows, pairs.numpy()]), columns=16, scale=3))
    print(f"{picture}: samples of {run}; last row: each beside the training picture nearest to it")


def main(argv=None):
    p = compare.parser(__doc__)
    p.add_argument("source", help="new folder for the pictures, or a run with samples")
    p.add_argument("picture", nargs="?", default="emoji.png", help="of a run: the PNG to write")

    def work():
        args = p.parse_args(argv)
        if Path(args.source, "ckpt.pt").exists():
            show(args.source, args.picture)
        else:
            extract(args.source)

    command.run(work)


if __name__ == "__main__":
    main()
