"""A small real data set, and the overrides that make any image-text experiment a tiny one."""

from __future__ import annotations

import io
import json
from pathlib import Path

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
PLACES = ("left", "right", "top", "bottom")

OVERRIDES = [
    "experiment=image_text_clip",
    "model=clip_tiny",
    "trainer=cpu",
    "tokenizer=bytes",
    "tokenizer.context_length=24",
    "model.encoders.text.vocab_size=259",
    "model.encoders.text.eos_id=2",
    "model.encoders.text.width=32",
    "model.encoders.text.depth=1",
    "model.encoders.text.num_heads=2",
    "model.encoders.image.model_args={img_size:16,depth:1,num_heads:2,patch_drop_rate:0.0}",
    "+model.encoders.image.model_args.embed_dim=32",
    "model.embed_dim=16",
    "data.image_size=16",
    "data.num_workers=0",
    "data.global_batch_size=8",
    "scheduler.warmup_steps=1",
    "trainer.max_steps=6",
    "trainer.precision=32-true",
    "callbacks.log_every_n_steps=1",
    "optimizer.lr=0.003",
]


def write_pictures(folder: Path) -> Path:
    """Write 4 shards with 64 real PNG pictures: a coloured half, captioned 'red left 0' and so on."""
    import webdataset
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    cases = [(colour, place, shade) for colour in COLOURS for place in PLACES for shade in range(4)]
    for number in range(4):
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as writer:
            for index in range(number, len(cases), 4):
                colour, place, shade = cases[index]
                picture = Image.new("RGB", (20, 20), (shade * 60,) * 3)
                box = {
                    "left": (0, 0, 9, 19),
                    "right": (10, 0, 19, 19),
                    "top": (0, 0, 19, 9),
                    "bottom": (0, 10, 19, 19),
                }
                ImageDraw.Draw(picture).rectangle(box[place], fill=COLOURS[colour])
                data = io.BytesIO()
                picture.save(data, "PNG")
                text = f"{colour} {place}"
                sample = {"__key__": f"{index:04d}", "png": data.getvalue(), "txt": f"{text} {shade}"}
                label = list(COLOURS).index(colour)
                sample["json"] = json.dumps({"caption": [f"{text} {shade}", text], "label": label}).encode()
                sample["cls"] = str(label)
                writer.write(sample)
    return folder
