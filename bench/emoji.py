"""The colour emoji of Google's Noto font (SIL Open Font License 1.1) as a folder of PNGs, a sub-folder for each class.

apt-get install fonts-noto-color-emoji; pip install fonttools pillow
python bench/emoji.py emoji                                  3,926 pictures of 136x128 pixels
python train.py --data emoji --size 16 --classes --out runs/emoji
python sample.py --ckpt runs/emoji --class all --n 80
python bench/emoji.py runs/emoji emoji.png                   sixteen of each class; eight beside the nearest picture
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FACES = "1F600-1F644 1F910-1F917 1F920-1F92F 1F970-1F97A 1F9D0 1FAE0-1FAE8 2639-263A"
HANDS = "261D 270A-270D 1F446-1F450 1F485 1F4AA 1F590-1F596 1F64C 1F64F 1F918-1F91F 1F90C 1F90F 1F932 1F933 1F9B5 1F9B6"
HANDS += " 1F9BB 1FAF0-1FAF8"
PEOPLE = "1F3FB-1F3FF 2640 2642 1F466-1F469 1F9D1"  # skin tones and genders, wherever they stand


def among(code, ranges):
    return any(int(r.split("-")[0], 16) <= code <= int(r.split("-")[-1], 16) for r in ranges.split())


def kind(codes):
    """The class of an emoji by its code points."""
    if len(codes) > 1 and (among(codes[0], "1F1E6-1F1FF") or codes[-1] == 0xE007F):
        return "flags"
    if among(codes[0], HANDS):
        return "hands"
    if any(among(code, PEOPLE) for code in codes):
        return "people"
    return "faces" if among(codes[0], FACES) else "things"


def extract(folder, font=FONT):
    """The font's pictures as PNGs."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError:
        sys.exit("error: pip install fonttools to read the font")
    font = TTFont(font)
    codes = {name: [code] for code, name in font.getBestCmap().items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:  # a sequence of code points is a ligature
        for table in (getattr(t, "ExtSubTable", t) for t in lookup.SubTable):
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    parts = [codes.get(name, [0]) for name in (first, *ligature.Component)]
                    codes.setdefault(ligature.LigGlyph, [code for part in parts for code in part])
    pictures = {name: glyph for name, glyph in font["CBDT"].strikeData[0].items() if name in codes}
    for name, glyph in pictures.items():
        path = Path(folder, kind(codes[name]), "-".join(f"{code:x}" for code in codes[name]) + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(glyph.imageData)
    print(f"{len(pictures)} pictures in {folder}")


def show(run, picture):
    """A PNG: a row of samples for each class, and eight samples beside the training picture nearest in pixels."""
    config = train.load_checkpoint(run)["config"]
    pictures = data.load(config.data, size=config.size).train[:].permute(0, 2, 3, 1)
    with np.load(Path(run, "samples.npz")) as file:
        x, labels = file["arr_0"], file["labels"]
    some = x[:8]
    nearest = torch.cdist(torch.from_numpy(some).flatten(1).float(), pictures.flatten(1).float()).argmin(1)
    pairs = np.stack([some, pictures[nearest].numpy()], 1).reshape(16, *x.shape[1:])
    rows = [x[labels == i][:16] for i in np.unique(labels)]
    data.write_png(picture, data.image_grid(np.concatenate([*rows, pairs]), columns=16, scale=3))


if __name__ == "__main__":
    if sys.argv[2:] and Path(sys.argv[1], "ckpt.pt").exists():
        show(*sys.argv[1:])
    else:
        extract(*sys.argv[1:])
